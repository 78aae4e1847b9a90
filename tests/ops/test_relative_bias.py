"""relative_bias, and RelativeBias as attention's bias: T5's buckets, accuracy, gradients to the table."""

from __future__ import annotations

import re

import pytest
import torch

from lmkernels import RelativeBias, attention, attention_varlen, attention_weights, relative_bias
from lmkernels.ops.relative_bias.api import relative_buckets
from lmkernels.testing import numerics

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
INTERPRETED = r"(accurate_as_plain_torch|packed_sequences|float32_beside).*triton(?!.*(float16|many))"
ON_EVERY_ISA = r"accurate.*native"


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("num_buckets, max_distance", [(32, 128), (4, 3), (9, 20), (64, 1000)])
def test_buckets_are_those_of_transformers(bidirectional, num_buckets, max_distance):
    pytest.importorskip("transformers", reason="the buckets are compared with those of transformers' T5")
    from transformers.models.t5.modeling_t5 import T5Attention

    distance = torch.arange(-3000, 3000)
    expected = T5Attention._relative_position_bucket(distance, bidirectional, num_buckets, max_distance)
    actual = relative_buckets(distance, bidirectional, num_buckets, max_distance)
    assert torch.equal(actual, expected)
    assert actual.min() >= 0 and actual.max() < num_buckets


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("s_q, s_k", [(7, 7), (1, 9), (5, 12), (12, 5), (1, 1), (300, 300)])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_the_expanded_bias_is_that_of_transformers(bidirectional, s_q, s_k, dtype):
    """T5's compute_bias, with its queries at the end of the keys: past_seen_tokens = s_k - s_q."""
    table = torch.randn(8, 3, dtype=dtype)
    context, memory = torch.arange(s_q)[:, None] + s_k - s_q, torch.arange(s_k)
    expected = table[relative_buckets(memory - context, bidirectional, 8, 20)].permute(2, 0, 1)[None]
    actual = relative_bias(table, s_q, s_k, bidirectional=bidirectional, max_distance=20)
    assert actual.dtype == dtype and torch.equal(actual, expected)


def test_gradcheck_of_the_expanded_bias():
    table = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)

    def function(table):
        return relative_bias(table, 4, 6, bidirectional=True, max_distance=5)

    torch.autograd.gradcheck(function, table)
    torch.autograd.gradgradcheck(function, table)


def test_no_queries_and_no_keys():
    table = torch.randn(6, 2, requires_grad=True)
    for s_q, s_k in ((0, 4), (4, 0), (0, 0)):
        bias = relative_bias(table, s_q, s_k, bidirectional=True, max_distance=5)
        assert bias.shape == (1, 2, s_q, s_k)


# --- in attention

SHAPES = {
    "self attention": {"b": 2, "h": 3, "s_q": 65, "s_k": 65, "d": 16},
    "decoder": {"b": 2, "h": 2, "s_q": 70, "s_k": 70, "d": 64, "causal": True, "bidirectional": False},
    "more keys": {"b": 1, "h": 2, "s_q": 37, "s_k": 250, "d": 32, "causal": True},
    "more queries": {"b": 1, "h": 2, "s_q": 250, "s_k": 37, "d": 32},
    "one query": {"b": 2, "h": 4, "s_q": 1, "s_k": 300, "d": 64, "h_kv": 2},
    "few queries": {"b": 1, "h": 2, "s_q": 3, "s_k": 600, "d": 64},
    "many blocks, grouped heads": {"b": 1, "h": 4, "s_q": 420, "s_k": 420, "d": 32, "h_kv": 2, "window": (200, 100)},
    "a few blocks, grouped heads": {"b": 1, "h": 2, "s_q": 150, "s_k": 150, "d": 16, "h_kv": 1, "window": (60, 30)},
    "lengths, soft cap": {"b": 3, "h": 2, "s_q": 50, "s_k": 60, "d": 32, "softcap": 3.0, "kv_lengths": (60, 0, 17)},
}


