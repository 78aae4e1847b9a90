"""attention: what it promises beyond accuracy. Determinism, dropout, strides, empty sizes, NaN, memory."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from dataclasses import replace

import pytest
import torch

from lmkernels import attention
from lmkernels.ops.philox import attention_keep
from lmkernels.testing import cases, numerics

INTERPRETED = (
    r"(gradient_drops|expanded_tensor|one_tensor_may|unused|nan_|not_finite|never_read|large_scores).*triton|"
    r"empty_axis.*triton-everything|keeps_the_weights.*triton-1-torch.float32"
)
CASE = {case.name: case for case in cases.ATTENTION}
EVERYTHING = CASE["everything at once"]


@pytest.fixture
def set_threads():
    """torch.set_num_threads, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def assert_same_bits(actual: dict, expected: dict):
    different = [name for name in expected if not torch.equal(actual[name], expected[name])]
    assert not different, f"{', '.join(different)} differ"


# --- determinism and independence ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "name",
    [
        "everything at once",
        "everything at once, float32 options",
        "two key heads for six",
        "one query, long cache",
        "bias of one element",
    ],
)
def test_deterministic_gradients_have_the_same_bits_in_20_runs_and_for_1_2_and_3_threads(
    name, dtype, native, set_threads
):
    inputs = CASE[name].make(dtype)
    expected = numerics.attention_results(attention, inputs, backend=native, deterministic=True)
    for run in range(20):
        set_threads(1 + run % 3)
        assert_same_bits(numerics.attention_results(attention, inputs, backend=native, deterministic=True), expected)


@pytest.mark.parametrize("name", ["everything at once", "two key heads for six", "bias of every axis that hides"])
def test_triton_gives_the_same_bits_in_every_run(name, triton):
    inputs = CASE[name].make(torch.bfloat16)
    expected = numerics.attention_results(attention, inputs, backend=triton, deterministic=True)
    for _ in range(20):
        assert_same_bits(numerics.attention_results(attention, inputs, backend=triton, deterministic=True), expected)


@pytest.mark.parametrize("name", ["odd lengths", "causal, more queries: rows that see no key", "one query, long cache"])
def test_a_sequence_has_the_same_bits_alone_and_in_a_batch(name, native):
    inputs = replace(CASE[name], b=3).make(torch.float32)
    together = numerics.attention_results(attention, inputs, backend=native, deterministic=True)
    alone = numerics.attention_results(
        attention,
        cases.AttentionInputs(
            *(x[1:2] for x in (inputs.q, inputs.k, inputs.v, inputs.dout, inputs.dlse)), inputs.options
        ),
        backend=native,
        deterministic=True,
    )
    assert_same_bits(alone, {name: x[1:2] for name, x in together.items()})


def test_another_sequence_of_the_batch_has_no_influence(backend):
    inputs = EVERYTHING.make(torch.float32)
    before = attention(inputs.q, inputs.k, inputs.v, **inputs.options, backend=backend)
    q, k, v = (x.clone() for x in (inputs.q, inputs.k, inputs.v))
    for x in (q, k, v):
        x[0] = 1e4
    after = attention(q, k, v, **inputs.options, backend=backend)
    torch.testing.assert_close(after[1:], before[1:], rtol=0, atol=0)
    assert not torch.equal(after[0], before[0])


