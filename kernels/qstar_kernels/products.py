"""Float32 matrix products on a CPU, by whichever of the two libraries in PyTorch is faster: the one place that chooses.

    torch      what PyTorch takes itself, MKL where it is built with it
    onednn     oneDNN, which is in the same PyTorch

On AMD processors whose units take whole vectors of AVX-512 (family 26, Zen 5) MKL reaches less than half of what oneDNN
does; on those that take halves (family 25, Zen 4) it reaches as much. The choice is a rule that was measured,
never the outcome of a timing: that differs from process to process, and results would differ with it. PyTorch has no
switch that asks for oneDNN with exact products (``torch.backends.mkldnn.matmul.fp32_precision`` allows it only together
with less precise ones), so its private operator is called; where that is missing, PyTorch's own choice stays.
"""

from __future__ import annotations

import contextlib
import functools
import platform
import re
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual
from torch.overrides import TorchFunctionMode

from qstar_kernels import reference

CPU_LIBRARIES = ("auto", "torch", "onednn")
BACKENDS = ("auto", "reference", "torch", "onednn")
ORDINARY = (Tensor, nn.Parameter)
PRIVATE = (  # what is called here of PyTorch without a promise that it stays
    (torch.ops.mkldnn, "_linear_pointwise"),
    (torch._C, "_are_functorch_transforms_active"),
    (torch._C._autograd, "_top_saved_tensors_default_hooks"),
    (torch.cpu, "get_capabilities"),
)
LAYERS = (F.linear, torch.addmm)  # what layers call: those of GPT-2 and its like the second
WHOLE_VECTORS = 26  # the first family of AMD's processors that multiply 512 bits at a time
LEAST_WORK = 2**22  # multiply-adds of a product: with fewer, a call costs about what it saves
LEAST_SIZE = 8  # rows and columns of its factors: with fewer, the product waits for memory by either library

# Of this thread, or of whatever else runs by itself: a setting of one is none of the others'.
_library: ContextVar[str] = ContextVar("_library", default="auto")


class Library(NamedTuple):
    """What ``auto`` is on this machine, and why."""

    name: str
    reason: str


@contextlib.contextmanager
def cpu_products(library: str) -> Iterator[None]:
    """Choose the library of float32 products on a CPU for what this thread does inside.

    It is that of this package's ops, and of linear layers inside :func:`faster_linear`. The backward of what was done
    inside keeps to it.

    Args:
        library: ``"torch"``, what PyTorch takes itself; ``"onednn"``, where a product is large enough to gain by it;
            ``"auto"``, the default: ``"onednn"`` on machines where it was measured to be faster, else ``"torch"``.

    Raises:
        ValueError: ``library`` is none of these, or it is ``"onednn"``, which this PyTorch cannot call.
    """
    if library not in CPU_LIBRARIES:
        raise ValueError(f"library is {library!r}, but it must be one of {', '.join(map(repr, CPU_LIBRARIES))}")
    if library == "onednn" and (refusal := find_refusal()) is not None:
        raise ValueError(f"library is 'onednn', but it cannot run: {refusal}")
    token = _library.set(library)
    try:
        yield
    finally:
        _library.reset(token)


def current_cpu_products() -> str:
    """What :func:`cpu_products` was last given around here; ``"auto"`` by default."""
    return _library.get()


def find_refusal() -> str | None:
    """Why oneDNN cannot be called, or None."""
    if not torch.backends.mkldnn.is_available():
        return "this PyTorch is built without oneDNN"
    for place, name in PRIVATE:
        if not hasattr(place, name):
            return f"PyTorch {torch.__version__} has no {name}"
    return None


@functools.cache
def automatic() -> Library:
    """What ``auto`` is, of which only the processor and the PyTorch decide."""
    if (refusal := find_refusal()) is not None:
        return Library("torch", refusal)
    if not torch.backends.mkl.is_available():
        return Library("torch", "this PyTorch is built without MKL, the only one that oneDNN has been measured beside")
    found = torch.cpu.get_capabilities()
    processor = found.get("cpu_name", "an unknown processor")
    if processor.startswith("AMD") and found.get("avx512_f", False) and (family := processor_family()):
        if family >= WHOLE_VECTORS:
            reason = f"{processor} of family {family}, where it is twice as fast as MKL on large products"
            return Library("onednn", reason)
        return Library("torch", f"{processor} of family {family}, where MKL is as fast as oneDNN")
    return Library("torch", f"oneDNN has been measured to be faster on AMD processors of family 26, not on {processor}")


