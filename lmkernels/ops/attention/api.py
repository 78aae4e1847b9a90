"""Softmax attention: the public functions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import _dispatch
from .._checks import autocast, check_same_or_wider
from ..relative_bias import RelativeBias
from . import native, reference
from .autograd import BACKENDS, run
from .checks import (
    NO_OPTIONS,
    check_broadcast,
    check_dropout,
    check_features,
    check_qkv,
    check_scale,
    check_softcap,
    check_window,
    seed_tensor,
)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    scale: float | None = None,
    softcap: float = 0.0,
    mask: Tensor | None = None,
    bias: Tensor | RelativeBias | None = None,
    alibi_slopes: Tensor | None = None,
    sink: Tensor | None = None,
    kv_lengths: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention, softmax(scale * q k^T + bias) v, without storing the scores.

    q: (b, s_q, h, d)      queries, float32, bfloat16, float16 or (on the CPU) float64
    k: (b, s_k, h_kv, d)   keys; h must be a multiple of h_kv, query head i reads key head i // (h // h_kv)
    v: (b, s_k, h_kv, d_v) values
    Any strides on b, s and h are read as they are.

    causal: query i sees keys j <= i + s_k - s_q (aligned to the bottom right).
        For s_q = 2, s_k = 4:   1 1 1 0      For s_q = 4, s_k = 2:   0 0
                                1 1 1 1                              0 0
                                                                     1 0
                                                                     1 1
    window: (left, right), inclusive, counted from the aligned diagonal j = i + s_k - s_q; -1 is unbounded.
    scale: factor on q k^T, default 1 / sqrt(d).
    softcap: c > 0 replaces a scaled score x by c * tanh(x / c).
    mask: bool, True = may attend; broadcasts to (b, h, s_q, s_k).
    bias: float, added to the scaled, soft-capped scores; broadcasts to (b, h, s_q, s_k) and is never expanded. Or a
        `RelativeBias`, T5's by distance, whose gradient goes to its table.
    alibi_slopes: (h,) or (b, h); adds -slope * |i + s_k - s_q - j| (Press et al. 2021, arXiv:2108.12409).
    sink: (h,), a logit that joins the softmax's denominator only.
    kv_lengths: (b,) int32 or int64; keys at and after the length are hidden.
    dropout_p: probability of dropping an attention weight; the others are divided by 1 - dropout_p.
    seed: what dropout draws from (Philox-4x32-10 keyed by seed, b, h, i, j); None draws one from torch's generator.
    return_lse: also return the natural logarithm of the softmax's denominator, the sink included.
    deterministic: gradients are bit-identical from run to run and for any number of threads.
    backend: "native", "triton" or "reference"; None takes the first that can run this.

    Returns (b, s_q, h, d_v) in q's dtype, and lse (b, h, s_q) in float32 (float64 for float64) on request.
    Differentiable in q, k, v, bias, alibi_slopes and sink, through lse too; twice by recomputation through the
    reference. Sums and exponentials are float32 (float64 for float64); factors in float32 keep their digits, unless
    `torch.set_float32_matmul_precision` allows fewer where that is faster. A query that sees no key gets zeros, zero
    gradients and lse = -inf.

    Raises ValueError or TypeError for bad arguments, NotImplementedError when `backend` cannot run them.

    Dao et al. 2022, arXiv:2205.14135; Dao 2023, arXiv:2307.08691.
    """
    q, k, v = autocast(q, k, v)
    b, s_q, h, d, s_k = check_qkv(q, k, v)
    left, right = check_window(window, causal)
    options = check_features(q, b, h, s_q, s_k, mask, bias, alibi_slopes, sink, kv_lengths)
    scale = check_scale(scale, d)
    softcap = check_softcap(softcap)
    dropout_p = check_dropout(dropout_p, seed)
    module = _dispatch.choose("attention", BACKENDS, backend, q, k, v)
    if module is native and options is NO_OPTIONS and left == -1 and softcap == 0.0 and dropout_p == 0.0:
        features = right, s_k - s_q, scale
    else:
        features = *options, seed_tensor(dropout_p, seed, q), left, right, s_k - s_q, scale, softcap, dropout_p
    out, lse = run(module, q, k, v, features, deterministic)
    return (out, lse) if return_lse else out


