"""Every op in dense, plain PyTorch: the specification.

Symbols, here and in the other modules:

    B   sequences                           Hq  query heads, Hkv  key/value heads, G = Hq / Hkv
    N   text positions                      D   width of q and k, Dv  width of v
    r   rationales at a position            T   tokens in a rationale, t one of them
    C   slots at a position, 1 + r*T        S   N*C, the grid as one sequence
    E   width of the model                  V   vocabulary
    R   rows (hidden states) of the head

Slot 0 of a position is its text token; rationale p owns slots 1 + p*T ... p*T + T.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qstar_kernels.common.random_bits import row_uniforms


def thought_visibility(
    positions: int, slots: int, rationales: int, window: int | None, text_start: Tensor | None, device: torch.device
) -> Tensor:
    """Which key every query sees: bool [B or 1, N*C, N*C], query first."""
    tokens = (slots - 1) // rationales
    position = torch.arange(positions, device=device).repeat_interleave(slots)
    slot = torch.arange(slots, device=device).repeat(positions)
    is_text = slot == 0
    rationale = (slot - 1).div(max(tokens, 1), rounding_mode="floor")
    token = position + torch.where(is_text, 0, 1 + (slot - 1) % max(tokens, 1))

    start = torch.zeros(1, positions, dtype=torch.int64, device=device) if text_start is None else text_start
    start = start.repeat_interleave(slots, dim=1)[:, :, None]
    sees_text = is_text & (position <= position[:, None]) & (position >= start)
    same_thought = (position == position[:, None]) & (rationale == rationale[:, None]) & ~is_text & ~is_text[:, None]
    visible = sees_text | (same_thought & (slot <= slot[:, None]))
    if window is not None:
        visible = visible & (token[:, None] - token < window)
    return visible


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float | None, softcap: float | None, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Attention of q [B, Hq, M, D] over k, v [B, Hkv, L, D] under visible [B or 1, M, L]: out and lse [B, Hq, M]."""
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    groups = q.shape[1] // k.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = q.to(compute) @ k.to(compute).repeat_interleave(groups, dim=1).mT * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible[:, None], -torch.inf)
    if sinks is not None:
        sink = sinks.to(compute)[None, :, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sink], dim=-1)

    sees_any = (scores != -torch.inf).any(dim=-1, keepdim=True)
    scores = torch.where(sees_any, scores, 0.0)
    weights = torch.where(sees_any, scores.softmax(dim=-1), 0.0)[..., : k.shape[2]]
    lse = torch.where(sees_any[..., 0], scores.logsumexp(dim=-1), -torch.inf)
    out = weights @ v.to(compute).repeat_interleave(groups, dim=1)
    return out.to(q.dtype), lse.detach()


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
) -> Tensor | tuple[Tensor, Tensor]:
    """q [B, Hq, N, C, D], k [B, Hkv, N, C, D], v [B, Hkv, N, C, Dv] -> out [B, Hq, N, C, Dv], lse [B, Hq, N, C]."""
    positions, slots = q.shape[2:4]
    visible = thought_visibility(positions, slots, rationales, window, text_start, q.device)
    out, lse = masked_attention(q.flatten(2, 3), k.flatten(2, 3), v.flatten(2, 3), visible, scale, softcap, sinks)
    out, lse = out.unflatten(2, (positions, slots)), lse.unflatten(2, (positions, slots))
    return (out, lse) if return_lse else out


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
) -> Tensor | tuple[Tensor, Tensor]:
    """q [B, Hq, Nq, r, D] of token ``step`` against k_text [B, Hkv, N, D] and k_thought [B, Hkv, Nq, r, T, D]."""
    length, (queries, rationales) = k_text.shape[2], q.shape[2:4]
    filled = int(step) + 1
    k = torch.cat([k_text, k_thought[..., :filled, :].flatten(2, 4)], dim=2)
    v = torch.cat([v_text, v_thought[..., :filled, :].flatten(2, 4)], dim=2)

    text = torch.arange(length, device=q.device)
    if positions is None:
        positions = text[length - queries :].expand(len(q), -1)
    position = positions.repeat_interleave(rationales, dim=1)[..., None]
    start = torch.zeros_like(text).expand(len(q), -1) if text_start is None else text_start
    sees_text = (text <= position) & (text >= start.gather(1, position[..., 0])[..., None])
    row = torch.arange(queries * rationales, device=q.device)
    sees_thought = row[:, None] == row.repeat_interleave(filled)
    if window is not None:
        sees_text = sees_text & (position + filled - text < window)
        sees_thought = sees_thought & (torch.arange(filled, device=q.device).flip(0) < window).repeat(len(row))
    visible = torch.cat([sees_text, sees_thought.expand(len(sees_text), -1, -1)], dim=-1)

    out, lse = masked_attention(q.flatten(2, 3), k, v, visible, scale, softcap, sinks)
    out, lse = out.unflatten(2, (queries, rationales)), lse.unflatten(2, (queries, rationales))
    return (out, lse) if return_lse else out


