"""Attention over a cache in Triton: append the new tokens, attend in shares of the keys, combine the shares.

Dao et al. 2023, https://crfm.stanford.edu/2023/10/12/flashdecoding.html. What the kernels take:

cache        (block_table, its two strides, num_pages, page_size, capacity): token j of sequence n is row j of n; or,
             with a table, row j % page_size of page block_table[n, j // page_size]
rotary       (cos, sin, their strides, the positions that they cover); the first 2 * HALF columns are rotated
lengths      (kv_lengths, s_q, s_new, left): kv_lengths counts before the append; left < 0 is unbounded
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..attention.triton_kernels import LN2, LOG2E, tanh


@triton.jit
def before(lengths, cache, n):
    """Tokens of sequence n in the cache before the append; the new ones have room, whatever kv_lengths holds."""
    kv_lengths, _, s_new, _ = lengths
    return tl.minimum(tl.maximum(tl.load(kv_lengths + n).to(tl.int32), 0), tl.maximum(cache[5] - s_new, 0))


@triton.jit
def row_of(cache, strides, n, head, j, exists):
    """Where token j of sequence n begins in a cache with these strides, (page or sequence, token, head)."""
    block_table, table_stride_b, table_stride_block, num_pages, page_size, _ = cache
    stride_page, stride_token, stride_head = strides
    page, token = n, j
    if block_table is not None:
        entry = block_table + n.to(tl.int64) * table_stride_b + (j // page_size).to(tl.int64) * table_stride_block
        page = tl.minimum(tl.maximum(tl.load(entry, mask=exists, other=0), 0), num_pages - 1)
        token = j % page_size
    return page.to(tl.int64) * stride_page + token.to(tl.int64) * stride_token + head.to(tl.int64) * stride_head


@triton.jit
def rotated(
    x, exists, position, rotary, D: tl.constexpr, BLOCK_D: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr
):
    """Rows at pointers x, (rows, BLOCK_D) float32, rotated by the angle of their position; 0 where none exists."""
    column = tl.arange(0, BLOCK_D)[None, :]
    inside = exists[:, None] & (column < D)
    y = tl.load(x[:, None] + column, mask=inside, other=0.0).to(tl.float32)
    if HALF > 0:
        cos, sin, cos_stride, sin_stride, covered = rotary
        if INTERLEAVED:
            pair, first, partner = column // 2, column % 2 == 0, column ^ 1
        else:
            pair, first = column % HALF, column < HALF
            partner = tl.where(first, column + HALF, column - HALF)
        turns = inside & (column < 2 * HALF)
        other = tl.load(x[:, None] + partner, mask=turns, other=0.0).to(tl.float32)
        row = tl.minimum(tl.maximum(position, 0), covered - 1).to(tl.int64)[:, None]
        c = tl.load(cos + row * cos_stride + pair, mask=turns, other=1.0).to(tl.float32)
        s = tl.load(sin + row * sin_stride + pair, mask=turns, other=0.0).to(tl.float32)
        y = y * c + tl.where(first, -other, other) * s
    return y


@triton.jit
def store_row(x, place, scale_place, exists, cache, scales, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """x (rows, BLOCK_D) in the dtype of the cache; int8 with a scale for each row, its largest magnitude over 127."""
    column = tl.arange(0, BLOCK_D)[None, :]
    if scales is not None:
        magnitude = tl.abs(x)
        spoilt = tl.max(tl.where(magnitude < float("inf"), 0, 1), 1) > 0
        scale = tl.div_rn(tl.max(magnitude, 1), tl.full([x.shape[0]], 127.0, tl.float32))
        tl.store(scales + scale_place, tl.where(spoilt, float("nan"), scale), mask=exists)
        y = tl.div_rn(x, tl.broadcast_to(scale[:, None], x.shape))
        y = (y + 12582912.0) - 12582912.0  # 1.5 * 2^23: to the nearest integer, and to even
        x = tl.where((spoilt | (scale == 0.0))[:, None], 0.0, y)
    tl.store(cache + place[:, None] + column, x.to(cache.dtype.element_ty), mask=exists[:, None] & (column < D))


@triton.jit(do_not_specialize=["lengths", "rows", "h_kv"])
def append(
    k_cache, v_cache, k_scale, v_scale, k_new, v_new, k_strides, v_strides, k_scale_strides, v_scale_strides,
    k_new_strides, v_new_strides, cache, rotary, lengths, rows, h_kv,
    D: tl.constexpr, D_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Writes ROWS of the new keys, rotated, and values."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = row < rows
    row = tl.minimum(row, rows - 1)
    s_new = lengths[2]
    head, t, n = row % h_kv, row // h_kv % s_new, row // h_kv // s_new
    j = before(lengths, cache, n) + t
    key = k_new + n.to(tl.int64) * k_new_strides[0] + t.to(tl.int64) * k_new_strides[1] + head * k_new_strides[2]
    value = v_new + n.to(tl.int64) * v_new_strides[0] + t.to(tl.int64) * v_new_strides[1] + head * v_new_strides[2]
    x = rotated(key, exists, j, rotary, D, BLOCK_D, HALF, INTERLEAVED)
    y = rotated(value, exists, j, rotary, D_V, BLOCK_DV, 0, INTERLEAVED)
    k_place, v_place = row_of(cache, k_strides, n, head, j, exists), row_of(cache, v_strides, n, head, j, exists)
    ks_place, vs_place = k_place, v_place
    if k_scale is not None:
        ks_place = row_of(cache, k_scale_strides, n, head, j, exists)
        vs_place = row_of(cache, v_scale_strides, n, head, j, exists)
    store_row(x, k_place, ks_place, exists, k_cache, k_scale, D, BLOCK_D)
    store_row(y, v_place, vs_place, exists, v_cache, v_scale, D_V, BLOCK_DV)


@triton.jit(do_not_specialize=["lengths", "heads", "share"])
def attend(
    out, lse, q, k_cache, v_cache, k_scale, v_scale, slopes, q_strides, k_strides, v_strides, k_scale_strides,
    v_scale_strides, slopes_stride, cache, rotary, lengths, heads, scale, softcap, share,
    D: tl.constexpr, D_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A share of the keys for BLOCK_M rows: the queries of the heads that read one key head, i * group + member.

    out: (b, h, s_q, shares, d_v) and lse (b, h, s_q, shares), float32, lse in units of log2 and without the sink.
    """
    h, group = heads
    _, s_q, s_new, left = lengths
    h_kv = h // group
    chunks = tl.cdiv(s_q * group, BLOCK_M)
    chunk = tl.program_id(0) % chunks
    kv_head = tl.program_id(0) // chunks % h_kv
    n = tl.program_id(0) // chunks // h_kv
    split, shares = tl.program_id(1), tl.num_programs(1)
    row = chunk * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = row < s_q * group
    i, head = row // group, kv_head * group + row % group
    total = before(lengths, cache, n) + s_new
    position = total - s_q + i

    # all rows of a sequence share its keys in the same way; a chunk then leaves out what none of its rows sees
    begin = tl.full((), 0, tl.int32)
    if WINDOW:
        begin = tl.maximum(total - s_q - left, 0)
    begin += split * share
    end = tl.minimum(begin + share, total)
    end = tl.minimum(end, total - s_q + (chunk * BLOCK_M + BLOCK_M - 1) // group + 1)
    if WINDOW:
        lowest = total - s_q + chunk * BLOCK_M // group - left
        begin = tl.maximum(begin, begin + (lowest - begin) // BLOCK_N * BLOCK_N)

    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    if begin < end:
        query = q + n.to(tl.int64) * q_strides[0] + i.to(tl.int64) * q_strides[1] + head.to(tl.int64) * q_strides[2]
        exact = rotated(query, exists, position, rotary, D, BLOCK_D, HALF, INTERLEAVED)
        q_tile = exact.to(q.dtype.element_ty)
        rest = (exact - q_tile.to(tl.float32)).to(q.dtype.element_ty)
        column, column_v = tl.arange(0, BLOCK_D)[None, :], tl.arange(0, BLOCK_DV)[None, :]
        slope = 0.0
        if slopes is not None:
            slope = tl.load(slopes + n * slopes_stride + head, mask=exists, other=0.0) * LOG2E
        for j0 in tl.range(begin, end, BLOCK_N):
            j = j0 + tl.arange(0, BLOCK_N)
            held = j < end
            k_place = row_of(cache, k_strides, n, kv_head, j, held)
            keys = tl.load(k_cache + k_place[:, None] + column, mask=held[:, None] & (column < D), other=0)
            if k_scale is not None:
                keys = keys.to(tl.float32).to(q_tile.dtype)  # exact: seven bits and a sign
            s = tl.dot(q_tile, tl.trans(keys), input_precision=PRECISION)
            if k_scale is not None:
                if HALF > 0 and q_tile.dtype != tl.float32:  # what rounding took from the rotated queries
                    s += tl.dot(rest, tl.trans(keys))
                ks_place = row_of(cache, k_scale_strides, n, kv_head, j, held)
                s *= tl.load(k_scale + ks_place, mask=held, other=0.0)[None, :]
            if SOFTCAP:
                s = tanh(s * (scale / softcap)) * (softcap * LOG2E)
            else:
                s *= scale * LOG2E
            distance = position[:, None] - j[None, :]
            if slopes is not None:
                s -= slope[:, None] * distance.to(tl.float32)
            seen = (distance >= 0) & held[None, :]
            if WINDOW:
                seen = seen & (distance <= left)
            s = tl.where(seen, s, float("-inf"))
            m_new = tl.maximum(m, tl.max(s, 1))
            m_finite = tl.where(m_new == float("-inf"), 0.0, m_new)
            p = tl.exp2(s - m_finite[:, None])
            alpha = tl.exp2(m - m_finite)
            l = l * alpha + tl.sum(p, 1)
            m = m_new
            v_place = row_of(cache, v_strides, n, kv_head, j, held)
            values = tl.load(v_cache + v_place[:, None] + column_v, mask=held[:, None] & (column_v < D_V), other=0)
            if v_scale is not None:
                vs_place = row_of(cache, v_scale_strides, n, kv_head, j, held)
                p *= tl.load(v_scale + vs_place, mask=held, other=0.0)[None, :]
                values = values.to(tl.float32).to(q_tile.dtype)
            p = p.to(q_tile.dtype)
            acc = acc * alpha[:, None] + tl.dot(p, values, input_precision=PRECISION)

    # a sum that is NaN has seen something
    seen = (m > float("-inf")) | (l != l)
    l = tl.where(seen, l, 1.0)
    place = ((n.to(tl.int64) * h + head) * s_q + i) * shares + split
    tl.store(lse + place, tl.where(seen, m + tl.log2(l), float("-inf")), mask=exists)
    acc = tl.where(seen[:, None], acc / l[:, None], 0.0)
    column_v = tl.arange(0, BLOCK_DV)[None, :]
    tl.store(out + place[:, None] * D_V + column_v, acc, mask=exists[:, None] & (column_v < D_V))


@triton.jit(do_not_specialize=["h", "s_q", "shares"])
def combine(
    out, lse, sink, partial_out, partial_lse, h, s_q, shares,
    D_V: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_SHARES: tl.constexpr,
):  # fmt: skip
    """out (b, s_q, h, d_v) and lse (b, h, s_q) of one row from its shares and the sink."""
    row = tl.program_id(0).to(tl.int64)  # (n, head, i)
    i, head, n = row % s_q, row // s_q % h, row // s_q // h
    share, column = tl.arange(0, BLOCK_SHARES), tl.arange(0, BLOCK_DV)
    x = tl.load(partial_lse + row * shares + share, mask=share < shares, other=float("-inf"))
    held = x != float("-inf")
    m = tl.max(x, 0)
    seen = tl.max(held.to(tl.int32), 0) > 0
    m = tl.where(m > float("-inf"), m, 0.0)
    weight_of_sink = 0.0
    if sink is not None:
        logit = tl.load(sink + head) * LOG2E
        m = tl.maximum(m, logit)
        weight_of_sink = tl.exp2(logit - m)
    weight = tl.where(held, tl.exp2(x - m), 0.0)
    l = tl.where(seen, tl.sum(weight, 0) + weight_of_sink, 1.0)
    place = (row * shares + share)[:, None] * D_V + column[None, :]
    y = tl.load(partial_out + place, mask=held[:, None] & (column < D_V)[None, :], other=0.0)
    y = tl.sum(y * weight[:, None], 0) / l
    tl.store(out + ((n * s_q + i) * h + head) * D_V + column, y.to(out.dtype.element_ty), mask=column < D_V)
    tl.store(lse + row, tl.where(seen, (m + tl.log2(l)) * LN2, float("-inf")))
