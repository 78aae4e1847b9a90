"""add_positions, sinusoidal and alibi_slopes."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
import torch

from lmkernels import add_positions, alibi_slopes, sinusoidal
from lmkernels.testing import cases, numerics

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
INTERPRETED = r"^(?!.*(compiled|64|GPT|BERT|many|indices|beside|float16)).*triton"
ON_EVERY_ISA = r"(accurate|gradcheck).*native"
CASE = {case.name: case for case in cases.EMBED}


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def definition(**arguments):
    return add_positions(**arguments, backend="reference")


def plain(x, table, positions=None, scale=1.0):
    rows = table[: x.shape[-2]] if positions is None else table[positions]
    return x * scale + rows.to(x.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("case", cases.EMBED, ids=str)
def test_results_and_gradients_are_as_accurate_as_plain_torch(case, dtype, backend):
    inputs = case.make_added(dtype)

    def function(**arguments):
        out = add_positions(**arguments, backend=backend)
        assert out.dtype == dtype and out.is_contiguous()
        return out

    for options in ({}, {"scale": math.sqrt(case.d)}):
        numerics.assert_op_as_accurate(function, definition, plain, inputs, ["x", "table"], dtype=dtype, **options)


@pytest.mark.parametrize("case", ["GPT-2", "positions of each token", "packed"])
def test_gradcheck_to_the_second_order(case, backend):
    inputs = replace(CASE[case], s=3, d=2).make_added(torch.float64)
    leaves = [inputs[name].requires_grad_() for name in ("x", "table")]

    def function(x, table):
        return add_positions(x, table, positions=inputs.get("positions"), scale=0.7, backend=backend)

    torch.autograd.gradcheck(function, leaves)
    torch.autograd.gradgradcheck(function, leaves)


def test_positions_of_the_batch_come_from_one_pass_over_the_table(backend):
    """Left-padded sequences: each row of the batch at positions of its own."""
    x, table = torch.randn(2, 3, 4), torch.randn(5, 4)
    positions = torch.tensor([[0, 0, 1], [2, 3, 4]], dtype=torch.int32)
    out = add_positions(x, table, positions=positions, scale=2.0, backend=backend)
    torch.testing.assert_close(out, x * 2 + table[positions.long()])


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (0, 4), (2, 3, 0)], ids=str)
def test_empty_tensors(shape, backend):
    x, table = torch.randn(shape, requires_grad=True), torch.randn(5, shape[-1], requires_grad=True)
    out = add_positions(x, table, backend=backend)
    assert out.shape == x.shape
    out.sum().backward()
    assert x.grad.shape == x.shape and not table.grad.any()


X, TABLE = torch.randn(2, 3, 4), torch.randn(5, 4)
BAD = {
    "x of one axis": ((X[0, 0], TABLE), {}, ValueError, "x must be (b, s, d) or (t, d), got (4,)"),
    "x of integers": ((X.long(), TABLE), {}, TypeError, "x must be float32, bfloat16, float16 or float64, got"),
    "another width": ((X, TABLE[:, 1:]), {}, ValueError, "table must be (n, 4), got (5, 3)"),
    "a wider table": ((X, TABLE.double()), {}, TypeError, "table must be torch.float32, got torch.float64"),
    "too few rows": ((X, TABLE[:2]), {}, ValueError, "table must have a row for each of the 3 positions, got 2"),
    "a position beyond the table": (
        (X, TABLE),
        {"positions": torch.tensor([0, 1, 5])},
        ValueError,
        "positions must lie between 0 and 4, got values from 0 to 5",
    ),
    "positions of another shape": (
        (X, TABLE),
        {"positions": torch.arange(2)},
        ValueError,
        "positions must be (3,) or (1, 3) or (2, 3), got (2,)",
    ),
    "a scale that is none": ((X, TABLE), {"scale": "2"}, TypeError, "scale must be a number, got str"),
    "an infinite scale": ((X, TABLE), {"scale": math.inf}, ValueError, "scale must be a finite number, got inf"),
}


@pytest.mark.parametrize("arguments, options, error, message", BAD.values(), ids=BAD.keys())
def test_bad_input_is_named(arguments, options, error, message, backend):
    with pytest.raises(error, match=re.escape(message)):
        add_positions(*arguments, **options, backend=backend)


def test_the_op_passes_opcheck(native):
    inputs = CASE["positions of each token"].make_added(torch.float32)
    arguments = (inputs["x"], 0.5, None, None, inputs["positions"], inputs["table"], None, None)
    torch.library.opcheck(torch.ops.lmkernels.embed_fwd.default, arguments)


def test_a_compiled_call_has_no_graph_break_and_serves_other_sizes(backend):
    torch.compiler.reset()
    compiled = torch.compile(add_positions, fullgraph=True, dynamic=True, backend="aot_eager")
    table = torch.randn(40, 6, requires_grad=True)

    def run(b, s):
        x = torch.randn(b, s, 6, requires_grad=True)
        outs = [f(x, table, scale=2.0, backend=backend) for f in (compiled, add_positions)]
        torch.testing.assert_close(*outs)
        gradients = (torch.autograd.grad(out.square().sum(), (x, table)) for out in outs)
        for actual, expected in zip(*gradients, strict=True):
            torch.testing.assert_close(actual, expected)

    run(2, 10)
    with torch.compiler.set_stance("fail_on_recompile"):
        run(3, 17)
    torch.compiler.reset()


def test_autocast_leaves_the_dtype_alone(backend):
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        assert add_positions(X, TABLE, backend=backend).dtype == torch.float32


# --- sinusoidal


@pytest.mark.parametrize("d_model", [0, 1, 7, 8, 512])
def test_sinusoids_are_those_of_the_paper(d_model):
    table = sinusoidal(50, d_model)
    assert table.shape == (50, d_model) and table.dtype == torch.float32 and table.is_contiguous()
    for position in (0, 1, 49):
        for column in range(d_model):
            angle = position / 10000 ** (2 * (column // 2) / d_model)
            expected = math.cos(angle) if column % 2 else math.sin(angle)
            assert table[position, column].item() == pytest.approx(expected, abs=1e-7)


def test_bad_sizes_of_sinusoids_are_named():
    with pytest.raises(ValueError, match="seq_len must be an integer >= 0, got -1"):
        sinusoidal(-1, 4)
    with pytest.raises(ValueError, match=r"d_model must be an integer >= 0, got 4\.0"):
        sinusoidal(1, 4.0)


# --- alibi_slopes


def get_slopes(n):
    """As the paper's own code has it (ofirpress/attention_with_linear_biases), in its words."""

    def power_of_2(n):
        start = 2 ** (-(2 ** -(math.log2(n) - 3)))
        return [start * start**i for i in range(n)]

    if math.log2(n).is_integer():
        return power_of_2(n)
    closest = 2 ** math.floor(math.log2(n))
    return power_of_2(closest) + get_slopes(2 * closest)[0::2][: n - closest]


@pytest.mark.parametrize("num_heads", [1, 2, 3, 8, 12, 16, 25, 32, 71, 112])
def test_slopes_are_those_of_the_paper(num_heads):
    slopes = alibi_slopes(num_heads)
    assert slopes.dtype == torch.float32 and slopes.shape == (num_heads,)
    torch.testing.assert_close(slopes, torch.tensor(get_slopes(num_heads)), rtol=1e-6, atol=0)


def test_a_bad_number_of_heads_is_named():
    for bad in (0, -1, 2.0):
        with pytest.raises(ValueError, match=f"num_heads must be an integer >= 1, got {bad}"):
            alibi_slopes(bad)
