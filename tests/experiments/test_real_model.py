"""The experiment with a real model, with a tiny one: what it compares, and that what is there is not done again."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file

import real_model
from common import deadline, operations
from common.deadline import Deadline, OutOfTime
from common.folders import keep_settings
from common.markdown import markdown_table, with_interval
from qstar import load
from qstar.evaluation.intervals import bootstrap_columns
from qstar.evaluation.questions import Question, Questions
from qstar.evaluation.record import read_report
from qstar.evaluation.report import ACCURACY, LOG_LIKELIHOOD, Answered, Row, TaskReport
from qstar.evaluation.run import OWN_THOUGHTS, WITHOUT
from qstar.evaluation.text_scores import score_text
from real import measured
from real.measured import UNTRAINED, Groups, quarters_of_text, steps_of_questions, summed, values_of_task
from real.settings import BASE, EQUAL_OPERATIONS, PLAIN, VARIANTS
from real.sources import is_held_out

SIZES = ["--steps", "2", "--batch-size", "1", "--seq-length", "12", "--thought-tokens", "2", "--ahead-tokens", "2"]
SIZES += ["--held-out", "3", "--held-out-rows", "3", "--learning-rate", "1e-2", "--text-batch-size", "2"]
SIZES += ["--positions-per-row", "5"]


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    """Of the command, with everything that it reads."""
    folder = tmp_path_factory.mktemp("sources")
    tiny.plain_model("llama").save_pretrained(folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    words = (["a", "b", "c"][number % 3 :] + [*"defghijklm"][number % 7 :] for number in range(40))
    texts = [" ".join(each) + " a" * number for number, each in enumerate(words)]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": each}) + "\n" for each in texts))
    questions = [{"question": "a b", "answer": "c\n#### f"}, {"question": "c d e", "answer": "c\nd\ne\n#### g"}]
    (folder / "asked.jsonl").write_text("".join(json.dumps(each) + "\n" for each in questions))
    paths = ["--model", folder / "model", "--dataset", folder / "texts.jsonl", "--tasks", folder / "asked.jsonl"]
    return [*map(str, paths), *SIZES]


@pytest.fixture(scope="module")
def done(arguments, tmp_path_factory):
    """The folder of a run of every variant with one seed."""
    folder = tmp_path_factory.mktemp("runs") / "all"
    real_model.main([*arguments, "--output-dir", str(folder), "--seeds", "0"])
    return folder


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def entry(section: dict, variant: str, way: str, metric: str = LOG_LIKELIHOOD) -> dict:
    [found] = [each for each in section["metrics"][metric] if (each["variant"], each["way"]) == (variant, way)]
    return found


# The whole command


def test_every_variant_is_trained_and_predicts_in_each_of_its_ways(done):
    text, task = summary(done)["results"]
    ways = {(each["variant"], each["way"]) for each in text["metrics"][LOG_LIKELIHOOD]}
    controls = {"pause tokens", "another position's thoughts", "random tokens", "untrained thoughts"}
    thinks = {(name, way) for name in ("paper", "rlp") for way in {WITHOUT, OWN_THOUGHTS} | controls}
    plain = {(name, WITHOUT) for name in (BASE, PLAIN, EQUAL_OPERATIONS)}
    assert ways == thinks | plain | {("pause", WITHOUT), ("pause", OWN_THOUGHTS)}
    assert {(each["variant"], each["way"]) for each in task["metrics"][ACCURACY]} == ways


def test_the_summary_holds_what_the_trained_models_say_of_the_text(done, arguments):
    """The paper's variant, scored here from its saved weights."""
    options = vars(real_model.build_parser().parse_args([*arguments, "--output-dir", str(done)]))
    settings = real_model.taken(options, real_model.RealModelSettings)
    sources = real_model.Sources(options["model"], options["dataset"], options["tasks"], settings)
    text, _ = summary(done)["results"]
    model, _ = load(done / "paper-0" / "model", dtype=torch.float32)
    found = score_text(model, sources.held_out_batches)
    assert text["units"] == len(found.row)
    for way, values in ((WITHOUT, found.without), (OWN_THOUGHTS, found.after)):
        assert entry(text, "paper", way)["mean"][0] == pytest.approx(values.mean().item(), rel=1e-5)
    base = score_text(sources.untrained(VARIANTS["paper"]), sources.held_out_batches)
    torch.testing.assert_close(base.after, base.without, rtol=0, atol=0)
    gain = entry(text, "paper", OWN_THOUGHTS)["against"][BASE]["mean"][0]
    assert gain == pytest.approx((found.after - base.without).mean().item(), abs=1e-5) and abs(gain) > 1e-3


