"""The definition of softmax attention in plain torch: any float dtype, differentiable any number of times."""

from __future__ import annotations

import torch
from torch import Tensor

from ..philox import attention_keep


def unsupported(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    return None


def visible_keys(s_q: int, s_k: int, left: int, right: int, offset: int | Tensor, device) -> Tensor | None:
    """(s_q, s_k) bool, True where i + offset - left <= j <= i + offset + right; None when both are unbounded (-1).

    An offset per sequence, (b, 1, 1, 1), gives (b, 1, s_q, s_k).
    """
    if left < 0 and right < 0:
        return None
    diagonal = torch.arange(s_q, device=device)[:, None] + offset
    j = torch.arange(s_k, device=device)
    visible = torch.ones(s_q, s_k, dtype=torch.bool, device=device)
    if left >= 0:
        visible = visible & (j >= diagonal - left)
    if right >= 0:
        visible = visible & (j <= diagonal + right)
    return visible


def expanded(bias: Tensor, s_q: int, s_k: int, offset) -> Tensor:
    """A bias by distance (1, h, 1, s_q + s_k), as of `RelativeBias`, for every query and key: (1 or b, h, s_q, s_k).

    offset: int, or (b, 1, 1, 1) of sequences shorter than s_q and s_k; what lies beyond them is anything.
    """
    i, j = torch.arange(s_q, device=bias.device)[:, None], torch.arange(s_k, device=bias.device)
    place = (j - i - offset + s_k).clamp(0, s_q + s_k - 1)  # (s_q, s_k) or (b, 1, s_q, s_k)
    by_head = bias[0, :, 0]  # (h, s_q + s_k)
    return by_head[:, place][None] if place.dim() == 2 else by_head[:, place[:, 0]].transpose(0, 1)


def scores_and_visible(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    kv_lengths: Tensor | None,
    left: int,
    right: int,
    offset: int | Tensor,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """Scores (b, h, s_q, s_k), -inf where a key is hidden, and the boolean map of what is seen."""
    b, s_q, h, _ = q.shape
    s_k, h_kv = k.shape[1:3]
    group = h // max(h_kv, 1)
    acc = torch.float64 if q.dtype == torch.float64 else torch.float32
    grouped = q.to(acc).unflatten(2, (h_kv, group))  # (b, s_q, h_kv, g, d)
    scores = torch.einsum("bqngd,bknd->bngqk", grouped, k.to(acc)).flatten(1, 2) * scale  # (b, h, s_q, s_k)
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        diagonal = torch.arange(s_q, device=q.device)[:, None] + offset
        distance = (diagonal - torch.arange(s_k, device=q.device)).abs().to(acc)  # (..., s_q, s_k)
        scores = scores - alibi_slopes.to(acc).reshape(-1, h, 1, 1) * distance
    if bias is not None:
        scores = scores + (bias if bias.shape[-1] in (1, s_k) else expanded(bias, s_q, s_k, offset)).to(acc)
    visible = scores != float("-inf")
    if mask is not None:
        visible = visible & mask
    band = visible_keys(s_q, s_k, left, right, offset, q.device)
    if band is not None:
        visible = visible & band
    if kv_lengths is not None:
        visible = visible & (torch.arange(s_k, device=q.device) < kv_lengths.reshape(b, 1, 1, 1))
    return scores.masked_fill(~visible, float("-inf")), visible


def weights_and_lse(scores: Tensor, visible: Tensor, sink: Tensor | None) -> tuple[Tensor, Tensor]:
    """Softmax over the last axis with the sink in the denominator: weights (b, h, s_q, s_k), lse (b, h, s_q)."""
    seen = visible.any(-1)  # (b, h, s_q)
    m = scores.detach().amax(-1) if scores.shape[-1] > 0 else torch.full_like(seen, float("-inf"), dtype=scores.dtype)
    if sink is not None:
        sink = sink.to(scores.dtype)[:, None]  # (h, 1)
        m = torch.maximum(m, sink.detach())
    m = m.masked_fill(~seen, 0.0)
    # where, not masked_fill on exp: the gradient of a hidden score stays 0 however often it is differentiated
    e = torch.where(visible, torch.exp(torch.where(visible, scores, 0.0) - m[..., None]), 0.0)
    l = e.sum(-1)
    if sink is not None:
        l = l + torch.exp(sink - m)
    l = torch.where(seen, l, 1.0)
    lse = torch.where(seen, m + torch.log(l), float("-inf"))
    return e / l[..., None], lse


def weights(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    sink: Tensor | None,
    kv_lengths: Tensor | None,
    seed: Tensor | None,
    left: int,
    right: int,
    offset: int | Tensor,
    scale: float,
    softcap: float,
    dropout_p: float = 0.0,
) -> Tensor:
    """The attention map before dropout, (b, h, s_q, s_k) in q's dtype; arguments as in `forward`."""
    with torch.autocast(q.device.type, enabled=False):
        scores, visible = scores_and_visible(
            q, k, mask, bias, alibi_slopes, kv_lengths, left, right, offset, scale, softcap
        )
        return weights_and_lse(scores, visible, sink)[0].to(q.dtype)


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
    left: int,
    right: int,
    offset: int | Tensor,
    scale: float,
    softcap: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """out (b, s_q, h, d_v) in q's dtype and lse (b, h, s_q); arguments as `attention` after its checks.

    offset: s_k - s_q, or one per sequence, (b, 1, 1, 1), where these end before s_q and s_k.
    """
    b, s_q, h, _ = q.shape
    s_k, h_kv = k.shape[1:3]
    if kv_lengths is not None:
        # what lies beyond a length may be memory that nobody has written yet, and 0 * NaN is NaN
        beyond = (torch.arange(s_k, device=q.device) >= kv_lengths[:, None])[..., None, None]  # (b, s_k, 1, 1)
        k, v = k.masked_fill(beyond, 0.0), v.masked_fill(beyond, 0.0)
    with torch.autocast(q.device.type, enabled=False):
        scores, visible = scores_and_visible(
            q, k, mask, bias, alibi_slopes, kv_lengths, left, right, offset, scale, softcap
        )
        p, lse = weights_and_lse(scores, visible, sink)
        if dropout_p > 0:
            keep = attention_keep(seed, b, h, s_q, s_k, dropout_p)
            p = torch.where(keep, p / (1 - dropout_p) if dropout_p < 1 else 0.0, 0.0)
        grouped = p.unflatten(1, (h_kv, h // max(h_kv, 1)))  # (b, h_kv, g, s_q, s_k)
        out = torch.einsum("bngqk,bknd->bqngd", grouped, v.to(p.dtype)).flatten(2, 3)  # (b, s_q, h, d_v)
    return out.to(q.dtype), lse
