"""The kernels of embedding: a sum of rows of tables for each token, and for each row of a table its tokens' gradients.

The gradient is a sum over the tokens sorted by row, in pieces of PIECE tokens at most: no atomics, so the bits depend
on the indices alone, and a row that many tokens share is as parallel as many rows.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _row_of(ids, b, i, stride_b, stride_s, size, here):
    """The row of a table for each token; where there are no ids, its place in the sequence."""
    row = i
    if ids is not None:
        row = tl.load(ids + b * stride_b + i * stride_s, mask=here, other=0).to(tl.int64)
    return tl.minimum(tl.maximum(row, 0), size - 1)


@triton.jit
def fwd(
    out, x, token_ids, token_table, positions, position_table, type_ids, type_table, tokens, s, d, scale,
    token_rows, position_rows, type_rows, x_b, x_s, x_d, token_ids_b, token_ids_s, token_row, token_d,
    positions_b, positions_s, position_row, position_d, type_ids_b, type_ids_s, type_row, type_d,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    here = token < tokens
    inside = here[:, None] & (col < d)[None, :]
    b, i = token // s, token % s
    if x is not None:
        total = tl.load(x + (b * x_b + i * x_s)[:, None] + col[None, :] * x_d, mask=inside, other=0.0).to(tl.float32)
        total *= scale
    else:
        row = _row_of(token_ids, b, i, token_ids_b, token_ids_s, token_rows, here)
        at = token_table + (row * token_row)[:, None] + col[None, :] * token_d
        total = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    if position_table is not None:
        row = _row_of(positions, b, i, positions_b, positions_s, position_rows, here)
        at = position_table + (row * position_row)[:, None] + col[None, :] * position_d
        total += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    if type_table is not None:
        row = _row_of(type_ids, b, i, type_ids_b, type_ids_s, type_rows, here)
        at = type_table + (row * type_row)[:, None] + col[None, :] * type_d
        total += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token[:, None] * d + col[None, :], total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def bwd_pieces(
    dout, rows, order, starts, ends, dtable, partial, d, dout_stride,
    PIECE: tl.constexpr, TOKENS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """The sum of one piece: to its row of dtable where it is all of the row's, else to a slot of `partial`.

    rows: the sorted rows of the tokens; order: the tokens in that order; starts, ends: for each place in that order,
    where its row begins and ends. A program whose place begins no piece has nothing to do.
    """
    k = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    start = tl.load(starts + k)
    end = tl.load(ends + k)
    if (k - start) % PIECE == 0:
        stop = tl.minimum(k + PIECE, end)
        total = tl.zeros([COLS], tl.float32)
        for first in range(k, stop, TOKENS):
            place = first + tl.arange(0, TOKENS)
            token = tl.load(order + place, mask=place < stop, other=0)
            inside = (place < stop)[:, None] & (col < d)[None, :]
            tile = tl.load(dout + token[:, None] * dout_stride + col[None, :], mask=inside, other=0.0)
            total += tl.sum(tile.to(tl.float32), 0)
        if end - start <= PIECE:
            at = dtable + tl.load(rows + k).to(tl.int64) * d + col
            tl.store(at, total.to(dtable.dtype.element_ty), mask=col < d)
        else:
            # at most one row begins, and one goes on, within PIECE places: two slots for them
            slot = k // PIECE * 2 + (k == start).to(tl.int64)
            tl.store(partial + slot * d + col, total, mask=col < d)


@triton.jit
def bwd_join(
    rows, starts, ends, dtable, partial, d,
    PIECE: tl.constexpr, TOKENS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """The rows of several pieces, by the program of the place where the row begins."""
    k = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    end = tl.load(ends + k)
    if (tl.load(starts + k) == k) & (end - k > PIECE):
        total = tl.zeros([COLS], tl.float32)
        for first in range(k, end, TOKENS * PIECE):
            place = first + tl.arange(0, TOKENS) * PIECE
            slot = place // PIECE * 2 + (place == k).to(tl.int64)
            inside = (place < end)[:, None] & (col < d)[None, :]
            total += tl.sum(tl.load(partial + slot[:, None] * d + col[None, :], mask=inside, other=0.0), 0)
        at = dtable + tl.load(rows + k).to(tl.int64) * d + col
        tl.store(at, total.to(dtable.dtype.element_ty), mask=col < d)
