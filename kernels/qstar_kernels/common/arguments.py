"""Checks of arguments: every message names the argument, what it was and what it must be."""

from __future__ import annotations

from math import inf

import torch
from torch import Tensor

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INTEGER = (torch.int64, torch.int32)


def check_tensor(name: str, value: object, layout: str, shape: tuple[int | None, ...], dtypes=FLOATING) -> None:
    """Raise unless ``value`` is a tensor of ``shape`` (None: any size) and of one of ``dtypes``.

    ``layout`` is how the shape reads in the message, for example ``"[B, Hq, N, C, D]"``.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor {layout}, but it is {type(value).__name__}")
    if value.dim() != len(shape) or any(
        want not in (None, have) for want, have in zip(shape, value.shape, strict=True)
    ):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} has shape {list(value.shape)}, but it must be {layout} = [{wanted}]")
    if value.dtype not in dtypes:
        raise TypeError(f"{name} has dtype {value.dtype}, but it must be one of {', '.join(map(str, dtypes))}")


def check_alike(name: str, value: Tensor, other_name: str, other: Tensor, *, dtype: bool = True) -> None:
    """Raise unless ``value`` lies on the device of ``other`` and, if asked, has its dtype."""
    if value.device != other.device:
        raise ValueError(f"{name} is on {value.device}, but it must be on {other.device} like {other_name}")
    if dtype and value.dtype != other.dtype:
        raise TypeError(f"{name} has dtype {value.dtype}, but it must be {other.dtype} like {other_name}")


def check_number(name: str, value: object, *, above: float | None = None, at_least: float | None = None) -> None:
    """Raise unless ``value`` is a finite real number above or at least a bound."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, but it is {type(value).__name__}")
    outside = (above is not None and value <= above) or (at_least is not None and value < at_least)
    if outside or not -inf < value < inf:
        wanted = f"above {above}" if above is not None else f"at least {at_least}" if at_least is not None else "finite"
        raise ValueError(f"{name} is {value}, but it must be {wanted}")


def check_integer(name: str, value: object, *, at_least: int | None = None) -> int:
    """``value``, unless it is no integer or below a bound: then raise."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, but it is {type(value).__name__}")
    if at_least is not None and value < at_least:
        raise ValueError(f"{name} is {value}, but it must be at least {at_least}")
    return value


def integer_or_tensor(
    name: str, value: object, readable_on: torch.device | None, *, at_least: int | None = None
) -> int | Tensor:
    """A checked integer, or unchecked a tensor without dimensions that lies on the device whose kernels can read it.

    From any other device it is read here, which waits for that device.
    """
    if isinstance(value, Tensor):
        if value.dim():
            raise ValueError(f"{name} has shape {list(value.shape)}, but it must be a tensor without dimensions")
        check_tensor(name, value, "[]", (), INTEGER)
        if value.device == readable_on:
            return value
        value = int(value)
    return check_integer(name, value, at_least=at_least)
