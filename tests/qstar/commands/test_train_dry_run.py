"""``qstar train --dry-run``: what it says of a run is what the run does, and nothing is written."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from datasets import Dataset
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from qstar.commands.main import main
from qstar.training.dry_run import DryRun, checkpoints_of, dry_run, folder_of, size
from qstar.training.trainer import QuietStarTrainer

LINES = ["a b c d e f g h", "c a b e d f", "b b a c d e f g h i", "a c e g i k", "d e f"] * 3
SETTINGS = dict(
    thought_tokens=2, ahead_tokens=1, batch_size=2, seq_length=8, learning_rate=1e-2, use_cpu=True, logging_steps=1,
    num_train_epochs=1.0, save_steps=3, gradient_accumulation_steps=2, disable_tqdm=True, sample_steps=0, curves=False,
)  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with a plain model and its tokenizer, and a file of text."""
    root = tmp_path_factory.mktemp("dry")
    wide = dict(hidden_size=128, intermediate_size=256)
    tiny.plain_model("llama", **wide).save_pretrained(root / "model")
    tiny.plain_model("llama", **wide, tie_word_embeddings=True).save_pretrained(root / "tied")
    for name in ("model", "tied"):
        tiny.tokenizer().save_pretrained(root / name)
    Dataset.from_dict({"text": LINES}).to_json(root / "train.jsonl")
    return root


def flags(root: Path, *more: str, **changes) -> list[str]:
    given = SETTINGS | {"model": root / "model", "dataset": root / "train.jsonl"} | changes
    return ["train", *(word for name, value in given.items() for word in (f"--{name}", str(value))), *more]


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(x.relative_to(folder)): (x.stat().st_mtime_ns, x.stat().st_size) for x in folder.rglob("*")}


