"""Linear layers with quantised weights in the compiled library."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _library
from ..linear.native import CODES

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_library.LIBRARY.define(
    "quantized_linear_fwd(Tensor x, Tensor data, Tensor scales, SymInt d_out, int bits, Tensor? bias, "
    "Tensor? residual, int activation) -> Tensor"
)
quantized_linear_fwd = torch.ops.lmkernels.quantized_linear_fwd.default


@torch.library.register_fake("lmkernels::quantized_linear_fwd", lib=_library.LIBRARY)
def _(x, data, scales, d_out, bits, bias, residual, activation):
    return x.new_empty(x.shape[0], d_out, dtype=x.dtype if residual is None else residual.dtype)


def unsupported(x: Tensor) -> str | None:
    if _library.native_error is not None:
        return _library.native_error
    if not x.is_cpu:
        return f"the compiled library has no kernel for device {x.device.type!r}"
    if x.dtype not in _DTYPES:
        return f"dtype {x.dtype} is not one of float32, bfloat16, float16"
    return None


def forward(
    x: Tensor,
    data: Tensor,
    scales: Tensor,
    d_out: int,
    bits: int,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
) -> Tensor:
    """activation(x weight^T + bias) + residual for x (rows, d_in)."""
    return quantized_linear_fwd(x, data, scales, d_out, bits, bias, residual, CODES[activation])
