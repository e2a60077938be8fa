"""The objective beside the Quiet-STaR authors' own code: losses, rewards, advantages and every gradient.

``authors.json`` holds what github.com/ezelikman/quiet-star at commit 892446b computed on the case of
``parity_case.py``: transformers 4.37.2, a CPU, eager attention, float64, with its casts to float32 in norms,
softmax and rotary embeddings lifted. Its model code is under the Apache License 2.0; none of it is here. A gradient is
kept as its norm and three projections. Theirs and ours differ in three rules, so there are two comparisons:

    ours     their code with three edits, beside our objective: the thought tokens have no probability in what is scored
             (theirs forbids them in sampling only), the last column of rewards, i = N-1-m, is kept, and a reward counts
             only where all m targets are text (theirs keeps those that reach into the padding)
    theirs   their code as it is, beside our objective with those three rules of theirs
"""

import functools
import json
import types
from pathlib import Path

import numpy as np
import parity_case as case
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

from qstar import Objective, wrap
from qstar.learning import PAPER

TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-12}
POLICY_WEIGHTS = ("1e+06", "1", "0")
pytestmark = pytest.mark.usefixtures("one_thread")


class OurRules(Objective):
    """The objective, which keeps what it scored and what it rewarded."""

    columns = case.POSITIONS - case.AHEAD_TOKENS

    def advantage(self, spoken, grid):
        self.spoken, self.base_index = spoken, grid.ahead_positions(torch.device("cpu"))
        return super().advantage(spoken, grid)

    def policy_loss(self, model, policy, thoughts, advantage, whole):
        self.counted = advantage
        return super().policy_loss(model, policy, thoughts, advantage, whole)


class TheirRules(OurRules):
    """The same under the authors' rules."""

    columns = OurRules.columns - 1

    def __call__(self, model, *args, **kwargs):
        self.forbidden = model.qstar_forbidden
        model.qstar_forbidden = self.forbidden[:0]
        return super().__call__(model, *args, **kwargs)

    def advantage(self, spoken, grid):
        self.uncounted = super().advantage(spoken, grid)
        return self.uncounted

    def policy_loss(self, model, policy, thoughts, advantage, whole):
        model.qstar_forbidden = self.forbidden  # in sampling they are forbidden
        whole = (torch.arange(case.POSITIONS) < self.columns).expand_as(whole)
        return super().policy_loss(model, policy, thoughts, self.uncounted * whole[..., None], whole)


def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<unk>", *(f"w{i}" for i in range(1, case.WORDS))]
    words[case.PAD], words[case.START_INIT], words[case.END_INIT] = "<pad>", "---", "!!!"
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", unk_token="<unk>")


def thinking_model(dtype: torch.dtype) -> MistralForCausalLM:
    config = MistralConfig(**case.CONFIG, rope_parameters=dict(rope_type="default", rope_theta=case.ROPE_THETA))
    model = MistralForCausalLM(config).to(dtype)
    fill(model, "")
    sizes = dict(thought_tokens=case.THOUGHT_TOKENS, ahead_tokens=case.AHEAD_TOKENS, rationales=case.RATIONALES)
    wrap(model, tokenizer(), **sizes, start_init="---", end_init="!!!")
    fill(model.qstar_mixing_head, "head.")
    if dtype == torch.float64:
        lift_to_float64(model)
    return model.train()


@torch.no_grad()
def fill(module: torch.nn.Module, prefix: str) -> None:
    for name, parameter in module.named_parameters():
        parameter.copy_(torch.from_numpy(case.weight(prefix + name, parameter.shape)))


