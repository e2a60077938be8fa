"""Every causal class of transformers thinks exactly, or is refused in a sentence; a dozen of them in every run.

``pytest tests/qstar/test_every_model.py`` tries all. The batch holds a text longer than every window, one with padding
on its left and one of two documents; half of its thoughts are the model's own, the most probable ones.
"""

from __future__ import annotations

import copy
import re
from unittest import mock

import every_model
import pytest
import spoken
import tiny
import torch
from every_model import THINKS, UNTRIED, documented
from oracle import Doubled, Oracle, Scores, made_wild
from torch.utils.checkpoint import checkpoint
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from qstar import wrap
from qstar.grid import IGNORED, Text
from qstar.learning import Objective, QuietStarOutput
from qstar.model import QuietStarModel, embedding_rows
from qstar.talking import read_grid, talk
from qstar.thinking import read_on, read_text, think
from qstar.wrapping import load

EVERYDAY = ["bart", "bert", "deepseek_v3", "gemma2", "gemma3n_text", "gemma4", "gpt2", "gpt_oss", "llama"]
EVERYDAY += ["minicpm3", "mixtral", "opt", "phi3", "phimoe", "qwen2", "whisper"]
WIDTHS = dict(thought_tokens=2, ahead_tokens=2, rationales=2)
POSITIONS = 9
DOCUMENTS = [(0, 0, 9), (1, 3, 9), (2, 0, 5), (2, 5, 9)]  # of the batch: row, from, to
STEP = 1e-2
TOLERANCE = 1e-10
TEMPERATURE = 3.0  # of the log-probabilities of sampled tokens
IN_ONE_PART = {  # and what their modules do
    "diffllama": "DiffLlamaAttention attends more than once in a pass",
    "hrm_text": "HrmTextAttention attends without gradients",
}


def all_types() -> list:
    names = sorted(every_model.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    return [pytest.param(name, marks=[] if name in EVERYDAY else pytest.mark.slow) for name in names]


def batch() -> dict[str, torch.Tensor]:
    tokens, mask = tiny.text(3, POSITIONS), torch.ones(3, POSITIONS, dtype=torch.int64)
    positions = torch.arange(POSITIONS).repeat(3, 1)
    mask[1, :3] = 0
    positions[1] = (positions[1] - 3).clamp(min=0)
    positions[2, 5:] -= 5
    return dict(input_ids=tokens, attention_mask=mask, position_ids=positions)


def accepted(model_type: str) -> QuietStarModel | None:
    """The model that thinks, as it was initialized; None where it is refused in the words of docs/models.md."""
    assert model_type in documented(), f"docs/models.md does not say whether {model_type} thinks"
    said = documented()[model_type]
    try:
        model = every_model.fresh_model(model_type)
    except Exception:
        assert said == UNTRIED
        return None
    if said == THINKS:
        return wrap(model, tiny.tokenizer(), **WIDTHS)
    with pytest.raises(ValueError) as refusal:
        wrap(model, tiny.tokenizer(), **WIDTHS)
    assert said in str(refusal.value)
    return None


def with_thought_embeddings(model: QuietStarModel, plain: torch.nn.Module) -> Oracle:
    """Give ``model`` thought embeddings and a mixing head that count, and ``plain`` the same weights; both float64."""
    torch.manual_seed(3)
    rows = embedding_rows(model)
    with torch.no_grad():
        model.qstar_mixing_head.output.weight.normal_(0, 0.5)
        for token, vector in (
            (model.qstar.start_token_id, model.qstar_start),
            (model.qstar.end_token_id, model.qstar_end),
        ):
            rows[token] = vector.normal_(0, 0.5)
    plain.load_state_dict({name: x for name, x in model.state_dict().items() if not name.startswith("qstar_")})
    for each in (model, plain):
        if hasattr(each, "set_experts_implementation"):
            each.set_experts_implementation("eager")  # the others have no float64
        each.double()
    model.train()
    return Oracle(plain, model.qstar_mixing_head, model.qstar)


def given_and_greedy(model: QuietStarModel, text: Text) -> torch.Tensor:
    """Thoughts ``[B, N, 2, K]``: the most probable one, and a random one."""
    greedy = think(model, text, model.grid(POSITIONS, rationales=1), temperature=0)
    return torch.cat([greedy, tiny.random_thoughts(model, 3, POSITIONS)[:, :, :1]], dim=2)


def scored(model: QuietStarModel, thoughts: torch.Tensor, max_grid_tokens: int | None = None) -> QuietStarOutput:
    """The objective, inside ``forward`` as training calls it."""
    settings = dict(policy_weight=1.0, baseline="base", reinforce_temperature=TEMPERATURE)
    objective = Objective(**settings, max_grid_tokens=max_grid_tokens)
    return model(**batch(), thoughts=thoughts, objective=objective)


def by_the_oracle(oracle: Oracle, thoughts: torch.Tensor) -> Scores:
    tokens = batch()["input_ids"]
    documents = [(tokens[row, a:b], thoughts[row, a:b]) for row, a, b in DOCUMENTS]
    return oracle(documents, TEMPERATURE)


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, what: str, least: float = 0) -> None:
    scale = max(float(theirs.double().norm()), least, 1e-300)
    error = float((ours.double() - theirs.double()).norm()) / scale
    assert error < TOLERANCE, f"{what}: {error:.1e}"


