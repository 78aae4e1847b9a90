"""Softmax attention: the public functions, their checks and their gradient."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import _dispatch
from . import native, reference

_BACKENDS = {"native": native, "reference": reference}
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


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
    bias: Tensor | None = None,
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
    bias: float, added to the scaled, soft-capped scores; broadcasts to (b, h, s_q, s_k) and is never expanded.
    alibi_slopes: (h,) or (b, h); adds -slope * |i + s_k - s_q - j| (Press et al. 2021, arXiv:2108.12409).
    sink: (h,), a logit that joins the softmax's denominator only.
    kv_lengths: (b,) int32 or int64; keys at and after the length are hidden.
    dropout_p: probability of dropping an attention weight; the others are divided by 1 - dropout_p.
    seed: what dropout draws from (Philox-4x32-10 keyed by seed, b, h, i, j); None draws one from torch's generator.
    return_lse: also return the natural logarithm of the softmax's denominator, the sink included.
    deterministic: gradients are bit-identical from run to run and for any number of threads.
    backend: "native" or "reference"; None takes the first that can run this.

    Returns (b, s_q, h, d_v) in q's dtype, and lse (b, h, s_q) in float32 (float64 for float64) on request.
    Differentiable in q, k, v, bias, alibi_slopes and sink, through lse too; twice by recomputation through the
    reference. Sums and exponentials are float32 (float64 for float64). A query that sees no key gets zeros, zero
    gradients and lse = -inf.

    Raises ValueError or TypeError for bad arguments, NotImplementedError when `backend` cannot run them.

    Dao et al. 2022, arXiv:2205.14135; Dao 2023, arXiv:2307.08691.
    """
    q, k, v = _autocast(q, k, v)
    b, s_q, h, d, s_k = _check_qkv(q, k, v)
    left, right = _check_window(window, causal)
    options = _check_features(q, b, h, s_q, s_k, mask, bias, alibi_slopes, sink, kv_lengths)
    scale = _check_scale(scale, d)
    softcap = _check_softcap(softcap)
    dropout_p = _check_dropout(dropout_p, seed)
    module = _dispatch.choose("attention", _BACKENDS, backend, q, k, v)
    seed = _seed_tensor(dropout_p, seed, q.device)
    out, lse = _run(module, q, k, v, *options, seed, left, right, s_k - s_q, scale, softcap, dropout_p, deterministic)
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
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sink: Tensor | None = None,
    kv_lengths: Tensor | None = None,
) -> Tensor:
    """The attention map itself, for looking at: softmax of the scores of `attention` with the same arguments.

    q: (b, s_q, h, d), k: (b, s_k, h_kv, d). Returns (b, h, s_q, s_k) in q's dtype, differentiable; rows sum to 1
    (less with a sink), and to 0 where a query sees no key. Takes the memory of the map, in float32.
    """
    q, k = _autocast(q, k)
    b, s_q, h, d, s_k = _check_qkv(q, k, k)
    left, right = _check_window(window, causal)
    mask, bias, alibi_slopes, sink, kv_lengths = _check_features(
        q, b, h, s_q, s_k, mask, bias, alibi_slopes, sink, kv_lengths
    )
    scale, softcap = _check_scale(scale, d), _check_softcap(softcap)
    with torch.autocast(q.device.type, enabled=False):
        scores, visible = reference.scores_and_visible(
            q, k, mask, bias, alibi_slopes, kv_lengths, left, right, s_k - s_q, scale, softcap
        )
        return reference.weights_and_lse(scores, visible, sink)[0].to(q.dtype)


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
    query, key, value = _autocast(query, key, value)
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
    b, s_q, h, d, s_k = _check_qkv(q, k, v, names=("query", "key", "value"))
    if k.shape[2] != h and not enable_gqa:
        raise ValueError(f"key and value must have query's {h} heads, got {k.shape[2]}; enable_gqa=True allows fewer")
    mask = bias = None
    if attn_mask is not None:
        scores = _flatten_lead(attn_mask, lead)
        if attn_mask.dtype == torch.bool:
            mask = _check_broadcast("attn_mask", scores, b, h, s_q, s_k)
        else:
            bias = _check_float("attn_mask", _check_broadcast("attn_mask", scores, b, h, s_q, s_k), q)
    dropout_p = _check_dropout(dropout_p, None)
    module = _dispatch.choose("scaled_dot_product_attention", _BACKENDS, None, q, k, v)
    seed = _seed_tensor(dropout_p, None, q.device)
    out, _ = _run(
        module,
        q,
        k,
        v,
        mask,
        bias,
        None,
        None,
        None,
        seed,
        -1,
        0 if is_causal else -1,
        0,
        _check_scale(scale, d),
        0.0,
        dropout_p,
        False,
    )
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


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        name,
        q,
        k,
        v,
        mask,
        bias,
        alibi_slopes,
        sink,
        kv_lengths,
        seed,
        left,
        right,
        offset,
        scale,
        softcap,
        dropout_p,
        deterministic,
    ):
        numbers = (left, right, offset, scale, softcap, dropout_p)
        out, lse = _BACKENDS[name].forward(q, k, v, mask, bias, alibi_slopes, sink, kv_lengths, seed, *numbers)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, out, lse, mask, bias, alibi_slopes, sink, kv_lengths, seed)
        ctx.name, ctx.numbers, ctx.deterministic = name, numbers, deterministic
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        q, k, v, out, lse, mask, bias, alibi_slopes, sink, kv_lengths, seed = ctx.saved_tensors
        needs = ctx.needs_input_grad
        run = _AttentionBackward.apply if torch.is_grad_enabled() else _backward
        dq, dk, dv, dbias, dslopes, dsink = run(
            ctx.name,
            dout,
            dlse,
            q,
            k,
            v,
            out,
            lse,
            mask,
            bias,
            alibi_slopes,
            sink,
            kv_lengths,
            seed,
            *ctx.numbers,
            needs[5],
            needs[6],
            needs[7],
            ctx.deterministic,
        )
        return (
            None,
            dq,
            dk,
            dv,
            None,
            dbias if needs[5] else None,
            dslopes if needs[6] else None,
            dsink if needs[7] else None,
            *(None,) * 9,
        )


