"""How STaR goes about it: each setting once, with its default and its help."""

from __future__ import annotations

from dataclasses import dataclass

from qstar.config import setting


@dataclass(kw_only=True)
class StarSettings:
    """The rounds of STaR, and the training in each; the defaults are the paper's.

    Attributes:
        rounds: at most so many.
        patience: stop after so many rounds in a row that gain nothing on the held-out questions.
        rationalise: ask again with the answer as a hint where the model failed.
        first_steps: of training, in the first round.
        growth: each round has so many times the steps of the one before.
        learning_rate: constant after the warm-up.
        warmup_steps: over which the learning rate rises to its value, in each round.
        train_batch_size: texts in a step.
        gradient_checkpointing: less memory, for a little more time.
        bf16: train in bfloat16 autocast.
        max_new_tokens: of a rationale with its answer.
        batch_size: questions that are asked at a time.
        seed: of the order of the texts, and of dropout.
    """

    _argument_group_name = "STaR"

    rounds: int = setting(10, "At most so many rounds.")
    patience: int = setting(2, "Stop after so many rounds in a row without a gain on the held-out questions.")
    rationalise: bool = setting(True, "Ask again with the answer as a hint where the model failed.")
    first_steps: int = setting(40, "Steps of training in the first round.")
    growth: float = setting(1.2, "Each round has so many times the steps of the one before.")
    learning_rate: float = setting(1e-6, "Learning rate, constant after the warm-up.")
    warmup_steps: int = setting(100, "Steps over which the learning rate rises to its value, in each round.")
    train_batch_size: int = setting(8, "Texts in a step of training.")
    gradient_checkpointing: bool = setting(False, "Less memory, for a little more time.")
    bf16: bool = setting(False, "Train in bfloat16 autocast.")
    max_new_tokens: int = setting(256, "At most so many tokens of a rationale with its answer.")
    batch_size: int = setting(8, "Questions that are asked at a time.")
    seed: int = setting(0, "Of the order of the texts in training, and of dropout.")

    def __post_init__(self) -> None:
        at_least_one = ("rounds", "patience", "first_steps", "train_batch_size", "max_new_tokens", "batch_size")
        for name, least in (*((each, 1) for each in at_least_one), ("warmup_steps", 0), ("seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} is {value!r}, but it must be an integer of at least {least}")
        if not self.growth >= 1:
            raise ValueError(f"growth is {self.growth!r}, but it must be at least 1")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate is {self.learning_rate!r}, but it must be above 0")

    def steps(self, number: int) -> int:
        """Steps of training in round ``number``, from 1."""
        return round(self.first_steps * self.growth ** (number - 1))
