"""attention_varlen: each sequence of a packed batch gets what attention gives it, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch

from lmkernels import attention, attention_varlen
from lmkernels.ops.philox import attention_keep
from lmkernels.testing import cases, numerics

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
INTERPRETED = (
    r"(influence|no_tokens|queries_without_keys).*triton|"
    r"plain_torch\[triton-((dropout|heads of 40.*)-float32|everything.*options-bfloat16)"
)
ON_EVERY_ISA = r"(accurate|loop|alone|dense).*native"
CASE = {str(case): case for case in cases.ATTENTION_VARLEN}
EVERYTHING = CASE["everything at once"]


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@pytest.fixture
def set_threads():
    """torch.set_num_threads, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def assert_same_bits(actual: dict, expected: dict):
    different = [name for name in expected if not torch.equal(actual[name], expected[name])]
    assert not different, f"{', '.join(different)} differ"


def stacked(results: list[dict]) -> dict:
    return {name: torch.stack([result[name] for result in results]) for name in results[0]}


@cache
def expected_results(case: cases.AttentionVarlenCase, dtype: torch.dtype):
    """Inputs, the results in float64 and those of plain torch, the same for every backend.

    Several inputs: some results (sink, bias of one element) have so few elements that the error of one is chance.
    """
    inputs = [case.make(dtype, seed) for seed in range(4)]
    golden = stacked([numerics.golden_attention(x, attention_varlen) for x in inputs])
    plain = stacked([numerics.plain_attention_results(x, attention_varlen) for x in inputs])
    return inputs, golden, plain


# --- right ---


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("case", cases.ATTENTION_VARLEN, ids=str)
def test_results_and_gradients_are_as_accurate_as_plain_torch(case, dtype, backend):
    inputs, golden, plain = expected_results(case, dtype)
    actual = stacked([numerics.attention_results(attention_varlen, x, backend=backend) for x in inputs])
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


@pytest.mark.parametrize("case", cases.ATTENTION_VARLEN, ids=str)
def test_the_definition_is_attention_of_one_sequence_after_the_other(case):
    """The reference pads; in float64 that must not show. (In it, sequences do not depend on each other.)"""
    inputs = case.make(torch.float64)
    actual = numerics.attention_results(attention_varlen, inputs, backend="reference")
    expected = numerics.attention_results(numerics.plain_attention_varlen, inputs)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-10, atol=1e-10)


# --- the same as attention ---


