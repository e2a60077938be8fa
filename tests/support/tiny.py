"""Tiny random models of every family, a tokenizer without a hub, and the plain way to compute the objective."""

from __future__ import annotations

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from qstar.model import wrap

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
    "gpt_oss": (
        "GptOss",
        _LLAMA_LIKE | dict(num_local_experts=4, num_experts_per_tok=2, sliding_window=4),
    ),
}
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


def read_alone(model, tokens: Tensor) -> Tensor:
    """Hidden states ``[S, E]`` of one sequence ``[S]`` in the model's plain causal pass."""
    return model.base_model(inputs_embeds=model.embed(tokens[None]), use_cache=False).last_hidden_state[0]


def logits_of(model, hidden: Tensor) -> Tensor:
    """Logits ``[..., V]`` with the thought tokens forbidden, as the model's own forward makes them."""
    config = model.config.get_text_config(decoder=True)
    logits = model.get_output_embeddings()(hidden)
    cap = getattr(config, "final_logit_softcapping", None)
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    forbidden = torch.zeros_like(logits, dtype=torch.bool)
    forbidden[..., [model.qstar.start_token_id, model.qstar.end_token_id]] = True
    return logits.masked_fill(forbidden, -torch.inf)


def plain_objective(
    model, tokens: Tensor, thoughts: Tensor, beta: float, tau: float, signed: bool
) -> dict[str, Tensor]:
    """The objective of one text ``[N]`` with thoughts ``[N, r, K]``, a plain pass of the model for every thought.

    Written from the paper's formulas with loops, without the grid; the mean of the rationales is the baseline.
    """
    settings = model.qstar
    count, ahead = len(tokens), settings.ahead_tokens
    rationales, length = thoughts.shape[1:]
    start, end = tokens.new_tensor([settings.start_token_id]), tokens.new_tensor([settings.end_token_id])
    head = model.qstar_mixing_head
    base = read_alone(model, tokens)
    log_base = logits_of(model, base).log_softmax(-1)
    talk = [[[None] * rationales for _ in range(count)] for _ in range(ahead)]
    log_policy = {}
    for i in range(count):
        for p in range(rationales):
            following = tokens[i + 1 : i + ahead]
            alone = torch.cat([tokens[: i + 1], start, thoughts[i, p], end, following])
            states = read_alone(model, alone)[i + 1 :]
            sampled = (logits_of(model, states[:length]) / tau).log_softmax(-1)
            log_policy[i, p] = sampled.gather(-1, thoughts[i, p][:, None])[:, 0].mean()
            for k in range(min(ahead, count - 1 - i)):
                u, g = base[i + k], states[length + 1 + k]
                inner = torch.relu(head.input(torch.cat([u, g])))
                w = head.output(torch.relu(head.hidden(inner)))[0]
                mixed = logits_of(model, (1 - w) * u + w * g).log_softmax(-1)
                talk[k][i][p] = mixed[tokens[i + k + 1]]
    nll_base = -torch.stack([log_base[i, tokens[i + 1]] for i in range(count - 1)]).mean()
    per_step = [
        torch.stack([value for position in talk[k] for value in position if value is not None]).mean()
        for k in range(ahead)
        if k < count - 1
    ]
    nll_talk = -torch.stack(per_step).sum() / ahead
    terms = []
    for i in range(count - ahead):
        scores = torch.stack([sum(talk[k][i][p] for k in range(ahead)) for p in range(rationales)])
        baseline = scores.mean() if rationales > 1 else sum(log_base[i + k, tokens[i + k + 1]] for k in range(ahead))
        advantage = (scores - baseline).detach()
        advantage = advantage if signed else advantage.clamp(min=0)
        terms += [advantage[p] * log_policy[i, p] for p in range(rationales)]
    policy_loss = -torch.stack(terms).mean()
    return {
        "loss": (nll_base + nll_talk) / 2 + beta * policy_loss,
        "nll_base": nll_base,
        "nll_talk": nll_talk,
        "policy_loss": policy_loss,
    }