def written(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("model", ["model", "tied"])
def test_it_says_what_the_run_does(root, tmp_path, capsys, model):
    output = tmp_path / "run"
    said = dry_run(**SETTINGS, model=str(root / model), dataset=str(root / "train.jsonl"), output_dir=str(output))
    assert list(tmp_path.iterdir()) == []
    assert main(flags(root, model=root / model, output_dir=output)) == 0
    logged = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert said.loss == pytest.approx(logged[0]["loss"], rel=1e-6)
    assert said.steps == logged[-1]["step"] == 4
    assert (said.rows, said.step_rows, said.seq_length) == (15, 4, 8)
    checkpoints = sorted(output.glob("checkpoint-*"))
    assert said.checkpoints == len(checkpoints) == 2
    assert said.checkpoint_bytes == pytest.approx(written(checkpoints[0]), rel=0.02)
    assert said.disk == pytest.approx(written(output), rel=0.02)
    assert said.model_bytes == pytest.approx(written(output) - sum(map(written, checkpoints)), rel=0.02)
    assert said.disk == said.model_bytes + 2 * said.checkpoint_bytes
    assert 4 * said.parameters == pytest.approx(said.model_bytes, rel=0.001) and said.learned == said.parameters
    assert 2**26 < said.memory < 2**36 and said.gpu_memory is None and 0 < said.seconds < 60
    assert (said.folder, said.device, said.model) == (output, "cpu", "LlamaForCausalLM")


def test_nothing_is_written_and_the_page_is_printed(root, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = contents(root), contents(tmp_path)
    more = ["--dry-run", "--eval-dataset", str(root / "train.jsonl"), "--eval-strategy", "epoch"]
    assert main(flags(root, *more, eval_on_start=True, save_only_model=True, save_strategy="epoch")) == 0
    assert (contents(root), contents(tmp_path)) == before
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["model", "data", "run", "first step", "grid", "memory", "disk"]
    assert lines[1:3] == [
        "data        15 rows of up to 8 tokens",
        "run         4 steps of 4 rows, up to 32 tokens",
    ]
    assert "in runs/quiet-star: the model 1.07 MiB, checkpoints 1 of 1.07 MiB; " in lines[6]


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_nothing_is_evaluated_and_nothing_saved(root, tmp_path, monkeypatch, strategy):
    for name in ("evaluate", "_save_checkpoint", "save_model"):
        monkeypatch.setattr(QuietStarTrainer, name, lambda *_, name=name, **__: pytest.fail(f"{name} is called"))
    data = str(root / "train.jsonl")
    often = dict(eval_strategy=strategy, save_strategy=strategy, eval_steps=1, save_steps=1, eval_on_start=True)
    settings = SETTINGS | often | dict(gradient_accumulation_steps=8)  # an epoch is one step
    said = dry_run(**settings, model=str(root / "model"), dataset=data, eval_dataset=data, output_dir=tmp_path / "run")
    assert (said.steps, said.checkpoints) == (1, 1)


def test_the_folder_is_the_first_free_default(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert str(folder_of(None)) == "runs/quiet-star"
    (tmp_path / "runs" / "quiet-star").mkdir(parents=True)
    (tmp_path / "runs" / "quiet-star-2").mkdir()
    assert str(folder_of(None)) == "runs/quiet-star-3"
    assert folder_of("other") == Path("other")


def test_a_stream_has_as_many_steps_as_it_is_given(root, tmp_path):
    (tmp_path / "data").mkdir()
    Dataset.from_dict({"text": LINES}).to_json(tmp_path / "data" / "train.jsonl")
    settings = SETTINGS | dict(max_steps=7, save_strategy="epoch")
    said = dry_run(**settings, model=str(root / "model"), dataset=str(tmp_path / "data"), output_dir=tmp_path / "run")
    assert (said.rows, said.steps, said.checkpoints) == (None, 7, 1)
    assert "a stream of rows of up to 8 tokens" in str(said)


@pytest.mark.parametrize(
    "changes",
    [
        dict(dataset="missing.jsonl"),
        dict(model="missing/model/of nobody"),
        dict(documents="line"),
        dict(eval_split="other"),
        dict(text_column="other"),
        dict(seq_length=1),
        dict(learning_rate="nan"),
        dict(start_token="<|endthought|>"),
        dict(dataset="stream"),
        dict(output_dir="model"),
        dict(output_dir="ran"),
    ],
    ids=lambda changes: "-".join(map(str, *changes.items())),
)
def test_it_refuses_what_the_run_would_in_the_same_words(root, tmp_path, capsys, monkeypatch, changes):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stream").mkdir()
    Dataset.from_dict({"text": LINES}).to_json(tmp_path / "stream" / "train.jsonl")
    (tmp_path / "ran").mkdir()
    (tmp_path / "ran" / "metrics.jsonl").write_text("")
    (tmp_path / "model").symlink_to(root / "model")
    command = flags(root, **changes, **({} if "output_dir" in changes else {"output_dir": "run"}))
    before = contents(tmp_path)
    assert main([*command, "--dry-run"]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert contents(tmp_path) == before
    assert main(command) == 1
    assert capsys.readouterr().err.splitlines()[-1] == said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dry-run"], "dry_run is given, but not a model and a dataset, whose first step could be tried"),
        (["--dry-run", "--model", "a"], "dataset is missing: give a model and a dataset, whose first step is tried"),
        (["--dry-run", "--model", "a", "--dataset", "b", "--resume"], "resume_from_checkpoint is given, but the first"),
    ],
)
def test_what_cannot_be_tried_is_refused(capsys, arguments, message):
    assert main(["train", *arguments]) == 1
    assert capsys.readouterr().err.startswith(f"qstar train: {message}")


def test_it_is_one_of_two_things_that_train_nothing(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--dry-run", "--print-config"])
    assert stopped.value.code == 2


@pytest.mark.parametrize(
    ("save", "limit", "best", "expected"),
    [
        (SaveStrategy.NO, None, False, 0),
        (SaveStrategy.STEPS, None, False, 4),
        (SaveStrategy.STEPS, 2, False, 2),
        (SaveStrategy.STEPS, 9, False, 4),
        (SaveStrategy.STEPS, 1, True, 2),
        (SaveStrategy.EPOCH, None, False, 3),
        (SaveStrategy.BEST, None, False, 5),
    ],
)
def test_checkpoints_are_counted_with_the_last_and_without_those_beyond_the_limit(save, limit, best, expected):
    state = SimpleNamespace(max_steps=10, save_steps=3, eval_steps=2, num_train_epochs=3)
    args = SimpleNamespace(
        save_strategy=save, eval_strategy=IntervalStrategy.STEPS, save_total_limit=limit, load_best_model_at_end=best
    )
    assert checkpoints_of(args, state) == expected


def test_a_disk_without_room_is_a_problem():
    numbers = dict(rows=5, seq_length=8, step_rows=2, steps=3000, device="cuda:0", stage=None, seconds=0.5, loss=2.0)
    numbers |= dict(grid=8640, at_once=4096, largest=123456)
    memory = dict(memory=2**30, gpu_memory=2**31, model_bytes=2**30, checkpoint_bytes=3 * 2**30, folder=Path("run"))
    said = DryRun("GPT2LMHeadModel", 1234567, 1234, **numbers, **memory, checkpoints=2, free=6 * 2**30)
    assert str(said).splitlines() == [
        "model       GPT2LMHeadModel, 1,234,567 parameters, 1,234 of which learn",
        "data        5 rows of up to 8 tokens",
        "run         3,000 steps of 2 rows, up to 16 tokens",
        "first step  0.50 s on cuda:0, loss 2.0000",
        "grid        up to 8,640 tokens in a batch, 4,096 of them read at once; memory has room for about 123,456 "
        "(--max-grid-tokens)",
        "memory      1,024 MiB in this process, 2,048 MiB on the GPU, at most",
        "disk        7.00 GiB in run: the model 1.00 GiB, checkpoints 2 of 3.00 GiB; 6.00 GiB are free",
        "problem     the disk has no room for the run: --save-total-limit or --save-only-model saves some",
    ]
    assert (size(2**20 // 2), size(3 * 2**30)) == ("0.50 MiB", "3.00 GiB")


def test_of_a_curriculum_the_stage_with_the_largest_grid_is_tried(root, tmp_path):
    settings = {name: value for name, value in SETTINGS.items() if name not in ("thought_tokens", "num_train_epochs")}
    named = dict(model=str(root / "model"), dataset=str(root / "train.jsonl"), output_dir=tmp_path / "run")
    largest = dict(steps=3, thought_tokens=4, rationales=3)
    stages = [dict(steps=2, thought_tokens=1), largest, dict(steps=2, thought_tokens=6, distil=True)]
    said = dry_run(**settings, **named, stages=stages)
    assert (said.stage, said.steps, said.grid) == (2, 7, 2 * (8 + 8 * 3 * 6))
    assert str(said).splitlines()[3].startswith("stage 2     ")
    assert said.loss == dry_run(**settings, **named, stages=[largest]).loss
    assert said.loss != dry_run(**settings, **named, stages=stages[:1]).loss


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.gpu
def test_the_memory_of_a_gpu_is_said(root, tmp_path):
    settings = SETTINGS | dict(use_cpu=False)
    said = dry_run(
        **settings, model=str(root / "model"), dataset=str(root / "train.jsonl"), output_dir=tmp_path / "run"
    )
    assert said.gpu_memory > said.model_bytes and said.device.startswith("cuda")
