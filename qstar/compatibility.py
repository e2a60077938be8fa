"""Which models can think: a refusal with a reason, before anything is trained."""

from __future__ import annotations

import logging
import re

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from qstar.grid import Text
from qstar.model import QuietStarModel, embedding_rows
from qstar.talking import read_grid
from qstar.thinking import advance, evaluating, read_text

logger = logging.getLogger(__name__)


def check_architecture(model: PreTrainedModel) -> None:
    """Raise ValueError where the architecture of ``model`` cannot carry thoughts."""
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a transformers model, but it is {name}")
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
    for what, module in (
        ("input embedding", model.get_input_embeddings()),
        ("language-model head", model.get_output_embeddings()),
    ):
        if module is None:
            raise ValueError(f"{name} has no {what}")
        if not isinstance(getattr(module, "weight", None), Tensor):
            raise ValueError(f"{name} has no single {what}, but a {type(module).__name__}")


def disable_dropout(model: PreTrainedModel) -> None:
    """Set every dropout and jitter of ``model`` to 0: thoughts must be scored by the model that sampled them."""
    found = set()
    for module, name, value in noise_of(model):
        found.add(f"{type(module).__name__}.{name} = {value}")
        setattr(module, name, 0.0)
    if found:
        logger.warning(
            "noise is set to 0, so that the model that samples a thought scores it: %s", ", ".join(sorted(found))
        )


def noise_of(model: nn.Module) -> list[tuple[nn.Module, str, float]]:
    """Every dropout and jitter that is not 0: the module, the attribute and its value."""
    found = []
    for module in model.modules():
        for name, value in vars(module).items():
            noise = name == "p" if isinstance(module, nn.Dropout) else re.search("drop|jitter", name)
            if noise and isinstance(value, float) and value:
                found.append((module, name, value))
    return found


@torch.no_grad()
def check_behaviour(model: QuietStarModel) -> None:
    """Compare tiny passes over a thought grid with the model's own plain passes.

    Raises:
        ValueError: the output head, the packed pass or the step-by-step pass gives other results, or a pass in
            training does.
    """
    device = embedding_rows(model).device
    words = torch.arange(model.config.get_text_config(decoder=True).vocab_size, device=device)
    words = words[~torch.isin(words, model.language_head().forbidden)]
    generator = torch.Generator().manual_seed(0)
    tokens = words[torch.randint(len(words), (1, 3), generator=generator).to(device)]
    thoughts = words[torch.randint(len(words), (1, 3, 2, 2), generator=generator).to(device)]
    text, grid = Text.from_inputs(tokens), model.grid(3, rationales=2, thought_tokens=2, ahead_tokens=2)

    with evaluating(model):
        packed = read_grid(model, text, grid, thoughts).unflatten(1, (grid.positions, grid.slots))[0]
        rationales = packed[:, 1:].unflatten(1, (grid.rationales, grid.rationale_length))
        rows = grid.tokens(tokens, thoughts, model.qstar.start_token_id, model.qstar.end_token_id)
        rows = rows.view(grid.positions, grid.slots)[:, 1:].view(grid.positions, grid.rationales, -1)

        for i in range(grid.positions):
            for p in range(grid.rationales):
                alone = torch.cat([tokens[0, : i + 1], rows[i, p]])[None]
                plain = model.base_model(inputs_embeds=model.embed(alone), use_cache=False).last_hidden_state[0]
                _compare(model, "packed pass", rationales[i, p], plain[i + 1 :])
        plain = model.base_model(inputs_embeds=model.embed(tokens), use_cache=False).last_hidden_state[0]
        _compare(model, "packed pass", packed[:, 0], plain)

        reading = read_text(model, text, grid)
        _compare(model, "text pass", reading.hidden[0], packed[:, 0])
        for step in range(grid.rationale_length):
            states = advance(model, reading, step, rows[None, ..., step])[0]
            _compare(model, "step pass", states, rationales[:, :, step])

        head = model.language_head()
        logits = model(input_ids=tokens, use_cache=False).logits[0].float()
        logits[:, head.forbidden] = -torch.inf
        plain = logits.log_softmax(-1).gather(-1, tokens[0, :, None])[:, 0]
        _compare(model, "output head", head.log_prob(packed[:, 0], tokens[0]), plain)

        model.train()
        again = read_grid(model, text, grid, thoughts).unflatten(1, (grid.positions, grid.slots))[0]
        _compare(model, "pass in train()", again, packed)


def _compare(model: PreTrainedModel, what: str, ours: Tensor, plain: Tensor) -> None:
    """Raise unless two results agree as far as the model's dtype lets them."""
    allowed = 0.1 if model.dtype in (torch.bfloat16, torch.float16) else 1e-3
    error = float((ours.double() - plain.double()).norm() / plain.double().norm().clamp(min=1e-9))
    if not error <= allowed:
        raise ValueError(
            f"the {what} of {type(model).__name__} differs from the model's own by {error:.1e}, where {allowed:.0e} "
            "is allowed: this architecture cannot carry thoughts"
        )
