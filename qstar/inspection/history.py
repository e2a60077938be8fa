"""How thoughts about the same texts changed while a model trained, as one HTML page that steps through the training.

Like that of a single inspection the page loads nothing, and every text in it is escaped or enters as a node's content.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

from qstar.inspection import page_parts as parts
from qstar.inspection.data import Document, Inspection, Likely, Summary
from qstar.inspection.line_charts import Line, line_chart

OWN = "its thoughts"


@dataclass(frozen=True)
class Glance:
    """What is kept of a position.

    Attributes:
        index: of the last token before the thoughts, in its document.
        levels: of the next token by first letters, see :func:`qstar.inspection.page_parts.levels`.
        gain: for the next token; None where it is not predicted.
        weight: of the thoughts.
        thought: the tokens of the first rationale.
        before: the likeliest next token without a thought.
        after: the same after the first rationale.
    """

    index: int
    levels: dict[str, int]
    gain: float | None
    weight: float
    thought: str
    before: Likely
    after: Likely


@dataclass(frozen=True)
class Snapshot:
    """What is kept of an inspection: enough for a page of many.

    Attributes:
        step: updates that the model had seen.
        page: address of the page of that inspection, as a link of this one.
        summary: of the inspection.
        token_ids: of each text.
        positions: of each text.
    """

    step: int
    page: str
    summary: Summary
    token_ids: list[list[int]]
    positions: list[list[Glance]]


def snapshot(step: int, page: str, inspection: Inspection) -> Snapshot:
    """What is kept of the inspection after so many updates."""
    return Snapshot(
        step=step,
        page=page,
        summary=inspection.summary,
        token_ids=[document.token_ids for document in inspection.documents],
        positions=[_glances(document) for document in inspection.documents],
    )


def _glances(document: Document) -> list[Glance]:
    return [
        Glance(
            index=each.index,
            levels=parts.levels(each),
            gain=each.gain,
            weight=each.weight,
            thought="".join(each.rationales[0].tokens),
            before=each.before[0],
            after=each.after[0],
        )
        for each in document.positions
    ]


def history_page(name: str, last: Inspection, snapshots: Sequence[Snapshot]) -> str:
    """A page that steps through a training.

    Args:
        name: of what is trained.
        last: the last inspection, which the page shows at first.
        snapshots: of all, by their steps, which the last one ends; all are of the same texts.
    """
    return parts.written(
        "history.html",
        "history.css",
        "history.js",
        name=name,
        found=last,
        snapshots=snapshots,
        documents=parts.texts(last),
        legends=parts.OF_MODEL,
        charts_of_steps=_charts(snapshots),
        data=history_data(snapshots),
    )


def history_data(snapshots: Sequence[Snapshot]) -> dict[str, Any]:
    """What the page's script shows: texts by numbers in ``strings``, values to 5 significant digits.

    A position is a list: levels of gain, weight and surprise, then gain, weight, the first thought, and the likeliest
    next token without and with it, each with its probability.
    """
    number_of = parts.Strings()
    steps = [
        {
            "step": each.step,
            "page": each.page,
            "gain": [parts.rounded(value) for value in astuple(each.summary.gain)],
            "texts": [{glance.index: _shown(glance, number_of) for glance in some} for some in each.positions],
        }
        for each in snapshots
    ]
    return {"steps": steps, "strings": list(number_of.numbers)}


def _shown(glance: Glance, number_of: parts.Strings) -> list[Any]:
    likely = [(number_of(each.text), parts.rounded(each.probability)) for each in (glance.before, glance.after)]
    return [
        list(glance.levels.values()),
        parts.rounded(glance.gain),
        parts.rounded(glance.weight),
        number_of(glance.thought),
        *likely,
    ]


def _charts(snapshots: Sequence[Snapshot]) -> list[dict[str, Any]]:
    """Curves over the steps: the gain beside that of the controls, and the signs of a collapse."""
    steps, summaries = [each.step for each in snapshots], [each.summary for each in snapshots]
    gains = [each.gain for each in summaries]
    own = Line(OWN, [each.mean for each in gains], [each.low for each in gains], [each.high for each in gains])
    others = [Line(name, [each.controls[name].gain.mean for each in summaries]) for name in summaries[-1].controls]
    signs = {
        "Mean weight of a thought": [each.weight for each in summaries],
        "Entropy of thoughts, nats a token": [each.entropy for each in summaries],
        "Different thoughts, share of all": [each.distinct for each in summaries],
    }
    return [
        line_chart("Gain for the next token, nats", steps, [own, *others]),
        *(line_chart(title, steps, [Line("", values)]) for title, values in signs.items()),
    ]
