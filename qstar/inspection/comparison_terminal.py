"""Two models beside each other as text for a terminal: coloured by which of them predicts a token better."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from qstar.inspection import terminal_parts as parts
from qstar.inspection.comparison import (
    SIDES,
    Comparison,
    Pair,
    difficulties_beside,
    gains_beside,
    largest_differences,
    paired,
)
from qstar.inspection.data import Position
from qstar.inspection.highlights import counted, level
from qstar.inspection.terminal_parts import DOWN, INDENT, SIGNS, STYLES, UP
from qstar.inspection.visible import visible


def render_comparison(comparison: Comparison, *, width: int = 80, colour: bool = False, thoughts: int = 10) -> str:
    """A comparison as lines of text.

    Args:
        comparison: to show.
        width: of a line, in characters.
        colour: write a terminal's escape codes; the signs say the same without them.
        thoughts: how many of the tokens that the second model predicts better are listed, and of those it predicts
            worse.
    """
    return parts.lines(_shown(comparison, width, thoughts), width=width, colour=colour)


def _shown(comparison: Comparison, width: int, thoughts: int) -> Iterator[RenderableType]:
    pairs = paired(comparison.first, comparison.second)
    yield _heading(comparison)
    yield parts.texts(
        comparison.first.documents,
        [{pair.first.index + 1: level(pair.talk_log_prob) for pair in some} for some in pairs],
    )
    for what, found in zip(("better", "worse"), largest_differences(comparison, thoughts), strict=True):
        if found:
            yield parts.title(f"tokens that the second predicts {what} after its thoughts")
        for rank, pair in enumerate(found, 1):
            yield from parts.ranked(rank, _facts(pair), _details(pair, width - INDENT))
    yield parts.title("log-probability of the next token after thoughts: second less first, nats")
    yield parts.level_bars([level(pair.talk_log_prob) for some in pairs for pair in some])
    yield ""
    yield from (_signs(comparison), _difficulties(comparison), _gains(comparison), _summary(comparison))


def _heading(comparison: Comparison) -> Text:
    text = Text()
    for side, found in zip(SIDES, (comparison.first, comparison.second), strict=True):
        text.append(f"{side:6}  ").append(f"{visible(found.model)}\n", "bold")
        text.append(f"{'':6}  after {parts.thinking(found)}\n")
    return text.append(
        f"{counted(comparison.tokens, 'token')} of {counted(len(comparison.first.documents), 'text')} predicted by both"
        f"{parts.cut(comparison.first)}"
        f"\nA token that the second predicts better after its thoughts than the first has {UP}; "
        f"one that it predicts worse has {DOWN}.\n"
    )


def _facts(pair: Pair) -> Text:
    step = level(pair.talk_log_prob)
    text = Text().append(f"difference {pair.talk_log_prob:+.3f}{SIGNS[step]}", STYLES[step])
    return text.append(f"  text {pair.number + 1}, token {pair.first.index + 2}")


def _details(pair: Pair, width: int) -> Iterator[Text]:
    yield parts.context(pair.document, pair.first, width)
    for side, position in zip(SIDES, (pair.first, pair.second), strict=True):
        yield _values(side, position)
        yield from parts.thoughts(position)


def _values(side: str, position: Position) -> Text:
    text = Text(f"{side:6}", style="bold")
    return text.append(
        f"  log-probability {position.talk_log_prob[0]:.3f}  gain {position.gain:+.3f}  weight {position.weight:.3f}",
        "not bold",
    )


def _summary(comparison: Comparison) -> Table:
    table = parts.table("log p of next token", *SIDES, "difference", "95 % interval")
    for name, values in (
        ("after thoughts", comparison.talk_log_prob),
        ("without thoughts", comparison.base_log_prob),
        ("gain", comparison.gain),
    ):
        table.add_row(name, f"{values.first:+.4f}", f"{values.second:+.4f}", *parts.estimate(values.difference))
    return table


def _gains(comparison: Comparison) -> Table:
    table = parts.table("gain over no thought", *SIDES)
    for name, *both in gains_beside(comparison.first.summary, comparison.second.summary):
        table.add_row(name, *("" if each is None else f"{each.mean:+.4f}" for each in both))
    return table


def _difficulties(comparison: Comparison) -> Table:
    table = parts.table("gain by nats without thoughts", *SIDES)
    for name, *both in difficulties_beside(comparison.first.summary, comparison.second.summary):
        table.add_row(name, *("" if each is None else f"{each.gain.mean:+.4f} of {each.tokens:4}" for each in both))
    return table


def _signs(comparison: Comparison) -> Table:
    table = parts.signs({"first": comparison.first.summary, "second": comparison.second.summary})
    table.add_row("likeliest next tokens that only it has right", str(comparison.broken), str(comparison.repaired))
    return table
