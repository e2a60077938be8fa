"""Questions from files and from the hub: what rows become, what is drawn, and what is wrong in a row."""

from __future__ import annotations

import hashlib
import json
import re

import pytest
from datasets import Dataset, DatasetDict

from qstar.data import load
from qstar.evaluation.answers import Letters, Numbers, Words
from qstar.evaluation.questions import Question, draw, fingerprint, read_questions
from qstar.evaluation.tasks import TASKS, find_task, task_of_file

GSM8K = [
    {"question": "How many?  ", "answer": "It is 2/2=<<2/2=1>>1 and\n3*6=<<3*6=18>>18.\n#### 18"},
    {"question": "How much?", "answer": "1,000+1,125=$<<1000+1125=2125>>2,125\n#### 2,125"},
    {"question": "How deep?", "answer": "5-8=-3\n#### -3"},
]
CHOICES = {"label": ["A", "B", "C", "D", "E"], "text": ["bank", "library", "mall", "yard", "new york"]}
COMMONSENSE = [{"id": "1", "question": "Where?", "choices": CHOICES, "answerKey": "B"}]
ARC = [
    {"question": "Which?", "choices": {"text": ["x", "y", "z"], "label": ["1", "2", "3"]}, "answerKey": "3"},
    {"question": "What?", "choices": {"text": ["x", "y", "z", "w"], "label": ["A", "B", "C", "D"]}, "answerKey": "A"},
]
SVAMP = [{"Body": "Ann has 8 pens.", "Question": "How many?", "Answer": "8.0", "Equation": "( 8.0 )"}]


@pytest.fixture
def written(tmp_path):
    """Writes rows as JSON lines, or text as it is, to a file; returns its path."""

    def write(rows, name="rows.jsonl"):
        text = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


def test_gsm8k_has_its_answer_behind_the_mark_and_its_rationale_without_the_calculator(written):
    found = read_questions(find_task("gsm8k"), written(GSM8K))
    assert found.questions == (
        Question("How many?  ", "18", rationale="It is 2/2=1 and\n3*6=18.", number=0),
        Question("How much?", "2,125", rationale="1,000+1,125=$2,125", number=1),
        Question("How deep?", "-3", rationale="5-8=-3", number=2),
    )
    assert found.source.endswith("rows.jsonl")


def test_choices_get_letters_whatever_their_labels_are(written):
    [one] = read_questions(find_task("commonsense_qa"), written(COMMONSENSE)).questions
    assert one == Question("Where?", "B", tuple(CHOICES["text"]), tuple("ABCDE"))
    assert one.right_choice == 1
    for name in ("arc_easy", "arc_challenge"):
        first, second = read_questions(find_task(name), written(ARC)).questions
        assert first == Question("Which?", "C", ("x", "y", "z"), ("A", "B", "C"))
        assert second == Question("What?", "A", ("x", "y", "z", "w"), ("A", "B", "C", "D"), number=1)


def test_svamp_asks_behind_its_story_and_has_whole_numbers(written):
    assert read_questions(find_task("svamp"), written(SVAMP)).questions == (Question("Ann has 8 pens. How many?", "8"),)


@pytest.mark.parametrize("name", ["rows.json", "rows.parquet"])
def test_json_and_parquet_hold_the_same_questions_as_json_lines(written, tmp_path, name):
    lines = read_questions(find_task("arc_easy"), written(ARC))
    if name.endswith("json"):
        written(json.dumps(ARC, indent=1), name)
    else:
        Dataset.from_list(ARC).to_parquet(tmp_path / name)
    other = read_questions(find_task("arc_easy"), tmp_path / name)
    assert (other.questions, other.fingerprint) == (lines.questions, lines.fingerprint)


def test_objects_and_folders_of_datasets_hold_the_same_questions(written, tmp_path):
    lines = read_questions(find_task("commonsense_qa"), written(COMMONSENSE))
    data = Dataset.from_list(COMMONSENSE)
    DatasetDict({"train": Dataset.from_list(ARC[:1]), "validation": data}).save_to_disk(tmp_path / "saved")
    for source, name in ((data, "dataset"), (tmp_path / "saved", str(tmp_path / "saved"))):
        found = read_questions(find_task("commonsense_qa"), source)
        assert (found.questions, found.source) == (lines.questions, name)
    with pytest.raises(ValueError, match=r"split is 'test', but source has 'train', 'validation'"):
        read_questions(find_task("commonsense_qa"), tmp_path / "saved", split="test")


