"""What ``generate`` is asked for that cannot be right with thoughts, or would have no effect."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel
from transformers.generation import UnbatchedClassifierFreeGuidanceLogitsProcessor

from qstar.generation.cache import ThinkingCache
from qstar.generation.naming import CACHE
from qstar.generation.settings import GenerationSettings
from qstar.model import QuietStarModel, long_rope_limit

# What would have an effect, with the values that have none, and why it is refused.
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "custom_generate": ((None,), "a decoding of its own does not think"),
    "inputs_embeds": ((None,), "a thought reads the text by its tokens: give inputs"),
    "position_ids": ((None,), "positions are counted from the attention_mask"),
    "guidance_scale": ((None, 1, 1.0), "it would set a prediction with thoughts against one without"),
    "output_hidden_states": ((None, False), "states of the thoughts are not kept"),
    "output_attentions": ((None, False), "the weights of thought attention are never made"),
    "dola_layers": ((None,), "it contrasts layers, of which only the last is mixed with a thought"),
    "num_beam_groups": ((None, 1), "it is a decoding of its own, which does not think"),
    "penalty_alpha": ((None,), "contrastive search looks into hidden states, which thoughts do not return"),
    "assistant_early_exit": ((None,), "drafts are guesses of the whole model: drafts=N"),
    "use_mtp": ((None, False), "drafts are guesses of the whole model: drafts=N"),
}
# The same, of arguments alone: a pipeline fills a generation config with some of them, which have no effect there.
REFUSED_ARGUMENTS: dict[str, str] = {
    "assistant_tokenizer": "an assistant_model must have the model's own tokens",
    "num_assistant_tokens": "the number of guesses is drafts=N",
    "num_assistant_tokens_schedule": "as many tokens are guessed as pays, drafts at most",
    "assistant_confidence_threshold": "as many tokens are guessed as pays, drafts at most",
    "assistant_lookbehind": "an assistant_model must have the model's own tokens",
    "target_lookbehind": "an assistant_model must have the model's own tokens",
    "negative_prompt_ids": "there is no guidance that they would be for",
}
CACHES = (None, "dynamic")


def check_without_thoughts(settings: GenerationSettings, output_thoughts: bool, arguments: dict[str, Any]) -> None:
    """Refuse arguments about thoughts where there are none.

    Raises:
        ValueError: one is not at its default; the cache is one of a model that thinks.
    """
    why = "think is False" if settings.think is False else "the mixing head has not been trained"
    changed = [
        each.name for each in fields(settings) if each.name != "think" and getattr(settings, each.name) != each.default
    ]
    if output_thoughts:
        changed.append("output_thoughts")
    if changed:
        hint = "" if settings.think is False else ": think=True thinks all the same"
        raise ValueError(f"{changed[0]} is given, but {why}, so that no thoughts are made{hint}")
    if isinstance(arguments.get(CACHE), ThinkingCache):
        raise ValueError(f"{CACHE} is from a generation with thoughts, but {why}: generate the text without a cache")


def asked_for(model: PreTrainedModel, arguments: dict[str, Any], name: str) -> Any:
    """What ``generate`` would take: the argument, or that of the given generation config, or of the model's own."""
    for place in (
        arguments,
        vars(arguments.get("generation_config") or GenerationConfig()),
        vars(model.generation_config),
    ):
        if place.get(name) is not None:
            return place[name]
    return None


def check_asked(model: PreTrainedModel, arguments: dict[str, Any]) -> None:
    """Refuse arguments of ``generate`` that cannot be right with thoughts.

    Raises:
        ValueError: there is one.
    """
    alone = {name: ((None,), why) for name, why in REFUSED_ARGUMENTS.items()}
    for name, (harmless, why) in (REFUSED | alone).items():
        value = arguments.get(name) if name in alone else asked_for(model, arguments, name)
        if isinstance(value, Tensor) or value not in harmless:
            shown = "given" if isinstance(value, Tensor) else repr(value)
            raise ValueError(f"{name} is {shown}, but a model that thinks cannot have it: {why}")
    given = arguments.get("generation_config") or GenerationConfig()  # the model's own gives way in what follows
    if arguments.get("use_cache", given.use_cache) is False:
        raise ValueError("use_cache is False, but a model that thinks needs the cache of the text")
    cache = arguments.get("cache_implementation", given.cache_implementation)
    if cache not in CACHES:
        raise ValueError(
            f"cache_implementation is {cache!r}, but thoughts come and go in a cache of their own, which grows with "
            "the text: leave it out"
        )
    if model.generation_config.prompt_lookup_num_tokens is not None:
        raise ValueError(
            "model.generation_config.prompt_lookup_num_tokens is set, but a model that thinks takes it from a call: "
            "generate(prompt_lookup_num_tokens=N)"
        )
    if arguments.get("max_matching_ngram_size") and not asked_for(model, arguments, "prompt_lookup_num_tokens"):
        raise ValueError("max_matching_ngram_size is given, but prompt_lookup_num_tokens is not: no text is looked up")
    check_past(arguments.get(CACHE), arguments.get("inputs", arguments.get("input_ids")))


