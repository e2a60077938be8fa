"""How probable given continuations of given contexts are, token by token, with and without thoughts.

A model thinks only where a token of a continuation is predicted. All evaluation that compares answers goes through
here: the paper's, choices, and lm-eval's.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qstar.generation.thoughts import POSITION_BITS
from qstar.grid import Text
from qstar.model import QuietStarModel, embedding_rows
from qstar.talking import speak
from qstar.thinking import evaluating, read_text, think

OWN: Literal["own"] = "own"
Thoughts = Literal["own"] | Sequence[Tensor] | None


class Request(NamedTuple):
    """Token ids of a context and of what follows it."""

    context: list[int]
    continuation: list[int]

    @property
    def tokens(self) -> list[int]:
        """What is read: nothing is predicted from the last token."""
        return self.context + self.continuation[:-1]


class TokenScores(NamedTuple):
    """How a continuation of L tokens fared; all on the CPU.

    Attributes:
        log_prob: of each token, under the whole vocabulary, ``[L]`` fp32 nats.
        best: whether it is the most probable of all, ``[L]`` boolean.
        permitted_log_prob: the same under the permitted tokens alone; 0 where the token is none of them.
        permitted_best: whether it is the most probable of those; True where it is none of them.
        top: the most probable token, of the permitted ones where there are such, ``[L]`` int64.
        thoughts: that were read, ``[L, K]`` int64; None where the model did not think.
    """

    log_prob: Tensor
    best: Tensor
    permitted_log_prob: Tensor
    permitted_best: Tensor
    top: Tensor
    thoughts: Tensor | None


def encode(tokenizer: PreTrainedTokenizerBase, context: str, continuation: str) -> Request:
    """Token ids of a context and of what follows it, where their text is read as one.

    Space at the end of the context is taken for the continuation's. The context's own tokens are as many as those of
    the context alone, as lm-evaluation-harness has it.

    Raises:
        ValueError: one of the two has no tokens.
    """
    space = len(context) - len(context.rstrip())
    if space:
        context, continuation = context[:-space], context[-space:] + continuation
    whole = tokenizer(context + continuation)["input_ids"]
    length = len(tokenizer(context)["input_ids"])
    if not 0 < length < len(whole):
        empty = "context" if not length else "continuation"
        raise ValueError(f"{empty} {(context if not length else continuation)!r} has no tokens, but it must have some")
    return Request(whole[:length], whole[length:])


@torch.no_grad()
def score_requests(
    model: PreTrainedModel,
    requests: Sequence[Request],
    *,
    thoughts: Thoughts = OWN,
    permitted: Sequence[int] | None = None,
    batch_size: int = 8,
    temperature: float = 0.0,
    seed: int = 0,
    repeat: int = 0,
) -> Iterator[tuple[int, TokenScores]]:
    """Score continuations in batches of about one length, the longest first.

    What comes back for a request does not depend on the others but for rounding: what is thought at a position depends
    on the text, on ``seed``, on ``repeat`` and on the position alone, as in ``generate``.

    Args:
        model: any causal language model of transformers without thoughts, a :class:`QuietStarModel` with them.
        requests: contexts and continuations, none of them empty.
        thoughts: ``"own"``: the model's; or those to read instead, for each request ``[L, K]`` int64; None: it does not
            think.
        permitted: tokens that an answer may hold; all by default.
        batch_size: texts that are read at a time.
        temperature: thoughts are sampled at; greedy by default.
        seed: of sampled thoughts.
        repeat: which of several samples of the thoughts.

    Yields:
        Numbers of requests, each once, with their scores.

    Raises:
        ValueError: thoughts for a model that cannot think; thoughts of another shape; a request is empty or too long.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, but it must be at least 1")
    if thoughts is not None and not isinstance(model, QuietStarModel):
        raise ValueError(
            f"thoughts are asked for, but {type(model).__name__} never learned to think: give thoughts=None"
        )
    for number, (context, continuation) in enumerate(requests):
        if not context or not continuation:
            raise ValueError(f"request {number} has an empty {'continuation' if context else 'context'}")
    if thoughts is not None and thoughts != OWN:
        _check_thoughts(model, requests, thoughts)
    permits = None if permitted is None else torch.tensor(sorted(set(permitted)))
    alike: dict[Any, list[int]] = {}  # requests that are read alike: choices of one token behind the same question
    for number, request in enumerate(requests):
        given = thoughts is not None and thoughts != OWN
        key = number if given else (len(request.continuation), *request.tokens)
        alike.setdefault(key, []).append(number)
    order = sorted(alike.values(), key=lambda numbers: -len(requests[numbers[0]].tokens))
    for begin in range(0, len(order), batch_size):
        groups = order[begin : begin + batch_size]
        here = [requests[numbers[0]] for numbers in groups]
        with evaluating(model):
            if isinstance(model, QuietStarModel):
                read = thoughts if thoughts is None or thoughts == OWN else [thoughts[first] for first, *_ in groups]
                sampling = dict(temperature=temperature, seed=seed, repeat=repeat)
                passes = _logits_after_thoughts(model, here, read, sampling)
            else:
                passes = _plain_logits(model, here)
            for numbers, (logits, thought) in zip(groups, passes, strict=True):
                for number in numbers:
                    yield number, _scores(logits, requests[number].continuation, permits, thought)


