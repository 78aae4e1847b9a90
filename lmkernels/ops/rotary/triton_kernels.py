"""The kernel of rotary position embedding."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rotate(
    x, out, cos, sin, positions, rows, s, h, d, pairs, table_rows,
    x_b, x_s, x_h, x_d, out_b, out_s, out_h, table_b, table_s, position_b, position_s,
    INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Rows are heads of tokens, (b, s, h) flattened; of each, `pairs` pairs are turned and REST >= columns copied.

    A token's angles are read once per head: all but the first time they come from the L1 cache.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    here = row < rows
    token, head = row // h, row % h
    b, i = token // s, token % s
    position = i
    if positions is not None:
        position = tl.load(positions + b * position_b + i * position_s, mask=here, other=0).to(tl.int64)
        position = tl.minimum(tl.maximum(position, 0), table_rows - 1)
    pair = tl.arange(0, PAIRS)
    turned = here[:, None] & (pair < pairs)[None, :]
    angle = (b * table_b + position * table_s)[:, None] + pair[None, :]
    c = tl.load(cos + angle, mask=turned, other=0.0).to(tl.float32)
    s_ = tl.load(sin + angle, mask=turned, other=0.0).to(tl.float32)
    if INVERSE:
        s_ = -s_
    x_row = x + (b * x_b + i * x_s + head * x_h)[:, None]
    out_row = out + (b * out_b + i * out_s + head * out_h)[:, None]
    if INTERLEAVED:
        col = tl.arange(0, 2 * PAIRS)
        both = here[:, None] & (col < 2 * pairs)[None, :]
        loaded = tl.load(x_row + col[None, :] * x_d, mask=both, other=0.0).to(tl.float32)
        first, second = tl.split(tl.reshape(loaded, [ROWS, PAIRS, 2]))
        rotated = tl.join(first * c - second * s_, second * c + first * s_)
        rotated = tl.reshape(rotated, [ROWS, 2 * PAIRS])
        tl.store(out_row + col[None, :], rotated.to(out.dtype.element_ty), mask=both)
    else:
        first = tl.load(x_row + pair[None, :] * x_d, mask=turned, other=0.0).to(tl.float32)
        second = tl.load(x_row + (pairs + pair)[None, :] * x_d, mask=turned, other=0.0).to(tl.float32)
        tl.store(out_row + pair[None, :], (first * c - second * s_).to(out.dtype.element_ty), mask=turned)
        tl.store(out_row + (pairs + pair)[None, :], (second * c + first * s_).to(out.dtype.element_ty), mask=turned)
    if REST > 0:
        col = 2 * pairs + tl.arange(0, REST)
        copied = here[:, None] & (col < d)[None, :]
        rest = tl.load(x_row + col[None, :] * x_d, mask=copied, other=0.0)
        tl.store(out_row + col[None, :], rest.to(out.dtype.element_ty), mask=copied)