def dense_slices(inputs: cases.AttentionInputs, case: cases.AttentionVarlenCase):
    """(queries, keys, arguments of attention) of every sequence; without what depends on its number."""
    options = dict(inputs.options)
    bounds_q, bounds_k = options.pop("cu_seqlens_q").tolist(), options.pop("cu_seqlens_k").tolist()
    del options["max_seqlen_q"], options["max_seqlen_k"]
    for b, (s_q, s_k) in enumerate(zip(case.lengths_q, case.lengths_k, strict=True)):
        own = dict(options)
        for name in ("mask", "bias"):
            if name in own:
                x = own[name].reshape((1,) * (4 - own[name].dim()) + own[name].shape)
                own[name] = x.expand(len(case.lengths_q), x.shape[1], case.padded.s_q, case.padded.s_k)[
                    b : b + 1, :, :s_q, :s_k
                ]
        if "kv_lengths" in own:
            own["kv_lengths"] = own["kv_lengths"][b : b + 1].clamp(max=s_k)
        if own.get("alibi_slopes", torch.empty(0)).dim() == 2:
            own["alibi_slopes"] = own["alibi_slopes"][b]
        yield slice(bounds_q[b], bounds_q[b + 1]), slice(bounds_k[b], bounds_k[b + 1]), own


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
@pytest.mark.parametrize("case", [case for case in cases.ATTENTION_VARLEN if not case.padded.dropout_p], ids=str)
def test_a_loop_of_attention_gives_the_same_bits(case, dtype, native):
    """Forward, and with deterministic=True dq, dk and dv."""
    inputs = case.make(dtype)
    actual = numerics.attention_results(attention_varlen, inputs, backend=native, deterministic=True)
    for queries, keys, options in dense_slices(inputs, case):
        expected = numerics.attention_results(
            attention,
            cases.AttentionInputs(
                inputs.q[None, queries],
                inputs.k[None, keys],
                inputs.v[None, keys],
                inputs.dout[None, queries],
                inputs.dlse[None, :, queries],
                options,
            ),
            backend=native,
            deterministic=True,
        )
        assert_same_bits(
            {name: actual[name][queries] for name in ("out", "dq")}
            | {name: actual[name][keys] for name in ("dk", "dv")}
            | {"lse": actual["lse"][:, queries]},
            {name: expected[name][0] for name in ("out", "dq", "dk", "dv", "lse")},
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
@pytest.mark.parametrize(
    "name",
    ["dropout", "dropout, causal, odd lengths", "lengths, causal", "everything at once", "bias per head and key"],
)
def test_sequences_of_one_length_give_the_bits_of_the_dense_op(name, dtype, native):
    """Everything, dropout and the gradients of the options included."""
    case = {str(case): case for case in cases.ATTENTION}[name]
    inputs = case.make(dtype)
    varlen = cases.AttentionVarlenCase(case, (case.s_q,) * case.b, (case.s_k,) * case.b).make(dtype)
    expected = numerics.attention_results(attention, inputs, backend=native, deterministic=True)
    actual = numerics.attention_results(attention_varlen, varlen, backend=native, deterministic=True)
    expected |= {name: expected[name].flatten(0, 1) for name in ("out", "dq", "dk", "dv")}
    expected["lse"] = expected["lse"].transpose(0, 1).flatten(1)
    assert_same_bits(actual, expected)


@pytest.mark.parametrize("name", ["lengths, causal", "lengths, one of them 0"])
def test_padded_attention_with_lengths_gives_the_same_where_the_alignment_agrees(name, backend):
    """Not causal, or padded to one length on both sides: then each sequence's diagonal is the batch's."""
    padded = {str(case): case for case in cases.ATTENTION}[name]
    lengths = padded.kv_lengths
    lengths_q = lengths if padded.causal else (padded.s_q,) * padded.b
    case = cases.AttentionVarlenCase(replace(padded, kv_lengths=()), lengths_q, lengths)
    inputs = case.make(torch.float64)
    out, lse = attention_varlen(inputs.q, inputs.k, inputs.v, **inputs.options, return_lse=True, backend=backend)
    inputs = padded.make(torch.float64)
    expected, expected_lse = attention(inputs.q, inputs.k, inputs.v, **inputs.options, return_lse=True, backend=backend)
    torch.testing.assert_close(out, cases.pack(expected, lengths_q), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse.T, cases.pack(expected_lse.transpose(1, 2), lengths_q), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_sequence_has_the_same_bits_alone_and_in_any_batch(threads, dtype, native, set_threads):
    """Gradients too, with deterministic=True; first, last or in between, beside long and short ones."""
    set_threads(threads)
    h, h_kv, d = 4, 2, 64
    for s_q, s_k in ((1, 700), (33, 33), (300, 450), (2, 5)):
        own = [
            torch.randn(shape).to(dtype)
            for shape in ((s_q, h, d), (s_q, h, d), (s_k, h_kv, d), (s_k, h_kv, d), (s_q, h))
        ]
        alone = results_between(own, (), (), dtype)
        for before, after in (((), (900,)), ((5, 1, 260), ()), ((17,), (8, 600, 3)), ((0,), (0, 40))):
            assert_same_bits(results_between(own, before, after, dtype), alone)


def results_between(own: list, before: tuple[int, ...], after: tuple[int, ...], dtype: torch.dtype) -> dict:
    """What a sequence's q, dout, k, v, dlse (s_q, h) give it, behind and before others of these lengths."""
    (s_q, h, d), (s_k, h_kv, _) = own[0].shape, own[2].shape
    case = cases.AttentionVarlenCase(
        cases.AttentionCase("", len(before) + len(after) + 1, h, 900, 900, d, h_kv=h_kv, causal=True),
        (*before, s_q, *after),
        (*before, s_k, *after),
    )
    inputs = case.make(dtype)
    queries, keys = (slice(sum(before), sum(before) + s) for s in (s_q, s_k))
    inputs.q[queries], inputs.dout[queries], inputs.k[keys], inputs.v[keys], inputs.dlse.T[queries] = own
    found = numerics.attention_results(attention_varlen, inputs, backend="native", deterministic=True)
    return {name: found[name][queries] for name in ("out", "dq")} | {
        "lse": found["lse"].T[queries],
        "dk": found["dk"][keys],
        "dv": found["dv"][keys],
    }


def test_another_sequence_has_no_influence(backend):
    inputs = EVERYTHING.make(torch.float32)
    bounds_q, bounds_k = inputs.options["cu_seqlens_q"], inputs.options["cu_seqlens_k"]
    before = attention_varlen(inputs.q, inputs.k, inputs.v, **inputs.options, backend=backend)
    inputs.k[: bounds_k[1]] = float("nan")
    inputs.v[: bounds_k[1]] = float("nan")
    after = attention_varlen(inputs.q, inputs.k, inputs.v, **inputs.options, backend=backend)
    torch.testing.assert_close(after[bounds_q[1] :], before[bounds_q[1] :], rtol=0, atol=0)
    assert after[: bounds_q[1]].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_deterministic_gradients_have_the_same_bits_for_1_2_and_3_threads(dtype, native, set_threads):
    inputs = EVERYTHING.make(dtype)
    expected = numerics.attention_results(attention_varlen, inputs, backend=native, deterministic=True)
    for run in range(12):
        set_threads(1 + run % 3)
        actual = numerics.attention_results(attention_varlen, inputs, backend=native, deterministic=True)
        assert_same_bits(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=short)
def test_dropout_keeps_the_weights_that_it_keeps_in_the_padded_batch(dtype, backend):
    """With v the identity, out is the weights themselves."""
    h, p, seed, lengths_q, lengths_k = 3, 0.3, -0x0123_4567_89AB_CDEF, (37, 1, 0, 20), (203, 50, 8, 7)
    q, k = torch.randn(sum(lengths_q), h, 16, dtype=dtype), torch.randn(sum(lengths_k), h, 16, dtype=dtype)
    v = torch.cat([torch.eye(n, 203, dtype=dtype) for n in lengths_k])[:, None].expand(-1, h, -1)  # (t_k, h, 203)
    bounds = cases.cu_seqlens(lengths_q), cases.cu_seqlens(lengths_k)
    weights = attention_varlen(q, k, v, *bounds, 37, 203, dropout_p=p, seed=seed, backend=backend)
    keep = attention_keep(torch.tensor(seed), 4, h, 37, 203, p).transpose(1, 2)  # (b, s_q, h, s_k)
    for b, own in enumerate(weights.split(lengths_q)):
        assert torch.equal(own[..., : lengths_k[b]] != 0, keep[b, : lengths_q[b], :, : lengths_k[b]])
        assert (own[..., lengths_k[b] :] == 0).all()


# --- lengths and layouts ---


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0, 0)], ids=str)
def test_no_tokens_at_all(lengths, backend):
    q = torch.randn(0, 2, 8, requires_grad=True)
    bounds = cases.cu_seqlens(lengths)
    out, lse = attention_varlen(q, q, q, bounds, bounds, 0, 0, return_lse=True, backend=backend)
    out.sum().backward()
    assert out.shape == (0, 2, 8) and lse.shape == (2, 0) and q.grad.shape == (0, 2, 8)


