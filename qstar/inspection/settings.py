"""How texts are inspected: each setting once, with its default and its help."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite

from qstar.config import setting


@dataclass(kw_only=True)
class InspectionSettings:
    """How texts are inspected.

    Attributes:
        temperature: thoughts are sampled at; 0 takes the most probable token, as ``generate`` and ``evaluate`` do by
            default.
        rationales: r, thoughts at each position; by default as in training, and 1 at temperature 0.
        seed: of sampled thoughts and of the controls.
        controls: also read other thoughts in the place of the model's own.
        seq_length: longer texts are cut into parts of so many tokens, which are read each by itself, as in training.
        max_tokens: stop after so many tokens of text; None: at the end.
        max_grid_tokens: tokens of text and thoughts that the model reads at once: the same numbers in less memory.
            None: all of a part.
    """

    _argument_group_name = "inspection"

    temperature: float = setting(1.0, "Thoughts are sampled at it; 0 is greedy.")
    rationales: int | None = setting(None, "r: thoughts at each position; as in training, and 1 at temperature 0.")
    seed: int = setting(0, "Of sampled thoughts, and of the controls.")
    controls: bool = setting(True, "Also read other thoughts in the place of the model's own.")
    seq_length: int = setting(256, "Longer texts are cut into parts of so many tokens, each read by itself.")
    max_tokens: int | None = setting(2000, "Stop after so many tokens of text.")
    max_grid_tokens: int | None = setting(None, "Tokens of text and thoughts read at once; less takes less memory.")

    def __post_init__(self) -> None:
        for name, least in (("rationales", 1), ("seq_length", 2), ("max_tokens", 2), ("max_grid_tokens", 1)):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
                raise ValueError(f"{name} is {value!r}, but it must be an integer of at least {least}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed is {self.seed}, but it must be in 0..2^32 - 1")
        if not isfinite(self.temperature) or self.temperature < 0:
            raise ValueError(f"temperature is {self.temperature!r}, but it must be a number of at least 0")
        if self.temperature == 0 and self.rationales not in (None, 1):
            raise ValueError(f"rationales is {self.rationales}, but at temperature 0 all are the same: it must be 1")
