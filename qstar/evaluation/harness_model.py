"""A model of lm-evaluation-harness that thinks: only where a token of a continuation is predicted, or one is generated.

This file needs the extra ``eval``; :mod:`qstar.evaluation.harness` is the door that says so where it is missing.
"""

from __future__ import annotations

import inspect
import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

import qstar
from qstar import adapters
from qstar.config import CONFIG_FILE
from qstar.evaluation.sampling import seed_of_repeat
from qstar.evaluation.scoring import OWN, Request, score_requests
from qstar.model import QuietStarModel
from qstar.wrapping import load

REFUSED = (  # options of HFLM that would have no effect on how continuations are scored
    *("mixed_precision_dtype", "softmax_dtype", "parallelize", "tp_plan"),
    *("peft", "delta", "autogptq", "gptqmodel", "gguf_file", "subfolder"),
)


class QuietStarLM(HFLM):
    """HFLM for a model that thinks, and for any other causal language model, which then does what HFLM does.

    Its name among the models of the harness is ``qstar``, where the harness reads entry points.
    """

    def __init__(
        self,
        pretrained: str | Path | PreTrainedModel,
        *,
        think: bool | None = None,
        thought_temperature: float = 0.0,
        thought_seed: int = 0,
        **options: Any,
    ) -> None:
        """Load a model, or take one.

        Args:
            pretrained: a folder that ``qstar train`` wrote, a hub name or a folder of any model, or a model object.
            think: whether to think; by default a model does that has learned to.
            thought_temperature: thoughts are sampled at; 0 takes the most probable token.
            thought_seed: of sampled thoughts. Repeats of one request think differently.
            options: of ``HFLM``.

        Raises:
            ValueError: an option that cannot be had with thoughts; thoughts of a model that never learned to think.
        """
        for name in REFUSED:
            if options.get(name):
                raise ValueError(f"{name} is {options[name]!r}, but a model that thinks cannot have it: leave it out")
        if str(options.get("batch_size", 1)).startswith("auto"):
            raise ValueError(f"batch_size is {options['batch_size']!r}, but it must be a number: none is looked for")
        options = {"device": "cuda" if torch.cuda.is_available() else "cpu"} | options
        super().__init__(str(pretrained) if isinstance(pretrained, Path) else pretrained, **options)
        if self.backend != "causal":
            raise ValueError(f"{type(self.model).__name__} is a {self.backend} model, but it must be a causal one")
        can_think = isinstance(self.model, QuietStarModel)
        if think and not can_think:
            raise ValueError(f"think is True, but {type(self.model).__name__} never learned to think")
        self.thinks = can_think and (self.model.has_learned_to_think if think is None else think)
        self.thought_temperature, self.thought_seed = thought_temperature, thought_seed
        self._repeat = 0

    def _get_config(self, pretrained: str, **options: Any) -> None:
        """A folder of adapters has no config of its own: that of its base."""
        if adapters.holds_adapters(pretrained):
            pretrained, revision = adapters.stored_base(pretrained)
            options["revision"] = revision or "main"
        super()._get_config(pretrained, **options)

    def _create_model(self, pretrained: str, **options: Any) -> None:
        if not (Path(pretrained) / CONFIG_FILE).is_file():
            super()._create_model(pretrained, **options)
            return
        for name in options.keys() - inspect.signature(HFLM._create_model).parameters:
            raise ValueError(f"{name} is {options[name]!r}, but the folder of a model that thinks is read without it")
        self._model, _ = load(
            pretrained, dtype=options["dtype"] or "auto", trust_remote_code=bool(options["trust_remote_code"])
        )
        nn.Module.to(self._model, self.device)

    @property
    def max_length(self) -> int:
        """Tokens of the longest text, behind which there is room for a thought."""
        if self._max_length or not self.thinks:
            return int(super().max_length)
        return int(super().max_length) - self.model.grid(1, rationales=1, ahead_tokens=1).rationale_length

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, in nats, and whether greedy decoding would say it."""
        scores = score_requests(
            self.model,
            [self._request(context, continuation) for _, context, continuation in requests],
            thoughts=OWN if self.thinks else None,
            batch_size=override_bs or self.batch_size,
            temperature=self.thought_temperature,
            seed=self.thought_seed,
        )
        hidden = disable_tqdm or self.rank != 0
        found: dict[int, tuple[float, bool]] = {}
        for number, each in tqdm(scores, "Running loglikelihood requests", len(requests), disable=hidden):
            found[number] = float(each.log_prob.sum()), bool(each.best.all())
            if (text := requests[number][0]) is not None:  # None: a part of a text, which is kept as a whole
                self.cache_hook.add_partial("loglikelihood", text, found[number])
        return [found[number] for number in range(len(requests))]

    def _request(self, context: list[int], continuation: list[int]) -> Request:
        """As much of the context, from its end, as there is room for."""
        if len(continuation) > self.max_length:
            raise ValueError(
                f"a continuation has {len(continuation)} tokens, but there is room for {self.max_length} in the model"
            )
        return Request((context + continuation)[-(self.max_length + 1) : -len(continuation)], continuation)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Generate for each request until one of its stop strings; repeats of one request think differently."""
        if not (self.thinks and self.thought_temperature):
            return super().generate_until(requests, disable_tqdm=disable_tqdm)
        seen: Counter[str] = Counter()
        of_repeat: dict[int, list[int]] = {}
        for number, request in enumerate(requests):
            key = json.dumps(request.args, sort_keys=True, default=str)
            of_repeat.setdefault(seen[key], []).append(number)
            seen[key] += 1
        said: dict[int, str] = {}
        for repeat, numbers in of_repeat.items():
            self._repeat = repeat
            texts = super().generate_until([requests[number] for number in numbers], disable_tqdm=disable_tqdm)
            said |= zip(numbers, texts, strict=True)
        return [said[number] for number in range(len(requests))]

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        if self.thinks:
            options |= dict(
                think=True,
                thought_temperature=self.thought_temperature,
                thought_seed=seed_of_repeat(self.thought_seed, self._repeat),
            )
        elif isinstance(self.model, QuietStarModel):
            options["think"] = False
        return super()._model_generate(context, max_length, stop, **options)

    def get_model_info(self) -> dict[str, Any]:
        """What HFLM says of a model, and how it thinks."""
        info = dict(super().get_model_info()) | {"qstar_version": qstar.__version__, "think": self.thinks}
        if not self.thinks:
            return info
        return info | {
            "thought_tokens": self.model.qstar.thought_tokens,
            "ahead_tokens": self.model.qstar.ahead_tokens,
            "thought_temperature": self.thought_temperature,
            "thought_seed": self.thought_seed,
        }
