"""How questions are put, with and without hints and exemplars, and how answers are read; questions out of files."""

from __future__ import annotations

import pytest

from qstar.ancestors.question_files import read_question_file
from qstar.ancestors.shares import shown, wilson
from qstar.ancestors.wording import Wording, is_right
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
    [("18", True), ("18.", True), ("$18", True), (" 18 ", True), ("1,8", True), ("18.0", False), ("-18", False)],
)
def test_answers_are_compared_without_signs_of_writing(answer, right):
    assert is_right(answer, Question("", "18")) == right
    assert is_right("1234", Question("", "$1,234")) and is_right("b", Question("", "B"))


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


def test_an_interval_is_wilsons():
    """Newcombe, 1998, table I: 81 of 263, 15 of 148, 0 of 20 and 1 of 29; and its mirror image."""
    for right, total, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611)):
        assert wilson(right, total) == pytest.approx((low, high), abs=5e-5)
        assert wilson(total - right, total) == pytest.approx((1 - high, 1 - low), abs=5e-5)
    assert wilson(1, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)
    assert shown(81, 263) == "30.8% (25.5-36.6)"


def test_questions_are_read_from_a_file_by_its_columns(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text('{"q": "1+1?", "a": "2", "r": "One and one."}\n{"q": "2+3?", "a": "5", "r": "Two and three."}\n')
    assert read_question_file(path, "q", "a") == (Question("1+1?", "2"), Question("2+3?", "5", number=1))
    first, _ = read_question_file(path, "q", "a", "r", needs_rationales=True)
    assert first == EXEMPLAR
    with pytest.raises(ValueError, match="has no column 'question', but 'q', 'a', 'r'"):
        read_question_file(path)
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl' should hold questions, but there is no such file"):
        read_question_file(tmp_path / "none.jsonl")
    (tmp_path / "questions.csv").write_text("q,a\n")
    with pytest.raises(ValueError, match=r"such a file must end in \.jsonl or \.json"):
        read_question_file(tmp_path / "questions.csv")
