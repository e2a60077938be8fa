"""Every number of an inspection, against plain loops, and against ``evaluate`` and the objective for the same seed."""

from __future__ import annotations

from dataclasses import replace
from math import inf, nan
from statistics import fmean

import pytest
import tiny
import torch
from datasets import Dataset

import qstar
from qstar import reference
from qstar.data import PadRight
from qstar.evaluation import controls
from qstar.evaluation.held_out import evaluate_rows
from qstar.evaluation.intervals import bootstrap
from qstar.grid import Text
from qstar.inspection import measure, run
from qstar.learning import Objective
from qstar.thinking import think

TEXTS = ["c a b d e", "f g h", "x y z a b c d"]
SIZES = dict(thought_tokens=2, ahead_tokens=2, rationales=2)


def model_of(**changes):
    return tiny.thinking_model("llama", **(SIZES | changes))


def row(*, begin: int = 0, end: int | None = None, text: str) -> torch.Tensor:
    """Tokens as a document has them."""
    tokens = tiny.tokenizer()(text)["input_ids"] + [1]
    return torch.tensor(tokens[begin:end])


def evaluated(model, rows, **options):
    """What ``evaluate`` finds on these rows, each a batch."""
    return evaluate_rows(model, [PadRight()([{"input_ids": each.tolist()}]) for each in rows], **options)


@torch.no_grad()
def test_every_number_of_every_position_is_that_of_plain_passes():
    model = model_of()
    found = qstar.inspect(model, tiny.tokenizer(), TEXTS, seed=3, controls=False)
    start, end = (torch.tensor([token]) for token in (model.qstar.start_token_id, model.qstar.end_token_id))
    seen = 0
    for document, text in zip(found.documents, TEXTS, strict=True):
        tokens = row(text=text)
        assert document.token_ids == tokens.tolist()
        assert [each.index for each in document.positions] == list(range(len(tokens) - 1))
        states = reference.hidden_states(model, tokens)
        for position in document.positions:
            i = position.index
            known = min(2, len(tokens) - 1 - i)
            log_base = [reference.logits(model, states[i + k]).log_softmax(-1) for k in range(known)]
            base = [log_base[k][tokens[i + k + 1]].item() for k in range(known)]
            assert position.base_log_prob[:known] == pytest.approx(base, rel=1e-4)
            assert position.base_log_prob[known:] == [None] * (2 - known)
            check_likeliest(position.before, log_base[0])
            scores = []
            for p, rationale in enumerate(position.rationales):
                thought = torch.tensor(rationale.token_ids)
                alone = torch.cat([tokens[: i + 1], start, thought, end, tokens[i + 1 : i + 2]])
                after = reference.hidden_states(model, alone)[i + 1 :]
                policy = reference.logits(model, after[:2]).log_softmax(-1)
                assert rationale.log_probs == pytest.approx(
                    policy.gather(-1, thought[:, None])[:, 0].tolist(), rel=1e-4
                )
                entropy = -(policy.exp() * policy.masked_fill(policy == -inf, 0)).sum(-1).mean().item()
                assert rationale.entropy == pytest.approx(entropy, rel=1e-4)
                mixed = [reference.mix(model, states[i + k], after[3 + k]) for k in range(known)]
                log_talk = [reference.logits(model, each).log_softmax(-1) for each in mixed]
                talk = [log_talk[k][tokens[i + k + 1]].item() for k in range(known)]
                assert rationale.talk_log_prob[:known] == pytest.approx(talk, rel=1e-4)
                assert rationale.talk_log_prob[known:] == [None] * (2 - known)
                moved = after[3] - states[i]
                weight = ((mixed[0] - states[i]) @ moved / (moved @ moved)).item()
                assert rationale.weight == pytest.approx(weight, rel=1e-3)
                if p == 0:
                    check_likeliest(position.after, log_talk[0])
                scores.append(sum(talk))
                seen += 1
            if known == 2:
                advantages = [score - fmean([*scores[:p], *scores[p + 1 :]]) for p, score in enumerate(scores)]
                assert [each.advantage for each in position.rationales] == pytest.approx(advantages, abs=1e-4)
            else:
                assert [each.advantage for each in position.rationales] == [None, None]
            means = [fmean(each.talk_log_prob[k] for each in position.rationales) for k in range(known)]
            assert position.talk_log_prob[:known] == pytest.approx(means)
            assert position.gain == position.gain_ahead[0] == position.talk_log_prob[0] - position.base_log_prob[0]
            assert position.weight == fmean(each.weight for each in position.rationales)
            assert position.surprise == -position.base_log_prob[0]
    assert seen == 2 * (5 + 3 + 7)


