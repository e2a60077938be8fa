"""The base model, the text and the questions that everything is compared on."""

from __future__ import annotations

import hashlib
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from datasets import IterableDataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from qstar.commands.eval import named_tasks
from qstar.data import AnyDataset, DataSettings, PadRight, read_rows, read_texts
from qstar.evaluation.questions import Questions, read_questions
from qstar.evaluation.tasks import Task
from qstar.model import QuietStarModel
from qstar.training.prepare import read_model
from qstar.wrapping import load, wrap
from real.settings import VARIANTS, RealModelSettings, Variant


def is_held_out(text: str, one_in: int) -> bool:
    """Whether a document is held out, one in so many: by its SHA-256, so that it is the same on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) % one_in == 0


class Sources:
    """Reads what a run begins with, each when it is needed first, and once."""

    def __init__(self, model: str, dataset: str, tasks: str, settings: RealModelSettings):
        self.model, self.dataset, self.settings = model, dataset, settings
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.tasks, self.files = named_tasks(tasks, {})

    def base(self, variant: Variant = VARIANTS["paper"]) -> QuietStarModel:
        """The model before training, with the thoughts of a variant, whose weight is 0; on the CPU."""
        model, tokenizer = read_model(self.model, None)
        return wrap(model, tokenizer, check=False, **self.settings.thoughts_of(variant))

    def untrained(self, variant: Variant) -> QuietStarModel:
        """The same, where it is evaluated."""
        return self.placed(self.base(variant))

    def trained(self, folder: Path) -> QuietStarModel:
        """The model that was saved in a folder."""
        return self.placed(load(folder, dtype=torch.float32)[0])

    def placed(self, model: QuietStarModel) -> QuietStarModel:
        """A model on the GPU, where there is one, to be evaluated."""
        nn.Module.to(model, self.device)
        return model.eval()

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base's, with the tokens that open and close a thought."""
        model, tokenizer = read_model(self.model, None)
        wrap(model, tokenizer, check=False)
        return tokenizer

    @cached_property
    def training_rows(self) -> AnyDataset:
        """Packed rows of the documents that are not held out; of a stream as often as they are asked for."""
        rows = self._rows(held_out=False)
        return rows.repeat(None) if isinstance(rows, IterableDataset) else rows

    @cached_property
    def held_out_batches(self) -> list[dict[str, Tensor]]:
        """Packed rows of those that are."""
        rows: Any = list(islice(self._rows(held_out=True), self.settings.held_out_rows))
        pad = PadRight(self.tokenizer.pad_token_id or 0)
        return list(DataLoader(rows, self.settings.text_batch_size, collate_fn=pad))

    def _rows(self, *, held_out: bool) -> AnyDataset:
        column, one_in = self.settings.text_column, self.settings.held_out
        reading = DataSettings(
            seq_length=self.settings.seq_length, text_column=column, dataset_config=self.settings.dataset_config
        )
        texts = read_texts(self.dataset, "train", reading, reading.dataset_config)
        chosen = texts.filter(lambda row: is_held_out(row[column], one_in) == held_out)
        return read_rows(chosen, self.tokenizer, reading, self.dataset)

    def questions(self, task: Task) -> Questions:
        """Those of a task."""
        return read_questions(task, self.files.get(task.name), max_questions=self.settings.max_questions)
