"""A tiny model thinks, generates and learns on the device at hand, and every op is compared with its reference."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

import qstar_kernels as kernels
from qstar import reference
from qstar.compatibility import EXACT
from qstar.cpu import one_thread
from qstar.doctor.findings import Finding
from qstar.doctor.machine import best_device
from qstar.embedded.task import build_tokenizer
from qstar.heads import MixingHead
from qstar.learning import Objective
from qstar.model import QuietStarModel
from qstar.wrapping import wrap

ADVICE = "results would be wrong: report it with this page"
PROMPT = "Q 1 3 5 0 8 ="
TOKENS = 8  # that are generated

Check: TypeAlias = Callable[[PreTrainedModel, PreTrainedTokenizerBase], str]


class Inputs(NamedTuple):
    """What an op is called with: tensors of its dtype, which it is differentiated by, and all else."""

    tensors: tuple[Tensor, ...]
    others: tuple[Tensor, ...] = ()
    options: dict[str, Any] = {}  # noqa: RUF012  # read alone


@one_thread()
def check_itself() -> list[Finding]:
    """Of every op and of a model, on the device at hand."""
    device = best_device()
    return [*check_ops(device), *check_model(device)]


def op_inputs(device: torch.device) -> dict[str, Inputs]:
    """Small random inputs of every op, in float32."""
    generator = torch.Generator().manual_seed(0)

    def states(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    def integers(below: int, *shape: int) -> Tensor:
        return torch.randint(below, shape, generator=generator).to(device)

    q, k, v = states(2, 4, 5, 7, 16), states(2, 2, 5, 7, 16), states(2, 2, 5, 7, 16)
    caches = states(2, 2, 5, 16), states(2, 2, 5, 16), states(2, 2, 5, 2, 3, 16), states(2, 2, 5, 2, 3, 16)
    part = caches[0], caches[1], caches[2][:, :, 2:], caches[3][:, :, 2:]
    hidden, weight, targets = states(13, 48), states(101, 48) / 4, integers(101, 13)
    return {
        "thought_attention": Inputs((q, k, v), options=dict(rationales=2)),
        "thought_attention_step": Inputs((states(2, 4, 5, 2, 16), *caches), options=dict(step=1)),
        "thought_attention_part": Inputs((states(2, 4, 3, 2, 3, 16), *part)),
        "mix_hidden": Inputs(
            (states(6, 48), hidden, states(13, 48), states(48)), options=dict(base_index=integers(6, 13))
        ),
        "linear_log_prob": Inputs((hidden, weight), (targets,)),
        "linear_log_prob_sum": Inputs((hidden, weight), (targets, states(13))),
        "sample_linear": Inputs((hidden, weight), options=dict(seed=7)),
        "linear": Inputs((states(131, 192), states(192, 192), states(192))),
    }


def op_results(op: Callable[..., Any], given: Inputs, dtype: torch.dtype, backend: str) -> list[Tensor]:
    """What ``op`` gives in ``dtype``, and its gradients where it has some, in float64."""
    leaves = [x.to(dtype).requires_grad_() for x in given.tensors]
    others = [x.to(dtype) if x.is_floating_point() else x for x in given.others]
    results = op(*leaves, *others, **given.options, backend=backend)
    results = results if isinstance(results, tuple) else (results,)
    learned = [x for x in results if x.requires_grad]
    gradients = torch.autograd.grad([x.double().square().sum() for x in learned], leaves) if learned else ()
    return [x.detach().double() for x in (*results, *gradients)]


def check_ops(device: torch.device) -> list[Finding]:
    """Of every op, beside its reference in float64 on the same inputs."""
    return [op_finding(name, getattr(kernels, name), given) for name, given in op_inputs(device).items()]


def op_finding(name: str, op: Callable[..., Any], given: Inputs) -> Finding:
    """Of one op: how far its results and gradients are from the reference's, relative to their norms."""
    what = f"{name} checked"
    try:
        ours, exact = op_results(op, given, torch.float32, "auto"), op_results(op, given, torch.float64, "reference")
    except Exception as error:  # whatever a kernel, a compiler or a driver raises
        return Finding("problem", what, f"it fails: {type(error).__name__}: {one_line(error)}", ADVICE)
    worst = worst_error(ours, exact)
    found = f"results and gradients differ by {worst:.0e} from the reference"
    return Finding("ok", what, found) if worst <= EXACT else Finding("problem", what, found, ADVICE)


