"""attention inside torch: op checks, torch.compile, autocast, functional transforms."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lmkernels import attention
from lmkernels.testing import cases, numerics

CASE = {case.name: case for case in cases.ATTENTION}
CHECKED = [
    "odd lengths",
    "causal, fused",
    "everything at once",
    "everything at once, float32 options",
    "one query, long cache",
    "dropout",
]


def _op_arguments(name: str, dtype: torch.dtype = torch.float32):
    """Arguments of lmkernels::attention_fwd, and what lmkernels::attention_bwd takes besides."""
    case = CASE[name]
    inputs = case.make(dtype)
    options = inputs.options
    bias, mask, slopes = options.get("bias"), options.get("mask"), options.get("alibi_slopes")

    def four_axes(x):
        return None if x is None else x.reshape((1,) * (4 - x.dim()) + x.shape)

    seed = torch.tensor(options["seed"]) if "seed" in options else None
    features = (
        four_axes(mask),
        four_axes(bias),
        slopes,
        options.get("sink"),
        options.get("kv_lengths"),
        seed,
        case.window[0],
        0 if case.causal else case.window[1],
        case.s_k - case.s_q,
        case.d**-0.5 if case.scale is None else case.scale,
        case.softcap,
        case.dropout_p,
    )
    return inputs, features


@pytest.mark.parametrize("name", CHECKED)
def test_the_forward_op_passes_opcheck(name, native):
    inputs, features = _op_arguments(name)
    torch.library.opcheck(torch.ops.lmkernels.attention_fwd.default, (inputs.q, inputs.k, inputs.v, *features))


@pytest.mark.parametrize("name", CHECKED)
def test_the_backward_op_passes_opcheck(name, native):
    inputs, features = _op_arguments(name)
    out, lse = torch.ops.lmkernels.attention_fwd(inputs.q, inputs.k, inputs.v, *features)
    needs = tuple(option in inputs.options for option in ("bias", "alibi_slopes", "sink"))
    torch.library.opcheck(
        torch.ops.lmkernels.attention_bwd.default,
        (inputs.dout, inputs.dlse, inputs.q, inputs.k, inputs.v, out, lse, *features, *needs, True),
    )


@pytest.mark.parametrize("causal", [False, True])
def test_the_ops_without_features_pass_opcheck_and_agree_with_those_with_all(causal, native):
    q, k, v, dout = (torch.randn(2, s, 4, 16) for s in (5, 7, 7, 5))
    plain = (0 if causal else -1, 2, 0.25)
    absent, numbers = (None,) * 6, (-1, *plain, 0.0, 0.0)
    ops = torch.ops.lmkernels
    torch.library.opcheck(ops.attention_fwd.plain, (q, k, v, *plain))
    out, lse = forward = ops.attention_fwd.plain(q, k, v, *plain)
    torch.testing.assert_close(forward, ops.attention_fwd.default(q, k, v, *absent, *numbers), rtol=0, atol=0)
    given = dout, None, q, k, v, out, lse
    torch.library.opcheck(ops.attention_bwd.plain, (*given, *plain, True))
    every = ops.attention_bwd.default(*given, *absent, *numbers, False, False, False, True)
    torch.testing.assert_close(ops.attention_bwd.plain(*given, *plain, True), every[:3], rtol=0, atol=0)


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("name", ["causal, fused", "everything at once", "dropout"])
def test_a_compiled_call_has_no_graph_break_and_the_same_results(name, native, fresh_compiler):
    """Inductor, forward and backward."""
    inputs = CASE[name].make(torch.float32)
    compiled = torch.compile(attention, fullgraph=True)
    actual = numerics.attention_results(compiled, inputs, backend=native, deterministic=True)
    expected = numerics.attention_results(attention, inputs, backend=native, deterministic=True)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-6, atol=1e-6)


def test_the_reference_compiles_too(fresh_compiler):
    inputs = CASE["everything at once"].make(torch.float64)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    actual = numerics.attention_results(compiled, inputs, backend="reference")
    for name, expected in numerics.golden_attention(inputs).items():
        torch.testing.assert_close(actual[name], expected)


def test_dynamic_shapes_compile_once(native, fresh_compiler):
    compiled = torch.compile(attention, fullgraph=True, dynamic=True)

    def run(b, s_q, s_k):
        q, k, v = (torch.randn(b, s, 4, 64, requires_grad=True) for s in (s_q, s_k, s_k))
        results = [
            torch.autograd.grad(function(q, k, v, causal=True, backend=native), (q, k, v), torch.ones(b, s_q, 4, 64))
            for function in (compiled, attention)
        ]
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected)

    run(2, 48, 80)
    with torch.compiler.set_stance("fail_on_recompile"):
        run(3, 65, 113)


def test_a_model_around_it_compiles(native, fresh_compiler):
    """What stands before and after is fused by Inductor; the op stays one node."""

    def block(x, w):
        q, k, v = (x @ w).unflatten(-1, (3, 4, 16)).unbind(2)  # (b, s, h, d)
        return attention(q, k, v, causal=True, backend=native).flatten(2).relu()

    x, w = torch.randn(2, 30, 64, requires_grad=True), torch.randn(64, 192, requires_grad=True)
    actual = torch.autograd.grad(torch.compile(block, fullgraph=True)(x, w).square().sum(), (x, w))
    expected = torch.autograd.grad(block(x, w).square().sum(), (x, w))
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_computes_in_its_dtype_and_gives_gradients_in_the_inputs(dtype, backend):
    inputs = CASE["bias per head"].make(torch.float32)
    inputs = replace(inputs, dout=inputs.dout.to(dtype))

    def under_autocast(*arguments, **options):
        with torch.autocast(torch.get_default_device().type, dtype):
            return attention(*arguments, **options)

    actual = numerics.attention_results(under_autocast, inputs, backend=backend)
    assert actual["out"].dtype == dtype and actual["lse"].dtype == torch.float32
    assert all(actual[f"d{name}"].dtype == torch.float32 for name in inputs.differentiable())
    narrow = replace(inputs, **{name: getattr(inputs, name).to(dtype) for name in "qkv"})
    expected = numerics.attention_results(attention, narrow, backend=backend)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], check_dtype=False)


def test_autocast_leaves_float64_alone(backend):
    q = torch.randn(1, 5, 2, 8, dtype=torch.float64)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        assert attention(q, q, q, backend=backend).dtype == torch.float64


def test_vmap_gives_what_a_loop_gives_or_says_that_it_cannot(backend):
    q, k, v = (torch.randn(3, 2, 10, 2, 8) for _ in "qkv")

    def function(q, k, v):
        return attention(q, k, v, backend=backend)

    try:
        actual = torch.vmap(function)(q, k, v)
    except RuntimeError as error:
        assert "vmap" in str(error) or "batching rule" in str(error)
    else:
        torch.testing.assert_close(actual, torch.stack([function(*x) for x in zip(q, k, v, strict=True)]))


def test_inference_mode_and_no_grad_give_the_same_result(backend):
    q, k, v = (torch.randn(2, 20, 2, 8, requires_grad=True) for _ in "qkv")
    with_gradient = attention(q, k, v, backend=backend)
    with torch.no_grad():
        without = attention(q, k, v, backend=backend)
    with torch.inference_mode():
        inference = attention(q, k, v, backend=backend)
    assert with_gradient.requires_grad and not without.requires_grad and not inference.requires_grad
    torch.testing.assert_close(with_gradient, without, rtol=0, atol=0)
    torch.testing.assert_close(with_gradient, inference, rtol=0, atol=0)


def test_activation_checkpointing_gives_the_same_gradients(backend):
    inputs = CASE["dropout"].make(torch.float32)

    def function(q, k, v):
        return attention(q, k, v, dropout_p=0.3, backend=backend)  # the seed comes from torch's generator

    gradients = []
    for run in (function, lambda *x: torch.utils.checkpoint.checkpoint(function, *x, use_reentrant=False)):
        leaves = [x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
        torch.manual_seed(1)
        gradients.append(torch.autograd.grad(run(*leaves), leaves, inputs.dout))
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
