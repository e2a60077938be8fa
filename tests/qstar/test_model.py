"""A model that thinks is copied, pickled and sent to other processes like any other."""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle
import subprocess
import sys

import pytest
import tiny
import torch
import transformers

from qstar import Objective, QuietStarModel
from qstar.experimental import cuda_graph


def loss_of(model) -> torch.Tensor:
    return Objective(seed=5)(model, tiny.text(2, 6)).loss.detach()


def through_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = {
    "copy.deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": through_torch_save,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_a_copy_thinks_like_the_original(way, family):
    model = tiny.thinking_model(family, thought_tokens=2, ahead_tokens=2, sigmoid=True)
    again = WAYS[way](model)
    assert type(again) is type(model)
    assert isinstance(again, QuietStarModel)
    assert again.qstar == model.qstar
    assert again.training == model.training
    state = model.state_dict()
    assert again.state_dict().keys() == state.keys()
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, state[name]), name
        assert tensor.data_ptr() != state[name].data_ptr(), name
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert (again.get_input_embeddings().weight is again.get_output_embeddings().weight) == tied
    assert torch.equal(loss_of(again), loss_of(model))


def test_what_learns_in_a_copy_leaves_the_original_alone():
    model = tiny.thinking_model("llama", thought_tokens=2, ahead_tokens=2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    again = copy.deepcopy(model)
    Objective()(again, tiny.text(1, 6)).loss.backward()
    with torch.no_grad():
        for parameter in again.parameters():
            parameter -= 0.1
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_replaying_from_a_graph_goes_along_with_a_copy():
    model = tiny.thinking_model("llama", thought_tokens=2, ahead_tokens=1)
    cuda_graph.enable(model)
    assert pickle.loads(pickle.dumps(model)).qstar_replay is cuda_graph.replay


def think_elsewhere(model, queue) -> None:
    queue.put((type(model).__bases__[0].__name__, loss_of(model).item()))


@pytest.mark.slow
def test_a_spawned_process_gets_a_model_that_thinks():
    model = tiny.thinking_model("llama", thought_tokens=2, ahead_tokens=2)
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=think_elsewhere, args=(model, queue))
    process.start()
    try:
        assert queue.get(timeout=120) == ("ThinkingModel", loss_of(model).item())
    finally:
        process.join(timeout=60)
    assert process.exitcode == 0


@pytest.mark.slow
def test_a_model_that_was_saved_whole_runs_in_a_fresh_process(tmp_path):
    """Which has imported nothing of ours by itself."""
    model = tiny.thinking_model("llama", thought_tokens=2, ahead_tokens=2)
    torch.save(model, tmp_path / "model.pt")
    torch.save(tiny.text(2, 6), tmp_path / "tokens.pt")
    code = """
import torch
model, tokens = torch.load("model.pt", weights_only=False), torch.load("tokens.pt")
from qstar.learning import Objective
print(model(tokens).logits.isfinite().all().item(), Objective(seed=5)(model, tokens).loss.item())
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", str(loss_of(model).item())]


def test_a_class_that_somebody_made_of_ours_is_copied_as_such():
    model = tiny.thinking_model("llama", thought_tokens=2, ahead_tokens=1)
    model.__class__ = type("Mine", (type(model),), {"mine": 7})
    again = copy.deepcopy(model)
    assert type(again) is type(model) and again.mine == 7
    with pytest.raises(pickle.PicklingError):
        pickle.dumps(model)


def test_thinking_with_another_attention_is_refused():
    model = tiny.thinking_model("llama", thought_tokens=2, ahead_tokens=1)
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="the model's attention is 'sdpa', but thoughts need 'qstar'"):
        Objective()(model, tiny.text(1, 6))


def test_the_forward_of_a_thinking_model_is_that_of_its_base():
    """Also by its signature, from which the Trainer and PEFT read what a model takes."""
    model = tiny.thinking_model("llama", thought_tokens=2, ahead_tokens=1)
    assert type(model).forward.__wrapped__ is transformers.LlamaForCausalLM.forward
    assert type(model).__name__ == "LlamaForCausalLM"
    tokens = tiny.text(1, 6)
    logits = model(tokens).logits
    hidden = model.base_model(tokens).last_hidden_state
    assert torch.equal(logits, model.lm_head(hidden))
    assert model(tokens, objective=lambda *given, **named: (given, named))[0][0] is model
