"""Launches of the Triton kernels: the packed forward and backward, and the step."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from qstar_kernels.launch import Launch, Tile, architecture_of, device_refusal, run_all
from qstar_kernels.thought_attention.backward import key_gradient_kernel, query_gradient_kernel
from qstar_kernels.thought_attention.blocks import Rules
from qstar_kernels.thought_attention.forward import forward_kernel
from qstar_kernels.thought_attention.hopper import launches as hopper
from qstar_kernels.thought_attention.step import step_kernel
from qstar_kernels.thought_attention.tiles import find_hopper_tile, find_tile

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
NARROWEST, WIDEST = 16, 256
MOST_KEYS = 256  # of any tile
PROGRAMS = 264  # the rows of a key tile are shared out until there are as many programs as two for each processor
MOST_SPLITS = 8


def unsupported(q: Tensor, v: Tensor) -> str | None:
    """Why the kernels cannot run on these, or None."""
    refusal = device_refusal("q", q)
    if refusal is not None:
        return refusal
    if q.dtype not in DTYPES:
        return f"q has dtype {q.dtype}"
    for name, width in (("q", q.shape[-1]), ("v", v.shape[-1])):
        if not NARROWEST <= width <= WIDEST:
            return f"{name} has rows of {width} values, not {NARROWEST} to {WIDEST}"
    return None


def precision(dtype: torch.dtype, architecture: str) -> str:
    """How float32 products are made: exactly, unless torch's own switch allows TensorFloat-32 and the card has it."""
    if dtype != torch.float32 or not architecture.startswith(("sm_", "gfx94")):
        return "ieee"
    switch = torch.backends.cuda.matmul.fp32_precision
    return "tf32" if "tf32" in (switch, torch.backends.fp32_precision if switch == "none" else "") else "ieee"


def contiguous(x: Tensor | None) -> Tensor | None:
    """What a kernel reads without strides."""
    return None if x is None else x.contiguous()


def reachable(x: Tensor) -> Tensor:
    """Keys or values [B, Hkv, N, ...], copied where 32 bits cannot address a tile of them from its first key."""
    inside = sum((size - 1) * stride for size, stride in zip(x.shape[3:], x.stride()[3:], strict=True))
    return x if MOST_KEYS * x.stride(2) + inside < 2**31 else x.contiguous()


