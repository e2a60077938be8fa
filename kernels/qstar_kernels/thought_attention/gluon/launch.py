"""A launch of a Gluon kernel, which the compiler is told of in other words than one in Triton."""

from __future__ import annotations

from typing import Any, ClassVar

from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from qstar_kernels.common.launch import POINTERS, Launch


class GluonLaunch(Launch):
    """As :class:`Launch`; arguments may be tensor descriptors as well."""

    language: ClassVar[str] = "gluon"

    def source(self, signature: dict[str, Any], constants: dict, attributes: dict) -> GluonASTSource:
        return GluonASTSource(self.kernel, signature, constexprs=constants, attrs=attributes)

    def kind(self, value: Any, general: bool = False) -> str | tuple:
        if isinstance(value, TensorDescriptor):
            element = POINTERS[value.base.dtype].removeprefix("*")
            return f"tensordesc<{element}{list(value.block_shape)},{value.layout!r}>"
        return super().kind(value, general)
