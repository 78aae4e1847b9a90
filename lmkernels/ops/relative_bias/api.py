"""The relative position bias of T5 (Raffel et al. 2020, arXiv:1910.10683): expanded, and as attention takes it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._checks import check_floating
from ..embed.api import embed


def relative_bias(table: Tensor, s_q: int, s_k: int, *, bidirectional: bool, max_distance: int) -> Tensor:
    """table[bucket(j - i)] for every query i and key j, (1, h, s_q, s_k) in table's dtype.

    table: (num_buckets, h); float32, bfloat16, float16 or float64
    bidirectional: keys before and after the query have buckets of their own; else all after it share bucket 0.
    max_distance: from there on, all distances share a bucket. Half of the buckets of a direction are for the distances
        0, 1, 2, ... themselves, the others grow with the logarithm.
    The last query stands at the last key: query i counts as i + s_k - s_q, as in `attention`.

    Differentiable in table. `attention` needs no expanded bias: `RelativeBias` costs neither memory nor gradients of
    the size of the scores.

    Raises ValueError or TypeError for bad arguments.
    """
    for name, size in (("s_q", s_q), ("s_k", s_k)):
        if not isinstance(size, (int, torch.SymInt)) or size < 0:
            raise ValueError(f"{name} must be an integer >= 0, got {size!r}")
    bias = RelativeBias(table, bidirectional=bidirectional, max_distance=max_distance)
    by_distance = bias.by_distance(s_q, s_k)[0, :, 0]  # (h, s_q + s_k)
    # a row of the bias is a window of s_k distances, which begins one to the left for each query further on
    windows = by_distance[:, 1:].unfold(1, s_k, 1) if s_q > 0 else by_distance.new_empty(table.shape[1], 0, s_k)
    return windows.flip(1)[None]


class RelativeBias:
    """The relative position bias of T5 as a `bias` for `attention`: its table, never expanded.

    table, bidirectional, max_distance: as in `relative_bias`. The gradient goes to table.
    """

    def __init__(self, table: Tensor, *, bidirectional: bool, max_distance: int):
        if check_floating("table", table).dim() != 2:
            raise ValueError(f"table must be (num_buckets, h), got {tuple(table.shape)}")
        per_direction = table.shape[0] // (2 if bidirectional else 1)
        if per_direction < 2:
            raise ValueError(
                f"table must have at least {4 if bidirectional else 2} buckets, got {table.shape[0]} with "
                f"bidirectional={bool(bidirectional)}"
            )
        if not isinstance(max_distance, (int, torch.SymInt)) or max_distance <= per_direction // 2:
            raise ValueError(
                f"max_distance must be an integer above {per_direction // 2}, the number of distances with a bucket of "
                f"their own, got {max_distance!r}"
            )
        self.table, self.bidirectional, self.max_distance = table, bool(bidirectional), max_distance

    def __repr__(self) -> str:
        return (
            f"RelativeBias(table {tuple(self.table.shape)} {self.table.dtype}, bidirectional={self.bidirectional}, "
            f"max_distance={self.max_distance})"
        )

    def by_distance(self, s_q: int, s_k: int, dtype: torch.dtype | None = None) -> Tensor:
        """The bias of each distance from -s_k to s_q - 1 of a key from its query, (1, h, 1, s_q + s_k).

        The distance of key j from query i is j - (i + s_k - s_q); -s_k itself does not occur.
        """
        distance = torch.arange(-s_k, s_q, device=self.table.device)
        buckets = relative_buckets(distance, self.bidirectional, self.table.shape[0], self.max_distance)
        table = self.table if dtype is None else self.table.to(dtype)
        return embed(buckets, table).t().contiguous()[None, :, None]


def relative_buckets(distance: Tensor, bidirectional: bool, num_buckets: int, max_distance: int) -> Tensor:
    """The bucket of each distance j - i: int64, in [0, num_buckets).

    In float32 and in the order of T5's own code, as borders between buckets hang on the last bit of a logarithm.
    """
    first = 0
    if bidirectional:
        num_buckets //= 2
        first = (distance > 0).long() * num_buckets
        distance = distance.abs()
    else:
        distance = -distance.clamp(max=0)
    exact = num_buckets // 2
    steps = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact) * (num_buckets - exact)
    logarithmic = (exact + steps.long()).clamp(max=num_buckets - 1)
    return first + torch.where(distance < exact, distance, logarithmic)
