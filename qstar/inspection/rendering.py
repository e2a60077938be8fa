"""What the pages share: templates that escape every text, tokens with their levels, and numbers that a page holds."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from qstar.inspection.data import Document, Position
from qstar.inspection.highlights import LEVELS, SURPRISE_SCALE, WEIGHT_SCALE, counted, level, level_name
from qstar.inspection.visible import visible, visible_token

FOLDER = Path(__file__).parent / "templates"
CHUNK = 400  # tokens that a browser lays out together, when they come into sight


def environment(style: str, script: str) -> Environment:
    """Jinja's, in which a page has one inline style and one inline script, and its policy admits no others."""
    made = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters.update(visible=visible, visible_token=visible_token, counted=counted)
    made.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    made.globals.update(style=style, script=script, style_hash=_hash(style), script_hash=_hash(script))
    return made


def read_template(*names: str) -> str:
    """Files beside the templates, one after the other."""
    return "\n".join((FOLDER / name).read_text(encoding="utf-8") for name in names)


def _hash(content: str) -> str:
    """What a content security policy knows an inline style or script by."""
    digest = hashlib.sha256(content.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


def legends() -> list[tuple[str, str, list[tuple[int, str]]]]:
    """For each quantity that tokens are coloured by: its name, its unit, and its levels with what they mean."""
    above = [(step, level_name(step, SURPRISE_SCALE).replace("+", "")) for step in range(1, len(SURPRISE_SCALE) + 1)]
    return [
        ("gain", "nats", [(step, level_name(step)) for step in LEVELS]),
        ("weight", "", [(step, level_name(step, WEIGHT_SCALE)) for step in LEVELS]),
        ("surprise", "nats", [(0, f"below {SURPRISE_SCALE[0]:g}"), *above]),
    ]


def token_id(number: int, token: int) -> str:
    """Of an element of the page: that of a token of a text."""
    return f"t{number}-{token}"


def chunks(document: Document, number: int) -> list[list[dict[str, Any]]]:
    """The tokens of a text as a page shows them, some at a time."""
    known = {each.index + 1: levels_of(each) for each in document.positions}
    shown = [
        {"id": token_id(number, token), "tab": -1 if token else 0, "levels": known.get(token), **_piece(piece)}
        for token, piece in enumerate(document.tokens)
    ]
    return [shown[begin : begin + CHUNK] for begin in range(0, len(shown), CHUNK)]


def levels_of(position: Position) -> tuple[int, int, int] | None:
    """Of gain, weight and surprise, see :func:`levels`."""
    return levels(position.gain, position.weight, position.surprise)


def levels(gain: float | None, weight: float, surprise: float | None) -> tuple[int, int, int] | None:
    """Of gain, weight and surprise; None where the next token is not predicted."""
    if gain is None or surprise is None:
        return None
    return level(gain), level(weight, WEIGHT_SCALE), max(level(surprise, SURPRISE_SCALE), 0)


def _piece(piece: str) -> dict[str, Any]:
    """A token as it is shown; a label where it has no letter to be read out."""
    text = visible_token(piece)
    kind = "" if piece.strip() else "white space" if piece else "part of a character"
    return {"text": text, "label": kind and f"{text} {kind}", "ends_line": "\n" in piece}


@dataclass
class Strings:
    """Texts, each once, and their numbers."""

    numbers: dict[str, int] = field(default_factory=dict)

    def __call__(self, text: str) -> int:
        return self.numbers.setdefault(visible_token(text), len(self.numbers))


def rounded(value: float | None) -> float | None:
    """To 5 significant digits."""
    return None if value is None else float(f"{value:.5g}")
