"""``generate`` of a model that thinks: transformers' own, over a cache that thinks before each token."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList

from qstar.generation.call import Call
from qstar.generation.naming import CACHE, by_its_name
from qstar.generation.refusals import check_without_thoughts, never_saying
from qstar.generation.settings import GenerationSettings
from qstar.heads import ThoughtAlone
from qstar.model import QuietStarModel
from qstar.thinking import evaluating


class GeneratingModel(QuietStarModel):
    """A model that thinks while it generates."""

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        think: bool | None = None,
        think_when: str = "always",
        thought_tokens: int | None = None,
        thought_temperature: float = 0.0,
        thought_seed: int = 0,
        drafts: int | None = None,
        output_thoughts: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Generate with a thought before every token; all else is ``GenerationMixin.generate`` of transformers.

        Before a token the model reads the text, thinks ``K`` tokens, mixes what they lead to with what it would have
        said without them, and forgets the thought: no token of one is ever in the text. Greedy decoding, sampling, beam
        search, every logits processor, streamers, stop strings, chunked prefill and left-padded batches work as without
        thoughts; so does going on from a returned ``cache``, which before transformers 5.24 is ``past_key_values``.

        A token takes ``K + 1`` passes. With ``drafts``, tokens to come are guessed and thought behind together, so that
        a right guess takes a pass or none. Guesses are the model's own without thoughts, or those of
        ``assistant_model``, or with ``prompt_lookup_num_tokens`` come from the text itself.

        Args:
            inputs: the prompt, ``[B, N]`` int64; a batch is padded on the left and has an ``attention_mask``.
            generation_config: of transformers; its fields may also be given by name.
            think: see :class:`qstar.generation.settings.GenerationSettings`, as for the next five.
            think_when: before which tokens.
            thought_tokens: K.
            thought_temperature: thoughts are sampled at.
            thought_seed: of the thoughts.
            drafts: how many guesses.
            output_thoughts: with ``return_dict_in_generate``, return the thoughts and their weights as well.
            kwargs: whatever ``generate`` of transformers takes.

        Returns:
            Tokens ``[B, N + L]``; with ``return_dict_in_generate`` a
            :class:`qstar.generation.output.ThinkingOutput`.

        Raises:
            ValueError: an argument has a wrong value, has no effect, or asks for what cannot be right with thoughts; or
                the text would outgrow the positions that the model knows.
        """
        settings = GenerationSettings(
            think=think,
            think_when=think_when,
            thought_tokens=thought_tokens,
            thought_temperature=thought_temperature,
            thought_seed=thought_seed,
            drafts=drafts,
        )
        if inputs is not None:
            kwargs["inputs"] = inputs
        if generation_config is not None:
            kwargs["generation_config"] = generation_config
        kwargs = by_its_name(kwargs)
        if not (self.has_learned_to_think if think is None else think):
            check_without_thoughts(settings, output_thoughts, kwargs)
            with _under_way(None):
                return super().generate(**never_saying(self, kwargs))
        call = Call(self, settings, output_thoughts, kwargs)
        with _under_way(call), call.cache.left_usable(), evaluating(self):
            return call.result(super().generate(**call.arguments))

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """That of transformers, without thoughts.

        Raises:
            ValueError: the model has learned to think, which it could not do there.
        """
        if self.has_learned_to_think:
            raise ValueError(
                "continuous batching makes no thoughts, and this model has learned to think: give generate() a batch, "
                "or load the folder with AutoModelForCausalLM to have the model without thoughts"
            )
        return super().init_continuous_batching(*args, **kwargs)

    @property
    def has_learned_to_think(self) -> bool:
        """Whether the mixing head has been trained, whose last layer begins at zero; True where there is none."""
        head = self.qstar_mixing_head
        return isinstance(head, ThoughtAlone) or bool(head.output.weight.any())

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """transformers asks for a cache here, with its settings prepared."""
        call = self._call()
        if call is None:
            return super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        model_kwargs[CACHE] = call.cache
        return None

    def _get_logits_processor(
        self, generation_config: GenerationConfig, input_ids_seq_length: int | None = None, *args: Any, **kwargs: Any
    ) -> LogitsProcessorList:
        """transformers makes its processors here, from which guesses learn how tokens are taken."""
        processors = super()._get_logits_processor(generation_config, input_ids_seq_length, *args, **kwargs)
        call = self._call()
        if call is not None:
            mask = (kwargs.get("model_kwargs") or {}).get("attention_mask")
            call.begin(generation_config, cast(int, input_ids_seq_length), mask, processors)
        return processors

    def _call(self) -> Call | None:
        call = _calls.get()
        return call if call is not None and call.model is self else None


# The call of this thread, and of a call inside another: not of the model, which others may copy or use meanwhile.
_calls: ContextVar[Call | None] = ContextVar("_calls", default=None)


@contextlib.contextmanager
def _under_way(call: Call | None) -> Iterator[None]:
    token = _calls.set(call)
    try:
        yield
    finally:
        _calls.reset(token)