# --- dropout ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_dropout_keeps_the_weights_that_philox_says(threads, dtype, backend, set_threads):
    """With v the identity, out is the weights themselves."""
    set_threads(threads)
    b, h, h_kv, s_q, s_k, p, seed = 2, 4, 2, 37, 203, 0.3, -0x0123_4567_89AB_CDEF
    q, k = torch.randn(b, s_q, h, 16, dtype=dtype), torch.randn(b, s_k, h_kv, 16, dtype=dtype)
    v = torch.eye(s_k, dtype=dtype)[None, :, None].expand(b, s_k, h_kv, s_k)
    weights = attention(q, k, v, dropout_p=p, seed=seed, backend=backend).transpose(1, 2)
    assert torch.equal(weights != 0, attention_keep(torch.tensor(seed), b, h, s_q, s_k, p))
    undropped = attention(q, k, v, backend=backend).transpose(1, 2)
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(
        weights, torch.where(weights != 0, undropped / (1 - p), 0), rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_gradient_drops_what_the_forward_dropped(dtype, backend):
    """dv of a one-hot dout is that query's weights."""
    q, k = torch.randn(1, 20, 2, 16, dtype=dtype), torch.randn(1, 50, 1, 16, dtype=dtype)
    v = torch.randn(1, 50, 1, 40, dtype=dtype, requires_grad=True)
    out = attention(q, k, v, dropout_p=0.4, seed=5, backend=backend)
    # query i of head h asks for column 20 h + i of v
    dout = torch.eye(40, dtype=dtype).view(1, 2, 20, 40).transpose(1, 2)
    (dv,) = torch.autograd.grad(out, v, dout)  # (1, s_k, 1, 40)
    keep = attention_keep(torch.tensor(5), 1, 2, 20, 50, 0.4)  # (1, 2, 20, s_k)
    assert torch.equal(dv[0, :, 0].T != 0, keep.view(40, 50))


def test_without_a_seed_torchs_generator_rules(backend):
    q = torch.randn(1, 30, 2, 16)
    torch.manual_seed(3)
    first = attention(q, q, q, dropout_p=0.5, backend=backend)
    second = attention(q, q, q, dropout_p=0.5, backend=backend)
    torch.manual_seed(3)
    again = attention(q, q, q, dropout_p=0.5, backend=backend)
    assert torch.equal(first, again) and not torch.equal(first, second)


def test_a_seed_may_be_a_tensor_and_leaves_torchs_generator_alone(backend):
    q = torch.randn(1, 30, 2, 16)
    state = torch.get_rng_state()
    from_int = attention(q, q, q, dropout_p=0.5, seed=11, backend=backend)
    from_tensor = attention(q, q, q, dropout_p=0.5, seed=torch.tensor(11), backend=backend)
    assert torch.equal(from_int, from_tensor) and torch.equal(torch.get_rng_state(), state)


# --- memory layout ---


def test_the_arguments_are_not_modified(backend):
    inputs = EVERYTHING.make(torch.float32)
    tensors = [
        inputs.q,
        inputs.k,
        inputs.v,
        inputs.dout,
        inputs.dlse,
        *(x for x in inputs.options.values() if isinstance(x, torch.Tensor)),
    ]
    before = [x.clone() for x in tensors]
    numerics.attention_results(attention, inputs, backend=backend)
    assert all(torch.equal(x, y) for x, y in zip(tensors, before, strict=True))


def _contiguous(inputs: cases.AttentionInputs) -> cases.AttentionInputs:
    return cases.AttentionInputs(
        *(x.contiguous() for x in (inputs.q, inputs.k, inputs.v, inputs.dout, inputs.dlse)), inputs.options
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "name",
    ["one token past a tile, padded", "one token short of a tile, (b, h, s, d)", "causal, fused", "everything at once"],
)
def test_strides_change_no_bit(name, dtype, native):
    inputs = CASE[name].make(dtype)
    assert not inputs.q.is_contiguous()
    assert_same_bits(
        numerics.attention_results(attention, inputs, backend=native, deterministic=True),
        numerics.attention_results(attention, _contiguous(inputs), backend=native, deterministic=True),
    )


LAYOUTS = {
    "last axis strided": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "one token for all": lambda x: x[:, :1].expand_as(x),
    "one head for all": lambda x: x[:, :, :1].expand_as(x),
    "one sequence for all": lambda x: x[:1].expand_as(x),
    "one number for all": lambda x: x.new_tensor(0.5).expand_as(x),
    "every second token": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "at an odd offset": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x),
}


