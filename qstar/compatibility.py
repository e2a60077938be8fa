"""Which models can think: a refusal with a reason, before anything is trained."""

from __future__ import annotations

import contextlib
import copy
import logging
import re
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from qstar.grid import Text, ThoughtGrid
from qstar.layouts import Packed
from qstar.model import QuietStarModel, embedding_rows
from qstar.quantized import check_states
from qstar.talking import read_grid
from qstar.thinking import advance, evaluating, read_text

logger = logging.getLogger(__name__)

HALF = (torch.bfloat16, torch.float16)
LAYERS, MOST_PARAMETERS = 4, 2**28  # of a small copy
MOST = {"vocab_size": 64, "token_(id|index)$": 0, "intermediate_size$|ffn_dim$": 256}
EXACT = 1e-4  # relative error of a small copy; float32 leaves 1e-5 where layers are wide
MOST_WORDS = 1000  # of a vocabulary that the check draws from and scores


def check_architecture(model: PreTrainedModel) -> None:
    """Raise ValueError where the architecture of ``model`` cannot carry thoughts."""
    name = type(model).__name__
    check_kind(model)
    check_states(model.config)
    if any(isinstance(each, DTensor) or hasattr(each, "ds_id") for each in model.parameters()):
        raise ValueError(
            f"{name} has its weights divided among processes, but it must be whole: FSDP and ZeRO-3 divide it when "
            "training begins, and tp_plan and distributed_config must be left out"
        )
    config = model.config.get_text_config(decoder=True)
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"{name} is an encoder-decoder, but only decoders can think")
    if not type(model)._can_set_attn_implementation():
        raise ValueError(
            f"{name} does not take its attention from transformers' AttentionInterface, where thought attention is"
        )
    try:
        layers = DynamicCache(config=config).layers
    except AttributeError as error:
        raise ValueError(f"{name} has no layers that transformers' cache knows: {error}") from error
    if any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers):
        raise ValueError(f"{name} has linear-attention or state-space layers: they mix thoughts into the text")
    if getattr(config, "attention_chunk_size", None) or "chunked_attention" in (
        getattr(config, "layer_types", None) or ()
    ):
        raise ValueError(f"{name} has chunked attention layers, which thought attention does not know")
    if getattr(config, "output_router_logits", False):
        logger.warning(
            "output_router_logits is True, but the auxiliary loss that balances the experts of %s is left out in "
            "training: router_aux_loss_coef has no effect",
            name,
        )
    for path, module in model.named_modules():
        if re.search("indexer|compressor", type(module).__name__, re.IGNORECASE):
            raise ValueError(
                f"{name} chooses or compresses the keys that a token attends to ({path} is a {type(module).__name__}), "
                "which thought attention does not know"
            )
    for what, module in (
        ("input embedding", model.get_input_embeddings()),
        ("language-model head", model.get_output_embeddings()),
    ):
        if module is None:
            raise ValueError(f"{name} has no {what}")
        if not isinstance(getattr(module, "weight", None), Tensor):
            raise ValueError(f"{name} has no single {what}, but a {type(module).__name__}")


def check_kind(model: Any) -> None:
    """Raise TypeError unless ``model`` is one of transformers."""
    if isinstance(model, PreTrainedModel):
        return
    name = type(model).__name__
    if hasattr(model, "get_base_model"):
        raise TypeError(
            f"model must be a transformers model, but it is a {name} around one: give the one inside, "
            "model.get_base_model(), which has its adapters in it"
        )
    raise TypeError(f"model must be a transformers model, but it is {name}")


def disable_dropout(model: PreTrainedModel) -> None:
    """Set every dropout and jitter of ``model`` to 0: thoughts must be scored by the model that sampled them."""
    found = noise_of(model)
    for module, name, _ in found:
        setattr(module, name, 0.0)
    if found:
        logger.warning("noise is set to 0, so that the model that samples a thought scores it: %s", _named(found))


def noise_of(model: nn.Module) -> list[tuple[nn.Module, str, float]]:
    """Every dropout and jitter that is not 0: the module, the name of its attribute and the value."""
    return [
        (module, name, value)
        for module in model.modules()
        for name, value in vars(module).items()
        if (name == "p" if isinstance(module, nn.Dropout) else re.search("drop|jitter", name))
        and isinstance(value, float)
        and value
    ]


