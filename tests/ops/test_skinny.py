"""Linear layers on few rows: as accurate as plain torch in every layout, and the same bits in every batch."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from lmkernels.ops.linear import reference
from lmkernels.ops.linear.native import CODES
from lmkernels.testing import numerics

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# rows, out, in: single elements, odd sizes, whole vectors, blocks of the depth, several tasks
SHAPES = [
    *((m, 37, 131) for m in range(1, 18)),
    (1, 1, 1),
    (2, 3, 5),
    (3, 1, 700),
    (5, 130, 1),
    (7, 33, 31),
    (16, 100, 33),
    (17, 64, 1100),
    (1, 768, 768),
    (13, 515, 768),
    (4, 200, 3072),
]
ON_EVERY_ISA = r"^(?!.*op_check)"
LAYOUTS = ["rows", "columns", "wide rows", "wide columns", "strided"]


def skinny(x, weight, bias=None, residual=None, activation=None):
    return torch.ops.lmkernels.skinny_linear_fwd(x, weight, bias, residual, CODES[activation])


def plain(x, weight, bias=None, residual=None, activation=None):
    """A sum over float32 products that is rounded once, as the kernels' is."""
    acc = torch.promote_types(x.dtype, torch.float32)
    y = F.linear(x.to(acc), weight.to(acc), None if bias is None else bias.to(acc))
    y = reference.ACTIVATIONS[activation](y)
    return y.to(x.dtype) if residual is None else (y + residual.to(y.dtype)).to(residual.dtype)


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    n, k = x.shape
    if layout == "rows":
        return x.contiguous()
    if layout == "columns":
        return x.t().contiguous().t()
    wide = torch.full((n + 3, k + 5), float("nan"), dtype=x.dtype)
    if layout == "wide rows":
        return wide[:n, :k].copy_(x)
    if layout == "wide columns":
        return wide.t().contiguous().t()[:n, :k].copy_(x)
    return torch.full((2 * n, 2 * k), float("nan"), dtype=x.dtype)[::2, ::2].copy_(x)


def make(m, n, k, dtype, layout="rows", bias=True, residual=True) -> dict[str, torch.Tensor]:
    inputs = {"x": torch.randn(m, k), "weight": torch.randn(n, k) / max(1, k) ** 0.5}
    if bias:
        inputs["bias"] = torch.randn(n)
    if residual:
        inputs["residual"] = torch.randn(m, n)
    inputs = numerics.in_dtype(inputs, dtype)
    inputs["weight"] = laid_out(inputs["weight"], layout)
    return inputs


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_results_are_as_accurate_as_plain_torch(shape, layout, dtype, native):
    inputs = make(*shape, dtype, layout)
    numerics.assert_op_as_accurate(skinny, reference_of, plain, inputs, dtype=dtype, activation="gelu_tanh")


def reference_of(x, weight, bias=None, residual=None, activation=None):
    return reference.forward(x, weight, bias, residual, activation)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", list(CODES))
def test_every_activation(activation, dtype, native):
    for options in ({"bias": False}, {"residual": False}, {}):
        inputs = make(3, 70, 90, dtype, **options)
        numerics.assert_op_as_accurate(skinny, reference_of, plain, inputs, dtype=dtype, activation=activation)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout, dtype, native):
    inputs = make(5, 71, 90, dtype, layout)
    expected = skinny(**inputs | {"weight": inputs["weight"].clone(memory_format=torch.contiguous_format)})
    if layout in ("columns", "wide columns"):
        expected = skinny(**inputs | {"weight": laid_out(inputs["weight"], "columns")})
    for name in ("x", "residual"):
        wide = torch.full((11, 200), float("nan"), dtype=dtype)[::2, : inputs[name].shape[1]]
        inputs[name] = wide[:5].copy_(inputs[name])
    assert torch.equal(skinny(**inputs), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_bias_and_residual_of_16_bit_products(dtype, native):
    inputs = make(6, 50, 60, dtype)
    inputs |= {name: inputs[name].float() for name in ("bias", "residual")}
    assert skinny(**inputs).dtype == torch.float32
    numerics.assert_op_as_accurate(skinny, reference_of, plain, inputs, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_a_row_has_the_same_bits_in_every_batch(layout, dtype, native):
    inputs = make(50, 203, 1205, dtype, layout)
    x, residual = inputs.pop("x"), inputs.pop("residual")
    together = skinny(x, residual=residual, activation="gelu", **inputs)
    for first, last in ((0, 1), (3, 5), (2, 8), (1, 13), (0, 16), (16, 33), (4, 48)):
        alone = skinny(x[first:last], residual=residual[first:last], activation="gelu", **inputs)
        assert torch.equal(alone, together[first:last])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_threads_do_not_change_the_bits(layout, dtype, native):
    inputs = make(9, 1000, 500, dtype, layout)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(skinny(**inputs))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 5, 7), (3, 0, 7), (3, 5, 0)], ids=str)
def test_empty_sizes(shape, dtype, native):
    inputs = make(*shape, dtype)
    torch.testing.assert_close(skinny(**inputs), plain(**inputs))


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_op_check(layout, dtype, native):
    inputs = make(3, 20, 33, dtype, layout)
    arguments = (inputs["x"], inputs["weight"], inputs["bias"], inputs["residual"], CODES["silu"])
    torch.library.opcheck(torch.ops.lmkernels.skinny_linear_fwd.default, arguments)


@pytest.mark.parametrize(
    "change",
    [
        {"weight": torch.randn(4, 6)},
        {"weight": torch.randn(4, 5).double()},
        {"bias": torch.randn(5)},
        {"residual": torch.randn(2, 4)},
    ],
)
def test_what_does_not_fit_is_refused(change, native):
    inputs = {"x": torch.randn(3, 5), "weight": torch.randn(4, 5)} | change
    with pytest.raises(RuntimeError):
        skinny(**inputs)


ROWS_OF_EVERY_DTYPE = """
import hashlib
import torch
from lmkernels import linear, quantize_weight
torch.manual_seed(0)
for n, k in ((1000, 768), (37, 131), (515, 33), (129, 1100)):
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        x, weight = torch.randn(1, k, dtype=dtype), torch.randn(n, k, dtype=dtype)
        for w in (weight, quantize_weight(weight.float(), "int8")):
            if dtype != torch.float64 or w is weight:
                print(n, k, dtype, hashlib.sha1(linear(x, w).view(torch.uint8).numpy().tobytes()).hexdigest())
"""


def test_from_how_many_places_memory_is_read_does_not_change_the_bits(native):
    def run(streams: str) -> str:
        environment = os.environ | {"LMKERNELS_STREAMS": streams}
        return subprocess.check_output([sys.executable, "-c", ROWS_OF_EVERY_DTYPE], env=environment, text=True)

    from_one = run("0")
    assert from_one.count("bfloat16") == 8 and from_one == run("1")
