"""The embedded default: the whole job on a task that a laptop can learn in minutes, and an honest table at its end."""

from __future__ import annotations

import copy
import json
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from huggingface_hub.constants import HF_HOME
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, set_seed

from qstar.config import setting_names
from qstar.cpu import one_thread
from qstar.data import pack
from qstar.embedded.pretrain import pretrained_model
from qstar.embedded.task import EQUALS, WORKING, Problems, documents, problems
from qstar.evaluation.scoring import OWN, Request, Thoughts, score_requests
from qstar.evaluation.tables import table
from qstar.model import QuietStarModel
from qstar.talking import text_loss
from qstar.training.card import Source, Sources
from qstar.training.fit import TrainResult, fit
from qstar.training.folders import run_folder
from qstar.training.inspections import INDEX
from qstar.training.lora import LoraSettings
from qstar.training.prepare import split_settings
from qstar.training.settings import UNSEEN, QuietStarArguments
from qstar.training.trainer import QuietStarTrainer
from qstar.wrapping import wrap

CACHE = Path(HF_HOME) / "quiet-star"
REPORT_FILE = "report.json"
PROBLEMS_FILE = "problems.jsonl"
PROBLEMS = 500
WRITTEN_PROBLEMS = 200
BATCH = 100  # problems that are answered at a time

REFUSED = (
    *("model", "dataset", "tokenizer", "eval_dataset", "resume_from_checkpoint"),
    *("start_init", "end_init", "num_train_epochs"),
    *("text_format", "documents", "dataset_config", "dataset_split", "eval_config", "eval_split"),
    *setting_names(LoraSettings),
)
SIZES: dict[str, Any] = dict(thought_tokens=5, ahead_tokens=1, rationales=2)
SETTINGS: dict[str, Any] = dict(
    learning_rate=3e-4,
    mixing_head_lr_factor=10.0,
    thought_embedding_lr_factor=1.0,
    per_device_train_batch_size=12,
    seq_length=48,
    max_steps=60,
    warmup_steps=0,
    weight_decay=0.0,
    logging_steps=5,
    sample_steps=20,
    gradient_norm_steps=20,
    inspect_steps=10,
    max_grid_tokens=0,
    save_strategy="no",
)


@dataclass(frozen=True)
class Score:
    """How a model answers held-out problems.

    Attributes:
        log_likelihood: mean log-probability of the right answer among the permitted ones, nats.
        probability: mean probability of the right answer among the permitted ones, the paper's "accuracy".
        accuracy: share of problems whose most probable permitted answer is right.
    """

    log_likelihood: float
    probability: float
    accuracy: float


@one_thread()
def train_embedded(output_dir: str | Path | None = None, **settings: Any) -> TrainResult:
    """Pre-train a small decoder, teach it to think, train a copy plainly beside it, and compare on held-out problems.

    Args:
        output_dir: folder for the model, its metrics, ``report.json``, ``problems.jsonl`` with some of the problems for
            ``qstar generate``, and ``plain/`` with the copy; by default the first free one of ``runs/quiet-star``,
            ``runs/quiet-star-2``, ...
        settings: changes to ``SIZES`` and ``SETTINGS``: any field of :class:`qstar.config.ThoughtSettings` but
            ``start_init`` and ``end_init``, and of :class:`qstar.QuietStarArguments`.

    Raises:
        TypeError: a setting that does not exist.
        ValueError: a setting with a wrong value, or one that the embedded default cannot use.
        FileExistsError: ``output_dir`` holds an earlier run.
        BlockingIOError: another run is in ``output_dir`` at this time.
    """
    for name in REFUSED:
        if name in settings:
            raise ValueError(
                f"{name} is {settings[name]!r}, but the embedded default has its own: qstar.train() takes it"
            )
    thoughts, settings = split_settings("train_embedded()", settings)
    with run_folder(output_dir, resume=None) as folder:
        return _train_and_compare(folder, thoughts, settings)


