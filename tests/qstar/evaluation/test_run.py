"""Rows over the same questions: which there are, what each reads, and that none is asked twice."""

from __future__ import annotations

import pytest
import tiny
import torch
from transformers import LlamaForCausalLM

from qstar.embedded.pretrain import PretrainSettings, decoder_config
from qstar.embedded.sums import SUMS
from qstar.embedded.task import build_tokenizer
from qstar.evaluation import run
from qstar.evaluation.controls import elsewhere, pauses, random_tokens
from qstar.evaluation.direct import answer_directly, thoughts_of
from qstar.evaluation.questions import read_questions
from qstar.evaluation.report import Answered
from qstar.evaluation.run import evaluate_tasks
from qstar.wrapping import wrap

NAMES = ["without thoughts", "with its thoughts", "pause tokens", "another position's thoughts", "random tokens"]
ASKED = 7


def plain_decoder(tokenizer):
    torch.manual_seed(0)
    return tiny.randomized(
        LlamaForCausalLM(decoder_config(tokenizer, PretrainSettings(width=16, intermediate=16)))
    ).eval()


@pytest.fixture(scope="module")
def thinker():
    tokenizer = build_tokenizer()
    model = wrap(plain_decoder(tokenizer), tokenizer, thought_tokens=3, ahead_tokens=1)
    with torch.no_grad():
        model.qstar_mixing_head.output.weight.normal_(0, 0.5)
    return model, tokenizer


def directly(model, tokenizer, thoughts, **sampling):
    questions = read_questions(SUMS, max_questions=ASKED).questions
    found = dict(answer_directly(model, tokenizer, SUMS, questions, thoughts=thoughts, **sampling))
    return tuple(found[place] for place in range(ASKED))


def assert_same(row, expected: tuple[Answered, ...]):
    for mine, other in zip(row.answers, expected, strict=True):
        assert (mine.right, mine.said, mine.detail) == (other.right, other.said, other.detail)
        assert mine.log_likelihood == pytest.approx(other.log_likelihood, rel=1e-5)


def test_each_row_reads_what_its_name_says(thinker):
    model, tokenizer = thinker
    [report] = evaluate_tasks(model, tokenizer, [SUMS], max_questions=ASKED)
    assert [row.name for row in report.rows] == NAMES and report.reference.name == NAMES[0]
    rows = {row.name: row for row in report.rows}
    own = directly(model, tokenizer, "own")
    thoughts, shapes = thoughts_of(own), [(1, 3)] * ASKED
    assert_same(rows["without thoughts"], directly(model, tokenizer, None))
    assert_same(rows["with its thoughts"], own)
    assert_same(rows["pause tokens"], directly(model, tokenizer, pauses(shapes, model.qstar.start_token_id)))
    assert_same(rows["another position's thoughts"], directly(model, tokenizer, elsewhere(thoughts, 0)))
    assert_same(rows["random tokens"], directly(model, tokenizer, random_tokens(model, tokenizer, shapes, 0)))
    assert rows["pause tokens"].settings == {"thoughts": "pause tokens", "token": "<|startthought|>"}
    assert len({tuple(each.log_likelihood for each in row.answers) for row in report.rows}) == len(NAMES)


def test_the_model_before_training_has_two_rows(thinker):
    model, tokenizer = thinker
    before = wrap(plain_decoder(tokenizer), tokenizer, thought_tokens=3, ahead_tokens=1)
    with torch.no_grad():
        before.lm_head.weight.add_(torch.randn(before.lm_head.weight.shape))
    [report] = evaluate_tasks(model, tokenizer, [SUMS], max_questions=ASKED, untrained=lambda: before)
    rows = {row.name: row for row in report.rows}
    assert [*rows] == [*NAMES, "before training, without thoughts", "untrained thoughts"]
    assert_same(rows["before training, without thoughts"], directly(before, tokenizer, None))
    its = thoughts_of(directly(before, tokenizer, "own"))
    assert_same(rows["untrained thoughts"], directly(model, tokenizer, its))


def test_sampled_thoughts_have_their_seed(thinker):
    model, tokenizer = thinker
    options = dict(max_questions=ASKED, controls=False, thought_temperature=1.0)
    [report] = evaluate_tasks(model, tokenizer, [SUMS], **options)
    assert [row.name for row in report.rows] == NAMES[:2]
    assert_same(report.rows[1], directly(model, tokenizer, "own", temperature=1.0, seed=0))
    drawn = evaluate_tasks(model, tokenizer, [SUMS], seed=1, **options)[0]
    assert drawn.questions != report.questions


