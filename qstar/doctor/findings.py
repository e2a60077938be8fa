"""A finding: one line of what ``qstar doctor`` says."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

STATES = ("ok", "note", "problem")


@dataclass(frozen=True)
class Finding:
    """One fact.

    Attributes:
        state: ``"ok"``, ``"note"`` for what is worth knowing, or ``"problem"`` for what keeps something from working.
        what: it is about.
        found: the fact.
        advice: what to do; a problem has some.
    """

    state: str
    what: str
    found: str
    advice: str = ""

    def __post_init__(self) -> None:
        if self.state not in STATES:
            raise ValueError(f"state is {self.state!r}, but it must be one of {', '.join(map(repr, STATES))}")
        if self.state == "problem" and not self.advice:
            raise ValueError(f"{self.what} is a problem, but there is no advice")


def problems(findings: Iterable[Finding]) -> list[Finding]:
    """Those that are problems."""
    return [each for each in findings if each.state == "problem"]
