"""The command of the ladder at a tiny size: what it leaves, that it goes on, and that its tables say what was found."""

from __future__ import annotations

import argparse
import copy
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from plain_answers import answer_log_probs, greedy_thought

import ladder
from common import jobs
from common.answers import (
    ELSEWHERE,
    FIRST,
    NO_THOUGHTS,
    OWN_THOUGHTS,
    RANDOM,
    SAME,
    SAMPLED,
    UNTRAINED,
    UNTRAINED_SAMPLED,
    Answers,
    Exam,
)
from common.jobs import Job
from common.operations import equal_steps
from common.seeds import over_seeds
from common.summary import read_rows
from qstar.embedded.pretrain import PretrainSettings
from qstar.evaluation.intervals import paired, wilson
from qstar.wrapping import wrap
from tasks.every import TASKS

TINY = PretrainSettings(
    width=16, layers=1, heads=2, key_value_heads=1, intermediate=16, batch_size=8, max_steps=2, tried=8, goal=0.0
)
FLAGS = ["digits", "--seeds", "1", "--problems", "12"]
FLAGS += ["--set", "max_steps=1", "per_device_train_batch_size=2", "--variants"]
VARIANTS = ("base", "plain", "plain-equal-operations", "pause", "paper")


@pytest.fixture(scope="module", autouse=True)
def tiny(tmp_path_factory):
    """The rung of digits with a tiny decoder, and a cache of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TASKS, "digits", replace(TASKS["digits"], pretraining=TINY, training=dict(seq_length=16)))
        patch.setattr(jobs, "CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the command leaves."""
    folder = tmp_path_factory.mktemp("ladder")
    assert ladder.main([*FLAGS, *VARIANTS, "--output-dir", str(folder)]) == 0
    return folder


def result(folder, name):
    return json.loads((folder / "digits" / "seed-1" / f"{name}.json").read_text())


def test_the_base_answers_as_plain_passes_do(folder):
    task = TASKS["digits"]
    decoder, tokenizer = jobs.pretrained(task, 1)
    model = wrap(decoder, tokenizer, start_init=task.marker, end_init=task.close, thought_tokens=5, ahead_tokens=1)
    row = result(folder, "base")["result"]["rows"]["no thoughts"]
    choices = torch.tensor(tokenizer.convert_tokens_to_ids(list(task.choices)))
    for number, problem in enumerate(task.problems(12, 1, "test")):
        prompt = torch.tensor(tokenizer(problem.prompt)["input_ids"])
        expected = answer_log_probs(model, prompt, choices, None)
        assert row["log_prob"][number] == pytest.approx(expected[int(problem.answer)].item(), abs=1e-3)
        assert row["right"][number] == str(int(expected.argmax().item() == int(problem.answer)))


def test_variants_are_trained_by_their_rules():
    rules = {name: each["training"] for name, each in ladder.variants().items() if name in ladder.PRESETS}
    assert rules == {"paper": dict(preset="paper", policy_weight=30.0), "rlp": dict(preset="rlp")}


def test_stories_leave_out_what_is_trained_there_by_name_alone():
    def names(rung: str, variants: list[str] | None = None) -> list[str]:
        options = dict(rung=rung, seeds=[1], split="test", problems=5, set=[], variants=variants)
        return [job.name for job in ladder.jobs(argparse.Namespace(**options))]

    assert names("digits") == names("steps") == list(ladder.variants())
    assert names("stories") == [name for name in ladder.variants() if name != "no-reward"]
    assert names("stories", ["no-reward"]) == ["no-reward"]


