"""``qstar inspect``: what a trained model thought at each token of a text, and what it gained."""

from __future__ import annotations

import argparse
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

from qstar.commands.flags import add_settings, ready_model, taken, takes_codes, write_out
from qstar.data.files import DOCUMENTS
from qstar.data.load import load_texts
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
    texts = _texts(options.text, options.file, options.text_column, options.documents)
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
    parser.add_argument("--text-column", default="text", metavar="NAME", help="Of a file: its texts (default: text).")
    parser.add_argument(
        "--documents", default="paragraph", choices=list(DOCUMENTS), help="What is one text in a .txt file."
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="Write a page there that shows it in a browser.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="Write all that was found there.")
    parser.add_argument(
        "--thoughts", type=int, default=10, metavar="N", help="List so many of the best and worst thoughts."
    )
    add_settings(parser, InspectionSettings)
    return parser


def _texts(text: list[str] | None, file: Path | None, column: str, documents: str) -> list[str]:
    if text is not None:
        return text
    rows = load_texts(file or "", documents=documents, columns=[column], name="file")
    if column not in (rows.column_names or []):
        raise ValueError(f"text_column is {column!r}, but {file} has {', '.join(map(repr, rows.column_names or []))}")
    return [row[column] for row in rows]
