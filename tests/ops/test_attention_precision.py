"""attention in float32 where torch allows less than full precision: what errors grow to, and what stays as it is."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lmkernels import _library, attention, attention_varlen
from lmkernels.ops.philox import attention_keep
from lmkernels.testing import cases, numerics

ON_EVERY_ISA = r"precision|float16"
# Two bfloat16 to a factor: root mean square errors of 8e-6, and twice that where scores are four times as large.
RMS, LARGEST = 2.0**-15, 2.0**-14
CASE = {case.name: case for case in cases.ATTENTION} | {
    case.name: case
    for case in (
        cases.AttentionCase("several blocks of keys", 1, 2, 300, 1100, 64, causal=True),
        cases.AttentionCase("several blocks of keys, d 256", 1, 1, 70, 600, 256),
        cases.AttentionCase("many", 1, 4, 300, 300, 80, 2, 128, "padded", window=(100, 20), sink=True, dropout_p=0.2),
    )
}
IN_PARTS = [
    "odd lengths",
    "many queries, three keys",
    "head size 1",
    "head size 37, values of 19",
    "head size 40, values of 72",
    "head size 80",
    "head size 128",
    "head size 256",
    "one key head",
    "two key heads for six",
    "causal, fused",
    "causal, more queries: rows that see no key",
    "window",
    "window of one key",
    "scale",
    "sink, causal, rows that see no key",
    "lengths, one of them 0",
    "lengths, causal",
    "dropout, causal, odd lengths",
    "several blocks of keys",
    "several blocks of keys, d 256",
    "many",
]
AS_BEFORE = ["mask per key", "bias per head", "alibi", "softcap", "a short sequence, window", "everything is dropped"]


def in_parts() -> bool:
    return _library.cpu_isa() == "amx"


def same_bits(actual: dict, expected: dict) -> set[str]:
    return {name for name in expected if torch.equal(actual[name].nan_to_num(), expected[name].nan_to_num())}


def assert_close(actual: dict, golden: dict):
    for name, expected in golden.items():
        finite = expected.isfinite()
        assert torch.equal(actual[name].isfinite(), finite), name
        error, expected = actual[name].double()[finite] - expected[finite], expected[finite]
        assert error.square().mean() <= RMS**2 * expected.square().mean(), name
        assert error.abs().max() <= LARGEST * expected.abs().max(), name


def results(inputs, function=attention) -> dict:
    return numerics.attention_results(function, inputs, backend="native", deterministic=True)


@pytest.mark.parametrize("name", IN_PARTS)
def test_at_high_precision_errors_stay_below_those_of_two_bfloat16(name, native, matmul_precision):
    inputs = CASE[name].make(torch.float32)
    plain = results(inputs)
    matmul_precision("high")
    actual = results(inputs)
    assert_close(actual, numerics.golden_attention(inputs))
    # else the next line would say nothing about tiles
    assert same_bits(actual, plain) == (set() if in_parts() else set(plain))
    matmul_precision("medium")
    assert same_bits(results(inputs), actual) == set(actual)
    matmul_precision("highest")
    assert same_bits(results(inputs), plain) == set(plain)


@pytest.mark.parametrize("name", AS_BEFORE)
def test_what_does_not_go_by_parts_has_the_same_bits_at_any_precision(name, native, matmul_precision):
    inputs = CASE[name].make(torch.float32)
    plain = results(inputs)
    matmul_precision("high")
    assert same_bits(results(inputs), plain) == set(plain)


def test_packed_sequences_at_high_precision(native, matmul_precision):
    case = cases.AttentionVarlenCase(
        cases.AttentionCase("packed", 4, 4, 150, 170, 64, h_kv=2, causal=True, sink=True),
        (150, 40, 0, 97),
        (170, 60, 9, 97),
    )
    inputs = case.make(torch.float32)
    plain = results(inputs, attention_varlen)
    matmul_precision("high")
    actual = results(inputs, attention_varlen)
    assert_close(actual, numerics.golden_attention(inputs, attention_varlen))
    assert same_bits(actual, plain) == (set() if in_parts() else set(plain))


@pytest.mark.parametrize("name", ["two key heads for six", "many", "lengths, causal"])
def test_at_high_precision_bits_depend_on_neither_threads_nor_the_batch(name, native, matmul_precision):
    matmul_precision("high")
    inputs = CASE[name].make(torch.float32)
    expected, threads = results(inputs), torch.get_num_threads()
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            assert same_bits(results(inputs), expected) == set(expected)
    finally:
        torch.set_num_threads(threads)
    first = replace(inputs, **{x: getattr(inputs, x)[:1] for x in ("q", "k", "v", "dout", "dlse")})
    if "kv_lengths" in first.options:
        first = replace(first, options=first.options | {"kv_lengths": first.options["kv_lengths"][:1]})
    alone = results(first)
    for x in ("out", "lse", "dq", "dk", "dv"):
        assert torch.equal(alone[x], expected[x][:1]), x


def test_at_high_precision_a_prompt_may_be_read_in_parts(native, matmul_precision):
    """Queries have the bits that they have when all are read at once, as long as more than 32 come together."""
    matmul_precision("high")
    q, k, v = (torch.randn(1, 700, 2, 64) for _ in "qkv")
    whole = attention(q, k, v, causal=True, backend="native")
    for begin, end in ((0, 33), (33, 500), (500, 700)):
        part = attention(q[:, begin:end], k[:, :end], v[:, :end], causal=True, backend="native")
        assert torch.equal(part, whole[:, begin:end]), (begin, end)


def test_at_high_precision_dropout_draws_the_same_numbers(native, matmul_precision):
    q, k = torch.randn(2, 37, 4, 16), torch.randn(2, 203, 2, 16)
    v = torch.eye(203)[None, :, None].expand(2, 203, 2, 203)
    matmul_precision("high")
    weights = attention(q, k, v, dropout_p=0.3, seed=-7, backend="native").transpose(1, 2)
    assert torch.equal(weights != 0, attention_keep(torch.tensor(-7), 2, 4, 37, 203, 0.3))


def test_at_high_precision_scores_that_grow_raise_the_maximum(native, matmul_precision):
    case = cases.AttentionCase("growing scores", 1, 2, 70, 2100, 64)
    inputs = case.make(torch.float32)
    inputs = replace(inputs, k=inputs.k * torch.linspace(0, 8, case.s_k)[:, None, None])
    golden = numerics.golden_attention(inputs)
    matmul_precision("high")
    out, lse = attention(inputs.q, inputs.k, inputs.v, return_lse=True, backend="native")
    # a score of 20 errs by 2^-17 of the products that it is the sum of
    assert (out - golden["out"]).abs().max() < 2e-3 and (lse - golden["lse"]).abs().max() < 1e-3


def test_large_numbers_at_high_precision(native, matmul_precision):
    """Next to the largest float, which rounded to bfloat16 is an infinity."""
    matmul_precision("high")
    most = 0.999 * torch.finfo(torch.float32).max
    q, k, v = (torch.randn(1, n, 1, 16) for n in (40, 70, 70))
    q[0, :, 0, 0] = torch.linspace(-1, 1, 40) * most
    q[..., 1] = 0
    k *= 1e-10
    k[0, 5, 0, 1] = -most
    v[0, 7, 0, 3] = most
    golden = attention(*(x.double() for x in (q, k, v)), scale=1e-28, return_lse=True, backend="reference")
    out, lse = attention(q, k, v, scale=1e-28, return_lse=True, backend="native")
    torch.testing.assert_close(lse.double(), golden[1], rtol=0, atol=1e-3)
    torch.testing.assert_close(out.double(), golden[0], rtol=1e-3, atol=1e-3)


VALUES = [float("nan"), float("inf"), float("-inf")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("tensor", ["q", "k", "v"])
@pytest.mark.parametrize("value", VALUES, ids=str)
def test_what_is_not_finite_gives_what_plain_torch_gives(value, tensor, dtype, native, matmul_precision):
    """And changes no bit of another head, nor of a row that does not see it; two of them lie in panels of their own."""
    matmul_precision("high")
    causal = tensor != "v"  # by multiply-adds, a weight of 0 makes NaN of it
    x = {name: torch.randn(1, 150, 2, 24).to(dtype) for name in "qkv"}
    clean, clean_lse = attention(**x, causal=causal, return_lse=True, backend=native)
    x[tensor] = x[tensor].clone()
    x[tensor][0, 50, 0, 3] = value
    x[tensor][0, 110, 0, 7] = -value
    out, lse = attention(**x, causal=causal, return_lse=True, backend=native)
    wide = {name: y[0, :, 0].double() for name, y in x.items()}
    scores = wide["q"] @ wide["k"].T * 24**-0.5
    seen = torch.ones(150, 150, dtype=torch.bool).tril() if causal else torch.ones(150, 150, dtype=torch.bool)
    expected = torch.where(seen, scores, -torch.inf).softmax(-1) @ wide["v"]
    torch.testing.assert_close(out[0, :, 0].double(), expected, rtol=1e-3, atol=1e-3, equal_nan=True)
    assert torch.equal(out[:, :, 1], clean[:, :, 1])
    untouched = {"q": [i for i in range(150) if i not in (50, 110)], "k": range(50), "v": []}[tensor]
    assert torch.equal(out[0, untouched, 0], clean[0, untouched, 0])
    assert torch.equal(lse[0, 0, untouched], clean_lse[0, 0, untouched])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("tensor", ["q", "k", "v", "dout"])
@pytest.mark.parametrize("value", VALUES, ids=str)
def test_gradients_of_what_is_not_finite_are_not_finite_where_multiply_adds_give_that(
    value, tensor, dtype, native, matmul_precision
):
    inputs = CASE["one token past a tile, padded"].make(dtype)
    x = getattr(inputs, tensor).clone()
    x[0, 40, 0, 3] = value
    inputs = replace(inputs, **{tensor: x})
    plain = results(inputs.to(torch.float32))
    matmul_precision("high")
    actual = results(inputs)
    for name in ("dq", "dk", "dv"):
        assert torch.equal(actual[name].isnan(), plain[name].isnan()), name
        assert torch.equal(actual[name].isinf(), plain[name].isinf()), name


def test_small_gradients_at_high_precision(native, matmul_precision):
    """Of a loss that is a mean over many tokens, and of one whose gradients would be lost below the range of floats."""
    inputs = CASE["odd lengths"].make(torch.float32)
    for factor in (2.0**-40, 2.0**-110):
        small = replace(inputs, dout=inputs.dout * factor, dlse=inputs.dlse * factor)
        matmul_precision("high")
        assert_close(results(small), numerics.golden_attention(small))


@pytest.mark.parametrize(
    "scales", [(1, 1, 1e-33), (1e37, 1e-37, 1), (1e-30, 1e30, 1e30), (1e-10, 1e-10, 1e-30)], ids=str
)
def test_digits_are_kept_over_the_range_of_floats_at_high_precision(scales, native, matmul_precision):
    q, k, v = (torch.randn(1, 100, 2, 32) * scale for scale in scales)
    golden = attention(*(x.double() for x in (q, k, v)), return_lse=True, backend="reference")
    matmul_precision("high")
    out, lse = attention(q, k, v, return_lse=True, backend="native")
    assert_close({"out": out, "lse": lse}, dict(zip(("out", "lse"), golden, strict=True)))
