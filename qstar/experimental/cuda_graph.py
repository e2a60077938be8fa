"""Thinking that is replayed from a CUDA graph, so that the GPU need not wait for the host.

A training step of a Llama of 1B parameters took 0.83 to 0.90 times as long with it on an H200 (benchmarks/README.md).
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable

import torch
from torch import distributed, nn

from qstar.model import QuietStarModel
from qstar.thinking import Thinking


def enable(model: QuietStarModel) -> None:
    """Capture the second token of every thinking in a CUDA graph and replay it for those after it: the same thoughts.

    Takes memory for one more token, which stays the model's, and the host's time for one. Thinking then raises
    ValueError where it cannot be captured: not on a GPU, parameters elsewhere or sharded, several processes, a model
    that waits for the device.
    """
    model.qstar_replay = replay


def disable(model: QuietStarModel) -> None:
    """Let the host launch every token again."""
    model.qstar_replay = None


def replay(thinking: Thinking) -> Callable[[], None]:
    """What says the second and each later token of ``thinking``, whose first has been said."""
    device = thinking.tokens.device
    check_capturable(thinking.model, device)
    return capture(thinking, thinking.model, device)


def check_capturable(model: nn.Module, device: torch.device) -> None:
    """Raise ValueError where what ``model`` does with tensors on ``device`` cannot be captured."""
    why = _refusal(model, device)
    if why is not None:
        raise ValueError(f"cuda_graph is enabled, but thinking cannot be captured: {why}")


def _refusal(model: nn.Module, device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"the text is on {device}, not on a CUDA device"
    if distributed.is_available() and distributed.is_initialized():
        from torch.distributed.tensor import DTensor

        if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
            return "parameters are sharded, and FSDP gathers them layer by layer"
        if distributed.get_world_size() > 1:
            return f"{distributed.get_world_size()} processes train together, and what they exchange was never captured"
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.device != device:
            return f"{name} is on {tensor.device}, and the text on {device}"
    if torch.cuda.is_current_stream_capturing():
        return "it is inside another capture"
    return None


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures, since libraries keep a workspace for every stream that they have seen."""
    return torch.cuda.Stream(device)


# Each captures into the memory of the one before it, which would else stay reserved until the device is full, and a
# capture cannot free any.
_latest: weakref.WeakKeyDictionary[nn.Module, torch.cuda.CUDAGraph] = weakref.WeakKeyDictionary()


def capture(call: Callable[[], None], model: nn.Module, device: torch.device) -> Callable[[], None]:
    """What ``call`` launches, as a function that launches it again at once; ``call`` itself runs on the host only.

    ``call`` must have run before, on the caller's stream: then its kernels are compiled and loaded, what it makes once
    is made, and autocast has its copies of the weights, which the graph reads and does not make again. Nothing of this
    needs the stream of the capture, since no gradient is recorded. The memory in between belongs to ``model`` and
    serves its next capture, so what an earlier one returned must not be called any more.

    Raises:
        ValueError: ``call`` waits for the device, or does something else that cannot be captured.
    """
    graph, previous = torch.cuda.CUDAGraph(), _latest.get(model)
    try:
        # Not torch.cuda.graph: that empties the allocator's cache, which training would have to fill again every step.
        # Only this thread must do nothing that a capture forbids: others, as one that pins batches, may go on.
        with torch.cuda.stream(_stream(device)):
            graph.capture_begin(None if previous is None else previous.pool(), capture_error_mode="thread_local")
            try:
                call()
            finally:
                graph.capture_end()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise ValueError(
            "cuda_graph is enabled, but thinking cannot be captured: the model waits for the device or does something "
            f"else that no graph can hold ({error})"
        ) from error
    _latest[model] = graph
    return graph.replay
