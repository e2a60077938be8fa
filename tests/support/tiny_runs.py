"""Training runs of a second: texts, settings that keep them quiet, and what they wrote."""

from __future__ import annotations

import json
import random
from pathlib import Path

import tiny
from datasets import Dataset

from qstar import TrainResult, train

QUIET = dict(
    report_to="none",
    disable_tqdm=True,
    sample_steps=0,
    gradient_norm_steps=0,
    curves=False,
    save_strategy="no",
    seq_length=12,
)


def texts(count: int = 24) -> Dataset:
    """Documents of random letters."""
    rng = random.Random(0)
    lines = [" ".join(rng.choice("abcdef") for _ in range(rng.randint(3, 20))) for _ in range(count)]
    return Dataset.from_dict({"text": lines})


def tiny_train(output_dir: Path, dataset=None, model=None, **settings) -> TrainResult:
    """Train a tiny model, by default for three steps."""
    options = QUIET | dict(
        thought_tokens=2, ahead_tokens=2, batch_size=2, learning_rate=1e-3, max_steps=3, warmup_steps=0
    )
    model = tiny.plain_model("llama") if model is None else model
    return train(
        model,
        texts() if dataset is None else dataset,
        tokenizer=tiny.tokenizer(),
        output_dir=output_dir,
        **(options | settings),
    )


def records(folder: Path) -> list[dict]:
    """What a run has logged."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def unequal_rows() -> list[dict]:
    """Rows of one length that are learned from to very different extents, documents packed into one of them."""
    learned = [(0, 3), (0, 12), (7, 9), (0, 12), (2, 12), (0, 12), (10, 12), (0, 5)]
    rows = []
    for seed, (begin, end) in enumerate(learned):
        ids = tiny.text(1, 12, seed)[0].tolist()
        labels = [token if begin <= i < end else -100 for i, token in enumerate(ids)]
        positions = [*range(5), *range(7)] if seed == 3 else list(range(12))
        rows.append({"input_ids": ids, "labels": labels, "position_ids": positions})
    return rows