def test_queries_without_keys_and_keys_without_queries(backend):
    q, k, v = torch.randn(9, 2, 8), torch.randn(6, 2, 8), torch.randn(6, 2, 8)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    sink = torch.zeros(2, requires_grad=True)
    bounds = cases.cu_seqlens((5, 4, 0)), cases.cu_seqlens((0, 2, 4))
    out, lse = attention_varlen(*leaves, *bounds, 5, 4, sink=sink, return_lse=True, backend=backend)
    dq, dk, dv, _ = torch.autograd.grad(out.square().sum(), (*leaves, sink))
    assert (out[:5] == 0).all() and (lse[:, :5] == float("-inf")).all() and (dq[:5] == 0).all()
    assert (dk[2:] == 0).all() and (dv[2:] == 0).all()
    assert (out[5:] != 0).all() and lse[:, 5:].isfinite().all() and (dv[:2] != 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_views_of_one_projection_give_the_bits_of_copies(dtype, native):
    case = CASE["causal"]
    inputs = case.make(dtype)
    fused = torch.stack([inputs.q, inputs.k, inputs.v], 1)  # (t, 3, h, d)
    q, k, v = fused.unbind(1)
    assert not q.is_contiguous()
    views = replace(inputs, q=q, k=k, v=v, dout=inputs.dout[:, :1].expand_as(inputs.dout))
    copies = replace(inputs, dout=views.dout.contiguous())
    assert_same_bits(
        numerics.attention_results(attention_varlen, views, backend=native, deterministic=True),
        numerics.attention_results(attention_varlen, copies, backend=native, deterministic=True),
    )


def test_a_last_axis_with_strides_gives_the_bits_of_a_copy(native):
    inputs = CASE["causal"].make(torch.float32)
    strided = {
        name: getattr(inputs, name).transpose(1, 2).contiguous().transpose(1, 2) for name in ("q", "k", "v", "dout")
    }
    assert_same_bits(
        numerics.attention_results(attention_varlen, replace(inputs, **strided), backend=native, deterministic=True),
        numerics.attention_results(attention_varlen, inputs, backend=native, deterministic=True),
    )


@pytest.mark.parametrize("option", ["mask", "bias"])
def test_expanded_masks_and_biases_give_the_result_of_a_copy(option, native):
    """A key axis of stride 0 among them."""
    inputs = CASE["different lengths of keys"].make(torch.float32)
    s_q, s_k = inputs.options["max_seqlen_q"], inputs.options["max_seqlen_k"]
    full = torch.randn(s_k, s_q) > -0.5 if option == "mask" else torch.randn(s_k, s_q)
    for view in (full.T, full.T[:, :1].expand(s_q, s_k), full.T[None, None, :1].expand(7, 2, s_q, s_k)):
        assert not view.is_contiguous()
        results = [
            numerics.attention_results(
                attention_varlen, replace(inputs, options=inputs.options | {option: x}), backend=native
            )
            for x in (view, view.contiguous())
        ]
        assert_same_bits(*results)


def test_int64_cu_seqlens_will_do(backend):
    inputs = EVERYTHING.make(torch.float32)
    wide = {name: inputs.options[name].long() for name in ("cu_seqlens_q", "cu_seqlens_k")}
    assert_same_bits(
        numerics.attention_results(
            attention_varlen, replace(inputs, options=inputs.options | wide), backend=backend, deterministic=True
        ),
        numerics.attention_results(attention_varlen, inputs, backend=backend, deterministic=True),
    )


def test_max_seqlen_may_be_more_than_any_length(backend):
    inputs = CASE["causal, different lengths of keys"].make(torch.float32)
    roomy = inputs.options | {"max_seqlen_q": 500, "max_seqlen_k": 501}
    for name, expected in numerics.attention_results(attention_varlen, inputs, backend=backend).items():
        actual = numerics.attention_results(attention_varlen, replace(inputs, options=roomy), backend=backend)[name]
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


BAD_BOUNDS = {
    "outside, both ways": ((-50, 1000, 20, 90), 100),
    "going back": ((0, 80, 10, 100), 100),
    "32-bit extremes": ((-(2**31), 2**31 - 1, -(2**31), 2**31 - 1), 100),
    "short of the end": ((0, 20, 30, 40), 100),
    "late start": ((30, 60, 80, 100), 100),
    "longer than max_seqlen": ((0, 90, 95, 100), 20),
    "negative max_seqlen": ((0, 90, 95, 100), -5),
}


@pytest.mark.parametrize("name", BAD_BOUNDS)
def test_the_kernels_stay_inside_the_tensors_for_any_cu_seqlens(name, native):
    """Where values cannot be checked (torch.compile), the op clamps: nothing else is read, and all results are written.

    What lies around q, k and v is NaN, and around the results sits the heap, which a wild write would break.
    """
    bounds, most = BAD_BOUNDS[name]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)

    def inside(x):
        around = torch.full((x.shape[0] + 2000, *x.shape[1:]), float("nan"))
        around[1000:-1000] = x
        return around[1000:-1000]

    q, k, v, dout = (inside(torch.randn(100, 2, 16)) for _ in range(4))
    features = (None,) * 6 + (cu_seqlens, cu_seqlens, most, most, -1, 0, 0.25, 0.0, 0.0)
    out, lse = torch.ops.lmkernels.attention_varlen_fwd(q, k, v, *features)
    gradients = torch.ops.lmkernels.attention_varlen_bwd(
        dout, None, q, k, v, out, lse, *features, False, False, False, True
    )
    blind = lse[0] == float("-inf")
    assert not lse.isnan().any() and (out[blind] == 0).all()
    for x in (out, *gradients[:3]):
        assert x.isfinite().all()
    assert (gradients[0][blind] == 0).all()
    assert blind.any() or name in ("outside, both ways", "going back", "32-bit extremes")