def check_likeliest(found, log_probs):
    """Five of them, in order, with their probabilities and text; those that never are, not among them."""
    values, tokens = log_probs.topk(5)
    assert [each.token_id for each in found] == tokens.tolist()
    assert [each.probability for each in found] == pytest.approx(values.exp().tolist(), rel=1e-4)
    assert [each.text for each in found] == [f" {tiny.WORDS[token]}" for token in tokens.tolist()]


def test_a_single_rationale_has_the_advantage_over_no_thought():
    found = qstar.inspect(model_of(rationales=1), tiny.tokenizer(), TEXTS[0], controls=False)
    position = found.documents[0].positions[1]
    gains = [talk - base for talk, base in zip(position.talk_log_prob, position.base_log_prob, strict=True)]
    assert position.rationales[0].advantage == pytest.approx(sum(gains), abs=1e-5)


@pytest.mark.parametrize("options", [dict(temperature=0.0), dict(temperature=1.0, rationales=1, seed=5)], ids=str)
def test_the_summary_is_what_evaluate_finds_for_the_same_seed(options):
    model = model_of()
    summary = qstar.inspect(model, tiny.tokenizer(), TEXTS, **options).summary
    asked = {name: options[name] for name in ("temperature", "seed") if name in options}
    expected = evaluated(model, [row(text=text) for text in TEXTS], intervals=True, **asked)
    assert (summary.documents, summary.tokens) == (3, expected.tokens)
    assert summary.base_log_prob == pytest.approx(-expected.nll_base)
    assert summary.weight == pytest.approx(expected.mixing_weight)
    assert summary.gain == summary.gain_ahead[0]
    pairs = zip(expected.nll_base_ahead, expected.nll_talk_ahead, strict=True)
    assert [each.mean for each in summary.gain_ahead] == pytest.approx([base - talk for base, talk in pairs], rel=1e-5)
    assert [(each.low, each.high) for each in summary.gain_ahead] == [
        pytest.approx(tuple(each), rel=1e-5) for each in expected.gain_intervals
    ]
    assert len(summary.difficulties) == len(expected.difficulties) > 1
    for ours, other in zip(summary.difficulties, expected.difficulties, strict=True):
        assert (ours.least, ours.tokens) == (other.least, other.tokens)
        assert ours.below == (None if other.below == inf else other.below)
        assert ours.base_log_prob == pytest.approx(-other.nll_base)
        assert ours.gain.mean == pytest.approx(other.nll_base - other.nll_talk, rel=1e-4)


def test_several_documents_in_a_row_are_evaluated_as_they_are_inspected():
    """``evaluate`` packs documents into rows, and ends each with the end-of-sequence token; greedy thoughts agree."""
    model, tokenizer = model_of(), tiny.tokenizer()
    summary = qstar.inspect(model, tokenizer, TEXTS, temperature=0).summary
    expected = qstar.evaluate(model, tokenizer, Dataset.from_dict({"text": TEXTS}), seq_length=64)
    assert summary.tokens == expected.tokens
    assert summary.gain.mean == pytest.approx(expected.nll_base - expected.nll_talk, rel=1e-4)
    assert summary.weight == pytest.approx(expected.mixing_weight, rel=1e-4)


def test_thoughts_and_their_numbers_are_those_of_the_objective_for_the_same_seed():
    model, tokens = model_of(rationales=3), row(text=TEXTS[2])
    found = qstar.inspect(model, tiny.tokenizer(), TEXTS[2], seed=11, controls=False)
    output = Objective(seed=11)(model, tokens[None])
    positions = found.documents[0].positions
    assert [[each.token_ids for each in position.rationales] for position in positions] == output.thoughts[
        0, :-1
    ].tolist()
    assert found.summary.base_log_prob == pytest.approx(-output.nll_base.item())
    talk = [fmean(each.talk_log_prob[k] for each in positions[: len(positions) - k]) for k in range(2)]
    assert -fmean(talk) == pytest.approx(output.nll_talk.item())
    terms = [each.advantage * fmean(each.log_probs) for position in positions[:-1] for each in position.rationales]
    assert -fmean(terms) == pytest.approx(output.policy_loss.item(), rel=1e-4)


