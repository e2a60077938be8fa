"""A generated token with a thought before it: beside the base model's, and beside re-reading the text as others do.

The model is a Llama of 8 layers as those of SmolLM2-135M, random, and its mixing head is scaled so that about nine of
ten guesses are right. Contenders generate the same number of tokens from the same prompt, in turn; what a prompt and
its first token take is measured beside it and taken off.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import partial
from statistics import median
from time import perf_counter

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from qstar.classes import ThinkingModel
from qstar.config import QuietStarConfig
from qstar.grid import Text
from qstar.talking import read_grid
from qstar.wrapping import attach

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LENGTHS, THOUGHTS, BATCHES = (128, 512, 2048), (4, 8, 16), (1, 8)
WEIGHT = 0.0025  # of the mixing head: about nine of ten guesses are right
VOCABULARY = 4096


def make_model() -> ThinkingModel:
    """The model of the comparison."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=4096,
        eos_token_id=None,
        pad_token_id=0,
    )
    settings = QuietStarConfig(start_token_id=VOCABULARY - 2, end_token_id=VOCABULARY - 1)
    model = attach(LlamaForCausalLM(config), settings).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.05)
        model.qstar_start.normal_(0, 0.05)
        model.qstar_end.normal_(0, 0.05)
        model.qstar_mixing_head.output.weight.normal_(0, WEIGHT)
    return model.to(DEVICE)


def prompts(batch: int, length: int) -> Tensor:
    """Random text, ``[B, N]``."""
    text = torch.randint(VOCABULARY - 2, (batch, length), generator=torch.Generator().manual_seed(length))
    return text.to(DEVICE)


def continue_text(model: ThinkingModel, text: Tensor, tokens: int, **options):
    """``text`` with so many sampled tokens behind it."""
    torch.manual_seed(0)
    return model.generate(
        text,
        attention_mask=torch.ones_like(text),
        max_new_tokens=tokens,
        do_sample=True,
        return_dict_in_generate=True,
        **options,
    )


@torch.no_grad()
def reread(model: ThinkingModel, text: Tensor, tokens: int, thought_tokens: int) -> Tensor:
    """What the published example does: the whole text and thought are read again for each token of either."""
    head, start, end = model.language_head(), model.qstar.start_token_id, model.qstar.end_token_id

    def states(sequence: Tensor) -> Tensor:
        return model.base_model(inputs_embeds=model.embed(sequence), use_cache=False).last_hidden_state[:, -1]

    edge = torch.full_like(text[:, :1], start), torch.full_like(text[:, :1], end)
    for _ in range(tokens):
        base, thought = states(text), torch.cat([text, edge[0]], dim=1)
        for _ in range(thought_tokens):
            said = head.logits(states(thought)).argmax(-1, keepdim=True)
            thought = torch.cat([thought, said], dim=1)
        after = states(torch.cat([thought, edge[1]], dim=1))
        mixed, _ = model.mix(base, after, torch.arange(len(text), device=text.device))
        text = torch.cat([text, head.logits(mixed).argmax(-1, keepdim=True)], dim=1)
    return text


@dataclass(frozen=True)
class Cost:
    """Of one generated token.

    Attributes:
        base: seconds of the base model.
        alone: seconds with a thought, token by token.
        ahead: seconds with thoughts behind guesses.
        alone_over_base: of the first two, over K + 1; the median of ratios taken in turn.
        faster: ``alone`` over ``ahead``, likewise.
        passes: of the model, one after the other: without guesses over with them.
        acceptance: the share of guesses that were right.
    """

    base: float
    alone: float
    ahead: float
    alone_over_base: float
    faster: float
    passes: float
    acceptance: float


def seconds_a_token(model: ThinkingModel, text: Tensor, tokens: int, **options) -> tuple[float, object]:
    """Beyond those of the first token, and what the longer generation returned."""
    times = []
    for count in (1, tokens + 1):
        began = perf_counter()
        output = continue_text(model, text, count, **options)
        times.append(perf_counter() - began)
    return (times[1] - times[0]) / tokens, output


