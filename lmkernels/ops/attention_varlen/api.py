"""Softmax attention over packed sequences: the public function."""

from __future__ import annotations

from operator import sub

import torch
from torch import Tensor

from .. import _dispatch
from .._autograd import needs_gradient
from .._checks import autocast, check_device, check_tensor
from ..attention import capture
from ..attention.autograd import gradient_of
from ..attention.checks import (
    check_dropout,
    check_features,
    check_packed_qkv,
    check_scale,
    check_softcap,
    check_window,
    seed_tensor,
)
from ..relative_bias import RelativeBias
from . import native, reference, triton

BACKENDS = {"native": native, "triton": triton, "reference": reference}

_Attention = gradient_of(BACKENDS)


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
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
    """`attention` over sequences of different lengths that lie end to end, without padding and without work on it.

    q: (t_q, h, d)      queries of all b sequences; float32, bfloat16, float16 or (on the CPU) float64
    k: (t_k, h_kv, d)   keys; h must be a multiple of h_kv, query head i reads key head i // (h // h_kv)
    v: (t_k, h_kv, d_v) values
    cu_seqlens_q, cu_seqlens_k: (b + 1,) int32 or int64, where sequences begin and end: 0, then the sums of the lengths
        up to t_q and t_k. Sequence n is q[cu_seqlens_q[n] : cu_seqlens_q[n + 1]], and likewise of k and v.
    max_seqlen_q, max_seqlen_k: no sequence is longer.
    Any strides on t and h are read as they are: q, k, v may be views of one (t, 3, h, d) projection.

    Each sequence gets what `attention` gives it with the same options. In them, s_q and s_k are its own lengths, hence
    causal and window are aligned to its own end, and i and j count from its own beginning:
    mask, bias: broadcast to (b, h, max_seqlen_q, max_seqlen_k), those of the padded batch; a sequence reads the upper
        left corner [:s_q, :s_k]. bias may be a `RelativeBias` too.
    alibi_slopes: (h,) or (b, h). sink: (h,). kv_lengths: (b,), how many keys of each sequence are visible.
    causal, window, scale, softcap, dropout_p, seed, deterministic, backend: as in `attention`. Dropout drops what it
        drops in the padded batch.
    return_lse: also return the natural logarithm of the softmax's denominator.

    Returns (t_q, h, d_v) in q's dtype, and lse (h, t_q) (flash-attention's layout) in float32 (float64 for float64) on
    request. Differentiable in q, k, v, bias, alibi_slopes and sink, through lse too; twice by recomputation through the
    reference. A query that sees no key (its sequence may have none) gets zeros, zero gradients and lse = -inf.

    The values of cu_seqlens are checked where that costs nothing: on the CPU, outside torch.compile. Where they are
    not, nothing outside the tensors is ever touched, and tokens of no sequence get what queries without keys get.

    Raises ValueError or TypeError for bad arguments, NotImplementedError when `backend` cannot run them.
    """
    q, k, v = autocast(q, k, v)
    t_q, h, d, t_k = check_packed_qkv(q, k, v)
    max_seqlen_q = _check_max_seqlen("max_seqlen_q", max_seqlen_q)
    max_seqlen_k = _check_max_seqlen("max_seqlen_k", max_seqlen_k)
    bounds_q = _check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, q, "t_q", t_q, "max_seqlen_q", max_seqlen_q)
    if cu_seqlens_k is cu_seqlens_q and t_k == t_q and max_seqlen_k == max_seqlen_q:
        bounds_k = bounds_q
    else:
        bounds_k = _check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, q, "t_k", t_k, "max_seqlen_k", max_seqlen_k)
        if bounds_k.shape != bounds_q.shape:
            raise ValueError(
                f"cu_seqlens_k must have the shape of cu_seqlens_q, got {tuple(bounds_k.shape)} and "
                f"{tuple(bounds_q.shape)}"
            )
    left, right = check_window(window, causal)
    options = check_features(
        q,
        bounds_q.shape[0] - 1,
        h,
        max_seqlen_q,
        max_seqlen_k,
        mask,
        bias,
        alibi_slopes,
        sink,
        kv_lengths,
        lengths=("max_seqlen_q", "max_seqlen_k"),
    )
    scale = check_scale(scale, d)
    softcap = check_softcap(softcap)
    dropout_p = check_dropout(dropout_p, seed)
    module = _dispatch.choose("attention_varlen", BACKENDS, backend, q, k, v)
    seed = seed_tensor(dropout_p, seed, q)
    features = (
        *options,
        seed,
        bounds_q,
        bounds_k,
        max_seqlen_q,
        max_seqlen_k,
        left,
        right,
        scale,
        softcap,
        dropout_p,
    )
    if capture.listening:
        capture.record(reference.weights, q, k, *features)
    if module is reference or not needs_gradient(q, k, v, *options[1:4]):
        out, lse = module.forward(q, k, v, *features)
    else:
        call = module.__name__.rpartition(".")[2], deterministic, features[8:]
        out, lse = _Attention.apply(call, q, k, v, *features[:8])
    return (out, lse) if return_lse else out


def _check_max_seqlen(name: str, x) -> int:
    if isinstance(x, bool) or not isinstance(x, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int, got {type(x).__name__}")
    if x < 0:
        raise ValueError(f"{name} must be at least 0, got {x}")
    return x


def _check_cu_seqlens(name: str, x, q: Tensor, total_name: str, total: int, most_name: str, most: int) -> Tensor:
    """x as contiguous int32."""
    check_device(name, check_tensor(name, x), "q", q)
    if x.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, got {x.dtype}")
    if x.dim() != 1 or x.shape[0] == 0:
        raise ValueError(f"{name} must be (b + 1,): 0 and the end of each sequence, got {tuple(x.shape)}")
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        bounds = x.tolist()
        lengths = list(map(sub, bounds[1:], bounds))
        if bounds[0] != 0 or bounds[-1] != total:
            raise ValueError(
                f"{name} must start at 0 and end at {total_name} = {total}, got {bounds[0]} and {bounds[-1]}"
            )
        if lengths and min(lengths) < 0:
            b = lengths.index(min(lengths))
            raise ValueError(f"{name} must not decrease, got {bounds[b]} and then {bounds[b + 1]}")
        if lengths and max(lengths) > most:
            b = lengths.index(max(lengths))
            raise ValueError(f"{most_name} = {most} must be at least every length, got {max(lengths)} in sequence {b}")
    return x.to(torch.int32).contiguous()