@pytest.mark.parametrize("argument", ["q", "k", "v", "dout", "dlse"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides_give_the_result_of_a_contiguous_copy(argument, layout, native):
    inputs = CASE["alibi per sequence, causal"].make(torch.float32)
    x = getattr(inputs, argument)
    view = LAYOUTS[layout](x) if x.dim() == 4 else LAYOUTS[layout](x[..., None])[..., 0]
    inputs = replace(inputs, **{argument: view})
    assert_same_bits(
        numerics.attention_results(attention, inputs, backend=native, deterministic=True),
        numerics.attention_results(attention, _contiguous(inputs), backend=native, deterministic=True),
    )


@pytest.mark.parametrize("option", ["mask", "bias"])
def test_strided_and_expanded_masks_and_biases_give_the_result_of_a_copy(option, native):
    inputs = replace(CASE["odd lengths"], s_q=33, s_k=45).make(torch.float32)
    full = torch.randn(45, 33) > -0.5 if option == "mask" else torch.randn(45, 33)
    for view in (full.T, full.T.expand(1, 2, 33, 45), full.T.repeat_interleave(2, 1)[:, ::2]):
        assert not view.is_contiguous()
        assert_same_bits(
            numerics.attention_results(attention, replace(inputs, options={option: view}), backend=native),
            numerics.attention_results(attention, replace(inputs, options={option: view.contiguous()}), backend=native),
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("option", ["alibi_slopes", "sink", "kv_lengths"])
def test_strided_options_give_the_result_of_a_copy(option, dtype, native):
    inputs = EVERYTHING.make(dtype)
    x = inputs.options[option]
    strided = x.repeat_interleave(2, -1)[..., ::2]
    assert not strided.is_contiguous()
    assert_same_bits(
        numerics.attention_results(
            attention, replace(inputs, options=inputs.options | {option: strided}), backend=native, deterministic=True
        ),
        numerics.attention_results(attention, inputs, backend=native, deterministic=True),
    )


def test_the_gradient_of_an_expanded_tensor_is_summed(backend):
    key = torch.randn(1, 20, 1, 16, requires_grad=True)
    q = torch.randn(3, 20, 4, 16)
    attention(q, key.expand(3, 20, 4, 16), key.expand(3, 20, 4, 16), backend=backend).sum().backward()
    expected = key.detach().clone().requires_grad_()
    attention(q, expected.repeat(3, 1, 4, 1), expected.repeat(3, 1, 4, 1), backend="reference").sum().backward()
    torch.testing.assert_close(key.grad, expected.grad)


def test_one_tensor_may_serve_as_q_k_and_v(backend):
    x = torch.randn(2, 20, 3, 16, dtype=torch.float64, requires_grad=True)
    attention(x, x, x, causal=True, backend=backend).square().sum().backward()
    y = x.detach().clone().requires_grad_()
    attention(y, y.clone(), y.clone(), causal=True, backend="reference").square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


def test_only_the_gradients_that_are_asked_for_are_computed(backend):
    inputs = EVERYTHING.make(torch.float32)
    full = numerics.attention_results(attention, inputs, backend=backend)
    for name, x in inputs.differentiable().items():
        leaf = x.detach().requires_grad_()
        arguments = {"q": inputs.q, "k": inputs.k, "v": inputs.v} | inputs.options | {name: leaf}
        out, lse = attention(**arguments, return_lse=True, backend=backend)
        # lse does not depend on v
        results, cotangents = ([out], [inputs.dout]) if name == "v" else ([out, lse], [inputs.dout, inputs.dlse])
        (gradient,) = torch.autograd.grad(results, leaf, cotangents)
        torch.testing.assert_close(gradient, full[f"d{name}"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("used", ["out", "lse"])
def test_one_of_the_two_results_may_go_unused(used, backend):
    inputs = EVERYTHING.make(torch.float64)
    gradients = []
    for name in (backend, "reference"):
        leaves = [x.detach().requires_grad_() for x in inputs.differentiable().values()]
        arguments = inputs.options | dict(zip(inputs.differentiable(), leaves, strict=True))
        out, lse = attention(**arguments, return_lse=True, backend=name)
        result, cotangent = (out, inputs.dout) if used == "out" else (lse, inputs.dlse)
        gradients.append(torch.autograd.grad(result, leaves, cotangent, allow_unused=True))
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(
            torch.zeros(()) if actual is None else actual.sum(),
            torch.zeros(()) if expected is None else expected.sum(),
            check_dtype=False,
        )


# --- empty sizes ---


@pytest.mark.parametrize("empty", ["b", "s_q", "s_k", "h"])
@pytest.mark.parametrize("name", ["odd lengths", "everything at once", "dropout", "bias per head and key"])
def test_an_empty_axis_gives_empty_results_or_rows_that_see_no_key(empty, name, backend):
    case = replace(CASE[name], **{empty: 0})
    if empty == "h":
        case = replace(case, h_kv=0, alibi=None)
    if case.kv_lengths:
        case = replace(case, kv_lengths=tuple(min(n, case.s_k) for n in case.kv_lengths)[: case.b])
    inputs = case.make(torch.float32)
    actual = numerics.attention_results(attention, inputs, backend=backend)
    assert actual["out"].shape == inputs.dout.shape and actual["lse"].shape == inputs.dlse.shape
    assert (actual["out"] == 0).all() and (actual["lse"] == float("-inf")).all()
    for argument, x in inputs.differentiable().items():
        assert actual[f"d{argument}"].shape == x.shape and (actual[f"d{argument}"] == 0).all(), argument


# --- NaN and infinities ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_query_that_is_not_finite_spoils_its_own_row_and_no_other(value, dtype, backend):
    q, k, v = (torch.randn(2, 40, 2, 16, dtype=dtype) for _ in "qkv")
    clean, clean_lse = attention(q, k, v, return_lse=True, backend=backend)
    q[1, 7, 0, 3] = value
    out, lse = attention(q, k, v, return_lse=True, backend=backend)
    spoilt = torch.zeros(2, 40, 2, dtype=torch.bool)
    spoilt[1, 7, 0] = True
    assert out[spoilt].isnan().all() and not lse.transpose(1, 2)[spoilt].isfinite().any()
    assert torch.equal(out[~spoilt], clean[~spoilt])
    assert torch.equal(lse.transpose(1, 2)[~spoilt], clean_lse.transpose(1, 2)[~spoilt])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_nan_key_spoils_the_rows_that_see_it_and_no_other(dtype, backend):
    q, k, v = (torch.randn(2, 40, 2, 16, dtype=dtype) for _ in "qkv")
    k[1, 25, 0, 3] = float("nan")
    out, lse = attention(q, k, v, causal=True, return_lse=True, backend=backend)
    spoilt = torch.zeros(2, 40, 2, dtype=torch.bool)
    spoilt[1, 25:, 0] = True
    assert torch.equal(out.isnan().all(-1), spoilt) and torch.equal(out.isnan().any(-1), spoilt)
    assert torch.equal(lse.transpose(1, 2).isnan(), spoilt)


def test_a_nan_value_reaches_its_column_of_the_rows_that_see_it(backend):
    q, k, v = (torch.randn(1, 40, 2, 16) for _ in "qkv")
    v[0, 0, 1, 5] = float("nan")
    out, lse = attention(q, k, v, causal=True, return_lse=True, backend=backend)
    assert out[:, :, 1, 5].isnan().all() and out.isnan().sum() == 40 and lse.isfinite().all()


@pytest.mark.parametrize("option", ["bias", "alibi_slopes", "sink"])
def test_a_nan_option_is_not_swallowed(option, backend):
    inputs = EVERYTHING.make(torch.float32)
    inputs.options[option] = torch.full_like(inputs.options[option], float("nan"))
    out, lse = attention(inputs.q, inputs.k, inputs.v, **inputs.options, return_lse=True, backend=backend)
    seen = lse != float("-inf")
    assert out.isnan().any() and lse[seen].isnan().any()


def test_nan_gradients_come_out_as_nan(backend):
    q, k, v = (torch.randn(1, 20, 1, 16, requires_grad=True) for _ in "qkv")
    dout = torch.randn(1, 20, 1, 16)
    dout[0, 3, 0, 2] = float("nan")
    dq, dk, dv = torch.autograd.grad(attention(q, k, v, backend=backend), (q, k, v), dout)
    assert dq[0, 3].isnan().all() and dq.isnan().sum() == 16
    assert dk.isnan().all() and dv[..., 2].isnan().all() and dv.isnan().sum() == 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (300, 5)}], ids=str)
def test_scores_that_grow_from_key_to_key_are_as_accurate_as_plain_torch(options, dtype, native):
    """The running maximum rises all the time, and a block of keys is not the last."""
    case = cases.AttentionCase("growing scores", 1, 2, 70, 2100, 64, **options)
    inputs = case.make(dtype)
    inputs = replace(inputs, k=inputs.k * torch.linspace(0, 8, case.s_k)[:, None, None].to(dtype))
    actual = numerics.attention_results(attention, inputs, backend=native)
    plain = numerics.plain_attention_results(inputs)
    for name, expected in numerics.golden_attention(inputs).items():
        numerics.assert_as_accurate(actual[name], expected, plain[name], name, dtype=dtype, samples=inputs.rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_large_scores_do_not_overflow(dtype, backend):
    """Scores of several thousand: the softmax is a maximum, exactly."""
    q = torch.eye(16, dtype=dtype)[None, :, None] * 100
    out, lse = attention(q, q, q, scale=1.0, return_lse=True, backend=backend)
    assert torch.equal(out, q)
    torch.testing.assert_close(lse, torch.full((1, 1, 16), 10000.0))


# --- memory ---


def test_forward_and_backward_take_memory_linear_in_s(native):
    """At s 4096 the scores of the two heads alone would be 134 MB; measured in a process of its own."""
    script = textwrap.dedent("""
        import resource, torch, lmkernels

        def run(s):
            q, k, v = (torch.randn(1, s, 2, 64, requires_grad=True) for _ in "qkv")
            slopes = torch.rand(2, requires_grad=True)
            out = lmkernels.attention(q, k, v, causal=True, alibi_slopes=slopes, dropout_p=0.1, backend="native")
            out.sum().backward()
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

        print(run(256), run(4096))
    """)
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    small, large = map(float, run.stdout.split())
    assert large - small < 40, f"{large - small:.0f} MB more at s 4096 than at s 256"


def test_what_lies_beyond_a_length_is_never_read(backend):
    inputs = CASE["lengths, causal"].make(torch.float32)
    expected = numerics.attention_results(attention, inputs, backend=backend)
    k, v = inputs.k.clone(), inputs.v.clone()
    for row, length in enumerate(inputs.options["kv_lengths"].tolist()):
        k[row, length:] = torch.nan
        v[row, length:] = torch.nan
    actual = numerics.attention_results(attention, replace(inputs, k=k, v=v), backend=backend)
    assert_same_bits(actual, expected)
