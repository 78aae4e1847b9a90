"""Softmax attention in Triton: Dao 2023, arXiv:2307.08691. One set of kernels for padded and for packed sequences.

Tensors come as pointers to element 0 and tuples of strides, in elements; the last axis is contiguous. What every
kernel of the family takes:

n, head        sequence and query head; the key head is head // group
lengths        (cu_seqlens_q, cu_seqlens_k, kv_lengths, s_q, s_k, t_q, t_k, offset): the pointers may be None; s_q and
               s_k are the longest sequence; t_q and t_k, the tokens in all, are read when packed, offset when not
band           (left, right), read where LEFT and RIGHT say that they bound something
scale          at least 0
dropout        (seed, threshold, 1 / (1 - p)); the seed may be None

Scores are held in units of log2, so that exp2 needs no factor. Where nothing is added to them they stay bare products,
and `unit` is the factor that they still want: one fused multiply-add then takes them and the maximum to the exponent.
Loops over a sequence have three parts; only in the first and the last may band and length hide anything.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# lengths differ from call to call: no kernel is compiled anew for one that is 1 or a multiple of 16
NOT_SPECIALIZED = ["lengths", "band", "heads", "dropout"]


@triton.jit
def rows(pointer, row, stride, count, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, CHECKED: tl.constexpr):
    """Rows of a matrix of COLUMNS columns as (len(row), BLOCK), zeros outside; CHECKED: some may not exist."""
    column = tl.arange(0, BLOCK)
    place = pointer + row.to(tl.int64)[:, None] * stride + column[None, :]
    if CHECKED:
        if COLUMNS < BLOCK:
            return tl.load(place, mask=(row < count)[:, None] & (column < COLUMNS)[None, :], other=0.0)
        return tl.load(place, mask=(row < count)[:, None], other=0.0)
    if COLUMNS < BLOCK:
        return tl.load(place, mask=(column < COLUMNS)[None, :], other=0.0)
    return tl.load(place)


@triton.jit
def store_rows(pointer, row, stride, count, x, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    place = pointer + row.to(tl.int64)[:, None] * stride + column[None, :]
    tl.store(place, x.to(pointer.dtype.element_ty), mask=(row < count)[:, None] & (column < COLUMNS)[None, :])


@triton.jit
def unit_of(scale):
    """scale in units of log2; never 0, of which -inf makes NaN, but so small that scores vanish beside 1."""
    return tl.maximum(scale * LOG2E, 1.2e-38)


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Philox-4x32-10: four words for each counter; all uint32."""
    for _ in tl.static_range(10):
        h0, l0 = tl.umulhi(c0, tl.full((), 0xD2511F53, tl.uint32)), c0 * tl.full((), 0xD2511F53, tl.uint32)
        h1, l1 = tl.umulhi(c2, tl.full((), 0xCD9E8D57, tl.uint32)), c2 * tl.full((), 0xCD9E8D57, tl.uint32)
        c0, c1, c2, c3 = h1 ^ c1 ^ k0, l1, h0 ^ c3 ^ k1, l0
        k0 += tl.full((), 0x9E3779B9, tl.uint32)
        k1 += tl.full((), 0xBB67AE85, tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def words(dropout, n, head, i, quads):
    """Four words for each of quads and queries i, which broadcast."""
    key = tl.load(dropout[0])
    zero = (i * 0 + quads * 0).to(tl.uint32)
    return philox(
        zero + quads.to(tl.uint32), zero + i.to(tl.uint32), zero + head.to(tl.uint32), zero + n.to(tl.uint32),
        key.to(tl.uint32), (key >> 32).to(tl.uint32),
    )  # fmt: skip


@triton.jit
def kept(dropout, n, head, i, j0, BLOCK_N: tl.constexpr):
    """(len(i), BLOCK_N) bool: which weights of queries i and keys j0, j0 + 1, ... stay; j0 is a multiple of 4."""
    w0, w1, w2, w3 = words(dropout, n, head, i[:, None], (j0 // 4 + tl.arange(0, BLOCK_N // 4))[None, :])
    joined = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # (len(i), BLOCK_N / 4, 2, 2), the last axis is bit 0 of j
    return joined.reshape(i.shape[0], BLOCK_N) >= dropout[1].to(tl.uint32)


@triton.jit
def kept_at(dropout, n, head, i, j):
    """The same for any keys j, at four times the cost."""
    w0, w1, w2, w3 = words(dropout, n, head, i[:, None], (j // 4)[None, :])
    last = (j % 4)[None, :]
    word = tl.where(last < 2, tl.where(last == 0, w0, w1), tl.where(last == 2, w2, w3))
    return word >= dropout[1].to(tl.uint32)


@triton.jit
def tanh(x):
    """tanh(x); below 1/8, where 1 - exp(-2x) cancels, by its series."""
    a = tl.abs(x)
    e = tl.exp2(-2.0 * LOG2E * a)
    large = (1.0 - e) / (1.0 + e)
    y = x * x
    small = x * (1.0 + y * (-1.0 / 3 + y * (2.0 / 15 - y * (17.0 / 315))))
    return tl.where(a < 0.125, small, tl.where(x < 0, -large, large))


@triton.jit
def bounds(cu_seqlens, n, longest, total):
    """Where sequence n begins, and its length; inside the tensor whatever cu_seqlens holds."""
    begin = tl.minimum(tl.maximum(tl.load(cu_seqlens + n), 0), total)
    end = tl.minimum(tl.maximum(tl.load(cu_seqlens + n + 1), begin), total)
    return begin, tl.minimum(end - begin, longest)


@triton.jit
def sequence(lengths, n):
    """first_q, n_q, first_k, n_k (those that kv_lengths leaves) and offset of sequence n."""
    cu_seqlens_q, cu_seqlens_k, kv_lengths, s_q, s_k, t_q, t_k, offset = lengths
    if cu_seqlens_q is None:
        first_q, n_q, first_k, n_k, diagonal = tl.full((), 0, tl.int32), s_q, tl.full((), 0, tl.int32), s_k, offset
    else:
        first_q, n_q = bounds(cu_seqlens_q, n, s_q, t_q)
        first_k, n_k = bounds(cu_seqlens_k, n, s_k, t_k)
        diagonal = n_k - n_q
    if kv_lengths is not None:
        n_k = tl.minimum(n_k, tl.maximum(tl.load(kv_lengths + n), 0))
    return first_q, n_q, first_k, n_k, diagonal


@triton.jit
def matrix(pointer, n, row, head, strides):
    """The matrix (rows, columns) of a tensor (b, s, h, d) that begins at a sequence, row and head; and its stride."""
    stride_b, stride_s, stride_h = strides
    return pointer + n.to(tl.int64) * stride_b + row.to(tl.int64) * stride_s + head.to(tl.int64) * stride_h


@triton.jit
def elements(x, strides, n, head, i, j, n_q, n_k, AXES: tl.constexpr):
    """A mask or a bias at queries i and keys j, on those of these axes that it has; outside, any element of it."""
    stride_b, stride_h, stride_q, stride_k = strides
    pointer = x + n.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h
    if AXES % 2 == 1:
        pointer += tl.maximum(tl.minimum(i, n_q - 1), 0).to(tl.int64) * stride_q
    if AXES >= 2:
        pointer += tl.maximum(tl.minimum(j, n_k - 1), 0).to(tl.int64) * stride_k
    return tl.load(pointer)


@triton.jit
def scores(
    s, i, j, n, head, mask, bias, slope, mask_strides, bias_strides, scale, softcap, lengths, n_q, n_k, offset, band,
    MASK_AXES: tl.constexpr, BIAS_AXES: tl.constexpr, SOFTCAP: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    CHECKED: tl.constexpr,
):  # fmt: skip
    """Scores of the products s at queries i and keys j, which broadcast to s's shape; and the tanh of softcap.

    MASK_AXES, BIAS_AXES: 1 for q plus 2 for k; 4: a bias by distance. CHECKED: band and length may hide some.
    """
    t = s
    if SOFTCAP:
        t = tanh(s * (scale / softcap))
        s = t * (softcap * LOG2E)
    elif bias is not None or slope is not None:
        s = s * unit_of(scale)
    if slope is not None:
        s -= (slope * LOG2E) * tl.abs(i + offset - j).to(tl.float32)
    if bias is not None:
        if BIAS_AXES == 4:
            longest_q, longest_k = lengths[3], lengths[4]
            place = tl.minimum(tl.maximum(j - i - offset + longest_k, 0), longest_q + longest_k - 1)
            s += tl.load(bias + head.to(tl.int64) * bias_strides[1] + place) * LOG2E
        else:
            s += elements(bias, bias_strides, n, head, i, j, n_q, n_k, BIAS_AXES).to(tl.float32) * LOG2E
    if mask is not None:
        attended = elements(mask, mask_strides, n, head, i, j, n_q, n_k, MASK_AXES) != 0
        s = tl.where(attended, s, float("-inf"))
    if CHECKED:
        left, right = band
        seen = j < n_k
        if LEFT:
            seen = seen & (j >= i + offset - left)
        if RIGHT:
            seen = seen & (j <= i + offset + right)
        s = tl.where(seen, s, float("-inf"))
    return s, t


@triton.jit
def seen_keys(first, last, n_k, offset, band, LEFT: tl.constexpr, RIGHT: tl.constexpr, BLOCK: tl.constexpr):
    """begin, inner, outer, end: queries first .. last see some of the keys [begin, end), and all of [inner, outer).

    All but end are multiples of BLOCK; begin <= inner <= outer.
    """
    left, right = band
    begin, inner, outer, end = 0, 0, n_k, n_k
    if LEFT:
        begin = tl.maximum(first + offset - left, 0) // BLOCK * BLOCK
        inner = tl.cdiv(tl.maximum(last + offset - left, 0), BLOCK) * BLOCK
    if RIGHT:
        outer = tl.minimum(n_k, tl.maximum(first + offset + right + 1, 0))
        end = tl.minimum(n_k, tl.maximum(last + offset + right + 1, 0))
    return begin, inner, tl.maximum(outer // BLOCK * BLOCK, inner), end


@triton.jit
def seeing_queries(first, last, n_q, offset, band, LEFT: tl.constexpr, RIGHT: tl.constexpr, BLOCK: tl.constexpr):
    """The same for the queries that see keys first .. last."""
    left, right = band
    begin, inner, outer, end = 0, 0, n_q, n_q
    if RIGHT:
        begin = tl.maximum(first - offset - right, 0) // BLOCK * BLOCK
        inner = tl.cdiv(tl.maximum(last - offset - right, 0), BLOCK) * BLOCK
    if LEFT:
        outer = tl.minimum(n_q, tl.maximum(first - offset + left + 1, 0))
        end = tl.minimum(n_q, tl.maximum(last - offset + left + 1, 0))
    return begin, inner, tl.maximum(outer // BLOCK * BLOCK, inner), end


@triton.jit
def attend(
    acc, m, l, q, k, v, k_stride, v_stride, i, begin, end, n, head, mask, bias, slope, mask_strides,
    bias_strides, scale, softcap, dropout, lengths, n_q, n_k, offset, band, CHECKED: tl.constexpr,
    D: tl.constexpr, D_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
    MASK_AXES: tl.constexpr, BIAS_AXES: tl.constexpr, SOFTCAP: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Online softmax over keys [begin, end): the sum of weights times values, the maximum and the sum of weights."""
    unit = 1.0
    if not SOFTCAP and bias is None and slope is None:
        unit = unit_of(scale)
    for j0 in tl.range(begin, end, BLOCK_N):
        j0 = tl.multiple_of(j0, BLOCK_N)
        j = j0 + tl.arange(0, BLOCK_N)
        keys = rows(k, j, k_stride, n_k, D, BLOCK_D, CHECKED)
        s = tl.dot(q, tl.trans(keys), input_precision=PRECISION)
        s, _ = scores(
            s, i[:, None], j[None, :], n, head, mask, bias, slope, mask_strides, bias_strides, scale, softcap,
            lengths, n_q, n_k, offset, band, MASK_AXES, BIAS_AXES, SOFTCAP, LEFT, RIGHT, CHECKED,
        )  # fmt: skip
        m_new = tl.maximum(m, tl.max(s, 1) * unit)
        # a row that has seen nothing yet: exp2(-inf - 0) = 0
        m_finite = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2(s * unit - m_finite[:, None])
        alpha = tl.exp2(m - m_finite)
        l = l * alpha + tl.sum(p, 1)
        m = m_new
        if dropout[0] is not None:
            p = tl.where(kept(dropout, n, head, i, j0, BLOCK_N), p, 0.0)
        values = rows(v, j, v_stride, n_k, D_V, BLOCK_DV, CHECKED)
        acc = acc * alpha[:, None] + tl.dot(p.to(values.dtype), values, input_precision=PRECISION)
    return acc, m, l


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def fwd(
    out, lse, sink, out_strides, lse_strides,
    q, k, v, mask, bias, slopes, q_strides, k_strides, v_strides, mask_strides, bias_strides, slopes_stride,
    scale, softcap, dropout, lengths, band, heads,
    D: tl.constexpr, D_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, MASK_AXES: tl.constexpr, BIAS_AXES: tl.constexpr, SOFTCAP: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out and lse (b, h, s_q) of BLOCK_M queries of one head."""
    h, group = heads
    tiles = tl.cdiv(lengths[3], BLOCK_M)
    tile = tl.program_id(0) % tiles
    head = tl.program_id(0) // tiles % h
    n = tl.program_id(0) // tiles // h
    if RIGHT:  # the last tiles of a triangle see most: they come first
        tile = tiles - 1 - tile
    first_q, n_q, first_k, n_k, offset = sequence(lengths, n)
    first = tile * BLOCK_M
    if first >= n_q:
        return
    i = first + tl.arange(0, BLOCK_M)
    q_tile = rows(matrix(q, n, first_q, head, q_strides), i, q_strides[1], n_q, D, BLOCK_D, True)
    k_matrix = matrix(k, n, first_k, head // group, k_strides)
    v_matrix = matrix(v, n, first_k, head // group, v_strides)
    slope = None
    if slopes is not None:
        slope = tl.load(slopes + n * slopes_stride + head)

    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    begin, inner, outer, end = seen_keys(
        first, tl.minimum(first + BLOCK_M, n_q) - 1, n_k, offset, band, LEFT, RIGHT, BLOCK_N
    )
    for part in tl.static_range(3):
        if part != 0 or LEFT:
            acc, m, l = attend(
                acc, m, l, q_tile, k_matrix, v_matrix, k_strides[1], v_strides[1], i,
                begin if part == 0 else inner if part == 1 else outer,
                tl.minimum(inner, end) if part == 0 else outer if part == 1 else end,
                n, head, mask, bias, slope, mask_strides, bias_strides, scale, softcap, dropout,
                lengths, n_q, n_k, offset, band, part != 1,
                D, D_V, BLOCK_D, BLOCK_DV, BLOCK_N, MASK_AXES, BIAS_AXES, SOFTCAP, LEFT, RIGHT, PRECISION,
            )  # fmt: skip

    seen = (m > float("-inf")) | (l != l)  # a sum that is NaN has seen something
    m = tl.where(m > float("-inf"), m, 0.0)
    if sink is not None:
        sink_logit = tl.load(sink + head) * LOG2E
        m_sink = tl.maximum(m, sink_logit)
        alpha = tl.exp2(m - m_sink)
        acc *= alpha[:, None]
        l = l * alpha + tl.exp2(sink_logit - m_sink)
        m = m_sink
    l = tl.where(seen, l, 1.0)
    acc *= (tl.where(seen, 1.0, 0.0) / l)[:, None]
    if dropout[0] is not None:
        acc *= dropout[2]
    store_rows(matrix(out, n, first_q, head, out_strides), i, out_strides[1], n_q, acc, D_V, BLOCK_DV)
    lse_stride_b, lse_stride_h = lse_strides
    lse_row = lse + n.to(tl.int64) * lse_stride_b + head.to(tl.int64) * lse_stride_h + first_q
    tl.store(lse_row + i, tl.where(seen, (m + tl.log2(l)) * LN2, float("-inf")), mask=i < n_q)


@triton.jit(do_not_specialize=["h", "s"])
def bwd_delta(
    delta, sink_rows, out, dout, lse, dlse, sink, out_strides, dout_strides, lse_strides, h, s,
    D_V: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """What the softmax's gradient subtracts from a row's: sum of out * dout, less dlse; and the gradient of the sink.

    All (b, h, s); rows that see no key get 0. sink_rows: of each row, None where not needed.
    """
    tiles = tl.cdiv(s, BLOCK_M)
    head = tl.program_id(0) // tiles % h
    n = tl.program_id(0) // tiles // h
    i = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    zero = tl.full((), 0, tl.int32)
    o = rows(matrix(out, n, zero, head, out_strides), i, out_strides[1], s, D_V, BLOCK_DV, True).to(tl.float32)
    do = rows(matrix(dout, n, zero, head, dout_strides), i, dout_strides[1], s, D_V, BLOCK_DV, True).to(tl.float32)
    place = n.to(tl.int64) * lse_strides[0] + head.to(tl.int64) * lse_strides[1] + i
    x = tl.sum(o * do, 1)
    if dlse is not None:
        x -= tl.load(dlse + place, mask=i < s, other=0.0)
    row_lse = tl.load(lse + place, mask=i < s, other=float("-inf"))
    seen = row_lse > float("-inf")
    x = tl.where(seen, x, 0.0)
    tl.store(delta + place, x, mask=i < s)
    if sink_rows is not None:
        p = tl.exp2(tl.where(seen, tl.load(sink + head) - row_lse, float("-inf")) * LOG2E)
        tl.store(sink_rows + place, -p * x, mask=i < s)


@triton.jit
def lse_of(lse, i, n_q):
    """In units of log2; +inf for rows that see no key or do not exist, so that their weights are 0."""
    x = tl.load(lse + i, mask=i < n_q, other=float("-inf"))
    return tl.where(x == float("-inf"), float("inf"), x * LOG2E)


@triton.jit
def weights_and_gradient(s, dp, row_lse, row_delta, keep, unit, keep_scale, DROPOUT: tl.constexpr):
    """p, what dropout leaves of it (but for its factor), and the gradient of the scores, p (dp - delta)."""
    p = tl.exp2(s * unit - row_lse)
    left = p
    if DROPOUT:
        left = tl.where(keep, p, 0.0)
        dp = tl.where(keep, dp * keep_scale, 0.0)
    return left, p * (dp - row_delta)


@triton.jit
def attend_bwd_q(
    dq, sums, slope_sums, q, do, row_lse, row_delta, k, v, k_stride, v_stride, i, begin, end, n, head, mask, bias,
    slope, mask_strides, bias_strides, scale, softcap, dropout, lengths, n_q, n_k, offset, band,
    CHECKED: tl.constexpr, SUMS: tl.constexpr, SLOPE_SUMS: tl.constexpr,
    D: tl.constexpr, D_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
    MASK_AXES: tl.constexpr, BIAS_AXES: tl.constexpr, SOFTCAP: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds what keys [begin, end) give to dq (but for the scale), and to the sums of each row."""
    unit = 1.0
    if not SOFTCAP and bias is None and slope is None:
        unit = unit_of(scale)
    for j0 in tl.range(begin, end, BLOCK_N):
        j0 = tl.multiple_of(j0, BLOCK_N)
        j = j0 + tl.arange(0, BLOCK_N)
        keys = rows(k, j, k_stride, n_k, D, BLOCK_D, CHECKED)
        s, t = scores(
            tl.dot(q, tl.trans(keys), input_precision=PRECISION), i[:, None], j[None, :], n, head, mask, bias, slope,
            mask_strides, bias_strides, scale, softcap, lengths, n_q, n_k, offset, band,
            MASK_AXES, BIAS_AXES, SOFTCAP, LEFT, RIGHT, CHECKED,
        )  # fmt: skip
        values = rows(v, j, v_stride, n_k, D_V, BLOCK_DV, CHECKED)
        dp = tl.dot(do, tl.trans(values), input_precision=PRECISION)
        keep = None
        if dropout[0] is not None:
            keep = kept(dropout, n, head, i, j0, BLOCK_N)
        _, ds = weights_and_gradient(
            s, dp, row_lse[:, None], row_delta[:, None], keep, unit, dropout[2], dropout[0] is not None
        )
        if SUMS:
            sums += tl.sum(ds, 1)
        if SLOPE_SUMS:
            slope_sums -= tl.sum(ds * tl.abs(i[:, None] + offset - j[None, :]).to(tl.float32), 1)
        if SOFTCAP:
            ds *= 1.0 - t * t
        dq += tl.dot(ds.to(keys.dtype), keys, input_precision=PRECISION)
    return dq, sums, slope_sums


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def bwd_q(
    dq, row_sums, slope_sums, dout, lse, delta, dq_strides, dout_strides, lse_strides,
    q, k, v, mask, bias, slopes, q_strides, k_strides, v_strides, mask_strides, bias_strides, slopes_stride,
    scale, softcap, dropout, lengths, band, heads,
    D: tl.constexpr, D_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, MASK_AXES: tl.constexpr, BIAS_AXES: tl.constexpr, SOFTCAP: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of BLOCK_M queries of one head.

    row_sums, slope_sums: (b, h, s_q), None where not needed: sums over the keys of the scores' gradient, and of that
    times what a slope adds to a score.
    """
    h, group = heads
    tiles = tl.cdiv(lengths[3], BLOCK_M)
    tile = tl.program_id(0) % tiles
    head = tl.program_id(0) // tiles % h
    n = tl.program_id(0) // tiles // h
    if RIGHT:
        tile = tiles - 1 - tile
    first_q, n_q, first_k, n_k, offset = sequence(lengths, n)
    first = tile * BLOCK_M
    if first >= n_q:
        return
    i = first + tl.arange(0, BLOCK_M)
    q_tile = rows(matrix(q, n, first_q, head, q_strides), i, q_strides[1], n_q, D, BLOCK_D, True)
    do_tile = rows(matrix(dout, n, first_q, head, dout_strides), i, dout_strides[1], n_q, D_V, BLOCK_DV, True)
    k_matrix = matrix(k, n, first_k, head // group, k_strides)
    v_matrix = matrix(v, n, first_k, head // group, v_strides)
    slope = None
    if slopes is not None:
        slope = tl.load(slopes + n * slopes_stride + head)
    row = n.to(tl.int64) * lse_strides[0] + head.to(tl.int64) * lse_strides[1] + first_q
    row_lse = lse_of(lse + row, i, n_q)
    row_delta = tl.load(delta + row + i, mask=i < n_q, other=0.0)

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    sums = tl.zeros([BLOCK_M], tl.float32)
    weighted = tl.zeros([BLOCK_M], tl.float32)
    begin, inner, outer, end = seen_keys(
        first, tl.minimum(first + BLOCK_M, n_q) - 1, n_k, offset, band, LEFT, RIGHT, BLOCK_N
    )
    for part in tl.static_range(3):
        if part != 0 or LEFT:
            acc, sums, weighted = attend_bwd_q(
                acc, sums, weighted, q_tile, do_tile, row_lse, row_delta, k_matrix, v_matrix, k_strides[1],
                v_strides[1], i,
                begin if part == 0 else inner if part == 1 else outer,
                tl.minimum(inner, end) if part == 0 else outer if part == 1 else end,
                n, head, mask, bias, slope, mask_strides, bias_strides, scale, softcap, dropout,
                lengths, n_q, n_k, offset, band, part != 1, row_sums is not None, slope_sums is not None,
                D, D_V, BLOCK_D, BLOCK_DV, BLOCK_N, MASK_AXES, BIAS_AXES, SOFTCAP, LEFT, RIGHT, PRECISION,
            )  # fmt: skip
    store_rows(matrix(dq, n, first_q, head, dq_strides), i, dq_strides[1], n_q, acc * scale, D, BLOCK_D)
    sums_row = (n.to(tl.int64) * h + head) * lengths[3] + i
    if row_sums is not None:
        tl.store(row_sums + sums_row, sums, mask=i < n_q)
    if slope_sums is not None:
        tl.store(slope_sums + sums_row, weighted, mask=i < n_q)


@triton.jit
def attend_bwd_kv(
    dk, dv, sums, k, v, q, dout, lse, delta, q_stride, dout_stride, j0, begin, end, n, head, mask, bias, slope,
    mask_strides, bias_strides, scale, softcap, dropout, lengths, n_q, n_k, offset, band,
    CHECKED: tl.constexpr, SUMS: tl.constexpr,
    D: tl.constexpr, D_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    MASK_AXES: tl.constexpr, BIAS_AXES: tl.constexpr, SOFTCAP: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds what queries [begin, end) give to dk and dv (but for their factors), and to the sums of each key."""
    unit = 1.0
    if not SOFTCAP and bias is None and slope is None:
        unit = unit_of(scale)
    j = j0 + tl.arange(0, BLOCK_N)
    for i0 in tl.range(begin, end, BLOCK_M):
        i0 = tl.multiple_of(i0, BLOCK_M)
        i = i0 + tl.arange(0, BLOCK_M)
        queries = rows(q, i, q_stride, n_q, D, BLOCK_D, CHECKED)
        s, t = scores(
            tl.dot(k, tl.trans(queries), input_precision=PRECISION), i[None, :], j[:, None], n, head, mask, bias, slope,
            mask_strides, bias_strides, scale, softcap, lengths, n_q, n_k, offset, band,
            MASK_AXES, BIAS_AXES, SOFTCAP, LEFT, RIGHT, CHECKED,
        )  # fmt: skip
        do = rows(dout, i, dout_stride, n_q, D_V, BLOCK_DV, CHECKED)
        dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        row_lse = lse_of(lse, i, n_q)
        row_delta = tl.load(delta + i, mask=i < n_q, other=0.0)
        keep = None
        if dropout[0] is not None:
            keep = tl.trans(kept(dropout, n, head, i, j0, BLOCK_N))
        p, ds = weights_and_gradient(
            s, dp, row_lse[None, :], row_delta[None, :], keep, unit, dropout[2], dropout[0] is not None
        )
        dv += tl.dot(p.to(do.dtype), do, input_precision=PRECISION)
        if SUMS:
            sums += tl.sum(ds, 1)
        if SOFTCAP:
            ds *= 1.0 - t * t
        dk += tl.dot(ds.to(queries.dtype), queries, input_precision=PRECISION)
    return dk, dv, sums


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def bwd_kv(
    dk, dv, key_sums, dout, lse, delta, dk_strides, dv_strides, dout_strides, lse_strides,
    q, k, v, mask, bias, slopes, q_strides, k_strides, v_strides, mask_strides, bias_strides, slopes_stride,
    scale, softcap, dropout, lengths, band, heads,
    D: tl.constexpr, D_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, MASK_AXES: tl.constexpr, BIAS_AXES: tl.constexpr, SOFTCAP: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of BLOCK_N keys of one key head, over the query heads that read it.

    key_sums: (b, h, s_k), None where not needed: sums over the queries of the scores' gradient.
    """
    h, group = heads
    s_k = lengths[4]
    tiles = tl.cdiv(s_k, BLOCK_N)
    tile = tl.program_id(0) % tiles
    kv_heads = h // group
    kv_head = tl.program_id(0) // tiles % kv_heads
    n = tl.program_id(0) // tiles // kv_heads
    first_q, n_q, first_k, n_k, offset = sequence(lengths, n)
    all_k = s_k  # keys that get a gradient, if a zero
    if lengths[1] is not None:
        _, all_k = bounds(lengths[1], n, s_k, lengths[6])
    first = tile * BLOCK_N
    if first >= all_k:
        return
    j = first + tl.arange(0, BLOCK_N)
    k_tile = rows(matrix(k, n, first_k, kv_head, k_strides), j, k_strides[1], n_k, D, BLOCK_D, True)
    v_tile = rows(matrix(v, n, first_k, kv_head, v_strides), j, v_strides[1], n_k, D_V, BLOCK_DV, True)
    dk_tile = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_tile = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    begin, inner, outer, end = seeing_queries(
        first, tl.minimum(first + BLOCK_N, n_k) - 1, n_q, offset, band, LEFT, RIGHT, BLOCK_M
    )
    end = tl.where(first < n_k, end, 0)
    outer = tl.where(first < n_k, outer, inner)
    for member in tl.range(0, group):
        head = kv_head * group + member
        q_matrix = matrix(q, n, first_q, head, q_strides)
        do_matrix = matrix(dout, n, first_q, head, dout_strides)
        slope = None
        if slopes is not None:
            slope = tl.load(slopes + n * slopes_stride + head)
        row = n.to(tl.int64) * lse_strides[0] + head.to(tl.int64) * lse_strides[1] + first_q
        sums = tl.zeros([BLOCK_N], tl.float32)
        for part in tl.static_range(3):
            if part != 0 or RIGHT:
                dk_tile, dv_tile, sums = attend_bwd_kv(
                    dk_tile, dv_tile, sums, k_tile, v_tile, q_matrix, do_matrix, lse + row, delta + row, q_strides[1],
                    dout_strides[1], first,
                    begin if part == 0 else inner if part == 1 else outer,
                    tl.minimum(inner, end) if part == 0 else outer if part == 1 else end,
                    n, head, mask, bias, slope, mask_strides, bias_strides, scale, softcap, dropout,
                    lengths, n_q, n_k, offset, band, part != 1, key_sums is not None,
                    D, D_V, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, MASK_AXES, BIAS_AXES, SOFTCAP, LEFT, RIGHT,
                    PRECISION,
                )  # fmt: skip
        if key_sums is not None:
            place = (n.to(tl.int64) * h + head) * s_k + j
            tl.store(key_sums + place, sums, mask=j < n_k)
    visible = (j < n_k)[:, None]  # products of the zeros that stand for the others are no gradients
    dk_tile = tl.where(visible, dk_tile * scale, 0.0)
    dv_tile = tl.where(visible, dv_tile * dropout[2], 0.0)
    store_rows(matrix(dk, n, first_k, kv_head, dk_strides), j, dk_strides[1], all_k, dk_tile, D, BLOCK_D)
    store_rows(matrix(dv, n, first_k, kv_head, dv_strides), j, dv_strides[1], all_k, dv_tile, D_V, BLOCK_DV)


@triton.jit
def gradient_tile(
    dout, lse, delta, dout_strides, lse_strides, q, k, v, mask, bias, slopes, q_strides, k_strides, v_strides,
    mask_strides, bias_strides, slopes_stride, scale, softcap, dropout, lengths, band, group, n, head, i0, j0,
    D: tl.constexpr, D_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, MASK_AXES: tl.constexpr, BIAS_AXES: tl.constexpr, SOFTCAP: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of the scores at queries i0 .. and keys j0 .. (which may be below 0): (BLOCK_M, BLOCK_N)."""
    first_q, n_q, first_k, n_k, offset = sequence(lengths, n)
    i, j = i0 + tl.arange(0, BLOCK_M), j0 + tl.arange(0, BLOCK_N)
    existing = tl.where(j < 0, n_k, j)  # rows() knows one bound only
    q_tile = rows(matrix(q, n, first_q, head, q_strides), i, q_strides[1], n_q, D, BLOCK_D, True)
    do = rows(matrix(dout, n, first_q, head, dout_strides), i, dout_strides[1], n_q, D_V, BLOCK_DV, True)
    kv_head = head // group
    keys = rows(matrix(k, n, first_k, kv_head, k_strides), existing, k_strides[1], n_k, D, BLOCK_D, True)
    values = rows(matrix(v, n, first_k, kv_head, v_strides), existing, v_strides[1], n_k, D_V, BLOCK_DV, True)
    slope = None
    if slopes is not None:
        slope = tl.load(slopes + n * slopes_stride + head)
    s, _ = scores(
        tl.dot(q_tile, tl.trans(keys), input_precision=PRECISION), i[:, None], existing[None, :], n, head, mask, bias,
        slope, mask_strides, bias_strides, scale, softcap, lengths, n_q, n_k, offset, band,
        MASK_AXES, BIAS_AXES, SOFTCAP, LEFT, RIGHT, True,
    )  # fmt: skip
    row = n.to(tl.int64) * lse_strides[0] + head.to(tl.int64) * lse_strides[1] + first_q
    row_delta = tl.load(delta + row + i, mask=i < n_q, other=0.0)
    keep = None
    if dropout[0] is not None:
        keep = kept_at(dropout, n, head, i, existing)
    row_lse = lse_of(lse + row, i, n_q)
    dp = tl.dot(do, tl.trans(values), input_precision=PRECISION)
    _, ds = weights_and_gradient(
        s, dp, row_lse[:, None], row_delta[:, None], keep, 1.0, dropout[2], dropout[0] is not None
    )
    return ds


@triton.jit(do_not_specialize=[*NOT_SPECIALIZED, "b"])
def bwd_bias(
    dbias, dbias_strides, b, dout, lse, delta, dout_strides, lse_strides,
    q, k, v, mask, bias, slopes, q_strides, k_strides, v_strides, mask_strides, bias_strides, slopes_stride,
    scale, softcap, dropout, lengths, band, heads, SUM_B: tl.constexpr, SUM_H: tl.constexpr,
    D: tl.constexpr, D_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, MASK_AXES: tl.constexpr, BIAS_AXES: tl.constexpr, SOFTCAP: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of the gradient of a bias that has the axes q and k, summed over the sequences and heads it has not."""
    h, group = heads
    left, right = band
    s_q, s_k = lengths[3], lengths[4]
    tiles_q, tiles_k = tl.cdiv(s_q, BLOCK_M), tl.cdiv(s_k, BLOCK_N)
    j0 = tl.program_id(0) % tiles_k * BLOCK_N
    i0 = tl.program_id(0) // tiles_k % tiles_q * BLOCK_M
    rest = tl.program_id(0) // tiles_k // tiles_q
    first_n, first_head, sequences, members = rest, rest, 1, 1
    if SUM_B and SUM_H:
        first_n, first_head, sequences, members = rest * 0, rest * 0, b, h
    elif SUM_B:
        first_n, sequences = rest * 0, b
    elif SUM_H:
        first_head, members = rest * 0, h
    else:
        first_n, first_head = rest // h, rest % h
    ds = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for index in tl.range(0, sequences * members):
        n, head = first_n + index // members, first_head + index % members
        _, n_q, _, n_k, offset = sequence(lengths, n)
        seen = (i0 < n_q) & (j0 < n_k)
        if LEFT:
            seen = seen & (j0 + BLOCK_N > i0 + offset - left)
        if RIGHT:
            seen = seen & (j0 < i0 + BLOCK_M + offset + right)
        if seen:
            ds += gradient_tile(
                dout, lse, delta, dout_strides, lse_strides, q, k, v, mask, bias, slopes, q_strides, k_strides,
                v_strides, mask_strides, bias_strides, slopes_stride, scale, softcap, dropout, lengths, band, group,
                n, head, i0, j0, D, D_V, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N,
                MASK_AXES, BIAS_AXES, SOFTCAP, LEFT, RIGHT, PRECISION,
            )  # fmt: skip
    i, j = i0 + tl.arange(0, BLOCK_M), j0 + tl.arange(0, BLOCK_N)
    stride_b, stride_h, stride_q, stride_k = dbias_strides
    place = dbias + first_n.to(tl.int64) * stride_b + first_head.to(tl.int64) * stride_h
    place += i.to(tl.int64)[:, None] * stride_q + j.to(tl.int64)[None, :] * stride_k
    tl.store(place, ds.to(dbias.dtype.element_ty), mask=(i < s_q)[:, None] & (j < s_k)[None, :])


@triton.jit(do_not_specialize=[*NOT_SPECIALIZED, "strips"])
def bwd_distance(
    sums, strips, dout, lse, delta, dout_strides, lse_strides,
    q, k, v, mask, bias, slopes, q_strides, k_strides, v_strides, mask_strides, bias_strides, slopes_stride,
    scale, softcap, dropout, lengths, band, heads,
    D: tl.constexpr, D_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, MASK_AXES: tl.constexpr, BIAS_AXES: tl.constexpr, SOFTCAP: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums of the scores' gradient by distance: sums (b, h, strips, 2 * BLOCK_N), from square tiles along a diagonal.

    Element u of strip t belongs to distance t * BLOCK_N + u - BLOCK_N - s_k: the diagonals of a square tile are nearly
    twice as many as its rows, so two strips, each in one half, have a part of a distance.
    """
    h, group = heads
    left, right = band
    strip = tl.program_id(0) % strips
    head = tl.program_id(0) // strips % h
    n = tl.program_id(0) // strips // h
    _, n_q, _, n_k, offset = sequence(lengths, n)
    to_key = strip * BLOCK_N + offset - lengths[4]  # from the first query of a tile to its first key
    r, u = tl.arange(0, BLOCK_M), tl.arange(0, 2 * BLOCK_N)
    column = u[None, :] - BLOCK_N + r[:, None]
    inside = (column >= 0) & (column < BLOCK_N)
    column = tl.where(inside, column, 0)
    total = tl.zeros([2 * BLOCK_N], tl.float32)
    begin = tl.maximum(1 - BLOCK_N - to_key, 0) // BLOCK_M * BLOCK_M
    end = tl.minimum(n_q, n_k - to_key)
    if LEFT:
        end = tl.where(to_key + BLOCK_N > offset - left, end, 0)
    if RIGHT:
        end = tl.where(to_key < BLOCK_M + offset + right, end, 0)
    for i0 in tl.range(begin, end, BLOCK_M):
        ds = gradient_tile(
            dout, lse, delta, dout_strides, lse_strides, q, k, v, mask, bias, slopes, q_strides, k_strides, v_strides,
            mask_strides, bias_strides, slopes_stride, scale, softcap, dropout, lengths, band, group,
            n, head, i0, i0 + to_key, D, D_V, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N,
            MASK_AXES, BIAS_AXES, SOFTCAP, LEFT, RIGHT, PRECISION,
        )  # fmt: skip
        total += tl.sum(tl.where(inside, tl.gather(ds, column, 1), 0.0), 0)
    tl.store(sums + tl.program_id(0).to(tl.int64) * (2 * BLOCK_N) + u, total)
