"""``qstar chat``: talk to a trained model that thinks before every token of its answers."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from qstar.commands.flags import add_settings, ready_model, taken, takes_codes, write_out
from qstar.generation.settings import GenerationSettings
from qstar.prompting.continuations import check_shown
from qstar.prompting.conversation import Conversation
from qstar.prompting.settings import ChatSettings

HELP = """/think on|off     think before tokens, or answer as the base model
/thoughts on|off  show thoughts, or hide them
/reset            begin anew
/help             show this
/quit             end; so does the end of the input
Ctrl-C stops an answer.
"""


def run(arguments: list[str]) -> None:
    """Chat with the model that the arguments name, until the input ends."""
    parser = argparse.ArgumentParser(
        prog="qstar chat",
        usage="qstar chat FOLDER [--system TEXT] [--SETTING VALUE ...]",
        description="Talk to a trained model. /help lists what can be typed beside messages.",
    )
    parser.add_argument(
        "folder", type=Path, help="What `qstar train` wrote, with a tokenizer that has a chat template."
    )
    parser.add_argument("--system", metavar="TEXT", help="What the model is told first.")
    parser.add_argument("--show-thoughts", action="store_true", help="Show each thought before its token.")
    add_settings(parser, GenerationSettings)
    add_settings(parser, ChatSettings)
    options = vars(parser.parse_args(arguments))
    settings, decoding = taken(options, GenerationSettings), taken(options, ChatSettings)
    check_shown(settings, options["show_thoughts"])
    model, tokenizer = ready_model(options.pop("folder"))
    conversation = Conversation(model, tokenizer, settings, decoding, dimmed=takes_codes(sys.stdout), **options)
    decoding.set_seed(model.generation_config)
    typed = sys.stdin.isatty()
    if typed:
        print("/help lists the commands, /quit ends.")
    chat(conversation, typed_lines() if typed else sys.stdin, write_out)


def chat(conversation: Conversation, lines: Iterable[str], write: Callable[[str], Any]) -> None:
    """Answer each line, or do what it says where it begins with a slash."""
    for line in map(str.strip, lines):
        if line == "/quit":
            return
        if line.startswith("/"):
            write(obey(conversation, line) + "\n")
        elif line:
            try:
                conversation.answer(line, write)
            except KeyboardInterrupt:
                write(" (stopped)")
            except ValueError as error:
                write(f"{error} (/reset begins anew)")
            write("\n")


def obey(conversation: Conversation, command: str) -> str:
    """Do what a command says, and say what was done."""
    match command.split():
        case ["/think", "on" | "off" as wanted]:
            conversation.think(wanted == "on")
            return f"thinking is {wanted}"
        case ["/thoughts", "on" | "off" as wanted]:
            conversation.show_thoughts = wanted == "on"
            return f"thoughts are {'shown' if conversation.show_thoughts else 'hidden'}"
        case ["/reset"]:
            conversation.reset()
            return "the chat begins anew"
        case ["/help"]:
            return HELP.rstrip("\n")
    return f"{command!r} is no command: /help lists them"


def typed_lines() -> Iterator[str]:
    """Lines that are typed, until Ctrl-D; Ctrl-C gives up the line."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # lets input() edit and remember lines, where the platform has it
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
