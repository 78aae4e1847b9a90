"""linear: as accurate as plain torch, with every activation, layout, residual and mixture of dtypes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import lmkernels
from lmkernels import linear
from lmkernels.testing import cases, numerics

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
INTERPRETED = r"^(?!.*(compile|random.*16|batch|-float16|-float64)).*triton"
ON_EVERY_ISA = r"(as_accurate|every_activation|random_shapes).*native"
ACTIVATIONS = [None, "gelu", "gelu_tanh", "silu", "relu", "tanh"]


def short(dtype) -> str:
    return str(dtype).removeprefix("torch.")


def plain_linear(x, weight, bias=None, *, activation=None, residual=None, backend=None):
    """What one writes in eager torch, with sums and activation in float32 as a fused layer has them."""
    acc = torch.promote_types(x.dtype, torch.float32)
    y = _RoundedGradient.apply(x.to(acc) @ weight.to(acc).t() + (0 if bias is None else bias.to(acc)), x.dtype)
    y = {
        None: lambda y: y,
        "gelu": F.gelu,
        "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
        "silu": F.silu,
        "relu": F.relu,
        "tanh": torch.tanh,
    }[activation](y)
    return (y if residual is None else y + residual.to(acc)).to(x.dtype if residual is None else residual.dtype)


class _RoundedGradient(torch.autograd.Function):
    """What the activation is applied to is kept, and its gradient multiplied, in the dtype of x."""

    @staticmethod
    def forward(ctx, y, dtype):
        ctx.dtype = dtype
        return y.to(dtype).to(y.dtype)

    @staticmethod
    def backward(ctx, dy):
        return dy.to(ctx.dtype).to(dy.dtype), None


def reference(*arguments, **options):
    return linear(*arguments, **options | {"backend": "reference"})


def check(inputs, dtype, backend, **options):
    numerics.assert_op_as_accurate(
        linear, reference, plain_linear, inputs, inputs, dtype=dtype, backend=backend, **options
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("case", cases.LINEAR, ids=str)
def test_results_and_gradients_are_as_accurate_as_plain_torch(case, dtype, backend):
    inputs = case.make(dtype)
    if dtype == torch.float64 and max(case.d_in, case.d_out) > 1000:
        # torch's float64 product of such a depth, which would be the golden one, errs more than ours does
        actual = numerics.results(linear, inputs, inputs, backend=backend)
        for name, expected in numerics.results(plain_linear, inputs, inputs).items():
            torch.testing.assert_close(actual[name], expected, rtol=0, atol=1e-13)
        return
    check(inputs, dtype, backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_with_and_without_a_residual(activation, dtype, backend):
    inputs = cases.LinearCase("activations", (50,), 70, 90).make(dtype)
    check(inputs, dtype, backend, activation=activation)
    inputs["residual"] = torch.randn(50, 90).to(dtype)
    check(inputs, dtype, backend, activation=activation)


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    rows=st.sampled_from([0, 1, 2, 5, 6, 7, 17, 95, 97, 200]),
    d_in=st.sampled_from([0, 1, 2, 15, 16, 33, 64, 129]),
    d_out=st.sampled_from([0, 1, 3, 16, 63, 64, 65, 130, 400]),
    layout=st.sampled_from(["rows", "columns", "padded", "strided"]),
    activation=st.sampled_from(ACTIVATIONS),
    bias=st.booleans(),
    residual=st.booleans(),
)
def test_random_shapes_and_layouts_are_right(dtype, backend, rows, d_in, d_out, layout, activation, bias, residual):
    """So few elements differ in accuracy by chance: an error here would be a wrong number."""
    case = cases.LinearCase("random", (rows,), d_in, d_out, layout=layout, bias=bias)
    inputs = case.make(dtype)
    if residual:
        inputs["residual"] = torch.randn(rows, d_out).to(dtype)
    actual = numerics.results(linear, inputs, inputs, activation=activation, backend=backend)
    wide = numerics.in_dtype(inputs, torch.float64)
    golden = numerics.results(linear, wide, inputs, activation=activation, backend="reference")
    for name, expected in golden.items():
        if expected.numel():
            tolerance = torch.finfo(dtype).eps * (8 if dtype.itemsize == 2 else 200) * (1 + expected.abs().max().item())
            torch.testing.assert_close(actual[name].double(), expected, rtol=0, atol=tolerance)
        else:
            assert actual[name].shape == expected.shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=short)
def test_a_float32_weight_is_taken_with_16_bit_inputs_and_gets_a_float32_gradient(dtype, backend):
    inputs = cases.LinearCase("mixed", (70,), 90, 130).make(dtype)
    wide = inputs | {name: inputs[name].float() for name in ("weight", "bias")}
    wide["residual"] = torch.randn(70, 130)
    actual = numerics.results(linear, wide, wide, activation="gelu", backend=backend)
    assert actual["out"].dtype == actual["dweight"].dtype == actual["dbias"].dtype == torch.float32
    assert actual["dx"].dtype == dtype and torch.equal(
        actual["dresidual"], numerics.results(linear, wide, ["residual"], backend=backend)["dresidual"]
    )
    golden = numerics.results(
        linear, numerics.in_dtype(wide, torch.float64), wide, activation="gelu", backend="reference"
    )
    for name, expected in golden.items():
        error = (actual[name].double() - expected).norm() / expected.norm()
        assert error < (2 if name in ("dx", "dweight", "dbias") else 0.5) * torch.finfo(dtype).eps, name


def test_autocast_computes_in_its_dtype_and_keeps_gradients_in_the_parameters(backend):
    inputs = cases.LinearCase("autocast", (4, 9), 40, 50).make(torch.float32)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        actual = numerics.results(linear, inputs, inputs, backend=backend)
        expected = numerics.results(F.linear, {"input": inputs["x"], **{k: inputs[k] for k in ("weight", "bias")}})
    assert actual["out"].dtype == expected["out"].dtype == torch.bfloat16
    torch.testing.assert_close(actual["out"], expected["out"], rtol=0.01, atol=0.02)  # torch rounds the bias too
    assert all(actual[f"d{name}"].dtype == torch.float32 for name in inputs)


def test_autocast_keeps_a_float32_residual_in_float32(backend):
    """As x + linear(x) is in eager torch: the residual stream of a model is not rounded by its layers."""
    x, weight, residual = torch.randn(5, 16), torch.randn(8, 16), torch.randn(5, 8) * (1 + 2.0**-20)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        out = linear(x, weight * 0, residual=residual, backend=backend)
    assert torch.equal(out, residual)


# 50 rows are two blocks of a product by tiles, and a depth of 1600 is multiplied in parts
@pytest.mark.parametrize("precision", ["highest", "high"])
@pytest.mark.parametrize("depth", [70, 1600])
@pytest.mark.parametrize("where", ["x", "weight"])
def test_infinities_and_nans_stay_what_and_where_they_are_in_float32(depth, where, precision, matmul_precision, native):
    matmul_precision(precision)
    inputs = {"x": torch.randn(50, depth), "weight": torch.randn(90, depth)}
    inputs[where][40, depth - 3], inputs[where][45, 1], inputs[where][46, 2] = torch.inf, -torch.inf, torch.nan
    ours, torchs = linear(**inputs, backend=native), F.linear(**inputs)
    torch.testing.assert_close(ours, torchs, equal_nan=True, rtol=1e-5, atol=1e-3)


# the largest floats would be rounded to infinities
@pytest.mark.parametrize("largest", [3.4e38, torch.finfo(torch.float32).max, -torch.finfo(torch.float32).max])
def test_the_largest_floats_stay_finite_at_high_precision(largest, matmul_precision, native):
    matmul_precision("high")
    x = torch.zeros(50, 70)
    x[3, 4] = largest
    out = linear(x, torch.eye(70), backend=native)
    assert torch.equal(out, x)


@pytest.mark.parametrize("scales", [(1e-37, 1.0), (1.0, 1e-37), (1e-25, 1e-8), (1e30, 1e-30), (1e25, 1e10)], ids=str)
@pytest.mark.parametrize("depth", [70, 1600])
@pytest.mark.parametrize("precision", ["highest", "high"])
def test_float32_keeps_its_digits_over_its_whole_range(depth, scales, precision, matmul_precision, native):
    matmul_precision(precision)
    x, weight = torch.randn(50, depth) * scales[0], torch.randn(90, depth) * scales[1]
    want = x.double() @ weight.double().t()
    for y in (linear(x, weight, backend=native), F.linear(x, weight)):
        assert (y.double() - want).norm() < (3e-6 + numerics.factor_rounding()) * want.norm()


@pytest.mark.parametrize("precision", ["high", "medium"])
@pytest.mark.parametrize("case", cases.LINEAR, ids=str)
def test_factors_are_rounded_only_as_far_as_torchs_precision_says(case, precision, matmul_precision, native):
    matmul_precision(precision)
    inputs = case.make(torch.float32)
    check(inputs, torch.float32, native)
    check(inputs, torch.float32, native, activation="gelu")


def test_lower_precision_is_taken_up_where_the_cpu_is_faster_with_it(matmul_precision, native):
    inputs = cases.LinearCase("precision", (70,), 90, 130).make(torch.float32)
    inputs["weight"] = inputs["weight"].contiguous()
    found = {}
    for precision in ("highest", "high", "medium"):
        matmul_precision(precision)
        found[precision] = numerics.results(linear, inputs, inputs, backend=native)
    isa = torch.ops.lmkernels.cpu_isa()
    for name in ("out", "dx", "dweight"):
        assert torch.equal(found["high"][name], found["highest"][name]) == (isa != "amx")
        assert torch.equal(found["medium"][name], found["highest"][name]) == (isa not in ("amx", "avx512bf16"))


def test_a_compiled_graph_follows_torchs_precision(matmul_precision, native):
    torch.compiler.reset()
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    x, weight = torch.randn(70, 90), torch.randn(130, 90)
    for precision in ("highest", "high", "highest"):
        matmul_precision(precision)
        assert torch.equal(compiled(x, weight, backend=native), linear(x, weight, backend=native))
    torch.compiler.reset()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_a_row_gets_the_same_bits_in_any_batch_and_with_any_number_of_threads(dtype, native):
    inputs = cases.LinearCase("invariance", (300,), 200, 500).make(dtype)
    inputs["x"] = inputs["x"].repeat(3, 1)
    whole = numerics.results(linear, inputs, inputs, activation="gelu", backend=native)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        again = numerics.results(linear, inputs, inputs, activation="gelu", backend=native)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    part = linear(inputs["x"][100:133], inputs["weight"], inputs["bias"], activation="gelu", backend=native)
    assert torch.equal(part, whole["out"][100:133])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_agree_with_finite_differences(activation, backend):
    inputs = cases.LinearCase("tiny", (3, 2), 5, 4).make(torch.float64)
    leaves = [x.requires_grad_() for x in (*inputs.values(), torch.randn(3, 2, 4, dtype=torch.float64))]

    def function(x, weight, bias, residual):
        return linear(x, weight, bias, residual=residual, activation=activation, backend=backend)

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_ops_pass_opcheck(dtype, layout, native):
    x, weight, bias = cases.LinearCase("opcheck", (7,), 10, 6, layout=layout).make(dtype).values()
    dout, pre = torch.randn(7, 6).to(dtype), torch.randn(7, 6).to(dtype)
    ops = torch.ops.lmkernels
    torch.library.opcheck(ops.linear_fwd.default, (x, weight, bias, pre.float(), dout, 1, True))
    torch.library.opcheck(ops.linear_fwd.default, (x, weight, None, None, None, 0, False))
    torch.library.opcheck(ops.linear_bwd.default, (dout, x, weight, pre, 2, True, True, True))
    torch.library.opcheck(ops.linear_bwd.default, (dout, x, weight, None, 0, False, True, False))
    torch.library.opcheck(ops.activation_bwd.default, (dout, pre, dout, 3, False))
    torch.library.opcheck(ops.activation_bwd.default, (dout, pre, None, 3, True))


def test_it_compiles_without_a_graph_break_for_any_number_of_rows(native):
    torch.compiler.reset()
    compiled = torch.compile(linear, fullgraph=True, dynamic=True)

    def run(rows):
        inputs = cases.LinearCase("compile", (2, rows), 20, 30).make(torch.float32)
        inputs["residual"] = torch.randn(2, rows, 30)
        actual = numerics.results(compiled, inputs, inputs, activation="gelu_tanh", backend=native)
        expected = numerics.results(linear, inputs, inputs, activation="gelu_tanh", backend=native)
        for name in expected:
            torch.testing.assert_close(actual[name], expected[name])

    run(40)
    with torch.compiler.set_stance("fail_on_recompile"):
        run(57)
    torch.compiler.reset()


x, w = torch.randn(4, 6), torch.randn(5, 6)
BAD = {
    "x is no tensor": (([1.0], w), {}, TypeError, "x must be a torch.Tensor, got list"),
    "x of integers": ((x.int(), w), {}, TypeError, "x must be float32, bfloat16, float16 or float64, got torch.int32"),
    "x without axes": ((x[0, 0], w), {}, ValueError, "x must be (..., in) with at least one axis"),
    "weight of another width": ((x, w[:, :5]), {}, ValueError, "weight must be (out, in) = (out, 6), got (5, 5)"),
    "weight of 3 axes": ((x, w[None]), {}, ValueError, "weight must be (out, in)"),
    "weight of another dtype": ((x, w.double()), {}, TypeError, "weight must be torch.float32, got torch.float64"),
    "bias of another size": ((x, w, w[0]), {}, ValueError, "bias must be (out,) = (5,), got (6,)"),
    "an unknown activation": ((x, w), {"activation": "swish"}, ValueError, "activation must be one of 'gelu'"),
    "a residual of another shape": ((x, w), {"residual": x}, ValueError, "residual must be (4, 5)"),
    "an unknown backend": ((x, w), {"backend": "cuda"}, ValueError, "must be one of native, triton, reference"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_argument_is_named(name):
    arguments, options, error, message = BAD[name]
    with pytest.raises(error) as caught:
        linear(*arguments, **options)
    assert message in str(caught.value)


def test_it_is_public():
    assert lmkernels.linear is linear