def measure(model: ThinkingModel, batch: int, length: int, thought_tokens: int, tokens: int, rounds: int) -> Cost:
    """The costs of a token behind a text of ``length``."""
    text = prompts(batch, length)
    thinking = dict(think=True, thought_tokens=thought_tokens, thought_temperature=1.0)
    contenders = dict(base=dict(think=False), alone=thinking | dict(drafts=0), ahead=thinking | dict(drafts=8))
    times: dict[str, list[float]] = {name: [] for name in contenders}
    said = {}
    for _ in range(rounds + 1):
        for name, options in contenders.items():
            spent, said[name] = seconds_a_token(model, text, tokens, **options)
            times[name].append(spent)
    times = {name: own[1:] for name, own in times.items()}  # the first round warms up

    def ratio(one: str, other: str) -> float:
        return median(a / b for a, b in zip(times[one], times[other], strict=True))

    alone, ahead = said["alone"].thinking, said["ahead"].thinking
    return Cost(
        **{name: median(own) for name, own in times.items()},
        alone_over_base=ratio("alone", "base") / (thought_tokens + 1),
        faster=ratio("alone", "ahead"),
        passes=alone.passes / ahead.passes,
        acceptance=ahead.acceptance,
    )


@torch.no_grad()
def check_agreement() -> None:
    """All contenders say the same, and what the packed pass of training says."""
    model, text = make_model(), prompts(2, 20)
    greedy = dict(attention_mask=torch.ones_like(text), max_new_tokens=6, do_sample=False, thought_tokens=3)
    asked = dict(return_dict_in_generate=True, output_thoughts=True)
    alone = model.generate(text, think=True, drafts=0, **greedy, **asked)
    ahead = model.generate(text, think=True, **greedy, **asked)
    assert torch.equal(alone.sequences, ahead.sequences)
    assert torch.equal(alone.thoughts, ahead.thoughts)
    assert torch.equal(alone.sequences, reread(model, text, 6, 3))
    read = alone.sequences[:, :-1]
    grid = model.grid(read.shape[1], rationales=1, thought_tokens=3, ahead_tokens=1)
    thoughts = alone.thoughts[:, :1].expand(-1, read.shape[1], -1).clone()
    thoughts[:, -6:] = alone.thoughts
    base, _, after = grid.split(read_grid(model, Text.from_inputs(read), grid, thoughts[:, :, None]))
    mixed, _ = model.mix(base.flatten(0, 1), after.flatten(0, 3), torch.arange(read.numel(), device=read.device))
    said = model.language_head().logits(mixed).argmax(-1).view_as(read)
    assert torch.equal(said[:, -6:], alone.sequences[:, -6:])


@pytest.mark.parametrize("batch, length", [(1, 128), (1, 2048), (8, 128)])
def test_generated_token(benchmark, batch, length):
    check_agreement()
    model, thought_tokens = make_model(), 8
    cost = measure(model, batch, length, thought_tokens, tokens=24, rounds=3)
    benchmark.extra_info.update(vars(cost))
    if length == 128 and batch == 1:
        own = seconds_of(partial(reread, model, prompts(batch, length), 2, thought_tokens)) / 2
        benchmark.extra_info["reread"], benchmark.extra_info["faster_than_reread"] = own, own / cost.ahead
    options = dict(think=True, thought_tokens=thought_tokens, thought_temperature=1.0)
    benchmark.pedantic(partial(continue_text, model, prompts(batch, length), 24, **options), rounds=2)


def seconds_of(call) -> float:
    began = perf_counter()
    call()
    return perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description="A generated token with a thought, beside one of the base model.")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--thoughts", type=int, nargs="+", default=THOUGHTS, help="tokens in a thought")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    check_agreement()
    model = make_model()
    columns = (
        "K",
        "N",
        "B",
        "base, ms",
        "thinking, ms",
        "over K + 1 of base",
        "guessing, ms",
        "faster",
        "passes",
        "right",
    )
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for batch in options.batches:
        for length in options.lengths:
            for thought_tokens in options.thoughts:
                cost = measure(model, batch, length, thought_tokens, options.tokens, options.rounds)
                print(
                    f"| {thought_tokens} | {length} | {batch} | {1e3 * cost.base:.1f} | {1e3 * cost.alone:.1f} | "
                    f"{cost.alone_over_base:.2f} | {1e3 * cost.ahead:.1f} | {cost.faster:.1f}x | {cost.passes:.1f}x | "
                    f"{cost.acceptance:.0%} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
