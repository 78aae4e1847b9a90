"""Softmax: the public function and its gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _dispatch
from .._autograd import needs_gradient
from .._checks import FLOATS, check_floating, check_tensor
from . import native, reference, triton

BACKENDS = {"native": native, "triton": triton, "reference": reference}


def softmax(x: Tensor, dim: int = -1, *, dtype: torch.dtype | None = None, backend: str | None = None) -> Tensor:
    """exp(x) / sum(exp(x)) along one axis, as `torch.softmax`.

    x: any shape  float32, bfloat16, float16 or (on the CPU) float64; other dtypes where `dtype` is given
    dim: the axis; any but the last costs a copy, and the result has the strides of x transposed.
    dtype: of the computation and of the result, default x's. From 16 bits to float32 it costs no copy.
    backend: "native", "triton" or "reference"; None takes the first that can run this.

    Returns x's shape in `dtype`. Sums and exponentials are float32 (float64 for float64) in every dtype. Where all of
    an axis is -inf (nothing may be attended to), the result and its gradient are 0; torch gives NaN. Differentiable any
    number of times.

    Raises ValueError or TypeError for bad arguments, NotImplementedError when `backend` cannot run them.
    """
    check_tensor("x", x)
    if dtype is not None:
        if dtype not in FLOATS:
            raise TypeError(f"dtype must be float32, bfloat16, float16, float64 or None, got {dtype}")
        if dtype != x.dtype and not (dtype == torch.float32 and x.dtype in (torch.bfloat16, torch.float16)):
            x = x.to(dtype)
    check_floating("x", x)
    if not isinstance(dim, int):
        raise TypeError(f"dim must be an int, got {type(dim).__name__}")
    axes = max(x.dim(), 1)
    if not -axes <= dim < axes:
        raise ValueError(f"dim must be between {-axes} and {axes - 1} for x of shape {tuple(x.shape)}, got {dim}")
    module = _dispatch.choose("softmax", BACKENDS, backend, x)
    last = dim == -1 or dim == axes - 1
    rows = x.reshape(1) if x.dim() == 0 else x if last else x.transpose(dim, -1)
    y = _run(module, rows, x.dtype if dtype is None else dtype)
    return y.reshape(()) if x.dim() == 0 else y if last else y.transpose(dim, -1)


def _run(module, x: Tensor, dtype: torch.dtype) -> Tensor:
    if module is reference or not needs_gradient(x):
        return module.forward(x, dtype)
    return _Softmax.apply(module.__name__.rpartition(".")[2], x, dtype)


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, name, x, dtype):
        y = BACKENDS[name].forward(x, dtype)
        ctx.save_for_backward(y)
        ctx.name, ctx.dtype = name, x.dtype
        return y

    @staticmethod
    def backward(ctx, dy):
        (y,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            wide = torch.promote_types(y.dtype, torch.float32)
            p, dp = y.to(wide), dy.to(wide)
            dx = (p * (dp - (p * dp).sum(-1, keepdim=True))).to(y.dtype)
        else:
            dx = BACKENDS[ctx.name].backward(dy, y)
        return None, dx.to(ctx.dtype), None
