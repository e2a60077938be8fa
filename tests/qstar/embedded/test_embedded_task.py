"""The embedded default's task and its decoder: right, disjoint, repeatable, and cached under all of its settings."""

import json
import warnings
from dataclasses import replace

import pytest
import torch

from qstar.embedded import pretrain
from qstar.embedded.pretrain import RECORD_FILE, Ability, PretrainSettings, measure_ability, pretrained_model
from qstar.embedded.task import DIGITS, MODULUS, build_tokenizer, documents, problems, split_of

TINY = PretrainSettings(
    width=16, layers=1, heads=2, key_value_heads=1, intermediate=16, batch_size=4, max_steps=2, tried=8
)
FIRST_TRAINING_DOCUMENTS = ["Q 0 0 8 9 3 = 0", "Q 7 5 6 3 6 = 7"]
FIRST_TEST_PROBLEM = (4, 5, 7, 3, 4)


def digits_of(document: str) -> tuple[int, ...]:
    return tuple(map(int, document.split()[1 : 1 + DIGITS]))


def tiny_model(cache, seed=0, settings=TINY):
    with pytest.warns(UserWarning, match="below its goal"):
        return pretrained_model(cache, seed, settings)


def test_the_generator_is_the_same_everywhere():
    assert documents(2, seed=0) == FIRST_TRAINING_DOCUMENTS
    assert documents(50, seed=3) == documents(80, seed=3)[:50]
    assert documents(50, seed=3) != documents(50, seed=4)
    assert documents(50, seed=3) != documents(50, seed=3, split="test")


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_workings_and_answers_are_right(split):
    shown = 0
    for document in documents(400, seed=1, split=split):
        question, *working, answer = document.split(" = ")
        digits = digits_of(document)
        assert question == " ".join(["Q", *map(str, digits)])
        assert int(answer) == sum(digits) % MODULUS
        if working:
            marker, *sums = working[0].split()
            assert marker == "T"
            assert [int(value) for value in sums] == [sum(digits[: i + 1]) % MODULUS for i in range(DIGITS)]
            shown += 1
    assert 150 < shown < 250


def test_held_out_problems_are_disjoint_from_training():
    tokenizer = build_tokenizer()
    for split in ("train", "validation", "test"):
        assert {split_of(digits_of(document)) for document in documents(1000, seed=0, split=split)} == {split}
        prompts = map(tokenizer.decode, problems(200, 0, tokenizer, split=split).prompts)
        assert {split_of(digits_of(prompt)) for prompt in prompts} == {split}
    assert [digits_of(tokenizer.decode(prompt)) for prompt in problems(1, 0, tokenizer).prompts] == [FIRST_TEST_PROBLEM]
    with pytest.raises(ValueError, match="split is 'dev'"):
        documents(1, seed=0, split="dev")


def test_problems_are_documents_in_parts():
    tokenizer = build_tokenizer()
    asked = problems(20, 5, tokenizer)
    assert tokenizer.decode(asked.choices) == " ".join(map(str, range(MODULUS)))
    for prompt, working, answer in zip(asked.prompts, asked.workings, asked.answers, strict=True):
        text = tokenizer.decode([*prompt, asked.marker, *working, asked.equals, answer])
        question, sums, result = text.split(" = ")
        assert question.split()[0] == "Q" and sums.split()[0] == "T"
        assert int(result) == sum(digits_of(question)) % MODULUS == int(sums.split()[-1])


def test_the_tokenizer_round_trips(tmp_path):
    build_tokenizer().save_pretrained(tmp_path)
    for tokenizer in (build_tokenizer(), type(build_tokenizer()).from_pretrained(tmp_path)):
        for document in documents(50, seed=2):
            ids = tokenizer(document)["input_ids"]
            assert tokenizer.decode(ids) == document
            assert len(ids) == len(document.split()) and tokenizer.unk_token_id not in ids
        assert tokenizer("Q<|endoftext|>")["input_ids"] == [
            tokenizer.convert_tokens_to_ids("Q"),
            tokenizer.eos_token_id,
        ]


