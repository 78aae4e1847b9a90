"""Positions without rotation: sinusoids, tables that are added, slopes of ALiBi."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _dispatch
from .._checks import check_finite, check_floating
from ..embed.api import check_beside, check_length, index_shapes
from ..embed.autograd import BACKENDS, run


def sinusoidal(seq_len: int, d_model: int, *, device=None) -> Tensor:
    """The table of Vaswani et al. 2017 (arXiv:1706.03762), (seq_len, d_model) float32.

    Column 2 i is sin(position / 10000 ** (2 i / d_model)), column 2 i + 1 the cosine of the same angle; angles are
    float64.
    """
    for name, size in (("seq_len", seq_len), ("d_model", d_model)):
        if not isinstance(size, (int, torch.SymInt)) or size < 0:
            raise ValueError(f"{name} must be an integer >= 0, got {size!r}")
    position = torch.arange(seq_len, dtype=torch.float64, device=device)
    frequency = 10000.0 ** (-torch.arange(0, d_model, 2, dtype=torch.float64, device=device) / max(d_model, 1))
    angle = position[:, None] * frequency  # (seq_len, ceil(d_model / 2))
    return torch.stack((angle.sin(), angle.cos()), -1).flatten(1)[:, :d_model].float().contiguous()


def add_positions(
    x: Tensor, table: Tensor, *, positions: Tensor | None = None, scale: float = 1.0, backend: str | None = None
) -> Tensor:
    """x * scale + table[positions], in one pass.

    x: (b, s, d), or packed (t, d); float32, bfloat16, float16 or (on the CPU) float64; any strides on b and s
    table: (n, d), in x's dtype or, where that has 16 bits, float32
    positions: (s,), (1, s) or (b, s), packed (t,); int32 or int64; None is 0, 1, 2, ...
    backend: "native", "triton" or "reference"; None takes the first that can run this.

    Returns x's shape and dtype, summed in float32 (float64 for float64) and rounded once. Differentiable any number of
    times in x and table; tokens at the same position are added up in their order.

    Raises ValueError or TypeError for bad arguments, a position outside the table among them, NotImplementedError when
    `backend` cannot run them.
    """
    if check_floating("x", x).dim() not in (2, 3):
        raise ValueError(f"x must be (b, s, d) or (t, d), got {tuple(x.shape)}")
    check_beside("table", table, "positions", positions, index_shapes(x.shape[:-1]), "x", x)
    if positions is None:
        check_length("table", table, x.shape[-2])
    scale = check_finite("scale", scale)
    module = _dispatch.choose("add_positions", BACKENDS, backend, x)
    return run(module, x, scale, None, None, positions, table, None, None)


def alibi_slopes(num_heads: int, *, device=None) -> Tensor:
    """The slopes of ALiBi (Press et al. 2021, arXiv:2108.12409), (num_heads,) float32.

    For a power of two n: 2 ** (-8 / n), its square, its cube, ... Otherwise those of the power of two below, then every
    other one of the power of two above.
    """
    if not isinstance(num_heads, int) or num_heads < 1:
        raise ValueError(f"num_heads must be an integer >= 1, got {num_heads!r}")
    below = 2 ** (num_heads.bit_length() - 1)

    def slopes(n: int) -> Tensor:
        return 2.0 ** (-8.0 / n * torch.arange(1, n + 1, dtype=torch.float64, device=device))

    return torch.cat([slopes(below), slopes(2 * below)[::2][: num_heads - below]]).float()
