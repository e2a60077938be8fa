"""What transformers calls the cache of a text: ``cache``, and before its version 5.24 ``past_key_values``."""

from __future__ import annotations

from typing import Any

from transformers.modeling_outputs import CausalLMOutputWithPast

OLD_NAME = "past_key_values"  # which every version takes
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else OLD_NAME


def by_its_name(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments of ``generate`` or of a pass with the cache, if there is one, as ``CACHE``.

    Raises:
        ValueError: it is given by both names.
    """
    if OLD_NAME == CACHE or OLD_NAME not in arguments:
        return arguments
    if CACHE in arguments:
        raise ValueError(f"{CACHE} and {OLD_NAME} are both given, but they are one: {OLD_NAME} is its older name")
    return {CACHE if name == OLD_NAME else name: value for name, value in arguments.items()}