def test_the_cache_is_reused(tmp_path, monkeypatch):
    first, tokenizer = tiny_model(tmp_path)
    (folder,) = tmp_path.iterdir()
    record = json.loads((folder / RECORD_FILE).read_text())
    assert record["steps"] == 2 and record["width"] == 16

    monkeypatch.setattr(pretrain, "pretrain", lambda *_: pytest.fail("trained again"))
    second, _ = tiny_model(tmp_path)
    asked = torch.tensor(problems(4, 0, tokenizer).prompts)
    assert torch.equal(first(asked).logits, second(asked).logits)
    assert not second.training


def test_a_cache_entry_has_its_own_seed_and_settings(tmp_path):
    tiny_model(tmp_path)
    for seed, settings in ((1, TINY), (0, replace(TINY, learning_rate=1e-3)), (0, replace(TINY, layers=2))):
        model, _ = tiny_model(tmp_path, seed, settings)
        assert model.config.num_hidden_layers == settings.layers
    assert len(list(tmp_path.iterdir())) == 4


def test_a_changed_corpus_makes_another_model(tmp_path, monkeypatch):
    tiny_model(tmp_path)
    monkeypatch.setattr(pretrain, "documents", lambda count, seed: documents(count, seed, split="test"))
    tiny_model(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_an_interrupted_save_leaves_nothing_behind(tmp_path, monkeypatch):
    def fails(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(pretrain.LlamaForCausalLM, "save_pretrained", fails)
        with pytest.raises(KeyboardInterrupt):
            pretrained_model(tmp_path, 0, TINY)
    assert list(tmp_path.iterdir()) == []
    tiny_model(tmp_path)


def test_pretraining_is_repeatable_and_leaves_the_global_seed_alone(tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, _ = tiny_model(tmp_path / "one")
    assert torch.equal(torch.rand(3), expected)
    two, _ = tiny_model(tmp_path / "two")
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_a_model_that_reaches_the_goal_stops_without_a_warning(tmp_path):
    settings = replace(TINY, goal=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        pretrained_model(tmp_path, 0, settings)
    (folder,) = tmp_path.iterdir()
    assert json.loads((folder / RECORD_FILE).read_text())["steps"] == 0


class Oracle:
    """A stand-in that reads the digits and continues a document as the task defines it, but for ``mistakes``.

    Args:
        tokenizer: of the task.
        mistakes: for each problem that is not continued rightly the place of one wrong token.
    """

    def __init__(self, tokenizer, mistakes=()):
        self.size, self.zero, self.mistakes = len(tokenizer), tokenizer.convert_tokens_to_ids("0"), dict(mistakes)

    def eval(self):
        return self

    def __call__(self, ids):
        sums = (ids[:, 1 : 1 + DIGITS] - self.zero).cumsum(1) % MODULUS
        following = sums[:, -1:].repeat(1, ids.shape[1])
        marker = DIGITS + 2
        following[:, marker : marker + DIGITS] = sums
        for problem, place in self.mistakes.items():
            following[problem, place] = (following[problem, place] + 1) % MODULUS
        return type("Output", (), dict(logits=torch.nn.functional.one_hot(following + self.zero, self.size).float()))


def test_ability_scores_a_model_that_knows_everything():
    tokenizer = build_tokenizer()
    assert measure_ability(Oracle(tokenizer), problems(50, 0, tokenizer)) == Ability(1.0, 1.0, 1.0)


def test_ability_is_lowered_by_each_kind_of_mistake():
    tokenizer = build_tokenizer()
    question, marker, end = DIGITS + 1, DIGITS + 2, 2 * DIGITS + 3
    mistakes = {0: question, 1: question, 2: question, 3: marker, 4: marker + DIGITS - 1, 5: end, 6: end - 1}
    found = measure_ability(Oracle(tokenizer, mistakes), problems(10, 0, tokenizer))
    assert found.answer_alone == pytest.approx(0.7) and found.working == pytest.approx(0.8)
    assert found.answer_after_working == pytest.approx(0.9), "what follows the last token of a working is not asked"
