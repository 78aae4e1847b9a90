"""The checks of attention's arguments: each raises an error that names the argument, or returns what backends take."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import FLOATS, check_finite, check_number, check_same_or_wider
from ..relative_bias import RelativeBias

NO_OPTIONS = (None,) * 5  # mask, bias, alibi_slopes, sink, kv_lengths


def check_qkv(q, k, v, names=("q", "k", "v")) -> tuple[int, int, int, int, int]:
    """b, s_q, h, d, s_k, or an error that names the argument."""
    try:
        b, s_q, h, d = shape = q.shape
        if shape == k.shape == v.shape and h > 0 and d > 0 and _alike(q, k, v):
            return b, s_q, h, d, s_q
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
            and _alike(q, k, v)
        )
    except (AttributeError, ValueError):
        fits = False
    if not fits:
        _explain_qkv(q, k, v, names, "(b, s, h, d)")
        b, s_q, h, d, s_k = *q.shape, k.shape[1]
    return b, s_q, h, d, s_k


def _alike(q, k, v) -> bool:
    """One floating dtype and one device."""
    dtype = q.dtype
    return (
        dtype is k.dtype
        and dtype is v.dtype
        and dtype in FLOATS
        and (q.is_cpu and k.is_cpu and v.is_cpu or q.device == k.device == v.device)
    )


def check_packed_qkv(q, k, v) -> tuple[int, int, int, int]:
    """t_q, h, d, t_k, or an error that names the argument."""
    try:
        t_q, h, d = q.shape
        t_k, h_kv, d_k = k.shape
        t_v, h_v, d_v = v.shape
        fits = (
            t_k == t_v
            and h_kv == h_v
            and d == d_k
            and h_kv > 0
            and h % h_kv == 0
            and d > 0
            and d_v > 0
            and _alike(q, k, v)
        )
    except (AttributeError, ValueError):
        fits = False
    if not fits:
        _explain_qkv(q, k, v, ("q", "k", "v"), "(t, h, d)")
        t_q, h, d, t_k = *q.shape, k.shape[0]
    return t_q, h, d, t_k


def _explain_qkv(q, k, v, names, axes) -> None:
    """Raises the error of q, k and v that do not fit together; returns where they do after all (no heads)."""
    n_axes = axes.count(",") + 1
    for name, x in zip(names, (q, k, v), strict=True):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        if x.dim() != n_axes:
            raise ValueError(f"{name} must be {axes} with {n_axes} axes, got {tuple(x.shape)}")
        if x.dtype not in FLOATS:
            raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {x.dtype}")
        if x.dtype != q.dtype:
            raise TypeError(f"{name} must have {names[0]}'s dtype {q.dtype}, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name} must be on {names[0]}'s device {q.device}, got {x.device}")
    h, d = q.shape[-2:]
    h_kv, d_k = k.shape[-2:]
    if d_k != d:
        raise ValueError(
            f"{names[1]} must have {names[0]}'s head size {d}, got {names[1]} {tuple(k.shape)} with "
            f"{names[0]} {tuple(q.shape)}"
        )
    if n_axes == 4 and not k.shape[0] == v.shape[0] == q.shape[0]:
        raise ValueError(
            f"{names[1]} and {names[2]} must have {names[0]}'s batch size {q.shape[0]}, got {names[1]} "
            f"{tuple(k.shape)} and {names[2]} {tuple(v.shape)}"
        )
    if v.shape[:-1] != k.shape[:-1]:
        raise ValueError(
            f"{names[2]} must have {names[1]}'s length and heads, got {names[2]} {tuple(v.shape)} with "
            f"{names[1]} {tuple(k.shape)}"
        )
    if h_kv == 0 and h > 0 or h_kv > 0 and h % h_kv:
        raise ValueError(f"the number of heads of {names[0]} must be a multiple of {names[1]}'s, got {h} and {h_kv}")
    if d == 0 or v.shape[-1] == 0:
        raise ValueError(f"head sizes must be at least 1, got {d} and {v.shape[-1]}")


def check_window(window, causal) -> tuple[int, int]:
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


def check_scale(scale: float | None, d: int) -> float:
    return d**-0.5 if scale is None else check_finite("scale", scale)


def check_softcap(softcap: float) -> float:
    if softcap == 0.0:
        return 0.0
    softcap = check_finite("softcap", softcap)
    if softcap < 0:
        raise ValueError(f"softcap must be a finite number >= 0 (0 is off), got {softcap}")
    return softcap


def check_dropout(dropout_p: float, seed: int | Tensor | None) -> float:
    if dropout_p == 0.0 and seed is None:
        return 0.0
    check_number("dropout_p", dropout_p)
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


def seed_tensor(dropout_p: float, seed: int | Tensor | None, q: Tensor) -> Tensor | None:
    """The seed as a () int64 tensor beside q, drawn from torch's generator if none is given; None without dropout."""
    if dropout_p == 0.0:
        return None
    if seed is None:
        return torch.randint(2**62, (), dtype=torch.int64, device=q.device)
    return seed.to(q.device) if isinstance(seed, Tensor) else torch.full((), seed, dtype=torch.int64, device=q.device)


