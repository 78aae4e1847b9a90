"""The checks of a projection's arguments, for every op that has one."""

from __future__ import annotations

from torch import Tensor

from .._checks import check_device, check_floating, check_same_or_wider
from .activations import CODES


def check_activation(activation: str | None) -> None:
    if activation not in CODES:
        names = ", ".join(repr(name) for name in CODES if name)
        raise ValueError(f"activation must be one of {names} or None, got {activation!r}")


def check_weight(name: str, weight, x: Tensor, d_in: int, d_out: int | None = None, x_name: str = "x") -> Tensor:
    """weight (d_out, d_in) for x in its dtype or, for 16 bits, in float32."""
    check_floating(name, weight)
    check_device(name, weight, x_name, x)
    check_same_or_wider(name, weight, x)
    if weight.dim() != 2 or weight.shape[1] != d_in or d_out not in (None, weight.shape[0]):
        wanted = f"(out, {d_in})" if d_out is None else f"({d_out}, {d_in})"
        raise ValueError(f"{name} must be (out, in) = {wanted}, got {tuple(weight.shape)}")
    return weight


def check_bias(name: str, bias, x: Tensor, d_out: int, x_name: str = "x") -> Tensor | None:
    if bias is None:
        return None
    check_floating(name, bias)
    check_device(name, bias, x_name, x)
    check_same_or_wider(name, bias, x)
    if tuple(bias.shape) != (d_out,):
        raise ValueError(f"{name} must be (out,) = ({d_out},), got {tuple(bias.shape)}")
    return bias.contiguous()


def check_x(x) -> Tensor:
    check_floating("x", x)
    if x.dim() < 1:
        raise ValueError("x must be (..., in) with at least one axis, got ()")
    return x


def check_residual(residual, x: Tensor, d_out: int) -> Tensor | None:
    """residual (..., d_out) with x's leading axes."""
    if residual is None:
        return None
    check_floating("residual", residual)
    check_device("residual", residual, "x", x)
    check_same_or_wider("residual", residual, x)
    wanted = (*x.shape[:-1], d_out)
    if tuple(residual.shape) != wanted:
        raise ValueError(f"residual must be {wanted} like the result, got {tuple(residual.shape)}")
    return residual
