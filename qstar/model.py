"""Any Hugging Face causal language model, with the parameters that let it think.

A model that thinks is an instance of a class made at run time, see :mod:`qstar.classes`. The parameters
of the base keep their names, the new ones are called ``qstar_*``; everything that worked with the model goes on
working. On disk the folder is an ordinary checkpoint of the base model, with the settings in ``qstar_config.json`` and
the mixing head in ``qstar/mixing_head.safetensors`` beside it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedConfig, PreTrainedModel

from qstar import attention, layouts
from qstar.autocast import compute_dtype
from qstar.config import CONFIG_FILE, QuietStarConfig
from qstar.grid import ThoughtGrid
from qstar.heads import LanguageHead, MixingHead

if TYPE_CHECKING:

    class _Decoder(PreTrainedModel):
        generate: Any
        init_continuous_batching: Any
        _prepare_cache_for_generation: Any
        _get_logits_processor: Any

else:
    _Decoder = object  # at run time the decoder is the last base of each class, see qstar.classes

MIXING_HEAD_FILE = "qstar/mixing_head.safetensors"
PREFIX = "qstar_"


class QuietStarModel(_Decoder):
    """What a decoder needs to think: thought embeddings, the mixing head, and ways to read a thought grid.

    Attributes:
        qstar: the settings.
        qstar_start: embedding of the token that opens a thought, ``[E]``.
        qstar_end: embedding of the token that closes it, ``[E]``.
        qstar_mixing_head: weighs a thought.
        qstar_forbidden: ids of both tokens, ``[2]`` int64, which no distribution holds.
        qstar_replay: makes the calls of a thinking model's later tokens from its second one; None to call each, see
            :mod:`qstar.experimental.cuda_graph`.
    """

    qstar: QuietStarConfig
    qstar_start: nn.Parameter
    qstar_end: nn.Parameter
    qstar_mixing_head: MixingHead
    qstar_forbidden: Tensor
    qstar_replay: Callable[[Any], Callable[[], None]] | None = None
    accepts_loss_kwargs = False

    def embed(self, tokens: Tensor) -> Tensor:
        """Input embeddings of tokens ``[..., S]``, the thought tokens from their own parameters."""
        embedding = self.get_input_embeddings()
        states = embedding(tokens)
        scale = getattr(embedding, "embed_scale", 1.0)
        for token, vector in ((self.qstar.start_token_id, self.qstar_start), (self.qstar.end_token_id, self.qstar_end)):
            states = torch.where((tokens == token)[..., None], (vector * scale).to(states.dtype), states)
        return states

    def grid(self, positions: int, **changes: int) -> ThoughtGrid:
        """The thought grid over ``positions`` text tokens; ``changes`` to r, K or m by their names in the settings.

        Raises:
            ValueError: it reaches beyond the positions that the model knows.
        """
        mine = self.qstar
        sizes = dict(rationales=mine.rationales, thought_tokens=mine.thought_tokens, ahead_tokens=mine.ahead_tokens)
        grid = ThoughtGrid(positions, **(sizes | changes))
        self.check_length(positions, grid.rationale_length)
        return grid

    def check_length(self, positions: int, further: int) -> None:
        """Raise ValueError where text tokens and those of a thought reach beyond the positions that the model knows."""
        limit = getattr(self.config.get_text_config(decoder=True), "max_position_embeddings", None)
        if limit is not None and positions + further > limit:
            raise ValueError(
                f"{positions} text tokens and {further} tokens of a thought make more than the model's "
                f"max_position_embeddings = {limit}: shorten one of them"
            )

    def check_rotary_factors(self, positions: Tensor, further: int, onwards: Tensor | None = None) -> None:
        """Refuse a text whose thoughts would be read with other rotary factors than the text itself.

        LongRoPE takes its long factors as soon as a pass holds a position from a limit on. A text below the limit and
        its thoughts beyond it would meet each other's keys in different bases.

        Args:
            positions: of the text, ``[B, N]``; read on the host only where the model has such factors.
            further: positions that come after the last of the text.
            onwards: positions of the whole text, where it goes on after ``positions``.

        Raises:
            ValueError: the limit lies between the text's last position and that of its thoughts.
        """
        limit = long_rope_limit(self.config.get_text_config(decoder=True))
        if limit is None:
            return
        length = int(positions.max()) + 1
        if onwards is not None:
            further += max(int(onwards.max()) + 1 - length, 0)
        if length <= limit < length + further:
            raise ValueError(
                f"a text of {length} tokens and {further} more cross original_max_position_embeddings = {limit}, where "
                f"{type(self).__name__} changes its rotary factors: give it at most {limit - further} tokens, or more "
                f"than {limit}"
            )

    def read(self, tokens: Tensor, position_ids: Tensor, layout: layouts.Layout) -> Tensor:
        """Hidden states after the final norm, ``[B, S, E]``, of tokens ``[B, S]`` laid out as ``layout`` says."""
        implementation = self.config.get_text_config(decoder=True)._attn_implementation
        if implementation != attention.NAME:
            raise ValueError(
                f"the model's attention is {implementation!r}, but thoughts need {attention.NAME!r}: "
                f"model.set_attn_implementation({attention.NAME!r})"
            )
        # Without a mask, transformers would look for packed documents in the positions, and wait for the device.
        everything = torch.ones_like(tokens, dtype=torch.bool)
        with layouts.layout(layout):
            output = self.base_model(
                inputs_embeds=self.embed(tokens),
                attention_mask=everything,
                position_ids=position_ids,
                use_cache=False,
                **self._per_layer_inputs(tokens),
            )
        return output.last_hidden_state

    def _per_layer_inputs(self, tokens: Tensor) -> dict[str, Tensor]:
        """What every layer reads of the tokens beside their embeddings, in models that have such a thing."""
        if not getattr(self.config.get_text_config(decoder=True), "hidden_size_per_layer_input", None):
            return {}
        return dict(per_layer_inputs=self.get_decoder().get_per_layer_inputs(tokens))

    def mix(self, base: Tensor, after: Tensor, base_index: Tensor) -> tuple[Tensor, Tensor]:
        """Base states mixed with what thoughts lead to, ``u + w (g - u)`` (paper, section 4.4).

        Args:
            base: u, states of the text ``[Rb, E]``.
            after: g, states after a thought ``[R, E]``.
            base_index: the row of ``base`` that each row of ``after`` belongs to, ``[R]`` int64.

        Returns:
            Mixed states ``[R, E]`` and weights w ``[R]``, at least fp32.
        """
        return self.qstar_mixing_head(base, after, base_index, sigmoid=self.qstar.sigmoid)

    def language_head(self) -> LanguageHead:
        """The output head, its thought tokens forbidden."""
        config = self.config.get_text_config(decoder=True)
        head = self.get_output_embeddings()
        if isinstance(head, FSDPModule):
            head.unshard()  # FSDP gathers what the forward of a module needs, and this one is read without a forward
        scale = float(getattr(config, "logit_scale", None) or 1.0) / float(
            getattr(config, "logits_scaling", None) or 1.0
        )
        forbidden = self.qstar_forbidden.to(head.weight.device)
        softcap = getattr(config, "final_logit_softcapping", None)
        dtype = compute_dtype(head.weight) if head.weight.dtype == torch.float32 else head.weight.dtype
        return LanguageHead(head.weight, head.bias, scale, softcap, forbidden, dtype)

    def save_pretrained(  # type: ignore[override]  # the rest of the base's arguments pass through
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write the base model, its thought embeddings in the vocabulary's rows, and the mixing head beside it."""
        state = dict(self.state_dict() if state_dict is None else state_dict)
        mine = {name: state.pop(name) for name in list(state) if name.startswith(PREFIX)}
        embedding = embedding_rows(self)
        tied = {name for name, parameter in self.named_parameters(remove_duplicate=False) if parameter is embedding}
        with torch.no_grad():
            for name, tensor in state.items():
                if name in tied:
                    tensor[self.qstar.start_token_id] = mine["qstar_start"].to(tensor)
                    tensor[self.qstar.end_token_id] = mine["qstar_end"].to(tensor)
        if is_main_process:  # before the base model, which may push the folder to a hub
            folder = Path(save_directory)
            (folder / MIXING_HEAD_FILE).parent.mkdir(parents=True, exist_ok=True)
            head = "qstar_mixing_head."
            save_file(
                {name.removeprefix(head): mine[name].contiguous() for name in mine if name.startswith(head)},
                folder / MIXING_HEAD_FILE,
            )
            (folder / CONFIG_FILE).write_text(json.dumps(asdict(self.qstar), indent=2) + "\n")
        super().save_pretrained(save_directory, is_main_process, state, **kwargs)

    def load_thoughts(self, folder: str | Path) -> None:
        """Take the thought embeddings from the vocabulary's rows and the mixing head from ``folder``.

        Raises:
            FileNotFoundError: the folder holds no mixing head.
        """
        rows = embedding_rows(self)
        with torch.no_grad():
            self.qstar_start.copy_(rows[self.qstar.start_token_id])
            self.qstar_end.copy_(rows[self.qstar.end_token_id])
        path = Path(folder) / MIXING_HEAD_FILE
        if not path.is_file():
            raise FileNotFoundError(f"{folder} holds no {MIXING_HEAD_FILE}: the mixing head is missing")
        self.qstar_mixing_head.load_state_dict(load_file(path))


def embedding_rows(model: PreTrainedModel) -> Tensor:
    """The input embeddings of the vocabulary, ``[V, E]``."""
    return cast(Tensor, model.get_input_embeddings().weight)


def long_rope_limit(config: PreTrainedConfig) -> int | None:
    """The length up to which LongRoPE takes its short factors, None where a model has no such thing."""
    parameters = getattr(config, "rope_parameters", None) or {}
    kinds = [parameters, *(each for each in parameters.values() if isinstance(each, dict))]
    limits = [kind["original_max_position_embeddings"] for kind in kinds if kind.get("rope_type") == "longrope"]
    return min(limits, default=None)
