"""How tokens are taken from what a model predicts: each setting once, with its default and its help."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from transformers import GenerationConfig, PreTrainedTokenizerBase, StoppingCriteriaList, set_seed

from qstar.config import setting
from qstar.prompting.stopping import StopTexts

OF_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "seed")
PASSED_ON = ("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def padding_token(config: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """What fills a row after its end; None where there is no such token and rows do not end early."""
    eos = config.eos_token_id[0] if isinstance(config.eos_token_id, list) else config.eos_token_id
    candidates = (config.pad_token_id, tokenizer.pad_token_id, eos, tokenizer.eos_token_id)
    return next((token for token in candidates if isinstance(token, int)), None)


@dataclass(kw_only=True)
class DecodingSettings:
    """How a text is continued. What is None is left to the model's own generation config.

    Attributes:
        max_new_tokens: at most so many tokens are generated.
        do_sample: sample tokens, where the most probable would be taken.
        temperature: tokens are sampled at.
        top_k: sample from the k most probable tokens.
        top_p: sample from the most probable tokens that make up this probability.
        min_p: sample from tokens that are at least so probable, as a share of the most probable one's.
        repetition_penalty: above 1, makes tokens that have been said less probable.
        stop: texts that end a continuation; they stay in it.
        seed: of sampled tokens; 0 where None.
    """

    _argument_group_name = "decoding"
    COUNTS: ClassVar[tuple[str, ...]] = ("max_new_tokens",)
    PASSED_ON: ClassVar[tuple[str, ...]] = PASSED_ON

    max_new_tokens: int = setting(64, "At most so many tokens.")
    do_sample: bool | None = setting(None, "Sample tokens; generation_config.json of the folder says it by default.")
    temperature: float | None = setting(None, "Sample tokens at it.")
    top_k: int | None = setting(None, "Sample from so many of the most probable tokens.")
    top_p: float | None = setting(None, "Sample from the most probable tokens that make up this probability.")
    min_p: float | None = setting(None, "Sample from tokens of at least this share of the highest probability.")
    repetition_penalty: float | None = setting(None, "Above 1: what has been said becomes less probable.")
    stop: tuple[str, ...] = setting((), "A text that ends a continuation; may be repeated.")
    seed: int | None = setting(None, "Seed of sampled tokens; 0 by default.")

    def __post_init__(self) -> None:
        for name in self.COUNTS:
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{name} is {value!r}, but it must be an integer of at least 1")
        if "" in self.stop:
            raise ValueError("stop is '', but it must be a text that a continuation can end with")

    def samples(self, config: GenerationConfig) -> bool:
        """Whether tokens are sampled by a model of this generation config."""
        return bool(config.do_sample if self.do_sample is None else self.do_sample)

    def check_effect(self, config: GenerationConfig) -> None:
        """Raise ValueError where a setting would have no effect on a model of this generation config."""
        for name in OF_SAMPLING:
            if getattr(self, name) is not None and not self.samples(config):
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}, but no tokens are sampled: give do_sample as well"
                )

    def set_seed(self, config: GenerationConfig) -> None:
        """Begin the random numbers of sampled tokens anew, where any are sampled."""
        if self.samples(config):
            set_seed(self.seed or 0)

    def arguments(
        self, config: GenerationConfig, tokenizer: PreTrainedTokenizerBase, prompt_length: int
    ) -> dict[str, Any]:
        """What ``generate`` is given beside prompts of so many tokens, of a model of this generation config."""
        given: dict[str, Any] = {"max_new_tokens": self.max_new_tokens}
        given |= {name: getattr(self, name) for name in self.PASSED_ON if getattr(self, name) is not None}
        if self.stop:
            given["stopping_criteria"] = StoppingCriteriaList([StopTexts(tokenizer, self.stop, prompt_length)])
        if config.pad_token_id is None:
            given["pad_token_id"] = padding_token(config, tokenizer)
        return given


@dataclass(kw_only=True)
class SearchSettings(DecodingSettings):
    """How prompts are continued, each perhaps in several ways.

    Attributes:
        num_beams: width of beam search; 1 for none.
        num_return_sequences: continuations of each prompt.
    """

    COUNTS = (*DecodingSettings.COUNTS, "num_beams", "num_return_sequences")
    PASSED_ON = (*PASSED_ON, "num_beams", "num_return_sequences")

    num_beams: int | None = setting(None, "Width of beam search; 1 for none.")
    num_return_sequences: int | None = setting(None, "Continuations of each prompt.")

    def one_at_a_time(self, config: GenerationConfig) -> bool:
        """Whether a prompt's only continuation grows token by token, so that it can be streamed."""
        beams = (config.num_beams if self.num_beams is None else self.num_beams) or 1
        returned = config.num_return_sequences if self.num_return_sequences is None else self.num_return_sequences
        return beams == 1 and (returned or 1) == 1


@dataclass(kw_only=True)
class ChatSettings(DecodingSettings):
    """How a chat is answered: as :class:`DecodingSettings`, at more length."""

    max_new_tokens: int = setting(256, "At most so many tokens in an answer.")