def _train_and_compare(folder: Path, thoughts: dict[str, Any], settings: dict[str, Any]) -> TrainResult:
    began = time.monotonic()
    unused = set() if thoughts.get("mixing_head", True) else {"mixing_head_lr_factor"}
    if settings.get("stages") is not None:
        unused.add("max_steps")
    settings = {name: value for name, value in SETTINGS.items() if name not in unused} | settings
    args = QuietStarArguments(output_dir=str(folder), **settings)

    print("1/4  a small decoder learns to write and to read workings")
    decoder, tokenizer = pretrained_model(CACHE, args.seed)
    set_seed(args.seed)
    model = wrap(decoder, tokenizer, start_init=WORKING, end_init=EQUALS, **(SIZES | thoughts))
    plain = copy.deepcopy(model)
    asked = problems(PROBLEMS, args.seed, tokenizer)
    scores = {
        "before, without thoughts": score(model, asked, None),
        "before, with untrained thoughts": score(model, asked, OWN),
    }

    print("2/4  it learns to think")
    rows = training_rows(tokenizer, args)
    written = problems(WRITTEN_PROBLEMS, args.seed, tokenizer)
    held_out = problem_rows(written, tokenizer, args)
    sources = Sources(Source(f"a {type(decoder).__name__}, pre-trained on such sums"), Source("sums modulo ten"))
    metrics = fit(model, tokenizer, args, rows, held_out, sources=sources)

    print("3/4  beside it, a copy goes through as many steps of plain training")
    plain_args = QuietStarArguments(**(settings | UNSEEN | dict(output_dir=str(folder / "plain"), push_to_hub=False)))
    PlainTrainer(plain, plain_args, train_dataset=rows, processing_class=tokenizer).train()
    plain.save_pretrained(folder / "plain")

    print("4/4  both answer problems that they have not seen")
    digits = random_digits(asked, model.qstar.thought_tokens, args.seed)
    scores |= {
        "plain training, without thoughts": score(plain, asked, None),
        "trained to think, without thoughts": score(model, asked, None),
        "trained to think, random digits as thoughts": score(model, asked, list(digits[:, None])),
        "trained to think, with its thoughts": score(model, asked, OWN),
    }
    seconds = round(time.monotonic() - began)
    report = {name: asdict(value) for name, value in scores.items()}
    summary = dict(problems=PROBLEMS, steps=args.max_steps, seed=args.seed, seconds=seconds, scores=report)
    (folder / REPORT_FILE).write_text(json.dumps(summary, indent=2) + "\n")
    chance = f"chance is 1 in {len(asked.choices)}"
    print(f"\n{report_table(scores)}\n\n{PROBLEMS} held-out problems, {chance}; {seconds} s in all")
    write_problems(folder / PROBLEMS_FILE, written, tokenizer)
    if args.inspect_steps:
        print(f"see its thoughts: open {folder / INDEX} in a browser")
    print(f"try it: qstar generate {folder} --prompts {folder / PROBLEMS_FILE} --max-new-tokens 1")
    return TrainResult(model, tokenizer, {**metrics, "report": report}, folder)


class PlainTrainer(QuietStarTrainer):
    """The same Trainer on the likelihood of the text alone."""

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of the text, and it as an output as well where asked for."""
        count = None if self.counts is None else self.counts.text
        loss = self._as_part(model(**inputs, objective=partial(text_loss, count=count)))
        return (loss, {"loss": loss}) if return_outputs else loss


def training_rows(tokenizer: PreTrainedTokenizerBase, args: QuietStarArguments) -> Dataset:
    """As many packed rows as the training takes; every document is seen once."""
    rows = args.max_steps * args.train_batch_size * args.gradient_accumulation_steps
    shortest = min(len(tokenizer(text)["input_ids"]) + 1 for text in documents(100, args.seed))
    texts = documents(rows * args.seq_length // shortest + 1, args.seed + 1)
    return pack(Dataset.from_dict({args.text_column: texts}), tokenizer, args.seq_length, args.text_column)


def problem_rows(asked: Problems, tokenizer: PreTrainedTokenizerBase, args: QuietStarArguments) -> Dataset:
    """Problems with their answers as packed rows, none of them cut where a row has room for one."""
    texts = [tokenizer.decode([*each, answer]) for each, answer in zip(asked.prompts, asked.answers, strict=True)]
    tokens = len(tokenizer(texts[0])["input_ids"]) + 1
    length = args.seq_length // tokens * tokens or args.seq_length
    return pack(Dataset.from_dict({args.text_column: texts}), tokenizer, length, args.text_column)


def write_problems(path: Path, asked: Problems, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write problems as lines of JSON with ``prompt`` and ``answer``."""
    rows = (
        {"prompt": tokenizer.decode(prompt), "answer": tokenizer.decode(answer)}
        for prompt, answer in zip(asked.prompts, asked.answers, strict=True)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def score(model: QuietStarModel, asked: Problems, thoughts: Thoughts) -> Score:
    """How ``model`` answers, see :func:`qstar.evaluation.scoring.score_requests`."""
    requests = [Request(prompt, [answer]) for prompt, answer in zip(asked.prompts, asked.answers, strict=True)]
    found = score_requests(model, requests, thoughts=thoughts, permitted=asked.choices, batch_size=BATCH)
    scores = [each for _, each in found]
    right = torch.stack([each.permitted_log_prob[0] for each in scores])
    return Score(
        log_likelihood=right.mean().item(),
        probability=right.exp().mean().item(),
        accuracy=sum(bool(each.permitted_best) for each in scores) / len(scores),
    )


def random_digits(asked: Problems, count: int, seed: int) -> Tensor:
    """``count`` random digits for each problem, ``[P, count]``."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(asked.choices), (len(asked.prompts), count), generator=generator)
    return torch.tensor(asked.choices)[drawn]


def report_table(scores: dict[str, Score]) -> str:
    """The scores as a text table."""
    header = ["answers to held-out problems", "log-likelihood", "probability", "accuracy"]
    rows = [
        [name, f"{value.log_likelihood:.3f}", f"{value.probability:.1%}", f"{value.accuracy:.1%}"]
        for name, value in scores.items()
    ]
    return table(header, rows)
