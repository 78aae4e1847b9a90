"""Attention over a cache in Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _triton
from .._precision import cuda_float32

MAX_HEAD_DIM = 256
MOST_SHARES = 32


def unsupported(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> str | None:
    reason = _triton.unsupported(q)
    if reason is None and max(q.size(3), v_cache.size(3)) > MAX_HEAD_DIM:
        reason = f"head sizes go up to {MAX_HEAD_DIM}, got {q.size(3)} and {v_cache.size(3)}"
    return reason


def tile(d: int, dtype: torch.dtype, rows: int) -> dict[str, int]:
    """BLOCK_M of the `rows` queries of a key head, and BLOCK_N keys: 16 KB of each 16-bit cache for every stage."""
    d = max(64, _triton.next_power_of_2(d))
    n = {64: 128, 128: 64, 256: 32}[d]
    if dtype == torch.float32:
        return {"BLOCK_M": 16, "BLOCK_N": n // 2, "num_warps": 4 if d == 64 and rows <= 16 else 8, "num_stages": 1}
    m = min(64, max(16, _triton.next_power_of_2(rows)))
    return {"BLOCK_M": m, "BLOCK_N": n, "num_warps": 8 if m == 64 and d > 64 else 4, "num_stages": 3}


def shares_of(span: int, chunks: int, block: int) -> tuple[int, int]:
    """How many keys a program takes of the `span` that a sequence may have, and how many programs share them.

    It depends on nothing that differs between the sequences of a batch, nor on the size of the batch: so a sequence has
    the same bits alone and in any batch. Many chunks of rows keep a GPU busy without sharing.
    """
    most = max(1, MOST_SHARES // chunks)
    share = max(1, _triton.ceil_div(_triton.ceil_div(span, most), block)) * block
    return share, max(1, _triton.ceil_div(span, share))


@_triton.op("attention_decode")
def _decode(
    q, k_cache, v_cache, kv_lengths, k_new, v_new, cos, sin, interleaved, block_table, scale, softcap, left,
    alibi_slopes, sink, k_scale, v_scale,
):  # fmt: skip
    from . import triton_kernels as kernels

    q = _dense(-q if scale < 0 else q)
    b, s_q, h, d = q.shape
    pages, page_size, h_kv, _ = k_cache.shape
    d_v = v_cache.shape[3]
    s_new = 0 if k_new is None else k_new.shape[1]
    capacity = page_size if block_table is None else page_size * block_table.shape[1] * min(pages, 1)
    out, lse = q.new_empty(b, s_q, h, d_v), q.new_empty(b, h, s_q, dtype=torch.float32)
    table_strides = (0, 0) if block_table is None else block_table.stride()
    cache = (block_table, *table_strides, pages, page_size, capacity)
    rotary = (None, None, 0, 0, 0) if cos is None else (cos, sin, cos.stride(0), sin.stride(0), cos.shape[0])
    lengths = (kv_lengths, s_q, s_new, left)
    strides = k_cache.stride()[:3], v_cache.stride()[:3], _strides(k_scale), _strides(v_scale)
    constants = {
        "D": d,
        "D_V": d_v,
        "BLOCK_D": max(16, _triton.next_power_of_2(d)),
        "BLOCK_DV": max(16, _triton.next_power_of_2(d_v)),
        "HALF": 0 if cos is None else cos.shape[1],
        "INTERLEAVED": interleaved,
    }
    precision = cuda_float32()
    new_rows = b * s_new * h_kv
    if new_rows:
        k_new, v_new = _dense(k_new), _dense(v_new)
        rows = max(1, 1024 // max(constants["BLOCK_D"], constants["BLOCK_DV"]))
        _triton.launch(
            kernels.append, (_triton.ceil_div(new_rows, rows),),
            k_cache, v_cache, k_scale, v_scale, k_new, v_new, *strides, k_new.stride()[:3], v_new.stride()[:3],
            cache, rotary, lengths, new_rows, h_kv, ROWS=rows, num_warps=4, **constants,
        )  # fmt: skip
    if not b * s_q * h:
        return out, lse
    group = h // h_kv
    options = tile(max(d, d_v), q.dtype, s_q * group)
    chunks = _triton.ceil_div(s_q * group, options["BLOCK_M"])
    span = capacity if left < 0 else min(capacity, left + s_q)
    share, shares = shares_of(span, chunks, options["BLOCK_N"])
    partial_out = q.new_empty(b, h, s_q, shares, d_v, dtype=torch.float32)
    partial_lse = q.new_empty(b, h, s_q, shares, dtype=torch.float32)
    _triton.launch(
        kernels.attend, (chunks * h_kv * b, shares),
        partial_out, partial_lse, q, k_cache, v_cache, k_scale, v_scale, alibi_slopes, q.stride()[:3], *strides,
        0 if alibi_slopes is None or alibi_slopes.dim() == 1 else h,
        cache, rotary, lengths, (h, group), abs(scale), softcap, share,
        SOFTCAP=softcap > 0, WINDOW=left >= 0, PRECISION=precision, **constants, **options,
    )  # fmt: skip
    _triton.launch(
        kernels.combine, (b * h * s_q,), out, lse, sink, partial_out, partial_lse, h, s_q, shares,
        D_V=d_v, BLOCK_DV=constants["BLOCK_DV"], BLOCK_SHARES=_triton.next_power_of_2(shares), num_warps=4,
    )  # fmt: skip
    return out, lse


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def _strides(x: Tensor | None) -> tuple[int, ...] | None:
    return None if x is None else x.stride()


def forward(q: Tensor, k_cache: Tensor, v_cache: Tensor, *arguments) -> tuple[Tensor, Tensor]:
    """out (b, s_q, h, d_v) and lse (b, h, s_q); `arguments` in the order of the schema."""
    return _decode(q, k_cache, v_cache, *arguments)