# --- torch ---


@pytest.mark.parametrize("name", ["causal, different lengths of keys", "everything at once"])
def test_gradients_and_their_gradients_are_those_of_finite_differences(name, backend):
    case = CASE[name]
    lengths_q, lengths_k = (3, 0, 2, 1), (4, 2, 1, 3)
    padded = replace(
        case.padded, b=4, s_q=3, s_k=4, d=3, d_v=2, **({"kv_lengths": (3, 2, 1, 3)} if case.padded.kv_lengths else {})
    )
    inputs = cases.AttentionVarlenCase(padded, lengths_q, lengths_k).make(torch.float64)
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.differentiable().items()}
    if "bias" in leaves:
        leaves["bias"] = inputs.options["bias"].clamp(min=-5).requires_grad_()

    def function(*values):
        arguments = inputs.options | dict(zip(leaves, values, strict=True))
        out, lse = attention_varlen(**arguments, return_lse=True, backend=backend)
        return out, lse.masked_fill(lse == float("-inf"), 0.0)

    assert torch.autograd.gradcheck(function, tuple(leaves.values()))
    assert torch.autograd.gradgradcheck(function, tuple(leaves.values()))


def op_arguments(name: str):
    """Inputs, and what lmkernels::attention_varlen_fwd takes after q, k and v."""
    case = CASE[name]
    inputs = case.make(torch.float32)
    options = inputs.options

    def four_axes(x):
        return None if x is None else x.reshape((1,) * (4 - x.dim()) + x.shape)

    features = (
        four_axes(options.get("mask")),
        four_axes(options.get("bias")),
        options.get("alibi_slopes"),
        options.get("sink"),
        options.get("kv_lengths"),
        torch.tensor(options["seed"]) if "seed" in options else None,
        options["cu_seqlens_q"],
        options["cu_seqlens_k"],
        options["max_seqlen_q"],
        options["max_seqlen_k"],
        case.padded.window[0],
        0 if case.padded.causal else case.padded.window[1],
        0.2,
        case.padded.softcap,
        case.padded.dropout_p,
    )
    return inputs, features


