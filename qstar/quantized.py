"""Models whose weights are quantised: what can be done with them, as their settings alone say."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

EIGHT_BIT = (
    "bitsandbytes rounds the states of a pass as well, by what else is in the pass, and otherwise in train() than in "
    "eval(), so that a thought would be scored by another model than the one that sampled it: load it in 4 bits "
    "(load_in_4bit=True)"
)


def quantization_of(config: PreTrainedConfig) -> dict[str, Any] | None:
    """How the weights of a model are quantised, None where they are not."""
    found = getattr(config, "quantization_config", None)
    return found if found is None or isinstance(found, dict) else dict(found.to_dict())


def check_states(config: PreTrainedConfig) -> None:
    """Raise ValueError where a model rounds its states, and not only its weights."""
    found = quantization_of(config)
    if found is not None and found.get("load_in_8bit"):
        raise ValueError(f"the model is quantised to 8 bits: {EIGHT_BIT}")


def check_learnable(config: PreTrainedConfig, *, lora: bool, device: str) -> None:
    """Raise ValueError where a model cannot learn since its weights are quantised.

    Args:
        config: of the model.
        lora: whether adapters learn, and its own weights do not.
        device: the type of the device that it learns on.
    """
    check_states(config)
    found = quantization_of(config)
    if found is None:
        return
    if not found.get("load_in_4bit"):
        if lora:
            raise ValueError(
                f"the model is quantised by {_method(found)}, beside which adapters have not been tried: load it in "
                "full precision, or in 4 bits by bitsandbytes"
            )
        return  # the Trainer knows which of the others learn
    if not lora:
        raise ValueError("the model is quantised to 4 bits, and such weights do not learn: lora=True trains adapters")
    if device == "cpu":
        raise ValueError(
            "the model is quantised to 4 bits, but it must be on a GPU to learn: on a CPU, bitsandbytes repacks "
            "weights that have been read without gradients, and gives none from then on"
        )


def _method(found: dict[str, Any]) -> str:
    method = found.get("quant_method", "an unnamed method")
    return str(getattr(method, "value", method))