def test_a_long_text_is_read_in_parts_as_evaluate_reads_rows():
    model = model_of()
    options = dict(temperature=1.0, seed=2)
    found = qstar.inspect(model, tiny.tokenizer(), TEXTS, seq_length=4, rationales=1, **options)
    rows = [row(text=text, begin=begin, end=begin + 4) for text in TEXTS for begin in range(0, len(row(text=text)), 4)]
    expected = evaluated(model, rows, **options)
    assert [[each.index for each in document.positions] for document in found.documents] == [
        [0, 1, 2, 4],
        [0, 1, 2],
        [0, 1, 2, 4, 5, 6],
    ]
    assert found.summary.tokens == expected.tokens
    assert found.summary.gain.mean == pytest.approx(expected.nll_base - expected.nll_talk, rel=1e-5)


def test_reading_the_grid_in_parts_changes_no_number():
    whole = qstar.inspect(model_of(), tiny.tokenizer(), TEXTS)
    parts = qstar.inspect(model_of(), tiny.tokenizer(), TEXTS, max_grid_tokens=17)
    assert parts.settings == replace(whole.settings, max_grid_tokens=17)
    assert parts.summary.gain.mean == pytest.approx(whole.summary.gain.mean, rel=1e-5)
    for name, control in whole.summary.controls.items():
        assert parts.summary.controls[name].gain.mean == pytest.approx(control.gain.mean, rel=1e-4, abs=1e-6)
    flat = [[each.base_log_prob[0] for each in found.documents[2].positions] for found in (whole, parts)]
    assert flat[0] == pytest.approx(flat[1], rel=1e-5)


def test_logits_some_rows_after_the_other_change_no_number(monkeypatch):
    whole = qstar.inspect(model_of(), tiny.tokenizer(), TEXTS, controls=False)
    monkeypatch.setattr(measure, "LOGITS", 3 * 33)
    parts = qstar.inspect(model_of(), tiny.tokenizer(), TEXTS, controls=False)
    assert parts.summary.entropy == pytest.approx(whole.summary.entropy, rel=1e-6)
    for ours, other in zip(parts.documents[2].positions, whole.documents[2].positions, strict=True):
        for name in ("before", "after"):
            pairs = zip(getattr(ours, name), getattr(other, name), strict=True)
            assert all(x[:2] == y[:2] and x[2] == pytest.approx(y[2], rel=1e-5) for x, y in pairs)


def test_the_summary_counts_what_the_positions_hold():
    letters = [tiny.text(1, 20, seed)[0].tolist() for seed in range(10, 14)]
    texts = [" ".join(tiny.WORDS[token] for token in each) for each in letters]
    found = qstar.inspect(model_of(), tiny.tokenizer(), texts, temperature=0.3, controls=False)
    summary = found.summary
    positions = [(document, each) for document in found.documents for each in document.positions]
    rationales = [each for _, position in positions for each in position.rationales]
    thoughts = [tuple(each.token_ids) for each in rationales]
    assert summary.thoughts == len(rationales) == 2 * summary.tokens
    assert summary.distinct == len(set(thoughts)) / len(thoughts) < 1
    assert summary.entropy == pytest.approx(fmean(each.entropy for each in rationales))
    counts = [thoughts.count(each) for each in set(thoughts)]
    assert [each.count for each in summary.frequent] == sorted(counts, reverse=True)[:10]
    most = rationales[thoughts.index(max(thoughts, key=thoughts.count))]
    assert summary.frequent[0].count > 1 and thoughts.count(tuple(most.token_ids)) == summary.frequent[0].count
    right = [
        (each.before[0].token_id == following, each.after[0].token_id == following)
        for document, each in positions
        for following in [document.token_ids[each.index + 1]]
    ]
    assert (summary.repaired, summary.broken) == (right.count((False, True)), right.count((True, False)))
    assert (summary.repaired, summary.broken) == (2, 1)
    assert sum(each.tokens for each in summary.difficulties) == summary.tokens
    for each in summary.difficulties:
        here = [x.gain for _, x in positions if each.least <= x.surprise < (each.below or inf)]
        assert (each.tokens, each.gain.mean) == (len(here), pytest.approx(fmean(here)))


