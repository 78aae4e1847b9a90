"""The checks of attention_decode's arguments: each raises an error that names the argument."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import FLOATS, check_device, check_floating, check_same_or_wider, check_tensor


def in_cache_dtype(q, k_cache, k_new, v_new):
    """Under autocast q, k_new and v_new in the dtype of the cache, or the autocast dtype for int8; else as they are."""
    if not (isinstance(q, Tensor) and isinstance(k_cache, Tensor)) or q.is_meta:
        return q, k_new, v_new
    if not torch.is_autocast_enabled(q.device.type):
        return q, k_new, v_new
    dtype = k_cache.dtype if k_cache.is_floating_point() else torch.get_autocast_dtype(q.device.type)
    return tuple(
        x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64 else x
        for x in (q, k_new, v_new)
    )


def check_cache(q, k_cache, v_cache, kv_lengths, block_table, k_scale, v_scale) -> tuple[int, int, int, int, int]:
    """b, s_q, h, d and the tokens that a sequence has room for."""
    try:
        b, s_q, h, d = q.shape
        n, length, h_kv, d_k = k_cache.shape
        n_v, length_v, h_v, d_v = v_cache.shape
        fits = (
            n == n_v
            and length == length_v
            and h_kv == h_v > 0
            and h % h_kv == 0
            and d == d_k > 0
            and d_v > 0
            and q.dtype == k_cache.dtype == v_cache.dtype
            and q.dtype in FLOATS
            and q.device == k_cache.device == v_cache.device == kv_lengths.device
            and k_cache.stride(3) == v_cache.stride(3) == 1
            and kv_lengths.dtype in (torch.int32, torch.int64)
            and kv_lengths.shape == (b,)
            and k_scale is v_scale is None
        )
    except (AttributeError, ValueError):
        fits = False
    if not fits:
        _explain_cache(q, k_cache, v_cache, kv_lengths, k_scale, v_scale)
        (b, s_q, h, d), (n, length) = q.shape, k_cache.shape[:2]
    if block_table is None:
        if n != b:
            raise ValueError(
                f"k_cache and v_cache must have q's batch size {b} (or come with a block_table), got "
                f"{tuple(k_cache.shape)}"
            )
        return b, s_q, h, d, length
    if check_tensor("block_table", block_table).dtype not in (torch.int32, torch.int64):
        raise TypeError(f"block_table must be int32 or int64, got {block_table.dtype}")
    if block_table.dim() != 2 or block_table.shape[0] != b:
        raise ValueError(f"block_table must be (b, max_blocks) with b = {b}, got {tuple(block_table.shape)}")
    check_device("block_table", block_table, "q", q)
    if length == 0:
        raise ValueError(f"a page of k_cache must hold at least one token, got k_cache {tuple(k_cache.shape)}")
    return b, s_q, h, d, block_table.shape[1] * length


def _explain_cache(q, k_cache, v_cache, kv_lengths, k_scale, v_scale) -> None:
    """Raises the error of arguments that do not fit together; returns where they do after all (int8, no heads)."""
    for name, x in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        if check_tensor(name, x).dim() != 4:
            raise ValueError(f"{name} must have 4 axes, got {tuple(x.shape)}")
    check_floating("q", q)
    int8 = k_cache.dtype == torch.int8
    for name, x in (("k_cache", k_cache), ("v_cache", v_cache)):
        if x.dtype != (torch.int8 if int8 else q.dtype):
            wanted = "int8, as k_cache is" if int8 else f"{q.dtype}, as q is, or int8 like the other cache"
            raise TypeError(f"{name} must be {wanted}, got {x.dtype}")
        check_device(name, x, "q", q)
        if x.stride(3) != 1 and x.shape[3] > 1:
            raise ValueError(f"{name} must be contiguous in its last axis, got strides {x.stride()}")
    b, _, h, d = q.shape
    h_kv = k_cache.shape[2]
    if k_cache.shape[3] != d:
        raise ValueError(f"k_cache must have q's head size {d}, got k_cache {tuple(k_cache.shape)}")
    if d == 0 or v_cache.shape[3] == 0:
        raise ValueError(f"head sizes must be at least 1, got {d} and {v_cache.shape[3]}")
    if v_cache.shape[:3] != k_cache.shape[:3]:
        raise ValueError(
            f"v_cache must have k_cache's first three axes, got {tuple(v_cache.shape)} with {tuple(k_cache.shape)}"
        )
    if (h_kv == 0 and h > 0) or (h_kv > 0 and h % h_kv):
        raise ValueError(f"the number of heads of q must be a multiple of the cache's, got {h} and {h_kv}")
    if check_tensor("kv_lengths", kv_lengths).dtype not in (torch.int32, torch.int64):
        raise TypeError(f"kv_lengths must be int32 or int64, got {kv_lengths.dtype}")
    if tuple(kv_lengths.shape) != (b,):
        raise ValueError(f"kv_lengths must be (b,) = {(b,)}, got {tuple(kv_lengths.shape)}")
    check_device("kv_lengths", kv_lengths, "q", q)
    _check_scales(q, k_cache, k_scale, v_scale)


def _check_scales(q, k_cache, k_scale, v_scale) -> None:
    if k_cache.dtype != torch.int8:
        if k_scale is not None or v_scale is not None:
            name = "k_scale" if k_scale is not None else "v_scale"
            raise ValueError(f"{name} must be None: it belongs to a cache of int8, and k_cache is {k_cache.dtype}")
        return
    if q.dtype == torch.float64:
        raise TypeError("q must be float32, bfloat16 or float16 with a cache of int8, got torch.float64")
    for name, x in (("k_scale", k_scale), ("v_scale", v_scale)):
        if x is None:
            raise ValueError(f"{name} must be given with a cache of int8: float32 {tuple(k_cache.shape[:3])}")
        if check_tensor(name, x).dtype != torch.float32:
            raise TypeError(f"{name} must be float32, got {x.dtype}")
        if x.shape != k_cache.shape[:3]:
            raise ValueError(f"{name} must be {tuple(k_cache.shape[:3])}, one per row of k_cache, got {tuple(x.shape)}")
        check_device(name, x, "q", q)


def check_new(q, k_cache, v_cache, k_new, v_new, capacity: int) -> int:
    """s_new, 0 without new tokens."""
    if k_new is None and v_new is None:
        return 0
    try:
        b, s_new, h_kv, d = k_new.shape
        fits = (
            k_new.dtype == v_new.dtype == q.dtype
            and k_new.device == v_new.device == q.device
            and b == q.shape[0]
            and h_kv == k_cache.shape[2]
            and d == k_cache.shape[3]
            and v_new.shape == (b, s_new, h_kv, v_cache.shape[3])
        )
    except (AttributeError, ValueError):
        fits = False
    if not fits:
        _explain_new(q, k_cache, v_cache, k_new, v_new)
        b, s_new = k_new.shape[:2]
    if s_new > capacity and b > 0:
        raise ValueError(f"k_new holds {s_new} tokens, and a sequence of the cache has room for {capacity}")
    for name, x in (("k_cache", k_cache), ("v_cache", v_cache)):
        strides = x.stride()
        if 0 in strides and any(n > 1 and stride == 0 for n, stride in zip(x.shape[:3], strides[:3], strict=True)):
            raise ValueError(f"{name} must not be expanded: its rows share memory, and k_new is written to it")
    return s_new


def _explain_new(q, k_cache, v_cache, k_new, v_new) -> None:
    """Raises the error of new tokens that do not fit the cache."""
    if k_new is None or v_new is None:
        name, other = ("k_new", "v_new") if k_new is None else ("v_new", "k_new")
        raise ValueError(f"{name} must be given with {other}")
    b, h_kv = q.shape[0], k_cache.shape[2]
    for name, x, cache in (("k_new", k_new, k_cache), ("v_new", v_new, v_cache)):
        if check_tensor(name, x).dtype != q.dtype:
            raise TypeError(f"{name} must have q's dtype {q.dtype}, got {x.dtype}")
        check_device(name, x, "q", q)
        if x.dim() != 4 or x.shape[0] != b or x.shape[2] != h_kv or x.shape[3] != cache.shape[3]:
            raise ValueError(
                f"{name} must be (b, s_new, h_kv, d) with b = {b}, h_kv = {h_kv}, d = {cache.shape[3]}, got "
                f"{tuple(x.shape)}"
            )
    if v_new.shape[1] != k_new.shape[1]:
        raise ValueError(f"v_new must have k_new's {k_new.shape[1]} tokens, got {tuple(v_new.shape)}")


def check_tables(q, cos, sin) -> tuple[Tensor | None, Tensor | None]:
    """cos and sin, contiguous in the last axis."""
    if cos is None and sin is None:
        return None, None
    for name, x, other in (("cos", cos, "sin"), ("sin", sin, "cos")):
        if x is None:
            raise ValueError(f"{name} must be given with {other}")
        check_same_or_wider(name, check_floating(name, x), q)
        check_device(name, x, "q", q)
        if x.dim() != 2 or x.shape[0] == 0 or not 1 <= x.shape[1] <= q.shape[3] // 2:
            raise ValueError(
                f"{name} must be (max_pos, d_rot / 2) with d_rot / 2 from 1 to {q.shape[3] // 2}, got {tuple(x.shape)}"
            )
    if sin.shape != cos.shape or sin.dtype != cos.dtype:
        raise ValueError(
            f"sin must have cos' shape {tuple(cos.shape)} and dtype {cos.dtype}, got {tuple(sin.shape)}, {sin.dtype}"
        )
    if cos.stride(1) != 1 or sin.stride(1) != 1:
        cos, sin = cos.contiguous(), sin.contiguous()
    return cos, sin


def check_values(k_cache, kv_lengths, block_table, s_q, s_new, capacity, cos, left) -> None:
    """The values of kv_lengths and block_table, against the room in the cache and in the tables."""
    lengths = kv_lengths.tolist()
    if not lengths:
        return
    low, high = min(lengths), max(lengths)
    if low < 0 or high + s_new > capacity:
        room = f"{capacity} - s_new = {capacity - s_new}" if s_new else f"{capacity}"
        raise ValueError(
            f"kv_lengths must lie between 0 and the cache's room for a sequence, {room}, got values from {low} to "
            f"{high}"
        )
    total = high + s_new
    if cos is not None and total > cos.shape[0]:
        raise ValueError(f"cos and sin must have a row per position, {total} or more, got {tuple(cos.shape)}")
    if block_table is not None and total > 0:
        _check_pages(k_cache, lengths, block_table, s_q, s_new, left)


def _check_pages(k_cache, lengths, block_table, s_q, s_new, left) -> None:
    pages, size = k_cache.shape[:2]
    low, high = torch.aminmax(block_table[:, : -(-(max(lengths) + s_new) // size)])
    if low < 0 or high >= pages:
        for sequence, (length, row) in enumerate(zip(lengths, block_table.tolist(), strict=True)):
            total = length + s_new
            seen = 0 if left < 0 else max(0, total - s_q - left)
            for block in range(min(seen, length if s_new else seen) // size, -(-total // size)):
                if not 0 <= row[block] < pages:
                    raise ValueError(
                        f"block_table must hold page numbers from 0 to {pages - 1} for the {total} tokens of sequence "
                        f"{sequence}, got {row[block]} at [{sequence}, {block}]"
                    )
    if s_new > 0 and len(lengths) > 1:
        rows = [row.tolist() for row in block_table] if s_new > 1 else None
        if rows is None:
            last = torch.tensor([length // size for length in lengths])
            written = block_table[torch.arange(len(lengths)), last].tolist()
            slots = [page * size + length % size for page, length in zip(written, lengths, strict=True)]
        else:
            slots = [
                row[j // size] * size + j % size
                for row, length in zip(rows, lengths, strict=True)
                for j in range(length, length + s_new)
            ]
        if len(set(slots)) < len(slots):
            raise ValueError(
                "block_table must give each sequence pages of its own where k_new is written, got the same token for "
                "two of them"
            )
