"""Layer norm and RMS norm in Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _triton

# Rows that fit in registers, with all that is computed of them: in elements, and in bytes of x.
LONGEST_FWD, LONGEST_BWD = 16384, 16384


LONG = {"COLS": 4096, "num_warps": 8}
PARAMETERS = {"ROWS": 16, "COLS": 128, "num_warps": 4}


@_triton.op("norm_fwd")
def _fwd(x, residual, weight, bias, eps, center, for_backward):
    from . import triton_kernels as kernels

    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    y = x.new_empty(x.shape, dtype=dtype)
    s = None if residual is None else torch.empty_like(y)
    rstd = x.new_empty(x.shape[:-1], dtype=torch.float32) if for_backward else None
    mean = torch.empty_like(rstd) if for_backward and center else None
    if x.numel():
        flat, added = _triton.rows_of(x), None if residual is None else _triton.rows_of(residual)
        rows, d = flat.shape
        arguments = (
            flat, added, _vector(weight), _vector(bias), y, s, rstd, mean, rows, d,
            flat.stride(0), 0 if added is None else added.stride(0), eps,
        )  # fmt: skip
        if d <= LONGEST_FWD:
            options = _triton.row_tile(d)
            grid = (_triton.ceil_div(rows, options["ROWS"]),)
            _triton.launch(kernels.fwd, grid, *arguments, CENTER=center, **options)
        else:
            _triton.launch(kernels.fwd_long, (rows,), *arguments, CENTER=center, **LONG)
    return [tensor for tensor in (y, s, rstd, mean) if tensor is not None]


@_triton.op("norm_bwd")
def _bwd(dy, ds, s, rstd, mean, weight, bias, need_dweight, need_dbias):
    from . import triton_kernels as kernels

    d = s.shape[-1]
    dx = s.new_empty(s.shape)
    # of dweight and dbias, those that are wanted
    wanted = (weight if need_dweight else None, bias if need_dbias else None)
    if not s.numel():
        return [dx, *(torch.zeros_like(x) for x in wanted if x is not None)]
    dy, ds, s = _triton.rows_of(dy), None if ds is None else _triton.rows_of(ds), _triton.rows_of(s)
    rows, weight = s.shape[0], _vector(weight)
    strides = (dy.stride(0), 0 if ds is None else ds.stride(0), s.stride(0))
    fused = d * s.itemsize <= LONGEST_BWD
    options = _triton.row_tile(d) if fused else PARAMETERS
    tiles, programs = _triton.ceil_div(rows, options["ROWS"]), 2 * _triton.multiprocessors(s.device)
    if not fused:
        columns = _triton.ceil_div(d, options["COLS"])
        programs = _triton.ceil_div(2 * programs, columns)
    programs = min(tiles, programs)
    partial = [None if x is None else s.new_empty(programs, d, dtype=torch.float32) for x in wanted]
    if fused:
        _triton.launch(
            kernels.bwd, (programs,), dy, ds, s, rstd, mean, weight, dx, *partial, rows, d, *strides, **options
        )
    else:
        _triton.launch(kernels.bwd_long, (rows,), dy, ds, s, rstd, mean, weight, dx, d, *strides, **LONG)
        if any(x is not None for x in wanted):
            grid = (columns, programs)
            arguments = (dy, s, rstd, mean, *partial, rows, d, strides[0], strides[2])
            _triton.launch(kernels.bwd_parameters, grid, *arguments, **options)
    return [dx, *(_triton.column_sums(p, x.dtype) for p, x in zip(partial, wanted) if x is not None)]


def _vector(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def unsupported(x: Tensor) -> str | None:
    return _triton.unsupported(x)


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
