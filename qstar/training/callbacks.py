"""What a person sees while a model trains: a line of what matters, and samples of thoughts."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase
from transformers.trainer_callback import ProgressCallback


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

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
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
        before, thought, after = (
            decoded(tokenizer, part)
            for part in (text[max(0, i + 1 - context) : i + 1], thoughts[0, i, 0].tolist(), text[i + 1 : i + 5])
        )
        shown.append({"before": before, "thought": thought, "after": after})
        tqdm.write(f"  {before!r} [{thought!r}] {after!r}")
    return shown


def decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """The text of ``ids``; the numbers where a vocabulary has rows that are no token."""
    try:
        return str(tokenizer.decode(ids))
    except Exception:  # tokenizers in Python raise whatever their tables raise
        return " ".join(f"<{token}>" for token in ids)
