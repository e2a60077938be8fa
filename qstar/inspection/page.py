"""An inspection as one HTML file, which loads nothing: to be opened, sent or printed.

The text and the tables are in the page itself; what is shown of a chosen token stands as JSON in it, apart from the
script that reads it. Every text of a model or a stranger is escaped by Jinja or enters as the content of a node.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from qstar.inspection.data import Document, Inspection, Likely, Position
from qstar.inspection.highlights import (
    LEVELS,
    SCALE,
    SURPRISE_SCALE,
    WEIGHT_SCALE,
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

FOLDER = Path(__file__).parent / "templates"
CHUNK = 400  # tokens that a browser lays out together, when they come into sight
CONTEXT, FOLLOWING = 24, 8  # tokens shown around one of a list
LONGEST = 80  # characters of a token there
BAR = 150  # units of the longest bar


def page(inspection: Inspection, *, thoughts: int = 20) -> str:
    """An inspection as an HTML page.

    Args:
        inspection: to show.
        thoughts: how many of the best thoughts are listed, and of the worst.
    """
    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(visible=visible, visible_token=visible_token, counted=counted)
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    style, script = ((FOLDER / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    best, worst = extremes(inspection, thoughts)
    steps = [level(each.position.gain or 0.0) for each in places(inspection)]
    weights = [each.weight for place in places(inspection) for each in place.position.rationales]
    return environment.get_template("page.html").render(
        found=inspection,
        summary=inspection.summary,
        documents=[_chunks(document, number) for number, document in enumerate(inspection.documents)],
        best=[_ranked(place) for place in best],
        worst=[_ranked(place) for place in worst],
        legends=[
            ("gain", "nats", [(step, level_name(step)) for step in LEVELS]),
            ("weight", "", [(step, level_name(step, WEIGHT_SCALE)) for step in LEVELS]),
            ("surprise", "nats", [(0, f"below {SURPRISE_SCALE[0]:g}"), *_above(SURPRISE_SCALE)]),
        ],
        gains=_bars([(level_name(step), steps.count(step), step) for step in LEVELS]),
        weights=_bars(
            [(name, count, 0) for name, count in zip(bin_names(WEIGHTS), histogram(weights, WEIGHTS), strict=True)]
        ),
        difficulties=_difficulties(inspection),
        data=page_data(inspection),
        style=style,
        script=script,
        style_hash=_hash(style),
        script_hash=_hash(script),
    )


def _hash(content: str) -> str:
    """What a content security policy knows an inline style or script by."""
    digest = hashlib.sha256(content.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


def _above(scale: Sequence[float]) -> list[tuple[int, str]]:
    return [(step, level_name(step, scale).replace("+", "")) for step in range(1, len(scale) + 1)]


def _id(number: int, token: int) -> str:
    return f"t{number}-{token}"


def _chunks(document: Document, number: int) -> list[list[dict[str, Any]]]:
    """The tokens of a text as the page shows them, some at a time."""
    known = {each.index + 1: each for each in document.positions}
    shown = [
        {"id": _id(number, token), "tab": -1 if token else 0, "levels": _levels(known.get(token)), **_piece(piece)}
        for token, piece in enumerate(document.tokens)
    ]
    return [shown[begin : begin + CHUNK] for begin in range(0, len(shown), CHUNK)]


def _levels(position: Position | None) -> tuple[int, int, int] | None:
    """Of gain, weight and surprise; None where the next token is not predicted."""
    if position is None or position.gain is None or position.surprise is None:
        return None
    surprise = level(position.surprise, SURPRISE_SCALE)
    return level(position.gain), level(position.weight, WEIGHT_SCALE), max(surprise, 0)


def _piece(piece: str) -> dict[str, Any]:
    """A token as it is shown; a label where it has no letter to be read out."""
    text = visible_token(piece)
    kind = "" if piece.strip() else "white space" if piece else "part of a character"
    return {"text": text, "label": kind and f"{text} {kind}", "ends_line": "\n" in piece}


def _ranked(place: Place) -> dict[str, Any]:
    """One of the best or worst thoughts."""
    position, tokens = place.position, place.document.tokens
    here = position.index + 1
    return {
        "id": _id(place.number, here),
        "number": place.number,
        "token": here,
        "position": position,
        "level": level(position.gain or 0.0),
        "before": _end(visible("".join(tokens[max(here - CONTEXT, 0) : here]))),
        "said": _beginning(visible_token(tokens[here])),
        "after": _beginning(visible("".join(tokens[here + 1 : here + 1 + FOLLOWING]))),
    }


def _beginning(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def _end(text: str) -> str:
    return text if len(text) <= 2 * LONGEST else f"…{text[-2 * LONGEST :]}"


def _bars(rows: Sequence[tuple[str, int, int]]) -> list[dict[str, Any]]:
    most = max(1, *(count for _, count, _ in rows))
    return [
        {"name": name, "count": count, "step": step, "width": round(BAR * count / most)} for name, count, step in rows
    ]


def _difficulties(inspection: Inspection) -> dict[str, Any]:
    """Places of gains and their intervals, on one scale that holds 0 and all of them."""
    known = inspection.summary.difficulties
    bounds = [bound for each in known for bound in (each.gain.low, each.gain.mean, each.gain.high) if bound is not None]
    reach = max(SCALE[0], *(abs(bound) for bound in bounds))
    left, middle, right = 92, 170, 248

    def place(value: float) -> float:
        return round(middle + (right - left) / 2 * value / reach, 1)

    rows = [
        {
            "name": f"{each.least:g} and more" if each.below is None else f"{each.least:g} to {each.below:g}",
            "mean": place(each.gain.mean),
            "low": None if each.gain.low is None else place(each.gain.low),
            "high": None if each.gain.high is None else place(each.gain.high),
            "step": level(each.gain.mean),
            "label": f"{each.gain.mean:+.3f}",
        }
        for each in known
    ]
    return {"zero": middle, "rows": rows}


@dataclass
class _Strings:
    """Texts, each once, and their numbers."""

    numbers: dict[str, int] = field(default_factory=dict)

    def __call__(self, text: str) -> int:
        return self.numbers.setdefault(visible_token(text), len(self.numbers))


def page_data(inspection: Inspection) -> dict[str, Any]:
    """What the page's script shows of a token: texts by numbers in ``strings``, values to 5 significant digits."""
    number_of = _Strings()

    def likely(values: Sequence[Likely]) -> list[tuple[int, float | None]]:
        return [(number_of(each.text), _rounded(each.probability)) for each in values]

    documents = [
        {
            "tokens": [number_of(token) for token in document.tokens],
            "positions": {
                each.index: {
                    "base": [_rounded(value) for value in each.base_log_prob],
                    "talk": [_rounded(value) for value in each.talk_log_prob],
                    "gain": [_rounded(value) for value in each.gain_ahead],
                    "weight": _rounded(each.weight),
                    "before": likely(each.before),
                    "after": likely(each.after),
                    "rationales": [
                        {
                            "tokens": [number_of(token) for token in rationale.tokens],
                            "log_probs": [_rounded(value) for value in rationale.log_probs],
                            "entropy": _rounded(rationale.entropy),
                            "weight": _rounded(rationale.weight),
                            "advantage": _rounded(rationale.advantage),
                        }
                        for rationale in each.rationales
                    ],
                }
                for each in document.positions
            },
        }
        for document in inspection.documents
    ]
    return {"documents": documents, "strings": list(number_of.numbers)}


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")
