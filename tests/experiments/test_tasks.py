"""The tasks of the ladder: repeatable, right, disjoint splits, and a measure of what a decoder can do with them."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from common.ability import note_ability
from qstar.embedded.pretrain import PretrainSettings, decoder_config, pretrained_model
from tasks.digits import FEWEST, MOST
from tasks.every import TASKS
from tasks.stories import HOURS
from tasks.task import NOTE_SHARE, REPETITION_SHARE, SPLITS, WORKING_SHARE, Problem, split_of

FIRST_DOCUMENTS = {
    "digits": "Q 5 5 2 3 2 = T 5 0 2 5 7 : 7",
    "steps": "Q 4 5 1 1 7 = T 4 9 0 1 8 8 8 8 : 8",
    "stories": (
        "vera wakes at 7 , first waits for 6 hours , then writes for 4 hours , later fishes for 7 hours . now it is 12"
    ),
}
EVERY = pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))


def results_of(problem: Problem, modulus: int) -> list[int]:
    """The results of a problem's steps, from the numbers in its text."""
    numbers = [int(word) for word in problem.prompt.split() if word.isdigit()]
    return [sum(numbers[: count + 1]) % modulus for count in range(len(numbers))]


@EVERY
def test_a_task_is_the_same_everywhere(task):
    documents = task.documents(40, seed=0)
    assert documents[0] == FIRST_DOCUMENTS[task.name]
    assert documents == task.documents(60, seed=0)[:40]
    assert documents != task.documents(40, seed=1)
    assert task.problems(20, 3, "test") == task.problems(30, 3, "test")[:20]


@EVERY
def test_every_working_and_answer_is_right(task):
    modulus = HOURS if task.name == "stories" else 10
    for problem in task.problems(300, 1, "validation"):
        results = results_of(problem, modulus)
        said = [int(word) % modulus for word in problem.working if word.isdigit()]
        assert said == results + results[-1:] * (len(said) - len(results))
        assert int(problem.answer) % modulus == results[-1]
        assert problem.answer in task.choices
        assert problem.steps == len(results) - (task.name == "stories")
        assert len(problem.working) <= task.thought_tokens
        assert len(problem.named) == len(problem.working)
        assert set(problem.named) <= set(problem.prompt.split())


@EVERY
def test_splits_are_disjoint_and_problems_differ(task):
    asked = {split: {each.prompt for each in task.problems(300, 0, split)} for split in SPLITS}
    assert [len(prompts) for prompts in asked.values()] == [300, 300, 300]
    assert set.intersection(asked["train"], asked["test"]) == set()
    assert set.intersection(asked["train"], asked["validation"]) == set()
    assert set.intersection(asked["validation"], asked["test"]) == set()
    rng = random.Random(5)
    shares = Counter(split_of(task.draw(rng)) for _ in range(3000))
    assert all(abs(shares[split] / 3000 - 1 / 16) < 0.02 for split in ("validation", "test"))
    with pytest.raises(ValueError, match="split is 'dev', but it must be one of 'train', 'validation', 'test'"):
        task.problem(rng, "dev")


@EVERY
def test_documents_are_of_the_training_split_and_of_all_kinds(task):
    kinds: Counter[str] = Counter()
    for document in task.documents(2000, seed=2):
        words = document.split()
        if task.marker not in words:
            kinds["answer"] += 1
            prompt, note = " ".join(words[:-1]), None
        else:
            place = words.index(task.marker)
            prompt, note = " ".join(words[:place]), tuple(words[place + 1 : -2])
            assert words[-2] == task.close
        numbers = [word for word in prompt.split() if word.isdigit()]
        modulus = HOURS if task.name == "stories" else 10
        results = [sum(map(int, numbers[: count + 1])) % modulus for count in range(len(numbers))]
        assert int(words[-1]) % modulus == results[-1]
        assert split_of(Problem(prompt, (), (), 0)) == "train"
        if note is not None:
            said, needed = [word for word in note if word.isdigit()], len(numbers)
            working = [int(word) % modulus for word in said[:needed]] == results
            kinds["working" if working else "repetition" if said[:needed] == numbers else "anything"] += 1
    shares = {
        "answer": 1 - NOTE_SHARE,
        "working": NOTE_SHARE * WORKING_SHARE,
        "repetition": NOTE_SHARE * REPETITION_SHARE,
        "anything": NOTE_SHARE * (1 - WORKING_SHARE - REPETITION_SHARE),
    }
    assert all(abs(kinds[kind] / 2000 - share) < 0.04 for kind, share in shares.items()), kinds


