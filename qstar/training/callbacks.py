"""What a person sees while a model trains: a line of what matters, and samples of thoughts."""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_callback import ProgressCallback

from qstar.training.thought_statistics import signs_of_collapse

logger = logging.getLogger(__name__)


class ProgressLine(ProgressCallback):
    """The Trainer's progress bar, with a line of what matters in the place of everything that is logged."""

    SHOWN = (
        ("loss", "loss", ".4f"),
        ("nll_base", "without thoughts", ".4f"),
        ("nll_talk", "with", ".4f"),
        ("reward", "reward", ".4f"),
        ("mixing_weight", "mixing weight", ".3f"),
        ("thought_entropy", "entropy", ".2f"),
        ("eval_nll_base", "held out: without thoughts", ".4f"),
        ("eval_nll_talk", "with", ".4f"),
    )

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.training_bar is not None and logs:
            parts = [f"{label} {logs[name]:{form}}" for name, label, form in self.SHOWN if name in logs]
            if parts:
                self.training_bar.write(f"step {state.global_step:>5}  " + "  ".join(parts))


class CollapseWarning(TrainerCallback):
    """Warns, once, when what is logged shows that thoughts have collapsed, see ``COLLAPSED``."""

    def __init__(self) -> None:
        self.warned = False

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        signs = signs_of_collapse(logs or {})
        if signs and state.is_world_process_zero and not self.warned:
            self.warned = True
            logger.warning(
                "thoughts have collapsed by step %d: %s; try a lower policy_weight or learning_rate, an "
                "entropy_weight, or a higher thought_temperature",
                state.global_step,
                ", ".join(signs),
            )


def show_thoughts(
    tokenizer: PreTrainedTokenizerBase | None,
    input_ids: Tensor,
    thoughts: Tensor,
    positions: Tensor | None = None,
    samples: int = 3,
    context: int = 12,
) -> list[dict[str, str]]:
    """Print a few thoughts of the first row between the text before and after them, and return them.

    ``input_ids`` is ``[B, N]``, ``thoughts`` ``[B, n, r, K]`` at the text positions ``positions`` ``[B, n]``, or all N.
    """
    if tokenizer is None:
        return []
    text, count = input_ids[0].tolist(), thoughts.shape[1]
    shown = []
    for place in dict.fromkeys(sample * count // (samples + 1) for sample in range(1, samples + 1)):
        i = place if positions is None else int(positions[0, place])
        before, thought, after = (
            decoded(tokenizer, part)
            for part in (text[max(0, i + 1 - context) : i + 1], thoughts[0, place, 0].tolist(), text[i + 1 : i + 5])
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
