"""Answers that are read out of text: numbers, letters and words, as the text announces them or not."""

from __future__ import annotations

import re

import pytest

from qstar.evaluation.answers import Letters, Numbers, Words, normalised_number

CHOICES = ("bank", "library", "the yard", "new york", "york")


@pytest.mark.parametrize(
    "text, expected",
    [
        ("18", "18"),
        ("18.", "18"),
        ("18.0", "18"),
        ("18.50", "18.5"),
        ("$1,234,567.00", "1234567"),
        ("-3", "-3"),
        ("−3", "-3"),
        ("–3.20", "-3.2"),
        ("-$5", "-5"),
        ("$-5", "-5"),
        ("+5", "5"),
        ("007", "7"),
        ("-0.0", "0"),
        (".5", "0.5"),
        ("123456789012345678901234567890.5", "123456789012345678901234567890.5"),
        ("", None),
        (".", None),
        ("$", None),
        ("-", None),
        ("1.2.3", None),
        ("1e5", None),
        ("nan", None),
        ("18 apples", None),
        ("٣", None),
    ],
)
def test_numbers_are_compared_in_one_form(text, expected):
    assert normalised_number(text) == expected


NUMBERS_IN_TEXT = [
    ("3 + 4 = 7. The answer is 7.", "7", "strict"),
    ("The answer is $1,234.50. Or 9?", "1234.5", "strict"),
    ("The answer is −12.", "-12", "strict"),
    ("The answer is -$12", "-12", "strict"),
    ("So the answer is: 6 apples, not 5.", "6", "strict"),
    ("2*9 = 18\n#### 18", "18", "strict"),
    ("The answer is 5. The answer is 6.", "5", "strict"),
    ("The answer is unknown, 4 or 5.", "5", "flexible"),
    ("She pays $18.", "18", "flexible"),
    ("So 10, then 20...", "20", "flexible"),
    ("from 12 to -30 degrees", "-30", "flexible"),
    ("it is 1,200", "1200", "flexible"),
    ("no idea ...", None, None),
    ("", None, None),
]


@pytest.mark.parametrize("text, said, by", NUMBERS_IN_TEXT)
def test_numbers_are_read_as_announced_else_the_last_one(text, said, by):
    assert Numbers().read(text) == (said, by)


def test_numbers_agree_with_the_patterns_of_the_harness():
    """Its regular expressions and what it leaves out of an answer, on texts in which it finds a number."""

    def harness(text: str) -> str:
        if strict := re.findall(r"The answer is (\-?[0-9\.\,]+).", text):
            found = strict[0]
        else:
            found = next(each for each in re.findall(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", text)[-1] if each)
        return re.sub(r"[,$]|\.$", "", found)

    texts = [
        "So 3 - 4 = -1. The answer is -1.",
        "The answer is 1,024.",
        "She has $20 and 5-3 left",
        "It costs $1,000.",
        "about 3.75 hours",
        "12 of 13",
    ]
    assert [Numbers().read(text).said for text in texts] == [normalised_number(harness(text)) for text in texts]


@pytest.mark.parametrize(
    "text, said",
    [(" 18 apples, of 20", "18"), ("... about $1,000.00", "1000"), (" −4", "-4"), (" none", None)],
)
def test_the_first_number_of_a_text(text, said):
    assert Numbers().first(text) == (said, said and "first")


@pytest.mark.parametrize(
    "text, said, by",
    [
        ("Books are there. The answer is (B).", "B", "strict"),
        ("So the answer is B", "B", "strict"),
        ("The answer is: (B) library.", "B", "strict"),
        ("The answer is library, not (A).", "B", "strict"),
        ("The answer is the library.", "B", "strict"),
        ("The answer is New York.", "D", "strict"),
        ("The answer is the yard", "C", "strict"),
        ("The answer is not clear. The answer is (D).", "D", "strict"),
        ("The answer is (F). Or (A)?", "A", "flexible"),
        ("Not (A), so (C)", "C", "flexible"),
        ("A library has books, so B.", "B", "flexible"),
        ("A bank has money", "A", "flexible"),
        ("from the bank to the library", "B", "flexible"),
        ("in New York", "D", "flexible"),
        ("in york", "E", "flexible"),
        ("librarybank", None, None),
        ("Fable", None, None),
        ("", None, None),
    ],
)
def test_letters_are_read_as_announced_else_as_they_stand(text, said, by):
    assert Letters().read(text, CHOICES) == (said, by)


@pytest.mark.parametrize(
    "text, said", [(" (B)", "B"), (" B.\nQ", "B"), (" the library", "B"), (": D, not A", "D"), (" banks", None)]
)
def test_the_first_letter_of_a_text(text, said):
    assert Letters().first(text, CHOICES) == (said, said and "first")


def test_a_letter_beyond_the_choices_of_a_question_is_none():
    assert Letters(5).read("The answer is (C).", CHOICES[:2]).said is None
    assert Letters(5).read("The answer is (C).").said == "C"
    assert Letters(2).read("The answer is (C).").said is None


@pytest.mark.parametrize("count", [0, 1, 27])
def test_there_are_two_to_twenty_six_letters(count):
    with pytest.raises(ValueError, match=f"count is {count}, but there must be 2 to 26 choices"):
        Letters(count)


@pytest.mark.parametrize(
    "text, said, by",
    [
        ("It is far. The answer is  Paris, France.\nQ", "paris, france", "strict"),
        ("so\n#### Paris", "paris", "strict"),
        ("It is\n\n PARIS. \n", "paris", "flexible"),
        (" \n", None, None),
    ],
)
def test_words_are_read_as_announced_else_the_last_line(text, said, by):
    assert Words().read(text) == (said, by)


def test_the_first_line_of_words():
    assert Words().first("\n The  Moon.\nMars") == ("the moon", "first")
    assert Words().first("") == (None, None)
