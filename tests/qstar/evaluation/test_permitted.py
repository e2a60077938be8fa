"""Which tokens an answer may have, for each way in which tokenizers write spaces, bytes and parts of words."""

from __future__ import annotations

import re
import time

import pytest
import tiny
import tokenizers_of_kinds as kinds
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qstar.embedded.sums import SUMS
from qstar.embedded.task import NUMBERS, build_tokenizer
from qstar.evaluation.permitted import token_texts
from qstar.evaluation.tasks import find_task

DIGITS = ["0", "1", "18", "8"]
BYTE_LEVEL = [*"012346789", "18", "Ċ", "ĠĊ", *("Ġ" + digit for digit in DIGITS)]
SENTENCE_PIECE = ["<0x0A>", *(f"<0x{48 + digit:02X}>" for digit in range(10)), *DIGITS, *("▁" + x for x in DIGITS)]
WORD_PIECE = [*DIGITS, *("##" + digit for digit in DIGITS)]


@pytest.mark.parametrize(
    "kind, words",
    [(kinds.byte_level, BYTE_LEVEL), (kinds.sentence_piece, SENTENCE_PIECE), (kinds.word_piece, WORD_PIECE)],
)
def test_digits_and_the_newline_are_permitted_however_they_are_written(kind, words):
    tokenizer = kind()
    permitted = find_task("gsm8k").permitted(tokenizer)
    assert permitted == sorted(permitted)
    assert sorted(tokenizer.convert_ids_to_tokens(permitted)) == sorted(words)


@pytest.mark.parametrize(
    "kind, words",
    [
        (kinds.byte_level, [*"ABCDE", "ĠA", "ĠB", "Ċ", "ĠĊ"]),
        (kinds.sentence_piece, ["A", "B", "▁A", "▁B", "<0x0A>", *(f"<0x{byte:02X}>" for byte in range(65, 70))]),
        (kinds.word_piece, ["A", "B", "##A", "##B"]),
    ],
)
def test_letters_and_the_newline_are_permitted_for_choices(kind, words):
    tokenizer = kind()
    permitted = find_task("commonsense_qa").permitted(tokenizer)
    assert sorted(tokenizer.convert_ids_to_tokens(permitted)) == sorted(words)


@pytest.mark.parametrize("kind", [kinds.byte_level, kinds.sentence_piece])
@pytest.mark.parametrize("answer", ["18", "-1,810", "0"])
def test_the_tokens_of_an_answer_are_permitted_but_for_signs_and_commas(kind, answer):
    tokenizer = kind()
    permitted = find_task("gsm8k").permitted(tokenizer)
    context, whole = (tokenizer(text)["input_ids"] for text in ("Q: 8\nA:", f"Q: 8\nA: {answer}\n"))
    assert whole[: len(context)] == context
    texts = token_texts(tokenizer)
    said = whole[len(context) :]
    assert "".join(texts[token] for token in said) == f" {answer}\n"
    outside = "".join(texts[token] for token in said if token not in permitted)
    assert outside.replace(" ", "") == re.sub(r"\d", "", answer)


def test_any_token_is_permitted_where_no_letters_or_digits_are_scored(tmp_path):
    (tmp_path / "words.jsonl").write_text('{"question": "a", "answer": "Paris"}\n')
    tokenizer = kinds.byte_level()
    assert find_task("arc_easy").permitted(tokenizer) is None
    assert find_task(tmp_path / "words.jsonl").permitted(tokenizer) is None


def test_the_numbers_of_the_embedded_task_are_permitted():
    tokenizer = build_tokenizer()
    assert tokenizer.convert_ids_to_tokens(SUMS.permitted(tokenizer)) == list(NUMBERS)


def test_texts_are_kept_until_the_vocabulary_changes():
    tokenizer = tiny.tokenizer()
    before = token_texts(tokenizer)
    assert token_texts(tokenizer) is before
    assert before == {3 + place: f" {word}" for place, word in enumerate(["---", *"abcdefghijklmnopqrstuvwxyz"])}
    tokenizer.add_tokens(["12"])
    permitted = find_task("gsm8k").permitted(tokenizer)
    assert tokenizer.convert_ids_to_tokens(permitted) == ["12"]


def test_a_large_vocabulary_is_read_within_seconds():
    """Half a second of a core's time; a slow machine is given ten times as much."""
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(f"{number:05}" for number in range(128_000 - 256))]
    tokenizer = Tokenizer(models.BPE({word: token for token, word in enumerate(words)}, []))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    large = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    begin = time.process_time()
    permitted = find_task("gsm8k").permitted(large)
    assert time.process_time() - begin < 5
    assert len(permitted) == 10 + 1 + 127_744
