"""What an objective does to thoughts that are rewarded by chance: nothing is to be learned, so nothing should change.

    python experiments/noise_rewards.py [--updates 500] [--learning-rate 3e-5] [--seeds 0 1 2] [--output-dir runs/noise]

The decoder of the first rung thinks about its text. Instead of the log-probability of what follows, every thought gets
a number from the normal distribution; the rest of the objective, from the baseline to the gradient, is that of
training, and the text itself is not learned. What is followed is the entropy of the distribution that each token of a
thought is drawn from. A rule that sharpens it here sharpens it whatever the rewards say. A rule without a direction
walks at random, by so much less the smaller the learning rate. Writes ``noise.md``, ``noise.json`` and, where
matplotlib is there, ``noise.png``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from common.folders import made_with, write_json
from common.jobs import pretrained
from common.markdown import markdown_table, with_interval
from common.results import result_of
from common.seeds import over_seeds
from qstar.cpu import keep_freed_memory, one_thread
from qstar.grid import ThoughtGrid
from qstar.learning import PAPER, Objective, advantages
from qstar.model import QuietStarModel
from qstar.talking import Talk
from qstar.training.curves import can_draw
from qstar.training.folders import alone_in
from qstar.whole_file import write_whole
from qstar.wrapping import wrap
from tasks.every import TASKS

UPDATES, EVERY = 500, 10
ROWS = 16  # documents in an update
LEARNING_RATE = 3e-5  # a tenth of that of the embedded default
RULES: dict[str, dict[str, Any]] = {
    "clamped, temperature 3 (paper)": PAPER,
    "clamped, temperature 1": PAPER | dict(reinforce_temperature=1.0),
    "signed, temperature 3": PAPER | dict(signed=True),
    "signed, temperature 1": PAPER | dict(signed=True, reinforce_temperature=1.0),
    "signed, leave-one-out, temperature 1 (rlp)": dict(
        signed=True, reinforce_temperature=1.0, baseline="leave_one_out"
    ),
}


@dataclass
class NoiseObjective(Objective):
    """The objective with rewards by chance, and the entropy of the policy.

    Attributes:
        entropies: mean entropy of a token of a thought, nats, of each call.
    """

    entropies: list[float] = field(default_factory=list)

    def advantage(self, spoken: Talk, grid: ThoughtGrid) -> Tensor:
        """Advantages ``[B, N, r]`` of scores by chance."""
        generator = torch.Generator().manual_seed(self.seed)
        scores = torch.randn(spoken.log_talk.shape[:3], generator=generator)
        found = advantages(scores, torch.zeros(scores.shape[:2]), self.baseline)
        return found if self.signed else found.clamp(min=0)

    def policy_loss(
        self, model: QuietStarModel, policy: Tensor, thoughts: Tensor, advantage: Tensor, whole: Tensor
    ) -> Tensor:
        """The loss as it is; the entropies go into ``entropies``."""
        with torch.no_grad():
            log_p = model.language_head().logits(policy[whole]).log_softmax(-1)
            self.entropies.append(float(torch.special.entr(log_p.exp()).sum(-1).mean()))
        return super().policy_loss(model, policy, thoughts, advantage, whole)


@one_thread()
def entropies(rule: dict[str, Any], seed: int, updates: int, rate: float) -> dict[str, Any]:
    """The entropy before every ``EVERY``-th update and after the last, nats."""
    keep_freed_memory()
    task = TASKS["digits"]
    decoder, tokenizer = pretrained(task, seed)
    sizes: dict[str, Any] = dict(thought_tokens=task.thought_tokens, ahead_tokens=1, rationales=2)
    model = wrap(decoder, tokenizer, start_init=task.marker, end_init=task.close, **sizes)
    texts = task.answered((updates + 1) * ROWS, seed)
    tokens = torch.tensor([tokenizer(text)["input_ids"] for text in texts])
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    found: list[float] = []
    for update in range(updates + 1):
        objective = NoiseObjective(seed=(seed << 32) + update, **rule)
        loss = model(input_ids=tokens[update * ROWS : (update + 1) * ROWS], objective=objective).policy_loss
        if update % EVERY == 0 or update == updates:
            found += objective.entropies
        if update < updates:
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    return dict(entropy=found)


def table(found: dict[str, list[list[float]]]) -> str:
    """Entropies before and after, by rule."""
    header = ["advantages", "entropy before, nats", "after", "change, per cent"]
    rows = []
    for name, curves in found.items():
        before, after = [curve[0] for curve in curves], [curve[-1] for curve in curves]
        change = [100 * (last / first - 1) for first, last in zip(before, after, strict=True)]
        cells = [with_interval(fmean(values), over_seeds(values)) for values in (before, after)]
        rows.append([name, *cells, with_interval(fmean(change), over_seeds(change), sign="+", digits=1)])
    return markdown_table(header, rows)


def draw(found: dict[str, list[list[float]]], updates: int, path: Path) -> None:
    """Draw every seed's curve.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
    """
    from matplotlib.figure import Figure  # an extra; without pyplot, which would choose a window system

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for number, (name, curves) in enumerate(found.items()):
        for curve in curves:
            steps = [min(place * EVERY, updates) for place in range(len(curve))]
            axes.plot(steps, curve, color=f"C{number}", label=name if curve is curves[0] else None)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("updates by rewards of noise")
    axes.set_ylabel("entropy of a token of a thought, nats")
    axes.grid(alpha=0.3)
    axes.legend(loc="center right")
    figure.savefig(path, dpi=110)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit code."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--updates", type=int, default=UPDATES, metavar="N")
    flags.add_argument("--learning-rate", type=float, default=LEARNING_RATE, metavar="RATE")
    flags.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="S")
    flags.add_argument("--output-dir", type=Path, default=Path("runs/noise"), metavar="FOLDER")
    given = flags.parse_args(arguments)
    found: dict[str, list[list[float]]] = {}
    try:
        with alone_in(given.output_dir):
            for number, (name, rule) in enumerate(RULES.items()):
                for seed in given.seeds:
                    how = dict(rule=rule, seed=seed, updates=given.updates, rate=given.learning_rate)
                    path = given.output_dir / f"seed-{seed}" / f"{number}.json"
                    made = result_of(path, dict(name=name, rows=ROWS) | how, partial(entropies, **how))
                    found.setdefault(name, []).append(made["result"]["entropy"])
                    print(
                        f"{name}, seed {seed}: {found[name][-1][0]:.3f} -> {found[name][-1][-1]:.3f} nats", flush=True
                    )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    text = table(found)
    write_whole(given.output_dir / "noise.md", text + "\n")
    write_json(given.output_dir / "noise.json", made_with() | dict(learning_rate=given.learning_rate, entropies=found))
    if can_draw():
        draw(found, given.updates, given.output_dir / "noise.png")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