def test_a_variant_is_trained_as_its_preset_and_the_flags_say(done):
    training = {name: json.loads((done / f"{name}-0" / "training.json").read_text())["training"] for name in VARIANTS}
    positions = {name: each.get("positions_per_row") for name, each in training.items()}
    assert positions == {"paper": 5, "rlp": 5, "pause": 5, PLAIN: None, EQUAL_OPERATIONS: None}
    assert (training["paper"]["preset"], training["rlp"]["preset"]) == ("paper", "rlp")
    assert {each["learning_rate"] for each in training.values()} == {1e-2}


def test_plain_training_at_equal_operations_spends_what_the_dearest_thoughts_spend(done):
    trained = {each["variant"]: each for each in summary(done)["training"]}
    assert trained[PLAIN]["tokens"] == trained["rlp"]["tokens"] == 2 * 12
    spent, plain = trained["rlp"]["multiply_adds"], trained[EQUAL_OPERATIONS]
    assert spent <= plain["multiply_adds"] < spent + plain["multiply_adds"] / plain["steps"]
    assert trained["pause"]["multiply_adds"] < trained["paper"]["multiply_adds"] < spent


def test_what_is_there_is_not_done_again_and_what_is_missing_is(done, arguments, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in done.rglob("*.json") if path.parent != done}
    lost = done / "plain-0" / "text.json"
    old = load_file(done / "plain-0" / "text.safetensors")
    lost.unlink()
    monkeypatch.setattr(real_model, "train_variant", None)
    real_model.main([*arguments, "--output-dir", str(done), "--seeds", "0"])
    again = {path: path.stat().st_mtime_ns for path in done.rglob("*.json") if path.parent != done}
    assert {path for path in again if again[path] != before[path]} == {lost}
    torch.testing.assert_close(load_file(done / "plain-0" / "text.safetensors")[WITHOUT], old[WITHOUT])


def test_another_setting_is_refused_in_the_same_folder(done, arguments):
    with pytest.raises(ValueError, match="made otherwise: thought_tokens was 2 and is 3"):
        real_model.main([*arguments, "--output-dir", str(done), "--thought-tokens", "3"])


def test_a_run_that_is_out_of_time_leaves_whole_files_and_is_gone_on_with(arguments, tmp_path):
    command = [*arguments, "--output-dir", str(tmp_path / "run"), "--seeds", "0", "--variants", PLAIN]
    real_model.main([*command, "--time-limit", "0"])
    assert not list((tmp_path / "run").rglob("training.json")) and summary(tmp_path / "run")["results"] == []
    real_model.main(command)
    text, _ = summary(tmp_path / "run")["results"]
    assert PLAIN in {each["variant"] for each in text["metrics"][LOG_LIKELIHOOD]}