def test_text_to_learn_answers_from_shows_no_working():
    for task in TASKS.values():
        for document in task.answered(200, seed=4):
            assert task.marker not in document.split() and document.split()[-1] in task.choices
            assert split_of(Problem(document.rpartition(" ")[0], (), (), 0)) == "train"


def test_steps_ask_sums_of_every_length():
    lengths = Counter(problem.steps for problem in TASKS["steps"].problems(300, 0, "validation"))
    assert set(lengths) == set(range(FEWEST, MOST + 1)) and min(lengths.values()) > 20


@EVERY
def test_every_word_is_one_token(task):
    tokenizer = task.tokenizer()
    assert len(tokenizer) == len(task.words) + 2
    for document in task.documents(300, seed=3):
        ids = tokenizer(document)["input_ids"]
        assert len(ids) == len(document.split()) and tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == document


def test_ability_is_that_of_every_problem_by_itself():
    task = TASKS["steps"]
    tokenizer = task.tokenizer()
    torch.manual_seed(0)
    shape = PretrainSettings(width=16, layers=1, heads=2, key_value_heads=1, intermediate=16, init_std=0.8)
    model = LlamaForCausalLM(decoder_config(tokenizer, shape))
    asked = task.problems(40, 0, "validation")
    found = note_ability(model, task, tokenizer, asked)

    written = after = alone = 0.0
    choices = tokenizer.convert_tokens_to_ids(list(task.choices))
    with torch.no_grad():
        for problem in asked:

            def next_logits(words, problem=problem):
                ids = tokenizer(" ".join([problem.prompt, *words]))["input_ids"]
                return model(torch.tensor([ids])).logits[0, -1]

            probability, said = 1.0, [task.marker]
            for word in problem.working:
                token = tokenizer.convert_tokens_to_ids(word)
                probability *= next_logits(said).softmax(-1)[token].item()
                said.append(word)
            written += probability
            answer = tokenizer.convert_tokens_to_ids(problem.answer)
            after += next_logits([*said, task.close]).argmax().item() == answer
            alone += choices[next_logits([])[choices].argmax()] == answer
    assert math.isclose(found.working, written / 40 / WORKING_SHARE, rel_tol=1e-4)
    assert (found.answer_after_working, found.answer_alone) == pytest.approx((after / 40, alone / 40))


def test_the_cache_tells_tasks_apart_and_measures_with_what_it_is_given(tmp_path):
    settings = PretrainSettings(width=16, layers=1, heads=2, key_value_heads=1, intermediate=16, max_steps=1, goal=0.0)
    measured: list[tuple[str, int]] = []

    def measure(model, task):
        measured.append((task.name, model.config.vocab_size))
        return note_ability(model, task, task.tokenizer(), task.problems(4, 0, "validation"))

    for task in (TASKS["digits"], TASKS["stories"]):
        for _ in range(2):
            model, tokenizer = pretrained_model(
                tmp_path, 0, settings, task.documents, task.tokenizer(), lambda model, task=task: measure(model, task)
            )
            assert isinstance(tokenizer, PreTrainedTokenizerFast)
            assert model.config.vocab_size == len(task.words) + 2
    assert measured == [("digits", 16), ("stories", len(TASKS["stories"].words) + 2)]
    assert len(list(tmp_path.iterdir())) == 2
