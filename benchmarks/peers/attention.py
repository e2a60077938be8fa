"""What thought attention is held against: other ways to compute it with PyTorch, for one thought a position.

Each way is given the layout that suits it best, as far as that costs no more than a view, and its masks ready-made:
a model makes them once for all layers.

- dense: one call over all N*C tokens with a mask;
- flex: FlexAttention, one call with a block mask;
- merged: the text keys by a fused causal attention with C query heads for each query head, the own keys by batched
  products, merged through the log-sum-exp. The backward of each part runs with the merged output and the merged
  log-sum-exp. Operations that no library has fused stay PyTorch's own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from lab.results_file import Peer, Unsupported, need_gpu
from qstar_kernels.reference import thought_visibility

aten = torch.ops.aten
MASK_ENTRIES = 2**31


# Dense


def additive_mask(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where ``visible``, else -inf: the form into which every call would turn a boolean mask."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -torch.inf)


def check_mask_size(queries: int, keys: int, device: torch.device) -> None:
    if device.type == "cuda" and queries * keys >= MASK_ENTRIES:
        raise Unsupported(f"a mask of {queries} x {keys} is beyond the 32-bit offsets of PyTorch's masked kernels")


def masked_sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, kernel: SDPBackend | None) -> Tensor:
    """scaled_dot_product_attention; the kernel that knows no grouped heads gets expanded keys and values."""
    if kernel is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    with sdpa_kernel(kernel):
        if kernel == SDPBackend.EFFICIENT_ATTENTION:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def prepare_dense(kernel: SDPBackend | None, q: Tensor, k: Tensor, v: Tensor) -> Callable[..., Tensor]:
    positions, slots = q.shape[2:4]
    check_mask_size(positions * slots, positions * slots, q.device)
    visible = thought_visibility(positions, slots, 1, None, None, q.device)
    mask = additive_mask(visible[:, None], q.dtype)
    del visible

    def dense(q, k, v):
        return masked_sdpa(*(x.flatten(2, 3) for x in (q, k, v)), mask, kernel).unflatten(2, (positions, slots))

    return dense


def prepare_dense_step(
    kernel: SDPBackend | None, q: Tensor, k_text: Tensor, v_text: Tensor, k_own: Tensor, v_own: Tensor
) -> Callable[..., Tensor]:
    """The keys lie as its cache would have them: the text, then all first tokens, all second ones and so on."""
    positions, filled = q.shape[2], k_own.shape[4]
    check_mask_size(positions, positions * (1 + filled), q.device)
    text = torch.ones(positions, positions, dtype=torch.bool, device=q.device).tril()
    own = torch.eye(positions, dtype=torch.bool, device=q.device)
    mask = additive_mask(torch.cat([text] + [own] * filled, dim=1)[None, None], q.dtype)
    k, v = (
        torch.cat([x, own.squeeze(3).transpose(2, 3).flatten(2, 3)], dim=2)
        for x, own in ((k_text, k_own), (v_text, v_own))
    )

    def dense_step(q, *_):
        return masked_sdpa(q.squeeze(3), k, v, mask, kernel).unsqueeze(3)

    return dense_step


# FlexAttention


def prepare_flex(q: Tensor, k: Tensor, v: Tensor) -> Callable[..., Tensor]:
    need_gpu(q)
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention  # brings the compiler with it

    torch.compiler.reset()  # every size compiles anew, and there is a limit to how often one function may
    positions, slots = q.shape[2:4]

    def sees(batch, head, query, key):
        text = (key % slots == 0) & (key // slots <= query // slots)
        own = (key // slots == query // slots) & (key <= query)
        return text | own

    length = positions * slots
    mask = create_block_mask(sees, None, None, length, length, device=q.device)
    compiled = torch.compile(flex_attention, dynamic=False)

    def flex(q, k, v):
        flat = (x.flatten(2, 3) for x in (q, k, v))
        return compiled(*flat, block_mask=mask, enable_gqa=True).unflatten(2, (positions, slots))

    return flex


# Merged


class TextAttention(NamedTuple):
    """A fused causal attention that gives its log-sum-exp, and its backward, which takes those of the whole.

    ``forward(q, k, v, scale)`` gives out, lse and what else backward needs; ``backward(do, q, k, v, out, lse, rest,
    scale)`` gives dq, dk and dv. ``around`` is open while they run.
    """

    forward: Callable[..., tuple[Tensor, Tensor, Any]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    around: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext


def cpu_forward(q, k, v, scale):
    return *aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=scale), None


def cpu_backward(do, q, k, v, out, lse, rest, scale):
    backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
    return backward(do, q, k, v, out, lse, 0.0, True, scale=scale)


def flash_forward(q, k, v, scale):
    out, lse, *rest = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, False, scale=scale)
    return out, lse, rest


def flash_backward(do, q, k, v, out, lse, rest, scale):
    cumulative_q, cumulative_k, longest_q, longest_k, seed, offset, _ = rest
    lengths = (cumulative_q, cumulative_k, longest_q, longest_k)
    backward = aten._scaled_dot_product_flash_attention_backward
    return backward(do, q, k, v, out, lse, *lengths, 0.0, True, seed, offset, scale=scale)


def cudnn_forward(q, k, v, scale):
    out, lse, *rest = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, True, False, scale=scale)
    return out, lse, rest


def cudnn_backward(do, q, k, v, out, lse, rest, scale):
    cumulative_q, cumulative_k, longest_q, longest_k, seed, offset, _ = rest
    lengths = (cumulative_q, cumulative_k, longest_q, longest_k)
    backward = aten._scaled_dot_product_cudnn_attention_backward
    return backward(do, q, k, v, out, lse, seed, offset, None, *lengths, 0.0, True, scale=scale)


@contextlib.contextmanager
def flash_implementation(name: str) -> Iterator[None]:
    """Let another FlashAttention stand behind PyTorch's flash operations; raises where it is not installed."""
    from torch.nn.attention import activate_flash_attention_impl, restore_flash_attention_impl

    activate_flash_attention_impl(name)
    try:
        yield
    finally:
        restore_flash_attention_impl()