def _backward(name, *arguments):
    return _BACKENDS[name].backward(*arguments)


class _AttentionBackward(torch.autograd.Function):
    """The gradient as a function of its own, whose gradient is taken by recomputing the reference."""

    @staticmethod
    def forward(
        ctx,
        name,
        dout,
        dlse,
        q,
        k,
        v,
        out,
        lse,
        mask,
        bias,
        alibi_slopes,
        sink,
        kv_lengths,
        seed,
        left,
        right,
        offset,
        scale,
        softcap,
        dropout_p,
        *needs_and_deterministic,
    ):
        numbers = (left, right, offset, scale, softcap, dropout_p)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(dout, dlse, q, k, v, mask, bias, alibi_slopes, sink, kv_lengths, seed)
        ctx.numbers = numbers
        return _backward(
            name,
            dout,
            dlse,
            q,
            k,
            v,
            out,
            lse,
            mask,
            bias,
            alibi_slopes,
            sink,
            kv_lengths,
            seed,
            *numbers,
            *needs_and_deterministic,
        )

    @staticmethod
    def backward(ctx, *gradients):
        dout, dlse, q, k, v, mask, bias, alibi_slopes, sink, kv_lengths, seed = ctx.saved_tensors
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            inputs = [
                x if x is None or x.requires_grad else x.detach().requires_grad_()
                for x in (dout, dlse, q, k, v, bias, alibi_slopes, sink)
            ]
            dout, dlse, q, k, v, bias, alibi_slopes, sink = inputs
            out, lse = reference.forward(q, k, v, mask, bias, alibi_slopes, sink, kv_lengths, seed, *ctx.numbers)
            outputs, cotangents = zip(*[(y, dy) for y, dy in ((out, dout), (lse, dlse)) if dy is not None], strict=True)
            first = torch.autograd.grad(
                outputs, [x for x in inputs[2:] if x is not None], cotangents, create_graph=True, allow_unused=True
            )
            by_input = iter(first)
            first = [None if x is None else next(by_input) for x in inputs[2:]]
            pairs = [(y, dy) for y, dy in zip(first, gradients, strict=True) if y is not None and dy is not None]
            if not pairs:
                return (None,) * (13 + len(ctx.numbers) + 4 + 1)
            ys, dys = zip(*pairs, strict=True)
            wanted = [x for x in inputs if x is not None]
            second = iter(torch.autograd.grad(ys, wanted, dys, create_graph=create_graph, allow_unused=True))
        ddout, ddlse, dq, dk, dv, dbias, dslopes, dsink = (None if x is None else next(second) for x in inputs)
        return (
            None,
            ddout,
            ddlse,
            dq,
            dk,
            dv,
            None,
            None,
            None,
            dbias,
            dslopes,
            dsink,
            None,
            None,
            *(None,) * (len(ctx.numbers) + 4),
        )


