"""Every command of ``qstar``, from its arguments to what it prints and writes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import fields

import pytest
import tiny
import torch
from datasets import Dataset

from qstar import evaluate, load
from qstar.commands.main import COMMANDS, WAITING, main
from qstar.config import ThoughtSettings
from qstar.training.settings import QuietStarArguments, RunSettings
from qstar.training.trainer import QuietStarTrainer

LINES = ["a b c d e f g h", "c a b e d f", "b b a c d e f g h i", "a c e g i k"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder with a plain model and its tokenizer, and files of text."""
    root = tmp_path_factory.mktemp("commands")
    tiny.plain_model("llama").save_pretrained(root / "model")
    tiny.tokenizer().save_pretrained(root / "model")
    Dataset.from_dict({"text": LINES}).to_json(root / "train.jsonl")
    Dataset.from_dict({"text": LINES[::-1]}).to_json(root / "test.jsonl")
    return root


def train_command(folders, output, *more: str) -> list[str]:
    words = f"train --model {folders / 'model'} --dataset {folders / 'train.jsonl'} --output-dir {output} --use-cpu"
    sizes = "--thought-tokens 2 --ahead_tokens 1 --batch-size 2 --seq-length 8 --max-steps 2 --report-to none"
    return [
        *words.split(),
        *sizes.split(),
        "--sample-steps",
        "0",
        "--disable-tqdm",
        "true",
        "--learning-rate",
        "0.01",
        *more,
    ]


@pytest.fixture(scope="module")
def trained(folders):
    """What ``qstar train`` made of it, with settings that are not the defaults."""
    output = folders / "trained"
    more = ("--sigmoid", "--start-init", "a b", "--end-token", "<|done|>", "--save-steps", "1", "--seed", "5")
    assert main(train_command(folders, output, *more)) == 0
    return output