def _check_thoughts(model: nn.Module, requests: Sequence[Request], thoughts: Sequence[Tensor]) -> None:
    """Raise ValueError where thoughts do not fit the requests."""
    if len(thoughts) != len(requests):
        raise ValueError(f"thoughts are given for {len(thoughts)} requests, but there are {len(requests)}")
    for number, (each, request) in enumerate(zip(thoughts, requests, strict=True)):
        if each.ndim != 2 or len(each) != len(request.continuation) or not each.shape[1]:
            raise ValueError(
                f"thoughts of request {number} have shape {list(each.shape)}, but it must be [L, K] with "
                f"L = {len(request.continuation)}, the tokens of its continuation"
            )


def _logits_after_thoughts(
    model: QuietStarModel, requests: Sequence[Request], thoughts: Thoughts, sampling: dict[str, Any]
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """For each request logits ``[L, V]`` and the thoughts that were read ``[L, K]``.

    Texts end together, with padding on their left, so that what is predicted stands at the last positions of all.
    """
    device = embedding_rows(model).device
    longest = max(len(each.tokens) for each in requests)
    last = max(len(each.continuation) for each in requests)
    tokens, mask = torch.zeros(2, len(requests), longest, dtype=torch.int64)
    for row, each in enumerate(requests):
        tokens[row, longest - len(each.tokens) :] = torch.tensor(each.tokens)
        mask[row, longest - len(each.tokens) :] = 1
    text = Text.from_inputs(tokens.to(device), mask.to(device))
    sizes = dict(rationales=1, ahead_tokens=1)
    read = None
    if thoughts is None:
        states = read_text(model, text, model.grid(longest, **sizes)).hidden[:, -last:]
    elif thoughts == OWN:
        grid = model.grid(longest, **sizes)
        reading = read_text(model, text, grid)
        numbers = text.positions[:, -last:, None] + (sampling.pop("repeat") << POSITION_BITS)
        read = think(model, text, grid, rows=numbers, last=last, reading=reading, **sampling)
        states = speak(model, reading, read, cached=grid.thought_tokens)[:, :, 0]
    else:
        given = torch.zeros(len(requests), last, 1, thoughts[0].shape[1], dtype=torch.int64)
        for row, thought in enumerate(thoughts):
            given[row, last - len(thought) :, 0] = thought
        grid = model.grid(longest, thought_tokens=given.shape[-1], **sizes)
        read = given.to(device)
        states = speak(model, read_text(model, text, grid), read)[:, :, 0]
    head = model.language_head()
    for row, each in enumerate(requests):
        begin = last - len(each.continuation)
        yield head.logits(states[row, begin:]), None if read is None else read[row, begin:, 0].cpu()


def _plain_logits(model: PreTrainedModel, requests: Sequence[Request]) -> Iterator[tuple[Tensor, None]]:
    """Logits ``[L, V]`` for each request, by the model's own pass; padding on the right, where no text sees it."""
    lengths = [len(each.tokens) for each in requests]
    tokens, mask = torch.zeros(2, len(requests), max(lengths), dtype=torch.int64)
    for row, each in enumerate(requests):
        tokens[row, : len(each.tokens)] = torch.tensor(each.tokens)
        mask[row, : len(each.tokens)] = 1
    begins = [length - len(each.continuation) for length, each in zip(lengths, requests, strict=True)]
    first = min(begins) if "logits_to_keep" in inspect.signature(model.forward).parameters else 0
    keep = {"logits_to_keep": max(lengths) - first} if first else {}
    device = model.device
    logits = model(input_ids=tokens.to(device), attention_mask=mask.to(device), use_cache=False, **keep).logits
    for row, (begin, end) in enumerate(zip(begins, lengths, strict=True)):
        yield logits[row, begin - first : end - first], None


def _scores(logits: Tensor, continuation: list[int], permitted: Tensor | None, thoughts: Tensor | None) -> TokenScores:
    """From logits ``[L, V]`` of a continuation."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    log_p = logits.to(wide).log_softmax(-1)
    target = torch.tensor(continuation, device=log_p.device)
    log_prob = log_p.gather(1, target[:, None])[:, 0]
    top = log_p.argmax(-1)
    best = top == target
    permitted_log_prob, permitted_best = log_prob, best
    if permitted is not None:
        permitted = permitted.to(log_p.device)
        among = log_p[:, permitted]
        top = permitted[among.argmax(-1)]
        outside = ~torch.isin(target, permitted)
        permitted_log_prob = (log_prob - among.logsumexp(-1)).masked_fill(outside, 0.0)
        permitted_best = (top == target) | outside
    return TokenScores(log_prob.cpu(), best.cpu(), permitted_log_prob.cpu(), permitted_best.cpu(), top.cpu(), thoughts)
