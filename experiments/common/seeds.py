"""Means over seeds, and how far they can be trusted: Student's interval, which takes seeds for a sample of all seeds.

With five seeds a bootstrap would draw from five values, and its intervals are too narrow; Student's holds where values
spread as the normal distribution has it, which nobody can tell from five.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev

from qstar.evaluation.intervals import Interval

# The 97.5 % quantile of Student's distribution, by degrees of freedom.
QUANTILES = (math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def over_seeds(values: Sequence[float], least: float = -math.inf, most: float = math.inf) -> Interval:
    """The 95 % interval of a mean over seeds; NaN for one seed.

    Args:
        values: of each seed.
        least, most: that a value can be, where the interval ends.

    Raises:
        ValueError: there are no values, or more than ten.
    """
    if not 1 <= len(values) <= len(QUANTILES):
        raise ValueError(f"values are {len(values)}, but they must be 1 to {len(QUANTILES)}, one for each seed")
    if len(values) == 1:
        return Interval(math.nan, math.nan)
    half = QUANTILES[len(values) - 1] * stdev(values) / math.sqrt(len(values))
    return Interval(max(fmean(values) - half, least), min(fmean(values) + half, most))
