"""Any Hugging Face causal language model, with the parameters that let it think.

A model that thinks is an instance of a class made at run time, see :mod:`qstar.classes`. The parameters
of the base keep their names, the new ones are called ``qstar_*``; everything that worked with the model goes on
working. On disk the folder is an ordinary checkpoint of the base model, with the settings in ``qstar_config.json`` and
the mixing head in ``qstar/mixing_head.safetensors`` beside it; where the model has adapters, they stand in the place of
the base, which is named in their settings, and the thought embeddings in ``qstar/thought_embeddings.safetensors``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedConfig, PreTrainedModel

from qstar import adapters, attention, layouts
from qstar.autocast import compute_dtype
from qstar.config import CONFIG_FILE, QuietStarConfig
from qstar.grid import ThoughtGrid
from qstar.heads import LanguageHead, MixingHead, ThoughtAlone
from qstar_kernels import faster_linear

if TYPE_CHECKING:
    from peft import LoraConfig

    class _Decoder(PreTrainedModel):
        generate: Any
        init_continuous_batching: Any
        add_adapter: Any
        _prepare_cache_for_generation: Any
        _get_logits_processor: Any

else:
    _Decoder = object  # at run time the decoder is the last base of each class, see qstar.classes

MIXING_HEAD_FILE = "qstar/mixing_head.safetensors"
EMBEDDINGS_FILE = "qstar/thought_embeddings.safetensors"
BASE_VOCABULARY = "base_vocabulary"  # how many rows it has, among the metadata of that file
PREFIX = "qstar_"


class QuietStarModel(_Decoder):
    """What a decoder needs to think: thought embeddings, the mixing head, and ways to read a thought grid.

    Attributes:
        qstar: the settings.
        qstar_start: embedding of the token that opens a thought, ``[E]``.
        qstar_end: embedding of the token that closes it, ``[E]``.
        qstar_mixing_head: weighs a thought; without parameters where the settings say that there is none.
        qstar_forbidden: ids of both tokens, ``[2]`` int64, which no distribution holds.
        qstar_base_vocabulary: rows of the vocabulary that the base came with; tokens were added behind them.
        qstar_replay: makes the calls of a thinking model's later tokens from its second one; None to call each, see
            :mod:`qstar.experimental.cuda_graph`.
    """

    qstar: QuietStarConfig
    qstar_start: nn.Parameter
    qstar_end: nn.Parameter
    qstar_mixing_head: MixingHead | ThoughtAlone
    qstar_forbidden: Tensor
    qstar_base_vocabulary: int
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
        sizes: dict[str, Any] = {name: getattr(mine, name) for name in ("rationales", "thought_tokens", "ahead_tokens")}
        grid = ThoughtGrid(positions, **(sizes | changes))
        self.check_length(positions, grid.rationale_length)
        return grid

    def check_length(self, positions: int, further: int) -> None:
        """Raise ValueError where text tokens and those of a thought reach beyond the positions that the model knows."""
        check_positions(self, positions, further)

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
        states = self.embed(tokens)
        with layouts.layout(layout), faster_linear(states):
            output = self.base_model(
                inputs_embeds=states,
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
        compute = self.get_decoder().get_per_layer_inputs
        # Gemma 4 can do without tokens where it has the states, and under transformers 5.17 asks for both.
        states: dict[str, None] = {"inputs_embeds": None} if "inputs_embeds" in signature(compute).parameters else {}
        return dict(per_layer_inputs=compute(tokens, **states))

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

    def next_of_thoughts(self, head: LanguageHead, hidden: Tensor, **sampling: Any) -> Tensor:
        """The tokens ``[R]`` int64 that thoughts go on with at states ``[R, E]``: pauses, or what ``head`` samples."""
        if self.qstar.pauses:
            return self.qstar_forbidden[:1].to(hidden.device).expand(len(hidden))  # the token that opens a thought
        return head.sample(hidden, **sampling)

    def add_adapter(self, adapter_config: LoraConfig, adapter_name: str | None = None) -> None:
        """Put adapters into the decoder; they, the mixing head and the thought embeddings learn, and nothing else.

        Args:
            adapter_config: of peft. It is for all linear layers of the decoder's layers where it names none.
            adapter_name: ``"default"`` by default.

        Raises:
            TypeError, ValueError: the config is none for a model that thinks, or it has adapters already; see
                :func:`qstar.adapters.resolved`.
        """
        if adapters.has_adapters(self):
            raise ValueError(
                "the model has adapters already, which go on learning: leave lora out, or merge them first"
            )
        super().add_adapter(adapters.resolved(self, adapter_config), adapter_name)
        self._thaw()

    def adopt_adapters(self) -> None:
        """Let adapters learn that came into the model from outside, if there are any.

        Raises:
            ValueError: it cannot learn to think with them, or not be saved; see
                :func:`qstar.adapters.check_adapters`.
        """
        if adapters.has_adapters(self):
            adapters.check_adapters(self)
            adapters.adopt(self)
            self._thaw()

    def _thaw(self) -> None:
        """Let the adapters, the mixing head and the thought embeddings learn: peft freezes all that is not its own."""
        for name, parameter in self.named_parameters():
            if name.startswith(PREFIX) or ".lora_" in name:
                parameter.requires_grad_(True)

    def save_pretrained(  # type: ignore[override]  # the rest of the base's arguments pass through
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write the base model, its thought embeddings in the vocabulary's rows, and the mixing head beside it.

        With adapters, they and the thought embeddings are written in the place of the base.

        Raises:
            ValueError: the folder is one of adapters and the model has none, or the other way round; with adapters
                also: an argument for the base's files, or the base has no name.
        """
        folder = Path(save_directory)
        if adapters.has_adapters(self) and kwargs:
            raise ValueError(f"{', '.join(kwargs)} given, but a folder of adapters holds no files of the base")
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
            adapters.check_folder(self, folder)
            (folder / MIXING_HEAD_FILE).parent.mkdir(parents=True, exist_ok=True)
            head = "qstar_mixing_head."
            weights = {name.removeprefix(head): mine[name].contiguous() for name in mine if name.startswith(head)}
            if self.qstar.mixing_head:
                save_file(weights, folder / MIXING_HEAD_FILE)
            (folder / CONFIG_FILE).write_text(json.dumps(asdict(self.qstar), indent=2) + "\n")
        if not adapters.has_adapters(self):
            super().save_pretrained(save_directory, is_main_process, state, **kwargs)
        elif is_main_process:
            embeddings = self._embeddings(mine["qstar_start"], mine["qstar_end"])
            save_file(embeddings, folder / EMBEDDINGS_FILE, {BASE_VOCABULARY: str(self.qstar_base_vocabulary)})
            adapters.save_adapters(self, folder, state)
            if self.generation_config is not None:
                self.generation_config.save_pretrained(folder)

    def _embeddings(self, start: Tensor, end: Tensor) -> dict[str, Tensor]:
        """What a folder of adapters holds of the vocabulary: the thought embeddings, and rows that the base lacks."""
        added = {name: rows[self.qstar_base_vocabulary :].clone() for name, rows in vocabulary(self).items()}
        return {"start": start, "end": end} | {name: rows for name, rows in added.items() if len(rows)}

    def load_thoughts(self, folder: str | Path) -> None:
        """Take the mixing head, if any, from ``folder``, and the thought embeddings from the vocabulary's rows.

        With adapters, the thought embeddings and the rows that the base lacks are taken from the folder.

        Raises:
            FileNotFoundError: the folder holds no mixing head, or no thought embeddings of a model with adapters.
            ValueError: the base has another vocabulary than the one whose thought embeddings these are.
        """
        rows = embedding_rows(self)
        start, end = self.qstar.start_token_id, self.qstar.end_token_id
        with torch.no_grad():
            if adapters.has_adapters(self):
                stored = load_file(existing(folder, EMBEDDINGS_FILE, "the thought embeddings are"))
                for name, table in vocabulary(self).items():
                    added = table[self.qstar_base_vocabulary :]
                    found = stored.get(name, added[:0])
                    if found.shape != added.shape:
                        raise ValueError(
                            f"{folder} holds {len(found)} rows behind the base's vocabulary, but the model has "
                            f"{len(added)}: its base is another"
                        )
                    added.copy_(found)
                rows[start], rows[end] = stored["start"].to(rows), stored["end"].to(rows)
            self.qstar_start.copy_(rows[start])
            self.qstar_end.copy_(rows[end])
        if self.qstar.mixing_head:
            self.qstar_mixing_head.load_state_dict(load_file(existing(folder, MIXING_HEAD_FILE, "the mixing head is")))


