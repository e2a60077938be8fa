"""Thought attention by the Triton kernels: the packed forward and backward, and the step."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from qstar_kernels.common.launch import Launch, Tile, architecture_of, run_all
from qstar_kernels.thought_attention.rules import Rules
from qstar_kernels.thought_attention.triton.launches import (
    forward_launch,
    gluon_in_place,
    key_gradient_launch,
    query_gradient_launch,
    step_launch,
)
from qstar_kernels.thought_attention.triton.tiles import find_tile

MOST_KEYS = 256  # of any tile
PROGRAMS = 264  # the rows of a key tile are shared out until there are as many programs as two for each processor
MOST_SPLITS = 8


def reachable(x: Tensor) -> Tensor:
    """Keys or values [B, Hkv, N, ...], copied where 32 bits cannot address a tile of them from its first key."""
    inside = sum((size - 1) * stride for size, stride in zip(x.shape[3:], x.stride()[3:], strict=True))
    return x if MOST_KEYS * x.stride(2) + inside < 2**31 else x.contiguous()


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
    found = gluon_in_place("text_gradient", architecture, rationales, rules, q, k, v, do)
    tile = found[1] if found else find_tile("text_gradient", architecture, q.dtype, max(q.shape[-1], v.shape[-1]))
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


def attend_part(q, k_text, v_text, k_thought, v_thought, rules: Rules, out: Tensor, lse: Tensor) -> None:
    """Fill out [B, Hq, Nq, r*T, Dv] and lse [B, Hq, Nq, r*T], a step for each token."""
    shape = k_thought.shape[3:5]
    q, out, lse = (x.unflatten(3, shape) for x in (q, out, lse))
    for step in range(shape[1]):
        token, token_lse = torch.empty_like(out[:, :, :, :, step]), torch.empty_like(lse[..., step])
        attend_step(q[:, :, :, :, step], k_text, v_text, k_thought, v_thought, step, rules, token, token_lse)
        out[:, :, :, :, step], lse[..., step] = token, token_lse
