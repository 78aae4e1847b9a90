"""attention: as accurate as plain torch for every case, dtype, backend and instruction set."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmkernels import _library, attention
from lmkernels.ops.attention.reference import scores_and_visible
from lmkernels.testing import cases, numerics

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
INTERPRETED = (
    r"combination.*triton-(float32|bfloat16)|zeros\[triton-(causal, more queries|lengths, one of|bias of every.*hides)|"
    r"plain_torch\[triton-((five|head size 37).*-float16|"
    r"(five|one token short|head size (8|37,)|negative|zero|softcap|dropout, causal|causal, more queries).*-float32)"
)
ON_EVERY_ISA = r"native"


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def samples(case: cases.AttentionCase, dtype: torch.dtype) -> list[cases.AttentionInputs]:
    """Several inputs where a result has so few elements (sink: 4) that the error of one of them is chance."""
    first = case.make(dtype)
    smallest = min(x.numel() for x in (first.dlse, *first.differentiable().values()))
    return [first, *(case.make(dtype, seed) for seed in range(1, min(8, math.ceil(64 / smallest))))]


def stacked(results: list[dict]) -> dict:
    return {name: torch.stack([result[name] for result in results]) for name in results[0]}


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("case", cases.ATTENTION, ids=str)
def test_results_and_gradients_are_as_accurate_as_plain_torch(case, dtype, backend):
    inputs = samples(case, dtype)
    actual = stacked([numerics.attention_results(attention, x, backend=backend) for x in inputs])
    golden = stacked([numerics.golden_attention(x) for x in inputs])
    plain = stacked([numerics.plain_attention_results(x) for x in inputs])
    assert {name: x.dtype for name, x in actual.items()} == {
        "out": dtype,
        "lse": torch.promote_types(dtype, torch.float32),
        **{f"d{name}": x.dtype for name, x in inputs[0].differentiable().items()},
    }
    rows = sum(x.rows for x in inputs)
    errors = []
    for name in golden:
        try:
            numerics.assert_as_accurate(actual[name], golden[name], plain[name], name, dtype=dtype, samples=rows)
        except AssertionError as error:
            errors.append(str(error))
    assert not errors, "\n".join(errors)


@pytest.mark.parametrize(
    "case",
    [
        case
        for case in cases.ATTENTION
        if case.causal or case.kv_lengths or case.mask or case.bias_hides or max(case.window) >= 0
    ],
    ids=str,
)
def test_what_is_hidden_gets_exact_zeros(case, backend):
    """A query that sees no key: out 0, lse -inf, dq 0. A key that no query sees: dk 0, dv 0."""
    inputs = case.make(torch.float32)
    actual = numerics.attention_results(attention, inputs, backend=backend)
    options = inputs.options
    _, visible = scores_and_visible(
        inputs.q,
        inputs.k,
        options.get("mask"),
        options.get("bias"),
        None,
        options.get("kv_lengths"),
        case.window[0],
        0 if case.causal else case.window[1],
        case.s_k - case.s_q,
        1.0,
        0.0,
    )
    blind = ~visible.any(-1)  # (b, h, s_q)
    unseen = ~visible.unflatten(1, (inputs.k.shape[2], -1)).any(2).any(2)  # (b, h_kv, s_k)
    assert (actual["lse"][blind] == float("-inf")).all() and actual["lse"][~blind].isfinite().all()
    for name, hidden in (("out", blind), ("dq", blind), ("dk", unseen), ("dv", unseen)):
        assert (actual[name].transpose(1, 2)[hidden] == 0).all(), name
    if "bias" in options:
        assert (actual["dbias"][options["bias"] == float("-inf")] == 0).all()


@st.composite
def random_cases(draw) -> cases.AttentionCase:
    axes = st.none() | st.sampled_from(["", "k", "q", "qk", "bk", "hk", "bqk", "hqk", "bh", "bhqk"])
    size = st.sampled_from([1, 2, 7, 16, 17, 31, 40])
    few = st.integers(1, 2 if _library.triton_interpreted else 3)
    b, h_kv, group, s_k = draw(few), draw(st.integers(1, 2)), draw(few), draw(size)
    return cases.AttentionCase(
        "random",
        b,
        h_kv * group,
        draw(size),
        s_k,
        draw(st.sampled_from([1, 5, 16, 40])),
        h_kv=h_kv,
        d_v=draw(st.sampled_from([1, 8, 33])),
        layout=draw(st.sampled_from(["bshd", "bhsd", "padded"])),
        causal=draw(st.booleans()),
        window=draw(st.tuples(st.integers(-1, 20), st.integers(-1, 20))),
        scale=draw(st.none() | st.floats(-1, 1)),
        softcap=draw(st.sampled_from([0.0, 0.0, 3.0])),
        mask=draw(axes),
        bias=draw(axes),
        bias_hides=draw(st.booleans()),
        alibi=draw(st.sampled_from([None, "h", "bh"])),
        sink=draw(st.booleans()),
        float32_options=draw(st.booleans()),
        dropout_p=draw(st.sampled_from([0.0, 0.0, 0.3])),
        kv_lengths=draw(st.just(()) | st.tuples(*[st.integers(0, s_k)] * b)),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@settings(
    max_examples=10 if _library.triton_interpreted else 40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(case=random_cases())
def test_any_combination_of_features_is_right(dtype, backend, case):
    """Such small results differ in accuracy by chance, so it is not measured here: an error would be a wrong number."""
    inputs = case.make(dtype)
    actual, golden = numerics.attention_results(attention, inputs, backend=backend), numerics.golden_attention(inputs)
    tolerance = torch.finfo(dtype).eps * (8 if dtype.itemsize == 2 else 64)
    for name, wanted in golden.items():
        scale = 1 + wanted[wanted.isfinite()].abs().max().item() if wanted.isfinite().any() else 1.0
        torch.testing.assert_close(actual[name].double(), wanted, rtol=0, atol=tolerance * scale)
