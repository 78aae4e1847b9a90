"""Linear cross entropy in the compiled library."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _library
from .._precision import float32_parts

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_ARGUMENTS = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, int ignore_index, float softcap, float z_loss, "
    "float label_smoothing"
)
_library.LIBRARY.define(f"linear_cross_entropy_fwd({_ARGUMENTS}, int parts=3) -> Tensor")
_library.LIBRARY.define(
    f"linear_cross_entropy_bwd(Tensor dloss, {_ARGUMENTS}, bool need_dhidden, bool need_dweight, bool need_dbias, "
    "int parts=3) -> (Tensor, Tensor, Tensor, Tensor)"
)
forward_op = torch.ops.lmkernels.linear_cross_entropy_fwd.default
backward_op = torch.ops.lmkernels.linear_cross_entropy_bwd.default


def _accumulator(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


@torch.library.register_fake("lmkernels::linear_cross_entropy_fwd", lib=_library.LIBRARY)
def _(hidden, weight, bias, labels, ignore_index, softcap, z_loss, label_smoothing, parts=3):
    return hidden.new_empty(hidden.shape[0], dtype=_accumulator(hidden))


@torch.library.register_fake("lmkernels::linear_cross_entropy_bwd", lib=_library.LIBRARY)
def _(
    dloss,
    hidden,
    weight,
    bias,
    labels,
    ignore_index,
    softcap,
    z_loss,
    label_smoothing,
    need_dhidden,
    need_dweight,
    need_dbias,
    parts=3,
):
    acc = _accumulator(hidden)
    return (
        hidden.new_empty(hidden.shape[0], dtype=acc),
        hidden.new_empty(hidden.shape if need_dhidden else (0, 0), dtype=acc),
        weight.new_empty(weight.shape if need_dweight else (0, 0)),
        hidden.new_empty(weight.shape[0] if need_dbias else 0, dtype=acc),
    )


def unsupported(hidden: Tensor, weight: Tensor) -> str | None:
    if _library.native_error is not None:
        return _library.native_error
    if not hidden.is_cpu:
        return f"the compiled library has no kernel for device {hidden.device.type!r}"
    if hidden.dtype not in _DTYPES:
        return f"dtype {hidden.dtype} is not one of float32, bfloat16, float16, float64"
    return None


def forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    softcap: float,
    z_loss: float,
    label_smoothing: float,
) -> Tensor:
    """The loss of each token, (t,) float32 (float64 for float64), 0 where it is ignored."""
    options = (ignore_index, softcap, z_loss, label_smoothing)
    return forward_op(hidden, weight, bias, labels, *options, float32_parts())


def backward(
    dloss: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    softcap: float,
    z_loss: float,
    label_smoothing: float,
    need_dhidden: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The forward's loss again, dhidden, dweight, dbias for dloss (t,); gradients that are not needed are empty.

    dweight has the weight's dtype; the others are float32 (float64 for float64).
    """
    options = (ignore_index, softcap, z_loss, label_smoothing)
    needs = (need_dhidden, need_dweight, need_dbias)
    return backward_op(dloss, hidden, weight, bias, labels, *options, *needs, float32_parts())
