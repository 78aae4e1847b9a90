"""Checks that more than one op makes of its arguments; each raises an error that names the argument."""

from __future__ import annotations

import math

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Under autocast, floating tensors in the autocast dtype, as torch does for matmuls; float64 stays."""
    x = tensors[0]
    if not isinstance(x, Tensor) or not torch.is_autocast_enabled("cpu" if x.is_cpu or x.is_meta else x.device.type):
        return tensors
    dtype = torch.get_autocast_dtype("cpu" if x.is_meta else x.device.type)
    return tuple(
        t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in tensors
    )


def check_tensor(name: str, x) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    return x


def check_floating(name: str, x) -> Tensor:
    if check_tensor(name, x).dtype not in FLOATS:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {x.dtype}")
    return x


def check_device(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if x.device != other.device:
        raise ValueError(f"{name} must be on {other_name}'s device {other.device}, got {x.device}")


def check_parameter(name: str, x, shape: tuple[int, ...], other_name: str, other: Tensor) -> Tensor:
    """x, a floating tensor of `shape` on other's device, in other's dtype or, for 16-bit dtypes, in float32."""
    check_floating(name, x)
    check_device(name, x, other_name, other)
    check_same_or_wider(name, x, other)
    if x.shape != shape:
        raise ValueError(f"{name} must be {shape}, got {tuple(x.shape)}")
    return x


def check_same_or_wider(name: str, x: Tensor, other: Tensor) -> Tensor:
    """x in other's dtype or, where that has 16 bits, in float32."""
    if x.dtype != other.dtype and (x.dtype != torch.float32 or other.dtype == torch.float64):
        allowed = other.dtype if other.dtype in (torch.float32, torch.float64) else f"{other.dtype} or torch.float32"
        raise TypeError(f"{name} must be {allowed}, got {x.dtype}")
    return x


def check_number(name: str, x) -> None:
    if not isinstance(x, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name} must be a number, got {type(x).__name__}")


def check_finite(name: str, x) -> float:
    check_number(name, x)
    # by comparison, not math.isfinite: x may be a symbol of a graph that is being compiled
    if not abs(x) < math.inf:
        raise ValueError(f"{name} must be a finite number, got {x}")
    return float(x)


def check_indices(name: str, x, shapes: tuple[tuple[int, ...], ...], other_name: str, other: Tensor) -> Tensor:
    """x, an int32 or int64 tensor on other's device in one of `shapes`."""
    if check_tensor(name, x).dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, got {x.dtype}")
    check_device(name, x, other_name, other)
    if tuple(x.shape) not in shapes:
        raise ValueError(f"{name} must be {' or '.join(map(str, dict.fromkeys(shapes)))}, got {tuple(x.shape)}")
    return x


def check_range(name: str, x: Tensor | None, size: int) -> None:
    """Every index in [0, size), for backends that do not look themselves; not where a graph is being compiled."""
    if x is None or x.numel() == 0 or x.device.type != "cpu" or torch.compiler.is_compiling():
        return
    low, high = (bound.item() for bound in torch.aminmax(x))
    if low < 0 or high >= size:
        raise ValueError(f"{name} must lie between 0 and {size - 1}, got values from {low} to {high}")
