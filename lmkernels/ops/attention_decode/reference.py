"""The definition of attention over a cache in plain torch: any float dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from ..attention import reference as attention
from ..rotary import reference as rotary


def unsupported(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> str | None:
    return None


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (..., d) as int8 (..., d) times a scale (...,) in float32."""
    x = x.float()
    scale = x.abs().amax(-1) / 127
    scale = scale.masked_fill(~scale.isfinite(), torch.nan)
    return torch.round(x / scale[..., None]).nan_to_num(0.0).to(torch.int8), scale


def forward(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    kv_lengths: Tensor,
    k_new: Tensor | None,
    v_new: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
    block_table: Tensor | None,
    scale: float,
    softcap: float,
    left: int,
    alibi_slopes: Tensor | None,
    sink: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """out (b, s_q, h, d_v) in q's dtype and lse (b, h, s_q); arguments as `attention_decode` after its checks."""
    b, s_q, _, _ = q.shape
    dtype, device = q.dtype, q.device
    acc = torch.promote_types(dtype, torch.float32)
    s_new = 0 if k_new is None else k_new.shape[1]
    size = k_cache.shape[1]
    capacity = size if block_table is None else size * block_table.shape[1] * min(k_cache.shape[0], 1)
    before = kv_lengths.long().clamp(0, max(capacity - s_new, 0))
    total = before + s_new  # (b,)

    def where(positions: Tensor) -> tuple[Tensor, Tensor]:
        """The first two indices of the cache's rows at positions (b, n)."""
        if block_table is None:
            return torch.arange(b, device=device)[:, None].expand_as(positions), positions
        pages = block_table.long().gather(1, positions // size)
        return pages.clamp(0, k_cache.shape[0] - 1), positions % size

    if s_new > 0:
        positions = before[:, None] + torch.arange(s_new, device=device)  # (b, s_new)
        if cos is not None:
            k_new = rotary.forward(k_new.to(acc), cos, sin, positions, interleaved)
        for cache, scales, new in ((k_cache, k_scale, k_new), (v_cache, v_scale, v_new)):
            if scales is None:
                cache.index_put_(where(positions), new.to(cache.dtype))
            else:
                integers, new_scales = quantise(new)
                cache.index_put_(where(positions), integers)
                scales.index_put_(where(positions), new_scales)
    diagonal = (total - s_q)[:, None] + torch.arange(s_q, device=device)  # (b, s_q): the positions of the queries
    if cos is not None:
        # a query that precedes its sequence sees nothing, whatever its angle
        q = rotary.forward(q.to(acc), cos, sin, diagonal.clamp(0, cos.shape[0] - 1), interleaved)

    j = torch.arange(capacity, device=device)
    distance = diagonal[:, None, :, None] - j  # (b, 1, s_q, capacity)
    visible = distance >= 0
    if left >= 0:
        visible = visible & (distance <= left)
    # what no query sees may be memory that nobody has written yet, and 0 * NaN is NaN
    unseen = ~visible.any(2)[:, 0, :, None, None]  # (b, capacity, 1, 1)
    rows = where(j.expand(b, capacity))
    k, v = (
        (cache[rows].to(acc) * (1 if scales is None else scales[rows][..., None])).masked_fill(unseen, 0.0)
        for cache, scales in ((k_cache, k_scale), (v_cache, v_scale))
    )  # (b, capacity, h_kv, d)
    bias = None
    if alibi_slopes is not None:
        slopes = alibi_slopes.reshape(-1, q.shape[2], 1, 1)  # (b or 1, h, 1, 1)
        bias = -slopes * distance.abs()
    out, lse = attention.forward(q.to(acc), k, v, visible, bias, None, sink, None, None, -1, -1, 0, scale, softcap, 0.0)
    return out.to(dtype), lse