def check_model(device: torch.device) -> list[Finding]:
    """Of a tiny model that is wrapped, generates and learns."""
    findings: list[Finding] = []
    with torch.random.fork_rng(), quiet():
        model, tokenizer = tiny_model(device)
        for what, check in CHECKS.items():
            findings.append(model_finding(what, check, model, tokenizer))
            if findings[-1].state == "problem":
                break
    return findings


def model_finding(what: str, check: Check, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Finding:
    """Of a check that says what is right, or raises."""
    try:
        return Finding("ok", what, check(model, tokenizer))
    except Exception as error:  # whatever a model, a compiler or a driver raises
        return Finding("problem", what, f"it fails: {type(error).__name__}: {one_line(error)}", ADVICE)


def tiny_model(device: torch.device) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A random model of two layers, which is no thinking one yet, and a tokenizer of the embedded task."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    sizes: dict[str, Any] = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, max_position_embeddings=64)
    heads: dict[str, Any] = dict(num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, **heads))
    nn.Module.to(model, device)
    return model.eval(), tokenizer


def check_wrapping(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """Wrap ``model``, which compares its passes over thoughts with its own plain ones."""
    thinking = wrap(model, tokenizer, thought_tokens=3, ahead_tokens=2)
    nn.init.normal_(cast(MixingHead, thinking.qstar_mixing_head).output.weight, std=0.5)  # so that thoughts count
    return f"a tiny model thinks on {thinking.device}; its passes over thoughts are those of the plain model"


def check_generation(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """Generate with thoughts, token by token and behind guesses."""
    prompt = tokenizer(PROMPT, return_tensors="pt").to(model.device)
    options = dict(min_new_tokens=TOKENS, max_new_tokens=TOKENS, return_dict_in_generate=True, think=True)
    plain, guessed = (cast(Any, model).generate(**prompt, **options, drafts=drafts) for drafts in (0, None))
    if plain.thinking.tokens != TOKENS or plain.thinking.thought_share != 1:
        raise AssertionError(f"{plain.thinking} is not {TOKENS} tokens with a thought before each")
    if not torch.equal(plain.sequences, guessed.sequences):
        raise AssertionError("behind guesses it says another text than token by token")
    return f"{TOKENS} tokens with a thought before each, in {plain.thinking.passes} passes; the same behind guesses"


def check_learning(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """Take the loss and the gradient of a text, and compare them with those of plain loops over the same thoughts."""
    tokens = tokenizer(PROMPT, return_tensors="pt")["input_ids"].to(model.device)
    objective = Objective(seed=0)
    output = model(input_ids=tokens, objective=objective)
    ours = [output.loss, *gradients(model, output.loss)]
    model.set_attn_implementation("eager")  # so that nothing of ours is in the plain loops
    plain = reference.objective(
        cast(QuietStarModel, model),
        tokens[0],
        output.thoughts[0],
        policy_weight=objective.policy_weight,
        reinforce_temperature=objective.reinforce_temperature,
        baseline=objective.baseline,
        signed=objective.signed,
    )
    error = worst_error(ours, [plain["loss"], *gradients(model, plain["loss"])])
    if not error <= EXACT:
        raise AssertionError(f"loss and gradients differ by {error:.0e} from those of plain loops")
    return f"loss and gradients differ by {error:.0e} from those of plain loops"


CHECKS: dict[str, Check] = {"wrapping": check_wrapping, "generation": check_generation, "learning": check_learning}


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    """Those of ``loss``, for every parameter."""
    return list(torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True))


def worst_error(ours: list[Tensor], exact: list[Tensor]) -> float:
    """The largest norm of a difference over that of ``exact``; NaN where there is one."""
    pairs = zip(ours, exact, strict=True)
    errors = [(x - y).detach().norm() / y.detach().norm().clamp(min=1e-9) for x, y in pairs]
    return float(torch.stack([error.double() for error in errors]).max())


def one_line(error: Exception) -> str:
    """The beginning of what an exception says."""
    first = str(error).strip().split("\n")[0]
    return first if len(first) <= 200 else f"{first[:200]}..."


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what transformers and this package tell of a model that is nobody's."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(level)