def existing(folder: str | Path, name: str, what: str) -> Path:
    """The file ``name`` in ``folder``; raises FileNotFoundError where there is none."""
    path = Path(folder) / name
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no {name}: {what} missing")
    return path


def known_positions(model: PreTrainedModel) -> int | None:
    """How many positions a model knows; None where it has no limit."""
    return getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)


def check_positions(model: PreTrainedModel, positions: int, further: int) -> None:
    """As :meth:`QuietStarModel.check_length`, for any model."""
    limit = known_positions(model)
    if limit is not None and positions + further > limit:
        raise ValueError(
            f"{positions} text tokens and {further} tokens of a thought make more than the model's "
            f"max_position_embeddings = {limit}: shorten one of them"
        )


def vocabulary(model: PreTrainedModel) -> dict[str, Tensor]:
    """Every tensor with a row for each word, tied ones once: ``input`` ``[V, E]``, ``output`` and ``output_bias``."""
    head = model.get_output_embeddings()
    tables = {"input": embedding_rows(model), "output": head.weight, "output_bias": getattr(head, "bias", None)}
    if head.weight is tables["input"]:
        del tables["output"]
    return {name: cast(Tensor, table) for name, table in tables.items() if table is not None}


def embedding_rows(model: PreTrainedModel) -> Tensor:
    """The input embeddings of the vocabulary, ``[V, E]``."""
    return cast(Tensor, model.get_input_embeddings().weight)


def vocabulary_size(model: PreTrainedModel) -> int:
    """V, the rows of :func:`embedding_rows`, also where DeepSpeed's ZeRO-3 has them in parts."""
    rows = embedding_rows(model)
    return int(getattr(rows, "ds_shape", rows.shape)[0])


def long_rope_limit(config: PreTrainedConfig) -> int | None:
    """The length up to which LongRoPE takes its short factors, None where a model has no such thing."""
    parameters = getattr(config, "rope_parameters", None) or {}
    kinds = [parameters, *(each for each in parameters.values() if isinstance(each, dict))]
    limits = [kind["original_max_position_embeddings"] for kind in kinds if kind.get("rope_type") == "longrope"]
    return min(limits, default=None)
