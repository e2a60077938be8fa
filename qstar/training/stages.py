"""A curriculum: stages of one run, each with sizes of thoughts and a learning rate of its own.

No parameter depends on these, so that a stage goes on with all that the one before has learned, the optimizer's states
among it. Which stage an update is made in depends on its number alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from qstar.config import SIZES, check_names, setting_names
from qstar.grid import ThoughtGrid


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Some updates of a run; None stands for what it was in the stage before, in the first one for that of the run.

    Attributes:
        steps: updates.
        thought_tokens: K.
        ahead_tokens: m.
        rationales: r.
        learning_rate: of the base model; the schedule, with its warm-up, is over the steps of the stage.
        distil: teach the prediction without a thought what the model predicts with thoughts, see
            :class:`qstar.distilling.Distillation`. No thought is rewarded in it; mixing head and thought embeddings
            stay as they are.
    """

    steps: int
    thought_tokens: int | None = None
    ahead_tokens: int | None = None
    rationales: int | None = None
    learning_rate: float | None = None
    distil: bool = False

    @property
    def sizes(self) -> dict[str, Any]:
        """K, m and r by their names in the settings."""
        return {name: getattr(self, name) for name in SIZES}

    def check(self, name: str) -> None:
        """Raise ValueError where a value is wrong; ``name`` is that of the stage."""
        for size in ("steps", *SIZES):
            value = getattr(self, size)
            optional = value is None and size != "steps"
            if not optional and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name}: {size} is {value!r}, but it must be an integer of at least 1")
        if not isinstance(self.distil, bool):
            raise ValueError(f"{name}: distil is {self.distil!r}, but it must be True or False")
        rate = self.learning_rate
        if rate is not None and (isinstance(rate, bool) or not isinstance(rate, (int, float)) or not rate > 0):
            raise ValueError(f"{name}: learning_rate is {rate!r}, but it must be a number above 0")

    def after(self, earlier: Mapping[str, Any]) -> Stage:
        """This stage, where nothing is None any more: what is, is as in ``earlier``."""
        return Stage(**dict(earlier) | {name: value for name, value in asdict(self).items() if value is not None})


@dataclass(frozen=True)
class Curriculum:
    """The stages of a run, one after the other."""

    stages: tuple[Stage, ...]

    @property
    def steps(self) -> int:
        """Updates in all stages."""
        return sum(stage.steps for stage in self.stages)

    def find(self, step: int) -> tuple[int, int]:
        """Which stage update ``step`` is made in, and which update is its first, all counted from 0.

        What comes after the last update is of the last stage.
        """
        begins = [0, *accumulate(stage.steps for stage in self.stages[:-1])]
        return max((number, begin) for number, begin in enumerate(begins) if begin <= step)

    def at(self, step: int) -> Stage:
        """The stage that update ``step``, counted from 0, is made in."""
        return self.stages[self.find(step)[0]]

    def resolved(self, **first: Any) -> Curriculum:
        """The same stages, where nothing is None any more; ``first`` has what comes before the first one, by name."""
        stages: list[Stage] = []
        for stage in self.stages:
            stages.append(stage.after(asdict(stages[-1]) if stages else first))
        return Curriculum(tuple(stages))

    def largest(self) -> int:
        """Which stage, counted from 0, takes most to compute: of resolved stages the first with the largest grid.

        Stages that distil learn from one slot of a position, and are asked last.
        """
        sizes = [(not stage.distil, ThoughtGrid(positions=1, **stage.sizes).slots) for stage in self.stages]
        return sizes.index(max(sizes))

    def described(self) -> list[dict[str, Any]]:
        """The stages as JSON can hold them, and :func:`read_stages` takes them."""
        return [
            {name: value for name, value in asdict(stage).items() if value is not None and value is not False}
            for stage in self.stages
        ]


def read_stages(given: Any) -> Curriculum:
    """The stages that a run is given.

    Args:
        given: a mapping for each stage, with the fields of :class:`Stage`; or JSON of that, or the name of a ``.json``
            file with it.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError: a stage has a setting that does not exist.
        ValueError: what is no list of mappings; a wrong value.
    """
    stages = _parsed(given) if isinstance(given, str) else given
    if not isinstance(stages, Sequence) or isinstance(stages, str) or not stages:
        raise ValueError(f"stages is {given!r}, but it must be a list with the settings of each stage, at least one")
    found = []
    for number, values in enumerate(stages, 1):
        name = f"stage {number}"
        if not isinstance(values, Mapping):
            raise ValueError(f"{name} is {values!r}, but it must be settings with their values, steps at least")
        check_names(name, values, setting_names(Stage))
        if "steps" not in values:
            raise ValueError(f"{name}: steps is missing, the updates in it")
        found.append(Stage(**values))
        found[-1].check(name)
    return Curriculum(tuple(found))


def _parsed(text: str) -> Any:
    """What JSON says that is the text, or lies in the file of that name."""
    if text.endswith(".json"):
        if not Path(text).is_file():
            raise FileNotFoundError(f"stages is {text!r}, but there is no such file")
        text = Path(text).read_text(encoding="utf-8")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"stages is {text!r}, but it must be JSON or the name of a .json file: {error.msg} in line {error.lineno}"
        ) from error
