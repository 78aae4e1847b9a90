"""Cross entropy of a linear layer that never holds all logits: the public function and its gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _dispatch
from .._autograd import needs_gradient, reference_gradients
from .._checks import autocast, check_device, check_finite, check_floating, check_tensor
from ..linear.checks import check_bias, check_weight
from ..quantize_weight.api import QuantizedWeight
from . import native, reference, triton

BACKENDS = {"native": native, "triton": triton, "reference": reference}


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor | QuantizedWeight,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    softcap: float = 0.0,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """Cross entropy of softcap(hidden weight^T + bias) against labels, without a (t, vocab) tensor of logits.

    hidden: (..., d)       float32, bfloat16, float16 or (on the CPU) float64
    weight: (vocab, d)     either axis contiguous; an embedding's weight, for instance. One from
        `quantize_weight` is dequantised for the call, and has no gradient
    labels: (...)          int64; tokens whose label is ignore_index do not count, and cost nothing
    bias: (vocab,)
    reduction: "mean" over the tokens that count (NaN where none does, as in torch), "sum", or "none": the loss of each
        token, (...), 0 where it is ignored
    softcap: c > 0 replaces a logit x by c * tanh(x / c)
    z_loss: adds z_loss * logsumexp(logits)^2 to the loss of each token that counts
    label_smoothing: as in torch.nn.functional.cross_entropy
    backend: "native", "triton" or "reference"; None takes the first that can run this.

    weight and bias have hidden's dtype; where that has 16 bits they may be float32: then the products are still of 16
    bits, without a copy of the weight in 16 bits, and its gradient is float32.
    Returns float32 (float64 for float64). Factors in float32 keep their digits, unless
    `torch.set_float32_matmul_precision` allows fewer where that is faster. Differentiable in hidden, weight and bias;
    twice by recomputation through the reference, which holds the logits.

    "mean" and "sum" compute the gradients together with the loss, from the same logits, and the backward only
    multiplies them by the gradient that arrives; a 16-bit weight's gradient is rounded before that, and again after it
    where the factor is no power of two. "none" computes the logits again in the backward.

    Raises ValueError or TypeError for bad arguments, NotImplementedError when `backend` cannot run them. Under
    torch.compile, where the values of labels are unknown, one that is out of range is a RuntimeError of the kernel.
    """
    (hidden,) = autocast(hidden)
    check_hidden(hidden)
    if isinstance(weight, QuantizedWeight):
        weight = weight.dequantize(hidden.dtype)
    check_weight("weight", weight, hidden, hidden.shape[-1], x_name="hidden")
    bias = check_bias("bias", bias, hidden, weight.shape[0], x_name="hidden")
    check_reduction(reduction)
    options = (
        check_integer("ignore_index", ignore_index),
        check_softcap(softcap),
        check_finite("z_loss", z_loss),
        check_label_smoothing(label_smoothing),
    )
    check_labels(labels, hidden, weight.shape[0], ignore_index)
    module = _dispatch.choose("linear_cross_entropy", BACKENDS, backend, hidden, weight)
    rows = hidden.reshape(-1, hidden.shape[-1]) if hidden.dim() != 2 else hidden
    flat = labels.reshape(-1).contiguous()
    if module is reference:
        loss = reference.forward(rows, weight, bias, flat, *options)
    elif not needs_gradient(rows, weight, bias):
        loss = module.forward(rows, weight, bias, flat, *options)
    elif reduction == "none":
        loss = _TokenLosses.apply(module.__name__.rpartition(".")[2], options, flat, rows, weight, bias)
    else:
        return _Loss.apply(module.__name__.rpartition(".")[2], options, reduction, flat, rows, weight, bias)
    return reduce(loss, flat, ignore_index, reduction) if reduction != "none" else loss.view(labels.shape)


def reduce(loss: Tensor, labels: Tensor, ignore_index: int, reduction: str) -> Tensor:
    """The losses of the tokens (t,) as one."""
    return loss.sum() if reduction == "sum" else loss.sum() / (labels != ignore_index).sum()


class _TokenLosses(torch.autograd.Function):
    """The loss of each token. What it counts for is known in the backward only, which starts again from hidden."""

    @staticmethod
    def forward(ctx, name, options, labels, hidden, weight, bias):
        ctx.save_for_backward(labels, hidden, weight, bias)
        ctx.name, ctx.options = name, options
        return BACKENDS[name].forward(hidden, weight, bias, labels, *options)

    @staticmethod
    def backward(ctx, dloss):
        labels, hidden, weight, bias = ctx.saved_tensors
        needs = ctx.needs_input_grad[3:]
        if torch.is_grad_enabled():
            return (
                None,
                None,
                None,
                *reference_gradients(
                    lambda *tensors: reference.forward(*tensors, labels, *ctx.options),
                    (hidden, weight, bias),
                    needs,
                    (dloss,),
                ),
            )
        _, *gradients = BACKENDS[ctx.name].backward(dloss, hidden, weight, bias, labels, *ctx.options, *needs)
        return None, None, None, *in_dtypes(gradients, (hidden, weight, bias), needs)


class _Loss(torch.autograd.Function):
    """The sum or mean of the losses, and their gradients at once: what each token counts for is known."""

    @staticmethod
    def forward(ctx, name, options, reduction, labels, hidden, weight, bias):
        needs = ctx.needs_input_grad[4:]
        count = (labels != options[0]).sum() if reduction == "mean" else 1
        acc = torch.promote_types(hidden.dtype, torch.float32)
        scale = (torch.ones((), dtype=acc, device=hidden.device) / count).expand(labels.shape)
        losses, *gradients = BACKENDS[name].backward(scale, hidden, weight, bias, labels, *options, *needs)
        ctx.save_for_backward(labels, hidden, weight, bias, *gradients)
        ctx.options = options, reduction
        return losses.sum() / count

    @staticmethod
    def backward(ctx, dloss):
        labels, hidden, weight, bias, *gradients = ctx.saved_tensors
        options, reduction = ctx.options
        needs = ctx.needs_input_grad[4:]
        if torch.is_grad_enabled():
            return (
                None,
                None,
                None,
                None,
                *reference_gradients(
                    lambda *tensors: reduce(
                        reference.forward(*tensors, labels, *options), labels, options[0], reduction
                    ),
                    (hidden, weight, bias),
                    needs,
                    (dloss,),
                ),
            )
        # a GPU is not waited for
        if torch.compiler.is_compiling() or not dloss.is_cpu or dloss.item() != 1:
            gradients = [gradient * dloss for gradient in gradients]
        return None, None, None, None, *in_dtypes(gradients, (hidden, weight, bias), needs)


def in_dtypes(gradients, inputs, needs) -> list[Tensor | None]:
    """Gradients in the dtypes of what they are gradients of; None where not needed."""
    return [
        gradient.to(x.dtype) if needed else None for gradient, x, needed in zip(gradients, inputs, needs, strict=True)
    ]


def check_hidden(hidden) -> None:
    check_floating("hidden", hidden)
    if hidden.dim() < 1:
        raise ValueError("hidden must be (..., d) with at least one axis, got ()")


def check_reduction(reduction: str) -> None:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")


def check_integer(name: str, x) -> int:
    if not isinstance(x, (int, torch.SymInt)) or isinstance(x, bool):
        raise TypeError(f"{name} must be an integer, got {type(x).__name__}")
    return x


def check_softcap(softcap: float) -> float:
    softcap = check_finite("softcap", softcap)
    if softcap < 0:
        raise ValueError(f"softcap must be a finite number >= 0 (0 is off), got {softcap}")
    return softcap


def check_label_smoothing(label_smoothing: float) -> float:
    label_smoothing = check_finite("label_smoothing", label_smoothing)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    return label_smoothing


def check_labels(labels, hidden: Tensor, vocab: int, ignore_index: int) -> None:
    """Shape and dtype, and the values where they are known: not while a graph is compiled, and not on a GPU."""
    if check_tensor("labels", labels).dtype != torch.int64:
        raise TypeError(f"labels must be int64, got {labels.dtype}")
    check_device("labels", labels, "hidden", hidden)
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(f"labels must be {tuple(hidden.shape[:-1])} like hidden without d, got {tuple(labels.shape)}")
    if torch.compiler.is_compiling() or not labels.is_cpu or labels.numel() == 0:
        return
    counted = labels[labels != ignore_index]
    if counted.numel() == 0:
        return
    least, most = counted.aminmax()
    if least < 0 or most >= vocab:
        wrong = least.item() if least < 0 else most.item()
        raise ValueError(f"labels must be in [0, {vocab}) or ignore_index = {ignore_index}, got {wrong}")
