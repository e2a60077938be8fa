"""The classes of models that think, made at run time from those of transformers: (ThinkingModel, LlamaForCausalLM)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel

from qstar.generation.cache import ThinkingCache
from qstar.generation.model import GeneratingModel
from qstar.generation.naming import CACHE, NAMES, by_its_name


class ThinkingModel(GeneratingModel):
    """A model that thinks, and generates; what :func:`qstar.wrap` and :func:`qstar.load` give."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle by the class of the base, since this one is made at run time and no module holds it."""
        base = type(self).__bases__[-1]
        if _classes.get(base) is type(self):
            return _blank_model, (base,), self.__getstate__()
        return super().__reduce_ex__(protocol)  # of a class that somebody else has made of it


_classes: dict[type[PreTrainedModel], type[ThinkingModel]] = {}


def thinking_class(base: type[PreTrainedModel]) -> type[ThinkingModel]:
    """The subclass of ``base`` that thinks. It keeps the name of ``base``, which is what a checkpoint must say."""
    if base not in _classes:
        namespace = {"__module__": base.__module__, "forward": _forward_with_thoughts(base.forward)}
        _classes[base] = type(base.__name__, (ThinkingModel, base), namespace)
    return _classes[base]


def _forward_with_thoughts(base_forward: Callable[..., Any]) -> Callable[..., Any]:
    """``base_forward``, which hands its batch to ``objective`` where one is given, and to a cache that thinks.

    Training must run inside ``forward``: that is what DDP and FSDP wrap. The signature stays that of the base.
    """

    @functools.wraps(base_forward)
    def forward(self: ThinkingModel, *args: Any, objective: Callable[..., Any] | None = None, **kwargs: Any) -> Any:
        if objective is not None:
            return objective(self, *args, **kwargs)
        if any(isinstance(kwargs.get(name), ThinkingCache) for name in NAMES):
            kwargs = by_its_name(kwargs)
            return kwargs[CACHE].answer(*args, **kwargs)
        return base_forward(self, *args, **kwargs)

    return forward


def _blank_model(base: type[PreTrainedModel]) -> ThinkingModel:
    """A thinking model without any state, for what copies and unpickles it."""
    kind = thinking_class(base)
    return kind.__new__(kind)
