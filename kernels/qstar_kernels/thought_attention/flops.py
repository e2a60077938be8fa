"""FLOPs that the results need, for torch's counter: query-key pairs times products, without window and text_start."""

from __future__ import annotations


def grid_pairs(q_shape, rationales: int) -> int:
    """Query-key pairs of all heads, without window and text_start."""
    batch, heads, positions, slots, _ = q_shape
    tokens = (slots - 1) // rationales
    own = rationales * tokens * (tokens + 1) // 2
    return batch * heads * (slots * positions * (positions + 1) // 2 + positions * own)


def text_pairs(queries: int, length: int, positions_shape) -> int:
    """Pairs of the queries at the last positions with the text; at given positions, as if spread evenly over it."""
    return queries * (length + 1) // 2 if positions_shape else queries * length - queries * (queries - 1) // 2


def step_pairs(q_shape, k_text_shape, k_thought_shape, step: int | None, positions_shape) -> int:
    """The same of a step; of the last one where only the device knows which."""
    batch, heads, queries, rationales, _ = q_shape
    text = text_pairs(queries, k_text_shape[2], positions_shape)
    tokens = k_thought_shape[4] if step is None else step + 1
    return batch * heads * rationales * (text + queries * tokens)


def part_pairs(q_shape, k_text_shape, k_thought_shape, positions_shape) -> int:
    """The same of all tokens of the thoughts at some positions."""
    queries, _, tokens = k_thought_shape[2:5]
    batch, heads, _, slots, _ = q_shape
    text = text_pairs(queries, k_text_shape[2], positions_shape)
    return batch * heads * slots * (2 * text + queries * (tokens + 1)) // 2


def forward(pairs: int, width: int, value_width: int) -> int:
    """q k and p v."""
    return 2 * pairs * (width + value_width)


def backward(pairs: int, width: int, value_width: int) -> int:
    """q k, ds k and ds q; do v and p do."""
    return 2 * pairs * (3 * width + 2 * value_width)


def attend(q, k, v, sinks, text_start, rationales, *_, out_shape=None):
    return forward(grid_pairs(q, rationales), q[-1], v[-1])


def attend_backward(do, out, lse, q, k, v, sinks, text_start, rationales, *_, out_shape=None):
    return backward(grid_pairs(q, rationales), q[-1], v[-1])


def attend_step(q, k_text, v_text, k_thought, v_thought, step, index, sinks, text_start, positions, *_, out_shape=None):
    return forward(step_pairs(q, k_text, k_thought, step, positions), q[-1], v_text[-1])


def attend_step_backward(
    do, out, lse, q, k_text, v_text, k_thought, v_thought, step, index, sinks, text_start, positions, *_, out_shape=None
):
    return backward(step_pairs(q, k_text, k_thought, step, positions), q[-1], v_text[-1])


def attend_part(q, k_text, v_text, k_thought, v_thought, sinks, text_start, positions, *_, out_shape=None):
    return forward(part_pairs(q, k_text, k_thought, positions), q[-1], v_text[-1])


def attend_part_backward(
    do, out, lse, q, k_text, v_text, k_thought, v_thought, sinks, text_start, positions, *_, out_shape=None
):
    return backward(part_pairs(q, k_text, k_thought, positions), q[-1], v_text[-1])
