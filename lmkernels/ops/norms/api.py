"""Layer norm and RMS norm: the public functions, and their gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _dispatch
from .._autograd import needs_gradient, reference_gradients
from .._checks import check_device, check_finite, check_floating, check_parameter
from . import native, reference, triton

BACKENDS = {"native": native, "triton": triton, "reference": reference}


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """(x - mean(x)) / sqrt(var(x) + eps) * weight + bias over the last axis, as `torch.nn.functional.layer_norm`.

    x:      (..., d)  float32, bfloat16, float16 or (on the CPU) float64; any strides, and none of a row copied as
                      long as its last axis is contiguous and one stride leads from row to row
    weight: (d,)      in x's dtype or, beside 16 bits, in float32; None is 1
    bias:   (d,)      the same; None is 0
    eps: added to the variance (the biased one: over d).
    residual: (..., d), added first: s = x + residual, rounded to its dtype, is what is normalised and is returned too.
        In x's dtype; or one of the two is float32 beside 16 bits, and then s and the norm are float32, as the sum is in
        torch (the stream of a model in float32, say, to which a matmul under autocast adds).
    backend: "native", "triton" or "reference"; None takes the first that can run this.

    Returns (..., d) in x's dtype; with a residual (norm(s), s), both differentiable. Statistics are float32 (float64
    for float64) and exact for rows with a large mean; autocast changes nothing. Differentiable in x, residual, weight
    and bias; twice by recomputation through the reference. The gradients of weight and bias are summed in an order that
    depends on the shape alone, so they are the same for any number of threads.

    Raises ValueError or TypeError for bad arguments, NotImplementedError when `backend` cannot run them.

    Ba, Kiros, Hinton 2016, arXiv:1607.06450.
    """
    return _norm("layer_norm", x, residual, weight, bias, eps, True, backend)


def rms_norm(
    x: Tensor, weight: Tensor | None, eps: float, *, residual: Tensor | None = None, backend: str | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, as `torch.nn.functional.rms_norm`.

    Arguments, results and promises are `layer_norm`'s, without a bias.

    Zhang, Sennrich 2019, arXiv:1910.07467.
    """
    return _norm("rms_norm", x, residual, weight, None, eps, False, backend)


def _norm(name, x, residual, weight, bias, eps, center, backend):
    _check(x, residual, weight, bias)
    eps = _check_eps(eps)
    module = _dispatch.choose(name, BACKENDS, backend, x)
    if module is reference or not needs_gradient(x, residual, weight, bias):
        y, s = module.forward(x, residual, weight, bias, eps, center)
        return y if residual is None else (y, s)
    return _Norm.apply((module.__name__.rpartition(".")[2], eps, center), x, residual, weight, bias)


def _check(x, residual, weight, bias) -> None:
    check_floating("x", x)
    if x.dim() == 0:
        raise ValueError("x must be (..., d) with at least one axis, got ()")
    if residual is not None:
        check_floating("residual", residual)
        check_device("residual", residual, "x", x)
        if residual.shape != x.shape:
            raise ValueError(f"residual must have x's shape {tuple(x.shape)}, got {tuple(residual.shape)}")
        if residual.dtype != x.dtype and {2, 4} != {residual.dtype.itemsize, x.dtype.itemsize}:
            raise TypeError(
                f"residual must have x's dtype {x.dtype}, or one of the two be float32 beside 16 bits, "
                f"got {residual.dtype}"
            )
    shape = (x.shape[-1],)
    if weight is not None:
        check_parameter("weight", weight, shape, "x", x)
    if bias is not None:
        check_parameter("bias", bias, shape, "x", x)


def _check_eps(eps) -> float:
    eps = check_finite("eps", eps)
    if eps < 0:
        raise ValueError(f"eps must be at least 0, got {eps}")
    return eps


class _Norm(torch.autograd.Function):
    """Of ((backend's name, eps, center), x, residual, weight, bias): torch takes a while for each argument."""

    @staticmethod
    def forward(ctx, call, x, residual, weight, bias):
        name, eps, center = ctx.call = call
        y, s, rstd, mean = BACKENDS[name].forward_for_backward(x, residual, weight, bias, eps, center)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(s, rstd, mean, weight, bias)
        ctx.dtypes = None if residual is None else (x.dtype, residual.dtype)
        if residual is None:
            return y
        if not (x.requires_grad or residual.requires_grad):
            ctx.mark_non_differentiable(s)
        return y, s

    @staticmethod
    def backward(ctx, dy, ds=None):
        name, eps, center = ctx.call
        s, rstd, mean, weight, bias = ctx.saved_tensors
        _, need_dx, need_dresidual, need_dweight, need_dbias = ctx.needs_input_grad
        if dy is None:
            dy = torch.zeros_like(s)
        if torch.is_grad_enabled():
            through_y, dweight, dbias = reference_gradients(
                lambda s, weight, bias: reference.forward(s, None, weight, bias, eps, center)[0],
                (s, weight, bias),
                (need_dx or need_dresidual, need_dweight, need_dbias),
                (dy,),
            )
            dsum = through_y if ds is None or through_y is None else through_y + ds
        else:
            dsum, dweight, dbias = BACKENDS[name].backward(
                dy, ds, s, rstd, mean, weight, bias, need_dweight, need_dbias
            )
        if ctx.dtypes is None:
            return None, dsum, None, dweight, dbias
        dx, dresidual = (
            dsum.to(dtype) if needed else None
            for needed, dtype in zip((need_dx, need_dresidual), ctx.dtypes, strict=True)
        )
        return None, dx, dresidual, dweight, dbias