def _run(
    module,
    q,
    k,
    v,
    mask,
    bias,
    alibi_slopes,
    sink,
    kv_lengths,
    seed,
    left,
    right,
    offset,
    scale,
    softcap,
    dropout_p,
    deterministic,
) -> tuple[Tensor, Tensor]:
    """out and lse from a backend; autograd is entered only where a gradient is wanted."""
    arguments = (
        q,
        k,
        v,
        mask,
        bias,
        alibi_slopes,
        sink,
        kv_lengths,
        seed,
        left,
        right,
        offset,
        scale,
        softcap,
        dropout_p,
    )
    differentiable = torch.is_grad_enabled() and (
        q.requires_grad
        or k.requires_grad
        or v.requires_grad
        or bias is not None
        and bias.requires_grad
        or alibi_slopes is not None
        and alibi_slopes.requires_grad
        or sink is not None
        and sink.requires_grad
    )
    if module is reference or not differentiable:
        return module.forward(*arguments)
    name = module.__name__.rpartition(".")[2]
    return _Attention.apply(name, *arguments, deterministic)


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast, floating tensors in the autocast dtype, as torch does for matmuls; float64 stays."""
    x = tensors[0]
    if not isinstance(x, Tensor) or not torch.is_autocast_enabled("cpu" if x.is_cpu else x.device.type):
        return tensors
    dtype = torch.get_autocast_dtype(x.device.type)
    return tuple(t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors)


def _check_qkv(q, k, v, names=("q", "k", "v")) -> tuple[int, int, int, int, int]:
    """b, s_q, h, d, s_k, or an error that names the argument."""
    try:
        b, s_q, h, d = q.shape
        b_k, s_k, h_kv, d_k = k.shape
        b_v, s_v, h_v, d_v = v.shape
        fits = (
            b == b_k == b_v
            and s_k == s_v
            and h_kv == h_v
            and d == d_k
            and h_kv > 0
            and h % h_kv == 0
            and d > 0
            and d_v > 0
            and q.dtype == k.dtype == v.dtype
            and q.dtype in _FLOATS
            and q.device == k.device == v.device
        )
    except (AttributeError, ValueError):
        fits = False
    if not fits:
        _explain_qkv(q, k, v, names)
        b, s_q, h, d, s_k = *q.shape, k.shape[1]
    return b, s_q, h, d, s_k


def _explain_qkv(q, k, v, names) -> None:
    """Raises the error of q, k and v that do not fit together; returns where they do after all (no heads)."""
    for name, x in zip(names, (q, k, v), strict=True):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        if x.dim() != 4:
            raise ValueError(f"{name} must be (b, s, h, d) with 4 axes, got {tuple(x.shape)}")
        if x.dtype not in _FLOATS:
            raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {x.dtype}")
        if x.dtype != q.dtype:
            raise TypeError(f"{name} must have {names[0]}'s dtype {q.dtype}, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name} must be on {names[0]}'s device {q.device}, got {x.device}")
    b, _, h, d = q.shape
    b_k, s_k, h_kv, d_k = k.shape
    if d_k != d:
        raise ValueError(
            f"{names[1]} must have {names[0]}'s head size {d}, got {names[1]} {tuple(k.shape)} with "
            f"{names[0]} {tuple(q.shape)}"
        )
    if b_k != b or v.shape[0] != b:
        raise ValueError(
            f"{names[1]} and {names[2]} must have {names[0]}'s batch size {b}, got {names[1]} "
            f"{tuple(k.shape)} and {names[2]} {tuple(v.shape)}"
        )
    if v.shape[1] != s_k or v.shape[2] != h_kv:
        raise ValueError(
            f"{names[2]} must have {names[1]}'s length and heads, got {names[2]} {tuple(v.shape)} with "
            f"{names[1]} {tuple(k.shape)}"
        )
    if h_kv == 0 and h > 0 or h_kv > 0 and h % h_kv:
        raise ValueError(f"the number of heads of {names[0]} must be a multiple of {names[1]}'s, got {h} and {h_kv}")
    if d == 0 or v.shape[3] == 0:
        raise ValueError(f"head sizes must be at least 1, got {d} and {v.shape[3]}")


def _check_window(window, causal) -> tuple[int, int]:
    """(left, right) with causal folded in."""
    if window == (-1, -1):
        return -1, 0 if causal else -1
    try:
        left, right = window
        below = left < -1 or right < -1
    except (TypeError, ValueError):
        raise ValueError(f"window must be two integers (left, right), got {window!r}") from None
    if isinstance(left, float) or isinstance(right, float):
        raise ValueError(f"window must be two integers (left, right), got {window!r}")
    if below:
        raise ValueError(f"window must hold lengths >= 0, or -1 for unbounded, got {window!r}")
    return left, 0 if causal else right


def _check_number(name: str, x) -> None:
    if not isinstance(x, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name} must be a number, got {type(x).__name__}")


def _check_finite(name: str, x) -> float:
    _check_number(name, x)
    # by comparison, not math.isfinite: x may be a symbol of a graph that is being compiled
    if not abs(x) < math.inf:
        raise ValueError(f"{name} must be a finite number, got {x}")
    return float(x)


def _check_scale(scale: float | None, d: int) -> float:
    return d**-0.5 if scale is None else _check_finite("scale", scale)


def _check_softcap(softcap: float) -> float:
    if softcap == 0.0:
        return 0.0
    softcap = _check_finite("softcap", softcap)
    if softcap < 0:
        raise ValueError(f"softcap must be a finite number >= 0 (0 is off), got {softcap}")
    return softcap


def _check_dropout(dropout_p: float, seed: int | Tensor | None) -> float:
    if dropout_p == 0.0 and seed is None:
        return 0.0
    _check_number("dropout_p", dropout_p)
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p must be between 0 and 1, got {dropout_p}")
    if isinstance(seed, Tensor):
        if seed.dim() != 0 or seed.dtype != torch.int64:
            raise ValueError(f"seed must be an int or a () int64 tensor, got {tuple(seed.shape)} {seed.dtype}")
    elif seed is not None:
        if not isinstance(seed, (int, torch.SymInt)):
            raise TypeError(f"seed must be an int or a () int64 tensor, got {type(seed).__name__}")
        if not -(2**63) <= seed < 2**63:
            raise ValueError(f"seed must fit in 64 bits, got {seed}")
    return float(dropout_p)


def _seed_tensor(dropout_p: float, seed: int | Tensor | None, device: torch.device) -> Tensor | None:
    """The seed as a () int64 tensor, drawn from torch's generator where none is given; None when nothing is dropped."""
    if dropout_p == 0.0:
        return None
    if seed is None:
        return torch.randint(2**62, (), dtype=torch.int64, device=device)
    return seed.to(device) if isinstance(seed, Tensor) else torch.full((), seed, dtype=torch.int64, device=device)


