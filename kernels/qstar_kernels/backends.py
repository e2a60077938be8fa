"""Which backend an op runs with, and why: the one place that chooses.

    reference   dense, the specification: by name only
    torch       plain PyTorch, on any device
    triton      kernels for NVIDIA and AMD GPUs; by name also on a CPU, in Triton's interpreter

``auto`` is ``triton`` on a GPU where its kernels can run, else ``torch``. They are refused where these tensors or this
device cannot have them: quietly under ``auto``, with a ValueError by name. They are broken where Triton is installed
and an import fails all the same: ``auto`` warns, ``triton`` raises a RuntimeError with the cause.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from qstar_kernels import products
from qstar_kernels.common.notices import warn_once

NAMES = ("auto", "reference", "torch", "triton")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # that the Triton kernels take
OLDEST = (8, 0)  # compute capability


class Kernels(NamedTuple):
    """The Triton kernels of an op.

    Attributes:
        folder: of the op; the kernels are in its folder ``triton``.
        arguments: those that the kernels look at; the first has the op's device and dtype.
        names: as the table of tiles has them.
        widths: the narrowest and widest rows of ``arguments``; None for any.
    """

    folder: str
    arguments: tuple[str, ...]
    names: tuple[str, ...]
    widths: tuple[int, int] | None = None


OPS = {
    "thought_attention": Kernels(
        "thought_attention", ("q", "v"), ("forward", "query_gradient", "text_gradient", "own_gradient"), (16, 256)
    ),
    "thought_attention_step": Kernels("thought_attention", ("q", "v_text"), ("step",), (16, 256)),
    "thought_attention_part": Kernels("thought_attention", ("q", "v_text"), ("step",), (16, 256)),
    "mix_hidden": Kernels("lm_head", ("thought",), ("mix", "mix_gradient", "base_gradient")),
    "linear_log_prob": Kernels("lm_head", ("hidden",), ("score", "gradient")),
    "linear_log_prob_sum": Kernels("lm_head", ("hidden",), ("score", "gradient")),
    "sample_linear": Kernels("lm_head", ("hidden",), ("weigh_tiles", "draw")),
}


class Facts(NamedTuple):
    """What the choice depends on, of an argument: all that it asks a tensor for."""

    device: torch.device
    dtype: torch.dtype
    shape: Sequence[int]


Given = Mapping[str, Tensor | Facts]  # by the argument's name


class Decision(NamedTuple):
    """A backend and the reason; ``broken`` is what went wrong if that is why it is not ``triton``."""

    backend: str
    reason: str
    broken: Exception | None = None


@dataclass(frozen=True)
class Choice:
    """What ``backend="auto"`` is for an op.

    Attributes:
        op: the name of the public function.
        backend: ``"torch"`` or ``"triton"``; of ``linear`` on a CPU ``"torch"`` or ``"onednn"``.
        reason: in one sentence.
        kernels: the language of the Triton backend's kernels: ``"triton"``, or ``"gluon"`` where the table of tiles
            asks for some in it; calls that those do not serve go to the ones in Triton. None for torch.
        tiles: where the numbers in the table of tiles come from. None for torch.
    """

    op: str
    backend: str
    reason: str
    kernels: str | None = None
    tiles: str | None = None

    def __str__(self) -> str:
        notes = "" if self.kernels is None else f"; kernels in {self.kernels}; tiles {self.tiles}"
        return f"{self.op}: {self.backend} ({self.reason}{notes})"


def choose(op: str, backend: object, **tensors: Tensor) -> str:
    """The backend that runs ``op`` on ``tensors``, which are those that ``OPS`` names: reference, torch or triton.

    Raises:
        ValueError: ``backend`` is none of ``NAMES``, or it is ``triton`` and its kernels refuse these tensors.
        RuntimeError: it is ``triton``, which is installed but broken.
    """
    decision = decide(op, backend, tensors)
    if decision.broken is not None:
        warn_once(f"torch runs in the place of the Triton kernels on this GPU: {decision.reason}")
    return decision.backend


def explain(device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, *, width: int = 64) -> list[Choice]:
    """What ``backend="auto"`` is for every op, and why; ``print(*qstar_kernels.explain("cuda"), sep="\\n")``.

    Args:
        device: where the tensors are.
        dtype: theirs.
        width: values in a row of attention's q and v, or of the head's hidden states.

    Raises:
        ValueError: ``device`` is a GPU, and torch finds none.
    """
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {device}, but it must be one that torch finds")
    choices = []
    for op, kernels in OPS.items():
        decision = decide(op, "auto", dict.fromkeys(kernels.arguments, Facts(device, dtype, (width,))))
        notes = describe(kernels, device, dtype, width) if decision.backend == "triton" else (None, None)
        choices.append(Choice(op, decision.backend, decision.reason, *notes))
    if not is_gpu(device):  # which has one library
        choices.append(Choice("linear", *products.describe(device, dtype)))
    return choices


def decide(op: str, backend: object, given: Given) -> Decision:
    """The choice for arguments of which this is known; raises as :func:`choose`."""
    if backend not in NAMES:
        raise ValueError(f"backend is {backend!r}, but it must be one of {', '.join(map(repr, NAMES))}")
    if backend == "reference" or backend == "torch":
        return Decision(backend, f"backend is {backend!r}")
    device = given[OPS[op].arguments[0]].device
    if backend == "auto" and not is_gpu(device):
        return Decision("torch", f"device is {device.type}: the Triton kernels run on GPUs")
    loaded = load(OPS[op].folder, "triton")
    absent = isinstance(loaded, ModuleNotFoundError) and loaded.name == "triton"
    if isinstance(loaded, Exception) and not absent:
        reason = f"Triton is installed, but its import or that of the kernels fails: {loaded!r}"
        if backend == "triton":
            raise RuntimeError(f"backend is 'triton', but it cannot run: {reason}") from loaded
        return Decision("torch", reason, loaded)
    refusal = "triton is not installed" if absent else find_refusal(op, given)
    if refusal is None:
        return Decision("triton", "the Triton kernels take this device, dtype and width")
    if backend == "triton":
        raise ValueError(f"backend is 'triton', but it cannot run: {refusal}")
    return Decision("torch", refusal)


def is_gpu(device: torch.device) -> bool:
    """Of NVIDIA or of AMD: torch calls both ``cuda``."""
    return device.type == "cuda"


def find_refusal(op: str, given: Given) -> str | None:
    """Why the Triton kernels, which are there, cannot run on such arguments, or None."""
    kernels = OPS[op]
    name = kernels.arguments[0]
    device, dtype = given[name].device, given[name].dtype
    if device.type == "cpu":
        from qstar_kernels.common.primitives import INTERPRETED

        if not INTERPRETED:
            return f"{name} is on cpu, where the kernels run only under TRITON_INTERPRET=1, set before the import"
    elif device.type != "cuda":
        return f"{name} is on {device.type}"
    elif torch.version.hip is None and torch.cuda.get_device_capability(device) < OLDEST:
        return f"{torch.cuda.get_device_name(device)} is older than compute capability {OLDEST[0]}.{OLDEST[1]}"
    if dtype not in DTYPES:
        return f"{name} has dtype {dtype}"
    if kernels.widths is not None:
        narrowest, widest = kernels.widths
        for argument in kernels.arguments:
            width = given[argument].shape[-1]
            if not narrowest <= width <= widest:
                return f"{argument} has rows of {width} values, not {narrowest} to {widest}"
    return None


_failures: dict[str, Exception] = {}  # what was imported in vain: to try again would take as long at every call


def implementation(folder: str, backend: str) -> ModuleType:
    """What does the work once the choice is made: the package ``backend`` of an op's folder.

    The imports are statements, since torch's compiler follows no others.
    """
    place = f"{folder}.{backend}"
    if place == "thought_attention.torch":
        from qstar_kernels.thought_attention import torch as attention_by_torch

        return attention_by_torch
    if place == "thought_attention.triton":
        from qstar_kernels.thought_attention import triton as attention_by_triton

        return attention_by_triton
    if place == "lm_head.torch":
        from qstar_kernels.lm_head import torch as head_by_torch

        return head_by_torch
    if place == "lm_head.triton":
        from qstar_kernels.lm_head import triton as head_by_triton

        return head_by_triton
    raise ValueError(f"backend is {backend!r}, but an operator's must be 'torch' or 'triton'")


def load(folder: str, backend: str) -> ModuleType | Exception:
    """The :func:`implementation`, or the exception of its import."""
    place = f"{folder}.{backend}"
    if place in _failures:
        return _failures[place]
    try:
        return implementation(folder, backend)
    except Exception as error:
        _failures[place] = error
        return error


def describe(kernels: Kernels, device: torch.device, dtype: torch.dtype, width: int) -> tuple[str, str]:
    """The language of an op's kernels, and where their tiles come from."""
    from qstar_kernels.common.launch import architecture_of
    from qstar_kernels.thought_attention.rivals import find_gluon

    architecture = architecture_of(device)
    table = import_module(f"qstar_kernels.{kernels.folder}.triton.tiles").TABLE
    gluon = [name for name in kernels.names if find_gluon(table, name, architecture, dtype, width) is not None]
    used = [f"hopper_{name}" if name in gluon else name for name in kernels.names]
    sources = dict.fromkeys(str(table.source(name, architecture, dtype, width)) for name in used)
    return "gluon" if gluon else "triton", "; ".join(sources)
