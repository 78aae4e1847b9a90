"""Softmax in the compiled library."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _library

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# wide: a float32 result of 16-bit x
_library.LIBRARY.define("softmax_fwd(Tensor x, bool wide) -> Tensor")
_library.LIBRARY.define("softmax_bwd(Tensor dy, Tensor y) -> Tensor")
_fwd = torch.ops.lmkernels.softmax_fwd.default
_bwd = torch.ops.lmkernels.softmax_bwd.default


@torch.library.register_fake("lmkernels::softmax_fwd", lib=_library.LIBRARY)
def _(x, wide):
    return x.new_empty(x.shape, dtype=torch.float32 if wide else x.dtype)


@torch.library.register_fake("lmkernels::softmax_bwd", lib=_library.LIBRARY)
def _(dy, y):
    return y.new_empty(y.shape)


def unsupported(x: Tensor) -> str | None:
    if _library.native_error is not None:
        return _library.native_error
    if not x.is_cpu:
        return f"the compiled library has no kernel for device {x.device.type!r}"
    if x.dtype not in _DTYPES:
        return f"dtype {x.dtype} is not one of float32, bfloat16, float16, float64"
    return None


def forward(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Over the last axis; `dtype` is x's, or float32 beside 16 bits."""
    return _fwd(x, dtype != x.dtype)


def backward(dy: Tensor, y: Tensor) -> Tensor:
    """dx in y's dtype."""
    return _bwd(dy, y)
