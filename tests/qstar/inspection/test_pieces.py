"""The pieces of a text make up the text, whatever the tokenizer splits."""

from __future__ import annotations

import pytest
import tokenizers_of_kinds as kinds

from qstar.inspection.pieces import Pieces

TEXTS = ["A: 18 0 \n", "é 😀 B", "18😀😀", "\x1b[31m\u202e0"]


@pytest.mark.parametrize("kind", [kinds.byte_level, kinds.sentence_piece], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("text", TEXTS)
def test_pieces_make_up_the_text(kind, text):
    tokenizer = kind()
    tokens = tokenizer(text)["input_ids"]
    pieces = Pieces(tokenizer).of_text(tokens)
    assert len(pieces) == len(tokens)
    assert "".join(pieces) == tokenizer.decode(tokens) == text


def test_the_token_that_ends_a_character_has_it():
    tokenizer = kinds.byte_level()
    tokens = tokenizer("0😀1")["input_ids"]
    assert Pieces(tokenizer).of_text(tokens) == ["0", "", "", "", "😀", "1"]


def test_a_character_that_never_ends_is_shown_at_the_end():
    tokenizer = kinds.byte_level()
    tokens = tokenizer("0😀")["input_ids"][:-1]
    assert Pieces(tokenizer).of_text(tokens) == ["0", "", "", "\ufffd"]


def test_special_tokens_are_text_as_well():
    tokenizer = kinds.byte_level()
    tokens = tokenizer("0<7>1")["input_ids"]
    assert Pieces(tokenizer).of_text(tokens) == ["0", "<7>", "1"]


def test_a_token_alone_has_its_space_and_a_part_of_a_character_its_number():
    tokenizer = kinds.sentence_piece()
    pieces = Pieces(tokenizer)
    names = tokenizer.get_vocab()
    assert pieces.alone(names["▁18"]) == " 18"
    assert pieces.alone(names["18"]) == "18"
    assert pieces.alone(names["<0xF0>"]) == f"<{names['<0xF0>']}>"
    assert pieces.of_thought([names["▁A"], names["B"]]) == [" A", "B"]


def test_a_row_of_the_vocabulary_that_is_no_token_has_its_number():
    tokenizer = kinds.byte_level()
    assert Pieces(tokenizer).alone(len(tokenizer) + 5) == f"<{len(tokenizer) + 5}>"


def test_no_tokens_have_no_pieces():
    assert Pieces(kinds.byte_level()).of_text([]) == []
