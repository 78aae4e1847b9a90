"""attention_varlen on ragged batches against torch's SDPA on the padded batch, and on nested tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import harness
from lmkernels import attention_varlen
from lmkernels.testing import cases, numerics


def lines() -> list[harness.Line]:
    """One per case, dtype and pass."""
    return [
        line(group, case, dtype, direction)
        for group, members in cases.ATTENTION_VARLEN_BENCHMARKS.items()
        for dtype in harness.DTYPES
        for case in members
        for direction in ("forward", "forward+backward")
    ]


def wrong(case: cases.AttentionVarlenCase, dtype: torch.dtype) -> str | None:
    """Why the results of this case are wrong, or None: all of the first head against float64, by the tests' rule."""
    inputs = case.make(dtype)
    actual = numerics.attention_results(attention_varlen, inputs)
    tensors = (x[:, :1] for x in (inputs.q, inputs.k, inputs.v, inputs.dout))
    part = cases.AttentionInputs(*tensors, inputs.dlse[:1], inputs.options)
    golden = numerics.golden_attention(part, attention_varlen)
    plain = numerics.plain_attention_results(part, attention_varlen)
    for name, expected in golden.items():
        own = actual[name][:1] if name == "lse" else actual[name][:, :1]
        try:
            numerics.assert_as_accurate(own, expected, plain[name], name, dtype=dtype, samples=part.rows)
        except AssertionError as error:
            return str(error)
    return None


def padded(x: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """(t, h, d) as (b, h, s, d), SDPA's layout, with zeros behind each sequence."""
    return torch.nn.utils.rnn.pad_sequence(x.split(lengths), batch_first=True).transpose(1, 2).contiguous()


def competitors(case: cases.AttentionVarlenCase, dtype: torch.dtype, direction: str) -> dict[str, Callable[[], object]]:
    """The calls to compare, each on tensors of its own in the layout that suits it; padding costs the peers nothing.

    SDPA runs on the padded batch with the mask that a model makes; where causal, also without a mask, as the triangle
    hides the padding behind each sequence from all but the padding; on one sequence after the other; and on nested
    tensors, which on the CPU it does not do when causal.
    """
    inputs = case.make(dtype)
    lengths, causal = case.lengths_q, case.padded.causal
    bounds = {name: x for name, x in inputs.options.items() if "seqlen" in name}
    tensors = inputs.q, inputs.k, inputs.v, inputs.dout  # (t, h, d)
    s = case.padded.s_k
    mask = (torch.arange(s) < torch.tensor(lengths)[:, None])[:, None, None]  # (b, 1, 1, s)
    if causal:
        mask = mask & torch.ones(s, s, dtype=torch.bool).tril()  # (b, 1, s, s)

    def loop(q, k, v):
        return torch.cat([sdpa(*x, causal) for x in zip(*(x.split(lengths, 1) for x in (q, k, v)), strict=True)], 1)

    def call(function, *tensors):
        *leaves, dout = (x.detach().requires_grad_(direction != "forward") for x in tensors)
        if direction == "forward":
            return lambda: function(*leaves)
        return lambda: torch.autograd.grad(function(*leaves), leaves, dout.detach())

    in_batch = [padded(x, lengths) for x in tensors]
    calls = {
        "ours": call(lambda *qkv: attention_varlen(*qkv, **bounds, causal=causal), *tensors),
        "SDPA, mask": call(lambda *qkv: F.scaled_dot_product_attention(*qkv, attn_mask=mask), *in_batch),
        "SDPA, loop": call(loop, *(x.transpose(0, 1).contiguous() for x in tensors)),
    }
    if causal:
        calls["SDPA, no mask"] = call(lambda *qkv: sdpa(*qkv, causal), *in_batch)
    if harness.device.type == "cuda" or not causal:
        offsets = cases.cu_seqlens(lengths).long()
        nested = [torch.nested.nested_tensor_from_jagged(x, offsets).transpose(1, 2) for x in tensors]
        calls["SDPA, nested"] = call(lambda *qkv: sdpa(*qkv, causal), *nested)
    return calls


def sdpa(q, k, v, causal):
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def line(group: str, case: cases.AttentionVarlenCase, dtype: str, direction: str) -> harness.Line:
    h, d, torch_dtype = case.padded.h, case.padded.d, harness.DTYPES[dtype]
    passes, tensors = (2, 4) if direction == "forward" else (7, 11)
    flops = passes * 2 * h * case.visible_pairs() * d
    return harness.Line(
        group,
        str(case),
        dtype,
        direction,
        competitors=lambda: competitors(case, torch_dtype, direction),
        wrong=lambda: wrong(case, torch_dtype),
        flops=flops,
        bytes_read=tensors * sum(case.lengths_q) * h * d * torch_dtype.itemsize,
    )
