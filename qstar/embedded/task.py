"""Running sums modulo ten: a corpus in which half of the documents show their working and half only the answer.

    Q 1 3 5 0 8 = 7                     the answer alone
    Q 1 3 5 0 8 = T 1 4 9 9 7 = 7       with the working: the sum of the first digit, of the first two, ...
    T 7 Q 1 3 5 0 8 = T 1 4 9 9 7 = 7   with the answer as a hint before the question, in a corpus of its own

The answer is the sum of all digits. Each step of the working is easy, the answer in one step is not. The working's
marker stands right after the first ``=``, where a thought about the answer begins.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MODULUS = 10
DIGITS = 5
WORKING_SHARE = 0.5
HINTED_SHARE = 0.25

QUESTION, EQUALS, WORKING = "Q", "=", "T"
END, UNKNOWN = "<|endoftext|>", "<|unknown|>"
NUMBERS = tuple(str(number) for number in range(MODULUS))
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Problems:
    """Problems as token ids, ``P`` of them.

    Attributes:
        prompts: up to and with the first ``=``; ``[P, DIGITS + 2]``.
        workings: the working, without its marker; ``[P, DIGITS]``.
        answers: ``[P]``.
        choices: the permitted answers, one for each number; ``[MODULUS]``.
        marker: what opens a working.
        equals: what closes it.
    """

    prompts: list[list[int]]
    workings: list[list[int]]
    answers: list[int]
    choices: list[int]
    marker: int
    equals: int


def documents(count: int, seed: int, split: str = "train") -> list[str]:
    """``count`` documents, the same for the same seed on every machine.

    Args:
        count: how many.
        seed: any integer.
        split: "train", "validation" or "test"; no problem is in two of them.
    """
    rng = random.Random(f"documents {split} {seed}")
    return [_document(_digits(rng, split), rng.random() < WORKING_SHARE) for _ in range(count)]


def documents_with_hints(count: int, seed: int, split: str = "train") -> list[str]:
    """As :func:`documents`, but some have the answer as a hint before the question, and then the working as well."""
    rng = random.Random(f"documents with hints {split} {seed}")
    made = []
    for _ in range(count):
        digits, hinted = _digits(rng, split), rng.random() < HINTED_SHARE
        made.append(_document(digits, hinted or rng.random() < WORKING_SHARE, hinted=hinted))
    return made


def problems(count: int, seed: int, tokenizer: PreTrainedTokenizerFast, split: str = "test") -> Problems:
    """``count`` problems to ask, the same for the same seed; of the test split by default."""
    rng = random.Random(f"problems {split} {seed}")
    drawn = [_digits(rng, split) for _ in range(count)]
    vocabulary = tokenizer.get_vocab()

    def ids(words: Iterable[object]) -> list[int]:
        return [vocabulary[str(word)] for word in words]

    sums = [running_sums(digits) for digits in drawn]
    return Problems(
        prompts=[ids([QUESTION, *digits, EQUALS]) for digits in drawn],
        workings=[ids(working) for working in sums],
        answers=ids(working[-1] for working in sums),
        choices=ids(NUMBERS),
        marker=vocabulary[WORKING],
        equals=vocabulary[EQUALS],
    )


def running_sums(digits: tuple[int, ...]) -> list[int]:
    """The sums of the first, the first two, ... digits, modulo ``MODULUS``."""
    return [total % MODULUS for total in accumulate(digits)]


def split_of(digits: tuple[int, ...]) -> str:
    """The split of a problem: a property of its digits, so that splits cannot overlap. One in 16 each is held out."""
    digest = hashlib.sha256(" ".join(map(str, digits)).encode()).digest()
    return {0: "test", 1: "validation"}.get(digest[0] % 16, "train")


def build_tokenizer(words: Iterable[str] = (QUESTION, EQUALS, WORKING, *NUMBERS)) -> PreTrainedTokenizerFast:
    """A tokenizer of ``words`` between spaces, one token each; by default those of the task.

    Padding and end of text are one token.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate([END, UNKNOWN, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=UNKNOWN,
        eos_token=END,
        pad_token=END,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


def _digits(rng: random.Random, split: str) -> tuple[int, ...]:
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}, but it must be one of {', '.join(map(repr, SPLITS))}")
    while True:
        digits = tuple(rng.randrange(MODULUS) for _ in range(DIGITS))
        if split_of(digits) == split:
            return digits


def _document(digits: tuple[int, ...], working: bool, *, hinted: bool = False) -> str:
    sums = running_sums(digits)
    hint = [WORKING, sums[-1]] if hinted else []
    shown = [WORKING, *sums, EQUALS] if working else []
    return " ".join(map(str, [*hint, QUESTION, *digits, EQUALS, *shown, sums[-1]]))
