"""Tiny random models of every family, and a tokenizer without a hub."""

from __future__ import annotations

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from qstar.wrapping import wrap

WORDS = ["<pad>", "<eos>", "<unk>", "---", *"abcdefghijklmnopqrstuvwxyz"]

_SHARED = dict(vocab_size=len(WORDS), pad_token_id=0, bos_token_id=None, eos_token_id=1)
_LLAMA_LIKE = dict(
    _SHARED,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=128,
)
_GPT2 = dict(_SHARED, n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=1)

FAMILIES: dict[str, tuple[str, dict]] = {
    "gpt2": ("GPT2", _GPT2),
    "llama": ("Llama", _LLAMA_LIKE),
    "mistral": ("Mistral", _LLAMA_LIKE | dict(sliding_window=4)),
    "qwen2": ("Qwen2", _LLAMA_LIKE | dict(use_sliding_window=True, sliding_window=4, max_window_layers=1)),
    "qwen3": ("Qwen3", _LLAMA_LIKE),
    "gemma2": ("Gemma2", _LLAMA_LIKE | dict(sliding_window=4, query_pre_attn_scalar=8)),
    "gemma3": ("Gemma3", _LLAMA_LIKE | dict(sliding_window=4, query_pre_attn_scalar=8, sliding_window_pattern=2)),
    "phi3": ("Phi3", _LLAMA_LIKE | dict(original_max_position_embeddings=128)),
    "gpt_neox": (
        "GPTNeoX",
        _SHARED
        | dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
        | dict(max_position_embeddings=128),
    ),
    "deepseek_v3": (
        "DeepseekV3",
        _LLAMA_LIKE
        | dict(num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8)
        | dict(v_head_dim=12, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, n_shared_experts=1)
        | dict(moe_intermediate_size=24, first_k_dense_replace=1),
    ),
    "gpt_oss": (
        "GptOss",
        _LLAMA_LIKE | dict(num_local_experts=4, num_experts_per_tok=2, sliding_window=4),
    ),
}
# Rotary factors that change at 16 tokens, for a Phi-3.
LONG_ROPE = dict(
    max_position_embeddings=128,
    original_max_position_embeddings=16,
    rope_parameters=dict(
        rope_type="longrope",
        rope_theta=1e4,
        original_max_position_embeddings=16,
        short_factor=[1.0, 1.1, 1.2, 1.3],
        long_factor=[2.0, 3.0, 4.0, 5.0],
    ),
)

CONFIG_NAMES = {"Gemma3": "Gemma3TextConfig"}


def tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer over ``WORDS``."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def plain_model(family: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes):
    """A random model of ``family`` with the ordinary attention of transformers, in ``eval()``."""
    name, values = FAMILIES[family]
    config = getattr(transformers, CONFIG_NAMES.get(name, f"{name}Config"))(**(values | changes))
    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    names = [f"{name}ForCausalLM", f"{name}LMHeadModel"]
    model = getattr(transformers, next(each for each in names if hasattr(transformers, each)))(config)
    return randomized(model).to(dtype).eval()


def randomized(model):
    """``model`` with weights that count beside the residual stream, which the initial ones would not."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):
                parameter.normal_()
    return model


def thinking_model(
    family: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32, mixing: bool = True, **settings
):
    """A random model that thinks; with ``mixing`` its mixing head is not zero, so that thoughts count."""
    changes = settings.pop("changes", {})
    model = wrap(plain_model(family, seed, dtype, **changes), tokenizer(), **settings)
    torch.manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in (model.qstar_start, model.qstar_end):
            parameter.normal_(0, 0.5)
        if mixing:
            model.qstar_mixing_head.output.weight.normal_(0, 0.5)
    return model


def text(batch: int, positions: int, seed: int = 0) -> Tensor:
    """Random letters, ``[B, N]``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, len(WORDS), (batch, positions), generator=generator)


def random_thoughts(model, batch: int, positions: int, seed: int = 1) -> Tensor:
    """Random letters as thoughts, ``[B, N, r, K]``."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, positions, model.qstar.rationales, model.qstar.thought_tokens)
    return torch.randint(4, len(WORDS), shape, generator=generator)


def checkpoint_layers(model, **options) -> None:
    """Compute the layers of ``model`` again in the backward; ``options`` are those of torch's ``checkpoint``."""
    new_name = getattr(model, "activation_checkpointing_enable", None)  # transformers 5.17 has the old one alone
    (new_name or model.gradient_checkpointing_enable)(options or None)
