"""Two models beside each other as one HTML file, which loads nothing, as :mod:`qstar.inspection.page` makes of one."""

from __future__ import annotations

from typing import Any

from qstar.inspection import page_parts as parts
from qstar.inspection.comparison import (
    SIDES,
    Comparison,
    Pair,
    difficulties_beside,
    gains_beside,
    largest_differences,
    paired,
)
from qstar.inspection.highlights import LEVELS, level, level_name

LETTERS = ("t", "u")  # that ids of tokens begin with


def comparison_page(comparison: Comparison, *, thoughts: int = 20) -> str:
    """A comparison as an HTML page.

    Args:
        comparison: to show.
        thoughts: how many of the tokens that the second model predicts better are listed, and of those it predicts
            worse.
    """
    found = comparison.first, comparison.second
    pairs = paired(*found)
    differences = [{pair.first.index + 1: {"d": level(pair.talk_log_prob)} for pair in some} for some in pairs]
    columns = [parts.texts(each, letter, differences) for each, letter in zip(found, LETTERS, strict=True)]
    better, worse = largest_differences(comparison, thoughts)
    steps = [(step, level_name(step)) for step in LEVELS]
    return parts.written(
        "comparison.html",
        "page.js",
        comparison=comparison,
        sides=list(zip(SIDES, found, strict=True)),
        documents=list(zip(*columns, strict=True)),
        better=[_ranked(pair) for pair in better],
        worse=[_ranked(pair) for pair in worse],
        legends=[("difference", "difference", "nats, second less first", steps), *parts.OF_MODEL],
        differences=parts.level_bars([level(pair.talk_log_prob) for some in pairs for pair in some]),
        gains=[parts.gain_bars(each) for each in found],
        weights=[parts.weight_bars(each) for each in found],
        difficulties=parts.difficulty_charts(*found),
        gain_rows=gains_beside(*(each.summary for each in found)),
        difficulty_rows=difficulties_beside(*(each.summary for each in found)),
        data=comparison_data(comparison),
    )


def _ranked(pair: Pair) -> dict[str, Any]:
    """A token that one of the models predicts better."""
    return parts.place(pair.number, pair.document, pair.first) | {
        "difference": pair.talk_log_prob,
        "level": level(pair.talk_log_prob),
        "sides": list(zip(SIDES, (pair.first, pair.second), strict=True)),
    }


def comparison_data(comparison: Comparison) -> dict[str, Any]:
    """What the page's script shows of a token: as of one model for each, and the differences of the next token."""
    number_of = parts.Strings()
    models = [
        {"name": side, "documents": parts.documents_data(each, number_of)}
        for side, each in zip(SIDES, (comparison.first, comparison.second), strict=True)
    ]
    differences = [
        {
            pair.first.index: {
                "talk": parts.rounded(pair.talk_log_prob),
                "base": parts.rounded(pair.base_log_prob),
                "gain": parts.rounded(pair.gain),
            }
            for pair in some
        }
        for some in paired(comparison.first, comparison.second)
    ]
    return {"models": models, "differences": differences, "strings": list(number_of.numbers)}
