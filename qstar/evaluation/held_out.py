"""How well a model predicts text it has not seen, with and without thoughts."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from math import exp, inf, log
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from qstar.config import check_names, setting_names
from qstar.data import AnyDataset, DataSettings, PadRight, read_rows, read_texts
from qstar.evaluation.intervals import Interval, bootstrap
from qstar.grid import IGNORED
from qstar.model import QuietStarModel, embedding_rows
from qstar.talking import read_batch, talk
from qstar.thinking import evaluating, think

DIFFICULTIES = (0.0, 0.1, 0.5, 1.0, 2.0, 4.0, 8.0, inf)  # bounds in nats: fixed, so that sums over any data add up


@dataclass(frozen=True)
class Difficulty:
    """Next tokens that are about as hard to predict without thoughts, see ``DIFFICULTIES``.

    Hard tokens are those that fared badly without thoughts. So a prediction that is only another, and not better,
    seems to gain among the hardest and to lose among the easiest: compare with that of untrained thoughts.

    Attributes:
        least: of the negative log-likelihood without thoughts, nats; of all tokens in here.
        below: that it is below.
        tokens: how many there are.
        nll_base: mean without thoughts.
        nll_talk: mean after a thought.
    """

    least: float
    below: float
    tokens: int
    nll_base: float
    nll_talk: float


@dataclass(frozen=True)
class Evaluation:
    """Mean negative log-likelihood of held-out tokens, in nats.

    Attributes:
        tokens: how many tokens were predicted.
        nll_base: without thoughts.
        nll_talk: each token after a thought at the position before it.
        nll_base_ahead: for each ``k``, without thoughts, over the tokens that ``nll_talk_ahead`` covers; ``[m]``.
        nll_talk_ahead: for each ``k``, of ``x_{i+k+1}`` after the thought at ``i``; ``[m]``.
        mixing_weight: mean weight of a thought in the prediction of the next token.
        difficulties: the next tokens by how hard they are, those that there are.
        gain_intervals: 95 % intervals of ``nll_base_ahead - nll_talk_ahead``, over rows of the data, which are drawn
            whole: ``[m]``, or none where they were not asked for.
    """

    tokens: int
    nll_base: float
    nll_talk: float
    nll_base_ahead: tuple[float, ...]
    nll_talk_ahead: tuple[float, ...]
    mixing_weight: float
    difficulties: tuple[Difficulty, ...] = ()
    gain_intervals: tuple[Interval, ...] = ()

    def summary(self) -> dict[str, float]:
        """The headline numbers by name."""
        return {
            "tokens": self.tokens,
            "nll_base": self.nll_base,
            "nll_talk": self.nll_talk,
            "gain": self.nll_base - self.nll_talk,
            "perplexity_base": perplexity(self.nll_base),
            "perplexity_talk": perplexity(self.nll_talk),
            "mixing_weight": self.mixing_weight,
        }


def perplexity(nll: float) -> float:
    """``exp(nll)``; infinite where that is beyond a float."""
    return exp(nll) if nll < log(sys.float_info.max) else inf


@torch.no_grad()
def evaluate_rows(
    model: QuietStarModel,
    batches: Iterable[dict[str, Tensor]],
    *,
    temperature: float = 0.0,
    seed: int = 0,
    total: Callable[[Tensor], Tensor] | None = None,
    intervals: bool = False,
) -> Evaluation:
    """Evaluate on batches as :class:`qstar.data.PadRight` makes them.

    Args:
        model: from :func:`qstar.wrap` or :func:`qstar.load`.
        batches: what :meth:`qstar.grid.Text.from_inputs` takes, by name.
        temperature: thoughts are sampled at; greedy by default.
        seed: of the thoughts, where they are sampled.
        total: adds sums over all processes; None where there is one.
        intervals: find ``gain_intervals``, which takes a number for each row, of one process.

    Raises:
        ValueError: there is no token to predict; intervals of several processes.
    """
    if intervals and total is not None:
        raise ValueError("intervals are asked for of several processes, but each knows its own rows alone")
    device = embedding_rows(model).device
    steps = model.qstar.ahead_tokens
    sums = torch.zeros(4, steps, dtype=torch.float64, device=device)
    by_difficulty = torch.zeros(3, len(DIFFICULTIES) - 1, dtype=torch.float64, device=device)
    by_row: list[Tensor] = []
    row_offset = 0

    def add_up(model: QuietStarModel, **batch: Tensor) -> None:
        nonlocal row_offset
        text = read_batch(model, **batch)
        grid = model.grid(text.tokens.shape[1], rationales=1)
        thoughts = think(model, text, grid, temperature=temperature, seed=seed, row_offset=row_offset)
        row_offset += text.tokens.numel()
        spoken = talk(model, text, grid, thoughts)
        counts = spoken.targets != IGNORED
        log_base = spoken.log_base[:, grid.ahead_positions(device)]
        per_step = (counts, log_base * counts, spoken.log_talk[:, :, 0], spoken.weight[:, :, 0] * counts)
        sums.add_(torch.stack([values.double().sum((0, 1)) for values in per_step]))
        by_difficulty.add_(_sums_by_difficulty(counts[..., 0], log_base[..., 0], spoken.log_talk[:, :, 0, 0]))
        if intervals:
            by_row.append(torch.stack([values.double().sum(1) for values in per_step[:3]]).cpu())

    with evaluating(model):
        for batch in batches:  # through the forward, as in training: there a sharded model gathers its weights
            model(**{name: value.to(device) for name, value in batch.items()}, objective=add_up)
    both = torch.cat([sums.flatten(), by_difficulty.flatten()])
    both = (both if total is None else total(both)).cpu()
    counts, base, talked, weight = both[: sums.numel()].view_as(sums)
    if not counts[0]:
        raise ValueError("dataset holds no token to predict")
    means = [values / counts.clamp(min=1) for values in (base, talked, weight)]
    return Evaluation(
        tokens=int(counts[0]),
        nll_base=-float(means[0][0]),
        nll_talk=-float(means[1][0]),
        nll_base_ahead=tuple((-means[0]).tolist()),
        nll_talk_ahead=tuple((-means[1]).tolist()),
        mixing_weight=float(means[2][0]),
        difficulties=_difficulties(both[sums.numel() :].view_as(by_difficulty)),
        gain_intervals=_gain_intervals(torch.cat(by_row, dim=1)) if intervals else (),
    )


def _sums_by_difficulty(counts: Tensor, log_base: Tensor, log_talk: Tensor) -> Tensor:
    """Tokens and log-probabilities of the next tokens, all ``[B, N]``, added up by difficulty, ``[3, bins]``."""
    inner = torch.tensor(DIFFICULTIES[1:-1], dtype=torch.float64, device=counts.device)
    place = torch.bucketize(-log_base.double(), inner, right=True)
    here = (place[..., None] == torch.arange(len(DIFFICULTIES) - 1, device=place.device)) & counts[..., None]
    each = (counts, log_base, log_talk)
    return torch.stack([torch.where(here, values[..., None].double(), 0.0).sum((0, 1)) for values in each])


def _difficulties(sums: Tensor) -> tuple[Difficulty, ...]:
    """Means of what ``_sums_by_difficulty`` has added up, where there are tokens."""
    return tuple(
        Difficulty(least, below, int(tokens), -base / tokens, -talked / tokens)
        for least, below, (tokens, base, talked) in zip(DIFFICULTIES, DIFFICULTIES[1:], sums.T.tolist(), strict=False)
        if tokens
    )


def _gain_intervals(sums: Tensor) -> tuple[Interval, ...]:
    """For each k, from tokens and log-likelihoods without and with thoughts of every row, ``[3, rows, m]``."""
    counts, base, talked = sums.unbind()
    return tuple(bootstrap(gain, counts=count) for gain, count in zip((talked - base).T, counts.T, strict=True))


def evaluate(
    model: QuietStarModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: str | Path | AnyDataset,
    *,
    split: str = "test",
    batch_size: int = 8,
    max_rows: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    **reading: Any,
) -> Evaluation:
    """Evaluate on a dataset, see :func:`qstar.data.load_texts`.

    Args:
        model: from :func:`qstar.train` or :func:`qstar.load`.
        tokenizer: its tokenizer.
        dataset: a hub name, a file, a folder or a ``datasets`` object.
        split: of a hub dataset.
        batch_size: rows at a time.
        max_rows: stop after so many rows; None for all.
        temperature: thoughts are sampled at; greedy by default.
        seed: of the thoughts, where they are sampled.
        reading: any field of :class:`qstar.data.DataSettings` (``seq_length``, ``text_column``, ...).

    Raises:
        TypeError: a setting that does not exist.
        ValueError: a setting with a wrong value; the dataset cannot be read, or holds no token to predict.
    """
    check_names("evaluate()", reading, setting_names(DataSettings))
    settings = DataSettings(**reading)
    settings.check_data()
    settings.check_documents(dataset)
    rows = read_rows(read_texts(dataset, split, settings, settings.dataset_config), tokenizer, settings, dataset)
    kept: Any = list(islice(rows, max_rows))
    loader: DataLoader[Any] = DataLoader(kept, batch_size, collate_fn=PadRight(tokenizer.pad_token_id or 0))
    return evaluate_rows(model, loader, temperature=temperature, seed=seed, intervals=True)
