"""The public ops: checks of arguments, then an operator with the backend that was chosen."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from qstar_kernels import reference
from qstar_kernels.backends import choose
from qstar_kernels.common.arguments import (
    INTEGER,
    check_alike,
    check_integer,
    check_number,
    check_tensor,
    integer_or_tensor,
)
from qstar_kernels.thought_attention.operators import ops


@overload
def thought_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    rationales: int = ...,
    scale: float | None = ...,
    window: int | None = ...,
    softcap: float | None = ...,
    sinks: Tensor | None = ...,
    text_start: Tensor | None = ...,
    return_lse: Literal[False] = ...,
    backend: str = ...,
) -> Tensor: ...


@overload
def thought_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    rationales: int = ...,
    scale: float | None = ...,
    window: int | None = ...,
    softcap: float | None = ...,
    sinks: Tensor | None = ...,
    text_start: Tensor | None = ...,
    return_lse: Literal[True],
    backend: str = ...,
) -> tuple[Tensor, Tensor]: ...


@overload
def thought_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    rationales: int = ...,
    scale: float | None = ...,
    window: int | None = ...,
    softcap: float | None = ...,
    sinks: Tensor | None = ...,
    text_start: Tensor | None = ...,
    return_lse: bool,
    backend: str = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...


def thought_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    rationales: int = 1,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    text_start: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over the thought grid (Quiet-STaR, arXiv 2403.09629, section 4.1 and figure 3), all queries at once.

    Every text position i owns C = 1 + r*T slots: its text token, then r rationales of T tokens. The query in slot c
    of position i sees the text keys (j, slot 0) with ``text_start[i] <= j <= i``, and the keys of its own rationale
    at its own position, up to and including itself. With T = 0 this is causal attention.

    Args:
        q: queries [B, Hq, N, C, D], float64, float32, bfloat16 or float16, with any strides.
        k: keys [B, Hkv, N, C, D], Hq a multiple of Hkv; query head h reads key head h // (Hq / Hkv).
        v: values [B, Hkv, N, C, Dv].
        rationales: r, at least 1; C - 1 must be a multiple of it.
        scale: factor on q k, 1/sqrt(D) by default.
        window: a query sees a key iff their positions differ by less. Slot 0 of position i has position i, token t
            of a rationale i + 1 + t.
        softcap: s becomes softcap * tanh(s / softcap), s after the scale.
        sinks: [Hq], a logit per head that joins the normaliser and has no value; differentiable.
        text_start: [B, N], int64 or int32: the first text key that a position may see (packed documents, left
            padding); beyond the position itself, its text query sees nothing.
        return_lse: return the log-sum-exp of each query's scores as well.
        backend: "reference" (dense, the specification), "torch" (plain PyTorch, memory linear in N), "triton" (kernels
            for NVIDIA and AMD GPUs) or "auto": "triton" on a GPU where its kernels can run, else "torch".

    Returns:
        out [B, Hq, N, C, Dv] in q's dtype; with ``return_lse`` also lse [B, Hq, N, C], natural log, float32 (float64
        for float64 inputs), sinks included, not differentiable. A query that sees nothing: out 0, lse -inf.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, dtype, device or value; a named backend cannot
            run on these tensors.
        RuntimeError: ``backend`` is "triton", which is installed but broken.
    """
    check_tensor("q", q, "[B, Hq, N, C, D]", (None,) * 5)
    batch, _, positions, slots, width = q.shape
    check_tensor("k", k, "[B, Hkv, N, C, D]", (batch, None, positions, slots, width))
    check_tensor("v", v, "[B, Hkv, N, C, Dv]", (batch, k.shape[1], positions, slots, None))
    check_alike("k", k, "q", q)
    check_alike("v", v, "q", q)
    check_heads(q, "k", k, v)
    check_integer("rationales", rationales, at_least=1)
    if slots < 1 or (slots - 1) % rationales:
        raise ValueError(f"q has {slots} slots a position, but it must have 1 + T * {rationales} (rationales)")
    rules = check_rules(q, positions, scale, window, softcap, sinks, text_start)
    chosen = choose("thought_attention", backend, q=q, v=v)
    if chosen == "reference":
        with torch.autocast(q.device.type, enabled=False):
            out, lse = reference.thought_attention(q, k, v, rationales=rationales, return_lse=True, **rules)
    else:
        out, lse = ops.thought_attention(q, k, v, rationales=rationales, backend=chosen, **rules)
    return (out, lse) if return_lse else out


@overload
def thought_attention_step(
    q: Tensor,
    k_text: Tensor,
    v_text: Tensor,
    k_thought: Tensor,
    v_thought: Tensor,
    step: int | Tensor,
    *,
    scale: float | None = ...,
    window: int | None = ...,
    softcap: float | None = ...,
    sinks: Tensor | None = ...,
    text_start: Tensor | None = ...,
    positions: Tensor | None = ...,
    return_lse: Literal[False] = ...,
    backend: str = ...,
) -> Tensor: ...


