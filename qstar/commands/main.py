"""The command ``qstar``: finds the command that is named, and says what went wrong in it."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Sequence

COMMANDS = {
    "train": "train a model; without arguments, a small built-in one on a built-in task (half a minute on a laptop)",
    "generate": "continue prompts, with a thought before every token",
    "chat": "talk to a trained model",
    "merge": "add trained adapters (LoRA) to their base: a folder with an ordinary model",
    "eval": "what a model gained by thinking: on tasks, beside controls, and on held-out text",
    "inspect": "what a model thought at each token of a text, how much of it counted, and what it gained",
    "star": "teach a model to reason by those of its own rationales that reach the right answer (STaR)",
    "compare": "Quiet-STaR beside direct answers, chain of thought, pause tokens and STaR, on the built-in task",
    "doctor": "whether all is well here: versions, devices, backends, and a check of itself",
}
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")  # how OpenMP's threads wait: read once, as torch is imported
SPINS = "1000"
USAGE = f"""usage: qstar [-h] [--traceback] {{{",".join(COMMANDS)}}} ...

Teach a language model to think before it speaks (Quiet-STaR).

commands:
{"".join(f"  {name:10}{what}{chr(10)}" for name, what in COMMANDS.items())}
--traceback, before the command, shows where in the code an error arose.
qstar COMMAND --help tells more.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit code is 0, 1 where it failed or found a problem, and 2 where its arguments are wrong."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    traced = arguments[:1] == ["--traceback"]
    arguments = arguments[traced:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if arguments else 2
    command, *rest = arguments
    if command not in COMMANDS:
        print(f"{USAGE}\nqstar: unknown command {command!r}", file=sys.stderr)
        return 2
    wait_briefly()
    try:
        code = importlib.import_module(f"qstar.commands.{command}").run(rest)
    except (OSError, TypeError, ValueError, FloatingPointError, MemoryError) as error:
        if traced:
            traceback.print_exc()
        print(f"qstar {command}: {error}", file=sys.stderr)
        return 1
    return code or 0


def wait_briefly() -> None:
    """Let threads that wait for each other soon give their cores away; what a user has set stays.

    By default GNU's OpenMP spins for milliseconds. On a machine that nobody else uses the time is the same; beside one
    process that keeps a core busy, two threads on two cores took more than ten times as long when they spun.
    """
    if not any(name in os.environ for name in WAITING):
        os.environ["GOMP_SPINCOUNT"] = SPINS
