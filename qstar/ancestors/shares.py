"""Shares of questions that were answered right, with the interval that they can be trusted to."""

from __future__ import annotations

from math import sqrt

Z = 1.959964  # of 95 % of a normal distribution


def wilson(right: int, total: int) -> tuple[float, float]:
    """The 95 % interval of a share ``right / total`` (Wilson, 1927), which holds near 0 and 1 as well."""
    share, spread = right / total, Z**2 / total
    centre = share + spread / 2
    half = Z * sqrt((share * (1 - share) + spread / 4) / total)
    return max((centre - half) / (1 + spread), 0.0), min((centre + half) / (1 + spread), 1.0)


def shown(right: int, total: int) -> str:
    """As ``61.2% (57.0-65.3)``."""
    low, high = wilson(right, total)
    return f"{right / total:.1%} ({100 * low:.1f}-{100 * high:.1f})"