def assert_log_probabilities(model: QuietStarModel, text: Text, thoughts: torch.Tensor, theirs: Scores) -> None:
    with torch.no_grad():
        ours = talk(model, text, model.grid(POSITIONS), thoughts)
    assert_close(ours.log_base[text.targets != IGNORED], theirs.log_base, "log-probabilities without thoughts")
    counted = ours.targets != IGNORED  # [B, N, m]; the oracle's come by document, position and step
    assert_close(ours.log_talk.transpose(2, 3)[counted], theirs.log_talk, "log-probabilities after thoughts")


@torch.no_grad()
def assert_reading_on(model: QuietStarModel, text: Text) -> None:
    """A text that is read in two parts has the states of one that is read at once."""
    grid, part = model.grid(POSITIONS), Text.from_inputs(**{name: x[:, :6] for name, x in batch().items()})
    model.eval()
    whole, on = read_text(model, text, grid), read_on(model, read_text(model, part, grid), text)
    model.train()
    valid = batch()["attention_mask"].bool()
    assert_close(on.hidden[valid], whole.hidden[valid], "states of a text in two parts")


def assert_gradients(model: QuietStarModel, oracle: Oracle) -> None:
    embedding = embedding_rows(oracle.plain)
    theirs = {name: p.grad for name, p in oracle.plain.named_parameters() if p.grad is not None}
    theirs |= {f"qstar_mixing_head.{name}": p.grad for name, p in oracle.mixing.named_parameters()}
    for name, token in (("qstar_start", model.qstar.start_token_id), ("qstar_end", model.qstar.end_token_id)):
        theirs[name] = embedding.grad[token].clone()
        embedding.grad[token] = 0
    ours = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    zeros = {name for name, gradient in theirs.items() if not gradient.any()}
    assert ours.keys() | zeros == theirs.keys() | {name for name, gradient in ours.items() if not gradient.any()}
    least = 1e-6 * max(float(gradient.norm()) for gradient in theirs.values())  # below it, all is rounding
    for name in ours.keys() & theirs.keys():
        assert_close(ours[name], theirs[name], f"gradient of {name}", least)


def in_parts_or_refused(model: QuietStarModel, thoughts: torch.Tensor, tokens: int) -> QuietStarOutput | None:
    """What is computed again for its gradient is computed in float64 as well."""

    def doubled(function, *given, use_reentrant):
        def call(*given):
            with Doubled():
                return function(*given)

        return checkpoint(call, *given, use_reentrant=use_reentrant)

    with mock.patch("qstar.talking.checkpoint", doubled):
        why = IN_ONE_PART.get(model.config.model_type)
        if why is None:
            return scored(model, thoughts, tokens)
        with pytest.raises(ValueError, match=rf"{why}.*: its grids cannot be read in parts"):
            scored(model, thoughts, tokens)
    return None


def assert_parts(model: QuietStarModel, thoughts: torch.Tensor, packed: QuietStarOutput) -> None:
    """The grid in parts of two positions has the losses of the packed one, and its gradients, which ``model`` holds."""
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    slots = model.grid(POSITIONS).slots - 1
    parts = in_parts_or_refused(model, thoughts, 2 * 3 * slots)
    if parts is None:
        return
    model.zero_grad()
    assert_close(parts.loss.detach(), packed.loss.detach(), "loss of the grid in parts")
    parts.loss.backward()
    least = 1e-6 * max(float(gradient.norm()) for gradient in gradients.values())
    for name, parameter in model.named_parameters():
        if name in gradients:
            assert_close(parameter.grad, gradients[name], f"gradient of {name} of the grid in parts", least)
            parameter.grad = gradients[name]


