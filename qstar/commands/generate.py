"""``qstar generate``: what a trained model says to prompts, with a thought before every token."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path
from typing import Any

from qstar.commands.flags import add_settings, ready_model, taken, takes_codes, write_out
from qstar.generation.settings import GenerationSettings
from qstar.generation.streaming import ThoughtStreamer
from qstar.prompting.continuations import Continuation, Continuations, accuracy_line, check_shown
from qstar.prompting.prompts import Prompt, prompts_of_lines, read_prompts
from qstar.prompting.settings import SearchSettings


def run(arguments: list[str]) -> None:
    """Continue the prompts that the arguments name, and print or write the continuations."""
    options = vars(_parser().parse_args(arguments))
    settings, search = taken(options, GenerationSettings), taken(options, SearchSettings)
    folder, batch_size, show, output = (
        options.pop(name) for name in ("folder", "batch_size", "show_thoughts", "output")
    )
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, but it must be at least 1")
    check_shown(settings, show)
    prompts = _prompts(**options)
    model, tokenizer = ready_model(folder)
    dimmed = takes_codes(sys.stdout)
    continuations = Continuations(model, tokenizer, settings, search, show_thoughts=show, dimmed=dimmed)
    streams = len(prompts) == 1 and output is None and search.one_at_a_time(model.generation_config)
    streamer = ThoughtStreamer(tokenizer, write_out, show_thoughts=show, dimmed=dimmed) if streams else None
    made: list[Continuation] = []
    coming = continuations.of(prompts, batch_size, streamer)
    with contextlib.nullcontext() if output is None else output.open("w", encoding="utf-8") as file:
        for each in coming:
            made.append(each)
            if file is not None:
                print(json.dumps(each.record(), ensure_ascii=False), file=file)
            else:
                print("" if streams else f"{each.prompt.text}{each.shown}", flush=True)
    if (accuracy := accuracy_line(made)) is not None:
        print(accuracy)
    if output is not None:
        print(f"written to {output}")
    print(continuations.report(), file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qstar generate",
        usage="qstar generate FOLDER [--prompt TEXT ... | --prompts FILE] [--SETTING VALUE ...]",
        description="What a trained model says to prompts. One prompt's continuation is shown alone, as it is made; "
        "several are continued in batches, and shown behind their prompts. Without --prompt and --prompts, each line "
        "of the standard input is a prompt.",
    )
    parser.add_argument("folder", type=Path, help="What `qstar train` wrote.")
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="A text to continue; may be repeated.")
    parser.add_argument(
        "--prompts", type=Path, metavar="FILE", help="A .jsonl or .json file, or .txt, a prompt a line."
    )
    parser.add_argument("--prompt-column", metavar="NAME", help="Of a JSON file: the prompts (default: prompt).")
    parser.add_argument(
        "--answer-column",
        metavar="NAME",
        help="Of a JSON file: what continuations should be (default: answer, where there is one).",
    )
    parser.add_argument("--batch-size", type=int, default=8, help="Prompts at a time (default: 8).")
    parser.add_argument("--show-thoughts", action="store_true", help="Show each thought before its token.")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="Write lines of JSON there; continuations are not printed then."
    )
    add_settings(parser, GenerationSettings)
    add_settings(parser, SearchSettings)
    return parser


def _prompts(
    prompt: list[str] | None, prompts: Path | None, prompt_column: str | None, answer_column: str | None
) -> list[Prompt]:
    if prompt is not None and prompts is not None:
        raise ValueError("prompt and prompts both say what to continue: give one of them")
    if prompts is not None:
        return read_prompts(prompts, prompt_column, answer_column)
    columns: dict[str, Any] = {"prompt_column": prompt_column, "answer_column": answer_column}
    for name, column in columns.items():
        if column is not None:
            raise ValueError(f"{name} is {column!r}, but there is no file of prompts: give --prompts FILE")
    if prompt is not None:
        return [Prompt(text) for text in prompt]
    if sys.stdin.isatty():
        raise ValueError("no prompt is given: --prompt TEXT, --prompts FILE, or a prompt a line on the standard input")
    return prompts_of_lines(sys.stdin, "the standard input")
