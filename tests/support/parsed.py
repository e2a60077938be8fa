"""A page as its elements, and numbers as a page holds them."""

from __future__ import annotations

import json
from html.parser import HTMLParser

import pytest

EMPTY = ("meta", "input", "br")


class Parsed(HTMLParser):
    """Elements in their order, each with its attributes and the text in it."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self._open: list[list[str]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes), []))
        if tag not in EMPTY:
            self._open.append(self.elements[-1][2])

    def handle_endtag(self, tag):
        self._open.pop()

    def handle_data(self, data):
        for each in self._open:
            each.append(data)

    def of(self, tag: str, **attributes: str) -> list[tuple[dict[str, str | None], str]]:
        """Attributes and text of the elements of a name that have these attributes."""
        found = [(mine, "".join(text)) for name, mine, text in self.elements if name == tag]
        return [each for each in found if attributes.items() <= each[0].items()]

    def data(self):
        [(_, text)] = self.of("script", type="application/json")
        return json.loads(text)


def close(value):
    """The same number to five digits; NaN's place is None."""
    return None if value is None else pytest.approx(value, rel=1e-4, abs=1e-12)


def rounded(value: float) -> float:
    """As the data of a page holds it."""
    return float(f"{value:.5g}")


def signed(value: float, digits: int = 3) -> str:
    """As a page's script shows it."""
    return f"{rounded(value):+.{digits}f}".replace("-", "−")


def plain(value: float, digits: int = 3) -> str:
    return signed(value, digits).removeprefix("+")
