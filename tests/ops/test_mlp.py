"""mlp and swiglu_mlp: as accurate as plain torch, whatever is wanted of the gradients."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F

from lmkernels import mlp, swiglu_mlp
from lmkernels.testing import numerics

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
INTERPRETED = r"^(?!.*(compile|-float16|-float64)).*triton"
ON_EVERY_ISA = r"plain_torch.*native"


def short(dtype) -> str:
    return str(dtype).removeprefix("torch.")


def mlp_inputs(dtype, rows=(70,), d_model=40, d_ff=150):
    def normal(*shape):
        return torch.randn(shape).to(dtype)

    return {
        "x": normal(*rows, d_model),
        "w_in": normal(d_ff, d_model) / d_model**0.5,
        "b_in": normal(d_ff),
        "w_out": normal(d_model, d_ff) / d_ff**0.5,
        "b_out": normal(d_model),
        "residual": normal(*rows, d_model),
    }


def swiglu_inputs(dtype, rows=(70,), d_model=40, d_ff=150):
    inputs = mlp_inputs(dtype, rows, d_model, d_ff)
    gate = torch.randn(d_ff, d_model).to(dtype) / d_model**0.5
    return {"x": inputs["x"], "w_gate": gate, "w_up": inputs["w_in"], "w_down": inputs["w_out"]} | {
        "residual": inputs["residual"]
    }


def rounded(x, dtype):
    """x rounded to dtype, and its gradient too: an operand of a product on both ways."""
    return x.to(dtype).to(x.dtype)


def plain_mlp(x, w_in, b_in, w_out, b_out, *, activation="gelu_tanh", residual=None, backend=None):
    acc, dtype = torch.promote_types(x.dtype, torch.float32), x.dtype
    pre = rounded(x.to(acc) @ w_in.to(acc).t() + b_in.to(acc), dtype)
    act = {"gelu": F.gelu, "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"), "silu": F.silu, "relu": F.relu}
    hidden = rounded(act[activation](pre), dtype)
    out = hidden @ w_out.to(acc).t() + b_out.to(acc)
    return (out + residual.to(acc)).to(dtype)


def plain_swiglu(x, w_gate, w_up, w_down, *, residual=None, backend=None):
    acc, dtype = torch.promote_types(x.dtype, torch.float32), x.dtype
    gate, up = (rounded(x.to(acc) @ w.to(acc).t(), dtype) for w in (w_gate, w_up))
    return (rounded(F.silu(gate) * up, dtype) @ w_down.to(acc).t() + residual.to(acc)).to(dtype)


def reference_mlp(*arguments, **options):
    return mlp(*arguments, **options | {"backend": "reference"})


def reference_swiglu(*arguments, **options):
    return swiglu_mlp(*arguments, **options | {"backend": "reference"})


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_factors_are_rounded_only_as_far_as_torchs_precision_says(precision, matmul_precision, native):
    matmul_precision(precision)
    for function, plain, inputs in (
        (mlp, plain_mlp, mlp_inputs(torch.float32)),
        (swiglu_mlp, plain_swiglu, swiglu_inputs(torch.float32)),
    ):
        golden = reference_mlp if function is mlp else reference_swiglu
        numerics.assert_op_as_accurate(
            function, golden, plain, inputs, inputs, dtype=torch.float32, products=2, backend=native
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu", "relu"])
def test_mlp_is_as_accurate_as_plain_torch(activation, dtype, backend):
    inputs = mlp_inputs(dtype)
    numerics.assert_op_as_accurate(
        mlp, reference_mlp, plain_mlp, inputs, inputs, dtype=dtype, activation=activation, backend=backend
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_swiglu_is_as_accurate_as_plain_torch(dtype, backend):
    inputs = swiglu_inputs(dtype)
    numerics.assert_op_as_accurate(
        swiglu_mlp, reference_swiglu, plain_swiglu, inputs, inputs, dtype=dtype, backend=backend
    )


@pytest.mark.parametrize("names", [("x",), ("w_in",), ("b_in",), ("w_out",), ("b_out",), ("residual",), ("x", "b_out")])
def test_mlp_gives_the_gradients_that_are_wanted(names, native):
    inputs = mlp_inputs(torch.float32)
    whole = numerics.results(mlp, inputs, inputs, backend=native)
    for name, gradient in numerics.results(mlp, inputs, names, backend=native).items():
        assert torch.equal(gradient, whole[name])


@pytest.mark.parametrize("names", [("x",), ("w_gate",), ("w_up",), ("w_down",), ("residual",)])
def test_swiglu_gives_the_gradients_that_are_wanted(names, native):
    inputs = swiglu_inputs(torch.float32)
    whole = numerics.results(swiglu_mlp, inputs, inputs, backend=native)
    for name, gradient in numerics.results(swiglu_mlp, inputs, names, backend=native).items():
        assert torch.equal(gradient, whole[name])


@pytest.mark.parametrize("b_in, b_out, residual", list(product([True, False], repeat=3)))
def test_biases_and_the_residual_may_be_left_out(b_in, b_out, residual, backend):
    inputs = mlp_inputs(torch.float64, rows=(2, 3))
    present = inputs | {
        name: inputs[name] if there else None
        for name, there in (("b_in", b_in), ("b_out", b_out), ("residual", residual))
    }
    zeroed = inputs | {name: torch.zeros_like(inputs[name]) for name, x in present.items() if x is None}
    wanted = [name for name, x in present.items() if x is not None]
    actual = numerics.results(mlp, present, wanted, backend=backend)
    for name, expected in numerics.results(reference_mlp, zeroed, wanted).items():
        torch.testing.assert_close(actual[name], expected)


def test_gradients_agree_with_finite_differences(backend):
    for function, inputs in (
        (mlp, mlp_inputs(torch.float64, (2, 2), 3, 5)),
        (swiglu_mlp, swiglu_inputs(torch.float64, (2, 2), 3, 5)),
    ):
        leaves = [x.requires_grad_() for x in inputs.values()]

        def call(*leaves, function=function, names=tuple(inputs)):
            return function(**dict(zip(names, leaves)), backend=backend)

        assert torch.autograd.gradcheck(call, leaves)
        assert torch.autograd.gradgradcheck(call, leaves)


@pytest.mark.parametrize("function, make", [(mlp, mlp_inputs), (swiglu_mlp, swiglu_inputs)], ids=["mlp", "swiglu_mlp"])
def test_they_compile_without_a_graph_break_for_any_number_of_rows(function, make, native):
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True)

    def run(rows):
        inputs = make(torch.float32, (2, rows))
        actual = numerics.results(compiled, inputs, inputs, backend=native)
        for name, expected in numerics.results(function, inputs, inputs, backend=native).items():
            torch.testing.assert_close(actual[name], expected)

    run(20)
    with torch.compiler.set_stance("fail_on_recompile"):
        run(31)
    torch.compiler.reset()


def test_autocast_keeps_the_residual_stream_in_float32(backend):
    inputs = mlp_inputs(torch.float32)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        out = numerics.results(mlp, inputs, inputs, backend=backend)
    assert all(x.dtype == torch.float32 for x in out.values())
    golden = numerics.results(reference_mlp, inputs, inputs)
    assert all((out[name] - x).norm() < 0.02 * x.norm() for name, x in golden.items())


def test_a_bad_argument_is_named():
    good = mlp_inputs(torch.float32)
    for changes, message in (
        ({"w_in": good["w_in"][:, 1:]}, "w_in must be (out, in) = (out, 40), got (150, 39)"),
        ({"w_out": good["w_out"][:, 1:]}, "w_out must be (out, in) = (out, 150), got (40, 149)"),
        ({"b_in": good["b_out"]}, "b_in must be (out,) = (150,), got (40,)"),
        ({"residual": good["x"][1:]}, "residual must be (70, 40)"),
        ({"activation": "geglu"}, "activation must be one of"),
    ):
        with pytest.raises(ValueError) as caught:
            mlp(**good | changes)
        assert message in str(caught.value)
    gated = swiglu_inputs(torch.float32)
    with pytest.raises(ValueError) as caught:
        swiglu_mlp(**gated | {"w_up": gated["w_up"][1:]})
    assert "w_up must be (out, in) = (150, 40), got (149, 40)" in str(caught.value)
