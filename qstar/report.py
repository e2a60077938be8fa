"""What a person sees: tables and samples of thoughts."""

from __future__ import annotations

from collections.abc import Sequence
from math import exp

from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase
from transformers.trainer_callback import ProgressCallback

from qstar.evaluation import Evaluation


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A plain text table, the first column to the left and the others to the right."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    lines = [
        "  ".join(cell.ljust(width) if column == 0 else cell.rjust(width) for column, (cell, width) in enumerate(cells))
        for cells in ([*zip(row, widths, strict=True)] for row in (header, *rows))
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def evaluation_table(result: Evaluation) -> str:
    """The held-out log-likelihood with and without thoughts, by how far ahead the token lies."""
    rows = [
        [f"{ahead} ahead", f"{-base:.4f}", f"{-talk:.4f}", f"{base - talk:+.4f}"]
        for ahead, (base, talk) in enumerate(zip(result.nll_base_ahead, result.nll_talk_ahead, strict=True), start=1)
    ]
    header = ["log-likelihood (nats per token)", "without thoughts", "with thoughts", "gain"]
    return (
        f"{table(header, rows)}\n\n{result.tokens} tokens predicted; mean mixing weight {result.mixing_weight:.3f}; "
        f"perplexity {exp(result.nll_base):.3f} without and {exp(result.nll_talk):.3f} with thoughts"
    )


class ProgressLine(ProgressCallback):
    """The Trainer's progress bar, with a line of what matters in the place of everything that is logged."""

    SHOWN = (
        ("loss", "loss", ".4f"),
        ("nll_base", "without thoughts", ".4f"),
        ("nll_talk", "with", ".4f"),
        ("reward", "reward", ".4f"),
        ("mixing_weight", "mixing weight", ".3f"),
        ("eval_nll_base", "held out: without thoughts", ".4f"),
        ("eval_nll_talk", "with", ".4f"),
    )

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if self.training_bar is not None and logs:
            parts = [f"{label} {logs[name]:{form}}" for name, label, form in self.SHOWN if name in logs]
            if parts:
                self.training_bar.write(f"step {state.global_step:>5}  " + "  ".join(parts))


def show_thoughts(
    tokenizer: PreTrainedTokenizerBase | None, input_ids: Tensor, thoughts: Tensor, samples: int = 3, context: int = 12
) -> list[dict[str, str]]:
    """Print a few thoughts of the first row between the text before and after them, and return them.

    ``input_ids`` is ``[B, N]``, ``thoughts`` ``[B, N, r, K]``.
    """
    if tokenizer is None:
        return []
    text, length = input_ids[0].tolist(), input_ids.shape[1]
    shown = []
    for sample in range(1, samples + 1):
        i = sample * length // (samples + 1)
        before, after = (
            tokenizer.decode(part) for part in (text[max(0, i + 1 - context) : i + 1], text[i + 1 : i + 5])
        )
        thought = tokenizer.decode(thoughts[0, i, 0].tolist())
        shown.append({"before": before, "thought": thought, "after": after})
        tqdm.write(f"  {before!r} [{thought!r}] {after!r}")
    return shown