@overload
def thought_attention_step(
    q: Tensor,
    k_text: Tensor,
    v_text: Tensor,
    k_thought: Tensor,
    v_thought: Tensor,
    step: int | Tensor,
    *,
    scale: float | None = ...,
    window: int | None = ...,
    softcap: float | None = ...,
    sinks: Tensor | None = ...,
    text_start: Tensor | None = ...,
    positions: Tensor | None = ...,
    return_lse: Literal[True],
    backend: str = ...,
) -> tuple[Tensor, Tensor]: ...


@overload
def thought_attention_step(
    q: Tensor,
    k_text: Tensor,
    v_text: Tensor,
    k_thought: Tensor,
    v_thought: Tensor,
    step: int | Tensor,
    *,
    scale: float | None = ...,
    window: int | None = ...,
    softcap: float | None = ...,
    sinks: Tensor | None = ...,
    text_start: Tensor | None = ...,
    positions: Tensor | None = ...,
    return_lse: bool,
    backend: str = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...


def thought_attention_step(
    q: Tensor,
    k_text: Tensor,
    v_text: Tensor,
    k_thought: Tensor,
    v_thought: Tensor,
    step: int | Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    text_start: Tensor | None = None,
    positions: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of the newest token of every rationale, against caches: one step of thinking.

    The query (i, p) holds token ``step`` of rationale p at text position i, one of the last Nq or of ``positions``. It
    sees the text keys ``text_start[i] <= j <= i`` and tokens 0 to ``step`` of its own rationale, its own key included.
    Equal to that token's row of :func:`thought_attention`.

    Args:
        q: queries [B, Hq, Nq, r, D], Nq <= N without ``positions``.
        k_text, v_text: keys [B, Hkv, N, D] and values [B, Hkv, N, Dv] of the text.
        k_thought, v_thought: keys [B, Hkv, Nq, r, T, D] and values [B, Hkv, Nq, r, T, Dv] of the thoughts. Tokens
            beyond ``step`` are never read.
        step: 0 <= step < T, an int or an integer tensor without dimensions. The Triton kernel reads such a tensor on
            the device of q, so that the host need not wait for it; its value is then not checked.
        text_start: [B, N], as in :func:`thought_attention`; the other arguments are the same as well.
        positions: [B, Nq] int64, 0 <= i < N: the text positions of the queries, the last Nq by default. Ascending ones
            are the fastest. On a GPU their values are not checked.

    Returns:
        out [B, Hq, Nq, r, Dv] in q's dtype; with ``return_lse`` also lse [B, Hq, Nq, r].

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, dtype, device or value; a named backend cannot
            run on these tensors.
        RuntimeError: ``backend`` is "triton", which is installed but broken.
    """
    inputs = (q, k_text, v_text, k_thought, v_thought)
    check_tensor("q", q, "[B, Hq, Nq, r, D]", (None,) * 5)
    check_caches(*inputs, tokens=None, positions=positions)
    rules = check_rules(q, k_text.shape[2], scale, window, softcap, sinks, text_start) | {"positions": positions}
    chosen = choose("thought_attention_step", backend, q=q, v_text=v_text)
    at = check_step(step, k_thought.shape[4], q.device if chosen == "triton" else None)
    if chosen == "reference":
        with torch.autocast(q.device.type, enabled=False):
            out, lse = reference.thought_attention_step(*inputs, at, return_lse=True, **rules)
    else:
        number, index = (None, at) if isinstance(at, Tensor) else (at, None)
        out, lse = ops.thought_attention_step(*inputs, number, index, backend=chosen, **rules)
    return (out, lse) if return_lse else out


def thought_attention_part(
    q: Tensor,
    k_text: Tensor,
    v_text: Tensor,
    k_thought: Tensor,
    v_thought: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    text_start: Tensor | None = None,
    positions: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention of the thoughts at some positions, all their tokens, to a text that was read before.

    The query (i, p, t) sees the text keys ``text_start[i] <= j <= i`` and tokens 0 to t of its own rationale. Equal to
    those rows of :func:`thought_attention`, and so are its gradients, which the text's keys and values get as well: a
    grid can be read in parts, none of which holds all of it.

    Args:
        q: queries [B, Hq, Nq, r, T, D], Nq <= N without ``positions``.
        k_text, v_text: keys [B, Hkv, N, D] and values [B, Hkv, N, Dv] of the text up to the last of the positions.
        k_thought, v_thought: keys [B, Hkv, Nq, r, T, D] and values [B, Hkv, Nq, r, T, Dv] of the thoughts.
        text_start: [B, N], as in :func:`thought_attention`; the other arguments are the same as well.
        positions: [B, Nq], as in :func:`thought_attention_step`.

    Returns:
        out [B, Hq, Nq, r, T, Dv] in q's dtype.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, dtype, device or value; a named backend cannot
            run on these tensors.
        RuntimeError: ``backend`` is "triton", which is installed but broken.
    """
    inputs = (q, k_text, v_text, k_thought, v_thought)
    check_tensor("q", q, "[B, Hq, Nq, r, T, D]", (None,) * 6)
    check_caches(*inputs, tokens=q.shape[4], positions=positions)
    rules = check_rules(q, k_text.shape[2], scale, window, softcap, sinks, text_start) | {"positions": positions}
    chosen = choose("thought_attention_part", backend, q=q, v_text=v_text)
    if chosen == "reference":
        with torch.autocast(q.device.type, enabled=False):
            return reference.thought_attention_part(*inputs, **rules)
    out, _ = ops.thought_attention_part(q.flatten(3, 4), *inputs[1:], backend=chosen, **rules)
    return out.unflatten(3, q.shape[3:5])


def check_caches(
    q: Tensor,
    k_text: Tensor,
    v_text: Tensor,
    k_thought: Tensor,
    v_thought: Tensor,
    tokens: int | None,
    positions: Tensor | None,
) -> None:
    """Check keys and values of text and thoughts beside q [B, Hq, Nq, r, ..., D]; ``tokens`` is T where q has it."""
    batch, queries, rationales, width = q.shape[0], *q.shape[2:4], q.shape[-1]
    check_tensor("k_text", k_text, "[B, Hkv, N, D]", (batch, None, None, width))
    kv_heads, length = k_text.shape[1:3]
    check_tensor("v_text", v_text, "[B, Hkv, N, Dv]", (batch, kv_heads, length, None))
    own = (batch, kv_heads, queries, rationales)
    check_tensor("k_thought", k_thought, "[B, Hkv, Nq, r, T, D]", (*own, tokens, width))
    check_tensor("v_thought", v_thought, "[B, Hkv, Nq, r, T, Dv]", (*own, k_thought.shape[4], v_text.shape[-1]))
    for name, value in (("k_text", k_text), ("v_text", v_text), ("k_thought", k_thought), ("v_thought", v_thought)):
        check_alike(name, value, "q", q)
    check_heads(q, "k_text", k_text, v_text)
    if positions is not None:
        check_positions(positions, q, length)
    elif queries > length:
        raise ValueError(f"q has {queries} positions, but it must have at most the {length} of k_text")


def check_positions(positions: Tensor, q: Tensor, length: int) -> None:
    """Check where the queries q [B, Hq, Nq, ...] stand in a text; a GPU is not asked for the values."""
    check_tensor("positions", positions, "[B, Nq]", (q.shape[0], q.shape[2]), (torch.int64,))
    check_alike("positions", positions, "q", q, dtype=False)
    if positions.device.type == "cpu" and positions.numel() and not torch.compiler.is_compiling():
        least, largest = (int(x) for x in positions.aminmax())
        if least < 0 or largest >= length:
            wrong = least if least < 0 else largest
            raise ValueError(f"positions has {wrong}, but all must be in 0..{length - 1}, those of k_text")


def check_heads(q: Tensor, name: str, k: Tensor, v: Tensor) -> None:
    heads, kv_heads = q.shape[1], k.shape[1]
    if kv_heads < 1 or heads < 1 or heads % kv_heads:
        raise ValueError(f"q has {heads} heads, but it must have a multiple of the {kv_heads} of {name}")
    for tensor, width in (("q", q.shape[-1]), (name.replace("k", "v", 1), v.shape[-1])):
        if width < 1:
            raise ValueError(f"{tensor} has width 0, but it must be at least 1")


def check_step(step: object, tokens: int, readable_on: torch.device | None) -> int | Tensor:
    """The checked step as an int, or as a tensor where that lies on the device whose kernel can read it."""
    step = integer_or_tensor("step", step, readable_on, at_least=0)
    if not isinstance(step, Tensor) and step >= tokens:
        raise ValueError(f"step is {step}, but it must be below the {tokens} tokens of k_thought")
    return step


def check_rules(q: Tensor, positions: int, scale, window, softcap, sinks, text_start) -> dict:
    """The checked keyword arguments that both forms share, the scale filled in."""
    if scale is not None:
        check_number("scale", scale)
    if window is not None:
        check_integer("window", window, at_least=1)
        if window >= 2**63:
            raise ValueError(f"window is {window}, but it must be below 2**63; None hides nothing")
    if softcap is not None:
        check_number("softcap", softcap, above=0)
    if sinks is not None:
        check_tensor("sinks", sinks, "[Hq]", (q.shape[1],))
        check_alike("sinks", sinks, "q", q, dtype=False)
    if text_start is not None:
        check_tensor("text_start", text_start, "[B, N]", (q.shape[0], positions), INTEGER)
        check_alike("text_start", text_start, "q", q, dtype=False)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    return {"scale": scale, "window": window, "softcap": softcap, "sinks": sinks, "text_start": text_start}
