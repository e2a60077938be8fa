"""A run of STaR that is killed wherever it may be goes on as if it had not been; what cannot be done is refused."""

from __future__ import annotations

import json

import pytest
import tiny
from scripted import HELD_OUT, QUESTIONS, SAID, Script, question, run, weights_of
from transformers import Trainer

from qstar.ancestors.wording import Wording
from qstar.training.folders import alone_in

TWO_ROUNDS = dict(rounds=2, patience=2, held_out=HELD_OUT, growth=2.0, batch_size=2)


def by_the_weights(prompt: str, weights: str) -> str:
    """Words that depend on every bit of the weights, some of them right."""
    return SAID[prompt] if int(weights, 16) % 3 or prompt == "a b q" else "m z m"


def files(folder) -> dict[str, str]:
    """What the rounds have written."""
    names = ("attempts.jsonl", "hinted.jsonl", "held_out.jsonl", "rationales.jsonl", "report.json")
    return {str(path.relative_to(folder)): path.read_text() for name in names for path in folder.rglob(name)}


class Mortal:
    """Kills the run at every second batch that is asked, and in the first training of each round."""

    def __init__(self, monkeypatch):
        self.left, self.trained = 1, set[int]()
        script, step = Script(monkeypatch, by_the_weights), Trainer.training_step
        said = script._said

        def dies(*batch):
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
            return said(*batch)

        def dies_in_training(trainer, *args, **kwargs):
            if trainer.state.global_step == 1 and trainer.args.max_steps not in self.trained:
                self.trained.add(trainer.args.max_steps)
                raise KeyboardInterrupt
            return step(trainer, *args, **kwargs)

        script._said = dies
        monkeypatch.setattr(Trainer, "training_step", dies_in_training)


def test_a_run_that_is_killed_again_and_again_ends_as_one_that_was_not(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        Script(patch, by_the_weights)
        whole = run(tmp_path, "whole", **TWO_ROUNDS)
    mortal, lives, killed = Mortal(monkeypatch), 0, None
    while killed is None:
        assert lives < 30
        try:
            mortal.left = 1
            killed = run(tmp_path, "killed", resume=lives > 0, **TWO_ROUNDS)
        except KeyboardInterrupt:
            lives += 1
            for name in ("attempts", "hinted", "held_out"):  # a line that the kill has cut short
                for path in (tmp_path / "killed").rglob(f"{name}.jsonl"):
                    path.write_text(path.read_text() + '{"question": 99, "sa')
    assert lives > 10 and len(mortal.trained) == 2
    cut = {name: text.split('{"question": 99, "sa')[0] for name, text in files(tmp_path / "killed").items()}
    assert cut == files(tmp_path / "whole")
    assert len(cut) == 1 + 1 + 2 * 5
    assert weights_of(killed.model) == weights_of(whole.model)
    assert (killed.rounds, killed.best, killed.before) == (whole.rounds, whole.best, whole.before)


def test_a_run_that_has_ended_is_taken_up_as_it_ended(tmp_path, monkeypatch):
    script = Script(monkeypatch, by_the_weights)
    first = run(tmp_path, held_out=HELD_OUT)
    asked = len(script.asked)
    again = run(tmp_path, held_out=HELD_OUT, resume=True)
    assert len(script.asked) == asked
    assert weights_of(again.model) == weights_of(first.model) and again.rounds == first.rounds


def test_where_no_answer_is_reached_it_says_what_was_said_and_what_to_do(tmp_path, monkeypatch):
    Script(monkeypatch, lambda prompt, weights: "m m")
    with pytest.raises(ValueError, match="no question of 5 was solved in the first round, with hints neither") as error:
        run(tmp_path)
    assert "to 'a b' it said ' m m', where 'c' is right" in str(error.value)
    assert "Give exemplars, easier questions, a larger max_new_tokens than 6, or an answer_pattern" in str(error.value)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(questions=[]), ValueError, "questions is empty, but STaR needs some to train on"),
        (dict(held_out=QUESTIONS[:1]), ValueError, "held_out holds 'a b', which is one of the questions to train on"),
        (dict(exemplars=[question("a b", "c", "m")]), ValueError, "exemplars holds 'a b', which is one of the quest"),
        (dict(exemplars=[question("x y", "c")]), ValueError, "exemplars holds 'x y' without a rationale"),
        (dict(rounds=0), ValueError, "rounds is 0, but it must be an integer of at least 1"),
        (dict(growth=0.5), ValueError, r"growth is 0\.5, but it must be at least 1"),
        (dict(learning_rate=0.0), ValueError, r"learning_rate is 0\.0, but it must be above 0"),
        (dict(first_step=3), TypeError, r"star\(\) has no setting 'first_step'; did you mean 'first_steps'"),
        (dict(resume=True), FileNotFoundError, "resume is True, but .* holds no star.json"),
        (dict(questions=[question("a ?", "c")]), ValueError, r"prompt 1 holds '\?', which the tokenizer does not know"),
        (dict(max_new_tokens=200), ValueError, "prompt 1: 3 tokens are given and max_new_tokens is 200, but"),
        (dict(model="./nowhere"), FileNotFoundError, "model is './nowhere', but there is no such file or folder"),
    ],
)
def test_what_cannot_be_done_is_refused(options, error, message, tmp_path):
    with pytest.raises(error, match=message):
        run(tmp_path, **options)


