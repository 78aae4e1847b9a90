"""Philox-4x32-10, the counter-based generator behind dropout.

Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", doi:10.1145/2063384.2063405.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def _multiply(a: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a * m; a holds unsigned 32-bit values in int64."""
    product = a * m  # wraps modulo 2^64, which keeps all 64 bits
    return (product >> 32) & _MASK, product & _MASK


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four random 32-bit words for every counter.

    counter: four int64 tensors that broadcast together, values in [0, 2^32)
    seed: () int64; its low and high halves are the key
    Returns four int64 tensors with values in [0, 2^32).
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        h0, l0 = _multiply(c0, 0xD2511F53)
        h1, l1 = _multiply(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = h1 ^ c1 ^ k0, l1, h0 ^ c3 ^ k1, l0
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


def dropout_threshold(dropout_p: float) -> int:
    """A weight is dropped when its 32-bit word is below this."""
    return min(int(dropout_p * 2.0**32), _MASK)


def attention_keep(seed: Tensor, b: int, h: int, s_q: int, s_k: int, dropout_p: float) -> Tensor:
    """(b, h, s_q, s_k) bool: which attention weights dropout keeps.

    The word of weight (b, h, i, j) is word j % 4 of philox(counter=(j // 4, i, h, b), key=seed).
    """
    device = seed.device
    quads = torch.arange((s_k + 3) // 4, device=device)
    rows = torch.arange(s_q, device=device)[:, None]
    heads = torch.arange(h, device=device)[:, None, None]
    batch = torch.arange(b, device=device)[:, None, None, None]
    words = torch.stack(philox((quads, rows, heads, batch), seed), dim=-1)  # (b, h, s_q, ceil(s_k / 4), 4)
    return words.flatten(-2)[..., :s_k] >= dropout_threshold(dropout_p)  # (b, h, s_q, s_k)