@torch.no_grad()
def test_controls_read_other_thoughts_at_the_same_positions():
    model, tokenizer = model_of(), tiny.tokenizer()
    found = qstar.inspect(model, tokenizer, TEXTS, seed=4)
    rows = [row(text=text) for text in TEXTS]
    shapes = [(len(each), 2) for each in rows]
    offsets = [2 * sum(map(len, rows[:number])) for number in range(3)]
    own = []
    for tokens, offset in zip(rows, offsets, strict=True):
        text = Text.from_inputs(tokens[None])
        thoughts = think(model, text, model.grid(len(tokens)), temperature=1.0, seed=4, row_offset=offset)
        own.append(thoughts[0, :, 0])
    pause = controls.pause_token(model, tokenizer)
    read = {
        controls.ELSEWHERE: controls.elsewhere(own, 4),
        controls.RANDOM: controls.random_tokens(model, tokenizer, shapes, 4),
        controls.PAUSE: [torch.full(shape, pause) for shape in shapes],
    }
    assert list(found.summary.controls) == list(read)
    gains = [[each.gain for each in document.positions] for document in found.documents]
    for name, thoughts in read.items():
        plain = [plain_gains(model, tokens, each) for tokens, each in zip(rows, thoughts, strict=True)]
        leads = [[x - y for x, y in zip(*pair, strict=True)] for pair in zip(gains, plain, strict=True)]
        control = found.summary.controls[name]
        for ours, expected in ((control.gain, plain), (control.lead, leads)):
            counts = [len(each) for each in expected]
            assert ours.mean == pytest.approx(sum(map(sum, expected)) / sum(counts), rel=1e-3, abs=1e-5)
            interval = bootstrap([sum(each) for each in expected], counts=counts)
            assert (ours.low, ours.high) == pytest.approx(tuple(interval), rel=1e-3, abs=1e-5)


def plain_gains(model, tokens, thoughts):
    """Gains of given thoughts ``[N, K]`` for the next tokens, by plain passes."""
    edges = torch.tensor([model.qstar.start_token_id, model.qstar.end_token_id])
    states = reference.hidden_states(model, tokens)
    gains = []
    for i in range(len(tokens) - 1):
        alone = torch.cat([tokens[: i + 1], edges[:1], thoughts[i], edges[1:]])
        mixed = reference.mix(model, states[i], reference.hidden_states(model, alone)[-1])
        both = [reference.logits(model, each).log_softmax(-1)[tokens[i + 1]] for each in (mixed, states[i])]
        gains.append((both[0] - both[1]).item())
    return gains


def test_an_untrained_head_gains_exactly_nothing():
    found = qstar.inspect(model_of(mixing=False), tiny.tokenizer(), TEXTS)
    gains = [each.gain_ahead for document in found.documents for each in document.positions]
    assert {gain for some in gains for gain in some} == {0.0, None}
    advantages = {x.advantage for document in found.documents for each in document.positions for x in each.rationales}
    assert advantages == {0.0, None}
    assert all((each.gain.mean, each.lead.mean) == (0, 0) for each in found.summary.controls.values())


def test_a_single_text_has_no_interval():
    summary = qstar.inspect(model_of(), tiny.tokenizer(), TEXTS[0]).summary
    estimates = [summary.gain, *(each for some in summary.controls.values() for each in (some.gain, some.lead))]
    assert len(estimates) == 7
    assert {(each.low, each.high) for each in estimates} == {(None, None)}


def test_texts_end_where_max_tokens_says_and_it_is_said():
    model, tokenizer = model_of(), tiny.tokenizer()

    def lengths(most):
        found = qstar.inspect(model, tokenizer, iter(TEXTS), max_tokens=most, controls=False)
        return [len(each.tokens) for each in found.documents], found.cut

    assert lengths(None) == lengths(18) == ([6, 4, 8], False)
    assert lengths(17) == ([6, 4, 7], True)
    assert lengths(10) == ([6, 4], True)
    assert lengths(3) == ([3], True)
    assert lengths(11) == ([6, 4], True), "a single token predicts nothing"


