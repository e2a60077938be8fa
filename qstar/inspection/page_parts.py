"""What the pages are made of: texts, places in lists, charts, the data that their script reads, and the file itself."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from qstar.inspection.data import DifficultyGain, Document, Inspection, Likely, Position
from qstar.inspection.highlights import (
    LEVELS,
    SCALE,
    SURPRISE_SCALE,
    WEIGHT_SCALE,
    WEIGHTS,
    bin_names,
    counted,
    difficulty_name,
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
OF_MODEL = (  # what a text is coloured by: name, what the switch calls it, unit, and levels with their names
    ("gain", "gain of the thought before it", "nats", [(step, level_name(step)) for step in LEVELS]),
    ("weight", "weight of the thought", "", [(step, level_name(step, WEIGHT_SCALE)) for step in LEVELS]),
    (
        "surprise",
        "surprise without a thought",
        "nats",
        [
            (0, f"below {SURPRISE_SCALE[0]:g}"),
            *((step, level_name(step, SURPRISE_SCALE).replace("+", "")) for step in range(1, len(SURPRISE_SCALE) + 1)),
        ],
    ),
)


def written(template: str, *more: str, **values: Any) -> str:
    """A page: a template with values, style and script, and the policy that lets in no others.

    Args:
        template: of the page.
        more: files of style and script beside those that all pages have.
        values: of the template.
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
    files = ("page.css", "tokens.js", *more)
    style, script = (
        "".join((FOLDER / name).read_text(encoding="utf-8") for name in files if name.endswith(kind))
        for kind in (".css", ".js")
    )
    return environment.get_template(template).render(
        **values, style=style, script=script, style_hash=_hash(style), script_hash=_hash(script)
    )


def _hash(content: str) -> str:
    """What a content security policy knows an inline style or script by."""
    digest = hashlib.sha256(content.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


def texts(
    inspection: Inspection, letter: str = "t", more: Sequence[Mapping[int, dict[str, int]]] | None = None
) -> list[list[list[dict[str, Any]]]]:
    """The tokens of each text as a page shows them, some at a time.

    Args:
        inspection: of the texts.
        letter: that the ids of tokens begin with.
        more: levels beside those of the model, by the first letter of what they tell, for each token of each text.
    """
    return [
        _chunks(document, number, letter, more[number] if more else {})
        for number, document in enumerate(inspection.documents)
    ]


def _chunks(
    document: Document, number: int, letter: str, more: Mapping[int, dict[str, int]]
) -> list[list[dict[str, Any]]]:
    known = {each.index + 1: each for each in document.positions}
    shown = [
        {
            "id": f"{letter}{number}-{token}",
            "tab": -1 if token else 0,
            "levels": levels(known.get(token)) | more.get(token, {}),
            **_piece(piece),
        }
        for token, piece in enumerate(document.tokens)
    ]
    return [shown[begin : begin + CHUNK] for begin in range(0, len(shown), CHUNK)]


def levels(position: Position | None) -> dict[str, int]:
    """Of gain, weight and surprise, by first letter; none where the next token is not predicted."""
    if position is None or position.gain is None or position.surprise is None:
        return {}
    surprise = max(level(position.surprise, SURPRISE_SCALE), 0)
    return {"g": level(position.gain), "w": level(position.weight, WEIGHT_SCALE), "s": surprise}


def _piece(piece: str) -> dict[str, Any]:
    """A token as it is shown; a label where it has no letter to be read out."""
    text = visible_token(piece)
    kind = "" if piece.strip() else "white space" if piece else "part of a character"
    return {"text": text, "label": kind and f"{text} {kind}", "ends_line": "\n" in piece}


def place(number: int, document: Document, position: Position) -> dict[str, Any]:
    """Where a token behind a thought stands, and its neighbours."""
    tokens, here = document.tokens, position.index + 1
    return {
        "id": f"t{number}-{here}",
        "number": number,
        "token": here,
        "before": _end(visible("".join(tokens[max(here - CONTEXT, 0) : here]))),
        "said": _beginning(visible_token(tokens[here])),
        "after": _beginning(visible("".join(tokens[here + 1 : here + 1 + FOLLOWING]))),
    }


def _beginning(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def _end(text: str) -> str:
    return text if len(text) <= 2 * LONGEST else f"…{text[-2 * LONGEST :]}"


def level_bars(steps: Sequence[int]) -> list[dict[str, Any]]:
    """How many are at each level."""
    return _bars([(level_name(step), steps.count(step), step) for step in LEVELS])


def gain_bars(inspection: Inspection) -> list[dict[str, Any]]:
    return level_bars([level(each.position.gain or 0.0) for each in places(inspection)])


def weight_bars(inspection: Inspection) -> list[dict[str, Any]]:
    weights = [each.weight for place in places(inspection) for each in place.position.rationales]
    named = zip(bin_names(WEIGHTS), histogram(weights, WEIGHTS), strict=True)
    return _bars([(name, count, 0) for name, count in named])


def _bars(rows: Sequence[tuple[str, int, int]]) -> list[dict[str, Any]]:
    most = max(1, *(count for _, count, _ in rows))
    return [
        {"name": name, "count": count, "step": step, "width": round(BAR * count / most)} for name, count, step in rows
    ]


def difficulty_charts(*inspections: Inspection) -> list[dict[str, Any]]:
    """Places of gains and their intervals, on one scale that holds 0 and all of them."""
    known = [each.summary.difficulties for each in inspections]
    gains = [each.gain for some in known for each in some]
    bounds = [bound for gain in gains for bound in (gain.low, gain.mean, gain.high) if bound is not None]
    reach = max(SCALE[0], *(abs(bound) for bound in bounds))
    return [_difficulty_chart(some, reach) for some in known]


def _difficulty_chart(known: Sequence[DifficultyGain], reach: float) -> dict[str, Any]:
    left, middle, right = 92, 170, 248

    def place(value: float) -> float:
        return round(middle + (right - left) / 2 * value / reach, 1)

    rows = [
        {
            "name": difficulty_name(each),
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
class Strings:
    """Texts, each once, and their numbers."""

    numbers: dict[str, int] = field(default_factory=dict)

    def __call__(self, text: str) -> int:
        return self.numbers.setdefault(visible_token(text), len(self.numbers))


def documents_data(inspection: Inspection, number_of: Strings) -> list[dict[str, Any]]:
    """What a page's script shows of tokens: texts by their numbers, values to 5 significant digits."""

    def likely(values: Sequence[Likely]) -> list[tuple[int, float | None]]:
        return [(number_of(each.text), rounded(each.probability)) for each in values]

    return [
        {
            "tokens": [number_of(token) for token in document.tokens],
            "positions": {
                each.index: {
                    "base": [rounded(value) for value in each.base_log_prob],
                    "talk": [rounded(value) for value in each.talk_log_prob],
                    "gain": [rounded(value) for value in each.gain_ahead],
                    "weight": rounded(each.weight),
                    "before": likely(each.before),
                    "after": likely(each.after),
                    "rationales": [
                        {
                            "tokens": [number_of(token) for token in rationale.tokens],
                            "log_probs": [rounded(value) for value in rationale.log_probs],
                            "entropy": rounded(rationale.entropy),
                            "weight": rounded(rationale.weight),
                            "advantage": rounded(rationale.advantage),
                            "gain": rounded(gain),
                        }
                        for rationale, gain in zip(each.rationales, each.own_gains, strict=True)
                    ],
                }
                for each in document.positions
            },
        }
        for document in inspection.documents
    ]


def rounded(value: float | None) -> float | None:
    """To 5 significant digits."""
    return None if value is None else float(f"{value:.5g}")