def _check_broadcast(name: str, x: Tensor, b: int, h: int, s_q: int, s_k: int) -> Tensor:
    """x as a 4-d view whose axes are 1 or the scores'."""
    if x.dim() > 4:
        raise ValueError(f"{name} must broadcast to (b, h, s_q, s_k) = {(b, h, s_q, s_k)}, got {tuple(x.shape)}")
    if x.dim() < 4:
        x = x.reshape((1,) * (4 - x.dim()) + tuple(x.shape))
    for size, full in zip(x.shape, (b, h, s_q, s_k), strict=True):
        if size != full and size != 1:
            raise ValueError(f"{name} must broadcast to (b, h, s_q, s_k) = {(b, h, s_q, s_k)}, got {tuple(x.shape)}")
    return x


def _check_float(name: str, x: Tensor, q: Tensor) -> Tensor:
    if x.dtype != q.dtype and (x.dtype != torch.float32 or q.dtype == torch.float64):
        allowed = q.dtype if q.dtype in (torch.float32, torch.float64) else f"{q.dtype} or torch.float32"
        raise TypeError(f"{name} must be {allowed}, got {x.dtype}")
    return x


def _check_features(q, b, h, s_q, s_k, mask, bias, alibi_slopes, sink, kv_lengths):
    """mask, bias, alibi_slopes, sink, kv_lengths in the shapes that the backends take."""
    if mask is None and bias is None and alibi_slopes is None and sink is None and kv_lengths is None:
        return None, None, None, None, None
    for name, x in (
        ("mask", mask),
        ("bias", bias),
        ("alibi_slopes", alibi_slopes),
        ("sink", sink),
        ("kv_lengths", kv_lengths),
    ):
        if x is None:
            continue
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor or None, got {type(x).__name__}")
        if x.device != q.device:
            raise ValueError(f"{name} must be on q's device {q.device}, got {x.device}")
    if mask is not None:
        if mask.dtype != torch.bool:
            raise TypeError(f"mask must be bool (True = may attend), got {mask.dtype}; pass floats as bias")
        mask = _check_broadcast("mask", mask, b, h, s_q, s_k)
    if bias is not None:
        bias = _check_broadcast("bias", _check_float("bias", bias, q), b, h, s_q, s_k)
    if alibi_slopes is not None:
        _check_float("alibi_slopes", alibi_slopes, q)
        if tuple(alibi_slopes.shape) not in ((h,), (b, h)):
            raise ValueError(
                f"alibi_slopes must be (h,) = {(h,)} or (b, h) = {(b, h)}, got {tuple(alibi_slopes.shape)}"
            )
    if sink is not None and tuple(_check_float("sink", sink, q).shape) != (h,):
        raise ValueError(f"sink must be (h,) = {(h,)}, got {tuple(sink.shape)}")
    if kv_lengths is not None:
        if kv_lengths.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"kv_lengths must be int32 or int64, got {kv_lengths.dtype}")
        if tuple(kv_lengths.shape) != (b,):
            raise ValueError(f"kv_lengths must be (b,) = {(b,)}, got {tuple(kv_lengths.shape)}")
        # reading the values would break a compiled graph and stall a GPU; the kernels clamp them
        if kv_lengths.device.type == "cpu" and not torch.compiler.is_compiling() and b > 0:
            low, high = kv_lengths.min().item(), kv_lengths.max().item()
            if low < 0 or high > s_k:
                raise ValueError(f"kv_lengths must lie between 0 and s_k = {s_k}, got values from {low} to {high}")
        kv_lengths = kv_lengths.to(torch.int32).contiguous()
    acc = torch.float64 if q.dtype == torch.float64 else torch.float32
    if alibi_slopes is not None:
        alibi_slopes = alibi_slopes.to(acc).contiguous()
    if sink is not None:
        sink = sink.to(acc).contiguous()
    return mask, bias, alibi_slopes, sink, kv_lengths
