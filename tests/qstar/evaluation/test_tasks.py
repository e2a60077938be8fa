"""How tasks write their questions and judge answers: the paper's formats to the letter, and the harness' for ARC."""

from __future__ import annotations

import pytest

from qstar.evaluation.questions import Question
from qstar.evaluation.tasks import find_task

SUM = Question("What is 9 + 9?", "18", rationale="9 + 9 = 18.")
LETTERS = tuple("ABCDE")
PLACE = Question("Where?", "B", ("bank", "library", "mall", "yard", "york"), LETTERS, rationale="Books are there.")


def test_the_direct_format_is_the_papers():
    task = find_task("gsm8k")
    assert task.prompt(SUM) + task.continuation(SUM) == "Q: What is 9 + 9?\nA: 18\n"
    task = find_task("commonsense_qa")
    expected = "Q: Where?\n(A) bank\n(B) library\n(C) mall\n(D) yard\n(E) york\nA: B\n"
    assert task.prompt(PLACE) + task.continuation(PLACE) == expected
    assert task.continuation(PLACE) == " B\n"
    assert task.choice_texts(PLACE) == ()


@pytest.mark.parametrize("name", ["arc_easy", "arc_challenge"])
def test_choices_of_arc_are_compared_as_the_harness_does(name):
    task = find_task(name)
    assert task.prompt(PLACE) == "Question: Where?\nAnswer:"
    assert task.choice_texts(PLACE) == (" bank", " library", " mall", " yard", " york")
    assert task.continuation(PLACE) == " library"


def test_reasoning_without_exemplars_is_asked_for_in_the_words_of_kojima():
    task = find_task("gsm8k")
    assert task.reasoning_prompt(SUM) == "Q: What is 9 + 9?\nA: Let's think step by step."
    assert task.answer_prompt == "\nTherefore, the answer (arabic numerals) is"
    task = find_task("arc_easy")
    expected = "Q: Where?\n(A) bank\n(B) library\n(C) mall\n(D) yard\n(E) york\nA: Let's think step by step."
    assert task.reasoning_prompt(PLACE) == expected
    assert task.answer_prompt == "\nTherefore, among A through E, the answer is"


def test_exemplars_stand_before_the_question_with_their_reasoning():
    question = Question("What is 2 + 2?", "4")
    shown = "Q: What is 9 + 9?\nA: 9 + 9 = 18. The answer is 18.\n\n"
    prompt = find_task("gsm8k").reasoning_prompt(question, [SUM, SUM])
    assert prompt == f"{shown}{shown}Q: What is 2 + 2?\nA:"
    assert find_task("commonsense_qa").worked(PLACE) == " Books are there. The answer is (B)."
    with pytest.raises(ValueError, match=r"question 'What is 2 \+ 2\?' has no rationale, but it must have one"):
        find_task("gsm8k").worked(question)


@pytest.mark.parametrize("name, question", [("gsm8k", SUM), ("svamp", SUM), ("commonsense_qa", PLACE)])
def test_what_is_shown_as_worked_is_read_as_right(name, question):
    task = find_task(name)
    reading = task.read(task.worked(question), question)
    assert reading == (question.answer, "strict")
    assert task.is_right(reading.said, question) and task.read_answer(task.worked(question)) == question.answer


@pytest.mark.parametrize(
    "said, answer, right",
    [
        ("18", "18", True),
        ("18.0", "18", True),
        ("$2,125.", "2,125", True),
        ("2125", "2,125", True),
        ("−3", "-3", True),
        ("3", "-3", False),
        ("180", "18", False),
        ("many", "18", False),
        (None, "18", False),
    ],
)
def test_numbers_are_right_however_they_are_written(said, answer, right):
    assert find_task("gsm8k").is_right(said, Question("a", answer)) is right


@pytest.mark.parametrize("said, right", [("B", True), ("(B)", True), ("A", False), ("b", False), (None, False)])
def test_a_choice_is_right_by_its_letter(said, right):
    assert find_task("commonsense_qa").is_right(said, PLACE) is right


def test_words_are_right_but_for_case_and_space(tmp_path):
    (tmp_path / "words.jsonl").write_text('{"question": "a", "answer": "New  York."}\n')
    task = find_task(tmp_path / "words.jsonl")
    question = Question("a", "New  York.")
    assert [task.is_right(said, question) for said in ("new york", "York", None)] == [True, False, False]
    assert task.prompt(question) + task.continuation(question) == "Q: a\nA: New  York.\n"
    assert task.answer_prompt == "\nTherefore, the answer is"


def test_columns_of_a_built_in_task_can_be_called_otherwise():
    columns = find_task("gsm8k", question_column="problem").columns
    assert (columns.question, columns.answer, columns.mark) == (("problem",), "answer", "####")
