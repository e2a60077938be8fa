"""An inspection as text for a terminal: coloured by gain, with a sign beside every colour."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len, chop_cells
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from qstar.inspection.data import Document, Estimate, Inspection, Likely, Rationale
from qstar.inspection.highlights import (
    LEVELS,
    SCALE,
    WEIGHTS,
    Place,
    bin_names,
    counted,
    extremes,
    histogram,
    level,
    level_name,
    places,
)
from qstar.inspection.visible import visible, visible_token

STYLES = {  # orange for losses and blue for gains, which all eyes tell apart
    -3: "bright_white on #a63603",
    -2: "black on #fd8d3c",
    -1: "black on #fdd0a2",
    0: "",
    1: "black on #c6dbef",
    2: "black on #6baed6",
    3: "bright_white on #08519c",
}
SIGNS = {step: ("⁺" if step > 0 else "⁻") * abs(step) for step in LEVELS}
NEWLINE = "\n"
INDENT = 4
FOLLOWING = 8  # tokens shown behind a thought
BAR = 40  # characters of the longest bar
LONGEST = 24  # characters of a token where it is one of several


def render(inspection: Inspection, *, width: int = 80, colour: bool = False, thoughts: int = 10) -> str:
    """An inspection as lines of text.

    Args:
        inspection: to show.
        width: of a line, in characters.
        colour: write a terminal's escape codes; the signs say the same without them.
        thoughts: how many of the best thoughts are listed, and of the worst.
    """
    file = io.StringIO()
    console = Console(
        file=file,
        width=width,
        force_terminal=colour,
        force_jupyter=False,
        color_system="auto" if colour else None,
        no_color=not colour,
        markup=False,
        emoji=False,
        highlight=False,
    )
    console.print(_heading(inspection))
    console.print(_texts(inspection.documents))
    for what, found in zip(("best", "worst"), extremes(inspection, thoughts), strict=True):
        if found:
            console.print(_title(f"{what} thoughts, by the gain for the next token"))
        for rank, place in enumerate(found, 1):
            console.print(Text(f"{rank:{INDENT - 2}}. ").append_text(_facts(place)))
            for line in _details(place, width - INDENT):
                console.print(Padding(line, (0, 0, 0, INDENT), expand=False))
    console.print(_title("gain for the next token, nats"))
    console.print(_gains(inspection))
    console.print(_title("weight of a thought"))
    console.print(_weights(inspection))
    console.print(_title("most frequent thoughts"), *_frequent(inspection), sep="\n")
    console.print("", _signs(inspection), _difficulties(inspection), _summary(inspection), sep="\n")
    return "\n".join(line.rstrip() for line in file.getvalue().split("\n"))


def _heading(inspection: Inspection) -> Text:
    settings, summary = inspection.settings, inspection.summary
    sampled = f"sampled at temperature {settings.temperature:g} with seed {settings.seed}"
    text = Text(visible(inspection.model), style="bold")
    return text.append(
        f"\n{counted(summary.tokens, 'token')} of {counted(summary.documents, 'text')} predicted, each after "
        f"{counted(settings.rationales or 1, 'thought')} of {counted(inspection.thought_tokens, 'token')}, "
        f"{sampled if settings.temperature else 'greedy'}"
        + (f"; the texts go on after {settings.max_tokens} tokens" if inspection.cut else "")
        + f"\nA token that gained by the thought before it has {SIGNS[1]} from {SCALE[0]:g} nats, {SIGNS[2]} from "
        f"{SCALE[1]:g}, {SIGNS[3]} from {SCALE[2]:g}; one that lost has {SIGNS[-1]}, {SIGNS[-2]}, {SIGNS[-3]}.\n",
        style="not bold",
    )


def _title(text: str) -> Text:
    return Text(f"\n{text}", style="bold")


def _texts(documents: Sequence[Document]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(justify="right", style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for number, document in enumerate(documents, 1):
        table.add_row(str(number), _coloured(document))
    return table


def _coloured(document: Document) -> Text:
    """The text, each token coloured and signed by the gain of the thought before it."""
    levels = {each.index + 1: level(each.gain) for each in document.positions if each.gain is not None}
    text = Text(overflow="fold")
    for number, token in enumerate(document.tokens):
        step = levels.get(number, 0)
        *lines, last = map(visible, token.split("\n"))
        shown = "".join(f"{line}{visible(NEWLINE)}{NEWLINE}" for line in lines) + last
        text.append(shown.removesuffix(NEWLINE) + SIGNS[step], STYLES[step])
        text.append(NEWLINE if shown.endswith(NEWLINE) else "")
    return text


def _facts(place: Place) -> Text:
    gain = place.position.gain or 0.0
    text = Text().append(f"gain {gain:+.3f}{SIGNS[level(gain)]}", STYLES[level(gain)])
    return text.append(
        f"  weight {place.position.weight:.3f}  text {place.number + 1}, token {place.position.index + 2}"
    )


def _details(place: Place, width: int) -> Iterator[Text]:
    """Context, thoughts, and what was likely before and after."""
    position, tokens = place.position, place.document.tokens
    here = position.index + 1
    said = _head(visible_token(tokens[here]), LONGEST)
    after = _head(visible("".join(tokens[here + 1 : here + 1 + FOLLOWING])), max(width // 4, 1))
    room = width - cell_len(said) - cell_len(after) - 2
    before = _tail(visible("".join(tokens[max(here - width, 0) : here])), room)
    yield Text(before).append("⟦").append(said, "bold").append("⟧").append(after)
    for rationale in position.rationales:
        yield _thought(rationale)
    yield _likely("without", position.before)
    yield _likely("with   ", position.after)


def _thought(rationale: Rationale) -> Text:
    text = Text(f"⟨{visible(''.join(rationale.tokens))}⟩", style="italic", overflow="fold")
    text.append(f"  weight {rationale.weight:.3f}", "not italic")
    if rationale.advantage is not None:
        text.append(f"  advantage {rationale.advantage:+.3f}", "not italic")
    return text.append(f"  log-probability {sum(rationale.log_probs):.2f}", "not italic")


def _likely(name: str, likely: Iterable[Likely]) -> Text:
    shown = (f"{_head(visible_token(each.text), LONGEST)} {each.probability:.1%}" for each in likely)
    return Text(f"{name}  {'  '.join(shown)}", overflow="fold")


def _head(text: str, cells: int) -> str:
    """The beginning of a text, where it is longer than so many cells of a terminal."""
    return text if cell_len(text) <= cells else chop_cells(text, max(cells - 1, 1))[0] + "…"


def _tail(text: str, cells: int) -> str:
    """The end of a text, where it is longer than so many cells of a terminal."""
    return text if cell_len(text) <= cells else "…" + chop_cells(text[::-1], max(cells - 1, 1))[0][::-1]


def _gains(inspection: Inspection) -> Table:
    steps = [level(each.position.gain or 0.0) for each in places(inspection)]
    return _bars([(f"{level_name(step)}", SIGNS[step], steps.count(step), STYLES[step]) for step in LEVELS])


def _weights(inspection: Inspection) -> Table:
    values = [each.weight for place in places(inspection) for each in place.position.rationales]
    first, *inner, last = zip(bin_names(WEIGHTS), histogram(values, WEIGHTS), strict=True)
    kept = [*([first] if first[1] else []), *inner, *([last] if last[1] else [])]
    return _bars([(name, "", count, "") for name, count in kept])


def _bars(rows: Sequence[tuple[str, str, int, str]]) -> Table:
    """A horizontal bar for each name, sign, count and style."""
    table = Table.grid(padding=(0, 1))
    for justify in ("right", "left", "left", "right"):
        table.add_column(justify=justify, no_wrap=True, overflow="crop")
    most = max(1, *(count for _, _, count, _ in rows))
    for name, sign, count, style in rows:
        bar = "█" * round(BAR * count / most) or "▏" * bool(count)
        table.add_row(name, sign, Text(bar, style.rpartition(" on ")[2]), str(count))
    return table


def _summary(inspection: Inspection) -> Table:
    summary = inspection.summary
    table = _table("gain over no thought", "nats a token", "95 % interval")
    for ahead, gain in enumerate(summary.gain_ahead, 1):
        if gain is not None:
            table.add_row(f"its thoughts, {'next token' if ahead == 1 else f'{ahead} tokens ahead'}", *_estimate(gain))
    for name, control in summary.controls.items():
        table.add_row(name, *_estimate(control.gain))
        table.add_row("  its thoughts beyond that", *_estimate(control.lead))
    return table


def _signs(inspection: Inspection) -> Table:
    summary = inspection.summary
    table = _table("signs", "")
    table.add_row("mean weight of a thought", f"{summary.weight:.4f}")
    table.add_row("entropy of thoughts, nats a token", f"{summary.entropy:.4f}")
    table.add_row("different thoughts, share of all", f"{summary.distinct:.1%}")
    table.add_row("likeliest next tokens repaired by a thought", str(summary.repaired))
    table.add_row("likeliest next tokens broken by a thought", str(summary.broken))
    return table


def _difficulties(inspection: Inspection) -> Table:
    table = _table("next tokens by nats without thoughts", "tokens", "gain", "95 % interval")
    for each in inspection.summary.difficulties:
        name = f"{each.least:g} and more" if each.below is None else f"{each.least:g} to {each.below:g}"
        table.add_row(name, str(each.tokens), *_estimate(each.gain))
    return table


def _table(first: str, *others: str) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right")
    return table


def _estimate(value: Estimate) -> tuple[str, str]:
    interval = "" if value.low is None else f"[{value.low:+.4f}, {value.high:+.4f}]"
    return f"{value.mean:+.4f}", interval


def _frequent(inspection: Inspection) -> Iterator[Text]:
    for each in inspection.summary.frequent:
        share = each.count / inspection.summary.thoughts
        yield Text(f"{each.count:6} {share:6.1%}  ⟨{visible(''.join(each.tokens))}⟩", overflow="fold")
