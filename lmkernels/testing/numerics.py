"""When is a result right? As accurate as plain torch in the same dtype, both measured against float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _library
from ..ops._precision import float32_parts
from ..ops.attention import attention
from ..ops.attention.reference import visible_keys
from ..ops.attention_varlen import attention_varlen
from ..ops.philox import attention_keep
from .cases import AttentionInputs

# In 16 bits the roundings of the matmuls' operands dominate, and they are the same for everyone. In float32 and float64
# every rounding of a score counts: a softmax in base 2, or one of several tiles, has more of them.
MAX_RATIO = 2.0
# Without fused multiply-add, each of them rounds twice; plain torch, the yardstick, has it wherever the CPU does, and
# Triton's interpreter has not.
UNFUSED = math.sqrt(2) if _library.triton_interpreted or _library.cpu_isa() == "generic" else 1.0
RMS_RATIO = {torch.bfloat16: 1.2, torch.float16: 1.2, torch.float32: 2.0, torch.float64: 2.0}


def assert_as_accurate(
    actual: Tensor,
    golden: Tensor,
    low_precision: Tensor,
    name: str = "result",
    *,
    dtype: torch.dtype | None = None,
    samples: int | None = None,
    products: int = 1,
) -> None:
    """`actual` is as close to `golden` as `low_precision` is.

    actual: what is tested
    golden: the same in float64, computed from the same (rounded) inputs
    low_precision: plain torch's result in the dtype of the inputs, same shape
    dtype: of the inputs, where it is not actual's
    samples: how many independent errors the result holds, where that is fewer than its elements; the scores of one
        query share a normaliser, for instance, and so its error.
    products: of matrices that follow on one another, each of which rounds its factors as torch's precision allows

    With error(x) = x - golden and rounding as in `_rounding`, which nothing can avoid:
        max|error(actual)|    <= MAX_RATIO UNFUSED c max|error(low_precision)| + 2 max|rounding|
        rms(error(actual))^2  <= (RMS_RATIO[dtype] c rms(error(low_precision)))^2 + rms(rounding)^2
    The first catches one wrong element, the second a bias that a lucky maximum would hide. c = 1 + 4 / sqrt(samples)
    allows for chance: four standard deviations of the ratio of two equally good results (1.07 for 3600 samples), as
    thousands of results are checked. Infinities and NaN must be where golden has them.
    """
    if actual.shape != golden.shape:
        raise AssertionError(f"{name}: shape {tuple(actual.shape)}, expected {tuple(golden.shape)}")
    actual64, low64 = actual.detach().double(), low_precision.detach().double()
    for what, has in (("NaN", torch.isnan), ("inf", torch.isposinf), ("-inf", torch.isneginf)):
        wrong = has(actual64) != has(golden)
        if wrong.any():
            where = tuple(wrong.nonzero()[0].tolist())
            raise AssertionError(
                f"{name} ({actual.dtype}): {int(wrong.sum())} of {wrong.numel()} elements differ in being {what}, the "
                f"first at {where}: got {actual64[where]:.8g}, expected {golden[where]:.8g}"
            )
    finite = golden.isfinite()
    if not finite.any():
        return
    expected = golden[finite]
    error, low_error = actual64[finite] - expected, low64[finite] - expected
    dtype = dtype or actual.dtype
    rounding = _rounding(expected, actual.dtype, dtype, products)

    chance = 1 + 4 / math.sqrt(min(samples or math.inf, expected.numel()))
    limit = MAX_RATIO * UNFUSED * chance * _max(low_error) + 2 * _max(rounding)
    if not _max(error) <= limit:  # a NaN in low_precision must not pass
        where = tuple(finite.nonzero()[error.abs().argmax()].tolist())
        raise AssertionError(
            f"{name} ({actual.dtype}): largest error {_max(error):.3e}, allowed {limit:.3e}, at {where}: got "
            f"{actual64[where]:.8g}, expected {golden[where]:.8g}; plain torch {_max(low_error):.3e}, rounding "
            f"{_max(rounding):.3e}; {(error.abs() > limit).sum()} of {error.numel()} elements are beyond"
        )
    limit = math.hypot(RMS_RATIO[dtype] * chance * _rms(low_error), _rms(rounding))
    if not _rms(error) <= limit:
        raise AssertionError(
            f"{name} ({actual.dtype}): root mean square error {_rms(error):.3e}, allowed {limit:.3e}; plain torch "
            f"{_rms(low_error):.3e}, rounding {_rms(rounding):.3e}"
        )


def _rounding(golden: Tensor, dtype: torch.dtype, input_dtype: torch.dtype, products: int) -> Tensor:
    """The error of `golden` rounded to 16 bits; for float32 and float64 an ulp of golden.

    There the inputs may be exact and the exact result too (a weight of one, say), but not a weight recomputed from lse.
    Float32 results of 16-bit inputs (lse, a loss, gradients of float32 options) get 1/256 of the rounding that every
    input has been through, if that is more: the exponential of a kernel for 16 bits may be shorter. Those of float32
    inputs get a few times what torch's precision lets factors err by, for each of the products.
    """
    ulp = golden.abs() * torch.finfo(dtype).eps
    if dtype != input_dtype:
        return torch.maximum((golden.to(input_dtype).double() - golden).abs() / 256, ulp)
    if dtype == torch.float32:
        return ulp + products * factor_rounding() * (golden.abs() + 4 * _rms(golden))
    if dtype == torch.float64:
        return ulp
    return golden.to(dtype).double() - golden


def factor_rounding() -> float:
    """The largest relative error of a factor of a float32 product on the CPU, as torch's precision allows it."""
    return {3: 0.0, 2: 2.0**-17, 1: 2.0**-9}[float32_parts()]