def attention_weights(
    q: Tensor,
    k: Tensor,
    *,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    scale: float | None = None,
    softcap: float = 0.0,
    mask: Tensor | None = None,
    bias: Tensor | RelativeBias | None = None,
    alibi_slopes: Tensor | None = None,
    sink: Tensor | None = None,
    kv_lengths: Tensor | None = None,
) -> Tensor:
    """The attention map itself, for looking at: softmax of the scores of `attention` with the same arguments.

    q: (b, s_q, h, d), k: (b, s_k, h_kv, d). Returns (b, h, s_q, s_k) in q's dtype, differentiable; rows sum to 1
    (less with a sink), and to 0 where a query sees no key. Takes the memory of the map, in float32.
    """
    q, k = autocast(q, k)
    b, s_q, h, d, s_k = check_qkv(q, k, k)
    left, right = check_window(window, causal)
    options = check_features(q, b, h, s_q, s_k, mask, bias, alibi_slopes, sink, kv_lengths)
    band = left, right, s_k - s_q
    return reference.weights(q, k, *options, None, *band, check_scale(scale, d), check_softcap(softcap))


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`, with its signature, layout and meanings.

    query: (..., h, s_q, d), key: (..., h_kv, s_k, d), value: (..., h_kv, s_k, d_v)
    attn_mask: bool (True = may attend) or float (added to the scores, differentiable), broadcasts to
        (..., h, s_q, s_k).
    is_causal: query i sees keys j <= i: aligned to the upper left, unlike `attention`'s causal.
    enable_gqa: allows h_kv < h.
    Returns (..., h, s_q, d_v). A query that sees no key gets zeros.
    """
    for name, x in (("query", query), ("key", key), ("value", value), ("attn_mask", attn_mask)):
        if not isinstance(x, Tensor):
            if x is None and name == "attn_mask":
                continue
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        if x.dim() < 2 and name != "attn_mask":
            raise ValueError(f"{name} must be (..., h, s, d) with at least 2 axes, got {tuple(x.shape)}")
    query, key, value = autocast(query, key, value)
    if is_causal and attn_mask is not None:
        raise ValueError("attn_mask must be None when is_causal=True; fold the causal triangle into attn_mask instead")
    try:
        lead = torch.broadcast_shapes(query.shape[:-3], key.shape[:-3], value.shape[:-3])
    except RuntimeError:
        raise ValueError(
            f"the leading axes of query, key and value must broadcast, got query {tuple(query.shape)}, "
            f"key {tuple(key.shape)} and value {tuple(value.shape)}"
        ) from None
    q, k, v = (_batch_first(x, lead) for x in (query, key, value))  # (b, s, h, d)
    b, s_q, h, d, s_k = check_qkv(q, k, v, names=("query", "key", "value"))
    if k.shape[2] != h and not enable_gqa:
        raise ValueError(f"key and value must have query's {h} heads, got {k.shape[2]}; enable_gqa=True allows fewer")
    mask = bias = None
    if attn_mask is not None:
        scores = _flatten_lead(attn_mask, lead)
        if attn_mask.dtype == torch.bool:
            mask = check_broadcast("attn_mask", scores, b, h, s_q, s_k)
        else:
            bias = check_same_or_wider("attn_mask", check_broadcast("attn_mask", scores, b, h, s_q, s_k), q)
    dropout_p = check_dropout(dropout_p, None)
    module = _dispatch.choose("scaled_dot_product_attention", BACKENDS, None, q, k, v)
    scale, right = check_scale(scale, d), 0 if is_causal else -1
    if module is native and attn_mask is None and dropout_p == 0.0:
        features = right, 0, scale
    else:
        features = mask, bias, None, None, None, seed_tensor(dropout_p, None, q), -1, right, 0, scale, 0.0, dropout_p
    out, _ = run(module, q, k, v, features, deterministic=False)
    out = out.transpose(1, 2)  # (b, h, s_q, d_v)
    if query.dim() == 4:
        return out
    return out.reshape(*lead, *out.shape[1:]) if query.dim() > 2 else out[0, 0]


def _batch_first(x: Tensor, lead: torch.Size) -> Tensor:
    """(..., h, s, d) as (b, s, h, d); a missing head axis counts as one head."""
    if x.dim() == 2:
        return x[None, :, None]
    if x.dim() != 4 or x.shape[:1] != lead:
        x = x.expand(*lead, *x.shape[-3:])
        x = x.reshape(math.prod(lead), *x.shape[-3:])
    return x.transpose(1, 2)


def _flatten_lead(attn_mask: Tensor, lead: torch.Size) -> Tensor:
    """attn_mask with its leading axes flattened as query's are, where it has any beyond (h, s_q, s_k)."""
    extra = attn_mask.dim() - 3
    if extra <= 0 or (len(lead) <= 1 and extra <= 1):
        return attn_mask
    return attn_mask.expand(*lead, *attn_mask.shape[-3:]).reshape(math.prod(lead), *attn_mask.shape[-3:])
