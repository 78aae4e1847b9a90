"""The definition of linear cross entropy in plain torch: any float dtype, differentiable; holds the logits."""

from __future__ import annotations

import torch
from torch import Tensor

from ..linear.reference import product


def unsupported(hidden: Tensor, weight: Tensor) -> str | None:
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
    """The loss of each token, (t,) float32 (float64 for float64), 0 where it is ignored.

    The mean over all classes in label smoothing is that of Szegedy et al. 2015 (arXiv:1512.00567), as in torch; the
    z-loss that of PaLM (arXiv:2204.02311), lse^2.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        logits = product(hidden, weight, bias)  # (t, vocab)
        if softcap > 0:
            logits = softcap * torch.tanh(logits / softcap)
        counted = labels != ignore_index
        of_label = logits.gather(1, labels.where(counted, 0)[:, None])[:, 0]
        lse = torch.logsumexp(logits, 1)
        loss = lse - (1 - label_smoothing) * of_label
        if label_smoothing > 0:
            loss = loss - label_smoothing * logits.mean(1)
        if z_loss != 0:
            loss = loss + z_loss * lse.square()
        return loss.where(counted, 0)