def make(dtype, b, h, s_q, s_k, d, h_kv=None, bidirectional=True, kv_lengths=None, **options):
    """Tensors that attention with a RelativeBias is differentiated in, its options, and those of the bias."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    h_kv = h_kv or h
    tensors = {"q": normal(b, s_q, h, d), "k": normal(b, s_k, h_kv, d), "v": normal(b, s_k, h_kv, d)}
    if kv_lengths is not None:
        options["kv_lengths"] = torch.tensor(kv_lengths, dtype=torch.int32)
    return tensors | {"table": normal(32, h)}, options, {"bidirectional": bidirectional, "max_distance": 128}


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_attention_is_as_accurate_as_plain_torch(shape, dtype, backend):
    tensors, options, bias = make(dtype, **shape)

    def function(q, k, v, table):
        return attention(q, k, v, bias=RelativeBias(table, **bias), backend=backend, return_lse=True, **options)

    def definition(q, k, v, table):
        expanded = relative_bias(table, q.shape[1], k.shape[1], **bias)
        return attention(q, k, v, bias=expanded, backend="reference", return_lse=True, **options)

    def plain(q, k, v, table):
        expanded = relative_bias(table.to(torch.promote_types(dtype, torch.float32)), q.shape[1], k.shape[1], **bias)
        defaults = {"causal": False, "window": (-1, -1), "scale": None, "softcap": 0.0}
        return numerics.plain_attention(q, k, v, bias=expanded, **defaults | options)

    rows = shape["b"] * shape["h"] * shape["s_q"]
    numerics.assert_op_as_accurate(
        function, definition, plain, tensors, ["q", "k", "v", "table"], dtype=dtype, samples=min(rows, 32)
    )


def test_gradcheck_to_the_second_order(backend):
    tensors, options, bias = make(torch.float64, b=2, h=2, s_q=3, s_k=4, d=2, causal=True)
    leaves = [x.requires_grad_() for x in tensors.values()]

    def function(q, k, v, table):
        return attention(q, k, v, bias=RelativeBias(table, **bias), backend=backend, **options)

    torch.autograd.gradcheck(function, leaves)
    torch.autograd.gradgradcheck(function, leaves)


def test_packed_sequences_get_what_they_get_alone(backend):
    """Of different lengths, with more keys than queries and the reverse; one has no key."""
    generator = torch.Generator().manual_seed(0)
    lengths = [(5, 9), (40, 40), (1, 30), (7, 0), (8, 3)]
    q = torch.randn(sum(n for n, _ in lengths), 4, 16, generator=generator, dtype=torch.float64)
    k, v = (torch.randn(sum(n for _, n in lengths), 2, 16, generator=generator, dtype=torch.float64) for _ in "kv")
    table = torch.randn(8, 4, generator=generator, dtype=torch.float64)
    dout = torch.randn(q.shape, generator=generator, dtype=torch.float64)
    bounds = [torch.tensor([0, *column]).cumsum(0) for column in zip(*lengths, strict=True)]
    leaves = [x.requires_grad_() for x in (q, k, v, table)]
    bias = RelativeBias(table, bidirectional=True, max_distance=20)
    packed = attention_varlen(q, k, v, *bounds, 40, 41, bias=bias, causal=True, backend=backend)
    pieces = [x.split([n[i] for n in lengths]) for x, i in ((q, 0), (k, 1), (v, 1))]
    alone = torch.cat(
        [
            attention(*(x[None] for x in piece), bias=bias, causal=True, backend="reference")[0]
            for piece in zip(*pieces, strict=True)
        ]
    )
    torch.testing.assert_close(packed, alone)
    actual, expected = (torch.autograd.grad(out, leaves, dout) for out in (packed, alone))
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


def test_the_map_takes_it_too():
    tensors, options, bias = make(torch.float32, **SHAPES["more keys"])
    q, k, _, table = tensors.values()
    expanded = relative_bias(table, q.shape[1], k.shape[1], **bias)
    actual = attention_weights(q, k, bias=RelativeBias(table, **bias), **options)
    torch.testing.assert_close(actual, attention_weights(q, k, bias=expanded, **options))


def test_a_table_of_float32_beside_16_bits_gets_a_float32_gradient(backend):
    tensors, options, bias = make(torch.float32, **SHAPES["decoder"])
    table = tensors.pop("table").requires_grad_()
    q, k, v = (x.bfloat16() for x in tensors.values())
    attention(q, k, v, bias=RelativeBias(table, **bias), backend=backend, **options).sum().backward()
    assert table.grad.dtype == torch.float32 and table.grad.abs().sum() > 0
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        out = attention(*(x.float() for x in (q, k, v)), bias=RelativeBias(table, **bias), backend=backend, **options)
    assert out.dtype == torch.bfloat16


def test_deterministic_gradients_depend_neither_on_threads_nor_on_the_run(native):
    tensors, options, bias = make(torch.float32, **SHAPES["many blocks, grouped heads"])
    leaves = [x.requires_grad_() for x in tensors.values()]
    q, k, v, table = leaves

    def run():
        out = attention(q, k, v, bias=RelativeBias(table, **bias), deterministic=True, **options)
        return torch.autograd.grad(out.square().sum(), leaves)

    expected, threads = run(), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert all(map(torch.equal, run(), expected))
    finally:
        torch.set_num_threads(threads)


def test_nothing_of_the_scores_size_is_made(native):
    """A row of 20,000 keys: the scores would take 1.6 GB, float32."""
    import resource

    q, k, v = (torch.randn(1, 20000, 1, 4, requires_grad=True) for _ in "qkv")
    table = torch.randn(32, 1, requires_grad=True)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    bias = RelativeBias(table, bidirectional=True, max_distance=128)
    attention(q, k, v, bias=bias, window=(300, 300), backend=native).sum().backward()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


def test_a_compiled_call_has_no_graph_break_and_serves_other_sizes(native):
    def function(q, k, v, table):
        return attention(
            q, k, v, bias=RelativeBias(table, bidirectional=True, max_distance=20), causal=True, backend=native
        )

    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")

    def run(b, s_q, s_k):
        leaves = [torch.randn(b, s, 3, 16, requires_grad=True) for s in (s_q, s_k, s_k)]
        leaves.append(torch.randn(8, 3, requires_grad=True))
        outs = [f(*leaves) for f in (compiled, function)]
        torch.testing.assert_close(*outs)
        gradients = (torch.autograd.grad(out.square().sum(), leaves) for out in outs)
        for actual, expected in zip(*gradients, strict=True):
            torch.testing.assert_close(actual, expected)

    run(2, 48, 80)
    with torch.compiler.set_stance("fail_on_recompile"):
        run(5, 65, 113)
    torch.compiler.reset()


TABLE = torch.randn(32, 2)
BAD = {
    "a table of one axis": (TABLE[0], {}, ValueError, "table must be (num_buckets, h), got (2,)"),
    "a table of integers": (TABLE.long(), {}, TypeError, "table must be float32, bfloat16, float16 or float64, got"),
    "too few buckets": (TABLE[:3], {}, ValueError, "table must have at least 4 buckets, got 3 with bidirectional=True"),
    "a short distance": (TABLE, {"max_distance": 8}, ValueError, "max_distance must be an integer above 8, the number"),
    "no distance": (TABLE, {"max_distance": 9.5}, ValueError, "max_distance must be an integer above 8, the number"),
    "a negative length": (TABLE, {"s_q": -1}, ValueError, "s_q must be an integer >= 0, got -1"),
}


@pytest.mark.parametrize("table, options, error, message", BAD.values(), ids=BAD.keys())
def test_bad_input_is_named(table, options, error, message):
    arguments = {"s_q": 3, "s_k": 3, "bidirectional": True, "max_distance": 128} | options
    with pytest.raises(error, match=re.escape(message)):
        relative_bias(table, **arguments)


def test_attention_names_a_table_that_does_not_fit(backend):
    q = torch.randn(1, 4, 3, 8)
    for table, error, message in (
        (TABLE, ValueError, "bias must have a table (num_buckets, h) with h = 3, got (32, 2)"),
        (torch.randn(32, 3).double(), TypeError, "bias must be torch.float32, got torch.float64"),
    ):
        with pytest.raises(error, match=re.escape(message)):
            bias = RelativeBias(table, bidirectional=True, max_distance=128)
            attention(q, q, q, bias=bias, backend=backend)
    with pytest.raises(ValueError, match="bias must broadcast"):
        attention(q, q, q, bias=torch.randn(1, 3, 1, 8), backend=backend)


def test_the_op_refuses_a_bias_by_distance_of_another_size(native):
    q = torch.randn(1, 4, 3, 8)
    for bias, offset in ((torch.randn(1, 3, 1, 7), 0), (torch.randn(1, 3, 1, 8), 1)):
        features = (None, bias, None, None, None, None, -1, -1, offset, 0.3, 0.0, 0.0)
        with pytest.raises(RuntimeError, match="by distance"):
            torch.ops.lmkernels.attention_fwd(q, q, q, *features)
