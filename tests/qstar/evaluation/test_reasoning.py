"""Chain of thought: what is asked, what is read out of scripted words, and the majority of repeats that differ."""

from __future__ import annotations

import pytest
import tiny
import torch
from scripted_model import TOKENIZER, Scripted

from qstar.embedded.sums import SUMS
from qstar.embedded.task import build_tokenizer
from qstar.evaluation.answers import Words
from qstar.evaluation.exemplars import read_exemplars
from qstar.evaluation.questions import Question
from qstar.evaluation.reasoning import ReasoningSettings, accuracy_of_repeats, reason
from qstar.evaluation.tasks import Task, find_task
from qstar.generation.settings import GenerationSettings
from qstar.wrapping import wrap

GSM8K = find_task("gsm8k")
STEPS, ASKED = " Let's think step by step.", "\nTherefore, the answer (arabic numerals) is"
EXEMPLARS = read_exemplars(GSM8K)[:2]


def answered(model, questions, task=GSM8K, tokenizer=TOKENIZER, **settings):
    """In the order of the questions."""
    found = dict(reason(model, tokenizer, task, questions, ReasoningSettings(**settings)))
    assert len(found) == len(questions)
    return [found[place] for place in range(len(questions))]


def question(text, answer, number=0):
    return Question(text, answer, number=number)


def sums(count):
    """Questions of different texts that a script takes for the same."""
    return [question(f"{'Now, ' * number}9 + 9?", "18", number) for number in range(count)]


# One answer


def test_without_exemplars_the_answer_is_asked_for_behind_the_reasoning():
    model = Scripted({STEPS: " 9 + 9 is 18 = 17 + 1. \nQ: and", ASKED: " 18 apples, not 20."})
    [found] = answered(model, [question("9 + 9?", "18")])
    assert (found.right, found.said, found.probability, found.log_likelihood) == (True, "18", None, None)
    assert found.detail == {
        "texts": [" 9 + 9 is 18 = 17 + 1. \n"],
        "answers": [" 18 apples, not 20."],
        "said": ["18"],
        "read_by": ["first"],
        "right": [True],
        "votes": {"18": 1},
    }


def test_the_second_prompt_is_the_first_with_the_reasoning_and_the_question_behind_it():
    cue = f"Q: 9 + 9?\nA:{STEPS} 9 + 9 is 18.{ASKED}"
    assert answered(Scripted({STEPS: " 9 + 9 is 18. \n", cue: " 7"}), [question("9 + 9?", "18")])[0].said == "7"


@pytest.mark.parametrize(
    "text, said, by",
    [
        (" 9 + 9 = 18. The answer is 18.\n\nQ: What is 5 + 5?\nA: 10", "18", "strict"),
        (" That makes 18.\n\nQ: 7", "18", "flexible"),
        (" I do not know.", None, None),
        (" The answer is −18.", "-18", "strict"),
    ],
)
def test_with_exemplars_the_answer_is_read_out_of_the_reasoning_before_the_next_question(text, said, by):
    [found] = answered(Scripted({"9 + 9?\nA:": text}), [question("9 + 9?", "18")], exemplars=EXEMPLARS)
    assert (found.said, found.right) == (said, said == "18")
    assert found.detail["texts"] == [text.split("Q:")[0]]
    assert found.detail["read_by"] == [by] and found.detail["votes"] == ({said: 1} if said else {})
    assert "answers" not in found.detail


def test_choices_are_named_by_letter_or_by_text():
    task = find_task("commonsense_qa")
    asked = Question("Where?", "B", ("bank", "library"), ("A", "B"))
    texts = [" So the answer is the library.", " Not (A). The answer is (B).", " (B), no, (A)"]
    for text, right in zip(texts, [True, True, False], strict=True):
        model = Scripted({"(B) library\nA:": text})
        [found] = answered(model, [asked], task, exemplars=read_exemplars(task)[:1])
        assert (found.said, found.right) == ("B" if right else "A", right)
    model = Scripted({STEPS: " Hm.", "among A through E, the answer is": " B, I think"})
    assert answered(model, [asked], task)[0].right


def test_answers_are_words_where_the_task_has_words():
    model = Scripted({"capital?\nA:": " It is old. The answer is  PARIS."})
    shown = Question("b", "Rome", rationale="r")
    [found] = answered(model, [question("capital?", "Paris")], Task("words", Words()), exemplars=(shown,))
    assert (found.said, found.right) == ("paris", True)


