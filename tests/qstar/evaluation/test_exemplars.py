"""Exemplars: ours are right, in their sums and in their form, and a user's are read from a file."""

from __future__ import annotations

import json
import re
from itertools import pairwise

import pytest

from qstar.embedded.sums import SUMS
from qstar.evaluation.exemplars import read_exemplars
from qstar.evaluation.questions import Question
from qstar.evaluation.tasks import find_task, task_of_file

ARITHMETIC = read_exemplars(find_task("gsm8k"))
COMMONSENSE = read_exemplars(find_task("commonsense_qa"))
EQUATION = re.compile(r"(\d+) ([*/+-]) (\d+) = (\d+)")
OPERATIONS = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__, "/": int.__truediv__}


@pytest.mark.parametrize("exemplar", ARITHMETIC, ids=lambda each: each.text[:24])
def test_every_equation_of_an_arithmetic_exemplar_is_right_and_the_last_gives_the_answer(exemplar):
    equations = EQUATION.findall(exemplar.rationale)
    assert len(equations) >= 2 and len(equations) == exemplar.rationale.count("=")
    for left, sign, right, result in equations:
        assert OPERATIONS[sign](int(left), int(right)) == int(result)
    assert equations[-1][-1] == exemplar.answer


@pytest.mark.parametrize("exemplar", ARITHMETIC, ids=lambda each: each.text[:24])
def test_an_arithmetic_exemplar_calculates_with_numbers_that_it_has(exemplar):
    words = {"twice": "2", "two": "2", "Four": "4", "quarter": "4"}
    known = set(re.findall(r"\d+", exemplar.text)) | {
        words[word] for word in re.findall(r"\w+", exemplar.text) if word in words
    }
    for left, _, right, result in EQUATION.findall(exemplar.rationale):
        assert {left, right} <= known
        known.add(result)


@pytest.mark.parametrize("name, exemplars, count", [("gsm8k", ARITHMETIC, 8), ("commonsense_qa", COMMONSENSE, 7)])
def test_our_exemplars_come_to_their_answers_in_the_way_that_is_read(name, exemplars, count):
    task = find_task(name)
    assert len({each.text for each in exemplars}) == count == len(exemplars)
    for each in exemplars:
        assert task.read(task.worked(each), each) == (each.answer, "strict")
        assert all(stop not in task.worked(each) + each.text for stop in task.stop)


def test_the_answers_of_our_choices_are_no_pattern():
    letters = [each.answer for each in COMMONSENSE]
    assert {*letters} == set("ABCDE") and all(len(each.choices) == 5 for each in COMMONSENSE)
    assert all(one != next_one for one, next_one in pairwise(letters))


def test_other_tasks_of_the_same_kind_have_the_same_exemplars(tmp_path):
    assert read_exemplars(find_task("svamp")) == ARITHMETIC
    assert read_exemplars(find_task("arc_challenge")) == COMMONSENSE
    row = {"question": "a", "choices": ["x", "y"], "answer": "x"}
    (tmp_path / "two.jsonl").write_text(json.dumps(row) + "\n")
    assert read_exemplars(task_of_file(tmp_path / "two.jsonl")) == COMMONSENSE


def test_exemplars_are_read_from_a_file(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"question": "1 + 1?", "why": "1 + 1 = 2.", "answer": 2}\n')
    expected = (Question("1 + 1?", "2", rationale="1 + 1 = 2."),)
    assert read_exemplars(find_task("gsm8k"), path, rationale_column="why") == expected
    row = {"question": "a", "rationale": "r", "choices": ["x", "y"], "answer": "y"}
    path.write_text(json.dumps(row) + "\n")
    expected = (Question("a", "B", ("x", "y"), ("A", "B"), "r"),)
    assert read_exemplars(find_task("commonsense_qa"), str(path)) == expected


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"question": "a", "answer": "2"}', "line 1 has no column 'rationale', but 'question', 'answer'"),
        ('{"question": "a", "answer": "2", "rationale": ""}', "line 1: column 'rationale' holds the text ''"),
        ('{"question": "a", "answer": "two", "rationale": "b"}', "column 'answer' holds the text 'two', but it must"),
    ],
)
def test_a_row_that_holds_no_exemplar_is_named(tmp_path, line, message):
    (tmp_path / "mine.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match=message):
        read_exemplars(find_task("gsm8k"), tmp_path / "mine.jsonl")


def test_without_exemplars_of_ours_a_file_is_asked_for(tmp_path):
    (tmp_path / "words.jsonl").write_text('{"question": "a", "answer": "Paris"}\n')
    with pytest.raises(ValueError, match="task 'words' has answers of its own kind, for which there are no exemplars"):
        read_exemplars(task_of_file(tmp_path / "words.jsonl"))
    with pytest.raises(FileNotFoundError, match=r"exemplars is 'none\.json', but there is no such file"):
        read_exemplars(SUMS, "none.json")