def test_a_run_goes_on_only_as_it_began(tmp_path, monkeypatch):
    Script(monkeypatch, by_the_weights)
    run(tmp_path)
    with pytest.raises(FileExistsError, match="holds an earlier run: go on with it by resume=True"):
        run(tmp_path)
    with pytest.raises(
        ValueError, match=r"settings is .*'seed': 1.* began with .*'seed': 0.*: it can only go on as it"
    ):
        run(tmp_path, resume=True, seed=1)
    with pytest.raises(ValueError, match=r"questions is .* began with .*: it can only go on as it began"):
        run(tmp_path, resume=True, questions=QUESTIONS[1:])
    with alone_in(tmp_path / "run"), pytest.raises(BlockingIOError, match="another run is in it"):
        run(tmp_path, resume=True)


@pytest.mark.parametrize("kind", ["plain", "thinking"])
def test_models_say_and_learn_their_own_words(kind, tmp_path):
    """Nothing is scripted: of the answers half are what the model says, and these are solved; both kinds are loaded."""
    make = {"plain": tiny.plain_model, "thinking": tiny.thinking_model}[kind]
    model, tokenizer = make("llama"), tiny.tokenizer()
    said = {}
    for letter in "abcdefghij":
        ids = tokenizer(f"{letter} q", return_tensors="pt")
        word = tokenizer.decode(model.generate(**ids, max_new_tokens=1, do_sample=False)[0, 2:])
        if word.isalpha():
            said[letter] = word
    assert len(said) >= 4
    right = list(said)[1::2]
    questions = [question(letter, word if letter in right else "zz") for letter, word in said.items()]
    wording = Wording(prompt="{question} q", hinted_prompt="{answer} {question} q", answer_pattern=r"(\S+)", stop=())
    result = run(tmp_path, "own", questions, model=model, wording=wording, rationalise=False, batch_size=4)
    assert result.rounds[0].solved == len(right)
    kept = [json.loads(line) for line in (tmp_path / "own/round-01/rationales.jsonl").read_text().splitlines()]
    assert [(each["prompt"], each["completion"]) for each in kept] == [(f"{x} q", f" {said[x]}") for x in right]
    assert hasattr(result.model, "qstar") == (kind == "thinking")
    assert weights_of(result.model) != weights_of(model)


def test_adapters_are_refused(tmp_path):
    peft = pytest.importorskip("peft")
    model = tiny.plain_model("llama")
    model.add_adapter(peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="model has adapters, but each round trains a whole model: merge them first"):
        run(tmp_path, model=model)
