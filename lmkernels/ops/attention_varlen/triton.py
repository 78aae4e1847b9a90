"""Attention over packed sequences in Triton: attention's kernels, which know where the sequences lie."""

from __future__ import annotations

from torch import Tensor

from .. import _triton
from ..attention.triton import Packing, Problem, run_backward, run_forward, unsupported

__all__ = ["backward", "forward", "unsupported"]


def _problem(q, k, v, features: tuple) -> Problem:
    *options, starts_q, starts_k, most_q, most_k, left, right, scale, softcap, dropout_p = features
    packing = Packing(starts_q, starts_k, most_q, most_k)
    return Problem(q, k, v, *options, left, right, 0, scale, softcap, dropout_p, packing)


@_triton.op("attention_varlen_fwd")
def _fwd(q, k, v, *features):
    return run_forward(_problem(q, k, v, features))


@_triton.op("attention_varlen_bwd")
def _bwd(dout, dlse, q, k, v, out, lse, *features_and_needs):
    features, needs = features_and_needs[:-4], features_and_needs[-4:]
    return run_backward(_problem(q, k, v, features), dout, dlse, out, lse, *needs)


def forward(q: Tensor, k: Tensor, v: Tensor, *features) -> tuple[Tensor, Tensor]:
    """out (t_q, h, d_v) and lse (h, t_q); `features` in the order of the schema."""
    return _fwd(q, k, v, *features)


def backward(
    dout: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *features_and_needs,
) -> tuple[Tensor, ...]:
    """dq, dk, dv, dbias, dslopes, dsink; the last three are empty where not needed."""
    return _bwd(dout, dlse, q, k, v, out, lse, *features_and_needs)
