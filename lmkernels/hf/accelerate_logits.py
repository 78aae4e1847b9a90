"""Logits of a language model that nobody computes unless somebody reads them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

from ..nn._scope import is_for_torch
from ..nn._stand_in import StandIn
from ..ops._checks import autocast
from ..ops.linear import linear
from ..ops.linear_cross_entropy import linear_cross_entropy


class LMHead(StandIn):
    """The forward of the torch.nn.Linear that makes the logits.

    In training they are `Logits`, which cross entropy does not need to see; a forward without gradients, and compiled
    code, get them computed.
    """

    def forward(self, input: Tensor) -> Tensor:
        if is_for_torch(input, self.weight, self.bias):
            return super().forward(input)
        wanted = input.requires_grad or self.weight.requires_grad
        if self.training and wanted and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return Logits(*autocast(input), self.weight, self.bias)
        return linear(input, self.weight, self.bias)


class Logits(Tensor):
    """hidden weight^T + bias, (..., vocab), known by its factors.

    torch.nn.functional.cross_entropy, in whatever loss function it is called, takes its loss and gradients from the
    factors by `linear_cross_entropy`, without a tensor of this size. On the way there the logits may be viewed, sliced,
    converted to another float and given a constant bias. All else, and all of it where torch cannot be without the
    numbers, computes them first, once, with a gradient: so whoever reads them finds what he expects.
    """

    @staticmethod
    def __new__(cls, hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype=None, parent=None):
        """parent: (logits, function, arguments, named arguments) that these are the result of."""
        shape = (*hidden.shape[:-1], weight.shape[0])
        self = Tensor._make_wrapper_subclass(
            cls, shape, dtype=dtype or hidden.dtype, device=hidden.device, requires_grad=True
        )
        self.factors, self.parent, self.values = (hidden, weight, bias), parent, None
        return self

    __init__ = object.__init__

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if function in _METADATA:
                return function(*args, **kwargs)
            logits = args[0] if args else kwargs.get("input")
            if type(logits) is cls and not _is_computed(logits):
                if function is F.cross_entropy:
                    loss = _loss(*args, **kwargs)
                    if loss is not None:
                        return loss
                elif function in _DERIVE:
                    derived = _DERIVE[function](logits, function, args[1:], kwargs)
                    if derived is not None:
                        return derived
        return function(*tree_map(_computed, args), **tree_map(_computed, kwargs))

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        # what comes from torch's C++, past __torch_function__
        return function(*tree_map(_computed, args), **tree_map(_computed, kwargs or {}))


_METADATA = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout", "requires_grad")),
    *(getattr(Tensor, name).__get__ for name in ("is_cpu", "is_cuda", "is_sparse", "is_quantized", "is_nested")),
    *(getattr(Tensor, name) for name in ("size", "dim", "ndimension", "numel", "nelement", "__len__")),
    *(getattr(Tensor, name) for name in ("is_floating_point", "is_complex", "element_size")),
}


def _is_computed(logits: Logits) -> bool:
    return logits.values is not None or (logits.parent is not None and _is_computed(logits.parent[0]))


def _computed(x):
    """The numbers of logits, as a tensor of torch's; anything else as it is."""
    if type(x) is not Logits:
        return x
    if x.values is None:
        # with a gradient, whoever asks first
        with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
            if x.parent is None:
                x.values = linear(*x.factors)
            else:
                logits, function, args, kwargs = x.parent
                x.values = function(_computed(logits), *args, **kwargs)
    return x.values


def _loss(input, target, weight=None, size_average=None, ignore_index=-100, reduce=None, reduction="mean", **smoothing):
    """The cross entropy of logits (t, vocab) against the indices (t,) of classes, or None where it is another one."""
    indices = isinstance(target, Tensor) and target.dtype == torch.int64 and target.shape == input.shape[:-1]
    if input.dim() != 2 or not indices or any(x is not None for x in (weight, size_average, reduce)):
        return None
    hidden, w, bias = input.factors
    options = {"ignore_index": ignore_index, "reduction": reduction, **smoothing}
    lowered = input.dtype.itemsize == 2 and not torch.is_autocast_enabled(input.device.type)
    with torch.autocast(input.device.type, enabled=False):
        loss = linear_cross_entropy(hidden, w, target, bias=bias, **options)
        return loss.to(input.dtype) if lowered else loss


def _viewed(logits, function, args, kwargs):
    """view and reshape that leave the last axis alone."""
    shape = tuple(args[0]) if len(args) == 1 and isinstance(args[0], (tuple, list)) else args
    vocab, rows = logits.shape[-1], math.prod(logits.shape[:-1])
    if kwargs or not all(isinstance(n, int) for n in shape) or shape[-1:] not in ((vocab,), (-1,)):
        return None
    if -1 in shape[:-1] if shape[-1] == -1 else shape.count(-1) > 1:
        return None  # torch decides, or complains
    if -1 not in shape[:-1] and math.prod(shape[:-1]) != rows:
        return None
    hidden, weight, bias = logits.factors
    hidden = hidden.reshape(*shape[:-1], hidden.shape[-1])
    return Logits(hidden, weight, bias, logits.dtype, (logits, function, args, kwargs))


def _sliced(logits, function, args, kwargs):
    """Indexing by integers and slices that leaves the last axis alone."""
    (index,) = args
    index = index if isinstance(index, tuple) else (index,)
    if not all(isinstance(i, (int, slice)) or i is Ellipsis for i in index):
        return None
    if (Ellipsis in index or len(index) == logits.dim()) and index[-1] not in (slice(None), Ellipsis):
        return None
    hidden, weight, bias = logits.factors
    return Logits(hidden[index], weight, bias, logits.dtype, (logits, function, args, kwargs))


def _converted(logits, function, args, kwargs):
    """float(), and to(torch.float32)."""
    if kwargs or args != (() if function is Tensor.float else (torch.float32,)) or logits.dtype == torch.float64:
        return None
    if logits.dtype == torch.float32:
        return logits
    return Logits(*logits.factors, torch.float32, (logits, function, args, kwargs))


def _unchanged(logits, function, args, kwargs):
    return None if args or kwargs else logits


def _biased(logits, function, args, kwargs):
    """The sum with a constant (1, vocab) or (vocab,), as translation models have it."""
    hidden, weight, bias = logits.factors
    (other,) = args if len(args) == 1 else (None,)
    if kwargs or bias is not None or type(other) not in (Tensor, torch.nn.Parameter) or other.requires_grad:
        return None
    if other.numel() != weight.shape[0] or other.shape[-1:] != weight.shape[:1] or other.dim() > logits.dim():
        return None
    dtype = torch.promote_types(logits.dtype, other.dtype)
    if other.dtype not in (weight.dtype, hidden.dtype):
        return None
    return Logits(hidden, weight, other.flatten(), dtype, (logits, function, args, kwargs))


_DERIVE = {
    Tensor.view: _viewed,
    Tensor.reshape: _viewed,
    Tensor.__getitem__: _sliced,
    Tensor.float: _converted,
    Tensor.to: _converted,
    Tensor.contiguous: _unchanged,
    Tensor.add: _biased,
    Tensor.__add__: _biased,
    torch.add: _biased,
}