def test_training_stops_at_the_deadline_with_a_checkpoint_and_comes_to_the_same_end(arguments, tmp_path, monkeypatch):
    monkeypatch.setattr(deadline.Deadline, "left", lambda self: -1.0 if self.end else float("inf"))
    monkeypatch.setattr(deadline.Deadline, "check", lambda self, what, seconds=0.0: None)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    command = [*arguments, "--seeds", "0", "--variants", PLAIN, "--steps", "3", "--checkpoint-steps", "10"]
    real_model.main([*command, "--output-dir", str(whole)])
    real_model.main([*command, "--output-dir", str(cut), "--time-limit", "1"])
    assert (cut / "plain-0" / "checkpoint-1").is_dir() and not (cut / "plain-0" / "training.json").exists()
    real_model.main([*command, "--output-dir", str(cut)])
    assert not list((cut / "plain-0").glob("checkpoint-*"))
    scores = [load_file(each / "plain-0" / "text.safetensors")[WITHOUT] for each in (whole, cut)]
    torch.testing.assert_close(*scores, rtol=1e-6, atol=1e-6)


def test_answers_are_those_of_the_report(done):
    _, task = summary(done)["results"]
    [report] = read_report(done / "paper-0" / "asked.json")
    own = next(row for row in report.rows if row.name == OWN_THOUGHTS)
    mean = np.mean([each.log_likelihood for each in own.answers])
    assert entry(task, "paper", OWN_THOUGHTS)["mean"][0] == pytest.approx(mean)
    assert task["groups"] == ["all", "1 to 2 steps", "3 steps", "4 steps", "5 and more steps"]
    assert task["counts"] == [2, 1, 1, 0, 0]


def test_a_time_limit_is_kept_by_what_things_took_before():
    with pytest.raises(OutOfTime, match="text takes about 30 s, but 10 s are left"):
        Deadline(10.4).check("text", 30)
    Deadline(10).check("text", 5)
    Deadline(None).check("text", 1e9)


# What it is made of


