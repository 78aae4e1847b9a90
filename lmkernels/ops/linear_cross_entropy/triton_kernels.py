"""The kernel of cross entropy: the loss of a row of logits, and its gradient in the logits' place."""

from __future__ import annotations

import triton
import triton.language as tl

from ..linear.triton_kernels import tanh


@triton.jit
def _capped(x, softcap, CAPPED: tl.constexpr):
    return softcap * tanh(x / softcap) if CAPPED else x


@triton.jit
def loss_and_gradient(
    logits, bias, labels, dloss, losses, gradient, vocab, dloss_stride, ignore_index, softcap, z_loss, label_smoothing,
    CAPPED: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """One row: logits (rows, vocab) float32, losses (rows,).

    gradient: None, or the memory of logits in the dtype of the products, so that a row of it is the first half, or all,
    of the row of logits. It is written from the left, behind what is read.
    A label outside the vocabulary gives NaN.
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * vocab
    label = tl.load(labels + row)
    counted = label != ignore_index
    m = tl.full([COLS], float("-inf"), tl.float32)
    l = tl.zeros([COLS], tl.float32)
    total = tl.zeros([COLS], tl.float32)
    if counted:
        for first in range(0, vocab, COLS):
            col = first + tl.arange(0, COLS)
            x = tl.load(logits + col, mask=col < vocab, other=0.0)
            if bias is not None:
                x += tl.load(bias + col, mask=col < vocab, other=0.0).to(tl.float32)
            x = _capped(x, softcap, CAPPED)
            total += tl.where(col < vocab, x, 0.0)
            x = tl.where(col < vocab, x, float("-inf"))
            larger = tl.maximum(m, x)
            base = tl.where(larger == float("-inf"), 0.0, larger)
            l = l * tl.exp(m - base) + tl.exp(x - base)
            m = larger
    largest = tl.max(m, 0)
    base = tl.where(largest == float("-inf"), 0.0, largest)
    lse = base + tl.log(tl.sum(l * tl.exp(m - base), 0))
    known = counted & (label >= 0) & (label < vocab)
    of_label = tl.load(logits + label, mask=known, other=0.0)
    if bias is not None:
        of_label += tl.load(bias + label, mask=known, other=0.0).to(tl.float32)
    of_label = _capped(of_label, softcap, CAPPED)
    loss = lse - (1.0 - label_smoothing) * of_label
    if label_smoothing > 0:
        loss -= label_smoothing * (tl.sum(total, 0) / vocab)
    loss += z_loss * lse * lse
    loss = tl.where(counted, tl.where(known, loss, float("nan")), 0.0)
    tl.store(losses + row, loss)
    if gradient is not None:
        gradient += row * (vocab * 4 // (gradient.dtype.element_ty.primitive_bitwidth // 8))
        scale = tl.where(counted, tl.load(dloss + row * dloss_stride), 0.0)
        of_lse = scale * (1.0 + 2.0 * z_loss * lse)
        everywhere = scale * label_smoothing / vocab
        at_label = scale * (1.0 - label_smoothing)
        for first in range(0, vocab, COLS):
            col = first + tl.arange(0, COLS)
            d = tl.zeros([COLS], tl.float32)
            if counted:
                x = tl.load(logits + col, mask=col < vocab, other=0.0)
                if bias is not None:
                    x += tl.load(bias + col, mask=col < vocab, other=0.0).to(tl.float32)
                x = _capped(x, softcap, CAPPED)
                d = of_lse * tl.exp(x - lse) - everywhere - tl.where(col == label, at_label, 0.0)
                if CAPPED:
                    d *= 1.0 - (x / softcap) * (x / softcap)
            tl.debug_barrier()  # all have read what the first block of the gradient overwrites
            tl.store(gradient + col, d.to(gradient.dtype.element_ty), mask=col < vocab)