def test_train_takes_model_data_and_settings_from_its_flags(trained, capsys):
    model, tokenizer = load(trained)
    mine = model.qstar
    assert (mine.thought_tokens, mine.ahead_tokens, mine.rationales) == (2, 1, 2)
    assert (mine.sigmoid, mine.start_init, mine.end_token) == (True, "a b", "<|done|>")
    assert tokenizer.convert_tokens_to_ids("<|done|>") == mine.end_token_id
    settings = json.loads((trained / "training_args.json").read_text())
    assert (settings["seed"], settings["per_device_train_batch_size"], settings["seq_length"]) == (5, 2, 8)
    steps = [json.loads(line)["step"] for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert steps[-1] == 2
    before = tiny.plain_model("llama").lm_head.weight
    assert not torch.equal(model.lm_head.weight[: len(before)], before)


def test_train_resumes_where_it_is_asked_to(folders, trained, tmp_path, capsys, monkeypatch):
    """A run that goes on after a checkpoint ends like one that was not interrupted."""
    more = ("--sigmoid", "--start-init", "a b", "--end-token", "<|done|>", "--save-steps", "1", "--seed", "5")
    command = train_command(folders, tmp_path / "run", *more)
    assert main(command) == 0
    (tmp_path / "run" / "checkpoint-2" / "trainer_state.json").unlink()
    assert main(command) == 1
    assert "holds an earlier run: go on with it by" in capsys.readouterr().err
    with pytest.MonkeyPatch.context() as patch:
        steps = []
        step = QuietStarTrainer.compute_loss
        patch.setattr(
            QuietStarTrainer, "compute_loss", lambda *a, **k: steps.append(a[0].state.global_step) or step(*a, **k)
        )
        assert main([*command, "--resume"]) == 0
    assert steps == [1], "the first step was not taken again"
    assert capsys.readouterr().out.splitlines()[-1] == f"saved in {tmp_path / 'run'}"
    with pytest.raises(SystemExit):
        main([*command, "--resume", "--resume_from_checkpoint", str(tmp_path)])
    assert "--resume_from_checkpoint with a given one: give one" in capsys.readouterr().err
    ours, theirs = (load(folder)[0].state_dict() for folder in (tmp_path / "run", trained))
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_train_refuses_half_of_a_run(folders, capsys):
    assert main(["train", "--model", str(folders / "model")]) == 1
    assert "dataset is missing: give a model and a dataset" in capsys.readouterr().err
    assert main(["train", "--resume"]) == 1
    assert "resume_from_checkpoint is True, but the embedded default has its own" in capsys.readouterr().err


def test_train_help_shows_every_setting_with_its_line(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--help"])
    assert stopped.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for kind in (RunSettings, ThoughtSettings, QuietStarArguments):
        for each in fields(kind):
            assert f"--{each.name}" in shown, each.name
    for each in fields(ThoughtSettings):
        default = f" (default: {each.default})" if each.default else ""
        assert each.metadata["help"] + default in shown
    places = [shown.index(f" --{name} ") for name in ("model", "thought_tokens", "output_dir")]
    assert places == sorted(places), "what is ours stands first"


def test_a_wrong_flag_is_named_in_two_lines(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--thought-token-count", "3"])
    assert stopped.value.code == 2
    usage, error = capsys.readouterr().err.splitlines()
    assert usage.startswith("usage: qstar train [--model NAME")
    assert error == "qstar train: error: unrecognized arguments: --thought-token-count 3"


def test_eval_prints_and_writes_what_evaluate_finds(folders, trained, capsys):
    command = f"eval {trained} --dataset {folders / 'test.jsonl'} --seq-length 8 --batch-size 3 --max-rows 3"
    assert main(command.split()) == 0
    printed = capsys.readouterr().out
    model, tokenizer = load(trained)
    expected = evaluate(model, tokenizer, folders / "test.jsonl", seq_length=8, batch_size=3, max_rows=3)
    written = json.loads((trained / "eval.json").read_text())
    assert written["dataset"] == str(folders / "test.jsonl")
    for name, value in expected.summary().items():
        assert written[name] == pytest.approx(value), name
    base, talk = expected.nll_base_ahead[0], expected.nll_talk_ahead[0]
    assert f"{-base:.4f}  {-talk:.4f}  {base - talk:+.4f}".split() == printed.splitlines()[2].split()[2:]
    assert f"{expected.tokens} tokens predicted" in printed


def test_eval_takes_sampling_and_a_place_for_its_result(folders, trained, tmp_path):
    place = tmp_path / "sampled.json"
    command = f"eval {trained} --dataset {folders / 'test.jsonl'} --seq-length 8 --thought-temperature 1 --seed 7"
    assert main([*command.split(), "--output", str(place)]) == 0
    model, tokenizer = load(trained)
    options = dict(seq_length=8, temperature=1.0)
    expected = evaluate(model, tokenizer, folders / "test.jsonl", seed=7, **options)
    assert json.loads(place.read_text())["nll_talk"] == pytest.approx(expected.nll_talk)
    assert expected.nll_talk != evaluate(model, tokenizer, folders / "test.jsonl", seed=8, **options).nll_talk


def test_a_command_that_fails_says_why_and_shows_where_if_asked(tmp_path, capsys):
    command = ["eval", str(tmp_path), "--dataset", "x"]
    assert main(command) == 1
    brief = capsys.readouterr().err
    assert brief.startswith("qstar eval: ") and "not the folder of a Quiet-STaR model" in brief
    assert "Traceback" not in brief
    assert main(["--traceback", *command]) == 1
    whole = capsys.readouterr().err
    assert "Traceback" in whole and "in load" in whole and whole.endswith(brief)


def test_no_command_and_an_unknown_one_show_the_usage(capsys):
    assert main([]) == 2
    shown = capsys.readouterr().out
    assert main(["--help"]) == 0
    assert capsys.readouterr().out == shown
    assert all(what in shown for what in COMMANDS.values())
    assert main(["traim"]) == 2
    assert "qstar: unknown command 'traim'" in capsys.readouterr().err


def test_the_help_comes_at_once():
    """Without torch, which takes seconds to import."""
    code = "import sys; from qstar.commands.main import main; main(['--help']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


@pytest.mark.skipif(sys.platform != "linux", reason="PyTorch has another OpenMP elsewhere")
@pytest.mark.parametrize(
    ("given", "spins"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)],
    ids=["by-default", "spins-given", "policy-given"],
)
def test_threads_that_wait_spin_shortly_unless_told_otherwise(given, spins):
    """As OpenMP itself says, which reads it when torch is imported."""
    environment = {name: value for name, value in os.environ.items() if name not in WAITING}
    environment |= given | {"OMP_DISPLAY_ENV": "verbose"}
    command = [sys.executable, "-m", "qstar", "merge", "--help"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    found = re.findall(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr)
    if not found:
        pytest.skip("this PyTorch has another OpenMP than GNU's")
    assert done.returncode == 0
    assert set(found) == {spins} if spins is not None else "1000" not in found