def test_thought_tokens_in_a_text_are_read_and_never_predicted():
    model, tokenizer = model_of(), tiny.tokenizer()
    start = model.qstar.start_token_id
    tokenizer.add_tokens([model.qstar.start_token])
    assert tokenizer.convert_tokens_to_ids(model.qstar.start_token) == start
    found = qstar.inspect(model, tokenizer, f"a b {model.qstar.start_token} c", controls=False)
    assert found.documents[0].token_ids[2] == start
    values = [each.base_log_prob for each in found.documents[0].positions]
    assert [[x is None for x in each] for each in values] == [
        [False, True],
        [True, False],
        [False, False],
        [False, True],
    ]
    assert found.summary.tokens == 3
    expected = evaluated(model, [torch.tensor(found.documents[0].token_ids)], temperature=1.0)
    assert expected.tokens == 3


def test_inspecting_leaves_the_model_as_it_was():
    model = model_of().train()
    qstar.inspect(model, tiny.tokenizer(), TEXTS[0])
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(texts=[]), ValueError, "texts hold no token to predict"),
        (dict(texts=["", "  "]), ValueError, "texts hold no token to predict"),
        (dict(texts=["a", 5]), ValueError, "texts, row 2: column 'text' holds the number 5"),
        (dict(temperatur=1), TypeError, "inspect.. has no setting 'temperatur'; did you mean 'temperature'"),
        (dict(temperature=-1), ValueError, "temperature is -1, but it must be a number of at least 0"),
        (dict(temperature=nan), ValueError, "temperature is nan"),
        (dict(temperature=0, rationales=2), ValueError, "rationales is 2, but at temperature 0 all are the same"),
        (dict(rationales=0), ValueError, "rationales is 0, but it must be an integer of at least 1"),
        (dict(seq_length=1), ValueError, "seq_length is 1, but it must be an integer of at least 2"),
        (dict(max_tokens=1), ValueError, "max_tokens is 1, but it must be an integer of at least 2"),
        (dict(max_grid_tokens=0), ValueError, "max_grid_tokens is 0, but it must be an integer of at least 1"),
        (dict(seed=-1), ValueError, "seed is -1, but it must be in 0..2.32 - 1"),
        (dict(texts="a " * 130, seq_length=130), ValueError, "max_position_embeddings = 128"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_what_cannot_be_inspected_is_refused(changes, error, message):
    options = dict(texts=TEXTS) | changes
    with pytest.raises(error, match=message):
        qstar.inspect(model_of(), tiny.tokenizer(), options.pop("texts"), **options)


def test_a_model_whose_predictions_are_not_finite_is_refused():
    model = model_of()
    with torch.no_grad():
        model.lm_head.weight[7] = nan
    with pytest.raises(
        FloatingPointError, match="log-probabilities of one of the texts 1 to 3, which are read together,"
    ):
        qstar.inspect(model, tiny.tokenizer(), TEXTS)
    with pytest.raises(FloatingPointError, match="log-probabilities of text 1 are not finite"):
        qstar.inspect(model, tiny.tokenizer(), TEXTS, seq_length=8)


def test_pauses_are_inspected_without_what_would_be_sampled():
    model = tiny.thinking_model("llama", **SIZES | dict(rationales=1, pauses=True))
    found = qstar.inspect(model, tiny.tokenizer(), TEXTS, controls=False)
    rationales = [
        each for document in found.documents for position in document.positions for each in position.rationales
    ]
    assert {tuple(each.token_ids) for each in rationales} == {(model.qstar.start_token_id,) * 2}
    assert {value for each in rationales for value in (*each.log_probs, each.entropy)} == {0.0}
    expected = evaluated(model, [torch.tensor(document.token_ids) for document in found.documents])
    assert found.summary.gain.mean == pytest.approx(expected.nll_base - expected.nll_talk, abs=1e-6)


def test_settings_names_and_versions_are_recorded():
    found = qstar.inspect(model_of(), tiny.tokenizer(), TEXTS[0], seed=8, controls=False, name="mine")
    assert (found.model, found.thought_tokens, found.ahead_tokens) == ("mine", 2, 2)
    assert (found.settings.seed, found.settings.rationales, found.settings.temperature) == (8, 2, 1.0)
    assert found.versions["quiet-star"] == qstar.__version__
    assert found.versions.keys() == set(run.VERSIONS)
    greedy = qstar.inspect(model_of(), tiny.tokenizer(), TEXTS[0], temperature=0, controls=False)
    assert greedy.settings.rationales == 1
    assert greedy.model == "LlamaForCausalLM"
