"""Linear layers on a GPU: cuBLAS multiplies, one Triton kernel does what comes before or after."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _triton
from .activations import CODES


def tile(n: int) -> dict[str, int]:
    cols = min(1024, _triton.next_power_of_2(n))
    return {"ROWS": min(16, 4096 // cols), "COLS": cols, "num_warps": 8}


@_triton.op("linear_fwd")
def linear_fwd(x, weight, bias, residual, gate, activation, need_pre):
    dtype = x.dtype if residual is None else residual.dtype
    matrix = weight.to(x.dtype).t()
    after = activation or gate is not None or residual is not None
    if bias is not None and bias.dtype == x.dtype and (residual is None or activation or gate is not None):
        # the sum is cuBLAS's own, before it rounds
        product, bias = torch.addmm(bias, x, matrix), None
    elif residual is not None and residual.dtype == x.dtype and bias is None and not activation and gate is None:
        product, after = torch.addmm(residual, x, matrix), False
    else:
        product = torch.mm(x, matrix)
    if not after and bias is None:
        return product, product.clone() if need_pre else product.new_empty(0, 0)
    return epilogue(product, bias, residual, gate, activation, need_pre, dtype)


def epilogue(product, bias, residual, gate, activation, need_pre, dtype) -> tuple[Tensor, Tensor]:
    """activation(product + bias) + residual in `dtype`, and where needed product + bias; it may overwrite product."""
    from . import triton_kernels as kernels

    rows, n = product.shape
    pre = None
    if need_pre and bias is not None:
        pre = torch.empty_like(product)
    out = (
        product
        if product.dtype == dtype and not (need_pre and bias is None)
        else product.new_empty(rows, n, dtype=dtype)
    )
    residual = None if residual is None else _triton.rows_of(residual)
    options = tile(n)
    grid = (_triton.ceil_div(rows, options["ROWS"]), _triton.ceil_div(n, options["COLS"]))
    _triton.launch(
        kernels.fwd, grid, product, bias, gate, residual, pre, out, rows, n, product.stride(0),
        0 if residual is None else residual.stride(0), ACTIVATION=activation, **options,
    )  # fmt: skip
    if not need_pre:
        return out, product.new_empty(0, 0)
    return out, product if pre is None else pre


@_triton.op("activation_bwd")
def activation_bwd(dout, pre, gate, activation, need_dbias):
    return _activation_bwd(dout, pre, gate, activation, need_dbias, True)


def _activation_bwd(dout, pre, gate, activation, need_dbias, need_hidden):
    """dpre, dgate, hidden and dbias; what is not needed is empty."""
    from . import triton_kernels as kernels

    rows, n = pre.shape
    dpre = pre.new_empty(rows, n)
    dgate = None if gate is None else torch.empty_like(dpre)
    hidden = torch.empty_like(dpre) if need_hidden else None
    partial = dbias = None
    dout, pre = _triton.rows_of(dout), _triton.rows_of(pre)
    # 16 elements of 16 bits per thread; of 32 bits, as many do not fit in the registers of sm_80
    options = {"ROWS": 32 // pre.itemsize, "COLS": 128, "num_warps": 4}
    columns, tiles = _triton.ceil_div(n, options["COLS"]), _triton.ceil_div(rows, options["ROWS"])
    shares = min(tiles, _triton.ceil_div(8 * _triton.multiprocessors(pre.device), max(columns, 1)))
    if need_dbias:
        partial = pre.new_empty(shares, n, dtype=torch.float32)
    _triton.launch(
        kernels.bwd, (columns, shares), dout, pre, gate, dpre, dgate, hidden, partial, rows, n, dout.stride(0),
        pre.stride(0), ACTIVATION=activation, **options,
    )  # fmt: skip
    if need_dbias:
        dbias = _triton.column_sums(partial, torch.float32)
    empty = pre.new_empty(0, 0)
    return (
        dpre,
        empty if dgate is None else dgate,
        empty if hidden is None else hidden,
        pre.new_empty(0, dtype=torch.float32) if dbias is None else dbias,
    )


@_triton.op("linear_bwd")
def linear_bwd(dout, x, weight, pre, activation, need_dx, need_dweight, need_dbias):
    if activation:
        dpre, _, _, dbias = _activation_bwd(dout, pre, None, activation, need_dbias, False)
    else:
        dpre = dout.to(x.dtype)
        dbias = dout.new_empty(0, dtype=torch.float32)
        if need_dbias:
            dbias = _triton.column_sums(_triton.rows_of(dout), torch.float32)
    dx = torch.mm(dpre, weight.to(x.dtype)) if need_dx else x.new_empty(0, 0)
    return dx, weight_gradient(dpre, x, weight) if need_dweight else weight.new_empty(0, 0), dbias


def weight_gradient(dpre: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """dpre^T x in the weight's dtype and layout."""
    if weight.stride(0) == 1 and weight.stride(1) != 1 and weight.stride(1) >= weight.shape[0]:
        return _triton.product(x.t(), dpre, weight.dtype).t()
    return _triton.product(dpre.t(), x, weight.dtype)


def unsupported(x: Tensor, weight: Tensor) -> str | None:
    return _triton.unsupported(x)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str | None, need_pre=False
) -> tuple[Tensor, Tensor]:
    """out (rows, out) and, where needed, what the activation was applied to."""
    return linear_fwd(x, weight, bias, residual, None, CODES[activation], need_pre)


def backward(
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    pre: Tensor | None,
    activation: str | None,
    need_dx: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight, dbias (float32); those not needed are empty."""
    return linear_bwd(dout, x, weight, pre, CODES[activation], need_dx, need_dweight, need_dbias)