CHECKED = ["causal", "one query each, long caches", "everything at once", "everything at once, float32 options"]


@pytest.mark.parametrize("name", CHECKED)
def test_the_ops_pass_opcheck(name, native):
    inputs, features = op_arguments(name)
    qkv = inputs.q, inputs.k, inputs.v
    torch.library.opcheck(torch.ops.lmkernels.attention_varlen_fwd.default, (*qkv, *features))
    out, lse = torch.ops.lmkernels.attention_varlen_fwd(*qkv, *features)
    needs = tuple(option in inputs.options for option in ("bias", "alibi_slopes", "sink"))
    torch.library.opcheck(
        torch.ops.lmkernels.attention_varlen_bwd.default,
        (inputs.dout, inputs.dlse, *qkv, out, lse, *features, *needs, True),
    )


@pytest.mark.parametrize("name", ["causal", "everything at once"])
def test_a_compiled_call_has_no_graph_break_and_the_same_results(name, backend, fresh_compiler):
    inputs = CASE[name].make(torch.float32)
    compiled = torch.compile(
        attention_varlen, fullgraph=True, backend="inductor" if backend == "native" else "aot_eager"
    )
    actual = numerics.attention_results(compiled, inputs, backend=backend, deterministic=True)
    expected = numerics.attention_results(attention_varlen, inputs, backend=backend, deterministic=True)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-5, atol=1e-5)


