"""Thoughts about the same held-out texts at several steps of a training: files in a folder, and a page of all."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_callback import TrainerState

from qstar.data import AnyDataset
from qstar.grid import IGNORED
from qstar.inspection.data import Inspection
from qstar.inspection.history import Snapshot, history_page, snapshot
from qstar.inspection.page import page
from qstar.inspection.run import Tokens
from qstar.training.settings import QuietStarArguments
from qstar.whole_file import write_whole

FOLDER = Path("inspections")  # in that of a run
INDEX = FOLDER / "index.html"
_NAME = re.compile(r"step-(\d{6,})\.json")


@dataclass(frozen=True)
class HeldOut:
    """Texts to inspect.

    Attributes:
        documents: the texts.
        cut: whether there were more.
    """

    documents: list[Tokens]
    cut: bool

    @classmethod
    def of(cls, rows: Iterable[dict[str, list[int]]], most: int) -> HeldOut:
        """The documents in packed rows, from the first on, as many as have at most ``most`` tokens in all.

        What a document has in another row is one of its own, as in training. One that is longer than ``most`` is cut.
        Those in which nothing is to be predicted are left out.

        Raises:
            ValueError: nothing is to be predicted.
        """
        found: list[Tokens] = []
        left, cut = most, False
        for ids, labels in _documents(rows):
            if found and len(ids) > left:
                cut = True
                break
            if any(label != IGNORED for label in labels[1:left]):
                found.append(Tokens(ids[:left], labels[:left]))
                left -= len(ids)
        if not found:
            raise ValueError(
                f"inspect_tokens is {most}, but no text of eval_dataset has a token to predict within so many"
            )
        return cls(found, cut=cut or left < 0)


class InspectSteps(TrainerCallback):
    """Has the first held-out texts be inspected before the first step, after every so many, and after ``max_steps``.

    Args:
        inspect: what does so; all processes call it, with the number of updates and the texts.
        rows: packed rows that are held out, or several kinds of them by name.
        tokenizer: of the model.
        args: of the run.

    Raises:
        ValueError: there are no rows, or nothing is to be predicted in them; there is no tokenizer.
    """

    def __init__(
        self,
        inspect: Callable[[int, HeldOut], Inspection],
        rows: AnyDataset | dict[str, AnyDataset] | None,
        tokenizer: PreTrainedTokenizerBase | None,
        args: QuietStarArguments,
    ) -> None:
        for name, value in (("eval_dataset", rows), ("processing_class", tokenizer)):
            if value is None:
                raise ValueError(f"inspect_steps is {args.inspect_steps}, but {name} is missing, which that takes")
        if isinstance(rows, dict) and not rows:
            raise ValueError(f"inspect_steps is {args.inspect_steps}, but eval_dataset is empty")
        first = next(iter(rows.values())) if isinstance(rows, dict) else rows
        self._inspect, self._every = inspect, args.inspect_steps
        self._held_out = HeldOut.of(cast(Any, first), args.inspect_tokens)
        self._folder = InspectionFolder(args.folder)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self._folder.begin(state.global_step, self._every, [each.ids for each in self._held_out.documents])
        if state.global_step == 0:
            self._at(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self._every == 0 or state.global_step == state.max_steps:
            self._at(state)

    def _at(self, state: TrainerState) -> None:
        found = self._inspect(state.global_step, self._held_out)
        if state.is_world_process_zero:
            self._folder.add(state.global_step, found)
            if state.global_step == 0:
                tqdm.write(f"thoughts about held-out texts: {self._folder.index}")


class InspectionFolder:
    """The inspections of a run: ``step-000050.json`` with all that was found, its page beside it, ``index.html``."""

    def __init__(self, run: Path) -> None:
        self.folder, self.index = run / FOLDER, run / INDEX
        self._snapshots: dict[int, Snapshot] = {}

    def begin(self, step: int, every: int, documents: list[list[int]]) -> None:
        """Take up what a run that goes on from ``step`` would have inspected by then; all else comes again.

        Raises:
            ValueError: those were other texts than ``documents``; a file is not as it was written.
        """
        self._snapshots, last, gone = {}, None, False
        for path in sorted(self.folder.glob("step-*.json")):
            named = _NAME.fullmatch(path.name)
            if named is None:
                continue
            number = int(named[1])
            if step and number <= step and number % every == 0:
                last = self._taken_up(path, number, documents)
            else:
                path.unlink()
                path.with_suffix(".html").unlink(missing_ok=True)
                gone = True
        if last is not None:
            self._write_index(last)
        elif gone:
            self.index.unlink(missing_ok=True)

    def _taken_up(self, path: Path, step: int, documents: list[list[int]]) -> Inspection:
        try:
            found = Inspection.from_json(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} cannot be read: {error}; remove it, or move that folder away") from error
        self._keep(step, found)
        if self._snapshots[step].token_ids != documents:
            raise ValueError(
                f"{path} is of other texts than those that are to be inspected now: give the eval_dataset, the "
                "seq_length and the inspect_tokens that the run began with, or move that folder away"
            )
        return found

    def add(self, step: int, found: Inspection) -> None:
        """Write what was found after ``step`` updates, its page, and the page of all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._keep(step, found)
        place = self.folder / _name(step)
        write_whole(place.with_suffix(".html"), page(found) + "\n")
        write_whole(place.with_suffix(".json"), found.to_json() + "\n")
        self._write_index(found)

    def _write_index(self, last: Inspection) -> None:
        snapshots = [self._snapshots[each] for each in sorted(self._snapshots)]
        write_whole(self.index, history_page(str(self.folder.parent), last, snapshots) + "\n")

    def _keep(self, step: int, found: Inspection) -> None:
        self._snapshots[step] = snapshot(step, f"{_name(step)}.html", found)


def _name(step: int) -> str:
    return f"step-{step:06}"


def _documents(rows: Iterable[dict[str, list[int]]]) -> Iterator[Tokens]:
    for row in rows:
        ids = [int(token) for token in row["input_ids"]]
        labels = [int(label) for label in row.get("labels", ids)]
        begins = [at for at, place in enumerate(row.get("position_ids", range(len(ids)))) if place == 0 or at == 0]
        for begin, end in zip(begins, [*begins[1:], len(ids)], strict=True):
            yield Tokens(ids[begin:end], labels[begin:end])
