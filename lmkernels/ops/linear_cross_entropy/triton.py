"""Linear cross entropy on a GPU: cuBLAS multiplies a chunk of tokens, one Triton kernel makes the loss and, in the
logits' place, the gradient.

Ignored tokens take part in the products: how many there are would have to be read back from the GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _triton

CHUNK = 2**26  # logits at a time


@_triton.op("linear_cross_entropy_fwd")
def _fwd(hidden, weight, bias, labels, ignore_index, softcap, z_loss, label_smoothing):
    losses = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
    matrix = weight.to(hidden.dtype).t()
    for part in _chunks(*hidden.shape[:1], weight.shape[0]):
        logits = _triton.product(hidden[part], matrix, torch.float32)
        _loss(logits, bias, labels[part], None, losses[part], None, ignore_index, softcap, z_loss, label_smoothing)
    return losses


@_triton.op("linear_cross_entropy_bwd")
def _bwd(
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
):
    (t, d), vocab = hidden.shape, weight.shape[0]
    narrow = weight.to(hidden.dtype)
    losses = hidden.new_empty(t, dtype=torch.float32)
    dhidden = hidden.new_empty((t, d) if need_dhidden else (0, 0), dtype=torch.float32)
    dweight = weight.new_zeros(vocab, d) if need_dweight else weight.new_empty(0, 0)
    dbias = hidden.new_zeros(vocab if need_dbias else 0, dtype=torch.float32)
    chunks = _chunks(t, vocab)
    if need_dweight and len(chunks) > 1:
        dweight = dweight.float()  # where the chunks are added up
    for part in chunks:
        logits = _triton.product(hidden[part], narrow.t(), torch.float32)
        # of the bias, the gradient is a sum of what has not been rounded
        gradient = logits if need_dbias else logits.view(hidden.dtype)[:, :vocab]
        _loss(
            logits, bias, labels[part], dloss[part], losses[part], gradient, ignore_index, softcap, z_loss,
            label_smoothing,
        )  # fmt: skip
        if need_dbias:
            dbias += _triton.column_sums(gradient, torch.float32)
            gradient = gradient.to(hidden.dtype)
        if need_dhidden:
            dhidden[part] = _triton.product(gradient, narrow, torch.float32)
        if need_dweight:
            of_chunk = _triton.product(gradient.t(), hidden[part], dweight.dtype)
            dweight = of_chunk if len(chunks) == 1 else dweight.add_(of_chunk)
    return losses, dhidden, dweight.to(weight.dtype), dbias


def _chunks(t: int, vocab: int) -> list[slice]:
    """Slices of the tokens, each a multiple of the products' tiles but for the last."""
    size = max(128, CHUNK // vocab // 128 * 128)
    return [slice(first, min(first + size, t)) for first in range(0, t, size)]


def _loss(logits, bias, labels, dloss, losses, gradient, ignore_index, softcap, z_loss, label_smoothing) -> None:
    from . import triton_kernels as kernels

    rows, vocab = logits.shape
    cols = min(4096, _triton.next_power_of_2(vocab))
    _triton.launch(
        kernels.loss_and_gradient, (rows,), logits, bias, labels, dloss, losses, gradient, vocab,
        0 if dloss is None else dloss.stride(0), ignore_index, softcap, z_loss, label_smoothing, CAPPED=softcap > 0,
        COLS=cols, num_warps=max(1, cols // 512),
    )  # fmt: skip


def unsupported(hidden: Tensor, weight: Tensor) -> str | None:
    return _triton.unsupported(hidden)


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
    """The loss of each token, (t,) float32, 0 where it is ignored."""
    return _fwd(hidden, weight, bias, labels, ignore_index, softcap, z_loss, label_smoothing)


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

    dweight has the weight's dtype; the others are float32.
    """
    options = (ignore_index, softcap, z_loss, label_smoothing)
    needs = (need_dhidden, need_dweight, need_dbias)
    return _bwd(dloss, hidden, weight, bias, labels, *options, *needs)
