"""``qstar compare`` at a tiny size: every row of its table is computed again by other ways, from what it leaves."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from plain_answers import answer_log_probs, greedy_thought
from transformers import AutoModelForCausalLM

from qstar import load
from qstar.commands.main import main
from qstar.embedded import compare
from qstar.embedded.pretrain import PretrainSettings, pretrained_model
from qstar.embedded.task import (
    DIGITS,
    NUMBERS,
    build_tokenizer,
    documents,
    documents_with_hints,
    running_sums,
    split_of,
)
from qstar.evaluation.record import read_report

SHORT = PretrainSettings(max_steps=100, check_steps=100, tried=8)  # it writes workings, wrong ones
FLAGS = "--seed 3 --questions 120 --held-out 20 --problems 15 --steps 2 --rounds 2"
ROWS = (
    "base, direct",
    "base, chain of thought",
    "trained on answers, direct",
    "trained with pause tokens",
    "STaR without hints",
    "STaR with hints",
    "Quiet-STaR, without thoughts",
    "Quiet-STaR, with its thoughts",
)


def test_documents_with_hints_begin_with_the_answer_and_show_the_working():
    hinted = 0
    for document in documents_with_hints(400, seed=1):
        words = document.split()
        if words[0] == "T":
            hinted += 1
            assert words[1] == words[-1]
            words = words[2:]
            assert words[DIGITS + 2] == "T"
        digits = tuple(map(int, words[1 : 1 + DIGITS]))
        sums = list(map(str, running_sums(digits)))
        assert words[0] == "Q" and words[1 + DIGITS :] in (["=", sums[-1]], ["=", "T", *sums, "=", sums[-1]])
        assert split_of(digits) == "train"
    assert 70 < hinted < 130
    assert documents_with_hints(30, seed=1) == documents_with_hints(50, seed=1)[:30]
    assert documents(2, seed=0) == ["Q 0 0 8 9 3 = 0", "Q 7 5 6 3 6 = 7"], "the corpus without hints stays as it was"


def test_the_cache_tells_corpora_apart(tmp_path):
    settings = PretrainSettings(width=16, layers=1, heads=2, key_value_heads=1, intermediate=16, max_steps=1, tried=8)
    with pytest.warns(UserWarning, match="below its goal"):
        for corpus in (None, documents, documents_with_hints):
            pretrained_model(tmp_path, 0, settings, corpus)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (dict(steps=0), ValueError, "steps is 0, but it must be an integer of at least 1"),
        (dict(step=1), TypeError, r"compare\(\) has no setting 'step'; did you mean 'steps'"),
    ],
)
def test_wrong_settings_are_refused(settings, error, message, tmp_path):
    with pytest.raises(error, match=message):
        compare.compare(tmp_path / "run", **settings)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One run of the command: its folder, and what it printed."""
    folder, cache = (tmp_path_factory.mktemp(name) for name in ("run", "cache"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "CACHE", cache)
        patch.setattr(compare, "BASE", SHORT)
        patch.setattr(compare, "STAR", compare.STAR | dict(first_steps=2, batch_size=40))
        printed = []
        patch.setattr("builtins.print", lambda *words, **options: printed.append(" ".join(map(str, words))))
        with pytest.warns(UserWarning, match="below its goal"):
            assert main(["compare", "--output-dir", str(folder / "result"), *FLAGS.split()]) == 0, printed[-1]
    return folder / "result", "\n".join(printed)


@torch.no_grad()
def plainly_reasoned(model, question: str) -> str:
    """What a model says behind the marker of a working, token by token in plain passes."""
    tokenizer = build_tokenizer()
    ids = tokenizer(f"{question} = T")["input_ids"]
    length = len(ids)
    for _ in range(8):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[length:], skip_special_tokens=True)


@pytest.mark.slow
def test_every_row_is_that_of_plain_passes(finished):
    folder, printed = finished
    [report] = read_report(folder / "report.json")
    rows = {row.name: row for row in report.rows}
    assert tuple(rows) == ROWS
    asked = [(f"Q {each.text}", each.answer) for each in report.questions.questions]
    assert len(set(asked)) == 15
    for question, answer in asked:
        digits = tuple(map(int, question.split()[1:]))
        assert split_of(digits) == "test" and answer == str(sum(digits) % 10)
    thinking, paused = (load(folder / name)[0] for name in ("quiet-star", "pause"))
    assert paused.qstar.pauses and not thinking.qstar.pauses
    fixed = torch.full((5,), paused.qstar.start_token_id)
    tokenizer, choices = build_tokenizer(), torch.tensor(build_tokenizer().convert_tokens_to_ids(NUMBERS))
    for model, name, thought in (
        (paused, "trained with pause tokens", lambda prompt: fixed),
        (thinking, "Quiet-STaR, without thoughts", lambda prompt: None),
        (thinking, "Quiet-STaR, with its thoughts", partial(greedy_thought, thinking)),
    ):
        model.set_attn_implementation("eager")
        for row, (question, answer) in zip(rows[name].answers, asked, strict=True):
            prompt = torch.tensor(tokenizer(f"{question} =")["input_ids"])
            with torch.no_grad():
                log_probs = answer_log_probs(model, prompt, choices, thought(prompt))
            assert row.probability == pytest.approx(log_probs[int(answer)].exp().item(), abs=1e-5)
            assert row.right == (int(log_probs.argmax()) == int(answer))
    for name, where in (("STaR without hints", "star"), ("STaR with hints", "star-hints")):
        model = AutoModelForCausalLM.from_pretrained(folder / where)
        for row, (question, answer) in zip(rows[name].answers, asked, strict=True):
            said = plainly_reasoned(model, question)
            assert row.detail["texts"][0].strip() == said.strip()
            assert row.right == (f"{said} ".partition("= ")[2][:1] == answer)
    for name, row in rows.items():
        line = next(line for line in printed.splitlines() if line.startswith(name))
        assert line.removeprefix(name).split()[0] == f"{sum(each.right for each in row.answers) / 15:.1%}"


@pytest.mark.slow
def test_it_leaves_the_rounds_and_a_picture(finished):
    folder, printed = finished
    report = json.loads((folder / "report.json").read_text())
    assert report["settings"] == dict(seed=3, questions=120, held_out=20, problems=15, steps=2, rounds=2)
    for name, where in (("STaR without hints", "star"), ("STaR with hints", "star-hints")):
        of_star = json.loads((folder / where / "report.json").read_text())
        assert report["rounds"][name]["rounds"] == of_star["rounds"]
        assert [each["steps"] for each in of_star["rounds"]] == [2, 2]
    assert all(each["rationalised"] == 0 for each in report["rounds"]["STaR without hints"]["rounds"])
    assert any(each["rationalised"] > 0 for each in report["rounds"]["STaR with hints"]["rounds"])
    pytest.importorskip("matplotlib")
    assert (folder / "compare.png").read_bytes().startswith(b"\x89PNG")
    last = printed.splitlines()[-1]
    assert last == f"written to {folder / 'report.json'} and {folder / 'compare.png'}"
    with pytest.raises(FileExistsError, match="holds an earlier comparison"):
        compare.compare(folder)
