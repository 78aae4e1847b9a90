"""RotaryEmbedding."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..ops.rotary import rotary, rotary_tables


class RotaryEmbedding(torch.nn.Module):
    """Rotates queries and keys by their positions (Su et al. 2021, arXiv:2104.09864).

    dim: even, how many columns of a head are rotated; the others are passed through
    max_positions: how many positions the tables hold to begin with. Longer sequences make them grow, though not inside
        torch.compile, where the tables cannot change.
    base, scaling: as in `lmkernels.rotary_tables`. Of "dynamic" and "longrope", whose frequencies depend on the length,
        the tables are those of the call's sequence, or of max_positions where that is longer.
    interleaved: pairs of columns are (2 i, 2 i + 1), else (i, i + dim / 2)

    The tables are buffers that are not saved. They stay float32 whatever dtype the module is moved to: a cosine of
    16 bits would not tell neighbouring positions apart.
    """

    def __init__(
        self,
        dim: int,
        *,
        max_positions: int,
        base: float = 10000.0,
        scaling: Mapping | None = None,
        interleaved: bool = False,
        device=None,
    ):
        super().__init__()
        self.dim, self.max_positions, self.base = dim, max_positions, base
        self.scaling, self.interleaved = None if scaling is None else dict(scaling), interleaved
        rope_type = (self.scaling or {}).get("rope_type", (self.scaling or {}).get("type"))
        self._depends_on_length = rope_type in ("dynamic", "longrope")
        self.register_buffer("cos", None, persistent=False)
        self.register_buffer("sin", None, persistent=False)
        self._build(max_positions, device)

    def forward(self, q: Tensor, k: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """q (b, s, h, d) and k (b, s, h_kv, d), rotated.

        positions: (s,), (1, s) or (b, s), int32 or int64; None is 0, 1, 2, ...
        """
        if not torch.compiler.is_compiling():
            self._fit(q, k, positions)
        return tuple(rotary(x, self.cos, self.sin, interleaved=self.interleaved, positions=positions) for x in (q, k))

    def _fit(self, q: Tensor, k: Tensor, positions: Tensor | None) -> None:
        """Makes the tables as long as this call needs them."""
        if positions is None:
            needed = max(q.shape[-3], k.shape[-3])
        else:
            needed = int(positions.max()) + 1 if positions.numel() else 0
        rows = self.cos.shape[0]
        if self._depends_on_length:
            needed = max(needed, self.max_positions)
        else:
            needed = rows if needed <= rows else max(needed, 2 * rows)
        if needed != rows:
            self._build(needed, self.cos.device)

    def _build(self, rows: int, device) -> None:
        self.cos, self.sin = rotary_tables(rows, self.dim, base=self.base, scaling=self.scaling, device=device)

    def _apply(self, fn, recurse=True):
        """What to(), half(), to_empty() and the like call: the tables follow to the device alone."""
        before = self.cos
        super()._apply(fn, recurse)
        if self.cos.dtype != torch.float32 or (before.is_meta and not self.cos.is_meta):
            self._build(self.cos.shape[0], self.cos.device)
        return self

    def extra_repr(self) -> str:
        scaling = "" if self.scaling is None else f", scaling={self.scaling}"
        return (
            f"{self.dim}, max_positions={self.max_positions}, base={self.base}{scaling}, interleaved={self.interleaved}"
        )