def test_thoughts_and_what_stands_in_their_place_are_read():
    """Rows of a model with a mixing head that weighs, beside plain passes."""
    task = TASKS["digits"]
    decoder, tokenizer = jobs.pretrained(task, 1)
    model = wrap(decoder, tokenizer, start_init=task.marker, end_init=task.close, thought_tokens=3, ahead_tokens=1)
    before = copy.deepcopy(model)
    with torch.no_grad():
        torch.manual_seed(0)
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    exam = Exam(replace(task, cuts=(1, 2)), tokenizer, task.problems(6, 1, "test"), seed=1)
    rows = exam.with_thoughts(model, before)
    choices = torch.tensor(tokenizer.convert_tokens_to_ids(list(task.choices)))
    prompts = [torch.tensor(tokenizer(each.prompt)["input_ids"]) for each in exam.problems]
    read = {
        OWN_THOUGHTS: [greedy_thought(model, prompt) for prompt in prompts],
        NO_THOUGHTS: [None] * 6,
        UNTRAINED: [greedy_thought(before, prompt) for prompt in prompts],
        SAMPLED: [each[0] for each in rows[SAMPLED].thoughts],
        UNTRAINED_SAMPLED: [each[0] for each in rows[UNTRAINED_SAMPLED].thoughts],
        ELSEWHERE: [each[0] for each in rows[ELSEWHERE].thoughts],
        RANDOM: [each[0] for each in rows[RANDOM].thoughts],
        SAME: [torch.full((3,), model.qstar.start_token_id)] * 6,
    }
    read |= {FIRST.format(count): [each[:count] for each in read[OWN_THOUGHTS]] for count in (1, 2)}
    assert read.keys() == rows.keys()
    for name, thoughts in read.items():
        for number, (prompt, thought) in enumerate(zip(prompts, thoughts, strict=True)):
            expected = answer_log_probs(model, prompt, choices, thought)
            answer = int(exam.problems[number].answer)
            assert rows[name].log_prob[number] == pytest.approx(expected[answer].item(), abs=2e-3), name
    own, moved = (sorted(thought.tolist() for thought in read[name]) for name in (OWN_THOUGHTS, ELSEWHERE))
    assert own == moved
    assert not all(map(torch.equal, read[SAMPLED], read[OWN_THOUGHTS]))


def test_a_thought_is_written_where_it_is_the_working_as_far_as_it_goes():
    task = TASKS["steps"]
    tokenizer = task.tokenizer()
    problem = next(each for each in task.problems(50, 0, "test") if each.steps == 4)
    exam = Exam(task, tokenizer, [problem] * 4, seed=0)
    assert problem.working[3:] == problem.working[3:4] * 5
    said = [problem.working, problem.working[:2], (*problem.working, "7", "T"), (*problem.working[:3], "Q")]
    thoughts = [torch.tensor([tokenizer.convert_tokens_to_ids(list(each))]) for each in said]
    assert exam.written(Answers([], [], thoughts)) == [True, True, True, False]
    assert exam.written(Answers([], [], None)) is None


def test_trainings_are_as_long_as_their_kind_says(folder):
    task = TASKS["digits"]
    decoder, tokenizer = jobs.pretrained(task, 1)
    model = wrap(decoder, tokenizer, thought_tokens=5, ahead_tokens=1, rationales=2)
    equal = equal_steps(model, steps=1, rows=2, plain_rows=2, length=16)
    steps = {name: result(folder, name)["result"].get("steps") for name in VARIANTS}
    assert steps == {"base": None, "plain": 1, "plain-equal-operations": equal, "pause": 1, "paper": 1}
    assert equal > 5
    assert list(result(folder, "pause")["result"]["rows"]) == ["no thoughts", "its thoughts"]


def test_what_is_there_is_not_done_again_and_other_settings_are_refused(folder, monkeypatch, capsys):
    monkeypatch.setattr(Job, "result", lambda self: pytest.fail("done again"))
    assert ladder.main([*FLAGS, *VARIANTS, "--output-dir", str(folder)]) == 0
    assert ladder.main([*FLAGS, "base", "--output-dir", str(folder), "--problems", "13"]) == 1
    assert "problems is 13, but" in capsys.readouterr().err
    assert ladder.main([*FLAGS, "papers", "--output-dir", str(folder)]) == 1
    assert "variant is 'papers', but it must be one of base, plain," in capsys.readouterr().err


def test_nothing_is_begun_after_the_limit(tmp_path, capsys):
    assert ladder.main([*FLAGS, "base", "plain", "--output-dir", str(tmp_path), "--minutes", "0"]) == 0
    assert "2 of 2 are left: the same command goes on" in capsys.readouterr().out
    assert not (tmp_path / "digits" / "seed-1").exists()


def test_two_at_a_time_begin_with_a_job_of_each_seed(tmp_path, monkeypatch):
    """Whatever comes behind finds the decoder of its seed, and the others of one seed are done side by side."""
    done, pair = [], threading.Barrier(2, timeout=30)

    def result(job: Job) -> dict:
        if job.name != "pause":  # which comes alone
            pair.wait()
        done.append(job.name)
        return dict(problem_steps=[5], rows={NO_THOUGHTS: dict(right="1", log_prob=[-1.0])})

    monkeypatch.setattr(Job, "result", result)
    monkeypatch.setattr(jobs, "ProcessPoolExecutor", lambda count, mp_context: ThreadPoolExecutor(count))
    flags = ["digits", "--seeds", "1", "2", "--processes", "2", "--output-dir", str(tmp_path), "--variants"]
    assert ladder.main([*flags, "base", "plain"]) == 0
    assert done == ["base", "base", "plain", "plain"]
    assert ladder.main([*flags, "base", "plain", "pause", "--seeds", "1"]) == 0
    assert done[4:] == ["pause"]
    assert {row.variant: sorted(row.answers) for row in read_rows(tmp_path / "digits")} == {
        "base": [1, 2],
        "plain": [1, 2],
        "pause": [1],
    }


