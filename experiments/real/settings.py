"""What is compared, and how much is trained and asked."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from qstar.config import setting, setting_names
from qstar.training.settings import QuietStarArguments

BASE = "base"  # the model as it was
PLAIN, EQUAL_OPERATIONS = "plain", "plain-equal-operations"


@dataclass(frozen=True)
class Variant:
    """A way to train the base.

    Attributes:
        thinks: whether it has thoughts, or pauses; else it is trained on the likelihood of the text alone.
        thoughts: settings of the thoughts.
        training: settings of the training.
    """

    thinks: bool = True
    thoughts: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)

    @property
    def pauses(self) -> bool:
        """Whether its thoughts are pauses, which say nothing."""
        return bool(self.thoughts.get("pauses"))


VARIANTS = {  # what takes longest first, so that processes side by side end together
    "paper": Variant(training=dict(preset="paper")),
    "rlp": Variant(training=dict(preset="rlp")),
    EQUAL_OPERATIONS: Variant(thinks=False),
    "pause": Variant(thoughts=dict(pauses=True, rationales=1)),
    PLAIN: Variant(thinks=False),
}


@dataclass(kw_only=True)
class RealModelSettings:
    """All that decides a result, beside the model, the text, the tasks, the variant and the seed.

    Attributes:
        steps: updates of each variant but ``plain-equal-operations``, which has as many as the multiply-adds of
            ``rlp`` pay for.
        batch_size: rows in an update.
        equal_operations_batch_size: rows in an update of ``plain-equal-operations``.
        seq_length: N, text tokens in a row.
        thought_tokens: K.
        ahead_tokens: m.
        rationales: r, of a variant that does not say otherwise.
        learning_rate: of the decoder, the same for every variant.
        mixing_head_lr_factor: learning rate of the mixing head over it.
        thought_embedding_lr_factor: that of the start and end embeddings.
        warmup_ratio: share of the steps over which the learning rate rises; it falls to 0 until the last.
        policy_weight: of the REINFORCE loss.
        positions_per_row: text tokens of a row that thoughts are trained at, others in every update; all by default.
        bf16: train in bfloat16, by autocast, with weights in float32; on a GPU by default.
        eval_bf16: evaluate so as well. It is faster; of an answer's log-likelihood it rounds away some 0.05 nats.
        max_grid_tokens: tokens of the thought grid that are read at once with gradients; 0 for no limit.
        text_column: of the data set.
        dataset_config: configuration of a hub data set.
        held_out: of so many documents one is held out, by the SHA-256 of its text.
        held_out_rows: rows of held-out text that are scored, at most.
        max_questions: of a task, drawn by chance; all by default.
        text_batch_size: rows of held-out text that are read at a time.
        question_batch_size: questions that are read at a time.
    """

    _argument_group_name = "settings"

    steps: int = setting(100, "Updates of each variant but plain-equal-operations.")
    batch_size: int = setting(8, "Rows in an update.")
    equal_operations_batch_size: int = setting(8, "Rows in an update of plain-equal-operations.")
    seq_length: int = setting(256, "N: text tokens in a row.")
    thought_tokens: int = setting(12, "K: sampled tokens in a thought.")
    ahead_tokens: int = setting(4, "m: text tokens that a thought is scored on.")
    rationales: int = setting(2, "r: thoughts at each position in training.")
    learning_rate: float = setting(3e-5, "Learning rate of the decoder.")
    mixing_head_lr_factor: float = setting(10.0, "Learning rate of the mixing head over it.")
    thought_embedding_lr_factor: float = setting(100.0, "Learning rate of start and end embeddings over it.")
    warmup_ratio: float = setting(0.1, "Share of the steps over which the learning rates rise.")
    policy_weight: float = setting(QuietStarArguments.policy_weight, "Weight of the REINFORCE loss.")
    positions_per_row: int | None = setting(None, "Train thoughts at so many random text tokens of a row.")
    bf16: bool = setting(
        torch.cuda.is_available(), "Train in bfloat16, with weights in float32; on a GPU if not given."
    )
    eval_bf16: bool = setting(False, "Evaluate in bfloat16 as well: faster, and less exact.")
    max_grid_tokens: int = setting(4096, "Tokens of the thought grid that are read at once; 0 for no limit.")
    text_column: str = setting("text", "The column that holds the text.")
    dataset_config: str | None = setting(None, "Configuration of a hub data set.")
    held_out: int = setting(20, "Of so many documents one is held out.")
    held_out_rows: int = setting(256, "Rows of held-out text that are scored, at most.")
    max_questions: int | None = setting(None, "Draw so many questions of each task.")
    text_batch_size: int = setting(16, "Rows of held-out text that are read at a time.")
    question_batch_size: int = setting(32, "Questions that are read at a time.")

    def __post_init__(self) -> None:
        for name in ("steps", "held_out_rows", *(each for each in setting_names(type(self)) if "batch_size" in each)):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but it must be at least 1")
        if self.held_out < 2:
            raise ValueError(
                f"held_out is {self.held_out}, but it must be at least 2: else no text is left to train on"
            )
        if not 0 <= self.warmup_ratio < 1:
            raise ValueError(f"warmup_ratio is {self.warmup_ratio}, but it must be in 0..1, and below 1")

    def thoughts_of(self, variant: Variant) -> dict[str, Any]:
        """The settings of a variant's thoughts."""
        names = ("thought_tokens", "ahead_tokens", "rationales")
        return {name: getattr(self, name) for name in names} | variant.thoughts

    def training_of(self, variant: Variant) -> dict[str, Any]:
        """The settings of a variant's training that do not depend on its length."""
        names = (
            *("seq_length", "learning_rate", "mixing_head_lr_factor", "thought_embedding_lr_factor"),
            *("policy_weight", "bf16", "max_grid_tokens"),
            *(("positions_per_row",) if variant.thinks else ()),
        )
        return {name: getattr(self, name) for name in names} | variant.training

    def as_json(self) -> dict[str, Any]:
        """All of it, with the variants that it is for."""
        return asdict(self) | {"settings_of_variants": {name: asdict(each) for name, each in VARIANTS.items()}}