def _max(x: Tensor) -> float:
    return x.abs().max().item()


def _rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def results(
    function: Callable, inputs: dict[str, Tensor], differentiable: Iterable[str] = (), **options
) -> dict[str, Tensor]:
    """function(**inputs, **options): its results (out, out1, ...) and its gradients (x gives dx, weight dweight ...).

    The gradients that arrive at the results are drawn from a generator of their own, and rounded to 16 bits: so they
    are the same for every dtype. Floating results only.
    """
    leaves = {name: inputs[name].detach().requires_grad_() for name in differentiable}
    outs = function(**inputs | leaves, **options)
    outs = (outs,) if isinstance(outs, Tensor) else tuple(outs)
    found = {f"out{i or ''}": out.detach() for i, out in enumerate(outs)}
    if leaves:
        generator = torch.Generator("cpu").manual_seed(1)
        douts = [
            torch.randn(out.shape, generator=generator, device="cpu").to(torch.bfloat16).to(out.device, out.dtype)
            for out in outs
        ]
        gradients = torch.autograd.grad(outs, leaves.values(), douts)
        found |= {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    return found


def in_dtype(inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The same values with every floating tensor in another dtype."""
    return {name: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in inputs.items()}


def assert_op_as_accurate(
    function: Callable,
    reference: Callable,
    plain: Callable,
    inputs: dict[str, Tensor],
    differentiable: Iterable[str] = (),
    *,
    dtype: torch.dtype,
    samples: int | None = None,
    products: int = 1,
    **options,
) -> None:
    """Every result and gradient of function(**inputs, **options) by the rule of `assert_as_accurate`.

    reference: the definition, here run in float64
    plain: what one writes in eager torch, run in the dtype of the inputs
    differentiable: names of the inputs whose gradients are compared
    dtype: of the inputs
    samples, products: as there
    """
    differentiable = tuple(differentiable)
    actual = results(function, inputs, differentiable, **options)
    golden = results(reference, in_dtype(inputs, torch.float64), differentiable, **options)
    if dtype == torch.float64:
        single = in_dtype(inputs, torch.float32)
        yardstick = _float64_yardstick(
            golden,
            results(plain, single, differentiable, **options),
            results(reference, in_dtype(single, torch.float64), differentiable, **options),
        )
    else:
        yardstick = results(plain, inputs, differentiable, **options)
    errors = []
    for name, exact in golden.items():
        if actual[name].dtype != yardstick[name].dtype and dtype != torch.float64:
            errors.append(f"{name}: dtype {actual[name].dtype}, plain torch {yardstick[name].dtype}")
        try:
            assert_as_accurate(
                actual[name], exact, yardstick[name], name, dtype=dtype, samples=samples, products=products
            )
        except AssertionError as error:
            errors.append(str(error))
    if errors:
        raise AssertionError("\n".join(errors))


def attention_results(function: Callable, inputs: AttentionInputs, **options) -> dict[str, Tensor]:
    """out, lse and the gradient of everything that has one: q gives dq, bias gives dbias, and so on.

    function: takes what `attention` takes with return_lse=True; `options` are added to the inputs' own.
    """
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.differentiable().items()}
    q, k, v = (leaves[name] for name in ("q", "k", "v"))
    arguments = inputs.options | {name: x for name, x in leaves.items() if name not in ("q", "k", "v")}
    out, lse = function(q, k, v, **arguments, return_lse=True, **options)
    gradients = torch.autograd.grad((out, lse), leaves.values(), (inputs.dout, inputs.dlse))
    return {"out": out.detach(), "lse": lse.detach()} | {
        f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)
    }


def golden_attention(inputs: AttentionInputs, function: Callable = attention) -> dict[str, Tensor]:
    """The reference in float64, from the very values that the inputs hold."""
    return attention_results(function, inputs.to(torch.float64), backend="reference")


def plain_attention_results(inputs: AttentionInputs, function: Callable = attention) -> dict[str, Tensor]:
    """What plain torch gives in the inputs' dtype, the yardstick of `assert_as_accurate`."""
    plain = {attention: plain_attention, attention_varlen: plain_attention_varlen}[function]
    if inputs.q.dtype != torch.float64:
        return attention_results(plain, inputs)
    single = inputs.to(torch.float32)
    return _float64_yardstick(
        golden_attention(inputs, function), attention_results(plain, single), golden_attention(single, function)
    )


def _float64_yardstick(golden: dict, plain32: dict, golden32: dict) -> dict[str, Tensor]:
    """Nothing wider than float64 measures it, so its yardstick is float32's error, put on the golden result.

    The error is scaled by the ratio of the two roundings, 2^-29, and by sqrt(2) because the golden result errs as much.
    """
    return {
        name: torch.where(exact.isfinite(), exact + (plain32[name] - golden32[name]) * 2.0**-28.5, exact)
        for name, exact in golden.items()
    }


def plain_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal,
    window,
    scale,
    softcap,
    mask=None,
    bias=None,
    alibi_slopes=None,
    sink=None,
    kv_lengths=None,
    dropout_p=0.0,
    seed=None,
    return_lse=True,
    first_b=0,
) -> tuple[Tensor, Tensor]:
    """Attention as a careful user writes it in eager torch, any float dtype; holds the scores.

    first_b: the number of the first sequence, which dropout depends on.

    The softmax is float32, as everywhere in the field; so are the scores, which eager code often rounds to 16 bits
    between the matmul and the softmax. That would be a yardstick several times too generous: a fused kernel never
    stores the scores.
    """
    acc = torch.promote_types(q.dtype, torch.float32)
    b, s_q, h, d = q.shape
    s_k = k.shape[1]
    q, k, v = (x.transpose(1, 2).repeat_interleave(h // x.shape[2], 1) for x in (q, k, v))  # (b, h, s, d)
    # the row of zeros keeps a single query from gemv, which adds up in a better order than the matmul of many queries
    scores = (F.pad(q.to(acc), (0, 0, 0, 1)) @ k.to(acc).transpose(2, 3))[:, :, :s_q]  # (b, h, s_q, s_k)
    # their gradient is an operand of the matmuls for dq and dk
    scores.register_hook(lambda dscores: dscores.to(q.dtype).to(acc))
    scores = scores * (d**-0.5 if scale is None else scale)
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    i, j = torch.arange(s_q, device=q.device)[:, None] + s_k - s_q, torch.arange(s_k, device=q.device)
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.to(acc).reshape(-1, h, 1, 1) * (i - j).abs()
    if bias is not None:
        scores = scores + bias.to(acc)
    visible = scores != float("-inf")
    if mask is not None:
        visible = visible & mask
    band = visible_keys(s_q, s_k, window[0], 0 if causal else window[1], s_k - s_q, q.device)
    if band is not None:
        visible = visible & band
    if kv_lengths is not None:
        visible = visible & (j < kv_lengths[:, None, None, None])
    seen = visible.any(-1, keepdim=True)  # (b, h, s_q, 1)
    # zeros in rows without a key: the softmax over nothing but -inf is NaN
    scores = scores.masked_fill(~visible, float("-inf")).masked_fill(~seen, 0.0)
    factor = seen.to(acc)
    if dropout_p > 0:
        keep = attention_keep(torch.tensor(seed, device=q.device), first_b + b, h, s_q, s_k, dropout_p)[first_b:]
        factor = factor * keep / (1 - dropout_p) if dropout_p < 1 else factor * 0.0
    if sink is not None:
        scores = torch.cat([scores, sink.to(acc).reshape(1, h, 1, 1).expand(b, h, s_q, 1)], -1)
        v, factor = F.pad(v, (0, 0, 0, 1)), F.pad(factor.expand(b, h, s_q, s_k), (0, 1))
    out, lse = _PlainSoftmaxMatmul.apply(scores, v, factor)
    return out.transpose(1, 2), lse.masked_fill(~seen[..., 0], float("-inf"))


def plain_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    mask=None,
    bias=None,
    alibi_slopes=None,
    kv_lengths=None,
    return_lse=True,
    **options,
) -> tuple[Tensor, Tensor]:
    """`plain_attention` of one sequence after the other: out (t_q, h, d_v) and lse (h, t_q)."""
    outs, lses = [q.new_zeros(0, q.shape[1], v.shape[2])], [q.new_zeros(q.shape[1], 0)]
    for b in range(len(cu_seqlens_q) - 1):
        queries, keys = (slice(*cu_seqlens[b : b + 2].tolist()) for cu_seqlens in (cu_seqlens_q, cu_seqlens_k))
        s_q, s_k = queries.stop - queries.start, keys.stop - keys.start

        def corner(x, b=b, s_q=s_q, s_k=s_k):
            if x is None:
                return None
            x = x.reshape((1,) * (4 - x.dim()) + x.shape)
            x = x[b : b + 1] if x.shape[0] > 1 else x
            return x[:, :, : s_q if x.shape[2] > 1 else 1, : s_k if x.shape[3] > 1 else 1]

        out, lse = plain_attention(
            q[None, queries],
            k[None, keys],
            v[None, keys],
            mask=corner(mask),
            bias=corner(bias),
            alibi_slopes=alibi_slopes if alibi_slopes is None or alibi_slopes.dim() == 1 else alibi_slopes[b],
            kv_lengths=None if kv_lengths is None else kv_lengths[b : b + 1],
            first_b=b,
            **options,
        )
        outs.append(out[0])
        lses.append(lse[0])
    return torch.cat(outs), torch.cat(lses, 1)


class _PlainSoftmaxMatmul(torch.autograd.Function):
    """(softmax(scores) * factor) @ v and the log-sum-exp, with the gradient of FlashAttention-2.

    As on matrix units, the weights are rounded to v's dtype for the matmuls. As in every kernel whose memory is linear
    in s, the backward takes the weights from lse and delta from out, both as rounded (Dao 2023, arXiv:2307.08691,
    algorithm 2): autograd would have stored the weights, and so be more exact where lse is large, and where the
    gradients of a row's scores sum to nothing (one key, a bias per query).
    """

    @staticmethod
    def forward(ctx, scores, v, factor):
        lse = torch.logsumexp(scores, -1)
        weights = (torch.softmax(scores, -1) * factor).to(v.dtype).to(scores.dtype)
        out = (weights @ v.to(scores.dtype)).to(v.dtype)
        ctx.save_for_backward(scores, v, factor, out, lse)
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        scores, v, factor, out, lse = ctx.saved_tensors
        acc = scores.dtype
        p = torch.exp(scores - lse[..., None])
        dout = dout.to(acc)
        dv = (p * factor).to(v.dtype).to(acc).transpose(2, 3) @ dout
        dp = dout @ v.to(acc).transpose(2, 3) * factor
        delta = (dout * out.to(acc)).sum(-1)
        return p * (dp + (dlse - delta)[..., None]), dv.to(v.dtype), None
