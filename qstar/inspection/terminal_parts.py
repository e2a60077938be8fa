"""What the views on a terminal are made of: signs beside colours, places in a text, thoughts, bars and tables."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len, chop_cells
from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from qstar.inspection.data import Document, Estimate, Inspection, Likely, Position, Rationale, Summary
from qstar.inspection.highlights import LEVELS, SCALE, counted, level_name
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
UP = f"{SIGNS[1]} from {SCALE[0]:g} nats, {SIGNS[2]} from {SCALE[1]:g}, {SIGNS[3]} from {SCALE[2]:g}"
DOWN = f"{SIGNS[-1]}, {SIGNS[-2]}, {SIGNS[-3]}"
NEWLINE = "\n"
INDENT = 4
FOLLOWING = 8  # tokens shown behind a thought
BAR = 40  # characters of the longest bar
LONGEST = 24  # characters of a token where it is one of several


def lines(shown: Iterable[RenderableType], *, width: int, colour: bool) -> str:
    """What is shown, one below the other, in lines of ``width`` characters; with a terminal's escape codes or not."""
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
    for each in shown:
        console.print(each)
    return "\n".join(line.rstrip() for line in file.getvalue().split("\n"))


def title(text: str) -> Text:
    return Text(f"\n{text}", style="bold")


def thinking(inspection: Inspection) -> str:
    """How thoughts came about."""
    settings = inspection.settings
    sampled = f"sampled at temperature {settings.temperature:g} with seed {settings.seed}"
    return (
        f"{counted(settings.rationales or 1, 'thought')} of {counted(inspection.thought_tokens, 'token')}, "
        f"{sampled if settings.temperature else 'greedy'}"
    )


def cut(inspection: Inspection) -> str:
    """Whether there was more to read."""
    return f"; the texts go on after {inspection.settings.max_tokens} tokens" if inspection.cut else ""


def texts(documents: Sequence[Document], levels: Sequence[Mapping[int, int]]) -> Table:
    """Numbered texts, each token coloured and signed by its level, by its place in each document."""
    table = Table.grid(padding=(0, 2))
    table.add_column(justify="right", style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for number, (document, steps) in enumerate(zip(documents, levels, strict=True), 1):
        table.add_row(str(number), _coloured(document, steps))
    return table


def _coloured(document: Document, levels: Mapping[int, int]) -> Text:
    text = Text(overflow="fold")
    for number, token in enumerate(document.tokens):
        step = levels.get(number, 0)
        *before, last = map(visible, token.split("\n"))
        shown = "".join(f"{line}{visible(NEWLINE)}{NEWLINE}" for line in before) + last
        text.append(shown.removesuffix(NEWLINE) + SIGNS[step], STYLES[step])
        text.append(NEWLINE if shown.endswith(NEWLINE) else "")
    return text


def ranked(rank: int, facts: Text, details: Iterable[Text]) -> Iterator[RenderableType]:
    """One of a list, with what is known of it below."""
    yield Text(f"{rank:{INDENT - 2}}. ").append_text(facts)
    for line in details:
        yield Padding(line, (0, 0, 0, INDENT), expand=False)


def context(document: Document, position: Position, width: int) -> Text:
    """The token behind a thought between its neighbours, in one line."""
    tokens, here = document.tokens, position.index + 1
    said = _head(visible_token(tokens[here]), LONGEST)
    after = _head(visible("".join(tokens[here + 1 : here + 1 + FOLLOWING])), max(width // 4, 1))
    room = width - cell_len(said) - cell_len(after) - 2
    before = _tail(visible("".join(tokens[max(here - width, 0) : here])), room)
    return Text(before).append("⟦").append(said, "bold").append("⟧").append(after)


def thoughts(position: Position) -> Iterator[Text]:
    """The thoughts at a position, and what was likely before and after."""
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


def level_bars(steps: Sequence[int]) -> Table:
    """How many are at each level."""
    return bars([(level_name(step), SIGNS[step], steps.count(step), STYLES[step]) for step in LEVELS])


def bars(rows: Sequence[tuple[str, str, int, str]]) -> Table:
    """A horizontal bar for each name, sign, count and style."""
    grid = Table.grid(padding=(0, 1))
    for justify in ("right", "left", "left", "right"):
        grid.add_column(justify=justify, no_wrap=True, overflow="crop")
    most = max(1, *(count for _, _, count, _ in rows))
    for name, sign, count, style in rows:
        bar = "█" * round(BAR * count / most) or "▏" * bool(count)
        grid.add_row(name, sign, Text(bar, style.rpartition(" on ")[2]), str(count))
    return grid


def table(first: str, *others: str) -> Table:
    """An empty one with these heads."""
    made = Table(box=SIMPLE_HEAD, pad_edge=False)
    made.add_column(first)
    for name in others:
        made.add_column(name, justify="right")
    return made


def signs(summaries: Mapping[str, Summary]) -> Table:
    """What tells of a collapse, a column for each, under its name."""
    made = table("signs", *summaries)
    for name, shown in (
        ("mean weight of a thought", lambda each: f"{each.weight:.4f}"),
        ("entropy of thoughts, nats a token", lambda each: f"{each.entropy:.4f}"),
        ("different thoughts, share of all", lambda each: f"{each.distinct:.1%}"),
        ("likeliest next tokens repaired by a thought", lambda each: str(each.repaired)),
        ("likeliest next tokens broken by a thought", lambda each: str(each.broken)),
    ):
        made.add_row(name, *map(shown, summaries.values()))
    return made


def estimate(value: Estimate) -> tuple[str, str]:
    interval = "" if value.low is None else f"[{value.low:+.4f}, {value.high:+.4f}]"
    return f"{value.mean:+.4f}", interval
