"""What transformers calls the cache of a text: ``cache``, and before its version 5.24 ``past_key_values``."""

from __future__ import annotations

from typing import Any

from transformers.modeling_outputs import CausalLMOutputWithPast

NAMES = ("cache", "past_key_values", "cache_params")  # that it has or had in arguments of ``generate``
CACHE = next(name for name in NAMES if name in CausalLMOutputWithPast.__dataclass_fields__)  # in this version


def by_its_name(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments of ``generate`` or of a pass in which the cache, if one is given, has the name of this version.

    Raises:
        ValueError: one is given by each of two names.
    """
    given = [name for name in NAMES if arguments.get(name) is not None]
    if len(given) > 1:
        raise ValueError(f"{given[0]} and {given[1]} are both given, but they are names of one thing: give one of them")
    rest = {name: value for name, value in arguments.items() if name not in NAMES}
    return rest | {CACHE: arguments[given[0]]} if given else rest
