"""Linear layers in the compiled library."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _library
from .. import _skinny  # noqa: F401
from .._precision import float32_parts
from .activations import CODES

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_library.LIBRARY.define(
    "linear_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor? gate, int activation, bool need_pre, "
    "int parts=3) -> (Tensor, Tensor)"
)
_library.LIBRARY.define(
    "linear_bwd(Tensor dout, Tensor x, Tensor weight, Tensor? pre, int activation, bool need_dx, bool need_dweight, "
    "bool need_dbias, int parts=3) -> (Tensor, Tensor, Tensor)"
)
_library.LIBRARY.define(
    "activation_bwd(Tensor dout, Tensor pre, Tensor? gate, int activation, bool need_dbias)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
_fwd = torch.ops.lmkernels.linear_fwd.default
_bwd = torch.ops.lmkernels.linear_bwd.default
activation_bwd = torch.ops.lmkernels.activation_bwd.default


def linear_fwd(*arguments) -> tuple[Tensor, Tensor]:
    return _fwd(*arguments, float32_parts())


def linear_bwd(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    return _bwd(*arguments, float32_parts())


@torch.library.register_fake("lmkernels::linear_fwd", lib=_library.LIBRARY)
def _(x, weight, bias, residual, gate, activation, need_pre, parts=3):
    rows, cols = x.shape[0], weight.shape[0]
    dtype = x.dtype if residual is None else residual.dtype
    return x.new_empty(rows, cols, dtype=dtype), x.new_empty((rows, cols) if need_pre else (0, 0))


def weight_gradients(x, weight, need_dweight, need_dbias):
    """Fakes of dweight, in the layout of the weight, and of dbias."""
    accumulator = torch.float64 if x.dtype == torch.float64 else torch.float32
    if not need_dweight:
        dweight = weight.new_empty(0, 0)
    elif weight.stride(0) == 1 and weight.stride(1) != 1 and weight.stride(1) >= weight.shape[0]:
        dweight = weight.new_empty(weight.shape[::-1]).t()
    else:
        dweight = weight.new_empty(weight.shape)
    return dweight, x.new_empty(weight.shape[0] if need_dbias else 0, dtype=accumulator)


@torch.library.register_fake("lmkernels::linear_bwd", lib=_library.LIBRARY)
def _(dout, x, weight, pre, activation, need_dx, need_dweight, need_dbias, parts=3):
    return x.new_empty(x.shape if need_dx else (0, 0)), *weight_gradients(x, weight, need_dweight, need_dbias)


@torch.library.register_fake("lmkernels::activation_bwd", lib=_library.LIBRARY)
def _(dout, pre, gate, activation, need_dbias):
    accumulator = torch.float64 if pre.dtype == torch.float64 else torch.float32
    dgate = pre.new_empty((0, 0) if gate is None else pre.shape)
    dbias = pre.new_empty(pre.shape[1] if need_dbias else 0, dtype=accumulator)
    return pre.new_empty(pre.shape), dgate, pre.new_empty(pre.shape), dbias


def unsupported(x: Tensor, weight: Tensor) -> str | None:
    if _library.native_error is not None:
        return _library.native_error
    if not x.is_cpu:
        return f"the compiled library has no kernel for device {x.device.type!r}"
    if x.dtype not in _DTYPES:
        return f"dtype {x.dtype} is not one of float32, bfloat16, float16, float64"
    return None


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str | None, need_pre=False
) -> tuple[Tensor, Tensor]:
    """out (rows, out) and, where needed, what the activation was applied to."""
    return linear_fwd(x, weight, bias, residual, None, CODES[activation], need_pre)


def backward(
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    pre: Tensor | None,
    activation: str | None,
    need_dx: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight, dbias (float32, or float64); those not needed are empty."""
    return linear_bwd(dout, x, weight, pre, CODES[activation], need_dx, need_dweight, need_dbias)