def test_the_summary_is_of_what_is_there(folder):
    text = ladder.summarize(folder)
    assert text == (folder / "ladder.md").read_text()
    row = result(folder, "paper")["result"]["rows"]
    right = row["its thoughts"]["right"]
    low, high = wilson(right.count("1"), 12)
    cell = f"{100 * right.count('1') / 12:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
    [line] = [each for each in text.splitlines() if each.startswith("| paper | its thoughts |")]
    assert line.endswith(f"| {cell} |")
    numbers = json.loads((folder / "ladder.json").read_text())["rungs"]["digits"]
    found = {(each["variant"], each["reads"]): each["seeds"]["1"] for each in numbers}
    assert len(found) == 3 + 2 + 8
    logs = row["no thoughts"]["log_prob"]
    assert found["paper", "no thoughts"]["log_likelihood"] == pytest.approx(sum(logs) / 12, abs=1e-4)
    assert found["paper", "no thoughts"]["workings"] is None
    assert (folder / "digits.png").exists() or not ladder.can_draw()


def made(name, seed, rows, kind="think", steps=(3, 4, 3, 4)):
    """A result by hand; ``rows`` hold right answers as a text, whose log-probability is then -0.5, and -2 else."""
    answers = {
        reads: dict(right=right, log_prob=[-0.5 if each == "1" else -2.0 for each in right])
        | ({} if reads == NO_THOUGHTS else dict(tokens=2 if "first" in reads else 8))
        for reads, right in rows.items()
    }
    settings = dict(name=name, seed=seed, kind=kind)
    return dict(settings=settings, result=dict(problem_steps=list(steps), rows=answers))


def test_tables_hold_means_over_seeds_gains_and_lengths(tmp_path):
    every = [made("base", seed, {"no thoughts": "0001"}, kind="base") for seed in (0, 1)]
    every += [
        made("rlp", seed, {"its thoughts": "1111", "no thoughts": right, "its first 2 tokens": "1011"})
        for seed, right in ((0, "0000"), (1, "0001"))
    ]
    for each in every:
        path = tmp_path / "steps" / f"seed-{each['settings']['seed']}" / f"{each['settings']['name']}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(each))
    text = ladder.summarize(tmp_path)
    low, high = over_seeds([0.0, 25.0], 0, 100)  # a share
    assert f"| rlp | no thoughts | 12.5 [{low:.1f}, {high:.1f}] |" in text
    assert "| rlp | its thoughts | 100.0 [100.0, 100.0] | -0.500 [-0.500, -0.500] |" in text
    assert paired([1.0] * 4, [0.0, 0.0, 0.0, 1.0]).low == 0.25
    assert "| base | no thoughts | +75.0 [+75.0, +75.0] | 2 of 2 | +1.125 [+1.125, +1.125] | 2 of 2 |" in text
    assert "| 2 | 75.0 [75.0, 75.0] | 100.0 | 50.0 |" in text
    assert "| 8 | 100.0 [100.0, 100.0] | 100.0 | 100.0 |" in text
    assert "| rlp | its first 2 tokens | +" not in text, "thoughts cut short are no control"
    assert [row.variant for row in read_rows(tmp_path / "steps")] == ["base", "rlp", "rlp", "rlp"]
    with pytest.raises(FileNotFoundError, match="holds no results: run a rung first"):
        ladder.summarize(tmp_path / "steps" / "seed-0")


def test_a_process_begins_nothing_more_when_the_command_was_killed(tmp_path, monkeypatch, capsys):
    ended = type("Command", (), dict(is_alive=lambda self: False))
    monkeypatch.setattr(jobs, "parent_process", ended)
    assert ladder.main([*FLAGS, "base", "plain", "--output-dir", str(tmp_path)]) == 0
    assert "2 of 2 are left: the same command goes on" in capsys.readouterr().out
    assert not list(tmp_path.rglob("*.json"))
