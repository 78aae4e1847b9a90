"""The kernels of softmax: a row in registers, or, where it is too long for them, in blocks."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def fwd(x, y, rows, d, x_stride, ROWS: tl.constexpr, COLS: tl.constexpr):
    """ROWS rows of COLS columns, COLS the power of two from d on."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    col = tl.arange(0, COLS)
    inside = (row < rows)[:, None] & (col < d)[None, :]
    h = tl.load(x + row[:, None] * x_stride + col[None, :], mask=inside, other=float("-inf")).to(tl.float32)
    m = tl.max(h, 1)
    m = tl.where(m == float("-inf"), 0.0, m)  # a row that sees nothing: all its exponentials are 0
    p = tl.exp(h - m[:, None])
    total = tl.sum(p, 1)
    p = p / tl.where(total == 0, 1.0, total)[:, None]
    tl.store(y + row[:, None] * d + col[None, :], p.to(y.dtype.element_ty), mask=inside)


@triton.jit
def fwd_long(x, y, d, x_stride, COLS: tl.constexpr):
    """One row in blocks of COLS columns; every column of the block keeps a maximum and a sum of its own."""
    row = tl.program_id(0).to(tl.int64)
    x += row * x_stride
    y += row * d
    m = tl.full([COLS], float("-inf"), tl.float32)
    total = tl.zeros([COLS], tl.float32)
    for first in range(0, d, COLS):
        col = first + tl.arange(0, COLS)
        h = tl.load(x + col, mask=col < d, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(m, h)
        base = tl.where(larger == float("-inf"), 0.0, larger)
        total = total * tl.exp(m - base) + tl.exp(h - base)
        m = larger
    largest = tl.max(m, 0)
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    l = tl.sum(total * tl.exp(m - largest), 0)
    l = tl.where(l == 0, 1.0, l)
    for first in range(0, d, COLS):
        col = first + tl.arange(0, COLS)
        h = tl.load(x + col, mask=col < d, other=float("-inf")).to(tl.float32)
        tl.store(y + col, (tl.exp(h - largest) / l).to(y.dtype.element_ty), mask=col < d)


@triton.jit
def bwd(dy, y, dx, rows, d, dy_stride, y_stride, ROWS: tl.constexpr, COLS: tl.constexpr):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    col = tl.arange(0, COLS)
    inside = (row < rows)[:, None] & (col < d)[None, :]
    dp = tl.load(dy + row[:, None] * dy_stride + col[None, :], mask=inside, other=0.0).to(tl.float32)
    p = tl.load(y + row[:, None] * y_stride + col[None, :], mask=inside, other=0.0).to(tl.float32)
    ds = p * (dp - tl.sum(p * dp, 1)[:, None])
    tl.store(dx + row[:, None] * d + col[None, :], ds.to(dx.dtype.element_ty), mask=inside)


@triton.jit
def bwd_long(dy, y, dx, d, dy_stride, y_stride, COLS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    dy += row * dy_stride
    y += row * y_stride
    dx += row * d
    total = tl.zeros([COLS], tl.float32)
    for first in range(0, d, COLS):
        col = first + tl.arange(0, COLS)
        dp = tl.load(dy + col, mask=col < d, other=0.0).to(tl.float32)
        total += dp * tl.load(y + col, mask=col < d, other=0.0).to(tl.float32)
    delta = tl.sum(total, 0)
    for first in range(0, d, COLS):
        col = first + tl.arange(0, COLS)
        dp = tl.load(dy + col, mask=col < d, other=0.0).to(tl.float32)
        p = tl.load(y + col, mask=col < d, other=0.0).to(tl.float32)
        tl.store(dx + col, (p * (dp - delta)).to(dx.dtype.element_ty), mask=col < d)
