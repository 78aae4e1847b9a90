"""Softmax in Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _triton

LONGEST = 16384  # rows that fit in registers
LONG = {"COLS": 4096, "num_warps": 8}


@_triton.op("softmax_fwd")
def _fwd(x, wide):
    from . import triton_kernels as kernels

    y = x.new_empty(x.shape, dtype=torch.float32 if wide else x.dtype)
    if x.numel():
        flat = _triton.rows_of(x)
        rows, d = flat.shape
        if d <= LONGEST:
            options = _triton.row_tile(d)
            grid = (_triton.ceil_div(rows, options["ROWS"]),)
            _triton.launch(kernels.fwd, grid, flat, y, rows, d, flat.stride(0), **options)
        else:
            _triton.launch(kernels.fwd_long, (rows,), flat, y, d, flat.stride(0), **LONG)
    return y


@_triton.op("softmax_bwd")
def _bwd(dy, y):
    from . import triton_kernels as kernels

    dx = y.new_empty(y.shape)
    if y.numel():
        dy, y = _triton.rows_of(dy), _triton.rows_of(y)
        rows, d = y.shape
        if d <= LONGEST:
            options = _triton.row_tile(d)
            grid = (_triton.ceil_div(rows, options["ROWS"]),)
            _triton.launch(kernels.bwd, grid, dy, y, dx, rows, d, dy.stride(0), y.stride(0), **options)
        else:
            _triton.launch(kernels.bwd_long, (rows,), dy, y, dx, d, dy.stride(0), y.stride(0), **LONG)
    return dx


def unsupported(x: Tensor) -> str | None:
    return _triton.unsupported(x)


def forward(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Over the last axis; `dtype` is x's, or float32 beside 16 bits."""
    return _fwd(x, dtype != x.dtype)


def backward(dy: Tensor, y: Tensor) -> Tensor:
    """dx in y's dtype."""
    return _bwd(dy, y)
