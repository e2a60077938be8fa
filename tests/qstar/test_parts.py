"""The grid in parts: the text first, then the thoughts at some positions after the other."""

import pytest
import tiny
import torch
from storage_watch import StorageWatch

from qstar.cache import KeptText
from qstar.grid import Text, ThoughtGrid
from qstar.layouts import Packed
from qstar.learning import Objective, QuietStarOutput
from qstar.talking import read_grid

SIZES = dict(thought_tokens=3, ahead_tokens=2, rationales=2)
POSITIONS, SLOTS = 13, 1 + 2 * 6
VALUES = ("loss", "likelihood_loss", "policy_loss", "nll_base", "nll_talk", "reward", "rewarded", "mixing_weight")


def thinking_model(family: str = "llama", checkpointed: bool = False, **changes):
    model = tiny.thinking_model(family, changes=changes, **SIZES).double()
    torch.manual_seed(5)
    torch.nn.init.normal_(model.qstar_mixing_head.output.weight, std=0.3)
    if checkpointed:
        tiny.checkpoint_layers(model, use_reentrant=False)
    return model.train()


def batch() -> dict[str, torch.Tensor]:
    """Whole rows, one with padding on its left and one of two documents."""
    mask, positions = torch.ones(3, POSITIONS, dtype=torch.int64), torch.arange(POSITIONS).repeat(3, 1)
    mask[1, :4] = 0
    positions[1] = (positions[1] - 4).clamp(min=0)
    positions[2, 6:] -= 6
    return dict(input_ids=tiny.text(3, POSITIONS), attention_mask=mask, position_ids=positions)


def learned(model, **settings) -> tuple[QuietStarOutput, dict[str, torch.Tensor]]:
    model.zero_grad()
    output = Objective(seed=3, **settings)(model, **batch())
    output.loss.backward()
    return output, {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}


@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "checkpointed layers"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
def test_parts_have_the_values_and_gradients_of_the_packed_pass(family, checkpointed):
    """Of one position, of some with a last part that is smaller, and of all."""
    packed, expected = learned(thinking_model(family), signed=True)
    model = thinking_model(family, checkpointed)
    for positions in (1, 4, POSITIONS):
        output, gradients = learned(model, signed=True, max_grid_tokens=3 * (SLOTS - 1) * positions)
        assert torch.equal(output.thoughts, packed.thoughts)
        for name in VALUES:
            torch.testing.assert_close(getattr(output, name), getattr(packed, name), rtol=1e-12, atol=1e-14)
        assert gradients.keys() == expected.keys()
        for name, x in expected.items():
            assert (gradients[name] - x).norm() <= 1e-12 * x.norm() + 1e-15, name


def test_a_grid_within_the_limit_is_packed(monkeypatch):
    monkeypatch.setattr("qstar.talking.KeptText", None)
    model = thinking_model()
    learned(model, max_grid_tokens=3 * POSITIONS * SLOTS)
    with pytest.raises(TypeError, match="not callable"):
        learned(model, max_grid_tokens=3 * POSITIONS * SLOTS - 1)


@torch.no_grad()
def test_states_of_parts_are_those_of_the_packed_pass():
    model, text, grid = thinking_model(), Text.from_inputs(**batch()), ThoughtGrid(POSITIONS, 2, 3, 2)
    thoughts = tiny.random_thoughts(model, 3, POSITIONS)
    packed, parts = (read_grid(model, text, grid, thoughts, limit) for limit in (None, 3 * 12 * 5))
    torch.testing.assert_close(parts, packed, rtol=0, atol=1e-12)


def test_parts_under_autocast_round_no_more_than_the_packed_pass():
    model = thinking_model("llama").float()
    with torch.autocast("cpu", torch.bfloat16):
        rounded, parts = learned(model)[1], learned(model, max_grid_tokens=60)[1]
    exact = learned(model)[1]
    for name, x in exact.items():
        error = (rounded[name] - x).norm()
        assert (parts[name] - x).norm() <= 2 * error + 1e-6 * x.norm(), name


def test_memory_holds_one_part():
    """The widest states of the model exist for the text and a part, not for all thoughts."""
    model = thinking_model(hidden_size=32, intermediate_size=512)
    alive = []
    for limit in (None, 3 * (SLOTS - 1)):
        with StorageWatch(at_least=8 * 3 * POSITIONS * (SLOTS - 1) * 512) as watch:
            learned(model, max_grid_tokens=limit)
        alive.append(watch.most_alive)
    assert alive[0] >= 2 * model.config.num_hidden_layers and alive[1] == 0


def test_reentrant_checkpointing_is_refused():
    model = thinking_model()
    tiny.checkpoint_layers(model, use_reentrant=True)
    with pytest.raises(ValueError, match="LlamaAttention attends without gradients, as under use_reentrant=True"):
        learned(model, max_grid_tokens=60)


def test_an_attention_that_has_not_read_the_text_is_named():
    kept, model = KeptText(), thinking_model()
    text = Text.from_inputs(**batch())
    model.read(text.tokens, text.positions, Packed(slots=1, start=text.start, cache=kept))
    with pytest.raises(
        ValueError, match="Linear attends to thoughts, but not to the text: its grids cannot be read in"
    ):
        kept.next_layer(torch.nn.Linear(1, 1))


def test_a_wrong_limit_is_named():
    with pytest.raises(ValueError, match="max_grid_tokens is 0, but it must be at least 1, or None"):
        Objective(max_grid_tokens=0)
