"""Thought attention through torch's flash attention, for plain softmax attention without a window or hidden text.

The text keys: causal attention with C query heads for each query head. On a CPU it goes by blocks of positions whose
rows (position, slot, query head of the group) share a key/value head: long blocks of rows get flash's large tiles. The
own keys: causal attention of T tokens, with the text positions as the batch; few tokens on a CPU go by batched products
instead. The parts are merged through their log-sum-exp. The backward of each part runs with the merged output and the
merged log-sum-exp, which makes its weights and its delta those of the whole.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from qstar_kernels.thought_attention.rules import Rules
from qstar_kernels.thought_attention.torch import onednn, own
from qstar_kernels.thought_attention.torch.blocks import grouped

aten = torch.ops.aten
CUDA_GRID = 65535
CUDA_OFFSETS = 2**31  # values of the float32 sums of query gradients that torch's backward can address at one time
LARGE_TILES = 768  # rows from which flash on a CPU takes its largest tiles

Results = tuple[Tensor, Tensor]  # out [..., D] and lse [...]


def expressible(q: Tensor, v: Tensor, rules: Rules) -> bool:
    """Whether torch's flash attention computes this."""
    if rules.window is not None or rules.softcap is not None or rules.text_start is not None:
        return False
    batch, _, positions, _, width = q.shape
    if not q.numel() or v.shape[-1] != width:
        return False
    if q.device.type == "cpu":
        return q.dtype in (torch.float32, torch.float64)
    if q.device.type != "cuda" or torch.version.hip is not None or q.dtype not in (torch.float16, torch.bfloat16):
        return False
    fits = width % 8 == 0 and width <= 256 and batch * positions <= CUDA_GRID
    return fits and torch.cuda.get_device_capability(q.device) >= (8, 0)


def expressible_in_part(q: Tensor, v: Tensor, rules: Rules) -> bool:
    """The same of queries at some positions of a text; torch's kernels for GPUs number them as the first ones."""
    return q.device.type == "cpu" and expressible(q, v, rules)