TEXT_ATTENTION = {
    "sdpa_flash": TextAttention(flash_forward, flash_backward),
    "sdpa_cudnn": TextAttention(cudnn_forward, cudnn_backward),
    "flash_attention_3": TextAttention(flash_forward, flash_backward, partial(flash_implementation, "FA3")),
    "flash_attention_4": TextAttention(flash_forward, flash_backward, partial(flash_implementation, "FA4")),
}
CPU_TEXT_ATTENTION = TextAttention(cpu_forward, cpu_backward)


def text_attention(name: str, q: Tensor) -> TextAttention:
    if q.device.type == "cpu" and name == "sdpa_flash":
        return CPU_TEXT_ATTENTION
    need_gpu(q)
    return TEXT_ATTENTION[name]


def product(a: Tensor, b: Tensor) -> Tensor:
    """Batched product of [M, I, J] and [M, J, K], in float32."""
    return torch.bmm(a, b) if a.dtype == torch.float32 else torch.bmm(a, b, out_dtype=torch.float32)


def by_slot(x: Tensor) -> Tensor:
    """[B, H, N, C, ...] -> [B, H*C, N, ...]."""
    return x.transpose(2, 3).flatten(1, 2)


def by_position(x: Tensor, slots: int) -> Tensor:
    """[B, H*C, N, ...] -> [B, H, N, C, ...], a view."""
    return x.unflatten(1, (-1, slots)).transpose(2, 3)


def thoughts(x: Tensor, kv_heads: int, slots: int) -> Tensor:
    """The thoughts' part of x [B, H*C, N, ...] as [B, Hkv, N, T, G, ...], a view; with one slot, that is a thought."""
    return x.unflatten(1, (kv_heads, -1, slots))[:, :, :, min(1, slots - 1) :].transpose(2, 4)


def rows_of(x: Tensor) -> Tensor:
    """[B, Hkv, N, T, G, ...] -> [B*Hkv*N, T*G, ...], what meets the own keys of one position."""
    return x.flatten(3, 4).flatten(0, 2)


def own_scores(q: Tensor, k: Tensor, scale: float, hidden: Tensor | None) -> Tensor:
    scores = product(q, k.mT).mul_(scale)
    return scores if hidden is None else scores.masked_fill_(hidden, -torch.inf)


