"""Dropout of hidden states in the compiled library; elsewhere torch's own serves.

torch draws one number after the other on a CPU, on one core, and keeps a mask for the backward. Here Philox makes the
decisions, 16 bits each, on all cores, and again in the backward.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import _library

STEPS = 2**16  # p is rounded to a multiple of 1 / STEPS
_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}  # as the library numbers dtypes
_DTYPES = tuple(_CODES)

_library.LIBRARY.define("dropout(Tensor x, Tensor? residual, int dropped, int seed, int dtype) -> Tensor")
_dropout = torch.ops.lmkernels.dropout.default


@torch.library.register_fake("lmkernels::dropout", lib=_library.LIBRARY)
def _(x, residual, dropped, seed, dtype):
    return x.new_empty(x.shape, dtype=_DTYPES[dtype])


def drop(module: nn.Dropout, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """module(x) + residual, where the library can in one pass.

    x, residual: any shape; of one dtype, or one of 16 bits and the other float32, as the result then is
    module: torch's Dropout or a subclass of it, in training or not; `inplace` is torch's

    An element is dropped with probability round(2^16 p) / 2^16, and what is kept grows by that probability's share, so
    that the expectation is exact. torch's generator gives the seed, as `torch.manual_seed` says.
    """
    dropped = round(module.p * STEPS)
    fast = module.training and 0 < dropped < STEPS and not module.inplace and _can(x, residual)
    if not fast or torch.compiler.is_compiling():
        x = nn.Dropout.forward(module, x)
        return x if residual is None else residual + x
    seed, code = int(torch.randint(2**62, ())), _CODES[(x if residual is None else residual).dtype]
    if torch.is_grad_enabled() and (x.requires_grad or residual is not None and residual.requires_grad):
        return _Dropout.apply(x, residual, dropped, seed, code)
    return _dropout(x, residual, dropped, seed, code)


def drop_by(x: Tensor, dropped: int, seed: int) -> Tensor:
    """What `drop` gives with these numbers, on the CPU."""
    return _Dropout.apply(x, None, dropped, seed, _CODES[x.dtype])


def _can(x: Tensor, residual: Tensor | None) -> bool:
    if _library.native_error is not None or not x.is_cpu or x.dtype not in _CODES:
        return False
    if residual is None:
        return True
    wide = residual.dtype == torch.float32 and x.dtype.itemsize == 2
    return residual.is_cpu and residual.shape == x.shape and (residual.dtype == x.dtype or wide)


class _Dropout(torch.autograd.Function):
    """Linear in x, and its own gradient: differentiable any number of times."""

    @staticmethod
    def forward(ctx, x, residual, dropped, seed, code):
        ctx.dropped, ctx.seed, ctx.code = dropped, seed, _CODES[x.dtype]
        return _dropout(x, residual, dropped, seed, code)

    @staticmethod
    def backward(ctx, dout):
        need_dx, need_dresidual, *_ = ctx.needs_input_grad
        dx = _Dropout.apply(dout, None, ctx.dropped, ctx.seed, ctx.code) if need_dx else None
        return dx, dout if need_dresidual else None, None, None, None
