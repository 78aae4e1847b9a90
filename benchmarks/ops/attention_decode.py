"""attention_decode against what eager code does for a token: rotate, write to the cache, torch's SDPA on its slice."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import harness
from lmkernels import attention_decode, rotary
from lmkernels.ops.attention_decode.reference import quantise
from lmkernels.testing import cases, numerics


def lines() -> list[harness.Line]:
    """One per case and dtype, and one with a cache of int8 under the long bfloat16 ones."""
    return [
        line(group, case, dtype, int8)
        for group, members in cases.DECODE_BENCHMARKS.items()
        for dtype in harness.DTYPES
        for case in members
        for int8 in ((False, True) if dtype == "bfloat16" and "short" not in group else (False,))
    ]


def arguments_of(case: cases.DecodeCase, dtype: torch.dtype, int8: bool, backend: str | None) -> dict:
    """The cache holds the newest tokens already: what a call appends changes nothing for the next one."""
    arguments = case.make(dtype)
    attention_decode(**arguments, backend="reference")
    if int8:
        for name in ("k", "v"):
            cache = arguments[f"{name}_cache"]
            integers, scale = quantise(cache)
            arguments[f"{name}_cache"] = torch.empty_like(cache, dtype=torch.int8).copy_(integers)
            arguments[f"{name}_scale"] = scale.transpose(1, 2).contiguous().transpose(1, 2)
    return arguments | {"backend": backend}


def wrong(case: cases.DecodeCase, dtype: torch.dtype, int8: bool, backend: str | None) -> str | None:
    """Why the result is wrong, or None: the first key head against float64 on the values that the cache holds."""
    arguments = arguments_of(case, dtype, int8, backend)
    out, lse = attention_decode(**arguments, return_lse=True)
    arguments.pop("backend")
    group = case.h // (case.h_kv or case.h)
    exact = {name: x for name, x in arguments.items() if name not in ("k_new", "v_new", "k_scale", "v_scale")}
    exact = numerics.in_dtype(exact, torch.float64) | {"kv_lengths": arguments["kv_lengths"] + case.tokens_new}
    for name in ("k", "v"):
        cache = arguments[f"{name}_cache"][:, :, :1].double()
        scale = arguments[f"{name}_scale"][:, :, :1, None].double() if int8 else 1
        exact[f"{name}_cache"] = cache * scale
    exact["q"] = exact["q"][:, :, :group]
    golden, golden_lse = attention_decode(**exact, return_lse=True, backend="reference")
    low = {name: x.to(dtype) if name in ("q", "k_cache", "v_cache") else x for name, x in exact.items()}
    if "cos" in low:  # eager code rounds the rotated queries
        first = case.lengths[0] + case.tokens_new - case.s_q
        low["q"] = rotary(low["q"], *(low.pop(name)[first:].float() for name in ("cos", "sin")), backend="reference")
    plain = attention_decode(**low, return_lse=True, backend="reference")
    try:
        if int8:
            torch.testing.assert_close(out[:, :, :group].double(), golden, rtol=2**-7, atol=1e-3)
        else:
            numerics.assert_as_accurate(out[:, :, :group], golden, plain[0], "out", dtype=dtype, samples=group)
            numerics.assert_as_accurate(lse[:, :group], golden_lse, plain[1], "lse", dtype=dtype, samples=group)
    except AssertionError as error:
        return str(error)
    return None


def eager(case: cases.DecodeCase, dtype: torch.dtype) -> Callable[[], object]:
    """On a contiguous cache (b, h, s, d), whatever the case's: what SDPA likes best. Sequences of one length."""
    x = case.make(dtype)
    before, total = case.lengths[0], case.lengths[0] + case.tokens_new
    q, k_new, v_new = (x[name].transpose(1, 2) for name in ("q", "k_new", "v_new"))
    k, v = (torch.randn(case.b, case.h_kv or case.h, total, case.d).to(dtype) for _ in "kv")
    causal = None if case.s_q == 1 else torch.ones(case.s_q, total, dtype=torch.bool).tril(total - case.s_q)
    cos, sin = (torch.cat((x[name],) * 2, -1) if name in x else None for name in ("cos", "sin"))
    grouped = case.h_kv not in (None, case.h)

    def rotate(y: Tensor, start: int) -> Tensor:
        c, s = cos[start : start + y.shape[2]], sin[start : start + y.shape[2]]
        first, second = y.chunk(2, -1)
        return y * c + torch.cat((-second, first), -1) * s

    def call():
        queries, keys = (q, k_new) if cos is None else (rotate(q, total - case.s_q), rotate(k_new, before))
        k[:, :, before:total] = keys
        v[:, :, before:total] = v_new
        return F.scaled_dot_product_attention(
            queries, k[:, :, :total], v[:, :, :total], attn_mask=causal, enable_gqa=grouped
        )

    return call


def competitors(
    case: cases.DecodeCase, dtype: torch.dtype, int8: bool, backend: str | None
) -> dict[str, Callable[[], object]]:
    arguments = arguments_of(case, dtype, int8, backend)
    return {"ours": lambda: attention_decode(**arguments), "SDPA": eager(case, dtype)}


def line(group: str, case: cases.DecodeCase, dtype: str, int8: bool, backend: str | None = None) -> harness.Line:
    torch_dtype = harness.DTYPES[dtype]
    keys = sum(length + case.tokens_new for length in case.lengths) * (case.h_kv or case.h)
    name = f"{case.name}{', int8 cache' * int8}{f', {backend}' if backend else ''}"
    row = 2 * (case.d + 4 if int8 else case.d * torch_dtype.itemsize)
    return harness.Line(
        f"{group}, int8" if int8 else group,
        name,
        dtype,
        "",
        competitors=lambda: competitors(case, torch_dtype, int8, backend),
        wrong=lambda: wrong(case, torch_dtype, int8, backend),
        bytes_read=keys * row,
    )