@pytest.mark.parametrize(
    "name, rows, hub",
    [
        ("gsm8k", GSM8K, ("openai/gsm8k", "main", "test")),
        ("commonsense_qa", COMMONSENSE, ("tau/commonsense_qa", None, "validation")),
        ("arc_easy", ARC, ("allenai/ai2_arc", "ARC-Easy", "test")),
        ("arc_challenge", ARC, ("allenai/ai2_arc", "ARC-Challenge", "test")),
        ("svamp", SVAMP, ("ChilleD/SVAMP", None, "test")),
    ],
)
def test_built_in_tasks_ask_the_hub_for_their_split(name, rows, hub, written, monkeypatch):
    calls = []

    def load_dataset(source, config, *, split, streaming):
        calls.append((source, config, split))
        return Dataset.from_list(rows)

    monkeypatch.setattr(load, "load_dataset", load_dataset)
    task = find_task(name)
    found = read_questions(task)
    assert found.source == hub[0]
    assert found.fingerprint == read_questions(task, written(rows)).fingerprint
    read_questions(task, split="train[:1]")
    read_questions(task, "somebody/else")
    assert calls == [hub, (*hub[:2], "train[:1]"), ("somebody/else", None, hub[2])]


def test_there_are_five_built_in_tasks():
    assert [task.name for task in TASKS] == ["gsm8k", "commonsense_qa", "arc_easy", "arc_challenge", "svamp"]


def test_a_draw_keeps_the_order_and_depends_on_the_seed_alone(written):
    rows = [{"question": f"q{i}", "answer": i} for i in range(50)]
    task = task_of_file(written(rows))
    every = read_questions(task).questions
    one = read_questions(task, max_questions=7, seed=3)
    assert [each.number for each in one.questions] == [7, 9, 19, 38, 39, 40, 46], "the same on every machine"
    assert one.questions == tuple(every[each.number] for each in one.questions)
    assert one == read_questions(task, max_questions=7, seed=3)
    assert one.questions != read_questions(task, max_questions=7, seed=4).questions
    assert draw(every, 50, 0) == draw(every, 99, 1) == draw(every, None, 2) == every
    drawn = [each.number for seed in range(400) for each in draw(every, 5, seed)]
    counts = [drawn.count(number) for number in range(50)]
    assert min(counts) >= 15 and max(counts) <= 70, "about 40 times each"


def test_the_fingerprint_is_the_hash_of_what_the_questions_say():
    question = Question("é?", "B", ("x", "y"), ("A", "B"), "so", 3)
    text = '[{"answer":"B","choices":["x","y"],"labels":["A","B"],"number":3,"rationale":"so","text":"\\u00e9?"}]'
    assert fingerprint([question]) == hashlib.sha256(text.encode()).hexdigest()
    assert fingerprint([question]) != fingerprint([Question("e?", "B", ("x", "y"), ("A", "B"), "so", 3)])


