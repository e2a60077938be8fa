"""The front door: ``qstar train`` from the first word to its report, every row of which is computed again by hand."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from plain_answers import answer_log_probs, greedy_thought
from torch import Tensor
from transformers import AutoModelForCausalLM

from qstar import load, reference, train_embedded, wrap
from qstar.commands.main import main
from qstar.embedded import run
from qstar.embedded.pretrain import PretrainSettings, pretrained_model
from qstar.embedded.task import EQUALS, WORKING, build_tokenizer, problems, split_of
from qstar.inspection.data import Inspection

TINY = PretrainSettings(
    width=16, layers=1, heads=2, key_value_heads=1, intermediate=16, batch_size=16, max_steps=30, tried=8
)
PROBLEMS, SEED, THOUGHT_TOKENS = 12, 3, 3
FLAGS = (
    f"--seed {SEED} --thought-tokens {THOUGHT_TOKENS} --rationales 2 --max-steps 3 --batch-size 2 --seq_length 24 "
    "--mixing-head-lr-factor 1000 --sample-steps 2 --report-to none --use-cpu"
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Where the first models are kept."""
    return tmp_path_factory.mktemp("cache")


def run_command(folder, cache, flags: str) -> str:
    """One run of the command at a tiny size; what it printed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "CACHE", cache)
        patch.setattr(run, "PROBLEMS", PROBLEMS)
        patch.setattr(run, "pretrained_model", partial(pretrained_model, settings=TINY))
        printed = []
        patch.setattr("builtins.print", lambda *words, **options: printed.append(" ".join(map(str, words))))
        with pytest.warns(UserWarning, match="below its goal"):
            assert main(["train", "--output-dir", str(folder), *flags.split()]) == 0
    return "\n".join(printed)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, cache):
    """A run: its folder, what it printed, and the cache with its first model."""
    folder = tmp_path_factory.mktemp("run") / "result"
    return folder, run_command(folder, cache, FLAGS), cache


@torch.no_grad()
def score(model, think) -> dict[str, float]:
    """What the report says of a model; ``think`` gives the thought about a problem by its number and prompt."""
    model.set_attn_implementation("eager")
    asked = problems(PROBLEMS, SEED, build_tokenizer())
    choices, right, first = torch.tensor(asked.choices), [], 0
    for number, (prompt, answer) in enumerate(zip(map(torch.tensor, asked.prompts), asked.answers, strict=True)):
        log_probs = answer_log_probs(model, prompt, choices, think(number, prompt))
        right.append(log_probs[asked.choices.index(answer)])
        first += int(asked.choices[int(log_probs.argmax())] == answer)
    right = torch.stack(right)
    return {
        "log_likelihood": right.mean().item(),
        "probability": right.exp().mean().item(),
        "accuracy": first / PROBLEMS,
    }


def without_thoughts(number: int, prompt: Tensor) -> None:
    return None


def models_of_the_report(folder, cache):
    """For each row of the report: a model that is made or loaded here, and what it thinks."""
    decoder, tokenizer = pretrained_model(cache, SEED, TINY)
    before = wrap(
        decoder, tokenizer, thought_tokens=THOUGHT_TOKENS, ahead_tokens=1, start_init=WORKING, end_init=EQUALS
    )
    trained, _ = load(folder)
    plain = AutoModelForCausalLM.from_pretrained(folder / "plain")
    plain.qstar = trained.qstar
    digits = run.random_digits(problems(PROBLEMS, SEED, tokenizer), THOUGHT_TOKENS, SEED)
    return {
        "before, without thoughts": (before, without_thoughts),
        "before, with untrained thoughts": (before, lambda number, prompt: greedy_thought(before, prompt)),
        "plain training, without thoughts": (plain, without_thoughts),
        "trained to think, without thoughts": (trained, without_thoughts),
        "trained to think, random digits as thoughts": (trained, lambda number, prompt: digits[number]),
        "trained to think, with its thoughts": (trained, lambda number, prompt: greedy_thought(trained, prompt)),
    }


def plain_hidden_states(model, tokens: Tensor) -> Tensor:
    return model.base_model(tokens[None], use_cache=False).last_hidden_state[0]


@pytest.mark.filterwarnings("ignore:the built-in decoder stopped")
def test_every_row_of_the_report_is_that_of_plain_passes(finished, monkeypatch):
    folder, printed, cache = finished
    report = json.loads((folder / "report.json").read_text())
    rows = models_of_the_report(folder, cache)
    assert list(report["scores"]) == list(rows)
    for name, (model, think) in rows.items():
        if "plain" in name:  # a model without thought embeddings
            monkeypatch.setattr(reference, "hidden_states", plain_hidden_states)
        expected = score(model, think)
        monkeypatch.undo()
        assert report["scores"][name] == pytest.approx(expected, abs=1e-5), name
        line = next(line for line in printed.splitlines() if line.startswith(name))
        shown = [
            f"{expected['log_likelihood']:.3f}",
            f"{expected['probability']:.1%}",
            f"{expected['accuracy']:.1%}",
        ]
        assert line.removeprefix(name).split() == shown
    likelihoods = {round(row["log_likelihood"], 6) for row in report["scores"].values()}
    assert len(likelihoods) == 5, "only untrained thoughts may leave a row as it was"


def test_the_run_leaves_what_it_says(finished):
    folder, printed, _ = finished
    report = json.loads((folder / "report.json").read_text())
    assert (report["problems"], report["steps"], report["seed"]) == (PROBLEMS, 3, SEED)
    control = [json.loads(line) for line in (folder / "plain" / "metrics.jsonl").read_text().splitlines()]
    assert control[-1]["step"] == 3, "as many steps of plain training"
    tried, saved = printed.splitlines()[-2:]
    assert tried == f"try it: qstar generate {folder} --prompts {folder / 'problems.jsonl'} --max-new-tokens 1"
    assert saved == f"saved in {folder}"
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "thoughts" in record] == [0, 2]
    assert json.loads((folder / "training_args.json").read_text())["max_steps"] == 3
    model, _ = load(folder)
    assert (model.qstar.thought_tokens, model.qstar.rationales, model.qstar.start_init) == (3, 2, WORKING)


def inspected(folder):
    paths = sorted((folder / "inspections").glob("*.json"))
    return {path.stem: Inspection.from_json(path.read_text()) for path in paths}


def test_the_run_ends_with_a_page_of_its_thoughts_about_held_out_problems(finished):
    folder, printed, _ = finished
    found = inspected(folder)
    assert list(found) == ["step-000000", "step-000003"]
    page = folder / "inspections" / "index.html"
    assert f"see its thoughts: open {page} in a browser" in printed.splitlines() and page.is_file()
    problems_left = [json.loads(line) for line in (folder / "problems.jsonl").read_text().splitlines()]
    texts = ["".join(document.tokens) for document in found["step-000003"].documents]
    asked = [f"{row['prompt']} {row['answer']}<|endoftext|>" for row in problems_left[: len(texts)]]
    assert [text.replace(" ", "") for text in texts] == [text.replace(" ", "") for text in asked]
    assert 20 < len(texts) < 30


def test_a_run_that_pauses_is_inspected_as_well(tmp_path, cache):
    run_command(tmp_path / "result", cache, FLAGS.replace("--rationales 2", "--rationales 1 --pauses"))
    last = inspected(tmp_path / "result")["step-000003"]
    assert last.summary.entropy == 0 and last.summary.distinct == 1 / last.summary.thoughts


def test_what_the_defaults_of_its_own_say_gives_way_to_stages_and_to_no_mixing_head(tmp_path, cache):
    stages = '[{"steps":1},{"steps":2,"thought_tokens":2}]'
    flags = FLAGS.replace("--max-steps 3", f"--stages {stages}").replace(
        "--mixing-head-lr-factor 1000", "--no-mixing-head"
    )
    run_command(tmp_path / "result", cache, flags)
    assert json.loads((tmp_path / "result" / run.REPORT_FILE).read_text())["steps"] == 3
    model, _ = load(tmp_path / "result")
    assert (model.qstar.thought_tokens, model.qstar.mixing_head) == (2, False)


def test_the_run_leaves_held_out_problems_with_their_answers(finished):
    """Those that the report begins with, and more of the same test split."""
    folder, _, _ = finished
    rows = [json.loads(line) for line in (folder / "problems.jsonl").read_text().splitlines()]
    assert len(rows) == 200
    for row in rows:
        question, *digits, equals = row["prompt"].split(" ")
        assert set(row) == {"prompt", "answer"} and (question, len(digits), equals) == ("Q", 5, "=")
        assert row["answer"] == str(sum(map(int, digits)) % 10)
        assert split_of(tuple(map(int, digits))) == "test"
    assert len({row["prompt"] for row in rows}) > 190
    tokenizer, asked = build_tokenizer(), problems(PROBLEMS, SEED, build_tokenizer())
    assert tokenizer([row["prompt"] for row in rows[:PROBLEMS]])["input_ids"] == asked.prompts


def test_the_problems_it_leaves_are_answered_as_its_last_line_says(finished, capsys):
    """With as many right as plain passes find."""
    folder, _, _ = finished
    command = ["generate", str(folder), "--prompts", str(folder / "problems.jsonl"), "--max-new-tokens", "1"]
    assert main(command) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    model, tokenizer = load(folder)
    model.set_attn_implementation("eager")
    right = 0
    for row in map(json.loads, (folder / "problems.jsonl").read_text().splitlines()):
        prompt = torch.tensor(tokenizer(row["prompt"])["input_ids"])
        words = torch.arange(len(tokenizer) - 2)  # all but the two of thoughts
        log_probs = answer_log_probs(model, prompt, words, greedy_thought(model, prompt))
        right += int(words[log_probs.argmax()]) == tokenizer.convert_tokens_to_ids(row["answer"])
    assert last == f"accuracy {right / 200:.1%} ({right} of 200)"


def test_the_control_learns_from_the_text_alone(finished):
    """Its loss is the mean negative log-likelihood that transformers finds in the same rows."""
    folder, _, _ = finished
    plain = AutoModelForCausalLM.from_pretrained(folder / "plain")
    wrapped, _ = load(folder)
    tokens = torch.tensor([problem[:7] for problem in problems(4, SEED, build_tokenizer()).prompts])
    theirs = plain(tokens, labels=tokens).loss
    wrapped.load_state_dict(plain.state_dict(), strict=False)
    args = run.QuietStarArguments(str(folder / "other"), report_to="none", use_cpu=True)
    trainer = run.PlainTrainer(wrapped, args)
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    loss, output = trainer.compute_loss(wrapped, inputs, return_outputs=True)
    # Start and end tokens have no probability with us; here they are too improbable to show.
    forbidden = plain(tokens).logits[:, :-1].softmax(-1)[..., wrapped.language_head().forbidden].sum(-1)
    torch.testing.assert_close(loss, theirs + torch.log1p(-forbidden).mean(), rtol=1e-5, atol=1e-6)
    assert output["loss"] is loss


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (dict(resume_from_checkpoint=True), ValueError, "resume_from_checkpoint is True, but the embedded default"),
        (dict(eval_dataset="held-out.txt"), ValueError, "eval_dataset is 'held-out.txt', but the embedded default"),
        (dict(start_init="---"), ValueError, "start_init is '---', but the embedded default has its own"),
        (dict(start_init=None), ValueError, "start_init is None, but the embedded default has its own"),
        (dict(num_train_epochs=7), ValueError, "num_train_epochs is 7, but the embedded default has its own"),
        (dict(documents="line"), ValueError, "documents is 'line', but the embedded default has its own"),
        (dict(model="x"), ValueError, r"model is 'x', but the embedded default has its own: qstar.train\(\) takes it"),
        (dict(max_step=3), TypeError, r"train_embedded\(\) has no setting 'max_step'; did you mean 'max_steps'"),
        (dict(thought_temperature=-1.0), ValueError, r"thought_temperature is -1\.0, but it must be at least 0"),
        (dict(baseline="median"), ValueError, "baseline is 'median', but it must be one of"),
        (dict(rationales=0), ValueError, "rationales is 0, but it must be an integer of at least 1"),
    ],
)
def test_the_embedded_default_refuses_what_it_cannot_use(settings, error, message, tmp_path, monkeypatch):
    """Before it has trained anything."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "pretrained_model", lambda *_: pytest.fail("it has begun"))
    with pytest.raises(error, match=message):
        train_embedded(**settings)


def test_an_embedded_run_does_not_write_over_another(finished):
    folder, _, _ = finished
    with pytest.raises(FileExistsError, match="holds an earlier run"):
        train_embedded(folder)
