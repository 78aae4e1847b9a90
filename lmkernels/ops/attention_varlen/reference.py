"""The definition of attention over packed sequences: attention over the same sequences, padded."""

from __future__ import annotations

import torch
from torch import Tensor

from ..attention import reference as attention


def unsupported(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    return None


def places(cu_seqlens: Tensor, max_seqlen: int, t: int) -> tuple[Tensor, Tensor]:
    """Where token i of each sequence lies on the packed axis, t where there is none; and the lengths.

    (n, max_seqlen) and (n,), int64.
    """
    i = torch.arange(max_seqlen, device=cu_seqlens.device)
    place = cu_seqlens[:-1, None].long() + i
    exists = place < cu_seqlens[1:, None]
    return place.masked_fill(~exists, t), exists.sum(-1)


def pad(x: Tensor, place: Tensor) -> Tensor:
    """(t, h, d) as (n, max_seqlen, h, d), zeros where there is no token."""
    return torch.cat([x, x.new_zeros(1, *x.shape[1:])])[place]


def unpad(x: Tensor, place: Tensor, t: int, fill: float) -> Tensor:
    """(n, max_seqlen, ...) as (t, ...); what belongs to no sequence is `fill`."""
    return x.new_full((t + 1, *x.shape[2:]), fill).index_put((place,), x)[:t]


def weights(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    sink: Tensor | None,
    kv_lengths: Tensor | None,
    seed: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    left: int,
    right: int,
    scale: float,
    softcap: float,
    dropout_p: float = 0.0,
) -> Tensor:
    """The maps of the sequences before dropout, padded with zeros: (n, h, max_seqlen_q, max_seqlen_k)."""
    place_q, lengths_q = places(cu_seqlens_q, max_seqlen_q, q.shape[0])
    place_k, lengths_k = places(cu_seqlens_k, max_seqlen_k, k.shape[0])
    visible = lengths_k if kv_lengths is None else torch.minimum(lengths_k, kv_lengths)
    offset = (lengths_k - lengths_q)[:, None, None, None]
    exists = (place_q < q.shape[0])[:, None, :, None]  # (n, 1, max_seqlen_q, 1)
    mask = exists if mask is None else mask & exists
    padded = pad(q, place_q), pad(k, place_k)  # (n, max_seqlen, h, d)
    return attention.weights(
        *padded, mask, bias, alibi_slopes, sink, visible, None, left, right, offset, scale, softcap
    )


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    sink: Tensor | None,
    kv_lengths: Tensor | None,
    seed: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    left: int,
    right: int,
    scale: float,
    softcap: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """out (t_q, h, d_v) in q's dtype and lse (h, t_q); arguments as `attention_varlen` after its checks."""
    t_q, t_k = q.shape[0], k.shape[0]
    place_q, lengths_q = places(cu_seqlens_q, max_seqlen_q, t_q)
    place_k, lengths_k = places(cu_seqlens_k, max_seqlen_k, t_k)
    visible = lengths_k if kv_lengths is None else torch.minimum(lengths_k, kv_lengths)
    offset = (lengths_k - lengths_q)[:, None, None, None]
    padded = pad(q, place_q), pad(k, place_k), pad(v, place_k)  # (n, max_seqlen, h, d)
    features = mask, bias, alibi_slopes, sink, visible, seed, left, right, offset, scale, softcap, dropout_p
    out, lse = attention.forward(*padded, *features)
    lse = unpad(lse.transpose(1, 2), place_q, t_q, float("-inf"))  # (t_q, h)
    return unpad(out, place_q, t_q, 0.0), lse.T.contiguous()