@torch.no_grad()
def step(model: torch.nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter -= STEP * parameter.grad


@pytest.mark.parametrize("weights", ["fresh", "wild"])
@pytest.mark.parametrize("model_type", all_types())
def test_it_is_exact_or_refused_in_a_sentence(model_type, weights):
    model = accepted(model_type)
    if model is None:
        return
    plain = every_model.fresh_model(model_type)
    if weights == "wild":
        made_wild(model)
    oracle = with_thought_embeddings(model, plain)
    text = Text.from_inputs(**batch())
    with Doubled():
        thoughts = given_and_greedy(model, text)
        ours, theirs = scored(model, thoughts), by_the_oracle(oracle, thoughts)
        assert_close(theirs.said[:, 0], theirs.most[:, 0], "log-probabilities of the most probable thoughts")
        assert_log_probabilities(model, text, thoughts, theirs)
        assert_reading_on(model, text)
        assert_close(ours.loss.detach(), theirs.loss.detach(), "loss")
        ours.loss.backward()
        theirs.loss.backward()
        gradient = embedding_rows(oracle.plain).grad.clone()
        assert_gradients(model, oracle)
        assert_parts(model, thoughts, ours)

        embedding_rows(oracle.plain).grad.copy_(gradient)
        for each in (model, oracle.plain, oracle.mixing):
            step(each)
        with torch.no_grad():
            assert_close(scored(model, thoughts).loss, by_the_oracle(oracle, thoughts).loss, "loss after a step")


@pytest.mark.parametrize("model_type", all_types())
def test_it_is_saved_and_loaded(model_type, tmp_path):
    model = accepted(model_type)
    if model is None:
        return
    made_wild(model)
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|startthought|>", "<|endthought|>"]})
    before = copy.deepcopy(model.state_dict())
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    if type(model.config) not in MODEL_FOR_CAUSAL_LM_MAPPING:  # a text part that AutoModelForCausalLM does not know
        with pytest.raises(ValueError, match="Unrecognized configuration class"):
            load(tmp_path)
        return
    again, _ = load(tmp_path)
    after = again.state_dict()
    assert after.keys() == before.keys()
    text, thoughts = Text.from_inputs(**batch()), tiny.random_thoughts(model, 3, POSITIONS)
    with torch.no_grad():
        assert torch.equal(
            read_grid(again, text, again.grid(POSITIONS), thoughts),
            read_grid(model, text, model.grid(POSITIONS), thoughts),
        )


OWN_MASKS = {"git"}  # makes a mask of its own and calls no attention of transformers, so that nothing can be refused
UNREAD = {"blt", "bailing_hybrid", "musicgen", "musicgen_melody", "nemotron_h"}  # their tiny models read no text


@torch.no_grad()
@pytest.mark.parametrize("model_type", all_types())
def test_without_thoughts_it_stays_what_it_was_or_is_refused(model_type):
    """Texts with padding, through the attention that the class takes by itself and through ours."""
    if model_type in OWN_MASKS | UNREAD or documented()[model_type] == UNTRIED:
        pytest.skip("nothing to compare")
    model = made_wild(every_model.fresh_model(model_type))
    if not type(model)._can_set_attn_implementation():
        return
    inputs = {name: value for name, value in batch().items() if name != "position_ids"}
    before = model(**inputs, use_cache=False).logits
    model.set_attn_implementation("qstar")
    if re.search("chooses or compresses", documented()[model_type]) or model_type == "inkling2_text":
        with pytest.raises(ValueError, match=r"adds compressed keys|passes (indices|block_indices|sinks)"):
            model(**inputs, use_cache=False)
        return
    after, text = model(**inputs, use_cache=False).logits, inputs["attention_mask"].bool()
    error = float((after - before)[text].norm() / before[text].norm())
    assert error < 2e-6


@pytest.mark.parametrize("model_type", all_types())
def test_it_generates_what_the_packed_pass_says(model_type):
    """Token by token and behind guesses: each token's prediction is that of training after the same thought."""
    model = accepted(model_type)
    if model is None:
        return
    made_wild(model)
    with_thought_embeddings(model, every_model.fresh_model(model_type))
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    tokens, mask = spoken.padded(2, 7)
    with Doubled():
        for drafts in (0, 3):
            output = spoken.generate(model, tokens, mask, max_new_tokens=7, drafts=drafts)
            expected, _ = spoken.packed_log_probs(model.eval(), output, mask)
            allowed = torch.isfinite(expected)
            assert_close(output.logits.log_softmax(-1)[allowed], expected[allowed], f"{drafts} drafts")
