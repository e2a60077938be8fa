"""What a model thinks like: each setting once, with its default and its help.

``wrap``, ``train``, the flags of ``qstar train`` and the file beside a saved model take them from these fields.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

CONFIG_FILE = "qstar_config.json"
SIZES = ("thought_tokens", "ahead_tokens", "rationales")  # no parameter depends on them


def setting(default: Any, help: str, **metadata: Any) -> Any:
    """A dataclass field with a line of help."""
    return field(default=default, metadata={"help": help, **metadata})


@dataclass(kw_only=True)
class ThoughtSettings:
    """How thoughts are made.

    Attributes:
        thought_tokens: K, sampled tokens in a thought.
        ahead_tokens: m, text tokens that a thought is scored on.
        rationales: r, thoughts at each position in training.
        mixing_head: weigh each thought by a mixing head, the paper's. Without one the weight is 1: the state after a
            thought predicts alone, as where a model reasons before it answers.
        sigmoid: hold the mixing weight in 0..1; unbounded by default, as in the authors' code.
        pauses: nothing is sampled, and every thought is K times the token that opens it: what a model gains by such
            pauses it gains by computing for longer (Goyal et al., 2023, arXiv 2310.02226), not by what it thinks.
        start_token: the token that opens a thought.
        end_token: the token that closes it.
        start_init: text whose embedding (the mean, where it is several tokens) the start token begins with; empty or
            None for the mean of the vocabulary.
        end_init: the same for the end token.
    """

    _argument_group_name = "thoughts"

    thought_tokens: int = setting(8, "K: sampled tokens in a thought.")
    ahead_tokens: int = setting(4, "m: text tokens that a thought is scored on.")
    rationales: int = setting(2, "r: thoughts at each position in training.")
    mixing_head: bool = setting(
        True, "Weigh each thought by a mixing head; otherwise the state after the thought predicts alone."
    )
    sigmoid: bool = setting(False, "Hold the mixing weight in 0..1; unbounded otherwise.")
    pauses: bool = setting(False, "Sample nothing: every thought is K times the token that opens it, a pause.")
    start_token: str = setting("<|startthought|>", "The token that opens a thought.")
    end_token: str = setting("<|endthought|>", "The token that closes a thought.")
    start_init: str | None = setting("---", "Text whose embedding the start token begins with; empty for the mean.")
    end_init: str | None = setting("---", "Text whose embedding the end token begins with; empty for the mean.")

    @property
    def sizes(self) -> dict[str, Any]:
        """K, m and r by their names."""
        return {name: getattr(self, name) for name in SIZES}

    def __post_init__(self) -> None:
        for name in SIZES:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} is {value!r}, but it must be an integer of at least 1")
        for name in ("mixing_head", "sigmoid", "pauses"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise ValueError(f"{name} is {value!r}, but it must be True or False")
        if self.sigmoid and not self.mixing_head:
            raise ValueError("sigmoid is True, but mixing_head is False: there is no weight to hold in 0..1")
        for name in ("start_init", "end_init"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise ValueError(f"{name} is {value!r}, but it must be a text, or None for the mean of the vocabulary")
        for name in ("start_token", "end_token"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value:
                raise ValueError(f"{name} is {value!r}, but it must be the text of a token")
        if self.start_token == self.end_token:
            raise ValueError(f"end_token is {self.end_token!r}, but it must differ from start_token")


@dataclass(kw_only=True)
class QuietStarConfig(ThoughtSettings):
    """The settings of a model that thinks; saved beside it.

    Attributes:
        start_token_id: id of the token that opens a thought.
        end_token_id: id of the token that closes it.
        base_model: hub name or folder of the model as it was before it learned to think; None where nobody knows.
        base_revision: of it on the hub.
    """

    start_token_id: int
    end_token_id: int
    base_model: str | None = None
    base_revision: str | None = None

    @classmethod
    def load(cls, folder: str | Path) -> QuietStarConfig:
        """Read ``qstar_config.json`` of ``folder``.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it holds settings that are not known here.
        """
        path = Path(folder) / CONFIG_FILE
        if not path.is_file():
            raise FileNotFoundError(f"{folder} holds no {CONFIG_FILE}: it is not the folder of a Quiet-STaR model")
        values = json.loads(path.read_text())
        unknown = set(values) - setting_names(cls)
        if unknown:
            raise ValueError(f"{path} holds unknown settings: {', '.join(sorted(unknown))}")
        return cls(**values)


def setting_names(kind: type) -> set[str]:
    """The names of a dataclass's fields."""
    return {each.name for each in fields(kind)}


def check_names(call: str, given: Collection[str], known: Collection[str]) -> None:
    """Raise TypeError for the first of ``given`` that ``call`` does not know, with the name that was meant."""
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(name, sorted(known), n=1)
            meant = f"; did you mean {close[0]!r}?" if close else ""
            raise TypeError(f"{call} has no setting {name!r}{meant}")
