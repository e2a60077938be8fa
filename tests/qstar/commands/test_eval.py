"""``qstar eval`` on tasks: from its arguments to what it prints and writes."""

from __future__ import annotations

import copy
import json

import pytest
import tiny
import torch
from scripted_model import TOKENIZER

from qstar import load
from qstar.commands.main import main
from qstar.evaluation.record import read_report
from qstar.evaluation.run import evaluate_tasks
from qstar.evaluation.tasks import find_task
from qstar.wrapping import load_untrained, wrap

ROWS = ["without thoughts", "with its thoughts", "pause tokens", "another position's thoughts", "random tokens"]
BEFORE = ["before training, without thoughts", "untrained thoughts"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Questions, a plain model, and one that began with it and thinks."""
    root = tmp_path_factory.mktemp("eval")
    questions = [{"question": f"{x} + {8 - x}?", "answer": "8"} for x in range(6)] + [
        {"question": "?", "answer": "1,018"}
    ]
    (root / "sums.jsonl").write_text("".join(json.dumps(each) + "\n" for each in questions))
    tokenizer = copy.deepcopy(TOKENIZER)
    tiny.plain_model("llama", vocab_size=len(tokenizer)).save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    plain = type(tiny.plain_model("llama")).from_pretrained(root / "base")
    model = wrap(plain, tokenizer, thought_tokens=2, ahead_tokens=1)
    with torch.no_grad():
        model.qstar_mixing_head.output.weight.normal_(0, 0.5)
        model.lm_head.weight.mul_(0.9)
    model.save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    return root


def run(capsys, *words) -> str:
    assert main(["eval", *map(str, words), "--batch-size", "3"]) == 0
    return capsys.readouterr().out


def test_tasks_are_asked_in_rows_and_written(root, capsys):
    printed = run(capsys, root / "model", "--tasks", root / "sums.jsonl", "--max-questions", "5")
    [report] = read_report(root / "model" / "eval.json")
    assert [row.name for row in report.rows] == ROWS + BEFORE
    model, tokenizer = load(root / "model")
    options = dict(max_questions=5, batch_size=3, untrained=lambda: load_untrained(root / "model", tokenizer))
    [expected] = evaluate_tasks(model, tokenizer, [find_task(root / "sums.jsonl")], **options)
    assert report.rows == expected.rows and report.questions == expected.questions
    assert expected.table() in printed
    written = json.loads((root / "model" / "eval.json").read_text())
    assert written["command"].startswith("qstar eval ") and written["command"].endswith("--batch-size 3")
    assert "model.safetensors" in written["model"]["files"]
    assert (root / "model" / "eval" / "sums.svg").read_text().count("random tokens") == 1


def test_a_second_run_takes_what_the_first_has_answered(root, capsys, monkeypatch, tmp_path):
    words = (root / "model", "--tasks", root / "sums.jsonl", "--no-controls", "--output", tmp_path / "a.json")
    first = run(capsys, *words)
    monkeypatch.setattr("qstar.evaluation.direct.score_requests", lambda *_, **__: pytest.fail("asked again"))
    assert run(capsys, *words) == first
    assert len(list((tmp_path / "a" / "answers").iterdir())) == 2


def test_a_plain_model_has_one_row(root, capsys, tmp_path):
    words = (root / "base", "--tasks", f"gsm8k={root / 'sums.jsonl'}", "--output", tmp_path / "a.json")
    assert main(["eval", *map(str, words)]) == 1
    assert "####" in capsys.readouterr().err, "which the task's own answers have"
    printed = run(capsys, root / "base", "--tasks", root / "sums.jsonl", "--output", tmp_path / "a.json")
    assert "without thoughts" in printed and "compared with" not in printed
    assert main(["eval", str(root / "base"), "--dataset", str(root / "sums.jsonl")]) == 1
    assert "never learned to think" in capsys.readouterr().err


def test_held_out_text_stands_beside_tasks(root, capsys, tmp_path):
    (tmp_path / "text.txt").write_text("1 and 8 is 9\n\n0 and 1 is 1\n")
    tasks = f"{root / 'sums.jsonl'},held_out"
    words = ("--tasks", tasks, "--dataset", tmp_path / "text.txt", "--seq-length", "16", "--no-controls")
    printed = run(capsys, root / "model", *words, "--output", tmp_path / "a.json")
    assert "log-likelihood (nats per token)" in printed and "with its thoughts" in printed
    written = json.loads((tmp_path / "a.json").read_text())
    assert written["held_out"]["tokens"] > 5 and written["tasks"][0]["asked"] == 7


def test_columns_of_a_file_have_their_names(root, capsys, tmp_path):
    (tmp_path / "q.jsonl").write_text(json.dumps({"what": "8 + 0?", "is": "8"}) + "\n")
    words = (root / "base", "--tasks", tmp_path / "q.jsonl", "--output", tmp_path / "a.json")
    assert "q, 1 questions" in run(capsys, *words, "--question-column", "what", "--answer-column", "is")


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ([], 2, "there is nothing to evaluate on: give --tasks, --dataset or --lm-eval"),
        (["--tasks", "held_out"], 2, "--tasks names held_out, but --dataset is not given"),
        (["--tasks", "sums", "--limit", "3"], 2, "--limit is given, but --lm-eval is not"),
        (["--tasks", "gsm9k"], 1, "task is 'gsm9k', but it must be 'gsm8k'"),
        (["--tasks", "sums,sums"], 1, "tasks name 'sums' twice"),
        (["--tasks", "no.jsonl"], 1, "task is 'no.jsonl', but there is no such file"),
        (["--tasks", "sums", "--max-questions", "0"], 1, "max_questions is 0, but it must be an integer of at least 1"),
        (["--lm-eval", "no_such_task"], 1, "tasks name 'no_such_task', but the harness has no such task"),
        (["--dataset", "a.txt", "--answer-column", "x"], 1, "answer_column is given, but tasks name no file"),
    ],
)
def test_what_cannot_be_evaluated_is_named_before_a_model_is_loaded(root, words, code, message, capsys, monkeypatch):
    monkeypatch.setattr("qstar.commands.eval.any_model", lambda *_: pytest.fail("the model is loaded"))
    try:
        assert main(["eval", str(root / "model"), *words]) == code
    except SystemExit as stopped:
        assert stopped.code == code
    assert message in capsys.readouterr().err


def test_the_model_before_training_is_missed_in_a_line(root, capsys, tmp_path):
    model, tokenizer = load(root / "model")
    for base, why in ((None, "the folder does not name it"), ("/no/such/model", "/no/such/model is not there")):
        model.qstar.base_model = base
        model.save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        words = (tmp_path / "model", "--tasks", root / "sums.jsonl", "--max-questions", "2")
        printed = run(capsys, *words, "--output", tmp_path / f"{base is None}.json")
        assert printed.startswith(f"no rows of the model before training: {why}\n")
        assert not any(name in printed for name in BEFORE)


def test_the_model_before_training_is_what_it_was(root):
    base = type(tiny.plain_model("llama")).from_pretrained(root / "base")
    _, tokenizer = load(root / "model")
    before = load_untrained(root / "model", tokenizer)
    words = torch.tensor([TOKENIZER("1 and 8 is")["input_ids"]])
    assert torch.equal(before(words).logits[..., : base.config.vocab_size], base.eval()(words).logits)
    assert before.qstar.thought_tokens == 2 and not before.qstar_mixing_head.output.weight.any()
