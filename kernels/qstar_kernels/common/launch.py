"""A launch of a Triton kernel as a value: it can be run, or compiled for a card that is not there."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int8: "*i8",
}
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
ALIGNED = [["tt.divisibility", 16]]


@dataclass(frozen=True)
class Tile:
    """How a kernel is cut: rows and keys (or columns) of a program, its warps, and the stages of its pipeline."""

    rows: int
    keys: int
    warps: int
    stages: int

    @property
    def constants(self) -> dict[str, int]:
        """What a kernel is told of its tile."""
        return {"ROWS": self.rows, "KEYS": self.keys}


@dataclass(frozen=True)
class Launch:
    """A kernel, how many programs of it, what they are given by keyword, and the tile.

    This one's kernel is in Triton; one in another language overrides what the compiler is told of it.
    """

    language: ClassVar[str] = "triton"

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    tile: Tile

    @property
    def keywords(self) -> dict[str, Any]:
        return {**self.arguments, **self.tile.constants}

    def run(self) -> None:
        if self.programs:
            self.kernel[(self.programs,)](**self.keywords, num_warps=self.tile.warps, num_stages=self.tile.stages)

    def compile(self, architecture: str) -> CompiledKernel:
        """Compile for one of ``TARGETS``, specialised as :meth:`run` would; tensors may be on ``meta``."""
        signature, constants, attributes = {}, {}, {}
        for index, parameter in enumerate(self.kernel.params):
            value = self.keywords[parameter.name]
            general = parameter.do_not_specialize
            kind = "constexpr" if parameter.is_constexpr else self.kind(value, general)
            signature[parameter.name] = kind
            if isinstance(value, tuple):
                constants.update({(index, i): x for i, x in enumerate(value) if kind[i] == "constexpr"})
                attributes.update({(index, i): ALIGNED for i, x in enumerate(value) if _aligned(x)})
            elif kind == "constexpr":
                constants[(index,)] = value
            elif not general and _aligned(value):
                attributes[(index,)] = ALIGNED
        source = self.source(signature, constants, attributes)
        options = {"num_warps": self.tile.warps, "num_stages": self.tile.stages}
        return triton.compile(source, target=TARGETS[architecture], options=options)

    def source(self, signature: dict[str, Any], constants: dict, attributes: dict) -> ASTSource:
        """What the compiler is given."""
        return ASTSource(self.kernel, signature, constexprs=constants, attrs=attributes)

    def kind(self, value: Any, general: bool = False) -> str | tuple:
        """The type of an argument in a signature, as Triton's launcher finds it; ``general``: 1 is like any other."""
        if isinstance(value, Tensor):
            return POINTERS[value.dtype]
        if isinstance(value, tuple):
            return tuple(self.kind(x) for x in value)
        if value is None or (isinstance(value, int) and value == 1 and not general):
            return "constexpr"
        if isinstance(value, float):
            return "fp32"
        return "i32" if -(2**31) <= value < 2**31 else "i64"


def _aligned(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.data_ptr() % 16 == 0
    return isinstance(value, int) and value != 1 and value % 16 == 0


def architecture_of(device: torch.device) -> str:
    """The architecture's name as the tile tables have it, ``"sm_90"`` or ``"gfx942"``."""
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def run_all(launches: Iterable[Launch], like: Tensor) -> None:
    """Run launches in turn on the current stream of the device of ``like``."""
    with torch.cuda.device_of(like):
        for launch in launches:
            launch.run()
