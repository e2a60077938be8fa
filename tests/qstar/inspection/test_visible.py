"""What would steer a terminal or turn text around is shown."""

from __future__ import annotations

import sys
import unicodedata

import pytest

from qstar.inspection.visible import visible, visible_token


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, é 日本 😀 ⁺", "plain, é 日本 😀 ⁺"),
        ("\x1b[31mred\x07", "␛[31mred␇"),
        ("a\tb\r\nc\x00\x7f", "a␉b␍␊c␀␡"),
        ("\x9b31m\x85", "<U+009B>31m<U+0085>"),
        ("\u202eevil\u2066", "<U+202E>evil<U+2066>"),
        ("👩\u200d👧", "👩<U+200D>👧"),
        ("\u2028\u2029\ufeff\u00ad", "<U+2028><U+2029><U+FEFF><U+00AD>"),
        ("\ud83d", "<U+D83D>"),
        ("\U000e0041", "<U+E0041>"),
        ("", ""),
    ],
    ids=ascii,
)
def test_each_kind_of_character_is_shown_by_its_sign(text, shown):
    assert visible(text) == shown


def test_no_character_that_steers_is_left():
    whole = visible("".join(map(chr, range(sys.maxunicode + 1))))
    assert not {unicodedata.category(character) for character in whole} & {"Cc", "Cf", "Cs", "Zl", "Zp"}


@pytest.mark.parametrize(
    ("token", "shown"),
    [("", "·"), (" ", "␣"), ("  \n", "␣␣␊"), (" a b", " a b"), ("\u2028", "<U+2028>"), ("·", "·")],
    ids=ascii,
)
def test_a_token_is_seen_even_where_it_is_nothing_but_space(token, shown):
    assert visible_token(token) == shown