@pytest.mark.parametrize(
    "rows, columns, answers, expected",
    [
        ([{"question": "a", "answer": 7}], {}, Numbers(), Question("a", "7")),
        ([{"question": "a", "answer": -7.5}], {}, Numbers(), Question("a", "-7.5")),
        ([{"question": "a", "answer": 1e22}], {}, Numbers(), Question("a", "1" + "0" * 22)),
        ([{"question": "a", "answer": "$1,000.00"}], {}, Numbers(), Question("a", "$1,000")),
        ([{"question": "a", "answer": " Paris "}], {}, Words(), Question("a", "Paris")),
        ([{"question": "a", "answer": "so\n#### 5"}], {}, Numbers(), Question("a", "5", rationale="so")),
        ([{"question": "a", "answer": "5", "rationale": "r"}], {}, Numbers(), Question("a", "5", rationale="r")),
        (
            [{"q": "a", "story": "s", "gold": "5", "why": "w"}],
            dict(question_column=("story", "q"), answer_column="gold", rationale_column="why"),
            Numbers(),
            Question("s a", "5", rationale="w"),
        ),
        (
            [{"question": "a", "options": ["x", "y", 3], "answer": 2}],
            dict(choices_column="options"),
            Letters(3),
            Question("a", "C", ("x", "y", "3"), ("A", "B", "C")),
        ),
        (
            [{"question": "a", "choices": ["x", "y"], "names": [1, 0], "answer": 0}],
            dict(labels_column="names"),
            Letters(2),
            Question("a", "B", ("x", "y"), ("A", "B")),
        ),
        (
            [{"question": "a", "choices": [{"label": "i", "text": "x"}, {"label": "ii", "text": "y"}], "answer": "ii"}],
            {},
            Letters(2),
            Question("a", "B", ("x", "y"), ("A", "B")),
        ),
        (
            [{"question": "a", "choices": {"text": ["2", "1"], "label": ["1", "2"]}, "answer": 1}],
            {},
            Letters(2),
            Question("a", "A", ("2", "1"), ("A", "B")),
        ),
        (
            [{"question": "a", "choices": ["B", "y"], "answer": "y"}],
            {},
            Letters(2),
            Question("a", "B", ("B", "y"), ("A", "B")),
        ),
        (
            [{"question": "a", "choices": CHOICES, "answerKey": "new york"}],
            {},
            Letters(5),
            Question("a", "E", tuple(CHOICES["text"]), tuple("ABCDE")),
        ),
    ],
)
def test_a_file_is_a_task_by_its_columns(written, rows, columns, answers, expected):
    task = find_task(str(written(rows)), **columns)
    assert (task.name, task.answers) == ("rows", answers)
    assert read_questions(task).questions == (expected,)


def test_letters_are_as_many_as_the_longest_question_has(written):
    rows = [{"question": "a", "choices": ["x"] * 0 + list("xyzw"[:count]), "answer": 1} for count in (2, 4, 3)]
    task = task_of_file(written(rows))
    assert task.answers.labels == ("A", "B", "C", "D")
    assert [len(each.choices) for each in read_questions(task).questions] == [2, 4, 3]