def grid_arguments(q: Tensor, k: Tensor, v: Tensor, rationales: int, rules: Rules, architecture: str) -> dict:
    """What the packed kernels share."""
    batch, heads, positions, slots, width = q.shape
    kv_heads = k.shape[1]
    tokens = max((slots - 1) // rationales, 1)
    rules = rules.within(positions, tokens)
    return {
        "q": q,
        "k": k,
        "v": v,
        "text_start": contiguous(rules.text_start),
        "q_stride": q.stride()[:4],
        "k_stride": k.stride()[:4],
        "v_stride": v.stride()[:4],
        "pairs": batch * kv_heads,
        "kv_heads": kv_heads,
        "positions": positions,
        "slots": slots,
        "tokens": tokens,
        "scale": rules.scale,
        "window": rules.window,
        "softcap": rules.softcap,
        "GROUP": heads // kv_heads,
        "D": width,
        "DV": v.shape[-1],
        "PRECISION": precision(q.dtype, architecture),
    }


def hopper_tile(kernel: str, architecture: str, rationales: int, rules: Rules, q, k, *states: Tensor) -> Tile | None:
    """The tile of one of ``HOPPER_KERNELS`` if the table has one and the kernel can take this call."""
    tile = find_hopper_tile(kernel, architecture, q.dtype, q.shape[-1])
    if tile is None:
        return None
    rules = rules.within(q.shape[2], (q.shape[3] - 1) // rationales)
    return tile if hopper.serves(rules, q.shape[1] // k.shape[1], q, k, *states) else None


def forward_launch(q, k, v, rationales: int, rules: Rules, out: Tensor, lse: Tensor, architecture: str) -> Launch:
    tile = hopper_tile("hopper_forward", architecture, rationales, rules, q, k, v, out)
    if tile is not None:
        return hopper.forward_launch(q, k, v, rationales, rules, out, lse, tile)
    shared = grid_arguments(q, k, v, rationales, rules, architecture)
    tile = find_tile("forward", architecture, q.dtype, max(q.shape[-1], v.shape[-1]))
    rows = q.shape[2] * q.shape[3] * shared["GROUP"]
    arguments = {"out": out, "lse": lse, "sinks": contiguous(rules.sinks), "out_stride": out.stride()[:4]}
    own = {"HAS_OWN": q.shape[3] > 1}
    return Launch(forward_kernel, -(-rows // tile.rows) * shared["pairs"], shared | arguments | own, tile)


def query_gradient_launch(
    do, out, lse, delta, q, k, v, rationales: int, rules: Rules, dq: Tensor, architecture: str
) -> Launch:
    tile = hopper_tile("hopper_query_gradient", architecture, rationales, rules, q, k, v, do, out, dq)
    if tile is not None:
        return hopper.query_gradient_launch(do, out, lse, delta, q, k, v, rationales, rules, dq, tile)
    shared = grid_arguments(q, k, v, rationales, rules, architecture)
    tile = find_tile("query_gradient", architecture, q.dtype, max(q.shape[-1], v.shape[-1]))
    rows = q.shape[2] * q.shape[3] * shared["GROUP"]
    arguments = {
        "do": do,
        "out": out,
        "lse": lse,
        "delta": delta,
        "dq": dq,
        "do_stride": do.stride()[:4],
        "out_stride": out.stride()[:4],
        "dq_stride": dq.stride()[:4],
        "HAS_OWN": q.shape[3] > 1,
    }
    return Launch(query_gradient_kernel, -(-rows // tile.rows) * shared["pairs"], shared | arguments, tile)


def key_gradient_launch(
    do, lse, delta, q, k, v, rationales: int, rules: Rules, dk: Tensor, dv: Tensor, own: bool, architecture: str
) -> Launch:
    """dk and dv [splits, B, Hkv, N, C, ...]; of the own keys, or with C = 1 of the text keys."""
    tile = None if own else hopper_tile("hopper_text_gradient", architecture, rationales, rules, q, k, v, do)
    if tile is not None:
        return hopper.text_gradient_launch(do, lse, delta, q, k, v, rationales, rules, dk, dv, tile)
    shared = grid_arguments(q, k, v, rationales, rules, architecture)
    tile = find_tile("own_gradient" if own else "text_gradient", architecture, q.dtype, max(q.shape[-1], v.shape[-1]))
    keys = q.shape[2] * (q.shape[3] - 1) if own else q.shape[2]
    splits = dk.shape[0]
    arguments = {
        "do": do,
        "lse": lse,
        "delta": delta,
        "dk": dk,
        "dv": dv,
        "do_stride": do.stride()[:4],
        "dk_stride": dk.stride()[:5],
        "dv_stride": dv.stride()[:5],
        "splits": splits,
        "OWN": own,
    }
    programs = -(-keys // tile.keys) * shared["pairs"] * splits
    return Launch(key_gradient_kernel, programs, shared | arguments, tile)


def step_launch(
    q, k_text, v_text, k_thought, v_thought, step: int | Tensor, rules: Rules, out: Tensor, lse: Tensor, architecture
) -> Launch:
    batch, heads, queries, rationales, width = q.shape
    kv_heads, positions = k_text.shape[1:3]
    group = heads // kv_heads
    tile = find_tile("step", architecture, q.dtype, max(width, v_text.shape[-1]))
    at_once = min(1 << (group - 1).bit_length(), tile.rows)  # heads of a group
    programs = -(-queries * rationales // (tile.rows // at_once)) * -(-group // at_once) * batch * kv_heads
    rules = rules.within(positions, k_thought.shape[4])
    arguments = {
        "q": q,
        "k_text": k_text,
        "v_text": v_text,
        "k_thought": k_thought,
        "v_thought": v_thought,
        "step": step,
        "out": out,
        "lse": lse,
        "sinks": contiguous(rules.sinks),
        "text_start": contiguous(rules.text_start),
        "q_stride": q.stride()[:4],
        "k_text_stride": k_text.stride()[:3],
        "v_text_stride": v_text.stride()[:3],
        "k_thought_stride": k_thought.stride()[:5],
        "v_thought_stride": v_thought.stride()[:5],
        "out_stride": out.stride()[:4],
        "pairs": batch * kv_heads,
        "kv_heads": kv_heads,
        "positions": positions,
        "queries": queries,
        "rationales": rationales,
        "scale": rules.scale,
        "window": rules.window,
        "softcap": rules.softcap,
        "GROUP": group,
        "D": width,
        "DV": v_text.shape[-1],
        "STEP_IN_MEMORY": isinstance(step, Tensor),
        "PRECISION": precision(q.dtype, architecture),
    }
    return Launch(step_kernel, programs, arguments, tile)


def attend(q: Tensor, k: Tensor, v: Tensor, rationales: int, rules: Rules, out: Tensor, lse: Tensor) -> None:
    """Fill out [B, Hq, N, C, Dv] and lse [B, Hq, N, C]."""
    if out.numel():
        architecture = architecture_of(q.device)
        run_all([forward_launch(q, reachable(k), reachable(v), rationales, rules, out, lse, architecture)], q)


def attend_backward(do, out, lse, q, k, v, rationales: int, rules: Rules, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
    """Fill dq, dk and dv."""
    if out.numel():
        k, v = reachable(k), reachable(v)
        run_all(backward_launches(do, out, lse, q, k, v, rationales, rules, dq, dk, dv), q)


def backward_launches(do, out, lse, q, k, v, rationales: int, rules: Rules, dq, dk, dv) -> Iterator[Launch]:
    """The launches of a backward, in order; resumed after the last, it sums the shares of the text keys."""
    architecture = architecture_of(q.device)
    delta = torch.empty_like(lse)
    yield query_gradient_launch(do, out, lse, delta, q, k, v, rationales, rules, dq, architecture)
    if q.shape[3] > 1:
        yield key_gradient_launch(do, lse, delta, q, k, v, rationales, rules, dk[None], dv[None], True, architecture)
    tile = hopper_tile("hopper_text_gradient", architecture, rationales, rules, q, k, v, do)
    if tile is None:
        tile = find_tile("text_gradient", architecture, q.dtype, max(q.shape[-1], v.shape[-1]))
    splits = count_splits(k, tile)
    text = [x[None, :, :, :, :1] for x in (dk, dv)]
    shares = [x.new_empty(splits, *x.shape[1:], dtype=torch.float32) for x in text] if splits > 1 else text
    yield key_gradient_launch(do, lse, delta, q, k, v, rationales, rules, *shares, False, architecture)
    if splits > 1:
        for x, share in zip(text, shares, strict=True):
            x[0] = share.sum(0)


def count_splits(k: Tensor, tile: Tile) -> int:
    """Into how many shares the rows of a tile of text keys go, so that a small batch keeps the card busy."""
    programs = k.shape[0] * k.shape[1] * -(-k.shape[2] // tile.keys)
    return min(max(PROGRAMS // programs, 1), MOST_SPLITS)


def attend_step(
    q, k_text, v_text, k_thought, v_thought, step: int | Tensor, rules: Rules, out: Tensor, lse: Tensor
) -> None:
    """Fill out [B, Hq, Nq, r, Dv] and lse [B, Hq, Nq, r]; tokens of the thoughts beyond ``step`` are never read."""
    if out.numel():
        text = reachable(k_text), reachable(v_text)
        launch = step_launch(q, *text, k_thought, v_thought, step, rules, out, lse, architecture_of(q.device))
        run_all([launch], q)
