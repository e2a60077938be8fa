"""The embedded task as one to be evaluated: its questions are those of the corpus, written as they are there."""

from __future__ import annotations

import pytest

from qstar.embedded.sums import SUMS
from qstar.embedded.task import build_tokenizer, problems, split_of
from qstar.evaluation.questions import Question, read_questions


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_all_problems_of_a_split_are_asked(split):
    found = read_questions(SUMS, split=split, max_questions=300)
    assert found.source == f"sums, {split}"
    for question in found.questions:
        digits = tuple(map(int, question.text.split()))
        assert split_of(digits) == split and question.answer == str(sum(digits) % 10)
    counts = {each: len(SUMS.every_question(None, each)[1]) for each in ("train", "validation", "test")}
    assert sum(counts.values()) == 10**5 and counts["train"] == max(counts.values())


def test_questions_are_the_problems_of_the_corpus():
    tokenizer = build_tokenizer()
    every = {SUMS.prompt(each): each for each in read_questions(SUMS).questions}
    drawn = problems(50, 3, tokenizer)
    for prompt, working, answer in zip(drawn.prompts, drawn.workings, drawn.answers, strict=True):
        question = every[tokenizer.decode(prompt)]
        assert tokenizer(SUMS.prompt(question))["input_ids"] == prompt
        assert tokenizer(SUMS.continuation(question))["input_ids"] == [answer]
        assert tokenizer(question.rationale)["input_ids"] == working


def test_a_working_is_shown_asked_for_and_read():
    question = Question("1 3 5 0 8", "7", rationale="1 4 9 9 7")
    assert SUMS.prompt(question) + SUMS.worked(question) == "Q 1 3 5 0 8 = T 1 4 9 9 7 = 7"
    assert SUMS.reasoning_prompt(question) == "Q 1 3 5 0 8 = T"
    assert SUMS.read(" 1 4 9 9 7 = 7", question) == ("7", "strict")
    assert SUMS.read(" 1 4 9 9 7", question) == (None, None), "a working without its answer has none"
    assert SUMS.read_answer(" 1 = 4 = 5") == "4"
    assert SUMS.is_right("7", question) and not SUMS.is_right("8", question)


def test_sums_have_no_source_no_other_splits_and_no_exemplars():
    with pytest.raises(ValueError, match=r"source is 'a\.jsonl', but task 'sums' has no data set"):
        read_questions(SUMS, "a.jsonl")
    with pytest.raises(ValueError, match="split is 'dev', but it must be one of 'train', 'validation', 'test'"):
        read_questions(SUMS, split="dev")
    question = Question("1 3 5 0 8", "7")
    with pytest.raises(ValueError, match="1 exemplars are given, but task 'sums' shows its working without"):
        SUMS.reasoning_prompt(question, [question])
