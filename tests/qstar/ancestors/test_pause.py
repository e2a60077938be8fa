"""Training with pauses: Quiet-STaR's likelihood, every thought the same, none of them sampled and none rewarded."""

from __future__ import annotations

import pytest
import tiny
import torch
from tiny_runs import QUIET, texts, tiny_train

from qstar import Objective, load, reference
from qstar.evaluation.held_out import evaluate
from qstar.evaluation.scoring import Request, score_requests
from qstar.grid import Text
from qstar.heads import LanguageHead
from qstar.thinking import read_text, think


def pausing_model(family: str = "llama", **settings):
    return tiny.thinking_model(family, **(dict(thought_tokens=3, ahead_tokens=2, pauses=True) | settings))


def pauses(model, *shape: int) -> torch.Tensor:
    return torch.full((*shape, model.qstar.thought_tokens), model.qstar.start_token_id)


@pytest.mark.parametrize("baseline", ["mean", "base"])
def test_the_loss_is_that_of_plain_passes_with_the_same_thought_everywhere(baseline):
    """By the specification in plain loops, without its reward; exactly, since GPT-2 computes in float64."""
    model = pausing_model("gpt2", rationales=1, dtype=torch.float64)
    text = tiny.text(1, 9)
    ours = Objective(policy_weight=7.0, baseline=baseline)(model, text)
    ours.loss.backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert torch.equal(ours.thoughts, pauses(model, 1, 9, 1))
    assert (ours.policy_loss.item(), ours.reward.item(), ours.rewarded.item()) == (0, 0, 0)
    model.zero_grad()
    model.set_attn_implementation("eager")
    plain = reference.objective(model, text[0], pauses(model, 9, 1), policy_weight=0.0, reinforce_temperature=1.0)
    loss = (plain["nll_base"] + plain["nll_talk"]) / 2
    loss.backward()
    assert ours.loss.item() == pytest.approx(loss.item(), rel=1e-12)
    assert found["qstar_start"].abs().sum() > 0
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, dict(model.named_parameters())[name].grad, rtol=1e-9, atol=1e-12)


def test_a_pause_is_read_where_a_thought_is_read_from_a_cache():
    model = pausing_model()
    text = Text.from_inputs(tiny.text(2, 6))
    grid = model.grid(6, rationales=1)
    with torch.no_grad():
        cached = think(model, text, grid, temperature=1.0, last=2, reading=read_text(model, text, grid))
    assert torch.equal(cached, pauses(model, 2, 2, 1))
    assert torch.equal(cached, think(model, text, grid, temperature=1.0, last=2))
    requests = [Request(row.tolist(), [token]) for row in text.tokens for token in range(4, 12)]
    fixed = [pauses(model, 1)] * len(requests)
    own, given, without = (
        torch.stack([scores.log_prob for _, scores in sorted(score_requests(model, requests, thoughts=thoughts))])
        for thoughts in ("own", fixed, None)
    )
    torch.testing.assert_close(own, given, rtol=1e-5, atol=1e-6)
    assert (own - without).abs().max() > 1e-3


@pytest.mark.parametrize("prompts", [1, 2], ids=["guesses", "batch"])
def test_generation_pauses_before_every_token(prompts):
    """And says after it what the mixed prediction of plain passes says."""
    model = pausing_model()
    text = tiny.text(prompts, 6)
    output = model.generate(
        text, think=True, max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_thoughts=True
    )
    assert torch.equal(output.thoughts, pauses(model, prompts, 3))
    model.set_attn_implementation("eager")
    start, end = ([each] for each in (model.qstar.start_token_id, model.qstar.end_token_id))
    for row, said in zip(text, output.sequences[:, 6:], strict=True):
        for token in said.tolist():
            opened = torch.cat([row, torch.tensor(start * 4 + end)])
            base, after = (reference.hidden_states(model, tokens)[-1] for tokens in (row, opened))
            logits = reference.logits(model, reference.mix(model, base, after))
            logits[model.generation_config.suppress_tokens] = -torch.inf
            assert int(logits.argmax()) == token
            if token == model.generation_config.eos_token_id:
                break
            row = torch.cat([row, torch.tensor([token])])


def test_a_run_with_pauses_samples_nothing_and_its_folder_remembers(tmp_path, monkeypatch, caplog):
    """Its evaluation reads the pauses, as that of the model which is loaded; a collapse is none."""
    monkeypatch.setattr(LanguageHead, "sample", lambda *_, **__: pytest.fail("thoughts are sampled"))
    options = QUIET | dict(eval_dataset=texts(6), eval_strategy="no")
    run = tiny_train(tmp_path, pauses=True, rationales=1, ahead_tokens=1, **options)
    assert "collapsed" not in caplog.text
    model, tokenizer = load(tmp_path)
    assert model.qstar.pauses
    again = evaluate(model, tokenizer, texts(6), seq_length=12, batch_size=8)
    assert again.nll_talk == pytest.approx(run.metrics["eval_nll_talk"], rel=1e-5)
    assert again.nll_talk != again.nll_base
