"""The gradient of softmax attention, and the gradient of the gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from . import native, reference

BACKENDS = {"native": native, "reference": reference}

# What follows q, k and v, in the order of the op's schema (see native.py): six tensors or None, then six numbers.
Features = tuple  # mask, bias, alibi_slopes, sink, kv_lengths, seed, left, right, offset, scale, softcap, dropout_p
_TENSORS = 6


def run(module, q: Tensor, k: Tensor, v: Tensor, features: Features, deterministic: bool) -> tuple[Tensor, Tensor]:
    """out and lse from a backend; autograd is entered only where a gradient is wanted."""
    if module is reference or not (torch.is_grad_enabled() and _any_needs_gradient(q, k, v, *features[1:4])):
        return module.forward(q, k, v, *features)
    return _Attention.apply(module.__name__.rpartition(".")[2], deterministic, q, k, v, *features)


def _any_needs_gradient(q, k, v, bias, alibi_slopes, sink) -> bool:
    return (
        q.requires_grad
        or k.requires_grad
        or v.requires_grad
        or (bias is not None and bias.requires_grad)
        or (alibi_slopes is not None and alibi_slopes.requires_grad)
        or (sink is not None and sink.requires_grad)
    )


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, name, deterministic, q, k, v, *features):
        out, lse = BACKENDS[name].forward(q, k, v, *features)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, out, lse, *features[:_TENSORS])
        ctx.name, ctx.deterministic, ctx.numbers = name, deterministic, features[_TENSORS:]
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        needs = ctx.needs_input_grad[6:9]  # bias, alibi_slopes, sink
        backward = _AttentionBackward.apply if torch.is_grad_enabled() else _backward
        dq, dk, dv, *optional = backward(
            ctx.name, dout, dlse, *ctx.saved_tensors, *ctx.numbers, *needs, ctx.deterministic
        )
        dbias, dslopes, dsink = (g if needed else None for g, needed in zip(optional, needs, strict=True))
        return None, None, dq, dk, dv, None, dbias, dslopes, dsink, *(None,) * (2 + len(ctx.numbers))


def _backward(name, *arguments):
    return BACKENDS[name].backward(*arguments)


class _AttentionBackward(torch.autograd.Function):
    """The gradient as a function of its own, whose gradient is taken by recomputing the reference."""

    @staticmethod
    def forward(ctx, name, dout, dlse, q, k, v, out, lse, *features_and_options):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(dout, dlse, q, k, v, *features_and_options[:_TENSORS])
        ctx.numbers = features_and_options[_TENSORS : 2 * _TENSORS]
        ctx.others = len(features_and_options) - _TENSORS
        return _backward(name, dout, dlse, q, k, v, out, lse, *features_and_options)

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
            first = _grad(outputs, inputs[2:], cotangents, create_graph=True)
            pairs = [(y, dy) for y, dy in zip(first, gradients, strict=True) if y is not None and dy is not None]
            second = [None] * len(inputs)
            if pairs:
                ys, dys = zip(*pairs, strict=True)
                second = _grad(ys, inputs, dys, create_graph)
        ddout, ddlse, dq, dk, dv, dbias, dslopes, dsink = second
        none = (None,) * ctx.others
        return None, ddout, ddlse, dq, dk, dv, None, None, None, dbias, dslopes, dsink, None, None, *none


def _grad(outputs, inputs, cotangents, create_graph):
    """torch.autograd.grad where some inputs may be None; their gradients are None."""
    present = [x for x in inputs if x is not None]
    gradients = iter(torch.autograd.grad(outputs, present, cotangents, create_graph=create_graph, allow_unused=True))
    return [None if x is None else next(gradients) for x in inputs]
