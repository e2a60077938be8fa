"""Thoughts at some positions of each row: which they are, and what they make of the text."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch
from torch import Tensor

from qstar import reference
from qstar.grid import IGNORED, Text, ThoughtGrid
from qstar.learning import Objective, QuietStarOutput
from qstar.talking import MixedStates, mixed_states, talk
from qstar.thinking import choose_positions, read_text, think

SIZES = dict(thought_tokens=3, ahead_tokens=2, rationales=2)
POSITIONS, SLOTS = 13, 1 + 2 * 6
CHOSEN = torch.tensor([[0, 3, 4, 7, 11], [1, 4, 5, 9, 12], [2, 5, 6, 10, 11]])  # in padding and at both ends as well
VALUES = ("loss", "likelihood_loss", "policy_loss", "nll_base", "nll_talk", "reward", "rewarded", "mixing_weight")


def thinking_model(family: str = "llama", checkpointed: bool = False, dtype: torch.dtype = torch.float64, **settings):
    model = tiny.thinking_model(family, **(SIZES | settings)).to(dtype)
    torch.manual_seed(5)
    torch.nn.init.normal_(model.qstar_mixing_head.output.weight, std=0.3)
    if checkpointed:
        tiny.checkpoint_layers(model, use_reentrant=False)
    return model.train()


def batch() -> dict[str, Tensor]:
    """Whole rows, one with padding on its left and one of two documents."""
    mask, positions = torch.ones(3, POSITIONS, dtype=torch.int64), torch.arange(POSITIONS).repeat(3, 1)
    mask[1, :4] = 0
    positions[1] = (positions[1] - 4).clamp(min=0)
    positions[2, 6:] -= 6
    return dict(input_ids=tiny.text(3, POSITIONS), attention_mask=mask, position_ids=positions)


def taken(values: Tensor, positions: Tensor) -> Tensor:
    """Of values ``[B, N, ...]`` those at positions ``[B, n]``."""
    return values[torch.arange(len(values))[:, None], positions]


def gradients(model, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert (found[name] - x).norm() <= tolerance * x.norm() + 1e-15, name


def learned(model, **settings) -> tuple[QuietStarOutput, dict[str, Tensor]]:
    output = Objective(**(dict(seed=3, positions_per_row=5) | settings))(model, **batch())
    return output, gradients(model, output.loss)


@pytest.mark.parametrize(
    ("family", "rationales", "signed"),
    [("gpt2", 1, True), ("gpt2", 3, False), ("gpt2", 3, True), ("llama", 2, False), ("mistral", 2, False)],
)
def test_chosen_positions_are_learned_from_as_the_specification_says(family, rationales, signed):
    """Loss and gradients are those of one plain pass for every thought, and of the whole text without thoughts."""
    exact = family == "gpt2"
    dtype, tolerance = (torch.float64, 1e-12) if exact else (torch.float32, 1e-5)
    settings = SIZES | dict(rationales=rationales)
    model = tiny.thinking_model(family, dtype=dtype, **settings)
    tokens, positions = tiny.text(1, 10), [0, 2, 5, 8]  # the last of which has one of its two tokens ahead
    thoughts = tiny.random_thoughts(model, 1, 4)
    weights = dict(policy_weight=0.7, likelihood_weight=0.9, entropy_weight=0.3, reinforce_temperature=2.0)
    objective = Objective(**weights, signed=signed)
    ours = objective(model, tokens, thoughts=thoughts, positions=torch.tensor([positions]))
    found = gradients(model, ours.loss)
    model.set_attn_implementation("eager")
    plain = reference.objective(model, tokens[0], thoughts[0], **weights, signed=signed, positions=positions)
    assert plain["policy_loss"].item() != 0
    for name, value in plain.items():
        assert (getattr(ours, name) - value).abs() <= tolerance * value.abs().clamp(min=1e-3), name
    expected = gradients(model, plain["loss"])
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= tolerance * gradient.norm().clamp(min=1e-3), name


@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "checkpointed layers"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "gemma2", "gpt_oss"])
def test_states_at_chosen_positions_are_those_of_all_positions(family, checkpointed):
    """Whatever the layout: padding, documents, grouped heads, windows, soft-caps and sinks. Gradients as well."""
    exact = family in ("llama", "gpt2", "mistral")  # the others round to float32 somewhere
    dtype, tolerance = (torch.float64, 1e-12) if exact else (torch.float32, 1e-5)
    text, grid = Text.from_inputs(**batch()), ThoughtGrid(POSITIONS, 2, 3, 2)
    model = thinking_model(family, dtype=dtype)
    thoughts = tiny.random_thoughts(model, 3, POSITIONS)
    whole = mixed_states(model, text, grid, thoughts)
    at_chosen = [taken(x, CHOSEN) for x in (whole.policy, whole.mixed, whole.weight)]
    expected = MixedStates(whole.base, *at_chosen)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator, dtype=dtype) for x in expected]

    def weighed(states: MixedStates) -> Tensor:
        return sum((x * weight).sum() for x, weight in zip(states, weights, strict=True))

    wanted = gradients(model, weighed(expected))
    model = thinking_model(family, checkpointed, dtype)
    for limit in (None, 3 * 12 * 2):
        found = mixed_states(model, text, replace(grid, chosen=CHOSEN), taken(thoughts, CHOSEN), limit)
        for name in MixedStates._fields:
            torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=tolerance, atol=tolerance)
        assert_same_gradients(gradients(model, weighed(found)), wanted, tolerance)


def test_chosen_positions_are_scored_as_among_all():
    model, text, grid = thinking_model(), Text.from_inputs(**batch()), ThoughtGrid(POSITIONS, 2, 3, 2)
    thoughts = tiny.random_thoughts(model, 3, POSITIONS)
    whole, some = talk(model, text, grid, thoughts), replace(grid, chosen=CHOSEN)
    spoken = talk(model, text, some, taken(thoughts, CHOSEN))
    torch.testing.assert_close(spoken.log_base, whole.log_base, rtol=1e-12, atol=1e-12)
    for name in ("log_talk", "weight", "targets", "policy"):
        expected = taken(getattr(whole, name), CHOSEN)
        torch.testing.assert_close(getattr(spoken, name), expected, rtol=1e-12, atol=1e-12)
    counted = spoken.targets != IGNORED
    counts = text.counts(some)
    assert counts.text == (text.targets != IGNORED).sum()
    assert torch.equal(counts.ahead, counted.sum((0, 1))) and counts.whole == counted.all(-1).sum()
    nll_talk = -torch.stack([spoken.log_talk[:, :, :, k][counted[:, :, k]].mean() for k in range(2)]).mean()
    nll_base = -spoken.log_base[text.targets != IGNORED].mean()
    torch.testing.assert_close(spoken.loss, (nll_base + nll_talk) / 2, rtol=1e-12, atol=0)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "gemma2"])
def test_thoughts_at_chosen_positions_are_those_of_all_positions(family):
    """Where text is read anew, and where it was read before."""
    model, text, grid = thinking_model(family), Text.from_inputs(**batch()), ThoughtGrid(POSITIONS, 2, 3, 2)
    sampling = dict(temperature=1.0, seed=7, row_offset=100)
    whole, some = think(model, text, grid, **sampling), replace(grid, chosen=CHOSEN)
    assert torch.equal(think(model, text, some, **sampling), taken(whole, CHOSEN))
    with torch.no_grad():
        reading = read_text(model, text, some)
    assert torch.equal(think(model, text, some, reading=reading, **sampling), taken(whole, CHOSEN))


def test_thoughts_at_chosen_positions_of_a_text_whose_beginning_was_let_go():
    """Where a window of 4 has left 3 of 20 tokens, their places are counted from there."""
    model, text = thinking_model("mistral"), Text.from_inputs(tiny.text(2, 20))
    grid, last = model.grid(20), torch.full((2, 1), 19)
    with torch.no_grad():
        reading = read_text(model, text, grid)
        reading.cache.let_go()
    assert reading.cache.layers[0].gone == 17
    greedy = dict(temperature=0.0, reading=reading)
    expected = think(model, text, grid, last=1, **greedy)
    assert torch.equal(think(model, text, replace(grid, chosen=last), **greedy), expected)
    assert torch.equal(think(model, text, grid, temperature=0.0)[:, -1:], expected)


@pytest.mark.parametrize("limit", [None, 3 * 12 * 2, 1])
def test_all_positions_when_chosen_are_learned_from_as_ever(limit):
    """Though they go another way: the text first, then their thoughts."""
    model = thinking_model()
    packed, expected = learned(model, positions_per_row=None)
    everywhere = torch.arange(POSITIONS).expand(3, -1)
    objective = Objective(seed=3, max_grid_tokens=limit)
    output = objective(model, **batch(), thoughts=packed.thoughts, positions=everywhere)
    for name in VALUES:
        torch.testing.assert_close(getattr(output, name), getattr(packed, name), rtol=1e-12, atol=1e-14)
    assert_same_gradients(gradients(model, output.loss), expected)


@pytest.mark.parametrize("count", [POSITIONS, POSITIONS + 1, 1000])
def test_as_many_positions_as_there_are_change_no_bit(count):
    model = thinking_model()
    packed, expected = learned(model, positions_per_row=None)
    output, found = learned(model, positions_per_row=count)
    assert output.positions is None and torch.equal(output.thoughts, packed.thoughts)
    assert all(torch.equal(getattr(output, name), getattr(packed, name)) for name in VALUES)
    assert all(torch.equal(found[name], x) for name, x in expected.items())


@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "checkpointed layers"])
def test_parts_of_chosen_positions_make_the_same_update(checkpointed):
    whole, expected = learned(thinking_model(), signed=True)
    model = thinking_model(checkpointed=checkpointed)
    for limit in (1, 3 * 12 * 2, 3 * (POSITIONS + 5 * 12) - 1, 3 * (POSITIONS + 5 * 12)):
        output, found = learned(model, signed=True, max_grid_tokens=limit)
        assert torch.equal(output.thoughts, whole.thoughts) and torch.equal(output.positions, whole.positions)
        for name in VALUES:
            torch.testing.assert_close(getattr(output, name), getattr(whole, name), rtol=1e-12, atol=1e-14)
        assert_same_gradients(found, expected)


def test_only_a_batch_beyond_the_limit_is_read_in_parts(monkeypatch):
    monkeypatch.setattr("qstar.talking.checkpoint", None)
    learned(thinking_model(), max_grid_tokens=3 * (POSITIONS + 5 * 12))
    with pytest.raises(TypeError, match="not callable"):
        learned(thinking_model(), max_grid_tokens=3 * (POSITIONS + 5 * 12) - 1)


def test_chosen_positions_under_autocast_round_no_more_than_all_do():
    model = thinking_model().float()
    thoughts = tiny.random_thoughts(model, 3, POSITIONS)
    exact = thinking_model()

    def at(model, **given) -> dict[str, Tensor]:
        return gradients(model, Objective()(model, **batch(), **given).loss)

    some = dict(thoughts=taken(thoughts, CHOSEN), positions=CHOSEN)
    everywhere = dict(thoughts=thoughts)
    with torch.autocast("cpu", torch.bfloat16):
        rounded, all_rounded = at(model, **some), at(model, **everywhere)
    wanted, all_wanted = at(exact, **some), at(exact, **everywhere)

    def error(found: dict[str, Tensor], right: dict[str, Tensor]) -> float:
        squares = [((found[name] - x).norm() / x.norm()) ** 2 for name, x in right.items() if x.norm() > 0]
        return float(torch.stack(squares).mean().sqrt())

    assert error(rounded, wanted) <= 2 * error(all_rounded, all_wanted)


def test_pauses_at_chosen_positions_are_learned_from():
    model = thinking_model(pauses=True)
    output, found = learned(model)
    assert output.thoughts.shape == (3, 5, 2, 3) and (output.thoughts == model.qstar.start_token_id).all()
    assert output.policy_loss == 0 and found["qstar_start"].abs().sum() > 0


def test_positions_are_drawn_from_those_whose_tokens_ahead_all_count():
    text, grid = Text.from_inputs(**batch()), ThoughtGrid(POSITIONS, 2, 3, 2)
    whole = (text.talk_targets(grid) != IGNORED).all(-1)
    assert whole.sum(1).tolist() == [11, 7, 4 + 5]
    for seed in range(50):
        chosen = choose_positions(text, grid, 7, seed=seed).chosen
        assert taken(whole, chosen).all()
        assert (chosen[:, 1:] > chosen[:, :-1]).all()


def test_a_row_with_fewer_such_positions_has_all_of_them_and_others():
    text, grid = Text.from_inputs(**batch()), ThoughtGrid(POSITIONS, 2, 3, 2)
    whole = (text.talk_targets(grid) != IGNORED).all(-1)
    others = set()
    for seed in range(50):
        chosen = choose_positions(text, grid, 9, seed=seed).chosen
        assert taken(whole, chosen).sum(1).tolist() == [9, 7, 9]
        assert (chosen[:, 1:] > chosen[:, :-1]).all()
        others |= set(chosen[1].tolist()) - set(whole[1].nonzero()[:, 0].tolist())
    assert others == {0, 1, 2, 3, 11, 12}


def test_every_such_position_is_drawn_as_often_as_any_other():
    """By the numbers of 4,000 draws of 3 of 11, and of their pairs."""
    text, grid = Text.from_inputs(tiny.text(1, POSITIONS)), ThoughtGrid(POSITIONS, 1, 1, 2)
    drawn = torch.zeros(4000, POSITIONS)
    for seed in range(len(drawn)):
        drawn[seed, choose_positions(text, grid, 3, seed=seed).chosen[0]] = 1
    single = drawn.mean(0)
    assert single[11:].sum() == 0
    error = (3 / 11 * 8 / 11 / len(drawn)) ** 0.5
    assert ((single[:11] - 3 / 11).abs() < 4.5 * error).all()
    pairs = (drawn.T @ drawn / len(drawn))[:11, :11][~torch.eye(11, dtype=torch.bool)]
    expected = 3 / 11 * 2 / 10
    assert ((pairs - expected).abs() < 4.5 * (expected * (1 - expected) / len(drawn)) ** 0.5).all()


def test_positions_follow_the_seed_and_the_row_alone():
    """However the rows of a batch are shared out; and not as the rows of thoughts that follow them do."""
    tokens, grid = tiny.text(4, 30), ThoughtGrid(30, 2, 3, 2)
    whole = choose_positions(Text.from_inputs(tokens), grid, 6, seed=5, row_offset=600).chosen
    for row in range(4):
        alone = Text.from_inputs(tokens[row : row + 1])
        mine = choose_positions(alone, grid, 6, seed=5, row_offset=600 + row * 30 * 2).chosen
        assert torch.equal(mine[0], whole[row])
    assert len({tuple(row) for row in whole.tolist()}) == 4
    assert not torch.equal(whole, choose_positions(Text.from_inputs(tokens), grid, 6, seed=6, row_offset=600).chosen)


def test_an_objective_draws_what_it_thinks_at():
    model = thinking_model()
    objective = Objective(seed=3, row_offset=26, positions_per_row=5)
    output = objective(model, **batch())
    text, grid = Text.from_inputs(**batch()), model.grid(POSITIONS)
    assert torch.equal(output.positions, choose_positions(text, grid, 5, seed=3, row_offset=26).chosen)
    everywhere = think(model, text, grid, temperature=1.0, seed=3, row_offset=26)
    assert torch.equal(output.thoughts, taken(everywhere, output.positions))
    again = objective(model, **batch(), thoughts=output.thoughts, positions=output.positions)
    assert torch.equal(again.loss, output.loss)


def test_a_grid_counts_the_tokens_of_a_row():
    grid = ThoughtGrid(POSITIONS, 2, 3, 2)
    assert [grid.row_tokens(count) for count in (None, 1, 5, 13, 14)] == [169, 25, 73, 169, 169]
    assert (grid.thought_positions, replace(grid, chosen=CHOSEN).thought_positions) == (13, 5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(positions=CHOSEN), "positions are given, but not the thoughts at them"),
        (dict(thoughts=5), "thoughts are at 5 positions of each row, but the text has 13"),
        (dict(thoughts=4, positions=CHOSEN), "thoughts are at 4 positions of each row, but positions has 5"),
    ],
)
def test_thoughts_without_their_positions_are_refused(given, message):
    model = thinking_model()
    if "thoughts" in given:
        given = given | dict(thoughts=tiny.random_thoughts(model, 3, given["thoughts"]))
    with pytest.raises(ValueError, match=message):
        Objective(positions_per_row=5)(model, **batch(), **given)


@pytest.mark.parametrize("count", [0, -3])
def test_a_wrong_number_of_positions_is_named(count):
    with pytest.raises(ValueError, match=f"positions_per_row is {count}, but it must be at least 1, or None"):
        Objective(positions_per_row=count)


def test_the_last_positions_of_chosen_ones_are_refused():
    model, text = thinking_model(), Text.from_inputs(**batch())
    with pytest.raises(ValueError, match="last is 2, but the grid has chosen positions: give one of them"):
        think(model, text, replace(model.grid(POSITIONS), chosen=CHOSEN), temperature=1.0, last=2)


def test_reentrant_checkpointing_is_refused_at_chosen_positions():
    model = thinking_model()
    tiny.checkpoint_layers(model, use_reentrant=True)
    with pytest.raises(
        ValueError, match=r"attends without gradients, as under use_reentrant=True: .*positions_per_row"
    ):
        learned(model)
