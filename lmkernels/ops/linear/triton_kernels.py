"""What follows a product, in one pass over it: bias, activation or gate, residual; and the gradient of that."""

from __future__ import annotations

import triton
import triton.language as tl

# As enum class Activation numbers them.
GELU: tl.constexpr = tl.constexpr(1)
GELU_TANH: tl.constexpr = tl.constexpr(2)
SILU: tl.constexpr = tl.constexpr(3)
RELU: tl.constexpr = tl.constexpr(4)
TANH: tl.constexpr = tl.constexpr(5)

SQRT_HALF: tl.constexpr = tl.constexpr(0.7071067811865476)
SQRT_2_OVER_PI: tl.constexpr = tl.constexpr(0.7978845608028654)
CUBE: tl.constexpr = tl.constexpr(0.044715)
INVERSE_SQRT_2_PI: tl.constexpr = tl.constexpr(0.3989422804014327)


@triton.jit
def tanh(x):
    """Relative error below 3 ulp: Cephes' polynomial (Moshier) where 1 - 2 / (exp(2 x) + 1) would cancel."""
    z = x * x
    p = -5.70498872745e-3 * z + 2.06390887954e-2
    p = p * z - 5.37397155531e-2
    p = p * z + 1.33314422036e-1
    p = p * z - 3.33332819422e-1
    small = x + x * z * p
    large = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(x)) + 1.0)
    return tl.where(tl.abs(x) < 0.625, small, tl.where(x < 0, -large, large))


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == GELU:
        x = 0.5 * x * (1.0 + tl.erf(x * SQRT_HALF))
    elif ACTIVATION == GELU_TANH:
        x = 0.5 * x * (1.0 + tanh(SQRT_2_OVER_PI * (x + CUBE * x * x * x)))
    elif ACTIVATION == SILU:
        x = x * tl.sigmoid(x)
    elif ACTIVATION == RELU:
        x = tl.where(x > 0, x, tl.where(x == x, 0.0, x))  # NaN stays
    elif ACTIVATION == TANH:
        x = tanh(x)
    return x


@triton.jit
def derivative(x, ACTIVATION: tl.constexpr):
    """Of the activation, at x."""
    if ACTIVATION == GELU:
        d = 0.5 * (1.0 + tl.erf(x * SQRT_HALF)) + x * tl.exp(-0.5 * x * x) * INVERSE_SQRT_2_PI
    elif ACTIVATION == GELU_TANH:
        t = tanh(SQRT_2_OVER_PI * (x + CUBE * x * x * x))
        d = 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * SQRT_2_OVER_PI * (1.0 + 3.0 * CUBE * x * x)
    elif ACTIVATION == SILU:
        s = tl.sigmoid(x)
        d = s * (1.0 + x * (1.0 - s))
    elif ACTIVATION == RELU:
        d = tl.where(x > 0, 1.0, 0.0)
    elif ACTIVATION == TANH:
        t = tanh(x)
        d = 1.0 - t * t
    else:
        d = tl.full(x.shape, 1.0, tl.float32)
    return d


@triton.jit
def fwd(
    product, bias, gate, residual, pre, out, rows, n, product_stride, residual_stride,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """out = activation(product + bias) + residual, or (product + bias) * activation(gate) + residual.

    pre, where it is given, becomes product + bias. gate, pre and out are contiguous.
    """
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside = (row < rows)[:, None] & (col < n)[None, :]
    at = row[:, None] * n + col[None, :]
    x = tl.load(product + row[:, None] * product_stride + col[None, :], mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        x += tl.load(bias + col, mask=col < n, other=0.0).to(tl.float32)[None, :]
    if pre is not None:
        tl.store(pre + at, x.to(pre.dtype.element_ty), mask=inside)
    if gate is not None:
        x *= activate(tl.load(gate + at, mask=inside, other=0.0).to(tl.float32), ACTIVATION)
    else:
        x = activate(x, ACTIVATION)
    if residual is not None:
        added = tl.load(residual + row[:, None] * residual_stride + col[None, :], mask=inside, other=0.0)
        x += added.to(tl.float32)
    tl.store(out + at, x.to(out.dtype.element_ty), mask=inside)


@triton.jit
def bwd(
    dout, pre, gate, dpre, dgate, hidden, dbias, rows, n, dout_stride, pre_stride,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """The gradient of pre and gate, what the activation gave, and the sums for dbias, of COLS columns.

    The tiles of rows are shared by the programs of the second axis, each of which has a row of dbias (programs, n).
    """
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)
    total = tl.zeros([ROWS, COLS], tl.float32)
    for tile in range(tl.program_id(1), tl.cdiv(rows, ROWS), tl.num_programs(1)):
        row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        inside = (row < rows)[:, None] & (col < n)[None, :]
        at = row[:, None] * n + col[None, :]
        dy = tl.load(dout + row[:, None] * dout_stride + col[None, :], mask=inside, other=0.0).to(tl.float32)
        x = tl.load(pre + row[:, None] * pre_stride + col[None, :], mask=inside, other=0.0).to(tl.float32)
        if gate is not None:
            g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
            active = activate(g, ACTIVATION)
            dx = dy * active
            dg = dy * x * derivative(g, ACTIVATION)
            tl.store(dgate + at, dg.to(dgate.dtype.element_ty), mask=inside)
            active *= x
        else:
            dx = dy * derivative(x, ACTIVATION)
            if hidden is not None:
                active = activate(x, ACTIVATION)
        if hidden is not None:
            tl.store(hidden + at, active.to(hidden.dtype.element_ty), mask=inside)
        tl.store(dpre + at, dx.to(dpre.dtype.element_ty), mask=inside)
        if dbias is not None:
            total += dx
    if dbias is not None:
        tl.store(dbias + tl.program_id(1).to(tl.int64) * n + col, tl.sum(total, 0), mask=col < n)