def test_reasoning_ends_at_the_most_tokens():
    model = Scripted({STEPS: " abcdefgh", ASKED: " 123456"})
    [found] = answered(model, [question("a", "1")], max_new_tokens=4, answer_tokens=3)
    assert found.detail["texts"] == [" abcd"] and found.detail["answers"] == [" 123"]


def test_the_longest_questions_come_first_and_what_is_said_does_not_depend_on_the_batch():
    texts = ["a" * length for length in (3, 30, 7, 60, 1)]
    script = {f"Q: {text}\nA:": f" The answer is {len(text)}." for text in texts}
    questions = [question(text, "60", number) for number, text in enumerate(texts)]
    for batch_size in (1, 2, 8):
        model = Scripted(script)
        settings = ReasoningSettings(exemplars=EXEMPLARS[:1], batch_size=batch_size)
        found = list(reason(model, TOKENIZER, GSM8K, questions, settings))
        assert [place for place, _ in found] == [3, 1, 2, 0, 4]
        assert [answer.said for _, answer in found] == ["60", "30", "7", "3", "1"]
        assert [answer.right for _, answer in found] == [True, False, False, False, False]
        assert max(model.rows) == min(batch_size, 5)


def test_greedy_reasoning_is_what_generate_says():
    model = tiny.plain_model("llama", vocab_size=len(TOKENIZER), max_position_embeddings=256)
    questions = [question(text, "1") for text in ("abc", "defghijk", "l")]
    found = answered(model, questions, max_new_tokens=12, answer_tokens=5)
    for each, answer in zip(questions, found, strict=True):
        ids = TOKENIZER(GSM8K.reasoning_prompt(each), return_tensors="pt").input_ids
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        text = TOKENIZER.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        assert answer.detail["texts"] == [text]


def test_the_embedded_task_reads_its_working():
    model = tiny.plain_model("llama", vocab_size=len(build_tokenizer()), eos_token_id=0)
    [found] = answered(model, [question("1 3 5 0 8", "7")], SUMS, build_tokenizer(), max_new_tokens=8)
    assert found.said == SUMS.read_answer(found.detail["texts"][0]) and "answers" not in found.detail


# Several


@pytest.fixture
def undecided():
    return Scripted({"9 + 9?\nA:": [f" The answer is {number}." for number in (18, 18, 18, 71, 60)]})


def test_the_majority_of_sampled_answers_counts(undecided):
    settings = dict(exemplars=EXEMPLARS, repeats=9, temperature=1.0)
    [found] = answered(undecided, [question("9 + 9?", "18")], **settings)
    said = found.detail["said"]
    assert said == [text[15:17] for text in found.detail["texts"]] and len({*said}) > 1
    assert found.detail["votes"] == {each: said.count(each) for each in said}
    assert found.said == max(said, key=said.count) and found.right == (found.said == "18")
    assert found.detail["right"] == [each == "18" for each in said]


def test_sampled_answers_depend_on_the_seed_and_the_question_alone(undecided):
    questions, settings = sums(6), dict(exemplars=EXEMPLARS, repeats=5, temperature=1.0)
    found = answered(undecided, questions, **settings)
    assert answered(undecided, questions[3:4], **settings) == found[3:4]
    assert answered(undecided, questions[::-1], batch_size=4, **settings) == found[::-1]
    assert len({tuple(each.detail["said"]) for each in found}) > 3
    assert answered(undecided, questions, seed=1, **settings) != found


def test_of_answers_that_are_said_as_often_the_first_counts():
    model = Scripted({"9 + 9?\nA:": [" The answer is 18.", " The answer is 17.", " None."]})
    found = answered(model, sums(30), exemplars=EXEMPLARS[:1], repeats=2, temperature=1.0)
    for each in found:
        said = [x for x in each.detail["said"] if x is not None]
        assert each.said == (said[0] if said else None)
    ties = [each for each in found if {*each.detail["said"]} == {"17", "18"}]
    assert {each.right for each in ties} == {True, False}
    assert any(each.said is None and each.detail["votes"] == {} for each in found)


def test_the_accuracy_of_each_repeat_is_told_beside_the_majoritys(undecided):
    found = answered(undecided, sums(5), exemplars=EXEMPLARS, repeats=3, temperature=1.0)
    expected = [sum(each.detail["said"][repeat] == "18" for each in found) / 5 for repeat in range(3)]
    assert accuracy_of_repeats(found) == expected


