"""``qstar inspect``: what a trained model thought at each token of a text, what it gained; also beside another one."""

from __future__ import annotations

import argparse
import gc
import shutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from qstar.commands.flags import add_settings, ready_model, taken, takes_codes, write_out
from qstar.config import QuietStarConfig
from qstar.data.documents import fill
from qstar.data.files import DOCUMENTS
from qstar.data.settings import DataSettings, read_texts
from qstar.data.values import checked_text
from qstar.inspection.comparison import Comparison, check_same_tokens, compare
from qstar.inspection.comparison_page import comparison_page
from qstar.inspection.data import Inspection
from qstar.inspection.page import page
from qstar.inspection.run import inspect, tokens_of
from qstar.inspection.settings import InspectionSettings
from qstar.wrapping import load_tokenizer


def run(arguments: list[str]) -> None:
    """Inspect the texts that the arguments name, and show or write what was found."""
    options = _parser().parse_args(arguments)
    try:
        from qstar.inspection.comparison_terminal import render_comparison
        from qstar.inspection.terminal import render
    except ModuleNotFoundError as error:
        raise ValueError(
            f"qstar inspect needs the extra inspect, but {error.name} is not installed: pip install rich"
        ) from error
    if options.thoughts < 0:
        raise ValueError(f"thoughts is {options.thoughts}, but it must be at least 0")
    for name, file in (("json", options.json), ("html", options.html)):
        if file is not None and not file.absolute().parent.is_dir():
            raise ValueError(f"{name} is {str(file)!r}, but there is no folder {str(file.parent)!r} to write it to")
    settings = taken(vars(options), InspectionSettings)
    texts = partial(_texts, options.text, options.file, taken(vars(options), DataSettings))
    asked: dict[str, Any] = dict(
        width=shutil.get_terminal_size().columns, colour=takes_codes(sys.stdout), thoughts=options.thoughts
    )
    found: Inspection | Comparison
    if options.compare is None:
        found = _inspected(options.folder, texts(), settings)
        shown, html = render(found, **asked), partial(page, found)
    else:
        found = _compared(options.folder, options.compare, texts, settings)
        shown, html = render_comparison(found, **asked), partial(comparison_page, found)
    encoding = sys.stdout.encoding or "utf-8"
    write_out(shown.encode(encoding, "backslashreplace").decode(encoding))
    for file, content in ((options.json, found.to_json), (options.html, html)):
        if file is not None:
            file.write_text(content() + "\n", encoding="utf-8")
            print(f"written to {file}")


def _inspected(folder: Path, texts: Iterable[str], settings: InspectionSettings) -> Inspection:
    model, tokenizer = ready_model(folder)
    return inspect(model, tokenizer, texts, name=str(folder), **asdict(settings))


def _compared(
    first: Path, second: Path, texts: Callable[[], Iterable[str]], settings: InspectionSettings
) -> Comparison:
    """Two models on the same texts, one after the other: only one of them is in memory.

    Raises:
        FileNotFoundError: a folder holds no model that thinks.
        ValueError: both folders are the same; their tokenizers cut a text differently.
    """
    for folder in (first, second):
        QuietStarConfig.load(folder)
    if first.samefile(second):
        raise ValueError(f"compare is {str(second)!r}, but it must be another folder than the one it is compared with")
    read = [tokens_of(load_tokenizer(folder), texts(), settings.max_tokens)[0] for folder in (first, second)]
    check_same_tokens(*([each.ids for each in documents] for documents in read))
    found = _inspected(first, texts(), settings)
    gc.collect()  # a model may be in circles of references
    return compare(found, _inspected(second, texts(), found.settings))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qstar inspect",
        usage="qstar inspect FOLDER (--text TEXT ... | --file FILE) [--compare FOLDER] [--html FILE] [--json FILE] "
        "[--SETTING VALUE ...]",
        description="What a trained model thought at each token of a text, how much of it counted, and what it gained: "
        "the text coloured by gain, the best and the worst thoughts, histograms and a summary with controls.",
    )
    parser.add_argument("folder", type=Path, help="What `qstar train` wrote.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", action="append", metavar="TEXT", help="A text; may be repeated.")
    source.add_argument("--file", type=Path, metavar="FILE", help="A .txt, .jsonl, .json or .parquet file of texts.")
    of_file = parser.add_argument_group("file", argument_default=argparse.SUPPRESS)
    of_file.add_argument("--text-column", metavar="NAME", help="The column of texts (default: text).")
    of_file.add_argument("--text-format", metavar="FORMAT", help='A text made of columns, as in "{question} {answer}".')
    of_file.add_argument(
        "--documents", choices=list(DOCUMENTS), help="What is one text in a .txt file (default: paragraph)."
    )
    parser.add_argument(
        "--compare", type=Path, metavar="FOLDER", help="Show the model in this folder beside it, on the same texts."
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="Write a page there that shows it in a browser.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="Write all that was found there.")
    parser.add_argument(
        "--thoughts", type=int, default=10, metavar="N", help="List so many of the best and worst thoughts."
    )
    add_settings(parser, InspectionSettings)
    return parser


def _texts(texts: list[str] | None, file: Path | None, settings: DataSettings) -> Iterable[str]:
    """The texts that are given, or those in a file, read as they are asked for."""
    if file is None:
        for each in ("text_column", "text_format", "documents"):
            value = getattr(settings, each)
            if value != getattr(DataSettings, each):
                raise ValueError(f"{each} is {value!r}, but there is no file of texts: give --file FILE")
        return texts or []
    if file.is_dir():
        raise ValueError(f"file is {str(file)!r}, but it must be a file, not a folder")
    settings.check_data()
    settings.check_documents(file)
    rows = read_texts(file, "train", settings, None, "file")
    there = rows.column_names or []
    for name in settings.columns():
        if name not in there:
            raise ValueError(f"{file} has no column {name!r}, but {', '.join(map(repr, there))}")

    def text(row: dict[str, Any], place: str) -> str:
        values = {name: checked_text(row[name], name, place) for name in settings.columns()}
        return values[settings.text_column] if settings.text_format is None else fill(settings.text_format, values)

    return (text(row, f"{file}, row {number}") for number, row in enumerate(rows, 1))
