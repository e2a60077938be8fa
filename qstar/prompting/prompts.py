"""Prompts: where they come from, their tokens, and whether a model has room for them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qstar.data.files import decoded_lines, json_rows
from qstar.generation.model import GeneratingModel
from qstar.generation.refusals import check_room
from qstar.generation.settings import GenerationSettings
from qstar.model import check_positions

PROMPT, ANSWER = "prompt", "answer"  # columns
JSON = (".jsonl", ".json")


@dataclass(frozen=True)
class Prompt:
    """What is to be continued.

    Attributes:
        text: of it.
        answer: what the continuation should be; None where nobody says.
    """

    text: str
    answer: str | None = None


def read_prompts(path: Path, prompt_column: str | None = None, answer_column: str | None = None) -> list[Prompt]:
    """The prompts in a file: objects in JSON, or a prompt a line in ``.txt``.

    Args:
        path: of the file.
        prompt_column: ``"prompt"`` where None.
        answer_column: ``"answer"`` where None, if the first object has that.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is of another kind or cannot be read, with the place; it has no columns.
    """
    if not path.is_file():
        raise FileNotFoundError(f"prompts is {str(path)!r}, but there is no such file")
    if path.suffix in JSON:
        return _from_json(path, prompt_column or PROMPT, answer_column)
    if path.suffix != ".txt":
        raise ValueError(f"prompts is {str(path)!r}, but a file must end in {', '.join((*JSON, '.txt'))}")
    for name, column in (("prompt_column", prompt_column), ("answer_column", answer_column)):
        if column is not None:
            raise ValueError(f"{name} is {column!r}, but {str(path)!r} has lines and no columns")
    return prompts_of_lines((line for _, line in decoded_lines(path, str(path))), str(path))


def prompts_of_lines(lines: Iterable[str], name: str) -> list[Prompt]:
    """A prompt a line.

    Raises:
        ValueError: there are none; ``name`` says where.
    """
    found = [Prompt(line.rstrip("\r\n")) for line in lines]
    if not found:
        raise ValueError(f"{name} holds no prompts")
    return found


def _from_json(path: Path, prompt_column: str, answer_column: str | None) -> list[Prompt]:
    name = str(path)
    first = next(json_rows(name, name, None, None))
    if answer_column is None and ANSWER in first:
        answer_column = ANSWER
    columns = (prompt_column,) if answer_column is None else (prompt_column, answer_column)
    found = []
    for number, row in enumerate(json_rows(name, name, columns, None), 1):
        for column in columns:
            if not isinstance(row[column], str):
                raise ValueError(f"{name}, row {number}: column {column!r} holds a chat, but it must hold text")
        found.append(Prompt(row[prompt_column], None if answer_column is None else row[answer_column]))
    return found


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, prompts: Iterable[Prompt]) -> list[list[int]]:
    """The tokens of prompts, with those that the tokenizer sets before a text.

    Raises:
        ValueError: a prompt has no tokens, or words that the tokenizer does not know; it is named by its number from 1.
    """
    return [_tokens(tokenizer, prompt.text, number) for number, prompt in enumerate(prompts, 1)]


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str, number: int) -> list[int]:
    bare = tokenizer(text, add_special_tokens=False, return_offsets_mapping=tokenizer.is_fast, verbose=False)
    if not bare["input_ids"]:
        raise ValueError(f"prompt {number} is {text!r}, but it must have at least one token")
    unknown = tokenizer.unk_token_id
    # A tokenizer of bytes knows all words, and may have the end of a text for its unknown token.
    if unknown is not None and unknown not in (tokenizer.eos_token_id, tokenizer.bos_token_id):
        places = [place for place, token in enumerate(bare["input_ids"]) if token == unknown]
        if places:
            begin, end = bare["offset_mapping"][places[0]] if tokenizer.is_fast else (0, len(text))
            raise ValueError(f"prompt {number} holds {text[begin:end]!r}, which the tokenizer does not know")
    return list(tokenizer(text, verbose=False)["input_ids"])


def padded(rows: list[list[int]], padding: int) -> tuple[Tensor, Tensor]:
    """Tokens ``[B, N]`` int64 with padding on the left, and their mask ``[B, N]`` int64."""
    width = max(map(len, rows))
    tokens = torch.tensor([[padding] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return tokens, mask


def check_length(model: PreTrainedModel, settings: GenerationSettings, length: int, max_new_tokens: int) -> None:
    """Raise ValueError where a prompt of ``length`` tokens and what follows outgrow the positions the model knows."""
    try:
        if isinstance(model, GeneratingModel) and (
            model.has_learned_to_think if settings.think is None else settings.think
        ):
            thought_tokens = settings.thought_tokens or model.qstar.thought_tokens
            check_room(model, thought_tokens, (length, length), max_new_tokens)
        else:
            check_positions(model, length + max_new_tokens - 1, 0)
    except ValueError as error:
        raise ValueError(f"{length} tokens are given and max_new_tokens is {max_new_tokens}, but {error}") from None
