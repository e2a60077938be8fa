"""A model whose products are made by oneDNN thinks, talks, learns and generates as by PyTorch's own choice."""

from __future__ import annotations

import threading

import pytest
import tiny
import torch
from peft import LoraConfig
from tiny_runs import tiny_train
from torch.utils._python_dispatch import TorchDispatchMode

from qstar.grid import Text
from qstar.learning import Objective
from qstar.talking import text_loss
from qstar.thinking import think
from qstar.training.settings import QuietStarArguments
from qstar_kernels import cpu_products, current_cpu_products, products

pytestmark = pytest.mark.skipif(products.find_refusal() is not None, reason="this PyTorch cannot call oneDNN")

SIZES = dict(thought_tokens=3, ahead_tokens=2, rationales=2)
WIDE = dict(hidden_size=128, intermediate_size=192, head_dim=32)
CHANGES = {"llama": WIDE, "qwen2": WIDE, "gpt2": dict(n_embd=128)}
POSITIONS = 24  # of two texts: 24 * 13 * 2 rows of 128 are enough
WHOLE_GRID = None


class Products(TorchDispatchMode):
    """Counts the products of either library."""

    def __init__(self):
        super().__init__()
        self.onednn = self.torch = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.onednn += func is torch.ops.mkldnn._linear_pointwise.default
        self.torch += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return func(*args, **(kwargs or {}))


def thinking_model(family: str = "llama", dtype: torch.dtype = torch.float32):
    model = tiny.thinking_model(family, changes=CHANGES[family], **SIZES)
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.5 if "qstar" in name else 0.08)
    return model.to(dtype).train()


def learned(model, max_grid_tokens: int | None = WHOLE_GRID, backward: str = "torch"):
    """Loss and gradients for given thoughts; the backward runs outside of what the forward ran in."""
    thoughts = tiny.random_thoughts(model, 2, POSITIONS)
    objective = Objective(signed=True, max_grid_tokens=max_grid_tokens)
    model.zero_grad()
    loss = objective(model, tiny.text(2, POSITIONS), thoughts=thoughts).loss
    with cpu_products(backward):
        loss.backward()
    return loss.detach(), {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}


def assert_alike(found, expected, tolerance: float = 1e-5):
    torch.testing.assert_close(found[0].double(), expected[0].double(), rtol=tolerance, atol=tolerance)
    assert found[1].keys() == expected[1].keys()
    for name, x in expected[1].items():
        assert (found[1][name].double() - x).norm() <= tolerance * x.double().norm() + 1e-7, name


@pytest.mark.parametrize("family", CHANGES)
def test_loss_and_gradients_are_those_of_float64(family):
    exact = learned(thinking_model(family, torch.float64))
    model = thinking_model(family)
    with cpu_products("onednn"), Products() as made:
        ours = learned(model)
    assert made.onednn >= 24  # three of every layer's four or more
    assert_alike(ours, exact)


def test_nearly_all_products_of_a_step_go_to_onednn_and_with_the_setting_off_none_does():
    model, text = thinking_model(), tiny.text(2, POSITIONS)
    counts = {}
    for library in ("onednn", "torch"):
        with cpu_products(library), Products() as made:
            Objective()(model, text, thoughts=tiny.random_thoughts(model, 2, POSITIONS)).loss.backward()
        counts[library] = made
    assert counts["torch"].onednn == 0 and counts["torch"].torch > 40
    assert counts["onednn"].onednn > 3 * counts["onednn"].torch  # the vocabulary is too small


def test_parts_are_computed_again_as_they_were_even_outside_of_the_setting():
    """Activations that differ by a bit, or have other shapes, would give other gradients, or an error."""
    model = thinking_model()
    with cpu_products("onednn"):
        inside = learned(model, max_grid_tokens=400, backward="onednn")
        outside = learned(model, max_grid_tokens=400, backward="torch")
        packed = learned(model)
    assert torch.equal(inside[0], outside[0])
    assert all(torch.equal(inside[1][name], x) for name, x in outside[1].items())
    assert_alike(inside, packed)


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
def test_checkpointed_layers_learn_the_same(reentrant):
    expected = learned(thinking_model())
    model = thinking_model()
    tiny.checkpoint_layers(model, use_reentrant=reentrant)
    with cpu_products("onednn"):
        assert_alike(learned(model), expected)


def test_adapters_beside_a_frozen_base_learn_the_same():
    results = []
    for library in ("torch", "onednn"):
        model = thinking_model()
        torch.manual_seed(0)
        model.add_adapter(LoraConfig(r=8, lora_dropout=0.0, init_lora_weights=False))
        with cpu_products(library), Products() as made:
            results.append(learned(model, backward=library))
        assert (made.onednn > 20) == (library == "onednn")
    assert all(".lora_" in name or "qstar" in name for name in results[1][1])
    assert_alike(results[1], results[0])


def test_the_same_seed_thinks_the_same():
    model, text = thinking_model(), Text.from_inputs(tiny.text(4, 100))
    with cpu_products("onednn"), Products() as made:
        first, second = (think(model, text, model.grid(100), temperature=1.0, seed=7) for _ in range(2))
    assert made.onednn > 30 and torch.equal(first, second)
    torch.set_num_threads(2)
    with cpu_products("onednn"):
        assert torch.equal(think(model, text, model.grid(100), temperature=1.0, seed=7), first)


def test_the_random_numbers_of_others_are_left_alone():
    model, text = thinking_model(), tiny.text(2, POSITIONS)
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    with cpu_products("onednn"):
        products.automatic.__wrapped__()
        Objective()(model, text).loss.backward()
    assert torch.equal(torch.rand(3), expected)


def test_generation_in_a_thread_says_the_same():
    model, prompt = thinking_model().eval(), tiny.text(8, 60)
    said = []

    def generate():
        with cpu_products("onednn"), Products() as made:
            said.append((model.generate(prompt, max_new_tokens=3, think=True, do_sample=False), made.onednn))

    generate()
    thread = threading.Thread(target=generate)
    thread.start()
    thread.join()
    assert torch.equal(said[0][0], said[1][0]) and said[0][1] == said[1][1] >= 10
    with cpu_products("torch"):
        assert torch.equal(model.generate(prompt, max_new_tokens=3, think=True, do_sample=False), said[0][0])


def test_passes_too_small_to_gain_are_as_without_it():
    model, text = tiny.thinking_model("llama", **SIZES), tiny.text(1, 5)
    with cpu_products("onednn"), Products() as made:
        ours = text_loss(model, text)
    assert made.onednn == 0
    with cpu_products("torch"):
        assert torch.equal(ours, text_loss(model, text))


@pytest.mark.parametrize("library", ["torch", "onednn"])
def test_a_training_run_takes_the_library_that_it_is_given(tmp_path, monkeypatch, library):
    seen = set()
    whole = Objective.__call__

    def objective(self, *args, **options):
        seen.add(current_cpu_products())
        return whole(self, *args, **options)

    monkeypatch.setattr(Objective, "__call__", objective)
    result = tiny_train(tmp_path / "run", cpu_products=library, max_steps=1)
    assert seen == {library} and result.metrics["train_loss"] > 0 and current_cpu_products() == "auto"


def test_a_library_that_there_is_not_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"^cpu_products is 'mkl', but it must be one of auto, torch, onednn$"):
        QuietStarArguments(str(tmp_path), report_to="none", cpu_products="mkl")
