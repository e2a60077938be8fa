"""``qstar compare``: Quiet-STaR beside its ancestors on the built-in task, in one table and one picture."""

from __future__ import annotations

import argparse
from pathlib import Path

from qstar.commands.flags import add_settings
from qstar.embedded.compare import DEFAULT, REPORT_FILE, CompareSettings, compare
from qstar.embedded.comparison_plot import PLOT_FILE


def run(arguments: list[str]) -> None:
    """Compare as the arguments say, and print the table."""
    parser = argparse.ArgumentParser(
        prog="qstar compare",
        description="Trains and asks direct answers, chain of thought, pause tokens, STaR and Quiet-STaR on the "
        "built-in task: one base, the same problems with their answers, the same unseen problems. Needs no network.",
    )
    parser.add_argument("--output-dir", type=Path, help=f"Folder for all of it (default: {DEFAULT}).")
    add_settings(parser, CompareSettings)
    found = compare(**vars(parser.parse_args(arguments)))
    asked, plot = len(found.report.questions.questions), found.folder / PLOT_FILE
    print(f"\n{found.table()}\n\n{asked} unseen problems, chance is 1 in 10; {found.seconds} s in all")
    print(f"written to {found.folder / REPORT_FILE}{f' and {plot}' if plot.exists() else ''}")