def test_a_second_prompt_follows_each_of_several_reasonings():
    script = {STEPS: [" nine", " ten"], f" nine{ASKED}": " 9", f" ten{ASKED}": " 10"}
    [found] = answered(Scripted(script), [question("a", "9")], repeats=6, temperature=1.0)
    expected = {" nine": "9", " ten": "10"}
    assert found.detail["said"] == [expected[text] for text in found.detail["texts"]]
    assert {*found.detail["said"]} == {"9", "10"}


@pytest.fixture(scope="module")
def thinking():
    model = wrap(
        tiny.plain_model("llama", vocab_size=len(TOKENIZER), max_position_embeddings=256),
        TOKENIZER,
        thought_tokens=2,
        ahead_tokens=1,
        check=False,
    )
    torch.manual_seed(1)
    with torch.no_grad():
        model.qstar_mixing_head.output.weight.normal_(0, 0.5)
    return model


def test_repeats_of_greedy_text_differ_by_their_thoughts(thinking):
    questions = [question(text, "1") for text in ("abc", "defghijk")]
    sampled = GenerationSettings(thought_temperature=1.0, thought_seed=5)
    settings = dict(exemplars=(Question("a", "1", rationale="b"),), max_new_tokens=10)
    found = answered(thinking, questions, thinking=sampled, repeats=3, **settings)
    for each, answer in zip(questions, found, strict=True):
        assert len({*answer.detail["texts"]}) == 3
        prompt = GSM8K.reasoning_prompt(each, settings["exemplars"])
        ids = TOKENIZER(prompt, return_tensors="pt").input_ids
        out = thinking.generate(ids, think=True, thought_temperature=1.0, thought_seed=5, max_new_tokens=10)
        text = TOKENIZER.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        assert answer.detail["texts"][0] == text, "the first has the seed that was given"
    assert answered(thinking, questions[:1], thinking=sampled, repeats=3, **settings) == found[:1]
    other = GenerationSettings(thought_temperature=1.0, thought_seed=6)
    assert answered(thinking, questions, thinking=other, repeats=3, **settings) != found


# What is refused


@pytest.mark.parametrize(
    "settings",
    [{}, dict(think=False), dict(think_when="never", thought_temperature=1.0), dict(thought_seed=3)],
    ids=str,
)
def test_repeats_that_would_be_alike_are_refused(thinking, settings):
    with pytest.raises(
        ValueError, match="repeats is 2, but all of them would be alike, since neither text nor thoughts"
    ):
        reason(thinking, TOKENIZER, GSM8K, [], ReasoningSettings(repeats=2, thinking=GenerationSettings(**settings)))


def test_a_plain_model_has_no_thoughts_that_could_differ():
    model = Scripted({})
    sampled = GenerationSettings(thought_temperature=1.0)
    with pytest.raises(ValueError, match="repeats is 2, but all of them would be alike"):
        reason(model, TOKENIZER, GSM8K, [], ReasoningSettings(repeats=2, thinking=sampled))
    with pytest.raises(ValueError, match="but the model is a plain one, which has no thoughts"):
        reason(model, TOKENIZER, GSM8K, [], ReasoningSettings(thinking=sampled))


def test_what_has_no_room_is_refused_before_anything_is_said():
    model = Scripted({STEPS: " a", ASKED: " 1"}, max_position_embeddings=150)
    questions = [question("a", "1", number=7), question("b" * 60, "1", number=8)]
    with pytest.raises(ValueError, match="question 8 is too long: 92 tokens are given and max_new_tokens is 77, but"):
        reason(model, TOKENIZER, GSM8K, questions, ReasoningSettings(max_new_tokens=30, answer_tokens=5))
    assert model.rows == []
    assert len(answered(model, questions[:1], max_new_tokens=30, answer_tokens=5)) == 1


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(repeats=0), "repeats is 0, but it must be an integer of at least 1"),
        (dict(batch_size=True), "batch_size is True, but"),
        (dict(max_new_tokens=1.5), "max_new_tokens is 1.5, but"),
        (dict(temperature=-1.0), "temperature is -1.0, but it must be a number of at least 0"),
        (dict(temperature=float("nan")), "temperature is nan, but"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        ReasoningSettings(**settings)


def test_exemplars_must_have_rationales():
    with pytest.raises(ValueError, match="question 'a' has no rationale, but it must have one to be shown"):
        reason(Scripted({}), TOKENIZER, GSM8K, [question("b", "1")], ReasoningSettings(exemplars=(question("a", "1"),)))
