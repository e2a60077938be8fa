"""Thought attention inside transformers: an attention function and a mask function, both named ``qstar``.

While a layout is open (:mod:`qstar.layouts`), the mask function hands it to every layer in the place of a mask, and the
attention function lets it attend. transformers carries it as an opaque object, so it survives gradient checkpointing
and needs no code of any model. Without a layout the pair is a drop-in for ``sdpa`` (:mod:`qstar.drop_in`).
"""

from __future__ import annotations

import inspect
import re
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.utils.generic import TransformersKwargs

from qstar.drop_in import plain_attention, plain_mask
from qstar.layouts import Layout, attend, open_layout

NAME = "qstar"
IRRELEVANT = ("position_ids", "sliding_window")  # what a layout knows itself
PLAIN = {  # what the attention of transformers takes, and what models pass on to it that means another part of them
    *IRRELEVANT,
    *TransformersKwargs.__annotations__,
    *inspect.signature(sdpa_attention_forward).parameters,
    *("cache_position", "labels", "logits_to_keep", "return_dict", "use_cache"),
}


def qstar_mask(*, local_size: int | None = None, **kwargs: Any) -> Layout | Tensor | None:
    """The mask function: the open layout with this layer's window; without one, the mask of ``sdpa``."""
    layout = open_layout()
    if layout is not None:
        return replace(layout, window=local_size)
    return plain_mask(local_size=local_size, **kwargs)


def qstar_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Layout | Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function.

    Args:
        module: the attention layer that calls.
        query: ``[B, Hq, S, D]``.
        key: ``[B, Hkv, S, D]``.
        value: ``[B, Hkv, S, Dv]``.
        attention_mask: a layout, or a mask where none is open.
        scaling: factor on the scores, ``D**-0.5`` by default.
        dropout: must be 0 on a thought grid.
        softcap: soft-cap on the scores.
        s_aux: attention sinks, ``[Hq]``.

    Returns:
        The output ``[B, S, Hq, Dv]``, and None for the weights.

    Raises:
        ValueError: an argument that changes attention and is not known here, or a layer that adds
            compressed keys; on a thought grid attention dropout.
    """
    if isinstance(attention_mask, Layout):
        if dropout:
            raise ValueError(
                f"attention dropout is {dropout} in {type(module).__name__}, but thought attention has none: "
                "set the model's attention dropout to 0"
            )
        if kwargs.pop("is_causal", None) is False:
            raise ValueError(f"{type(module).__name__} sees what comes after: it passes is_causal = False")
        for name, argument in kwargs.items():
            if name not in IRRELEVANT and argument is not None and argument is not False:
                raise ValueError(f"{type(module).__name__} passes {name}, which thought attention does not know")
        return attend(attention_mask, module, query, key, value, scaling, softcap, s_aux), None
    if open_layout() is not None:
        raise ValueError(f"{type(module).__name__} did not pass the thought layout on: it makes a mask of its own")
    _check_plain(module, kwargs)
    return plain_attention(
        module,
        query,
        key,
        value,
        attention_mask,
        softcap=softcap,
        sinks=s_aux,
        **dict(kwargs, scaling=scaling, dropout=dropout),
    )


def _check_plain(module: nn.Module, arguments: dict[str, Any]) -> None:
    """Raise ValueError where the results of ``module`` would not stay what they were."""
    name = type(module).__name__
    for argument, value in arguments.items():
        if argument not in PLAIN and value is not None and value is not False:
            raise ValueError(f"{name} passes {argument}, which attn_implementation={NAME!r} does not know")
    if any(re.search("compressor", type(child).__name__, re.IGNORECASE) for child in module.children()):
        raise ValueError(f"{name} adds compressed keys, which the masks of attn_implementation={NAME!r} do not know")


def register() -> None:
    """Make ``attn_implementation="qstar"`` known to transformers."""
    AttentionInterface.register(NAME, qstar_attention)
    AttentionMaskInterface.register(NAME, qstar_mask)


register()
