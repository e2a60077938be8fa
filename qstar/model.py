"""Any Hugging Face causal language model, with the parameters that let it think.

:func:`wrap` turns a live model into an instance of a class made at run time, ``(QuietStarMixin, LlamaForCausalLM)``.
The parameters of the base keep their names, the new ones are called ``qstar_*``; everything that worked with the
model goes on working. On disk the folder is an ordinary checkpoint of the base model, with the settings in
``qstar_config.json`` and the mixing head in ``qstar/mixing_head.safetensors`` beside it.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from qstar import attention
from qstar.compatibility import check_architecture, check_behaviour, disable_dropout
from qstar.grid import ThoughtGrid
from qstar_kernels import linear_log_prob, linear_log_prob_sum, mix_hidden, sample_linear

CONFIG_FILE = "qstar_config.json"
MIXING_HEAD_FILE = "qstar/mixing_head.safetensors"
PREFIX = "qstar_"


@dataclass
class QuietStarConfig:
    """What a model thinks like; saved beside it.

    Attributes:
        start_token_id: id of the token that opens a thought.
        end_token_id: id of the token that closes it.
        thought_tokens: K, sampled tokens in a thought.
        ahead_tokens: m, text tokens that a thought is scored on.
        rationales: r, thoughts at each position in training.
        sigmoid: hold the mixing weight in 0..1; unbounded by default, as in the authors' code.
    """

    start_token_id: int
    end_token_id: int
    thought_tokens: int = 8
    ahead_tokens: int = 4
    rationales: int = 2
    sigmoid: bool = False

    def __post_init__(self) -> None:
        for name in ("thought_tokens", "ahead_tokens", "rationales"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}, but it must be an integer of at least 1")

    @classmethod
    def load(cls, folder: str | Path) -> QuietStarConfig:
        """Read ``qstar_config.json`` of ``folder``."""
        path = Path(folder) / CONFIG_FILE
        if not path.is_file():
            raise FileNotFoundError(f"{folder} holds no {CONFIG_FILE}: it is not the folder of a Quiet-STaR model")
        values = json.loads(path.read_text())
        unknown = set(values) - {field.name for field in fields(cls)}
        if unknown:
            raise ValueError(f"{path} holds unknown settings: {', '.join(sorted(unknown))}")
        return cls(**values)


class MixingHead(nn.Module):
    """The weight of a thought: an MLP on [base state; post-thought state], 2E -> E -> E -> 1 (paper, section 4.4).

    The last layer starts at zero, so that an untrained head leaves the base model's predictions as they are.
    """

    def __init__(self, width: int, **factory):
        super().__init__()
        self.input = nn.Linear(2 * width, width, **factory)
        self.hidden = nn.Linear(width, width, **factory)
        self.output = nn.Linear(width, 1, bias=False, **factory)
        nn.init.zeros_(self.output.weight)

    def features(self, base: Tensor, thought: Tensor, base_index: Tensor) -> Tensor:
        """What the last layer reads, ``[R, E]``, from base ``[Rb, E]``, thought ``[R, E]`` and base_index ``[R]``.

        The first layer is linear in both states: its part on the base is computed once per text position.
        """
        width = base.shape[-1]
        from_base = F.linear(base, self.input.weight[:, :width], self.input.bias)
        from_thought = F.linear(thought, self.input.weight[:, width:])
        return F.relu(self.hidden(F.relu(from_base.index_select(0, base_index) + from_thought)))

    def forward(
        self, base: Tensor, thought: Tensor, base_index: Tensor, sigmoid: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Mixed states ``[R, E]`` and weights ``[R]``, at least fp32, see :func:`qstar_kernels.mix_hidden`.

        A young head's weight is far below what 16 bits resolve beside 1: mixed in them, rewards would be noise.
        """
        features = self.features(base, thought, base_index)
        dtype = torch.promote_types(base.dtype, torch.float32)
        weight = self.output.weight[0].to(features.dtype)
        return mix_hidden(base.to(dtype), thought.to(dtype), features, weight, base_index=base_index, sigmoid=sigmoid)