def test_dynamic_shapes_compile_once(native, fresh_compiler):
    """Other totals, other lengths, another number of sequences and other maxima."""
    compiled = torch.compile(attention_varlen, fullgraph=True, dynamic=True)

    def run(lengths_q, lengths_k):
        q, k, v = (torch.randn(sum(s), 4, 64, requires_grad=True) for s in (lengths_q, lengths_k, lengths_k))
        bounds = cases.cu_seqlens(lengths_q), cases.cu_seqlens(lengths_k), max(lengths_q), max(lengths_k)
        results = [
            torch.autograd.grad(function(q, k, v, *bounds, causal=True, backend=native).sum(), (q, k, v))
            for function in (compiled, attention_varlen)
        ]
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected)

    run((48, 20), (80, 33))
    with torch.compiler.set_stance("fail_on_recompile"):
        run((65, 7, 100), (65, 9, 113))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=short)
def test_autocast_computes_in_its_dtype_and_gives_gradients_in_the_inputs(dtype, backend):
    inputs = CASE["causal"].make(torch.float32)
    inputs = replace(inputs, dout=inputs.dout.to(dtype))

    def under_autocast(*arguments, **options):
        with torch.autocast(torch.get_default_device().type, dtype):
            return attention_varlen(*arguments, **options)

    actual = numerics.attention_results(under_autocast, inputs, backend=backend)
    assert actual["out"].dtype == dtype and actual["dq"].dtype == torch.float32
    narrow = replace(inputs, **{name: getattr(inputs, name).to(dtype) for name in "qkv"})
    expected = numerics.attention_results(attention_varlen, narrow, backend=backend)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], check_dtype=False)


def test_only_the_gradients_that_are_asked_for_are_computed(backend):
    inputs = EVERYTHING.make(torch.float32)
    full = numerics.attention_results(attention_varlen, inputs, backend=backend)
    for name, x in inputs.differentiable().items():
        leaf = x.detach().requires_grad_()
        arguments = {"q": inputs.q, "k": inputs.k, "v": inputs.v} | inputs.options | {name: leaf}
        out, lse = attention_varlen(**arguments, return_lse=True, backend=backend)
        results, cotangents = ([out], [inputs.dout]) if name == "v" else ([out, lse], [inputs.dout, inputs.dlse])
        (gradient,) = torch.autograd.grad(results, leaf, cotangents)
        torch.testing.assert_close(gradient, full[f"d{name}"], rtol=1e-5, atol=1e-5)


# --- bad arguments ---

