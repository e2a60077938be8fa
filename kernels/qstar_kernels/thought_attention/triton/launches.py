"""Launches of the Triton kernels: a tile, how many programs, and what they are given by keyword."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from qstar_kernels.common.launch import Launch, Tile
from qstar_kernels.thought_attention.rivals import find_gluon
from qstar_kernels.thought_attention.rules import Rules
from qstar_kernels.thought_attention.triton.backward import key_gradient_kernel, query_gradient_kernel
from qstar_kernels.thought_attention.triton.forward import forward_kernel
from qstar_kernels.thought_attention.triton.step import step_kernel
from qstar_kernels.thought_attention.triton.tiles import TABLE, find_tile


def precision(dtype: torch.dtype, architecture: str) -> str:
    """How float32 products are made: exactly, unless torch's own switch allows TensorFloat-32 and the card has it."""
    if dtype != torch.float32 or not architecture.startswith(("sm_", "gfx94")):
        return "ieee"
    switch = torch.backends.cuda.matmul.fp32_precision
    return "tf32" if "tf32" in (switch, torch.backends.fp32_precision if switch == "none" else "") else "ieee"


def contiguous(x: Tensor | None) -> Tensor | None:
    """What a kernel reads without strides."""
    return None if x is None else x.contiguous()


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


def gluon_in_place(
    kernel: str, architecture: str, rationales: int, rules: Rules, q: Tensor, k: Tensor, *states: Tensor
) -> tuple[ModuleType, Tile] | None:
    """The launches of Gluon kernels and a tile if the table asks for such a kernel and it can take this call."""
    found = find_gluon(TABLE, kernel, architecture, q.dtype, q.shape[-1])
    if found is None:
        return None
    rules = rules.within(q.shape[2], (q.shape[3] - 1) // rationales)
    return found if found[0].serves(rules, q.shape[1] // k.shape[1], q, k, *states) else None


def forward_launch(q, k, v, rationales: int, rules: Rules, out: Tensor, lse: Tensor, architecture: str) -> Launch:
    if found := gluon_in_place("forward", architecture, rationales, rules, q, k, v, out):
        gluon, tile = found
        return gluon.forward_launch(q, k, v, rationales, rules, out, lse, tile)
    shared = grid_arguments(q, k, v, rationales, rules, architecture)
    tile = find_tile("forward", architecture, q.dtype, max(q.shape[-1], v.shape[-1]))
    rows = q.shape[2] * q.shape[3] * shared["GROUP"]
    arguments = {"out": out, "lse": lse, "sinks": contiguous(rules.sinks), "out_stride": out.stride()[:4]}
    own = {"HAS_OWN": q.shape[3] > 1}
    return Launch(forward_kernel, -(-rows // tile.rows) * shared["pairs"], shared | arguments | own, tile)


def query_gradient_launch(
    do, out, lse, delta, q, k, v, rationales: int, rules: Rules, dq: Tensor, architecture: str
) -> Launch:
    if found := gluon_in_place("query_gradient", architecture, rationales, rules, q, k, v, do, out, dq):
        gluon, tile = found
        return gluon.query_gradient_launch(do, out, lse, delta, q, k, v, rationales, rules, dq, tile)
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
    if not own and (found := gluon_in_place("text_gradient", architecture, rationales, rules, q, k, v, do)):
        gluon, tile = found
        return gluon.text_gradient_launch(do, lse, delta, q, k, v, rationales, rules, dk, dv, tile)
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
        "at": contiguous(rules.positions),
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
