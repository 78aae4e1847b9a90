"""Layer norm and RMS norm in the compiled library."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _library

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# Lists, because only what is asked for is made: y; s with a residual; for_backward rstd and, if centred, mean.
_library.LIBRARY.define(
    "norm_fwd(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, bool center, bool for_backward)"
    " -> Tensor[]"
)
# dx; dweight and dbias where needed. A mean says that the norm was centred.
_library.LIBRARY.define(
    "norm_bwd(Tensor dy, Tensor? ds, Tensor s, Tensor rstd, Tensor? mean, Tensor? weight, Tensor? bias, "
    "bool need_dweight, bool need_dbias) -> Tensor[]"
)
_fwd = torch.ops.lmkernels.norm_fwd.default
_bwd = torch.ops.lmkernels.norm_bwd.default


@torch.library.register_fake("lmkernels::norm_fwd", lib=_library.LIBRARY)
def _(x, residual, weight, bias, eps, center, for_backward):
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    results = [x.new_empty(x.shape, dtype=dtype) for _ in range(1 if residual is None else 2)]
    if for_backward:
        acc = torch.promote_types(dtype, torch.float32)
        results += [x.new_empty(x.shape[:-1], dtype=acc) for _ in range(2 if center else 1)]
    return results


@torch.library.register_fake("lmkernels::norm_bwd", lib=_library.LIBRARY)
def _(dy, ds, s, rstd, mean, weight, bias, need_dweight, need_dbias):
    wanted = [x for x, needed in ((weight, need_dweight), (bias, need_dbias)) if needed and x is not None]
    return [s.new_empty(s.shape), *(x.new_empty(x.shape) for x in wanted)]


def unsupported(x: Tensor) -> str | None:
    if _library.native_error is not None:
        return _library.native_error
    if not x.is_cpu:
        return f"the compiled library has no kernel for device {x.device.type!r}"
    if x.dtype not in _DTYPES:
        return f"dtype {x.dtype} is not one of float32, bfloat16, float16, float64"
    return None


def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, center: bool
) -> tuple[Tensor, Tensor]:
    """y = norm(s) and s = x + residual, both (..., d) in s's dtype; without a residual s is x."""
    y, *s = _fwd(x, residual, weight, bias, eps, center, False)
    return y, s[0] if s else x


def forward_for_backward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, center: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The same, then rstd and (None where nothing is centred) mean of each row, for `backward`."""
    y, *rest = _fwd(x, residual, weight, bias, eps, center, True)
    s = x if residual is None else rest.pop(0)
    return y, s, rest[0], rest[1] if center else None


def backward(
    dy: Tensor,
    ds: Tensor | None,
    s: Tensor,
    rstd: Tensor,
    mean: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradient of s in all, through y and directly; dweight and dbias, None where not needed."""
    dx, *rest = _bwd(dy, ds, s, rstd, mean, weight, bias, need_dweight, need_dbias)
    return dx, rest.pop(0) if need_dweight else None, rest.pop(0) if need_dbias else None