def check_past(past: object, inputs: Tensor | None) -> None:
    """Refuse a cache from which this generation cannot go on.

    Raises:
        ValueError: it is not one that thinks, or ``inputs`` ``[B, N]`` do not go on from what it holds.
    """
    if past is None:
        return
    if not isinstance(past, ThinkingCache):
        raise ValueError(
            f"{CACHE} is a {type(past).__name__}, but it must be what an earlier generate(think=True) returned"
        )
    if past.text is None or inputs is None:
        return
    read = past.text.tokens
    if len(inputs) != len(read):
        raise ValueError(f"inputs has {len(inputs)} rows, but {CACHE} holds {len(read)}")
    if inputs.shape[1] <= read.shape[1] or not inputs[:, : read.shape[1]].equal(read.to(inputs.device)):
        raise ValueError(
            f"inputs has {inputs.shape[1]} tokens, but they must begin with the {read.shape[1]} that {CACHE} "
            "holds, and go on"
        )


def check_room(
    model: QuietStarModel, thought_tokens: int, lengths: tuple[int, int], new_tokens: int, first_pass: int | None = None
) -> None:
    """Refuse texts that would outgrow what the model knows: the last thought stands behind the last token but one.

    Args:
        model: the model.
        thought_tokens: K.
        lengths: of the shortest and the longest prompt, in tokens that are no padding.
        new_tokens: generated at most.
        first_pass: tokens of the shortest prompt that are read first; all but the last by default.

    Raises:
        ValueError: there are too few positions, or LongRoPE would change its rotary factors between two passes.
    """
    shortest, longest = lengths
    last, further = longest + max(new_tokens - 1, 0), thought_tokens + 2
    model.check_length(last, further)
    limit = long_rope_limit(model.config.get_text_config(decoder=True))
    first_pass = max(shortest - 1, 1) if first_pass is None else first_pass
    if limit is not None and first_pass <= limit < last + further:
        raise ValueError(
            f"texts of {shortest} to {last} tokens, of which {first_pass} are read first, and {further} of a thought "
            f"cross original_max_position_embeddings = {limit}, where {type(model).__name__} changes its rotary "
            f"factors: stay at or below it, or begin with prompts that are longer"
        )


def check_processors(processors: Sequence[LogitsProcessor]) -> None:
    """Refuse a processor that asks the model for predictions without thoughts.

    Raises:
        ValueError: there is one.
    """
    for each in processors:
        if isinstance(each, UnbatchedClassifierFreeGuidanceLogitsProcessor):
            raise ValueError(
                f"logits_processor holds a {type(each).__name__}, but it would set a prediction with thoughts against "
                "one without"
            )


def never_saying(model: QuietStarModel, arguments: dict[str, Any]) -> dict[str, Any]:
    """``arguments`` of ``generate`` without thoughts, so that it says no token of a thought either."""
    given = arguments.get("suppress_tokens")
    if given is None:
        return arguments
    return arguments | {"suppress_tokens": sorted({*given, model.qstar.start_token_id, model.qstar.end_token_id})}


def check_drafts(settings: GenerationSettings, arguments: dict[str, Any], beams: int) -> str | None:
    """Why no tokens can be guessed, None where they can.

    Raises:
        ValueError: guesses are asked for where there can be none, or in two ways.
    """
    assistant, lookup = arguments.get("assistant_model"), arguments.get("prompt_lookup_num_tokens")
    if assistant is not None and lookup is not None:
        raise ValueError("assistant_model and prompt_lookup_num_tokens both make guesses: give one of them")
    if lookup is not None and settings.drafts is not None:
        raise ValueError("prompt_lookup_num_tokens and drafts both say how many tokens are guessed: give one of them")
    reason = None
    if settings.when.never:
        reason = "think_when is 'never'"
    elif beams > 1:
        reason = f"num_beams is {beams}, and beams part after every token"
    elif arguments.get("synced_gpus"):
        reason = "synced_gpus is set, and processes would make different numbers of passes"
    asked = [name for name in ("assistant_model", "prompt_lookup_num_tokens") if arguments.get(name) is not None]
    if settings.drafts:
        asked.append("drafts")
    if reason is not None and asked:
        raise ValueError(f"{asked[0]} is given, but no tokens can be guessed: {reason}")
    if settings.drafts == 0:
        if asked:
            raise ValueError(f"{asked[0]} is given, but drafts is 0: no tokens are guessed")
        return "drafts is 0"
    return reason


def check_assistant(model: PreTrainedModel, assistant: object) -> None:
    """Refuse an assistant that cannot guess.

    Raises:
        ValueError: it is no other model, or cannot take a wrong guess back.
    """
    if not isinstance(assistant, PreTrainedModel):
        raise ValueError(f"assistant_model is a {type(assistant).__name__}, but it must be a model of transformers")
    if assistant is model:
        raise ValueError("assistant_model is the model itself, which makes guesses of its own: leave it out")
    if assistant._is_stateful:
        raise ValueError(
            f"assistant_model is a {type(assistant).__name__}, which cannot take back a token that was guessed wrongly"
        )
