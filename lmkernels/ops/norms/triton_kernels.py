"""The kernels of layer norm and RMS norm.

A tile is ROWS rows of COLS columns, COLS the power of two from d on: a row is read once and stays in registers. Rows
too long for that go through the `long` kernels, which read them once per pass, from the L2 cache after the first.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def fwd(
    x, residual, weight, bias, y, s, rstd, mean, rows, d, x_stride, residual_stride, eps,
    CENTER: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """y = norm(x + residual) * weight + bias, and whatever of s (the sum), rstd and mean is given."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    col = tl.arange(0, COLS)
    inside = (row < rows)[:, None] & (col < d)[None, :]
    h = tl.load(x + row[:, None] * x_stride + col[None, :], mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        h += tl.load(residual + row[:, None] * residual_stride + col[None, :], mask=inside, other=0.0).to(tl.float32)
        rounded = h.to(s.dtype.element_ty)
        tl.store(s + row[:, None] * d + col[None, :], rounded, mask=inside)
        h = rounded.to(tl.float32)
    if CENTER:
        m = tl.sum(h, 1) / d
        h = tl.where(inside, h - m[:, None], 0.0)
        # again: what the rounding of a large mean has left
        left = tl.sum(h, 1) / d
        h = tl.where(inside, h - left[:, None], 0.0)
        if mean is not None:
            tl.store(mean + row, m + left, mask=row < rows)
    r = tl.rsqrt(tl.sum(h * h, 1) / d + eps)
    if rstd is not None:
        tl.store(rstd + row, r, mask=row < rows)
    h *= r[:, None]
    if weight is not None:
        h *= tl.load(weight + col, mask=col < d, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        h += tl.load(bias + col, mask=col < d, other=0.0).to(tl.float32)[None, :]
    tl.store(y + row[:, None] * d + col[None, :], h.to(y.dtype.element_ty), mask=inside)


@triton.jit
def fwd_long(
    x, residual, weight, bias, y, s, rstd, mean, rows, d, x_stride, residual_stride, eps,
    CENTER: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """`fwd` of one row in blocks of COLS columns."""
    row = tl.program_id(0).to(tl.int64)
    x += row * x_stride
    y += row * d
    total = tl.zeros([COLS], tl.float32)
    if residual is not None:
        residual += row * residual_stride
        s += row * d
    for first in range(0, d, COLS):
        col = first + tl.arange(0, COLS)
        h = tl.load(x + col, mask=col < d, other=0.0).to(tl.float32)
        if residual is not None:
            h += tl.load(residual + col, mask=col < d, other=0.0).to(tl.float32)
            rounded = h.to(s.dtype.element_ty)
            tl.store(s + col, rounded, mask=col < d)
            h = rounded.to(tl.float32)
        total += h
    if residual is not None:
        tl.debug_barrier()
        source = s
    else:
        source = x
    m = 0.0
    if CENTER:
        m = tl.sum(total, 0) / d
    total = tl.zeros([COLS], tl.float32)
    squares = tl.zeros([COLS], tl.float32)
    for first in range(0, d, COLS):
        col = first + tl.arange(0, COLS)
        h = tl.load(source + col, mask=col < d, other=0.0).to(tl.float32)
        h = tl.where(col < d, h - m, 0.0)
        total += h
        squares += h * h
    left = 0.0
    if CENTER:
        left = tl.sum(total, 0) / d  # what the rounding of a large mean has left
        if mean is not None:
            tl.store(mean + row, m + left)
    r = tl.rsqrt(tl.sum(squares, 0) / d - left * left + eps)
    if rstd is not None:
        tl.store(rstd + row, r)
    for first in range(0, d, COLS):
        col = first + tl.arange(0, COLS)
        h = (tl.load(source + col, mask=col < d, other=0.0).to(tl.float32) - m - left) * r
        if weight is not None:
            h *= tl.load(weight + col, mask=col < d, other=0.0).to(tl.float32)
        if bias is not None:
            h += tl.load(bias + col, mask=col < d, other=0.0).to(tl.float32)
        tl.store(y + col, h.to(y.dtype.element_ty), mask=col < d)


@triton.jit
def bwd(
    dy, ds, s, rstd, mean, weight, dx, dweight, dbias, rows, d, dy_stride, ds_stride, s_stride,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """dx, and of every program the sum over its rows of what dweight and dbias (programs, d) add up."""
    col = tl.arange(0, COLS)
    scale = 1.0
    if weight is not None:
        scale = tl.load(weight + col, mask=col < d, other=0.0).to(tl.float32)[None, :]
    if dweight is not None:
        dweight_sum = tl.zeros([ROWS, COLS], tl.float32)
    if dbias is not None:
        dbias_sum = tl.zeros([ROWS, COLS], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        inside = (row < rows)[:, None] & (col < d)[None, :]
        dy_tile = tl.load(dy + row[:, None] * dy_stride + col[None, :], mask=inside, other=0.0).to(tl.float32)
        h = tl.load(s + row[:, None] * s_stride + col[None, :], mask=inside, other=0.0).to(tl.float32)
        r = tl.load(rstd + row, mask=row < rows, other=0.0)
        if mean is not None:
            h = tl.where(inside, h - tl.load(mean + row, mask=row < rows, other=0.0)[:, None], 0.0)
        h *= r[:, None]
        if dweight is not None:
            dweight_sum += dy_tile * h
        if dbias is not None:
            dbias_sum += dy_tile
        dh = dy_tile * scale
        part = dh - h * (tl.sum(dh * h, 1) / d)[:, None]
        if mean is not None:
            part -= (tl.sum(dh, 1) / d)[:, None]
        part *= r[:, None]
        if ds is not None:
            part += tl.load(ds + row[:, None] * ds_stride + col[None, :], mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + row[:, None] * d + col[None, :], part.to(dx.dtype.element_ty), mask=inside)
    partial = tl.program_id(0).to(tl.int64) * d + col
    if dweight is not None:
        tl.store(dweight + partial, tl.sum(dweight_sum, 0), mask=col < d)
    if dbias is not None:
        tl.store(dbias + partial, tl.sum(dbias_sum, 0), mask=col < d)


@triton.jit
def bwd_long(
    dy, ds, s, rstd, mean, weight, dx, d, dy_stride, ds_stride, s_stride,
    COLS: tl.constexpr,
):  # fmt: skip
    """dx of one row in blocks of COLS columns."""
    row = tl.program_id(0).to(tl.int64)
    dy += row * dy_stride
    s += row * s_stride
    dx += row * d
    r = tl.load(rstd + row)
    m = 0.0
    if mean is not None:
        m = tl.load(mean + row)
    if ds is not None:
        ds += row * ds_stride
    along = tl.zeros([COLS], tl.float32)
    total = tl.zeros([COLS], tl.float32)
    for first in range(0, d, COLS):
        col = first + tl.arange(0, COLS)
        dh = tl.load(dy + col, mask=col < d, other=0.0).to(tl.float32)
        if weight is not None:
            dh *= tl.load(weight + col, mask=col < d, other=0.0).to(tl.float32)
        h = (tl.load(s + col, mask=col < d, other=0.0).to(tl.float32) - m) * r
        along += dh * h
        total += dh
    a = tl.sum(along, 0) / d
    c = 0.0
    if mean is not None:
        c = tl.sum(total, 0) / d
    for first in range(0, d, COLS):
        col = first + tl.arange(0, COLS)
        dh = tl.load(dy + col, mask=col < d, other=0.0).to(tl.float32)
        if weight is not None:
            dh *= tl.load(weight + col, mask=col < d, other=0.0).to(tl.float32)
        h = (tl.load(s + col, mask=col < d, other=0.0).to(tl.float32) - m) * r
        part = (dh - h * a - c) * r
        if ds is not None:
            part += tl.load(ds + col, mask=col < d, other=0.0).to(tl.float32)
        tl.store(dx + col, part.to(dx.dtype.element_ty), mask=col < d)


@triton.jit
def bwd_parameters(
    dy, s, rstd, mean, dweight, dbias, rows, d, dy_stride, s_stride,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """What `bwd` makes of dweight and dbias, for a block of columns of long rows; chunks of rows on the second axis."""
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)
    dweight_sum = tl.zeros([ROWS, COLS], tl.float32)
    dbias_sum = tl.zeros([ROWS, COLS], tl.float32)
    for tile in range(tl.program_id(1), tl.cdiv(rows, ROWS), tl.num_programs(1)):
        row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        inside = (row < rows)[:, None] & (col < d)[None, :]
        dy_tile = tl.load(dy + row[:, None] * dy_stride + col[None, :], mask=inside, other=0.0).to(tl.float32)
        if dweight is not None:
            h = tl.load(s + row[:, None] * s_stride + col[None, :], mask=inside, other=0.0).to(tl.float32)
            if mean is not None:
                h -= tl.load(mean + row, mask=row < rows, other=0.0)[:, None]
            dweight_sum += dy_tile * h * tl.load(rstd + row, mask=row < rows, other=0.0)[:, None]
        dbias_sum += dy_tile
    partial = tl.program_id(1).to(tl.int64) * d + col
    if dweight is not None:
        tl.store(dweight + partial, tl.sum(dweight_sum, 0), mask=col < d)
    if dbias is not None:
        tl.store(dbias + partial, tl.sum(dbias_sum, 0), mask=col < d)