def later_tokens(rows: int, tokens: int, device: torch.device) -> Tensor:
    """Which own keys a thought's rows (token, query head of the group) must not see, [T*G, T]."""
    key = torch.arange(tokens, device=device)
    return key > key.repeat_interleave(rows // tokens)[:, None]


def merge_own(q, k, v, out, lse, kv_heads: int, slots: int, scale: float, hidden: Tensor | None) -> None:
    """Add the own keys k, v [B*Hkv*N, T, D] to out and lse of the text keys; q, out, lse are [B, H*C, N, ...]."""
    scores = own_scores(rows_of(thoughts(q, kv_heads, slots)), k, scale, hidden)
    own_lse = scores.logsumexp(dim=-1)
    own_out = torch.bmm(scores.sub_(own_lse[..., None]).exp_().to(v.dtype), v)
    out, lse = thoughts(out, kv_heads, slots), thoughts(lse, kv_heads, slots)
    own_out, own_lse = own_out.view(out.shape), own_lse.view(lse.shape)
    out.lerp_(own_out, torch.sigmoid(own_lse - lse)[..., None].to(out.dtype))
    lse.copy_(torch.logaddexp(lse, own_lse))


class MergedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, text: TextAttention):
        kv_heads, slots, scale = k.shape[1], q.shape[3], q.shape[-1] ** -0.5
        rows = by_slot(q)
        with text.around():
            out, lse, rest = text.forward(rows, k[..., 0, :].contiguous(), v[..., 0, :].contiguous(), scale)
        k_own, v_own = (x[..., 1:, :].flatten(0, 2) for x in (k, v))
        hidden = later_tokens(k_own.shape[1] * (q.shape[1] // kv_heads), k_own.shape[1], q.device)
        merge_own(rows, k_own, v_own, out, lse.view(rows.shape[:-1]), kv_heads, slots, scale, hidden)
        ctx.save_for_backward(q, k, v, hidden)
        ctx.merged, ctx.rest, ctx.text, ctx.scale = (out, lse), rest, text, scale
        return by_position(out, slots)

    @staticmethod
    def backward(ctx, do):
        q, k, v, hidden = ctx.saved_tensors
        (out, lse), scale = ctx.merged, ctx.scale
        kv_heads, slots = k.shape[1], q.shape[3]
        rows, do = by_slot(q), by_slot(do)
        texts = (x[..., 0, :].contiguous() for x in (k, v))
        with ctx.text.around():
            dq, dk_text, dv_text = ctx.text.backward(do, rows, *texts, out, lse, ctx.rest, scale)

        flat_lse, delta = lse.view(rows.shape[:-1]), (do * out).sum(dim=-1, dtype=lse.dtype)
        q_own, do_own, lse_own, delta_own = (rows_of(thoughts(x, kv_heads, slots)) for x in (rows, do, flat_lse, delta))
        k_own, v_own = (x[..., 1:, :].flatten(0, 2) for x in (k, v))
        p = own_scores(q_own, k_own, scale, hidden).sub_(lse_own[..., None]).exp_()
        ds = product(do_own, v_own.mT).sub_(delta_own[..., None]).mul_(p).mul_(scale).to(q.dtype)
        dq_thoughts = thoughts(dq, kv_heads, slots)
        dq_thoughts += torch.bmm(ds, k_own).view(dq_thoughts.shape)
        dk, dv = (torch.empty_like(x) for x in (k, v))
        dk[..., 0, :], dv[..., 0, :] = dk_text, dv_text
        dk[..., 1:, :] = torch.bmm(ds.mT, q_own).view_as(dk[..., 1:, :])
        dv[..., 1:, :] = torch.bmm(p.mT.to(v.dtype), do_own).view_as(dv[..., 1:, :])
        return by_position(dq, slots), dk, dv, None


def prepare_merged(name: str, q: Tensor, k: Tensor, v: Tensor) -> Callable[..., Tensor]:
    text = text_attention(name, q)
    return lambda q, k, v: MergedAttention.apply(q, k, v, text)


def prepare_merged_step(name: str, q: Tensor, *caches: Tensor) -> Callable[..., Tensor]:
    text = text_attention(name, q)

    def merged_step(q, k_text, v_text, k_own, v_own):
        rows, scale = by_slot(q), q.shape[-1] ** -0.5
        with text.around():
            out, lse, _ = text.forward(rows, k_text, v_text, scale)
        k_own, v_own = (x.flatten(0, 3) for x in (k_own, v_own))
        merge_own(rows, k_own, v_own, out, lse.view(rows.shape[:-1]), k_text.shape[1], 1, scale, None)
        return by_position(out, 1)

    return merged_step


# All of them


DENSE_KERNELS = {
    "cpu": {None: ""},
    "cuda": {
        SDPBackend.CUDNN_ATTENTION: "cuDNN's masked kernel",
        SDPBackend.EFFICIENT_ATTENTION: "the memory-efficient masked kernel, keys and values expanded to all heads",
    },
}


def packed_peers(device: torch.device) -> list[Peer]:
    """In order; of those with the same name only the first that can run is timed."""
    dense = [
        Peer("dense_masked", partial(prepare_dense, kernel), note)
        for kernel, note in DENSE_KERNELS[device.type].items()
    ]
    merged = [Peer(name, partial(prepare_merged, name)) for name in TEXT_ATTENTION]
    return [*dense, Peer("flex", prepare_flex), *merged]


def step_peers(device: torch.device) -> list[Peer]:
    dense = [
        Peer("dense_masked", partial(prepare_dense_step, kernel), note)
        for kernel, note in DENSE_KERNELS[device.type].items()
    ]
    return [*dense, *(Peer(name, partial(prepare_merged_step, name)) for name in TEXT_ATTENTION)]
