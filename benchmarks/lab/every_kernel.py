"""Every Triton kernel of the package a few times on small, odd shapes: a program for compute-sanitizer to watch.

    compute-sanitizer --tool memcheck python -m lab.every_kernel [PART ...]

A part is an op in a dtype: processes can share the compiling, which takes most of the time. Nothing is compared: the
tests do that. Every allocation is the driver's own, so that the sanitizer knows its bounds.
"""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from unittest import mock

import torch
from torch import Tensor

from peers.epilogue_sampling import sample_in_epilogue
from qstar_kernels import (
    linear_log_prob,
    linear_log_prob_sum,
    mix_hidden,
    sample_linear,
    thought_attention,
    thought_attention_step,
)
from qstar_kernels.common.launch import Launch, architecture_of
from qstar_kernels.testing import AttentionCase, attention_inputs
from qstar_kernels.thought_attention.cases import all_for_hopper

PLAIN = AttentionCase(batch=2, heads=6, kv_heads=2, positions=37, rationales=2, tokens=3, width=64, value_width=64)
RULES = PLAIN._replace(window=9, softcap=2.0, sinks=True, text_start=True, width=80, value_width=40)


@contextmanager
def counted() -> Iterator[Counter]:
    """How often each kernel is launched inside."""
    counts, run = Counter(), Launch.run

    def count(self: Launch) -> None:
        counts[self.kernel.fn.__name__] += bool(self.programs)
        run(self)

    with mock.patch.object(Launch, "run", count):
        yield counts


def attend(case: AttentionCase, dtype: torch.dtype, device: torch.device) -> None:
    """Packed, forward and backward, and a step."""
    inputs = attention_inputs(case, dtype)
    leaves = [x.detach().to(device).requires_grad_() for x in inputs.leaves]
    rules = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in inputs.rules.items()}
    q, k, v, *sinks = leaves
    rules["sinks"] = sinks[0] if sinks else None
    out = thought_attention(q, k, v, **rules, backend="triton")
    torch.autograd.grad(out, leaves, torch.ones_like(out))

    rationales = rules.pop("rationales")
    text = [x.detach()[:, :, :, 0] for x in (k, v)]
    thoughts = [x.detach()[:, :, :, 1:].unflatten(3, (rationales, case.tokens)) for x in (k, v)]
    first = q.detach()[:, :, :, 1 :: case.tokens]
    rules = {name: x.detach() if isinstance(x, Tensor) else x for name, x in rules.items()}
    thought_attention_step(first, *text, *thoughts, 0, **rules, backend="triton")


def attend_on_hopper(device: torch.device) -> None:
    """By the kernels for compute capability 9.0; on other cards there are none."""
    if architecture_of(device) == "sm_90":
        with all_for_hopper(PLAIN.width):
            attend(PLAIN._replace(heads=8), torch.bfloat16, device)


def use_head(dtype: torch.dtype, device: torch.device) -> None:
    """Likelihoods, draws and mixing."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()

    rows, vocabulary, width = 37, 1301, 40
    hidden, weight, bias = random(rows, width), random(vocabulary, width), random(vocabulary)
    targets = torch.arange(rows, device=device)
    options = {"bias": bias, "softcap": 2.0, "forbidden": torch.tensor([1300, 700], device=device)}
    log_prob, entropy = linear_log_prob(hidden, weight, targets, return_entropy=True, backend="triton", **options)
    (log_prob + entropy).sum().backward()
    row_weight = torch.ones(rows, device=device)
    linear_log_prob_sum(hidden, weight, targets, row_weight, backend="triton", **options)[0].backward()

    with torch.no_grad():
        for temperature in (0.7, 0.0):
            sample_linear(hidden, weight, seed=0, temperature=temperature, backend="triton", **options)
        sample_in_epilogue(hidden, weight, seed=0)

    states = random(7, width), random(rows, width), random(rows, width), random(width)
    mixed, w = mix_hidden(*states, base_index=targets % 6, backend="triton")
    torch.autograd.backward((mixed, w), (torch.ones_like(mixed), torch.ones_like(w)))


PARTS: dict[str, Callable[[torch.device], None]] = {}
for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
    PARTS[f"attention-{name}"] = partial(attend, PLAIN, dtype)
    PARTS[f"rules-{name}"] = partial(attend, RULES, dtype)
    PARTS[f"head-{name}"] = partial(use_head, dtype)
PARTS["hopper-bfloat16"] = attend_on_hopper


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all by default")
    names = parser.parse_args().parts or list(PARTS)
    if not set(names) <= set(PARTS):
        parser.error(f"parts are {', '.join(names)}, but they must be of {', '.join(PARTS)}")
    if not torch.cuda.is_available():
        raise SystemExit("every_kernel needs a CUDA device: torch.cuda.is_available() is False")
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # torch reads it with its first allocation
    with counted() as counts:
        for name in names:
            PARTS[name](torch.device("cuda"))
        torch.cuda.synchronize()
    print(f"{sum(counts.values())} launches of {len(counts)} kernels: {', '.join(sorted(counts))}")


if __name__ == "__main__":
    main()
