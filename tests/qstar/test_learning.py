"""The objective against a plain pass for every thought, and what must hold of it."""

from __future__ import annotations

import itertools

import pytest
import tiny
import torch
from wait_watch import WaitWatch

from qstar import reference
from qstar.grid import Text
from qstar.learning import PAPER, Objective, advantages
from qstar.talking import talk


def gradients(model, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def relative(ours: torch.Tensor, other: torch.Tensor, floor: float = 1e-3) -> float:
    return float((ours - other).detach().norm() / other.detach().norm().clamp(min=floor))


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
@pytest.mark.parametrize("rationales", [1, 2])
@pytest.mark.parametrize("rule", [{}, PAPER], ids=["default", "paper"])
def test_packed_equals_one_plain_pass_for_every_thought(family, rationales, rule):
    exact = family == "gpt2"
    dtype, tolerance = (torch.float64, 1e-12) if exact else (torch.float32, 1e-5)
    model = tiny.thinking_model(family, dtype=dtype, thought_tokens=2, ahead_tokens=2, rationales=rationales)
    tokens = tiny.text(1, 6)
    thoughts = tiny.random_thoughts(model, 1, 6)
    options = rule | dict(policy_weight=0.7, reinforce_temperature=2.0)
    if rationales == 1:
        options |= dict(signed=True)  # a random thought does worse than none
    ours = Objective(**options)(model, tokens, thoughts=thoughts)
    our_gradients = gradients(model, ours.loss)
    model.set_attn_implementation("eager")
    plain = reference.objective(model, tokens[0], thoughts[0], **options)
    plain_gradients = gradients(model, plain["loss"])

    assert plain["policy_loss"].item() != 0
    for name, value in plain.items():
        assert relative(getattr(ours, name), value) <= tolerance, name
    assert our_gradients.keys() == plain_gradients.keys()
    for name, gradient in plain_gradients.items():
        assert relative(our_gradients[name], gradient) <= tolerance, name


@pytest.mark.parametrize("signed", [False, True], ids=["clamped", "signed"])
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out", "base"])
@pytest.mark.parametrize("sigmoid", [False, True], ids=["unbounded", "sigmoid"])
def test_every_baseline_is_that_of_the_specification(baseline, signed, sigmoid):
    """Exactly: GPT-2 computes in float64."""
    settings = dict(thought_tokens=2, ahead_tokens=3, rationales=3, sigmoid=sigmoid)
    model = tiny.thinking_model("gpt2", dtype=torch.float64, **settings)
    tokens, thoughts = tiny.text(1, 7), tiny.random_thoughts(model, 1, 7)
    options = dict(policy_weight=1.3, reinforce_temperature=1.5, baseline=baseline, signed=signed)
    ours = Objective(**options)(model, tokens, thoughts=thoughts)
    model.set_attn_implementation("eager")
    plain = reference.objective(model, tokens[0], thoughts[0], **options)
    for name, value in plain.items():
        assert relative(getattr(ours, name), value) <= 1e-12, name


@pytest.mark.parametrize("rationales", [1, 2])
def test_without_a_mixing_head_the_state_after_the_thought_predicts_alone(rationales):
    """Values and gradients, exactly: GPT-2 computes in float64."""
    settings = dict(mixing=False, mixing_head=False, thought_tokens=2, ahead_tokens=3, rationales=rationales)
    model = tiny.thinking_model("gpt2", dtype=torch.float64, **settings)
    assert not any("mixing_head" in name for name, _ in model.named_parameters())
    tokens, thoughts = tiny.text(1, 7), tiny.random_thoughts(model, 1, 7)
    options = dict(policy_weight=1.3, reinforce_temperature=1.0, baseline="leave_one_out", signed=True)
    ours = Objective(**options, likelihood_weight=0.0)(model, tokens, thoughts=thoughts)
    our_gradients = gradients(model, ours.loss)
    model.set_attn_implementation("eager")
    plain = reference.objective(model, tokens[0], thoughts[0], **options, likelihood_weight=0.0)
    plain_gradients = gradients(model, plain["loss"])
    assert plain["policy_loss"].item() != 0 and ours.mixing_weight.item() == 1
    for name, value in plain.items():
        assert relative(getattr(ours, name), value) <= 1e-12, name
    for name, gradient in our_gradients.items():
        assert relative(gradient, plain_gradients[name]) <= 1e-12, name


@pytest.mark.parametrize("likelihood_weight", [0.0, 0.4])
@pytest.mark.parametrize("entropy_weight", [0.0, 0.6])
def test_the_weights_of_likelihood_and_entropy_are_those_of_the_specification(likelihood_weight, entropy_weight):
    """Values and gradients, exactly: GPT-2 computes in float64."""
    settings = dict(thought_tokens=2, ahead_tokens=3, rationales=2)
    model = tiny.thinking_model("gpt2", dtype=torch.float64, **settings)
    tokens, thoughts = tiny.text(1, 7), tiny.random_thoughts(model, 1, 7)
    weights = dict(likelihood_weight=likelihood_weight, entropy_weight=entropy_weight)
    options = dict(policy_weight=1.3, reinforce_temperature=1.5, signed=True, **weights)
    ours = Objective(**options)(model, tokens, thoughts=thoughts)
    our_gradients = gradients(model, ours.loss)
    model.set_attn_implementation("eager")
    plain = reference.objective(model, tokens[0], thoughts[0], **options)
    plain_gradients = gradients(model, plain["loss"])
    assert ("policy_entropy" in plain) is (entropy_weight > 0) and (ours.policy_entropy is None) is (
        entropy_weight == 0
    )
    for name, value in plain.items():
        assert relative(getattr(ours, name), value) <= 1e-12, name
    for name, gradient in our_gradients.items():
        assert relative(gradient, plain_gradients[name]) <= 1e-12, name


def test_the_entropy_of_parts_of_a_batch_adds_up_to_that_of_the_whole():
    """Padded rows, and each part with the counts of all."""
    model = tiny.thinking_model("gpt2", dtype=torch.float64, thought_tokens=2, ahead_tokens=2)
    tokens, thoughts = tiny.text(3, 8), tiny.random_thoughts(model, 3, 8)
    mask = torch.ones_like(tokens)
    mask[1, 5:] = 0
    mask[2, :3] = 0
    whole = Objective(entropy_weight=1.0)(model, tokens, attention_mask=mask, thoughts=thoughts)
    counts = Text.from_inputs(tokens, mask).counts(model.grid(8))
    parts = [
        Objective(entropy_weight=1.0, counts=counts)(
            model, tokens[part], attention_mask=mask[part], thoughts=thoughts[part]
        )
        for part in (slice(0, 1), slice(1, 3))
    ]
    assert 0 < whole.policy_entropy < torch.log(torch.tensor(len(tiny.WORDS)))
    assert relative(sum(part.policy_entropy for part in parts), whole.policy_entropy) <= 1e-12
    assert relative(sum(part.loss for part in parts), whole.loss) <= 1e-12


def test_a_bonus_for_entropy_makes_thoughts_less_sure():
    model = tiny.thinking_model(thought_tokens=3, ahead_tokens=1)
    tokens = tiny.text(4, 9)
    bonus = Objective(likelihood_weight=0.0, policy_weight=1.0, entropy_weight=1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    found = []
    for _ in range(5):
        output = bonus(model, tokens)
        found.append(output.policy_entropy.item())
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    assert all(later > before for before, later in itertools.pairwise(found))


def test_a_profiler_tells_the_three_steps_apart():
    model = tiny.thinking_model(thought_tokens=3, ahead_tokens=2)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        Objective()(model, tiny.text(1, 6)).loss.backward()
    ranges = sorted(
        (event for event in profile.events() if event.name.startswith("qstar::")), key=lambda e: e.time_range.start
    )
    assert [event.name for event in ranges] == ["qstar::think", "qstar::talk", "qstar::learn"]
    for event, next_event in itertools.pairwise(ranges):
        assert event.time_range.start < event.time_range.end <= next_event.time_range.start


@pytest.mark.parametrize("settings", [{}, PAPER, dict(baseline="base")], ids=["default", "paper", "base"])
def test_the_reward_is_by_how_much_the_better_thoughts_were_better(settings):
    """With signed advantages as well, whose own mean over the others is 0 whatever is learned."""
    model, kept = tiny.thinking_model(thought_tokens=3, ahead_tokens=2, rationales=3), []

    class Watched(Objective):
        def advantage(self, *args):
            kept.append(super().advantage(*args))
            return kept[-1]

    output = Watched(**settings)(model, tiny.text(2, 9), thoughts=tiny.random_thoughts(model, 2, 9))
    better = kept[0][:, : 9 - 2].clamp(min=0)  # two tokens stand ahead of these
    assert output.reward.item() == pytest.approx(better.mean().item(), rel=1e-5)
    assert output.reward > 0 and 0 < output.rewarded < 1
    assert output.rewarded.item() == pytest.approx((better > 0).float().mean().item())


def test_every_new_parameter_learns():
    model = tiny.thinking_model(thought_tokens=3, ahead_tokens=2)
    tokens = tiny.text(2, 8)
    output = Objective()(model, tokens, thoughts=tiny.random_thoughts(model, 2, 8))
    found = gradients(model, output.loss)
    for name in ("qstar_start", "qstar_end", "qstar_mixing_head.input.weight", "qstar_mixing_head.output.weight"):
        assert found[name].abs().sum() > 0, name


@pytest.mark.parametrize("rationales", [1, 2, 3])
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out", "base"])
def test_untrained_head_changes_nothing(rationales, baseline):
    model = tiny.thinking_model(mixing=False, thought_tokens=3, ahead_tokens=2, rationales=rationales)
    tokens = tiny.text(3, 17)
    output = Objective(baseline=baseline, signed=True)(model, tokens, thoughts=tiny.random_thoughts(model, 3, 17))
    assert float(output.policy_loss) == 0
    assert float(output.rewarded) == 0
    text, grid = Text.from_inputs(tokens), model.grid(17)
    spoken = talk(model, text, grid, tiny.random_thoughts(model, 3, 17))
    base = spoken.log_base[:, grid.ahead_positions(tokens.device)][:, :, None].expand_as(spoken.log_talk)
    counts = (spoken.targets != -100)[:, :, None].expand_as(base)
    assert torch.equal(spoken.log_talk[counts], base[counts])


def test_sigmoid_head_starts_at_one_half():
    model = tiny.thinking_model(mixing=False, sigmoid=True, thought_tokens=2, ahead_tokens=1)
    output = Objective()(model, tiny.text(1, 6), thoughts=tiny.random_thoughts(model, 1, 6))
    assert float(output.mixing_weight) == 0.5


def test_what_a_training_step_asks_the_device():
    """Each question waits for all that was launched: of the batch, of ids, of what is rewarded.

    Every one is asked once, whatever the number of tokens in a thought.
    """
    model = tiny.thinking_model(thought_tokens=5, ahead_tokens=2)
    tokens, thoughts = tiny.text(2, 9), tiny.random_thoughts(model, 2, 9)
    Objective()(model, tokens, thoughts=thoughts)  # ids that are forbidden are checked when they are new
    with WaitWatch() as watch:
        output = Objective()(model, tokens, thoughts=thoughts)
        output.loss.backward()
    assert output.rewarded > 0
    batch, mixed, heads, rewarded = ["tolist"], ["__bool__"], ["tolist"] * 2, ["nonzero"]
    assert sorted(watch.waits) == sorted(batch + mixed + heads + rewarded)


def test_equal_scores_have_no_advantage():
    scores = torch.full((1, 4, 3), -3.1415927) + torch.arange(4)[None, :, None] * 0.1
    for baseline in ("mean", "leave_one_out"):
        assert (advantages(scores, scores[..., 0], baseline) == 0).all()


def test_baselines():
    scores, base = torch.tensor([[[1.0, 3.0, 8.0]]]), torch.tensor([[2.0]])
    torch.testing.assert_close(advantages(scores, base, "mean"), torch.tensor([[[-3.0, -1.0, 4.0]]]))
    torch.testing.assert_close(advantages(scores, base, "leave_one_out"), torch.tensor([[[-4.5, -1.5, 6.0]]]))
    torch.testing.assert_close(advantages(scores, base, "base"), torch.tensor([[[-1.0, 1.0, 6.0]]]))
    torch.testing.assert_close(advantages(scores[..., :1], base, "mean"), torch.tensor([[[-1.0]]]))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["gpt2", "mistral", "gpt_oss"])
def test_padding_changes_nothing(family, side):
    model = tiny.thinking_model(family, thought_tokens=2, ahead_tokens=2)
    tokens, thoughts = tiny.text(1, 7), tiny.random_thoughts(model, 1, 7)
    alone = Objective()(model, tokens, thoughts=thoughts)
    wanted = gradients(model, alone.loss)
    before, after = (3, 0) if side == "left" else (0, 3)
    padded = torch.nn.functional.pad(tokens, (before, after))
    mask = torch.nn.functional.pad(torch.ones_like(tokens), (before, after))
    filled = torch.nn.functional.pad(thoughts, (0, 0, 0, 0, before, after), value=5)
    output = Objective()(model, padded, attention_mask=mask, thoughts=filled)
    found = gradients(model, output.loss)
    for name in ("loss", "nll_base", "nll_talk", "policy_loss"):
        assert relative(getattr(output, name), getattr(alone, name)) <= 1e-5, name
    for name, gradient in wanted.items():
        assert relative(found[name], gradient) <= 1e-5, name


def test_ignored_labels_are_read_but_not_learned():
    model = tiny.thinking_model(thought_tokens=2, ahead_tokens=2)
    tokens, thoughts = tiny.text(1, 9), tiny.random_thoughts(model, 1, 9)
    labels = tokens.clone()
    labels[0, :5] = -100
    output = Objective()(model, tokens, labels=labels, thoughts=thoughts)
    spoken = talk(model, Text.from_inputs(tokens), model.grid(9), thoughts)
    expected = -spoken.log_base[0, 4:8].mean()
    torch.testing.assert_close(output.nll_base, expected)
    assert torch.isfinite(output.loss)


@pytest.mark.parametrize("length", [1, 2, 3])
def test_documents_shorter_than_ahead_are_finite(length):
    model = tiny.thinking_model(thought_tokens=2, ahead_tokens=4)
    tokens = tiny.text(2, length)
    output = Objective()(model, tokens, thoughts=tiny.random_thoughts(model, 2, length))
    for gradient in gradients(model, output.loss).values():
        assert torch.isfinite(gradient).all()
    assert float(output.policy_loss) == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(baseline="median"), "baseline is 'median'"),
        (dict(policy_weight=-1.0), "policy_weight is -1.0"),
        (dict(likelihood_weight=-0.1), "likelihood_weight is -0.1, but it must be at least 0"),
        (dict(entropy_weight=-1), "entropy_weight is -1, but it must be at least 0"),
        (
            dict(likelihood_weight=0, policy_weight=0, entropy_weight=1),
            "likelihood_weight and policy_weight are both 0",
        ),
        (dict(temperature=-0.5), "temperature is -0.5"),
        (dict(reinforce_temperature=0.0), "reinforce_temperature is 0.0"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        Objective(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(entropy_weight=0.1), "entropy_weight is 0.1, but the thoughts are pauses"),
        (dict(temperature=0.7), "temperature of thoughts is 0.7, but the thoughts are pauses"),
        (dict(likelihood_weight=0.0), "likelihood_weight is 0, but the thoughts are pauses"),
    ],
)
def test_what_would_do_nothing_for_pauses_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Objective(**settings).check(tiny.thinking_model(pauses=True))
    Objective(**settings).check(tiny.thinking_model())


def test_a_mixing_head_that_could_never_learn_is_refused():
    objective = Objective(likelihood_weight=0.0)
    with pytest.raises(ValueError, match="the mixing head starts at zero and learns by the likelihood alone"):
        objective.check(tiny.thinking_model(mixing=False))
    for settings in (dict(sigmoid=True), dict(mixing_head=False)):
        objective.check(tiny.thinking_model(mixing=False, **settings))
