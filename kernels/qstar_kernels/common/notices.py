"""What a user must hear, and hear once."""

from __future__ import annotations

import warnings

_given: set[str] = set()


def warn_once(message: str) -> None:
    """Warn once in a process, whatever the warnings' filters are."""
    if message not in _given:
        _given.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=4)