def thought_attention_part(
    q: Tensor, k_text: Tensor, v_text: Tensor, k_thought: Tensor, v_thought: Tensor, **rules
) -> Tensor:
    """q [B, Hq, Nq, r, T, D] of all tokens, which are read one by one."""
    inputs = (k_text, v_text, k_thought, v_thought)
    steps = [thought_attention_step(q[..., step, :], *inputs, step, **rules) for step in range(q.shape[4])]
    return torch.stack(steps, dim=4) if steps else q.new_empty(*q.shape[:-1], v_text.shape[-1])


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., k], weight [n, k], bias [n] -> x W^T + bias [..., n]."""
    z = (x[..., None, :] * weight).sum(-1)
    return z if bias is None else z + bias


def mix_hidden(
    base: Tensor,
    thought: Tensor,
    features: Tensor,
    head_weight: Tensor,
    *,
    base_index: Tensor | None = None,
    sigmoid: bool = False,
) -> tuple[Tensor, Tensor]:
    """base [Rb, E], thought and features [R, E], head_weight [E], base_index [R] -> mixed [R, E], w [R]."""
    compute = torch.float64 if thought.dtype == torch.float64 else torch.float32
    u = (base if base_index is None else base[base_index]).to(compute)
    w = features.to(compute) @ head_weight.to(compute)
    w = w.sigmoid() if sigmoid else w
    mixed = u + w[:, None] * (thought.to(compute) - u)
    return mixed.to(thought.dtype), w


def head_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    forbidden: Tensor | None,
) -> Tensor:
    """hidden [R, E], weight [V, E] -> z [R, V], softcap(logit_scale (h W^T + bias)) with -inf where forbidden."""
    compute = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    z = hidden.to(compute) @ weight.to(compute).T
    z = logit_scale * (z if bias is None else z + bias.to(compute))
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z if forbidden is None else z.index_fill(1, forbidden, -torch.inf)


def linear_log_prob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    forbidden: Tensor | None = None,
    ignore_index: int = -100,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """hidden [R, E], weight [V, E], targets [R] -> log_prob [R], entropy [R]."""
    log_p = (head_logits(hidden, weight, bias, logit_scale, softcap, forbidden) / temperature).log_softmax(dim=-1)
    scored = targets != ignore_index
    label = log_p.gather(1, torch.where(scored, targets, 0)[:, None]).squeeze(1)
    log_prob = torch.where(scored, label, 0.0)
    if not return_entropy:
        return log_prob
    information = torch.where(log_p > -torch.inf, log_p, 0.0) * log_p.exp()
    return log_prob, torch.where(scored, -information.sum(dim=-1), 0.0)


def sample_linear(
    hidden: Tensor,
    weight: Tensor,
    *,
    seed: int | Tensor,
    step: int | Tensor = 0,
    row_offset: int = 0,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    log_prob_temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    forbidden: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """hidden [R, E], weight [V, E] -> tokens [R], log_prob [R]; a tile of 128 columns is drawn, then a column of it."""
    z = head_logits(hidden, weight, bias, logit_scale, softcap, forbidden)
    count, vocabulary = z.shape
    if temperature == 0:
        tokens = z.argmax(dim=-1)
    else:
        index = torch.arange(count, device=z.device)
        tile_uniform, column_uniform = row_uniforms(seed, step, index + row_offset if rows is None else rows)
        mass = torch.nn.functional.pad((z / temperature).softmax(dim=-1).double(), (0, -vocabulary % 128))
        tiles = mass.unflatten(1, (-1, 128))
        up_to_tile = tiles.sum(dim=-1).cumsum(dim=-1)
        tile = (up_to_tile <= tile_uniform[:, None] * up_to_tile[:, -1:]).sum(dim=-1)
        up_to_column = tiles[index, tile].cumsum(dim=-1)
        column = (up_to_column <= column_uniform[:, None] * up_to_column[:, -1:]).sum(dim=-1)
        tokens = tile * 128 + column
    log_p = (z / log_prob_temperature).log_softmax(dim=-1)
    return tokens, log_p.gather(1, tokens[:, None]).squeeze(1)