@pytest.mark.parametrize(
    "task, line, message",
    [
        ("gsm8k", '{"question": "a"}', "has no column 'answer', but 'question'"),
        (
            "gsm8k",
            '{"question": "a", "answer": "18"}',
            "'answer' holds the text '18', but it must hold an answer behind",
        ),
        ("gsm8k", '{"question": "a", "answer": "r #### "}', "'answer' holds the text '', but it must hold a number"),
        ("gsm8k", '{"question": "a", "answer": "r #### l8"}', "holds the text 'l8', but it must hold a number"),
        (
            "gsm8k",
            '{"question": " ", "answer": "#### 1"}',
            "'question' holds the text ' ', but it must hold text that is",
        ),
        ("gsm8k", '{"question": 3, "answer": "#### 1"}', "'question' holds the number 3, but it must hold text"),
        ("gsm8k", "[1]", "holds the list [1], but it must hold an object"),
        ("gsm8k", '{"question": "a"', "this is not JSON: it ends too soon"),
        ("svamp", '{"Body": "a", "Question": "b", "Answer": true}', "'Answer' holds True, but it must hold a number"),
        ("svamp", '{"Body": "a", "Question": "b", "Answer": NaN}', "holds the number nan, but it must hold a number"),
        ("svamp", '{"Body": "a", "Question": "b", "Answer": null}', "'Answer' holds null, but it must hold a number"),
        (
            "commonsense_qa",
            '{"question": "a", "choices": {"label": ["A", "B"], "text": ["x", "y"]}, "answerKey": "F"}',
            "'answerKey' holds the text 'F', but it must hold one of the labels 'A', 'B', or the text of a choice",
        ),
        (
            "commonsense_qa",
            '{"question": "a", "choices": {"label": ["A", "B"], "text": ["x", "y"]}, "answerKey": ""}',
            "'answerKey' holds the text '', but it must hold one of the labels 'A', 'B'",
        ),
        (
            "commonsense_qa",
            '{"question": "a", "choices": {"label": ["A", "A"], "text": ["x", "y"]}, "answerKey": "A"}',
            "'choices' holds the list ['A', 'A'], but it must hold labels that differ",
        ),
        (
            "commonsense_qa",
            '{"question": "a", "choices": {"label": ["A"], "text": ["x", "y"]}, "answerKey": "A"}',
            "'choices' holds the list ['A'], but it must hold 2 labels",
        ),
        (
            "commonsense_qa",
            '{"question": "a", "choices": {"label": ["A"], "text": ["x"]}, "answerKey": "A"}',
            "'choices' holds 1 choices, but there must be 2 to 5",
        ),
        (
            "commonsense_qa",
            '{"question": "a", "choices": ["x", null], "answerKey": "A"}',
            "'choices' holds null, but it must hold text",
        ),
        (
            "commonsense_qa",
            '{"question": "a", "choices": "x, y", "answerKey": "A"}',
            "'choices' holds the text 'x, y', but it must hold an object with 'text' and 'label', or a list of texts",
        ),
        (
            "commonsense_qa",
            '{"question": "a", "choices": [1, 2, 3], "answerKey": 1}',
            "'answerKey' holds the number 1, but it must hold one of the labels 'A', 'B', 'C', or the text of a "
            "choice, or 0 to 2, and may stand for one choice only",
        ),
        (
            "commonsense_qa",
            '{"question": "a", "choices": ["x", "y"], "answerKey": 2}',
            "'answerKey' holds the number 2, but it must hold one of the labels 'A', 'B', or the text of a choice, "
            "or 0 to 1",
        ),
    ],
)
def test_what_is_wrong_in_a_row_is_named_with_its_place(written, task, line, message):
    good = {"gsm8k": GSM8K, "commonsense_qa": COMMONSENSE, "svamp": SVAMP}[task][0]
    path = written(f"{json.dumps(good)}\n\n{line}\n")
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}, line 3.*{re.escape(message)}"):
        read_questions(find_task(task), path)


def test_rows_of_a_hub_data_set_are_named_by_their_number(monkeypatch):
    monkeypatch.setattr(load, "load_dataset", lambda *_, **__: Dataset.from_list([*SVAMP, SVAMP[0] | {"Answer": "x"}]))
    with pytest.raises(
        ValueError, match=r"^ChilleD/SVAMP, row 2: column 'Answer' holds the text 'x', but it must hold a"
    ):
        read_questions(find_task("svamp"))


def test_a_file_whose_answers_are_not_all_numbers_holds_text(written):
    path = written([{"question": "a", "answer": "5"}, {"question": "b", "answer": "five"}])
    assert task_of_file(path).answers == Words()


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda path: find_task("gsm9k"), ValueError, "task is 'gsm9k', but it must be 'gsm8k', 'commonsense_qa', "),
        (lambda path: find_task("no/such.jsonl"), FileNotFoundError, "task is 'no/such.jsonl', but there is no such"),
        (lambda path: find_task(path, answers_column="x"), TypeError, "'answers_column' is no argument here, but"),
        (lambda path: find_task(path, answer_column=""), ValueError, "answer_column is '', but it must name a column"),
        (lambda path: find_task(path, answer_column=["a", "b"]), ValueError, "but it must name one column"),
        (lambda path: find_task(path, answer_column="x"), ValueError, "line 1 has no column 'x', but 'question'"),
        (lambda path: find_task(path.with_suffix(".txt")), ValueError, "a file of questions must end in .json, "),
        (lambda path: read_questions(find_task("gsm8k"), path, split="train"), ValueError, "which has no splits"),
        (lambda path: read_questions(find_task(path), max_questions=0), ValueError, "max_questions is 0, but it must"),
        (lambda path: find_task(path.with_name("empty.jsonl")), ValueError, "empty.jsonl holds no rows"),
    ],
)
def test_wrong_arguments_are_named(written, call, error, message):
    path = written([{"question": "a", "answer": "5"}])
    written("", "rows.txt")
    written("", "empty.jsonl")
    with pytest.raises(error, match=re.escape(message)):
        call(path)
