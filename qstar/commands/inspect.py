"""``qstar inspect``: what a trained model thought at each token of a text, and what it gained."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qstar.commands.flags import add_settings, ready_model, taken, takes_codes, write_out
from qstar.data.documents import fill
from qstar.data.files import DOCUMENTS
from qstar.data.settings import DataSettings, read_texts
from qstar.data.values import checked_text
from qstar.inspection.run import inspect
from qstar.inspection.settings import InspectionSettings


def run(arguments: list[str]) -> None:
    """Inspect the texts that the arguments name, and show or write what was found."""
    options = _parser().parse_args(arguments)
    try:
        from qstar.inspection.page import page
        from qstar.inspection.terminal import render
    except ModuleNotFoundError as error:
        raise ValueError(
            f"qstar inspect needs the extra inspect, but {error.name} is not installed: pip install rich jinja2"
        ) from error
    if options.thoughts < 0:
        raise ValueError(f"thoughts is {options.thoughts}, but it must be at least 0")
    settings = taken(vars(options), InspectionSettings)
    texts = _texts(options.text, options.file, taken(vars(options), DataSettings))
    model, tokenizer = ready_model(options.folder)
    found = inspect(model, tokenizer, texts, name=str(options.folder), **asdict(settings))
    width, colour = shutil.get_terminal_size().columns, takes_codes(sys.stdout)
    shown = render(found, width=width, colour=colour, thoughts=options.thoughts)
    encoding = sys.stdout.encoding or "utf-8"
    write_out(shown.encode(encoding, "backslashreplace").decode(encoding))
    for file, content in ((options.json, found.to_json), (options.html, lambda: page(found))):
        if file is not None:
            file.write_text(content() + "\n", encoding="utf-8")
            print(f"written to {file}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qstar inspect",
        usage="qstar inspect FOLDER (--text TEXT ... | --file FILE) [--html FILE] [--json FILE] [--SETTING VALUE ...]",
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