def processor_family() -> int | None:
    """The number of its maker's processors that this one is built like, as Linux and Windows tell it."""
    told = Path("/proc/cpuinfo")
    found = re.search(r"family\D+(\d+)", told.read_text() if told.exists() else platform.processor(), re.IGNORECASE)
    return int(found[1]) if found else None


def describe(device: torch.device, dtype: torch.dtype) -> Library:
    """What ``auto`` is for large products of such tensors, as things stand for this thread."""
    if device.type != "cpu" or dtype != torch.float32:
        return Library("torch", f"{dtype} on {device.type}: oneDNN takes the place of MKL for float32 on a CPU")
    if not torch.backends.mkldnn.enabled:
        return Library("torch", "torch.backends.mkldnn.enabled is False")
    if (library := _library.get()) != "auto":
        return Library(library, f"cpu_products({library!r}) is in force")
    return automatic()


def is_chosen() -> bool:
    """Whether large products go to oneDNN here; not in what is being compiled, whose compiler chooses."""
    if torch.compiler.is_compiling():
        return False
    library = _library.get()
    return (automatic().name if library == "auto" else library) == "onednn"


def pays(rows: int, inner: int, columns: int) -> bool:
    """Whether a product ``[rows, inner]`` times ``[inner, columns]`` is large enough; so are then its gradients."""
    return min(rows, inner, columns) >= LEAST_SIZE and rows * inner * columns >= LEAST_WORK


def is_ordinary(*tensors: Tensor) -> bool:
    """Whether these are float32 numbers in the memory of a CPU, and nothing stands between them and a product.

    Not so under autocast, a compiler, or transforms like ``vmap``, nor for tensors of classes of their own, as those
    that are spread over processes or quantised, or with a derivative that goes forward: all these know PyTorch's own
    products alone.
    """
    return (
        all(type(x) in ORDINARY and x.device.type == "cpu" and x.dtype == torch.float32 for x in tensors)
        and all(x.layout == torch.strided for x in tensors)
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._are_functorch_transforms_active()
        and torch.backends.mkldnn.enabled
        and all(unpack_dual(x).tangent is None for x in tensors)
    )