def lift_to_float64(model: MistralForCausalLM) -> None:
    """Norms and rotary embeddings of transformers compute in float32 whatever the dtype of a model; here in float64."""

    def norm(self, h):
        return self.weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))

    def rotary(self, x, position_ids):
        exponents = torch.arange(0, case.HEAD_WIDTH, 2, dtype=torch.float64) / case.HEAD_WIDTH
        angles = (position_ids[..., None] * case.ROPE_THETA**-exponents).repeat(1, 1, 2)
        return angles.cos(), angles.sin()

    for module in model.modules():
        if "RMSNorm" in type(module).__name__:
            module.forward = types.MethodType(norm, module)
        elif "RotaryEmbedding" in type(module).__name__:
            module.forward = types.MethodType(rotary, module)


def compute(objective: OurRules, padding: str, dtype: torch.dtype) -> dict:
    """What ``authors.json`` has, in its shapes: a row for every sequence and rationale."""
    model = thinking_model(dtype)
    tokens, mask = map(torch.from_numpy, case.text(padding))
    result = objective(model, tokens, mask, thoughts=torch.from_numpy(case.thoughts()))
    result.loss.backward()

    spoken = objective.spoken
    counts = (spoken.targets != -100).sum((0, 1)) * case.RATIONALES
    reward = spoken.log_talk.sum(-1) - spoken.log_base[:, objective.base_index].sum(-1)[..., None]
    rows = {"reward": reward, "advantage": objective.counted}
    return {
        "loss": result.loss.item(),
        "nll_base": result.nll_base.item(),
        "nll_talk": (-spoken.log_talk.sum((0, 1, 2)) / counts).tolist(),
        "policy_loss": result.policy_loss.item(),
        **{name: x.detach().movedim(2, 1).flatten(0, 1)[:, : objective.columns].tolist() for name, x in rows.items()},
        "gradients": dict(gradient_of(*named) for named in model.named_parameters()),
    }


def gradient_of(name: str, parameter: torch.nn.Parameter) -> tuple[str, list[float]]:
    gradient = parameter.grad.double().numpy()
    if name in ("qstar_start", "qstar_end"):  # theirs are used times 100, and have a second row that is not used
        name = name.replace("qstar_", "") + "_embedding"
        gradient = np.stack([100 * gradient, 0 * gradient])
    name = name.replace("qstar_mixing_head.", "head.")
    return name, case.fingerprint(name, gradient)


@functools.cache
def authors() -> dict:
    return json.loads((Path(__file__).parent / "authors.json").read_text())


def relative_difference(ours, theirs) -> float:
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def test_the_formula_gives_the_weights_that_the_authors_code_had():
    model = thinking_model(torch.float64)
    fill(model.get_input_embeddings(), "model.embed_tokens.")  # wrapping has set its last two rows
    own = [x for name, x in model.named_parameters() if name not in ("qstar_start", "qstar_end")]
    assert sum(x.square().sum().item() for x in own) == pytest.approx(authors()["weights"], rel=1e-12)


@pytest.mark.parametrize("policy_weight", POLICY_WEIGHTS)
@pytest.mark.parametrize("padding", case.LENGTHS)
@pytest.mark.parametrize("rules", [OurRules, TheirRules])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_losses_rewards_and_gradients_are_those_of_the_authors_code(dtype, rules, padding, policy_weight):
    key = f"{'ours' if rules is OurRules else 'theirs'}/{padding}"
    expected = authors()[key] | authors()[f"{key}/{policy_weight}"]
    weights = PAPER | dict(policy_weight=float(policy_weight), reinforce_temperature=case.REINFORCE_TEMPERATURE)
    found = compute(rules(**weights), padding, dtype)

    gradients, expected_gradients = found.pop("gradients"), expected.pop("gradients")
    assert found.keys() == expected.keys()
    assert gradients.keys() == expected_gradients.keys()
    errors = {name: relative_difference(found[name], expected[name]) for name in expected}
    for name, (norm, *projections) in expected_gradients.items():
        pairs = zip(gradients[name], (norm, *projections), strict=True)
        errors[f"gradient of {name}"] = max(abs(x - y) for x, y in pairs) / norm
    assert {name: error for name, error in errors.items() if not error <= TOLERANCE[dtype]} == {}
