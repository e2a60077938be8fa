"""``qstar merge``: an ordinary model out of adapters and their base."""

from __future__ import annotations

import argparse
from pathlib import Path

from qstar.adapters import holds_adapters, merge_adapters
from qstar.training.savable import make_folder
from qstar.wrapping import load


def run(arguments: list[str]) -> None:
    """Merge the adapters that the arguments name, and write the model."""
    parser = argparse.ArgumentParser(
        prog="qstar merge",
        description="Add the adapters that `qstar train --lora` wrote to the weights of their base, and write an "
        "ordinary model, which needs neither the base nor peft.",
    )
    parser.add_argument("folder", type=Path, help="What `qstar train --lora` wrote.")
    parser.add_argument("output_dir", type=Path, help="Folder for the model, which is new or empty.")
    options = parser.parse_args(arguments)
    merge(options.folder, options.output_dir)
    print(f"saved in {options.output_dir}")


def merge(folder: Path, output_dir: Path) -> None:
    """Merge the adapters in ``folder`` into their base, and write model and tokenizer to ``output_dir``.

    Raises:
        ValueError: ``folder`` holds no adapters; and whatever else :func:`qstar.load` raises.
        FileExistsError: ``output_dir`` is not empty.
        OSError: it cannot be written to.
    """
    if not holds_adapters(folder):
        raise ValueError(f"folder is {str(folder)!r}, but it must hold adapters, as `qstar train --lora` writes them")
    make_folder(output_dir)
    if any(output_dir.iterdir()):
        raise FileExistsError(f"output_dir is {str(output_dir)!r}, but it is not empty: choose another folder")
    model, tokenizer = load(folder)
    merge_adapters(model)
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
