"""An inspection as text for a terminal: coloured by gain, with a sign beside every colour."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from qstar.inspection import terminal_parts as parts
from qstar.inspection.data import Inspection
from qstar.inspection.highlights import (
    WEIGHTS,
    Place,
    ahead_name,
    bin_names,
    counted,
    difficulty_name,
    extremes,
    histogram,
    level,
    places,
)
from qstar.inspection.terminal_parts import DOWN, INDENT, SIGNS, STYLES, UP
from qstar.inspection.visible import visible


def render(inspection: Inspection, *, width: int = 80, colour: bool = False, thoughts: int = 10) -> str:
    """An inspection as lines of text.

    Args:
        inspection: to show.
        width: of a line, in characters.
        colour: write a terminal's escape codes; the signs say the same without them.
        thoughts: how many of the best thoughts are listed, and of the worst.
    """
    return parts.lines(_shown(inspection, width, thoughts), width=width, colour=colour)


def _shown(inspection: Inspection, width: int, thoughts: int) -> Iterator[RenderableType]:
    yield _heading(inspection)
    yield parts.texts(
        inspection.documents,
        [
            {each.index + 1: level(each.gain) for each in document.positions if each.gain is not None}
            for document in inspection.documents
        ],
    )
    for what, found in zip(("best", "worst"), extremes(inspection, thoughts), strict=True):
        if found:
            yield parts.title(f"{what} thoughts, by the gain for the next token")
        for rank, place in enumerate(found, 1):
            context = parts.context(place.document, place.position, width - INDENT)
            yield from parts.ranked(rank, _facts(place), [context, *parts.thoughts(place.position)])
    yield parts.title("gain for the next token, nats")
    yield parts.level_bars([level(each.position.gain or 0.0) for each in places(inspection)])
    yield parts.title("weight of a thought")
    yield _weights(inspection)
    yield parts.title("most frequent thoughts")
    yield from _frequent(inspection)
    yield ""
    yield from (parts.signs({"": inspection.summary}), _difficulties(inspection), _summary(inspection))


def _heading(inspection: Inspection) -> Text:
    summary = inspection.summary
    return Text(visible(inspection.model), style="bold").append(
        f"\n{counted(summary.tokens, 'token')} of {counted(summary.documents, 'text')} predicted, each after "
        f"{parts.thinking(inspection)}{parts.cut(inspection)}"
        f"\nA token that gained by the thought before it has {UP}; one that lost has {DOWN}.\n",
        style="not bold",
    )


def _facts(place: Place) -> Text:
    gain = place.position.gain or 0.0
    text = Text().append(f"gain {gain:+.3f}{SIGNS[level(gain)]}", STYLES[level(gain)])
    return text.append(
        f"  weight {place.position.weight:.3f}  text {place.number + 1}, token {place.position.index + 2}"
    )


def _weights(inspection: Inspection) -> Table:
    values = [each.weight for place in places(inspection) for each in place.position.rationales]
    first, *inner, last = zip(bin_names(WEIGHTS), histogram(values, WEIGHTS), strict=True)
    kept = [*([first] if first[1] else []), *inner, *([last] if last[1] else [])]
    return parts.bars([(name, "", count, "") for name, count in kept])


def _summary(inspection: Inspection) -> Table:
    summary = inspection.summary
    table = parts.table("gain over no thought", "nats a token", "95 % interval")
    for ahead, gain in enumerate(summary.gain_ahead, 1):
        if gain is not None:
            table.add_row(f"its thoughts, {ahead_name(ahead)}", *parts.estimate(gain))
    for name, control in summary.controls.items():
        table.add_row(name, *parts.estimate(control.gain))
        table.add_row("  its thoughts beyond that", *parts.estimate(control.lead))
    return table


def _difficulties(inspection: Inspection) -> Table:
    table = parts.table("next tokens by nats without thoughts", "tokens", "gain", "95 % interval")
    for each in inspection.summary.difficulties:
        table.add_row(difficulty_name(each), str(each.tokens), *parts.estimate(each.gain))
    return table


def _frequent(inspection: Inspection) -> Iterator[Text]:
    for each in inspection.summary.frequent:
        share = each.count / inspection.summary.thoughts
        yield Text(f"{each.count:6} {share:6.1%}  ⟨{visible(''.join(each.tokens))}⟩", overflow="fold")
