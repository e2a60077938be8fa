"""How a model thinks while it generates: each setting once, with its default and its help."""

from __future__ import annotations

from dataclasses import dataclass

from qstar.config import setting
from qstar.generation.when import FORMS, ThinkWhen

MOST_DRAFTS = 8


@dataclass(kw_only=True)
class GenerationSettings:
    """How ``generate`` thinks.

    Attributes:
        think: think before tokens; False gives exactly the base model. By default a model thinks whose mixing head has
            been trained, or that has none.
        think_when: before which tokens: ``always``, ``never``, ``every:N`` for each N-th position of a text, or
            ``entropy:H`` where the entropy of the base model's next token is above H nats.
        thought_tokens: K; what the model was trained with by default.
        thought_temperature: thoughts are sampled at; 0 takes the most probable token.
        thought_seed: of the thoughts. What a row thinks at a position depends on it and on the row's text alone, not on
            the batch; the sequences returned for one prompt think differently.
        drafts: think behind up to so many guessed tokens at once; 0 thinks token by token. The text is the same, up to
            the rounding of logits. By default 8 for a single row, where guesses can be made; and none for a batch, in
            which guesses are of use only while they are right for all rows.
    """

    _argument_group_name = "thinking"

    think: bool | None = setting(None, "Think before tokens; a trained model does by default.")
    think_when: str = setting("always", f"Before which tokens: {FORMS}.")
    thought_tokens: int | None = setting(None, "K: tokens in a thought; as in training by default.")
    thought_temperature: float = setting(0.0, "Thoughts are sampled at; 0 takes the most probable token.")
    thought_seed: int = setting(0, "Seed of the thoughts, where they are sampled.")
    drafts: int | None = setting(None, f"Think behind up to so many guessed tokens at once; {MOST_DRAFTS} for one row.")

    def __post_init__(self) -> None:
        if self.think not in (None, True, False):
            raise ValueError(f"think is {self.think!r}, but it must be True, False or None")
        self.when = ThinkWhen.parse(self.think_when)
        for name, least in (("thought_tokens", 1), ("drafts", 0), ("thought_seed", -(2**63))):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
                raise ValueError(f"{name} is {value!r}, but it must be an integer of at least {least}")
        if self.thought_seed >= 2**64:
            raise ValueError(f"thought_seed is {self.thought_seed}, but it must be below 2^64")
        temperature = self.thought_temperature
        if (
            not isinstance(temperature, (int, float))
            or isinstance(temperature, bool)
            or not 0 <= temperature < float("inf")
        ):
            raise ValueError(f"thought_temperature is {temperature!r}, but it must be a number of at least 0")