@pytest.mark.parametrize("positions", [None, 2, 5, 9])
@pytest.mark.parametrize("pauses, rationales", [(False, 2), (True, 1)])
def test_operations_of_a_row_are_those_of_its_matrix_products(pauses, rationales, positions):
    """Counted by hand for a Llama of two layers, each product for each token; a mean over all choices of positions."""
    model = tiny.thinking_model("llama", thought_tokens=3, ahead_tokens=2, rationales=rationales, pauses=pauses)
    length, layers, width, heads, words = 5, 2, 32, 32, len(tiny.WORDS) + 2
    each = layers * (2 * width * 32 + 2 * width * 16 + 3 * width * 48)
    sizes = operations.Sizes.of(model)
    assert sizes == (each, 2 * width * width + width * width + width, 2 * layers * heads, width * words)
    pairs = sum(range(1, length + 1))
    assert operations.plain_row(sizes, length) == 3 * (
        length * each + pairs * 2 * layers * heads + length * width * words
    )
    choices = list(itertools.combinations(range(length), min(positions or length, length)))
    thoughts = len(choices[0]) * rationales
    before = fmean(sum(position + 1 for position in choice) for choice in choices)
    seen = pairs + rationales * (3 + 2 + 1) * before
    own = thoughts * sum(range(1, 7))
    read = length + thoughts * (3 + 2 + 1)
    learned = read * each + (seen + own) * sizes.attention + thoughts * 2 * sizes.mixing
    scored = length + thoughts * 2 + (0 if pauses else thoughts * 3 // 2)
    expected = 3 * (learned + scored * sizes.head)
    if not pauses:
        sampled = thoughts * 3
        looked = pairs + rationales * 3 * before + thoughts * sum(range(1, 4))
        expected += (length + sampled) * each + looked * sizes.attention + sampled * sizes.head
    assert operations.thinking_row(model, length, positions=positions) == expected


@pytest.mark.parametrize("positions", [None, 2])
def test_steps_at_equal_operations_are_the_fewest_that_spend_as_much(positions):
    model = tiny.thinking_model("llama", thought_tokens=3, ahead_tokens=2, rationales=2)
    steps = operations.equal_steps(model, steps=7, rows=2, plain_rows=3, length=5, positions=positions)
    spent = 7 * 2 * operations.thinking_row(model, 5, positions=positions)
    each = 3 * operations.plain_row(operations.Sizes.of(model), 5)
    assert (steps - 1) * each < spent <= steps * each


def test_tokens_are_quartered_by_how_hard_the_base_finds_them():
    rows, base = np.array([0, 0, 0, 0, 1, 1, 1, 1]), -np.array([0.1, 5.0, 0.2, 6.0, 1.0, 2.0, 1.5, 2.5])
    groups, quarter = quarters_of_text(rows, base)
    assert quarter.tolist() == [0, 3, 0, 3, 1, 2, 1, 2]
    assert groups.counts.tolist() == [[4, 2, 0, 0, 2], [4, 0, 2, 2, 0]]
    assert measured.sums_of_text(base, rows, quarter).sum(0) == pytest.approx([-18.3, -0.3, -2.5, -4.5, -11.0])


def test_differences_are_paired_by_seed_and_the_base_is_the_same_for_all():
    counts = np.array([[2.0], [1.0]])
    values = {
        (BASE, WITHOUT): {UNTRAINED: np.array([[-8.0], [-3.0]])},
        (PLAIN, WITHOUT): {0: np.array([[-6.0], [-3.0]]), 1: np.array([[-4.0], [-2.0]])},
        ("paper", OWN_THOUGHTS): {1: np.array([[-3.0], [-1.0]]), 2: np.array([[-1.0], [0.0]])},
    }
    base, paper, plain = summed(values, Groups(("all",), counts))
    assert base["seeds"] == [] and base["mean"] == [-11 / 3]
    assert plain["by_seed"] == [[-3.0], [-2.0]] and plain["mean"] == [-2.5]
    assert plain["against"][BASE]["mean"] == pytest.approx([3.5 / 3])
    assert paper["against"][BASE]["mean"] == pytest.approx([(6 + 2.5) / 3])
    assert paper["against"][PLAIN]["mean"] == pytest.approx([2 / 3])  # with seed 1, which both have
    assert EQUAL_OPERATIONS not in paper["against"]
    drawn = bootstrap_columns(np.array([[1.0], [1.0]]), counts)[0]
    assert paper["against"][PLAIN]["interval"] == [list(drawn)]


def test_questions_without_reference_solutions_have_one_group():
    questions = (Question("a", "1"), Question("b", "2"))
    row = Row(WITHOUT, (Answered(True, 0.5, -1.0), Answered(False, 0.1, -3.0)), {})
    report = TaskReport("asked", Questions(questions, "here", ""), (row,))
    groups = steps_of_questions(report)
    assert groups.names == ("all",) and groups.counts.tolist() == [[1], [1]]
    values = values_of_task([(BASE, UNTRAINED, report)], groups)
    assert values[LOG_LIKELIHOOD][BASE, WITHOUT][UNTRAINED].tolist() == [[-1], [-3]]
    assert values[ACCURACY][BASE, WITHOUT][UNTRAINED].tolist() == [[1], [0]]


def test_a_share_of_the_documents_is_held_out_whatever_their_order():
    held = [number for number in range(3000) if is_held_out(f"document {number}", 10)]
    assert 240 < len(held) < 360
    assert is_held_out("abc", 0xBA7816BF8F01CFEA)  # the first eight bytes of the SHA-256 of "abc"


def test_settings_are_kept_and_what_differs_is_named(tmp_path):
    keep_settings(tmp_path, {"steps": 1, "names": ("a",)})
    keep_settings(tmp_path, {"steps": 1, "names": ("a",)})
    with pytest.raises(ValueError, match=re.escape("steps was 1 and is 2, further was None and is 3")):
        keep_settings(tmp_path, {"steps": 2, "names": ("a",), "further": 3})


def test_tables_are_markdown_with_intervals():
    cells = [["x", with_interval(0.12, (0.1, 0.2), sign="+")], ["y", with_interval(1, (float("nan"),) * 2, digits=1)]]
    assert markdown_table(["", "gain"], cells).splitlines() == [
        "|  | gain |",
        "| --- | ---: |",
        "| x | +0.120 [+0.100, +0.200] |",
        "| y | 1.0 |",
    ]
