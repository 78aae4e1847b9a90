"""softmax: as accurate as plain torch, defined where torch gives NaN, and at home in torch."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from lmkernels import softmax
from lmkernels.ops.softmax import api
from lmkernels.testing import cases, numerics

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
INTERPRETED = r"^(?!.*(compiled|50257|-float16|-float64)).*triton"
ON_EVERY_ISA = r"(accurate|nothing|nan).*native"


def short(dtype) -> str:
    return str(dtype).removeprefix("torch.")


def plain(x, dim):
    """torch's, in float32 where x has 16 bits, with zeros in rows of nothing but -inf."""
    seen = (x != float("-inf")).any(dim, keepdim=True)
    return torch.where(seen, torch.softmax(torch.where(seen, x, 0.0), dim), 0.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("case", cases.SOFTMAX, ids=str)
def test_results_and_gradients_are_as_accurate_as_plain_torch(case, dtype, backend):
    inputs = case.make(dtype)
    numerics.assert_op_as_accurate(
        partial(softmax, backend=backend),
        partial(softmax, backend="reference"),
        plain,
        inputs,
        ["x"],
        dtype=dtype,
        samples=inputs["x"].numel() // case.shape[case.dim],
        dim=case.dim,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
@pytest.mark.parametrize("hidden", [0.0, 0.9])
def test_triton_takes_long_rows_in_blocks(hidden, dtype, triton, monkeypatch):
    """As those that do not fit in registers; of some columns of the blocks, all is -inf."""
    monkeypatch.setattr(api.BACKENDS[triton], "LONGEST", 64)
    monkeypatch.setattr(api.BACKENDS[triton], "LONG", {"COLS": 64, "num_warps": 1})
    numerics.assert_op_as_accurate(
        partial(softmax, backend=triton),
        partial(softmax, backend="reference"),
        lambda x: torch.softmax(x, -1).nan_to_num(),
        cases.SoftmaxCase("", (7, 300), hidden=hidden).make(dtype),
        ["x"] if hidden == 0 else [],
        dtype=dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_a_row_of_nothing_but_minus_infinity_gives_zeros_and_zero_gradients(dtype, backend):
    x = torch.randn(5, 37).to(dtype)
    x[2] = float("-inf")
    x[3, :20] = float("-inf")
    x.requires_grad_()
    y = softmax(x, backend=backend)
    (dx,) = torch.autograd.grad(y, x, torch.randn(5, 37).to(dtype))
    assert (y[2] == 0).all() and (dx[2] == 0).all()
    assert (y[3, :20] == 0).all() and (dx[3, :20] == 0).all() and dx.isfinite().all()
    torch.testing.assert_close(y.sum(-1).float(), torch.tensor([1.0, 1, 0, 1, 1]), rtol=0, atol=2e-2)


def test_nan_and_plus_infinity_give_nan_in_their_row_alone(backend):
    x = torch.randn(6, 40)
    x[1, 3], x[4, 0] = float("nan"), float("inf")
    x[5] = float("-inf")
    x[5, 7] = float("nan")
    y = softmax(x, backend=backend)
    assert y[[1, 5]].isnan().all() and y[4].isnan().any() and y[[0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=short)
def test_float32_of_16_bits_is_not_rounded_on_the_way(dtype, backend):
    x = torch.randn(20, 300).to(dtype).requires_grad_()
    dy = torch.randn(20, 300)
    y = softmax(x, dtype=torch.float32, backend=backend)
    expected = torch.softmax(x, -1, dtype=torch.float32)
    torch.testing.assert_close(y, expected)
    dx, dx_expected = (torch.autograd.grad(out, x, dy)[0] for out in (y, expected))
    torch.testing.assert_close(dx, dx_expected)


@pytest.mark.parametrize(
    ("given", "dtype"),
    [(torch.int64, torch.float32), (torch.float32, torch.bfloat16), (torch.float32, torch.float64)],
    ids=short,
)
def test_dtype_is_what_torch_means_by_it(given, dtype, backend):
    x = (3 * torch.randn(10, 20)).to(given)
    torch.testing.assert_close(softmax(x, dtype=dtype, backend=backend), torch.softmax(x, -1, dtype=dtype))


@pytest.mark.parametrize("shape", [(), (0, 4), (4, 0), (0,)], ids=str)
def test_no_axis_and_no_element(shape, backend):
    x = torch.randn(shape, requires_grad=True)
    y = softmax(x, backend=backend)
    assert torch.equal(y, torch.softmax(x, -1))
    assert torch.autograd.grad(y.sum(), x)[0].shape == shape


@pytest.mark.parametrize("dim", [-1, 0, 1])
def test_gradients_of_both_orders_are_those_of_finite_differences(dim, backend):
    x = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: softmax(x, dim, backend=backend), x)
    assert torch.autograd.gradgradcheck(lambda x: softmax(x, dim, backend=backend), x)


def test_results_are_the_same_for_any_number_of_threads_and_rows(native):
    x, threads, found = torch.randn(700, 500), torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found.append(numerics.results(partial(softmax, backend=native), {"x": x}, ["x"]))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0][name], other[name]) for other in found[1:] for name in other)
    assert torch.equal(softmax(x[11:14], backend=native), found[0]["out"][11:14])


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def test_the_ops_pass_opcheck(native):
    x = torch.randn(4, 6, 20)[:, ::2]
    torch.library.opcheck(torch.ops.lmkernels.softmax_fwd.default, (x, False))
    torch.library.opcheck(torch.ops.lmkernels.softmax_fwd.default, (x.bfloat16(), True))
    torch.library.opcheck(torch.ops.lmkernels.softmax_bwd.default, (x, torch.softmax(x, -1)))


def test_a_compiled_call_has_no_graph_break_and_dynamic_shapes_compile_once(native, fresh_compiler):
    def function(x):
        return softmax(x * 2, 1, backend=native)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")

    def run(*shape):
        x = torch.randn(shape)
        actual, expected = (numerics.results(f, {"x": x}, ["x"]) for f in (compiled, function))
        for name in expected:
            torch.testing.assert_close(actual[name], expected[name])

    run(3, 20, 40)
    with torch.compiler.set_stance("fail_on_recompile"):
        run(4, 33, 17)


def test_autocast_changes_nothing(backend):
    x = torch.randn(10, 20)
    expected = softmax(x, backend=backend)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        assert torch.equal(softmax(x, backend=backend), expected)
        assert softmax(x.bfloat16(), backend=backend).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": 1.0}, TypeError, "x must be a torch.Tensor, got float"),
        ({"x": torch.ones(3, dtype=torch.int32)}, TypeError, "x must be float32.* got torch.int32"),
        ({"dim": 2}, ValueError, r"dim must be between -2 and 1 for x of shape \(3, 8\), got 2"),
        ({"dim": 0.5}, TypeError, "dim must be an int, got float"),
        ({"dtype": torch.int32}, TypeError, "dtype must be float32.* got torch.int32"),
        ({"backend": "x"}, ValueError, "backend must be one of native, triton, reference or None, got 'x'"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_bad_arguments_say_what_is_wrong(change, error, message):
    with pytest.raises(error, match=message):
        softmax(**{"x": torch.ones(3, 8)} | change)