H, H_KV, D = 4, 2, 8
BAD = {
    "q of 4 axes": (
        {"q": torch.zeros(1, 5, H, D)},
        ValueError,
        r"q must be \(t, h, d\) with 3 axes, got \(1, 5, 4, 8\)",
    ),
    "list for k": ({"k": [1.0]}, TypeError, "k must be a torch.Tensor, got list"),
    "dtypes differ": (
        {"k": torch.zeros(6, H_KV, D, dtype=torch.bfloat16)},
        TypeError,
        "k must have q's dtype torch.float32, got torch.bfloat16",
    ),
    "head sizes differ": ({"k": torch.zeros(6, H_KV, 7)}, ValueError, "k must have q's head size 8"),
    "lengths of v": ({"v": torch.zeros(7, H_KV, D)}, ValueError, "v must have k's length and heads"),
    "heads that do not divide": (
        {"k": torch.zeros(6, 3, D), "v": torch.zeros(6, 3, D)},
        ValueError,
        "number of heads of q must be a multiple of k's, got 4 and 3",
    ),
    "list for cu_seqlens": ({"cu_seqlens_q": [0, 2, 5]}, TypeError, "cu_seqlens_q must be a torch.Tensor, got list"),
    "float cu_seqlens": (
        {"cu_seqlens_k": torch.tensor([0.0, 2.0, 6.0])},
        TypeError,
        "cu_seqlens_k must be int32 or int64, got torch.float32",
    ),
    "cu_seqlens of 2 axes": (
        {"cu_seqlens_q": torch.tensor([[0, 2, 5]])},
        ValueError,
        r"cu_seqlens_q must be \(b \+ 1,\): 0 and the end of each sequence, got \(1, 3\)",
    ),
    "no cu_seqlens": ({"cu_seqlens_q": torch.zeros(0, dtype=torch.int32)}, ValueError, "cu_seqlens_q must be"),
    "cu_seqlens elsewhere": (
        {"cu_seqlens_q": torch.zeros(3, dtype=torch.int32, device="meta")},
        ValueError,
        f"cu_seqlens_q must be on q's device {torch.empty(0).device}, got meta",
    ),
    "late start": (
        {"cu_seqlens_q": torch.tensor([1, 2, 5])},
        ValueError,
        "cu_seqlens_q must start at 0 and end at t_q = 5, got 1 and 5",
    ),
    "early end": (
        {"cu_seqlens_k": torch.tensor([0, 2, 5])},
        ValueError,
        "cu_seqlens_k must start at 0 and end at t_k = 6, got 0 and 5",
    ),
    "going back": (
        {"cu_seqlens_q": torch.tensor([0, 4, 3, 5]), "cu_seqlens_k": torch.tensor([0, 2, 4, 6])},
        ValueError,
        "cu_seqlens_q must not decrease, got 4 and then 3",
    ),
    "different numbers of sequences": (
        {"cu_seqlens_k": torch.tensor([0, 2, 4, 6])},
        ValueError,
        r"cu_seqlens_k must have the shape of cu_seqlens_q, got \(4,\) and \(3,\)",
    ),
    "max_seqlen_q too small": (
        {"max_seqlen_q": 2},
        ValueError,
        "max_seqlen_q = 2 must be at least every length, got 3 in sequence 1",
    ),
    "max_seqlen_k too small": (
        {"max_seqlen_k": 3},
        ValueError,
        "max_seqlen_k = 3 must be at least every length, got 4",
    ),
    "tensor for max_seqlen": ({"max_seqlen_q": torch.tensor(3)}, TypeError, "max_seqlen_q must be an int, got Tensor"),
    "negative max_seqlen": ({"max_seqlen_k": -1}, ValueError, "max_seqlen_k must be at least 0, got -1"),
    "mask of the total": (
        {"mask": torch.ones(5, 6, dtype=torch.bool)},
        ValueError,
        r"mask must broadcast to \(b, h, max_seqlen_q, max_seqlen_k\) = \(2, 4, 3, 4\), got",
    ),
    "bias of another dtype": (
        {"bias": torch.zeros(3, 4, dtype=torch.float64)},
        TypeError,
        "bias must be torch.float32",
    ),
    "slopes of another length": ({"alibi_slopes": torch.zeros(3)}, ValueError, r"alibi_slopes must be \(h,\) = \(4,\)"),
    "lengths beyond max_seqlen_k": (
        {"kv_lengths": torch.tensor([2, 5])},
        ValueError,
        "kv_lengths must lie between 0 and max_seqlen_k = 4, got values from 2 to 5",
    ),
    "window of one": ({"window": (3,)}, ValueError, "window must be two integers"),
    "dropout_p above 1": ({"dropout_p": 1.1}, ValueError, "dropout_p must be between 0 and 1, got 1.1"),
    "unknown backend": (
        {"backend": "cuda"},
        ValueError,
        "backend must be one of native, triton, reference or None, got 'cuda'",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_argument_is_named(name, backend):
    change, kind, text = BAD[name]
    arguments = {
        "q": torch.zeros(5, H, D),
        "k": torch.zeros(6, H_KV, D),
        "v": torch.zeros(6, H_KV, D),
        "cu_seqlens_q": torch.tensor([0, 2, 5]),
        "cu_seqlens_k": torch.tensor([0, 2, 6]),
        "max_seqlen_q": 3,
        "max_seqlen_k": 4,
        "backend": backend,
    }
    attention_varlen(**arguments)
    with pytest.raises(kind, match=text):
        attention_varlen(**arguments | change)


def test_the_limit_of_the_head_size_is_a_reason_to_object(native):
    q, bounds = torch.zeros(4, 1, 257), cases.cu_seqlens((4,))
    with pytest.raises(NotImplementedError, match="head sizes go up to 256, got 257 and 257"):
        attention_varlen(q, q, q, bounds, bounds, 4, 4, backend=native)