def _named(noise: list[tuple[nn.Module, str, float]]) -> str:
    return ", ".join(sorted({f"{type(module).__name__}.{name} = {value}" for module, name, value in noise}))


@dataclass(frozen=True)
class PlainPasses:
    """What a model says of a tiny text, before anything of ours is in it: from ``input_ids``, by its eager attention.

    Attributes:
        tokens: a text, ``[1, N]``.
        thoughts: thoughts about it, ``[1, N, r, K]``.
        rows: the tokens of every thought, with those before and behind it, ``[N, r, T]``.
        text: last hidden states of the text, ``[N, E]``.
        rationales: those of ``rows``, each after its text in a pass of its own, ``[N, r, T, E]``.
        logits: of the text, ``[N, V]``.
    """

    tokens: Tensor
    thoughts: Tensor
    rows: Tensor
    text: Tensor
    rationales: Tensor
    logits: Tensor


TINY = ThoughtGrid(positions=3, rationales=2, thought_tokens=2, ahead_tokens=2)


@torch.no_grad()
def plain_passes(model: PreTrainedModel, start: int, end: int) -> PlainPasses:
    """Read a tiny text and thoughts about it, one plain pass each; ``start`` and ``end`` are the thought tokens.

    Raises:
        ValueError: the model reads no text of ``input_ids`` alone, has no decoder that returns last hidden states, or
            takes noise in ``eval()`` as well.
    """
    config, device = model.config.get_text_config(decoder=True), embedding_rows(model).device
    special = {start, end, *_token_ids(model.config), *_token_ids(config)}
    words = torch.tensor([word for word in range(min(config.vocab_size, MOST_WORDS)) if word not in special])
    generator = torch.Generator().manual_seed(0)
    tokens = words[torch.randint(len(words), (1, TINY.positions), generator=generator)].to(device)
    shape = (1, TINY.positions, TINY.rationales, TINY.thought_tokens)
    thoughts = words[torch.randint(len(words), shape, generator=generator)].to(device)
    rows = TINY.tokens(tokens, thoughts, start, end).view(TINY.positions, TINY.slots)[:, 1:]
    rows = rows.reshape(TINY.positions, TINY.rationales, TINY.rationale_length)
    alone = [torch.cat([tokens[:, : i + 1].expand(TINY.rationales, -1), rows[i]], 1) for i in range(TINY.positions)]
    with evaluating(model):
        try:
            text = _last_hidden(model, tokens)[0]
            rationales = [_last_hidden(model, each)[:, -TINY.rationale_length :] for each in alone]
            logits = model(input_ids=tokens, use_cache=False).logits[0]
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError) as error:
            raise ValueError(
                f"{type(model).__name__} cannot read a text of input_ids alone: {type(error).__name__} ({error})"
            ) from error
        _check_noise(model, tokens, text)
    return PlainPasses(tokens, thoughts, rows, text, torch.stack(rationales), logits)


def _check_noise(model: PreTrainedModel, tokens: Tensor, text: Tensor) -> None:
    """Raise ValueError where a noise counts in eval() too: without it the model would be another."""
    noise = noise_of(model)
    if not noise:
        return
    try:
        for module, name, _ in noise:
            setattr(module, name, 0.5)
        changed = _last_hidden(model, tokens)[0]
    finally:
        for module, name, value in noise:
            setattr(module, name, value)
    if not _error(model, changed, text) <= _allowed(model):
        raise ValueError(
            f"{type(model).__name__} takes noise in eval() as well ({_named(noise)}), and would be another model "
            "without it: set it to 0 where that is meant"
        )


def _allowed(model: PreTrainedModel) -> float:
    return 0.1 if model.dtype in HALF else 1e-3


def _last_hidden(model: PreTrainedModel, tokens: Tensor, **options: Any) -> Tensor:
    output = model.base_model(input_ids=tokens, use_cache=False, **options)
    if getattr(output, "last_hidden_state", None) is None:
        raise ValueError(
            f"{type(model).__name__} has no decoder of its own: its {type(model.base_model).__name__} returns "
            f"{type(output).__name__}, where last hidden states are needed"
        )
    return cast(Tensor, output.last_hidden_state)


