"""The smallest model of every causal class that transformers knows, its sizes found from the names in its config."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import tiny
import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES  # class names by model type

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "models.md"
THINKS, UNTRIED = "thinks", "not tried"
MOST_PARAMETERS = 50_000_000  # beyond it a model is not tiny: its config has a size under a name that is not below

VOCABULARY = 40  # above that of the tokenizer: rows to spare, as most published models have
WIDTH, INNER, HEADS, KV_HEADS, HEAD_WIDTH, LAYERS, EXPERTS = 32, 48, 4, 2, 8, 2, 4

# What a setting becomes, by the first pattern that its whole name matches.
SIZES: list[tuple[str, int]] = [
    (r"(\w+_)?vocab_size(_\w+)?", VOCABULARY),
    (r"pad_token_id", 0),
    (r"(bos|eos|decoder_start)_token_id", 1),
    (r"(image|video|audio)_token_(id|index)", 0),  # as padding, which stands in for an image without features
    (r"n_positions|max_(position_embeddings|seq_len|target_positions|source_positions)", 128),
    (r"sliding_window|sliding_window_size|attention_window_size", 4),
    (r"(\w+_)?num_key_value_heads|(num|n)_kv_heads?", KV_HEADS),
    (r"(\w+_)?(num_attention_heads|n_heads?|num_heads|attention_heads)", HEADS),
    (r"(\w+_)?(num_hidden_layers|n_layers?|num_layers)|(en|de)coder_layers|depth", LAYERS),
    (r"hidden_size|d_model|n_embd|dim|embedding_size|word_embed_proj_dim|emb_dim|embed_dim", WIDTH),
    (r"\w*intermediate_size\w*|\w*ffn_dim|d_ff|n_inner|\w*ffn_hidden_size|d_inner", INNER),
    (r"(\w+_)?head_dim|d_kv|d_head", HEAD_WIDTH),
    (r"(q|kv)_lora_rank", 16),
    (r"(num|moe_num|num_local|n_routed)_experts", EXPERTS),
    (r"index_topk|index_topk_blocks", 2),
    (r"num_experts_per_tok\w*|moe_topk|moe_k|top_k_experts", 2),
    (r"n_group|topk_group|n_shared_experts|num_shared_experts|first_k_dense_replace", 1),
]
NEUTRAL = {  # defaults that would hide what a model does with them
    r"logits_scaling|(embedding|residual|attention)_multiplier": (1.0, 0.5),
    r"(final_logit|attn_logit)_softcapping": (None, 3.0),
}
MUST_BE_SET = ("head_dim", "num_key_value_heads", "num_experts_per_tok")  # where their default is None

PLAIN_ROPE = dict(rope_type="default", rope_theta=1e4)

# What the names do not tell: sizes that depend on each other, and layers of published models that no default has.
BY_HAND: dict[str, dict] = {
    "blt": dict(encoder_hash_byte_group_vocab=VOCABULARY),
    "codegen": dict(rotary_dim=4),
    "cohere_compass_text": dict(
        layer_types=["full_attention", "sliding_attention"],
        rope_parameters=dict(full_attention=PLAIN_ROPE, sliding_attention=PLAIN_ROPE),
    ),
    "dots1": dict(n_routed_experts=EXPERTS, n_shared_experts=1, moe_intermediate_size=INNER),
    "gemma3n_text": dict(
        layer_types=["sliding_attention", "full_attention"] * 2,
        num_hidden_layers=4,
        num_kv_shared_layers=2,
        intermediate_size=[INNER] * 4,
        activation_sparsity_pattern=[0.95, 0.0] * 2,
    ),
    "gemma4_text": dict(hidden_size_per_layer_input=4),
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]]),
    "gptj": dict(rotary_dim=4),
    "lfm2": dict(layer_types=["conv", "full_attention"], num_hidden_layers=2),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"]),
    "longcat_flash": dict(qk_head_dim=16),
    "mamba2": dict(num_heads=8, n_groups=1),
    "minimax_m3_vl_text": dict(layer_types=["full_attention", "minimax_m3_sparse"]),
    "qwen4_exp_text": dict(
        indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=8, indexer_budget=4, indexer_compress_ratio=2
    ),
    "reformer": dict(axial_pos_embds_dim=[16, 16], axial_pos_shape=[8, 16]),
    "xmod": dict(default_language="en_XX"),
    "zamba": dict(layers_block_type=["linear_attention", "hybrid"] * 2, num_hidden_layers=4),
    "zaya": dict(num_experts_per_tok=1),
}


@functools.cache
def documented() -> dict[str, str]:
    """What docs/models.md says of each model type: THINKS, UNTRIED, or a part of the refusal."""
    rows = re.findall(r"^\| ([^|]+) \|.* \| ([^|]+) \|$", DOCUMENT.read_text(), re.MULTILINE)
    return {name: said.strip('"') for said, names in rows for name in re.findall(r"`([\w-]+)`", names)}


def tiny_values(config_class: type[PreTrainedConfig]) -> dict:
    """What to give ``config_class`` so that its model is tiny: one layer of every kind, two at least."""
    default = config_class()
    settings = default.to_dict()
    sizes = {
        name: next((size for pattern, size in SIZES if re.fullmatch(pattern, name)), None)
        for name, value in settings.items()
        if type(value) is int or (value is None and name in MUST_BE_SET)
    }
    values: dict = {name: size for name, size in sizes.items() if size is not None}
    for name in config_class.sub_configs:
        if isinstance(getattr(default, name, None), PreTrainedConfig):
            values[name] = tiny_values(type(getattr(default, name)))
    if settings.get("num_key_value_heads", 0) == settings.get("num_attention_heads"):
        values["num_key_value_heads"] = HEADS
    if getattr(default, "is_decoder", None) is False:
        values["is_decoder"] = True
    return values | one_layer_of_each_kind(settings) | BY_HAND.get(config_class.model_type, {})


def telling_values(default: PreTrainedConfig) -> dict:
    """Other values for settings whose neutral default would hide what a model does with them."""
    return {
        name: telling
        for name, value in default.to_dict().items()
        for pattern, (neutral, telling) in NEUTRAL.items()
        if re.fullmatch(pattern, name) and value == neutral and type(value) is not bool
    }


def one_layer_of_each_kind(settings: dict) -> dict:
    """The lists that have an entry for every layer, cut down to layers that differ, but two at least."""
    depth = settings.get("num_hidden_layers")
    lists = {name: value for name, value in settings.items() if isinstance(value, list) and len(value) == depth}
    kinds = list(zip(*(value for value in lists.values() if isinstance(value[0], str)), strict=True))
    layers = sorted({kind: layer for layer, kind in reversed(list(enumerate(kinds)))}.values())
    layers = layers if len(layers) > 1 else [0, 1]
    cut = {name: [value[layer] for layer in layers] for name, value in lists.items()}
    return cut | dict(num_hidden_layers=len(layers)) if cut else {}


def fresh_model(model_type: str) -> PreTrainedModel:
    """A model as it is initialized, in ``eval()``, with attention that does all that its config asks for."""
    model_class = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])
    config_class = model_class.config_class
    config = config_class(**telling_values(config_class()) | tiny_values(config_class))
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in model_class(config).parameters())
    if count > MOST_PARAMETERS:
        raise ValueError(f"{model_type} has {count} parameters")
    torch.manual_seed(0)
    model = model_class(config).eval()
    if model_type == "gemma2":
        model.set_attn_implementation("eager")  # sdpa, which transformers 5.17 takes for Gemma 2, has no soft-cap
    return model


def tiny_model(model_type: str) -> PreTrainedModel:
    """A random model, in ``eval()``, whose layers count: their initial weights would be lost beside the residual."""
    return tiny.randomized(fresh_model(model_type))
