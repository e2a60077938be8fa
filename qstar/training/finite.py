"""Updates that are not finite: what in them is not, and what to try."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from qstar.model import QuietStarModel
from qstar.talking import text_loss

POLICIES = ("stop", "skip")  # what to do about such an update
MOST_SKIPPED = 10  # in a row: a model that is not finite by itself would be skipped for ever
PARTS = (  # causes first
    *("nll_base", "mixing_weight", "nll_talk", "likelihood_loss", "reward", "policy_loss", "policy_entropy", "loss"),
)


def not_finite(
    parts: dict[str, Tensor],
    model: nn.Module,
    total: Callable[[Tensor], Tensor] = lambda values: values,
    gather: Callable[[list[str]], list[str]] = lambda names: names,
) -> list[str]:
    """The names of what is infinite or NaN before an update: weights, parts of the loss, gradients; causes first.

    Asks the device once where all is finite. All processes get the same answer.

    Args:
        parts: scalars by the names of ``PARTS``, the loss at least.
        model: the model, with its gradients.
        total: adds values over all processes.
        gather: puts the names that all processes have found one behind another.
    """
    parts = {name: parts[name].detach() for name in PARTS if name in parts}
    gradients = {name: local(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    norm = torch.nn.utils.get_total_norm(gradients.values())
    device = parts["loss"].device
    values = total(torch.stack([x.to(device, torch.float32) for x in (norm, *parts.values())]))
    if values.isfinite().all():
        return []
    # All of it is looked at: the norm may be beyond a float where no value is.
    weights = not_finite_weights(model)
    wrong = [name for name, value in zip(parts, values[1:].tolist(), strict=True) if not math.isfinite(value)]
    named = ["the loss" if name == "loss" else name for name in wrong]
    wrong_gradients = [f"the gradient of {name}" for name, x in gradients.items() if not x.isfinite().all()]
    return [*dict.fromkeys(gather(weights)), *named, *dict.fromkeys(gather(wrong_gradients))]


def not_finite_weights(model: nn.Module) -> list[str]:
    """The names of the weights of which this process holds a value that is infinite or NaN."""
    return [f"the weight {name}" for name, p in model.named_parameters() if not local(p).isfinite().all()]


@torch.no_grad()
def not_finite_before_a_thought(model: QuietStarModel, batch: dict[str, Tensor]) -> list[str]:
    """The names of what keeps a model from sampling thoughts about a batch, where that is infinite or NaN."""
    return not_finite_weights(model) or ([] if text_loss(model, **batch).isfinite() else ["nll_base"])


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor that may be sharded."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def what_to_try(name: str) -> str:
    """Settings that help where ``name``, of :func:`not_finite`, is the first that is not finite."""
    if name.startswith("the weight"):
        return "load the model again: it was not finite before this step"
    if name in ("mixing_weight", "nll_talk") or "qstar_mixing_head" in name:
        return "try sigmoid=True, which holds the mixing weight in 0..1, or a lower mixing_head_lr_factor"
    if name in ("reward", "policy_loss"):
        return "try a lower policy_weight"
    return "try a lower learning_rate or more warmup_steps"