def _token_ids(config: PreTrainedConfig) -> list[int]:
    """Ids that stand for something else than a word, an image for one."""
    return [
        value for name, value in vars(config).items() if re.search("token_(id|index)$", name) and isinstance(value, int)
    ]


def small_copy(model: PreTrainedModel) -> PreTrainedModel | None:
    """A float32 copy of the class and settings of ``model`` on the CPU: few layers, few words, random weights.

    Its weights hide nothing: no gate is 0 and no norm 1, as they may be in ``model``. Its layers are as wide as those
    of the model. None where it would have over 2^28 parameters (1 GB), or where the class makes no model of such a
    config; then ``model`` itself is all that can be checked.
    """
    for layers in (LAYERS, 2, 1):
        config = copy.deepcopy(model.config)
        with contextlib.suppress(Exception), torch.random.fork_rng(devices=[]), torch.device("cpu"):
            for part in {id(x): x for x in (config, *_parts(config))}.values():
                _shrink(part, layers)
            with torch.device("meta"):
                size = sum(x.numel() for x in type(model)(config).parameters())
            if size <= MOST_PARAMETERS:
                return _made_wild(type(model)(config).float().eval())
    logger.info("%s is checked with its own weights alone: no small copy of it can be made", type(model).__name__)
    return None


def _parts(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    return [part for name in config.sub_configs if isinstance(part := getattr(config, name, None), PreTrainedConfig)]


def _shrink(config: PreTrainedConfig, layers: int) -> None:
    """Leave one layer of each kind, ``layers`` at least where there are so many, and few words."""
    depth = getattr(config, "num_hidden_layers", None)
    if isinstance(depth, int):
        lists = {name: value for name, value in vars(config).items() if _is_list(value, depth)}
        kinds = list(zip(*(map(str, value) for value in lists.values()), strict=True)) or [()] * depth
        first = sorted({kind: index for index, kind in reversed(list(enumerate(kinds)))}.values())
        kept = sorted({*first, *range(min(depth, layers))})
        for name, value in lists.items():
            setattr(config, name, [value[index] for index in kept])
        config.num_hidden_layers = len(kept)
    for name, value in list(vars(config).items()):
        for pattern, most in MOST.items():
            if re.search(pattern, name) and type(value) is int and value > most:
                setattr(config, name, most)
    config._attn_implementation = "eager"  # which leaves out nothing that a class asks for, as sdpa does a soft-cap


def _is_list(value: Any, length: int) -> bool:
    return isinstance(value, list) and len(value) == length


def _made_wild(model: PreTrainedModel) -> PreTrainedModel:
    """``model`` with weights that all count, and without noise."""
    for module, name, _ in noise_of(model):
        setattr(module, name, 0.0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else parameter + 0.3 * noise)
    return model


@torch.no_grad()
def check_behaviour(model: QuietStarModel, plain: PlainPasses | None = None, allowed: float | None = None) -> None:
    """Compare tiny passes over a thought grid with the model's own plain passes.

    Args:
        model: the model.
        plain: from before it was wrapped; by default from the wrapped model itself, whose rows of the thought tokens in
            the vocabulary are set for it, as ``save_pretrained`` sets them.
        allowed: relative error, by default 1e-3; in 16 bits 0.1 for half of the tokens, where the choice of experts
            flips with the last bit.

    Raises:
        ValueError: the output head, the packed pass or the step-by-step pass gives other results, or a pass in
            training does, or the model gave other results before it was wrapped.
    """
    start, end = model.qstar.start_token_id, model.qstar.end_token_id
    if plain is None:
        rows = embedding_rows(model)
        rows[start], rows[end] = model.qstar_start.to(rows.dtype), model.qstar_end.to(rows.dtype)
        plain = plain_passes(model, start, end)
    text = Text.from_inputs(plain.tokens)

    def compare(what: str, ours: Tensor, theirs: Tensor) -> None:
        """Raise unless two results agree, token by token."""
        error = _error(model, ours.flatten(0, -2), theirs.flatten(0, -2))
        limit = allowed or _allowed(model)
        if not error <= limit:
            raise ValueError(
                f"the {what} of {type(model).__name__} differs from the model's own by {error:.1e}, where {limit:.0e} "
                f"is allowed: {_reason(model, plain, what)}"
            )

    with evaluating(model):
        compare("plain pass", _last_hidden(model, plain.tokens)[0], plain.text)
        try:
            reading = read_text(model, text, TINY)
        except (AttributeError, TypeError) as error:
            if Packed.__name__ not in str(error):
                raise
            raise ValueError(
                f"{type(model).__name__} cannot read a thought grid: its own code reads the attention mask, which a "
                f"thought grid has not ({error})"
            ) from error
        if not reading.cache.layers:
            raise ValueError(f"{type(model).__name__} calls no attention that can be exchanged")
        packed = read_grid(model, text, TINY, plain.thoughts).view(TINY.positions, TINY.slots, -1)
        rationales = packed[:, 1:].unflatten(1, (TINY.rationales, TINY.rationale_length))
        compare("packed pass", packed[:, 0], plain.text)
        compare("packed pass", rationales, plain.rationales)
        compare("text pass", reading.hidden[0], plain.text)
        for step in range(TINY.rationale_length):
            states = advance(model, reading, step, plain.rows[None, ..., step])[0]
            compare("step pass", states, plain.rationales[:, :, step])

        head = model.language_head()
        every = torch.arange(plain.logits.shape[1], device=head.weight.device)
        every = every[~torch.isin(every, head.forbidden)]
        some = every[:: max(len(every) // MOST_WORDS, 1)]
        logits = plain.logits.to(head.weight.device, torch.promote_types(plain.logits.dtype, torch.float32)).clone()
        logits[:, head.forbidden] = -torch.inf
        theirs = logits.log_softmax(-1)[:, some]
        states = plain.text.to(head.weight.device).repeat_interleave(len(some), 0)
        ours = head.log_prob(states, some.repeat(len(plain.text))).view_as(theirs)
        compare("output head", ours, theirs)

        model.train()
        compare("pass in train()", read_grid(model, text, TINY, plain.thoughts).view_as(packed), packed)


def _error(model: PreTrainedModel, ours: Tensor, theirs: Tensor) -> float:
    """The relative error of ``[S, E]``: over all tokens, in 16 bits that of the median token."""
    ours, theirs = ours.double(), theirs.to(ours.device).double()
    if model.dtype in HALF:
        return float(((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1).clamp(min=1e-9)).median())
    return float((ours - theirs).norm() / theirs.norm().clamp(min=1e-9))


def _reason(model: QuietStarModel, plain: PlainPasses, what: str) -> str:
    """Why results differ, as far as passes with other inputs tell."""
    if what == "plain pass":
        return "with its attention exchanged it is another model"
    if what == "output head":
        seen: list[Tensor] = []
        with model.get_output_embeddings().register_forward_pre_hook(lambda _, given: seen.append(given[0])):
            model(input_ids=plain.tokens, use_cache=False)
        if not seen:
            return "its logits do not come from its output embeddings"
        alike = torch.nn.functional.cosine_similarity(seen[-1][0].double(), plain.text.double(), dim=-1)
        if seen[-1].shape[-1] != plain.text.shape[-1] or not bool((alike > 0.999).all()):
            return "more than a linear layer stands between the last hidden state and the logits"
        return (
            "its logits are not those of a linear layer with the config's logit_scale, or 1 / logits_scaling, and "
            "final_logit_softcapping"
        )
    if what == "packed pass":
        positions = torch.arange(TINY.positions, device=plain.tokens.device)[None]
        with contextlib.suppress(Exception):
            if _error(model, _last_hidden(model, plain.tokens, position_ids=positions)[0], plain.text) > 0.01:
                return "it does not number the positions of a text 0, 1, 2, ..., as those of a thought are"
            if _error(model, _last_hidden(model, plain.tokens, position_ids=positions * 3)[0], plain.text) < 1e-6:
                return "it takes no position_ids, so that a thought would stand in another place"
    return "this architecture cannot carry thoughts"
