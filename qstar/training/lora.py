"""Adapters instead of the whole model: the settings of LoRA (arXiv 2106.09685)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from qstar import adapters
from qstar.config import setting

if TYPE_CHECKING:
    from peft import LoraConfig


@dataclass(kw_only=True)
class LoraSettings:
    """Whether adapters learn beside a frozen model, and which.

    The defaults are those of "LoRA Without Regret" (Schulman et al., 2025): all linear layers, ``alpha`` 32, and ten
    times the learning rate that the whole model would have.

    Attributes:
        lora: train adapters, the mixing head and the thought embeddings, and nothing else. Python may give a
            ``peft.LoraConfig``, which the other settings do not say anything of but the learning rate.
        lora_rank: the rank of an adapter, r.
        lora_alpha: what adapters are scaled by, over the rank.
        lora_targets: the names of the layers that have adapters; None for all linear ones of the decoder's layers.
        lora_lr_factor: the learning rate of the adapters over ``learning_rate``.
    """

    lora: bool = setting(False, "Train adapters (LoRA) beside the frozen model; needs the package peft.")
    lora_rank: int = setting(16, "Rank of the adapters.")
    lora_alpha: float = setting(32.0, "Adapters are scaled by this over their rank.")
    lora_targets: list[str] | None = setting(
        None, "Names of the layers that have adapters; all linear layers of the decoder's layers if not given."
    )
    lora_lr_factor: float = setting(10.0, "Learning rate of the adapters over learning_rate.")

    def check_lora(self) -> None:
        """Raise ValueError for a wrong value, or one that would be ignored; TypeError where ``lora`` is no config."""
        if not isinstance(self.lora, bool):
            adapters.check_is_config(self.lora)
        if isinstance(self.lora_rank, bool) or not isinstance(self.lora_rank, int) or self.lora_rank < 1:
            raise ValueError(f"lora_rank is {self.lora_rank!r}, but it must be an integer of at least 1")
        if self.lora_targets is not None and not self.lora_targets:
            raise ValueError("lora_targets is empty, but it must name layers, or be None for all linear ones")
        if self.lora is not True:
            lora = "False" if self.lora is False else "a config of its own"
            self._check_default(("lora_rank", "lora_alpha", "lora_targets"), f"lora is {lora}")

    def check_rate(self, model: nn.Module) -> None:
        """Raise ValueError for a learning rate of adapters that ``model`` does not have."""
        if not adapters.has_adapters(model):
            self._check_default(("lora_lr_factor",), "the model has no adapters")

    def _check_default(self, names: Collection[str], why: str) -> None:
        for each in fields(LoraSettings):
            value = getattr(self, each.name)
            if each.name in names and value != each.default:
                raise ValueError(f"{each.name} is {value!r}, but {why}: {each.name} would be ignored")

    def lora_config(self) -> LoraConfig:
        """The adapters as peft has them."""
        if self.lora is not True:
            return cast(Any, self.lora)
        peft = adapters.peft()
        return peft.LoraConfig(
            task_type=peft.TaskType.CAUSAL_LM,
            r=self.lora_rank,
            lora_alpha=self.lora_alpha,
            target_modules=self.lora_targets,
        )

    def described_lora(self) -> bool | dict[str, Any]:
        """``lora`` as JSON can hold it."""
        if isinstance(self.lora, bool):
            return self.lora
        given = cast(Any, self.lora).to_dict()
        return {name: sorted(value) if isinstance(value, set) else value for name, value in given.items()}