def check_broadcast(name: str, x: Tensor, b: int, h: int, s_q: int, s_k: int, lengths=("s_q", "s_k")) -> Tensor:
    """x as a 4-d view whose axes are 1 or the scores'."""
    axes = f"(b, h, {', '.join(lengths)})"
    if x.dim() > 4:
        raise ValueError(f"{name} must broadcast to {axes} = {(b, h, s_q, s_k)}, got {tuple(x.shape)}")
    if x.dim() < 4:
        x = x.reshape((1,) * (4 - x.dim()) + tuple(x.shape))
    for size, full in zip(x.shape, (b, h, s_q, s_k), strict=True):
        if size != full and size != 1:
            raise ValueError(f"{name} must broadcast to {axes} = {(b, h, s_q, s_k)}, got {tuple(x.shape)}")
    return x


def check_features(
    q, b, h, s_q, s_k, mask, bias, alibi_slopes, sink, kv_lengths, lengths: tuple[str, str] = ("s_q", "s_k")
):
    """mask, bias, alibi_slopes, sink, kv_lengths in the shapes that the backends take.

    lengths: what the public function calls s_q and s_k.
    """
    if mask is None and bias is None and alibi_slopes is None and sink is None and kv_lengths is None:
        return NO_OPTIONS
    relative = bias if isinstance(bias, RelativeBias) else None
    if relative is not None:
        bias = relative.table
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
        mask = check_broadcast("mask", mask, b, h, s_q, s_k, lengths)
    acc = torch.float64 if q.dtype == torch.float64 else torch.float32
    if relative is not None:
        if check_same_or_wider("bias", bias, q).shape[1] != h:
            raise ValueError(f"bias must have a table (num_buckets, h) with h = {h}, got {tuple(bias.shape)}")
        bias = relative.by_distance(s_q, s_k, acc)
    elif bias is not None:
        bias = check_broadcast("bias", check_same_or_wider("bias", bias, q), b, h, s_q, s_k, lengths)
    if alibi_slopes is not None:
        check_same_or_wider("alibi_slopes", alibi_slopes, q)
        if tuple(alibi_slopes.shape) not in ((h,), (b, h)):
            raise ValueError(
                f"alibi_slopes must be (h,) = {(h,)} or (b, h) = {(b, h)}, got {tuple(alibi_slopes.shape)}"
            )
    if sink is not None and tuple(check_same_or_wider("sink", sink, q).shape) != (h,):
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
                raise ValueError(
                    f"kv_lengths must lie between 0 and {lengths[1]} = {s_k}, got values from {low} to {high}"
                )
        kv_lengths = kv_lengths.to(torch.int32).contiguous()
    if alibi_slopes is not None:
        alibi_slopes = alibi_slopes.to(acc).contiguous()
    if sink is not None:
        sink = sink.to(acc).contiguous()
    return mask, bias, alibi_slopes, sink, kv_lengths