@dataclass(frozen=True)
class LanguageHead:
    """The output head as the ops take it: ``z = softcap(logit_scale * (h W^T + bias))``, thought tokens forbidden.

    ``dtype`` is that of a GPU's products. Float32 states are scored exactly all the same, at the price of a product
    more; ``states.to(head.dtype)`` saves it where differences between rows do not matter.
    """

    weight: Tensor
    bias: Tensor | None
    logit_scale: float
    softcap: float | None
    forbidden: Tensor
    dtype: torch.dtype

    @property
    def _options(self) -> dict:
        return dict(bias=self.bias, logit_scale=self.logit_scale, softcap=self.softcap, forbidden=self.forbidden)

    def _operand(self, hidden: Tensor) -> Tensor:
        return hidden.to(torch.promote_types(hidden.dtype, self.dtype))

    @functools.cached_property
    def _drawing_weight(self) -> Tensor:
        """The weight in the dtype that products take it in, made once for many draws; a CPU's are never of 16 bits."""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        return self.weight.detach().to(self.dtype if self.weight.is_cuda else wide)

    def log_prob(self, hidden: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
        """Log-probabilities ``[R]`` (fp32) of targets ``[R]`` at hidden ``[R, E]``; 0 for ignored targets."""
        options = self._options | dict(temperature=temperature, product_dtype=self.dtype)
        return linear_log_prob(self._operand(hidden), self.weight, targets, **options)

    def log_prob_sum(
        self, hidden: Tensor, targets: Tensor, row_weight: Tensor, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """The differentiable sum of ``row_weight`` ``[R]`` times log-probability, and the log-probabilities ``[R]``."""
        hidden = self._operand(hidden)
        row_weight = row_weight.to(torch.promote_types(hidden.dtype, torch.float32))
        options = self._options | dict(temperature=temperature, product_dtype=self.dtype)
        return linear_log_prob_sum(hidden, self.weight, targets, row_weight, **options)

    def sample(self, hidden: Tensor, *, seed: int, step: int | Tensor, row_offset: int, temperature: float) -> Tensor:
        """Tokens ``[R]`` drawn at ``temperature``, the most probable ones at 0."""
        options = self._options | dict(seed=seed, step=step, row_offset=row_offset, temperature=temperature)
        tokens, _ = sample_linear(hidden.to(self.dtype), self._drawing_weight, **options)
        return tokens


class QuietStarMixin:
    """What a decoder needs to think: thought embeddings, the mixing head, and ways to read a thought grid."""

    qstar: QuietStarConfig
    qstar_start: nn.Parameter
    qstar_end: nn.Parameter
    qstar_mixing_head: MixingHead
    qstar_forbidden: Tensor
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
        limit = getattr(self.config.get_text_config(decoder=True), "max_position_embeddings", None)
        if limit is not None and positions + grid.rationale_length > limit:
            raise ValueError(
                f"{positions} text tokens and {grid.rationale_length} tokens of a thought make more than the model's "
                f"max_position_embeddings = {limit}: shorten one of them"
            )
        return grid

    def read(
        self,
        tokens: Tensor,
        position_ids: Tensor,
        layout: attention.Layout,
        cache: attention.ThoughtCache | None = None,
    ) -> Tensor:
        """Hidden states after the final norm, ``[B, S, E]``, of tokens ``[B, S]`` laid out as ``layout`` says."""
        with attention.layout(layout):
            output = self.base_model(
                inputs_embeds=self.embed(tokens),
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=cache is not None,
            )
        return output.last_hidden_state

    def language_head(self) -> LanguageHead:
        """The output head, its thought tokens forbidden."""
        config = self.config.get_text_config(decoder=True)
        head = self.get_output_embeddings()
        scale = float(getattr(config, "logit_scale", None) or 1.0) / float(
            getattr(config, "logits_scaling", None) or 1.0
        )
        forbidden = self.qstar_forbidden.to(head.weight.device)
        softcap = getattr(config, "final_logit_softcapping", None)
        dtype = attention.compute_dtype(head.weight) if head.weight.dtype == torch.float32 else head.weight.dtype
        return LanguageHead(head.weight, head.bias, scale, softcap, forbidden, dtype)

    def save_pretrained(self, save_directory, *args, state_dict: dict[str, Tensor] | None = None, **kwargs):
        """Write the base model, its thought embeddings in the vocabulary's rows, and the mixing head beside it."""
        state = dict(self.state_dict() if state_dict is None else state_dict)
        mine = {name: state.pop(name) for name in list(state) if name.startswith(PREFIX)}
        embedding = self.get_input_embeddings().weight
        with torch.no_grad():
            for name, tensor in state.items():
                if tensor.shape == embedding.shape and self.get_parameter(name) is embedding:
                    tensor[self.qstar.start_token_id] = mine["qstar_start"].to(tensor)
                    tensor[self.qstar.end_token_id] = mine["qstar_end"].to(tensor)
        if kwargs.get("is_main_process", True):  # before the base model, which may push the folder to a hub
            folder = Path(save_directory)
            (folder / MIXING_HEAD_FILE).parent.mkdir(parents=True, exist_ok=True)
            head = "qstar_mixing_head."
            save_file(
                {name.removeprefix(head): mine[name].contiguous() for name in mine if name.startswith(head)},
                folder / MIXING_HEAD_FILE,
            )
            (folder / CONFIG_FILE).write_text(json.dumps(asdict(self.qstar), indent=2) + "\n")
        super().save_pretrained(save_directory, *args, state_dict=state, **kwargs)

    def load_thoughts(self, folder: str | Path) -> None:
        """Take the thought embeddings from the vocabulary's rows and the mixing head from ``folder``."""
        rows = self.get_input_embeddings().weight
        with torch.no_grad():
            self.qstar_start.copy_(rows[self.qstar.start_token_id])
            self.qstar_end.copy_(rows[self.qstar.end_token_id])
        path = Path(folder) / MIXING_HEAD_FILE
        if not path.is_file():
            raise FileNotFoundError(f"{folder} holds no {MIXING_HEAD_FILE}: the mixing head is missing")
        self.qstar_mixing_head.load_state_dict(load_file(path))


@functools.cache
def quiet_star_class(base: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The subclass of ``base`` that thinks. It keeps the name of ``base``, which is what a checkpoint must say."""
    namespace = {"__module__": base.__module__, "forward": _forward_with_objective(base.forward)}
    return type(base.__name__, (QuietStarMixin, base), namespace)


def _forward_with_objective(base_forward: Callable) -> Callable:
    """``base_forward``, which hands its batch to ``objective`` where one is given.

    Training must run inside ``forward``: that is what DDP and FSDP wrap. The signature stays that of the base.
    """

    @functools.wraps(base_forward)
    def forward(self, *args, objective: Callable | None = None, **kwargs):
        if objective is None:
            return base_forward(self, *args, **kwargs)
        return objective(self, *args, **kwargs)

    return forward


def wrap(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    thought_tokens: int = 8,
    ahead_tokens: int = 4,
    rationales: int = 2,
    start_token: str = "<|startthought|>",
    end_token: str = "<|endthought|>",
    start_init: str | None = "---",
    end_init: str | None = "---",
    sigmoid: bool = False,
    check: bool = True,
) -> PreTrainedModel:
    """Teach ``model`` the tokens and give it the parameters that let it think; in place.

    Args:
        model: a decoder of transformers whose attention can be exchanged.
        tokenizer: its tokenizer; start and end tokens are added to it where it lacks them.
        thought_tokens: K, sampled tokens in a thought.
        ahead_tokens: m, text tokens that a thought is scored on.
        rationales: r, thoughts at each position in training.
        start_token: the token that opens a thought.
        end_token: the token that closes it.
        start_init: text whose embedding (the mean, where it is several tokens) the start token begins with; None for
            the mean of the vocabulary.
        end_init: the same for the end token.
        sigmoid: hold the mixing weight in 0..1.
        check: compare a tiny packed pass with the model's own before anything is trained.

    Returns:
        ``model`` itself, now of a subclass of its class.

    Raises:
        ValueError: the model cannot think (its attention cannot be exchanged, it has linear-attention layers, or the
            check found other results than the model's own), or an argument is wrong. A model that fails the check is
            given back as it was, but for two new rows of its vocabulary and dropout, which stays off.
    """
    if isinstance(model, QuietStarMixin):
        raise ValueError("model is already a Quiet-STaR model")
    if start_token == end_token:
        raise ValueError(f"end_token is {end_token!r}, but it must differ from start_token")
    QuietStarConfig(0, 1, thought_tokens, ahead_tokens, rationales, sigmoid)  # before anything is changed
    check_architecture(model)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [start_token, end_token]}, replace_extra_special_tokens=False
    )
    start, end = tokenizer.convert_tokens_to_ids([start_token, end_token])
    if max(start, end) >= model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    plain_class, plain_attention = type(model), model.config._attn_implementation
    attach(model, QuietStarConfig(start, end, thought_tokens, ahead_tokens, rationales, sigmoid))
    rows = model.get_input_embeddings().weight
    with torch.no_grad():
        for token, parameter, text in ((start, model.qstar_start, start_init), (end, model.qstar_end, end_init)):
            parameter.copy_(_initial_embedding(rows, tokenizer, text))
            rows[token] = parameter
    if check:
        try:
            check_behaviour(model)
        except ValueError:
            _detach(model, plain_class, plain_attention)
            raise
    if model.generation_config is not None:
        suppressed = set(model.generation_config.suppress_tokens or ()) | {start, end}
        model.generation_config.suppress_tokens = sorted(suppressed)
    return model


def load(folder: str | Path, **kwargs) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and the tokenizer that were saved in ``folder``.

    Args:
        folder: what :func:`qstar.train` wrote, or ``save_pretrained`` of model and tokenizer.
        kwargs: passed on to ``AutoModelForCausalLM.from_pretrained``.

    Raises:
        FileNotFoundError: the folder lacks the settings or the mixing head.
    """
    config = QuietStarConfig.load(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, **kwargs)
    check_architecture(model)
    attach(model, config)
    model.load_thoughts(folder)
    return model, AutoTokenizer.from_pretrained(folder)


def attach(model: PreTrainedModel, config: QuietStarConfig) -> None:
    """Make ``model`` one that thinks, with thought embeddings that are not yet set."""
    rows = model.get_input_embeddings().weight
    factory = dict(device=rows.device, dtype=rows.dtype)
    model.__class__ = quiet_star_class(type(model))
    model.qstar = config
    model.qstar_start = nn.Parameter(torch.empty(rows.shape[1], **factory))
    model.qstar_end = nn.Parameter(torch.empty(rows.shape[1], **factory))
    model.qstar_mixing_head = MixingHead(rows.shape[1], **factory)
    # A tensor that stays, since a new one would be copied to the device and checked there for every head and token.
    forbidden = torch.tensor([config.start_token_id, config.end_token_id], device=rows.device)
    model.register_buffer("qstar_forbidden", forbidden, persistent=False)
    model.set_attn_implementation(attention.NAME)
    disable_dropout(model)


def _detach(model: PreTrainedModel, plain_class: type[PreTrainedModel], plain_attention: str) -> None:
    for name in ("qstar", "qstar_start", "qstar_end", "qstar_mixing_head", "qstar_forbidden"):
        delattr(model, name)
    model.__class__ = plain_class
    model.set_attn_implementation(plain_attention)


def _initial_embedding(rows: Tensor, tokenizer: PreTrainedTokenizerBase, text: str | None) -> Tensor:
    if text is None:
        return rows.mean(0)
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not tokens or tokenizer.unk_token_id in tokens:
        return rows.mean(0)
    return rows[tokens].mean(0)