def flash(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Attention of q [B, Hq, L, D] over k, v [B, Hkv, S, D], causal without a mask: out and lse [B, Hq, L]."""
    if q.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, mask is None, attn_mask=mask, scale=scale)
    q, k, v = (in_whole_words(x) for x in (q, k, v))
    return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, False, scale=scale)[:2]


def in_whole_words(x: Tensor) -> Tensor:
    """x, copied unless its rows are whole words of 16 bytes: torch's kernels for GPUs read nothing less."""
    steps = (x.data_ptr(), *(stride * x.element_size() for stride in x.stride()[:-1]))
    return x.clone(memory_format=torch.contiguous_format) if any(step % 16 for step in steps) else x


def flash_backward(do, out, lse, q, k, v, scale: float, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    if q.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(
            do, q, k, v, out, lse, 0.0, mask is None, attn_mask=mask, scale=scale
        )
    q, k, v = (in_whole_words(x) for x in (q, k, v))
    lse = lse.contiguous()  # its strides are not asked for, those of do and out are
    parts = (x.split(sequences_at_once(q)) for x in (do, out, lse, q, k, v))
    grads = [flash_backward_on_cuda(*part, scale) for part in zip(*parts, strict=True)]
    return grads[0] if len(grads) == 1 else tuple(torch.cat(x) for x in zip(*grads, strict=True))


def sequences_at_once(q: Tensor) -> int:
    """How many sequences of q [B, Hq, L, D] torch's backward for GPUs can take.

    Its float32 sums have L rounded up to 128 and D to 32 or 64, and it finds a sequence's with 32 bits: beyond them it
    writes where nothing is.
    """
    _, heads, length, width = q.shape
    values = heads * -(-length // 128) * 128 * -(-width // 64) * 64
    return max(1, (CUDA_OFFSETS - 1) // values)


def flash_backward_on_cuda(do, out, lse, q, k, v, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    length, seed = q.shape[2], torch.zeros(2, dtype=torch.uint64, device=q.device)
    return aten._scaled_dot_product_flash_attention_backward(
        do, q, k, v, out, lse, None, None, length, length, 0.0, True, seed, seed.new_empty(0), scale=scale
    )


def by_slot(x: Tensor) -> Tensor:
    """[B, H, N, C, ...] -> [B, H*C, N, ...]."""
    return x.transpose(2, 3).flatten(1, 2)


def block_rows(x: Tensor, start: int, stop: int) -> Tensor:
    """A block of positions of x [B, Hkv, N, C, G, ...] as rows [B, Hkv, rows, ...], small enough for a cache."""
    return x[:, :, start:stop].flatten(2, 4)


def text_blocks(q: Tensor, k: Tensor, at: Tensor | None) -> Iterator[tuple[int, int, Tensor]]:
    """(start, stop, mask [1 or B, 1, rows, keys]) of blocks of positions, the last ones or ``at`` [B, Nq].

    The keys of a block are the first ones of k [B, Hkv, N, D], as many as any of its positions sees.
    """
    _, heads, positions, slots, _ = q.shape
    width = slots * heads // k.shape[1]
    size = min(max(positions // 8, -(-LARGE_TILES // width)), -(-2 * LARGE_TILES // width), positions)
    if at is not None:
        ends = (at.amax(dim=0) + 1).tolist()
        for start in range(0, positions, size):
            here, seen = at[:, start : start + size], max(ends[start : start + size])
            future = torch.arange(seen, device=q.device) > here.repeat_interleave(width, dim=1)[:, None, :, None]
            mask = torch.zeros(future.shape, dtype=q.dtype, device=q.device).masked_fill_(future, -torch.inf)
            yield start, start + here.shape[1], mask
        return
    before = k.shape[2] - positions
    last = before + (positions - 1) // size * size
    key = torch.arange(-last, size, device=q.device)
    future = key > torch.arange(size, device=q.device).repeat_interleave(width)[:, None]
    mask = torch.zeros(future.shape, dtype=q.dtype, device=q.device).masked_fill_(future, -torch.inf)
    for start in range(0, positions, size):
        stop = min(start + size, positions)
        skipped = last - before - start
        yield start, stop, mask[None, None, : (stop - start) * width, skipped : skipped + before + stop]


def text_by_slot(q: Tensor, k: Tensor, v: Tensor, scale: float) -> list[Tensor]:
    """out [B, Hq, N, C, D] and lse [B, Hq, N, C] of the text keys k, v [B, Hkv, N, D], every slot a head of its own."""
    return [x.unflatten(1, (q.shape[1], q.shape[3])).transpose(2, 3) for x in flash(by_slot(q), k, v, scale)]


def attend_text_by_block(q: Tensor, k: Tensor, v: Tensor, rules: Rules, out: Tensor, lse: Tensor) -> None:
    """The same on a CPU, some positions after the other: the last ones, or those of ``rules``."""
    if onednn.serves(q, k, v, rules):
        onednn.attend(q, k, v, rules.scale, out, lse)
        return
    rows, out, lse = (grouped(x, k.shape[1]) for x in (q, out, lse))
    for start, stop, mask in text_blocks(q, k, rules.positions):
        seen = mask.shape[-1]
        part, part_lse = flash(block_rows(rows, start, stop), k[:, :, :seen], v[:, :, :seen], rules.scale, mask)
        shape = (stop - start, *out.shape[3:5])
        out[:, :, start:stop], lse[:, :, start:stop] = part.unflatten(2, shape), part_lse.unflatten(2, shape)


def attend_text(q: Tensor, k: Tensor, v: Tensor, rules: Rules, out: Tensor, lse: Tensor) -> None:
    """Fill out and lse with those of the text keys k, v [B, Hkv, N, D]."""
    if q.device.type != "cpu":
        for x, part in zip((out, lse), text_by_slot(q, k, v, rules.scale), strict=True):
            x.copy_(part)
    else:
        attend_text_by_block(q, k, v, rules, out, lse)


def attend_text_backward(do, out, lse, q, k, v, rules: Rules, dq: Tensor) -> tuple[Tensor, Tensor]:
    """Fill dq with the text keys' part of it; returns dk and dv of the text keys."""
    if q.device.type != "cpu":
        dq_text, dk, dv = flash_backward(*(by_slot(x) for x in (do, out, lse, q)), k, v, rules.scale)
        dq.copy_(dq_text.unflatten(1, (q.shape[1], q.shape[3])).transpose(2, 3))
        return dk, dv
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    if onednn.serves(q, k, v, rules):
        onednn.attend_backward(do, out, lse, q, k, v, rules.scale, dq, dk, dv)
        return dk, dv
    do, out, lse, rows, dq = (grouped(x, k.shape[1]) for x in (do, out, lse, q, dq))
    for start, stop, mask in text_blocks(q, k, rules.positions):
        seen = mask.shape[-1]
        parts = (block_rows(x, start, stop) for x in (do, out, lse, rows))
        dq_part, dk_part, dv_part = flash_backward(*parts, k[:, :, :seen], v[:, :, :seen], rules.scale, mask)
        dq[:, :, start:stop] = dq_part.unflatten(2, (stop - start, *dq.shape[3:5]))
        dk[:, :, :seen] += dk_part
        dv[:, :, :seen] += dv_part
    return dk, dv


def by_position(x: Tensor) -> Tensor:
    """[B, H, N, T, ...] -> [B*N, H, T, ...]."""
    return x.transpose(1, 2).flatten(0, 1)


def attend_own(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(positions, out, lse) of the slots of one rationale [B, H, N, T, D], a block of positions at a time, or all."""
    if own.serves(q):
        yield from own.attend(q, k, v, scale)
        return
    parts = flash(*(by_position(x) for x in (q, k, v)), scale)
    out, lse = (x.unflatten(0, (q.shape[0], q.shape[2])).transpose(1, 2) for x in parts)
    yield slice(None), out, lse


def attend_own_backward(do, out, lse, q, k, v, scale: float, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
    """Add to dq, and fill dk and dv, of the slots of one rationale."""
    if own.serves(q):
        own.attend_backward(do, out, lse, q, k, v, scale, dq, dk, dv)
        return
    parts = flash_backward(*(by_position(x) for x in (do, out, lse, q, k, v)), scale)
    dq_own, dk_own, dv_own = (x.unflatten(0, (q.shape[0], q.shape[2])).transpose(1, 2) for x in parts)
    dq.add_(dq_own)
    dk.copy_(dk_own)
    dv.copy_(dv_own)


def rationale_slots(first: int, slots: int, tokens: int) -> list[slice]:
    """The slots of each rationale, those of the first from ``first`` on."""
    return [slice(start, start + tokens) for start in range(first, slots, max(tokens, 1))]


def grid_slots(q: Tensor, rationales: int) -> list[slice]:
    return rationale_slots(1, q.shape[3], (q.shape[3] - 1) // rationales)


def attend(q: Tensor, k: Tensor, v: Tensor, rationales: int, rules: Rules, out: Tensor, lse: Tensor) -> None:
    """Fill out [B, Hq, N, C, D] and lse [B, Hq, N, C]."""
    text = (x[..., 0, :].contiguous() for x in (k, v))
    attend_slots(q, *text, k, v, grid_slots(q, rationales), rules, out, lse)


def attend_part(q, k_text, v_text, k_thought, v_thought, rules: Rules, out: Tensor, lse: Tensor) -> None:
    """Fill out [B, Hq, Nq, r*T, D] and lse [B, Hq, Nq, r*T]."""
    slots = rationale_slots(0, q.shape[3], k_thought.shape[4])
    attend_slots(q, k_text, v_text, k_thought.flatten(3, 4), v_thought.flatten(3, 4), slots, rules, out, lse)


def attend_slots(
    q: Tensor, k_text: Tensor, v_text: Tensor, k: Tensor, v: Tensor, own_slots: list[slice], rules: Rules, out, lse
) -> None:
    """Fill out and lse with those of the text keys [B, Hkv, N, D] and of every rationale's slots of k and v."""
    rounded, out = out, accumulator(out, lse)
    attend_text(q, k_text, v_text, rules, out, lse)
    for here in own_slots:
        for at, mine, mine_lse in attend_own(*(x[:, :, :, here] for x in (q, k, v)), rules.scale):
            so_far = out[:, :, at, here], lse[:, :, at, here]
            merge(so_far, so_far, (mine.to(lse.dtype), mine_lse))
    if rules.sinks is not None:
        add_sinks(out, lse, rules.sinks)
    if out is not rounded:
        rounded.copy_(out)


def attend_step(q, k_text, v_text, k_own, v_own, rules: Rules, out: Tensor, lse: Tensor) -> None:
    """Fill out [B, Hq, Nq, r, D] and lse [B, Hq, Nq, r]; a query's own key is the last of k_own [B, Hkv, Nq, r, t, D].

    The queries stand at all positions, or at given ones.
    """
    kv_heads = k_text.shape[1]
    scores = (grouped(q, kv_heads).to(lse.dtype) @ k_own.to(lse.dtype).mT).mul_(rules.scale)
    mine_lse = scores.logsumexp(dim=-1)
    mine = scores.sub_(mine_lse[..., None]).exp_() @ v_own.to(lse.dtype)
    rounded, out = out, accumulator(out, lse)
    if rules.positions is None:
        text, text_lse = text_by_slot(q, k_text, v_text, rules.scale)
    else:
        attend_text_by_block(q, k_text, v_text, rules, out, lse)
        text, text_lse = out, lse
    whole = by_group(kv_heads, out, lse)
    merge(whole, by_group(kv_heads, text.to(lse.dtype), text_lse), (mine, mine_lse))
    if rules.sinks is not None:
        add_sinks(out, lse, rules.sinks)
    if out is not rounded:
        rounded.copy_(out)


def accumulator(x: Tensor, lse: Tensor) -> Tensor:
    """Room for what x is the sum of, in the dtype of lse: x itself where that is its own."""
    return x if x.dtype == lse.dtype else torch.empty_like(x, dtype=lse.dtype)


def by_group(kv_heads: int, out: Tensor, lse: Tensor) -> Results:
    """out [B, Hq, N, C, D] and lse [B, Hq, N, C] as views [B, Hkv, N, C, G, D] and [B, Hkv, N, C, G]."""
    return grouped(out, kv_heads), grouped(lse[..., None], kv_heads)[..., 0]


def merge(total: Results, one: Results, other: Results) -> None:
    """Fill ``total`` with what two parts of the keys make together, all of one dtype; it may be one of them."""
    (out, lse), (one_out, one_lse), (other_out, other_lse) = total, one, other
    torch.lerp(one_out, other_out, torch.sigmoid(other_lse - one_lse)[..., None], out=out)
    torch.logaddexp(one_lse, other_lse, out=lse)


def add_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> None:
    """Add every head's sink to the normaliser of out [B, Hq, N, C, D]."""
    with_sinks = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None, None])
    out.mul_(torch.exp(lse - with_sinks)[..., None])
    lse.copy_(with_sinks)


def attend_backward(do, out, lse, q, k, v, rationales: int, rules: Rules, dq, dk, dv) -> None:
    """Fill dq, dk and dv."""
    text = (x[..., 0, :].contiguous() for x in (k, v))
    grads = dq, dk[..., 0, :], dv[..., 0, :], dk, dv
    attend_slots_backward(do, out, lse, q, *text, k, v, grid_slots(q, rationales), rules, grads)


def attend_part_backward(do, out, lse, q, k_text, v_text, k_thought, v_thought, rules: Rules, grads) -> None:
    """Fill ``grads``, which are shaped like q and the caches."""
    slots = rationale_slots(0, q.shape[3], k_thought.shape[4])
    of_thoughts = (x.flatten(3, 4) for x in (k_thought, v_thought))
    dq, dk_text, dv_text, *d_thought = grads
    dk, dv = (x.view(*x.shape[:3], -1, x.shape[-1]) for x in d_thought)
    grads = dq, dk_text, dv_text, dk, dv
    attend_slots_backward(do, out, lse, q, k_text, v_text, *of_thoughts, slots, rules, grads)


def attend_slots_backward(do, out, lse, q, k_text, v_text, k, v, own_slots: list[slice], rules: Rules, grads) -> None:
    """Fill ``grads``, which are shaped like q, k_text, v_text, k and v; of the last two the slots of rationales."""
    dq, dk_text, dv_text, dk, dv = grads
    rounded, dq = dq, accumulator(dq, lse)
    of_text = attend_text_backward(do, out, lse, q, k_text, v_text, rules, dq)
    dk_text.copy_(of_text[0])
    dv_text.copy_(of_text[1])
    for here in own_slots:
        mine = (x[:, :, :, here] for x in (do, out, lse, q, k, v))
        attend_own_backward(*mine, rules.scale, *(x[:, :, :, here] for x in (dq, dk, dv)))
    if dq is not rounded:
        rounded.copy_(dq)
