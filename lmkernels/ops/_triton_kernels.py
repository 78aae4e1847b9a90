"""Kernels, and parts of kernels, that more than one op uses."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def column_sums(x, out, rows, d, x_stride, ROWS: tl.constexpr, COLS: tl.constexpr):
    """out[chunk, :] = the sum of every num_programs(1)-th tile of rows of x (rows, d), in float32."""
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)
    total = tl.zeros([ROWS, COLS], tl.float32)
    for tile in range(tl.program_id(1), tl.cdiv(rows, ROWS), tl.num_programs(1)):
        row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        inside = (row < rows)[:, None] & (col < d)[None, :]
        total += tl.load(x + row[:, None] * x_stride + col[None, :], mask=inside, other=0.0).to(tl.float32)
    sums = tl.sum(total, 0).to(out.dtype.element_ty)
    tl.store(out + tl.program_id(1).to(tl.int64) * d + col, sums, mask=col < d)
