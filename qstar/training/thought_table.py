"""A table of thoughts as parquet: what a model thought where, and what it made of the text that followed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from qstar.grid import IGNORED
from qstar.learning import QuietStarOutput
from qstar.model import QuietStarModel
from qstar.talking import Talk, read_batch, talk
from qstar.training.callbacks import decoded

FOLDER = "thoughts"
POSITIONS, CONTEXT = 16, 32
SHOWN_POSITIONS = 256  # of a text whose thoughts are shown, at most
COLUMNS = pa.schema(
    {
        "step": pa.int64(),  # updates that the model had seen
        "position": pa.int64(),  # in the row, of the last token before the thought
        "rationale": pa.int64(),  # which of the thoughts at this position
        "before": pa.string(),  # the text up to the thought, its last 32 tokens
        "thought": pa.string(),
        "after": pa.string(),  # the text that followed, the m tokens that the thought is scored on
        "log_prob_base": pa.float64(),  # of `after`, without a thought, nats
        "log_prob_talk": pa.float64(),  # the same with the thought
        "gain": pa.float64(),  # log_prob_talk - log_prob_base
        "mixing_weight": pa.float64(),  # of the thought, mean over `after`
    }
)


def first_text(batch: dict[str, Tensor], output: QuietStarOutput) -> dict[str, Tensor]:
    """The first text of a batch, and some thoughts about it, as :func:`score` takes them.

    They are those at its first positions; where some were chosen, at the first of these.
    """
    if output.positions is None:
        return {name: values[:1, :SHOWN_POSITIONS] for name, values in (batch | {"thoughts": output.thoughts}).items()}
    shown = {"thoughts": output.thoughts, "positions": output.positions}
    text = {name: values[:1] for name, values in batch.items()}
    return text | {name: values[:1, :SHOWN_POSITIONS] for name, values in shown.items()}


@torch.no_grad()
def score(
    model: QuietStarModel, input_ids: Tensor, *, thoughts: Tensor, positions: Tensor | None = None, **batch: Tensor
) -> Talk:
    """What given thoughts ``[B, n, r, K]`` make of a batch, as :func:`qstar.talking.read_batch` takes it.

    They are at the text positions ``positions`` ``[B, n]``, by default at all.
    """
    text = read_batch(model, input_ids, **batch)
    return talk(model, text, replace(model.grid(input_ids.shape[1]), chosen=positions), thoughts)


def thought_rows(
    tokenizer: PreTrainedTokenizerBase,
    tokens: Tensor,
    thoughts: Tensor,
    spoken: Talk,
    step: int,
    positions: Tensor | None = None,
) -> list[dict[str, Any]]:
    """Rows of the table, about thoughts at places all over one text all of whose ``m`` tokens ahead count.

    Args:
        tokenizer: of the text.
        tokens: the text, ``[N]``.
        thoughts: about it, ``[n, r, K]``.
        spoken: of :func:`score`, about this text alone.
        step: updates that the model has seen.
        positions: of the text that the thoughts are at, ``[n]``; by default all.
    """
    places = (spoken.targets[0] != IGNORED).all(-1).nonzero()[:, 0].tolist()
    places = [places[number * len(places) // POSITIONS] for number in range(POSITIONS)] if places else []
    ahead = thoughts.new_tensor(range(spoken.targets.shape[-1]))
    rows = []
    for place in dict.fromkeys(places):
        position = place if positions is None else int(positions[place])
        base = spoken.log_base[0, position + ahead].sum().item()
        for rationale, thought in enumerate(thoughts[place]):
            talked = spoken.log_talk[0, place, rationale].sum().item()
            rows.append(
                {
                    "step": step,
                    "position": position,
                    "rationale": rationale,
                    "before": decoded(tokenizer, tokens[max(0, position + 1 - CONTEXT) : position + 1].tolist()),
                    "thought": decoded(tokenizer, thought.tolist()),
                    "after": decoded(tokenizer, spoken.targets[0, place].tolist()),
                    "log_prob_base": base,
                    "log_prob_talk": talked,
                    "gain": talked - base,
                    "mixing_weight": spoken.weight[0, place, rationale].mean().item(),
                }
            )
    return rows


def write_table(rows: list[dict[str, Any]], run: Path, step: int) -> Path:
    """Write the rows of a step into the folder ``thoughts`` of a run, and return where."""
    path = run / FOLDER / f"step-{step:06}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows, COLUMNS), path)
    return path
