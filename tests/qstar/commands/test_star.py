"""``qstar star``: what it reads, says and leaves, on a tiny model with words of its own."""

from __future__ import annotations

import json

import pytest
import tiny
import tiny_folder
from transformers import AutoModelForCausalLM

from qstar.commands.main import main

LETTERS = "abcdefghij"
TEMPLATES = ("--prompt", "{question} q", "--hinted-prompt", "{answer} {question} q", "--answer-pattern", r"(\S+)")
QUICK = (
    "--rounds 1 --first-steps 1 --warmup-steps 0 --learning-rate 0.01 --train-batch-size 2 --max-new-tokens 1 "
    "--batch-size 4"
)


@pytest.fixture
def asked(tmp_path):
    """A folder with a model, and a file of questions of which half have what the model says for their answers."""
    base = tiny_folder.base_folder(tmp_path / "base")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), tiny.tokenizer()
    rows = []
    for number, letter in enumerate(LETTERS):
        ids = tokenizer(f"{letter} q", return_tensors="pt")
        word = tokenizer.decode(model.generate(**ids, max_new_tokens=1, do_sample=False)[0, 2:])
        rows.append({"text": letter, "solution": word if number % 2 and word.isalpha() else "zz"})
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return base, path, sum(row["solution"] != "zz" for row in rows)


def test_the_command_reads_files_by_their_columns_and_prints_its_rounds(asked, tmp_path, capsys):
    base, questions, right = asked
    folder = tmp_path / "run"
    command = ["star", base, "--task", str(questions), "--output-dir", str(folder), *TEMPLATES, *QUICK.split()]
    columns = ["--question-column", "text", "--answer-column", "solution", "--no-rationalise"]
    assert main(command + columns) == 0
    printed = capsys.readouterr().out
    assert f"round 1: {right} of 10 solved, 1 steps" in printed
    row = next(line for line in printed.splitlines() if line.startswith("1 (best)"))
    assert row.split()[2:8] == [str(right), "of", "10", "0", str(right), "1"]
    assert printed.splitlines()[-1] == f"round 1 saved in {folder}; more in {folder / 'report.json'}"
    report = json.loads((folder / "report.json").read_text())
    assert (report["model"], report["wording"]["prompt"], report["settings"]["rationalise"]) == (
        *(base, "{question} q"),
        False,
    )
    AutoModelForCausalLM.from_pretrained(folder)
    assert main(command + columns) == 1
    assert "holds an earlier run: go on with it by resume=True" in capsys.readouterr().err
    assert main([*command, *columns, "--resume"]) == 0


def test_a_task_has_its_exemplars_and_its_own_source(asked, tmp_path, monkeypatch):
    base, _, _ = asked
    rows = [json.dumps({"question": f"{x} and 1?", "answer": f"so #### {x + 1}"}) for x in range(5)]
    (tmp_path / "train.jsonl").write_text("\n".join(rows) + "\n")
    given = {}
    monkeypatch.setattr("qstar.commands.star.star", lambda *arguments, **options: given.update(options, all=arguments))
    with pytest.raises(AttributeError):  # nothing comes back
        main(["star", base, "--task", f"gsm8k={tmp_path / 'train.jsonl'}", "--exemplars", "3", "--max-questions", "4"])
    model, drawn = given["all"]
    assert (model, len(drawn.questions), len(given["exemplars"])) == (base, 4, 3)
    assert all(each.rationale for each in given["exemplars"])
    assert given["is_right"]("2.00", drawn.questions[0]) == (drawn.questions[0].answer == "2")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "has no column 'question', but 'text', 'solution'"),
        (
            ["--question-column", "text", "--answer-column", "solution", "--prompt", "x"],
            "prompt is 'x', but it must hold",
        ),
        (["--task", "gsm9k"], "task is 'gsm9k', but it must be 'gsm8k'"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_trained(asked, tmp_path, capsys, more, message):
    base, questions, _ = asked
    assert main(["star", base, "--output-dir", str(tmp_path / "run"), "--task", str(questions), *more]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--exemplar-file", "a.jsonl"], "--exemplar-file is given, but --exemplars is 0"),
        (["--exemplars", "9"], "--exemplars is 9, but there are 8"),
    ],
)
def test_exemplars_that_are_not_shown_or_not_there_are_refused(tmp_path, capsys, more, message):
    (tmp_path / "q.jsonl").write_text(json.dumps({"question": "1?", "answer": "1"}) + "\n")
    with pytest.raises(SystemExit):
        main(["star", "base", "--task", str(tmp_path / "q.jsonl"), *more])
    assert message in capsys.readouterr().err