def goes_to_onednn(a: Tensor, b: Tensor) -> bool:
    """Whether ``a b^T`` of ``a [..., k]`` and ``b [n, k]`` goes there."""
    if b.dim() != 2 or a.dim() < 2 or a.shape[-1] != b.shape[1]:
        return False
    return is_chosen() and pays(a.numel() // max(a.shape[-1], 1), b.shape[1], b.shape[0]) and is_ordinary(a, b)


def multiply(a: Tensor, b: Tensor, bias: Tensor | None = None, ending: str = "none") -> Tensor:
    """``a b^T + bias`` of ``a [m, k]``, ``b [n, k]`` and ``bias [n]`` by oneDNN, ``[m, n]``; without a gradient.

    ``ending`` is the name of a function of every element that the product ends with, which oneDNN has.
    """
    if bias is None and ending == "none" and is_transposed(a) and is_transposed(b) and len(a) > len(b):
        return multiply(b, a).t()  # the operator copies a first factor that is transposed: let it be the smaller one
    if not (b.is_contiguous() or b.t().is_contiguous()):
        b = b.contiguous()  # other strides would go to its reference implementation, a thousand times slower
    if bias is not None:
        bias = bias.contiguous()  # it is read as if it were
    return torch.ops.mkldnn._linear_pointwise(a, b, bias, ending, [], "")


def is_transposed(x: Tensor) -> bool:
    """Whether a matrix has its columns one after the other in memory."""
    return x.t().is_contiguous() and not x.is_contiguous()


class _Linear(torch.autograd.Function):
    """A linear layer on ``[m, k]`` by oneDNN, and its gradients, wherever the backward runs."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        needs = ctx.needs_input_grad
        ctx.save_for_backward(x if needs[1] else None, weight if needs[0] else None)
        return multiply(x, weight, bias)

    @staticmethod
    def backward(ctx, d_out):
        x, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled():  # a second backward will follow
            d_x = F.linear(d_out, weight.t()) if needs[0] else None
            d_weight = d_out.t() @ x if needs[1] else None
        else:
            d_x = multiply(d_out, weight.t()) if needs[0] else None
            d_weight = multiply(d_out.t(), x.t()) if needs[1] else None
        return d_x, d_weight, d_out.sum(0) if needs[2] else None


def linear_by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """:func:`linear` of what it takes to be there."""
    if not x.numel() or not weight.numel():
        return F.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    learned = torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in (x, weight, bias))
    out = _Linear.apply(rows, weight, bias) if learned else multiply(rows, weight, bias)
    return out if x.dim() == 2 else out.view(*x.shape[:-1], len(weight))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """``x W^T + bias``, as ``torch.nn.functional.linear``; on some CPUs faster, in float32.

    Differentiable with respect to all three, as often as one likes.

    Args:
        x: ``[..., k]``.
        weight: ``[n, k]``.
        bias: ``[n]``.
        backend: ``"torch"``, which is ``torch.nn.functional.linear``; ``"onednn"``, which takes ordinary float32
            tensors on a CPU; ``"reference"``; or ``"auto"``: as :func:`cpu_products` says where ``"onednn"`` takes
            these tensors and gains by it, else ``"torch"``.

    Returns:
        ``[..., n]``.

    Raises:
        ValueError: ``backend`` is none of these, or it is ``"onednn"`` and cannot run on these tensors.
        TypeError, RuntimeError: as ``torch.nn.functional.linear``.
    """
    chosen = choose(backend, x, weight, bias)
    if chosen == "reference":
        return reference.linear(x, weight, bias)
    return linear_by_onednn(x, weight, bias) if chosen == "onednn" else F.linear(x, weight, bias)


def choose(backend: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> str:
    """The backend that runs :func:`linear` on these tensors: reference, torch or onednn; raises as that says."""
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}, but it must be one of {', '.join(map(repr, BACKENDS))}")
    if backend == "auto":
        return "onednn" if goes_to_onednn(x, weight) and fits(bias, weight) else "torch"
    if backend == "onednn":
        refusal = find_refusal()
        if refusal is None and not (is_ordinary(x, weight) and fits(bias, weight)):
            refusal = "it takes float32 tensors on a CPU and a bias [n], outside of autocast, compilers and transforms"
        if refusal is not None:
            raise ValueError(f"backend is 'onednn', but it cannot run: {refusal}")
        if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
            shapes = f"{list(x.shape)} and {list(weight.shape)}"
            raise ValueError(f"x and weight have shapes {shapes}, but they must be [..., k] and [n, k]")
    return backend


def fits(bias: Tensor | None, weight: Tensor) -> bool:
    """Whether ``bias`` is one that oneDNN adds to what ``weight`` makes."""
    return bias is None or (bias.shape == weight.shape[:1] and is_ordinary(bias))


class _FasterLinear(TorchFunctionMode):
    """Sends the linear layers of PyTorch and transformers to :func:`linear`."""

    def __enter__(self) -> _FasterLinear:
        self._around = how_gradients_are_kept()
        return super().__enter__()

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not kwargs and func in LAYERS and is_chosen() and how_gradients_are_kept() == self._around:
            if func is F.linear:
                return linear(*args)
            if len(args) == 3 and choose("auto", args[1], args[2].t(), args[0]) == "onednn":
                return linear_by_onednn(args[1], args[2].t(), args[0])
        return func(*args, **(kwargs or {}))


def how_gradients_are_kept() -> tuple[bool, Any]:
    """What is different inside a checkpoint, whose layers the backward computes again, outside of this context."""
    return torch.is_grad_enabled(), torch._C._autograd._top_saved_tensors_default_hooks(True)


def faster_linear(states: Tensor) -> contextlib.AbstractContextManager:
    """Let linear layers on such ``states`` ``[..., E]`` be :func:`linear`, whatever model calls them inside.

    They are told by what they call, ``torch.nn.functional.linear`` or ``torch.addmm``; no module is changed, and other
    threads see nothing of it. Layers in a checkpoint of their own (``torch.utils.checkpoint``) stay as they are: the
    backward would compute them again outside of this, with other roundings. Where ``states`` are too few for a square
    layer to gain, or not what oneDNN takes, nothing is done at all.
    """
    width = states.shape[-1] if states.dim() else 0
    if width and is_chosen() and pays(states.numel() // width, width, width) and is_ordinary(states):
        return _FasterLinear()
    return contextlib.nullcontext()
