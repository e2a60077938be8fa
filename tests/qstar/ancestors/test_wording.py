"""How questions are put, with and without hints and exemplars, and how answers are read."""

from __future__ import annotations

import pytest

from qstar.ancestors.star import is_right
from qstar.ancestors.wording import Wording
from qstar.evaluation.questions import Question

EXEMPLAR = Question("1+1?", "2", rationale="One and one.")
CHOICE = Question("Where?", "B", choices=("here", "there {question}"), labels=("A", "B"))


def test_a_question_stands_behind_its_exemplars_and_has_a_hint_where_one_is_asked_for():
    wording, asked = Wording(), Question("2+3?", "5", rationale="never shown")
    assert wording.ask(asked) == "Q: 2+3?\nA:"
    assert wording.ask(asked, [EXEMPLAR]) == "Q: 1+1?\nA: One and one. The answer is 2.\n\nQ: 2+3?\nA:"
    assert wording.ask(asked, [EXEMPLAR], hinted=True) == (
        "Q: 1+1? (The answer is 2.)\nA: One and one. The answer is 2.\n\nQ: 2+3? (The answer is 5.)\nA:"
    )
    assert wording.ask(CHOICE) == "Q: Where?\n(A) here\n(B) there {question}\nA:"


@pytest.mark.parametrize(
    ("said", "read"),
    [
        (" It is so. The answer is 18. Q: next. The answer is 3.", (" It is so. The answer is 18.", "18.")),
        (" So the answer is $1,234.50 a day", (" So the answer is $1,234.50", "1,234.50")),
        (" the answer is: -7", (" the answer is: -7", "-7")),
        (" the answer is B.", (" the answer is B.", "B.")),
        (" the answer is (B). So", (" the answer is (B).", "B")),
        (" 18", None),
        ("", None),
    ],
)
def test_the_first_answer_ends_the_rationale(said, read):
    assert Wording().read(said) == read


@pytest.mark.parametrize(
    ("answer", "right"),
    [("18", True), ("18.", True), ("$18", True), (" 18 ", True), ("1,8", True), ("18.0", True), ("-18", False)],
)
def test_answers_are_compared_without_signs_of_writing(answer, right):
    assert is_right(answer, Question("", "18")) == right
    assert is_right("1234", Question("", "$1,234"))
    assert is_right("(B)", CHOICE) and not is_right("A", CHOICE)
    assert is_right("The  Sea.", Question("", "the sea")) and not is_right("7", Question("", "the sea"))


@pytest.mark.parametrize(
    ("templates", "message"),
    [
        (dict(prompt="Q:"), r"prompt is 'Q:', but it must hold \{question\}, and no other field"),
        (dict(prompt="{question} {answer}"), r"prompt is '.*', but it must hold \{question\}, and no other field"),
        (dict(hinted_prompt="{question}"), r"hinted_prompt is .* must hold \{answer\} and \{question\}, and no other"),
        (dict(exemplar="{answer}"), r"exemplar is '\{answer\}', but it must hold \{answer\} and \{rationale\}"),
        (dict(prompt="{question"), "prompt is '{question', which is no template: expected '}'"),
        (dict(answer_pattern="("), r"answer_pattern is '\(', which is no pattern: missing \)"),
        (dict(answer_pattern="x"), "answer_pattern is 'x', but it must have one group: the answer"),
    ],
)
def test_templates_that_would_leave_something_out_or_give_it_away_are_refused(templates, message):
    with pytest.raises(ValueError, match=message):
        Wording(**templates)