def test_a_model_that_never_learned_to_think_has_one_row_and_chains_of_thought():
    tokenizer = build_tokenizer()
    model = plain_decoder(tokenizer)
    [report] = evaluate_tasks(model, tokenizer, [SUMS], max_questions=ASKED, chain_of_thought=0, max_new_tokens=4)
    assert [row.name for row in report.rows] == ["without thoughts", "chain of thought"]
    assert_same(report.rows[0], directly(model, tokenizer, None))
    assert report.rows[1].settings["max_new_tokens"] == 4


def test_a_thinking_model_reasons_with_and_without_thoughts(thinker):
    model, tokenizer = thinker
    options = dict(max_questions=2, controls=False, chain_of_thought=0, max_new_tokens=4, repeats=3, temperature=1.0)
    [report] = evaluate_tasks(model, tokenizer, [SUMS], **options)
    names = ["chain of thought, majority of 3", "chain of thought, majority of 3, with its thoughts"]
    assert [row.name for row in report.rows[2:]] == names
    assert all(len(answered.detail["texts"]) == 3 for row in report.rows[2:] for answered in row.answers)
    assert [row.settings["thinking"]["think"] for row in report.rows[2:]] == [False, True]


def test_what_is_on_disk_is_not_asked_again(thinker, tmp_path, monkeypatch):
    model, tokenizer = thinker
    options = dict(folder=tmp_path, identity={"hub": "a"}, max_questions=ASKED)
    asked = []

    def answering(*arguments, **named):
        for place, answered in answer_directly(*arguments, **named):
            asked.append(place)
            if len(asked) == stop:
                raise KeyboardInterrupt
            yield place, answered

    monkeypatch.setattr(run, "answer_directly", answering)
    stop = 2 * ASKED + 4  # within the third row
    with pytest.raises(KeyboardInterrupt):
        evaluate_tasks(model, tokenizer, [SUMS], **options)
    stop = None
    [report] = evaluate_tasks(model, tokenizer, [SUMS], **options)
    assert len(asked) == len(NAMES) * ASKED + 1, "the one that the interruption has lost"
    [whole] = evaluate_tasks(model, tokenizer, [SUMS], max_questions=ASKED)
    for row, expected in zip(report.rows, whole.rows, strict=True):
        assert_same(row, expected.answers)
    with pytest.raises(ValueError, match=r"answers that were made otherwise: model\.hub was 'a' and is 'b'"):
        evaluate_tasks(model, tokenizer, [SUMS], **(options | dict(identity={"hub": "b"})))


def test_thoughts_that_are_sampled_make_repeats_of_greedy_text_differ(thinker):
    model, tokenizer = thinker
    options = dict(max_questions=2, controls=False, chain_of_thought=0, max_new_tokens=4, repeats=2)
    [report] = evaluate_tasks(model, tokenizer, [SUMS], thought_temperature=1.0, **options)
    names = ["chain of thought", "chain of thought, majority of 2, with its thoughts"]
    assert [row.name for row in report.rows[2:]] == names


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(max_questions=0), "max_questions is 0, but it must be an integer of at least 1"),
        (dict(batch_size=True), "batch_size is True, but it must be an integer of at least 1"),
        (dict(chain_of_thought=-1), "chain_of_thought is -1, but it must be an integer of at least 0"),
        (dict(seed=-1), r"seed is -1, but it must be in 0..2\^32 - 1"),
        (dict(thought_temperature=-0.5), "thought_temperature is -0.5, but it must be a number of at least 0"),
        (dict(repeats=4), "repeats is given, but chain_of_thought is not: it would have no effect"),
        (dict(temperature=0.5), "temperature is given, but chain_of_thought is not"),
        (dict(exemplars="a.jsonl", chain_of_thought=0), "exemplars are given, but chain_of_thought is 0"),
        (dict(chain_of_thought=0, repeats=2), "repeats is 2, but all of them would be alike"),
        (dict(chain_of_thought=1), "1 exemplars are given, but task 'sums' shows its working without"),
        (dict(sources={"gsm8k": "a"}), "sources name 'gsm8k', but the tasks are sums"),
    ],
)
def test_what_has_no_effect_or_sense_is_refused_before_anything_is_asked(thinker, settings, message, monkeypatch):
    model, tokenizer = thinker
    monkeypatch.setattr(run, "answer_directly", lambda *_, **__: pytest.fail("a question is asked"))
    with pytest.raises(ValueError, match=message):
        evaluate_tasks(model, tokenizer, [SUMS], **(dict(max_questions=2, controls=False) | settings))


def test_a_setting_that_does_not_exist_is_named(thinker):
    with pytest.raises(TypeError, match=r"evaluate_tasks\(\) has no setting 'batchsize'; did you mean 'batch_size'"):
        evaluate_tasks(*thinker, [SUMS], batchsize=2)
