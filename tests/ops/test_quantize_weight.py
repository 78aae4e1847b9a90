"""quantize_weight, and linear on what it makes: the dequantised weight defines the result."""

from __future__ import annotations

import math

import pytest
import torch

import lmkernels as lmk
from lmkernels import QuantizedWeight, linear, quantize_weight
from lmkernels.ops.linear import reference
from lmkernels.ops.quantize_weight.reference import rounded

ON_EVERY_ISA = r"^(?!.*(op_check|compile)).*native"
KINDS = ["int8", "int4"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# The kernels take each row of x as integers up to this size, in proportion to its largest element.
LARGEST = 127
SHAPES = [
    *((m, 37, 131) for m in range(1, 18)),
    (1, 1, 1),
    (2, 3, 5),
    (3, 1, 700),
    (5, 130, 1),
    (16, 100, 32),
    (64, 48, 256),
    (65, 100, 300),
    (1, 768, 768),
    (130, 200, 1100),
    (40, 64, 96),
    (18, 3, 66000),  # more than are summed as integers
]


def bound(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The most that the rounding of x can change x weight^T: half a step times the sum of the weights' sizes."""
    step = x.double().abs().amax(1, keepdim=True) / LARGEST
    return step / 2 * weight.double().abs().sum(1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_is_exact_up_to_the_rounding_of_x(shape, kind, dtype, backend):
    m, n, k = shape
    x, bias, residual = torch.randn(m, k).to(dtype), torch.randn(n).to(dtype), torch.randn(m, n).to(dtype)
    weight = quantize_weight(torch.randn(n, k) / math.sqrt(k), kind)
    dense = weight.dequantize(torch.float64)
    exact = x.double() @ dense.t() + bias.double() + residual.double()
    found = linear(x, weight, bias, residual=residual, backend=backend)
    assert found.dtype == dtype
    size = x.double().abs() @ dense.abs().t() + bias.double().abs() + residual.double().abs()
    float32 = 4 * torch.finfo(torch.float32).eps * size  # sums of a few float32 numbers, of any order
    rounding = torch.finfo(dtype).eps / 2 * exact.abs() * 1.01
    assert ((found.double() - exact).abs() <= bound(x, dense) + float32 + rounding).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("k", "largest"), [(64, 0.0065), (768, 0.0082), (3072, 0.0091)])
def test_the_rounding_of_gaussian_x_moves_the_result_as_little_as_stated(k, largest, kind, native):
    x, quantized = torch.randn(200, k), quantize_weight(torch.randn(300, k), kind)
    dense = x.double() @ quantized.dequantize(torch.float64).t()
    error = (linear(x, quantized, backend=native).double() - dense).norm() / dense.norm()
    assert largest / 2 < error < largest


@pytest.mark.parametrize("m", [1, 3, 16, 17, 48, 70])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sign", [-1, 1])
def test_sums_of_the_largest_integers_do_not_overflow(m, kind, sign, native):
    x, weight = torch.full((m, 3072), 0.5), quantize_weight(torch.full((50, 3072), -sign / 8), kind)
    found, expected = linear(x, weight, backend=native), x @ weight.dequantize().t()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("m, n", [(5, 64), (40, 64), (40, 33)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("wide", ["bias", "residual", "both"])
def test_a_bias_and_a_residual_in_float32_beside_16_bits(wide, dtype, m, n, kind, native):
    x, bias, residual = torch.randn(m, 96).to(dtype), torch.randn(n), torch.randn(m, n)
    bias, residual = bias.to(dtype) if wide == "residual" else bias, residual.to(dtype) if wide == "bias" else residual
    weight = quantize_weight(torch.randn(n, 96) / 10, kind)
    arguments = {"activation": "gelu", "residual": residual}
    found, expected = (linear(x, weight, bias, **arguments, backend=name) for name in (native, "reference"))
    assert found.dtype == residual.dtype
    rounding = torch.finfo(found.dtype).eps * 1.01
    torch.testing.assert_close(found, expected, rtol=rounding, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", list(reference.ACTIVATIONS))
def test_activations(activation, kind, backend):
    x, bias, residual = torch.randn(5, 96), torch.randn(50), torch.randn(5, 50)
    weight = quantize_weight(torch.randn(50, 96), kind)
    arguments = {"activation": activation, "residual": residual}
    expected = linear(rounded(x), weight.dequantize(), bias, **arguments, backend="reference")
    torch.testing.assert_close(linear(x, weight, bias, **arguments, backend=backend), expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(("kind", "largest"), [("int8", 0.0080), ("int4", 0.0825)])
def test_a_gaussian_weight_loses_as_little_as_stated(kind, largest):
    weight = torch.randn(512, 768) * 0.02
    error = (quantize_weight(weight, kind).dequantize() - weight).norm() / weight.norm()
    assert error < largest


def test_int4_is_better_than_a_scale_from_the_largest_weight():
    """That is q4_0 of llama.cpp."""
    weight = torch.randn(256, 256)
    groups = weight.view(256, -1, 32)
    scale = groups.gather(2, groups.abs().argmax(2, keepdim=True)) / -8
    plain = (groups / scale).round().clamp(-8, 7) * scale
    error = (quantize_weight(weight, "int4").dequantize() - weight).view_as(groups).square().sum(2)
    assert error.sum() < 0.92 * (plain - groups).square().sum()


@pytest.mark.parametrize("kind", KINDS)
def test_dequantized_values_are_levels_times_a_scale(kind):
    weight = torch.randn(35, 77)
    dense, step = quantize_weight(weight, kind).dequantize(), 127 if kind == "int8" else 8
    assert dense.shape == weight.shape
    largest = weight.abs().amax(1, keepdim=True)
    assert ((dense - weight).abs() <= largest / step * (0.51 if kind == "int8" else 1.2)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_and_outliers(kind, backend):
    weight = torch.randn(20, 64)
    weight[3] = 0
    weight[4, :32] = 0
    weight[5, 7] = 1e4
    quantized = quantize_weight(weight, kind)
    dense = quantized.dequantize()
    assert (dense[3] == 0).all() and (dense[4, :32] == 0).all()
    assert dense[5, 7] == pytest.approx(1e4, rel=0.1)
    x = torch.zeros(2, 64)
    x[1, 5] = 1e-30
    found = linear(x, quantized, backend=backend)
    assert (found[0] == 0).all()
    torch.testing.assert_close(found[1], x[1] @ dense.t(), rtol=1e-4, atol=1e-38)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_that_is_not_finite_gives_nan_and_leaves_the_others(kind, native):
    x, weight = torch.randn(4, 64), quantize_weight(torch.randn(20, 64), kind)
    expected = linear(x, weight, backend=native)
    x[1, 3], x[2, 63] = float("nan"), float("-inf")
    found = linear(x, weight, backend=native)
    assert found[1:3].isnan().all() and torch.equal(found[::3], expected[::3])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_has_the_same_bits_in_every_batch_and_for_every_number_of_threads(kind, dtype, native):
    x, weight = torch.randn(131, 700).to(dtype), quantize_weight(torch.randn(301, 700), kind)
    together = linear(x, weight, backend=native)
    for first, last in ((0, 1), (3, 5), (2, 9), (0, 16), (1, 18), (5, 38), (60, 131)):
        assert torch.equal(linear(x[first:last], weight, backend=native), together[first:last])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(linear(x, weight, backend=native), together)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("m", [1, 6, 40])
def test_int8_has_the_bits_of_its_definition_on_every_instruction_set(m, native):
    x, weight = torch.randn(m, 200), quantize_weight(torch.randn(50, 200), "int8")
    factor, scales = x.new_full((), LARGEST) / x.abs().amax(1, keepdim=True), weight.scales.flatten()[:50]
    sums = (x * factor).round().double() @ (weight.dequantize() / scales[:, None]).round().double().t()
    assert torch.equal(linear(x, weight, backend=native), sums.float() * (x.new_ones(()) / factor) * scales)


@pytest.mark.parametrize("kind", KINDS)
def test_any_shape_of_x_and_strides(kind, backend):
    weight = quantize_weight(torch.randn(64, 50).t(), kind)
    assert weight.shape == (50, 64)
    x = torch.randn(64, 3, 2).permute(2, 1, 0)
    residual = torch.randn(50, 3, 2).permute(2, 1, 0)
    found = linear(x, weight, residual=residual, backend=backend)
    assert found.shape == (2, 3, 50)
    flat = linear(x.reshape(6, 64), weight, residual=residual.reshape(6, 50), backend=backend)
    assert torch.equal(found.view(6, 50), flat)
    assert linear(x[0, 0], weight, backend=backend).shape == (50,)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(0, 5, 7), (3, 0, 7), (3, 5, 0)], ids=str)
def test_empty_sizes(shape, kind, backend):
    m, n, k = shape
    bias = torch.randn(n)
    found = linear(torch.randn(m, k), quantize_weight(torch.randn(n, k), kind), bias, backend=backend)
    assert found.shape == (m, n)
    if k == 0:
        assert torch.equal(found, bias.expand(m, n))


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_made_again_of_its_tensors(kind):
    weight = quantize_weight(torch.randn(40, 70), kind)
    again = QuantizedWeight(weight.data.clone(), weight.scales.clone(), (40, 70), kind)
    assert torch.equal(again.dequantize(torch.bfloat16), weight.dequantize(torch.bfloat16))
    assert repr(again) == f"QuantizedWeight(shape=(40, 70), dtype_name='{kind}', nbytes={weight.nbytes})"
    assert weight.nbytes == {"int8": 48 * 96 + 48 * 4, "int4": 48 * 96 // 2 + 48 * 3 * 2}[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_op_check(kind, native):
    weight = quantize_weight(torch.randn(20, 40), kind)
    arguments = (torch.randn(3, 40), weight.data, weight.scales, 20, weight.bits, torch.randn(20), torch.randn(3, 20))
    torch.library.opcheck(torch.ops.lmkernels.quantized_linear_fwd.default, (*arguments, 1))


@pytest.mark.parametrize("kind", KINDS)
def test_torch_compile(kind, native):
    weight, bias = quantize_weight(torch.randn(20, 40), kind), torch.randn(20)

    def function(x):
        return linear(x, weight, bias, activation="gelu", backend=native) * 2

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for m in (3, 21):
            x = torch.randn(m, 40)
            assert torch.equal(compiled(x), function(x))


@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind, native):
    x, weight = torch.randn(3, 40), quantize_weight(torch.randn(20, 40), kind)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        found = linear(x, weight)
    assert torch.equal(found, linear(x.bfloat16(), weight))


def test_bad_arguments():
    weight, x = torch.randn(8, 16), torch.randn(2, 16)
    quantized = quantize_weight(weight, "int4")
    with pytest.raises(ValueError, match="dtype must be one of 'int8', 'int4', got 'int3'"):
        quantize_weight(weight, "int3")
    with pytest.raises(ValueError, match=r"weight must be \(out, in\), got \(8,\)"):
        quantize_weight(weight[:, 0], "int8")
    with pytest.raises(TypeError, match="weight must be float32"):
        quantize_weight(weight.int(), "int8")
    with pytest.raises(ValueError, match="weight must be finite"):
        quantize_weight(weight / 0, "int8")
    with pytest.raises(ValueError, match=r"weight must be \(out, in\) = \(out, 15\), got \(8, 16\)"):
        linear(x[:, :15], quantized)
    with pytest.raises(ValueError, match=r"bias must be \(out,\) = \(8,\)"):
        linear(x, quantized, torch.randn(9))
    with pytest.raises(ValueError, match="weight must be a tensor where a gradient is wanted, got int4"):
        linear(x.requires_grad_(), quantized)
    with torch.no_grad():
        linear(x, quantized)
    with pytest.raises(ValueError, match=r"data of an int4 weight \(8, 17\)"):
        QuantizedWeight(quantized.data[:, :0], quantized.scales, (8, 17), "int4")
    with pytest.raises(ValueError, match="backend must be one of"):
        linear(x.detach(), quantized, backend="other")


def test_float64_runs_on_the_reference(native):
    x, weight = torch.randn(2, 16).double(), quantize_weight(torch.randn(8, 16), "int8")
    torch.testing.assert_close(linear(x, weight), rounded(x) @ weight.dequantize(torch.float64).t())
    with pytest.raises(NotImplementedError, match="float64"):
        linear(x, weight, backend=native)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_those_of_the_weight(kind):
    weight = quantize_weight(torch.randn(37, 50), kind)
    index = torch.tensor([0, 36, 17, 5, 17], dtype=torch.int32)
    assert torch.equal(weight.rows(index), weight.dequantize()[index.long()])
    assert torch.equal(weight.rows(index, torch.bfloat16), weight.dequantize(torch.bfloat16)[index.long()])


@pytest.mark.parametrize("kind", KINDS)
def test_empty_makes_the_tensors_of_a_weight(kind):
    weight, shell = quantize_weight(torch.randn(37, 50), kind), QuantizedWeight.empty((37, 50), kind, device="meta")
    assert shell.data.is_meta and (shell.shape, shell.nbytes) == (weight.shape, weight.nbytes)


CALLS = {
    "mlp": ((96, 64), (64, 96), lambda x, a, b: lmk.mlp(x, a, torch.ones(96), b, torch.ones(64), residual=x)),
    "swiglu_mlp": ((96, 64), (96, 64), (64, 96), lambda x, a, b, c: lmk.swiglu_mlp(x, a, b, c, residual=x)),
    "output_projection": ((64, 64), lambda x, w: lmk.output_projection(x.unflatten(-1, (4, 16)), w, residual=x)),
    "qkv_projection": (
        (128, 64),
        lambda x, w: torch.cat(
            lmk.qkv_projection(
                x,
                w,
                torch.arange(128.0) / 128,
                num_heads=4,
                num_kv_heads=2,
                cos=lmk.rotary_tables(9, 8)[0],
                sin=lmk.rotary_tables(9, 8)[1],
                positions=torch.tensor([[1, 2, 8]]),
            ),
            2,
        ),
    ),
    "linear_cross_entropy": (
        (40, 64),
        lambda x, w: lmk.linear_cross_entropy(x, w, torch.tensor([[1, -100, 39]] * 2), reduction="none"),
    ),
    "embed": (
        (40, 64),
        lambda x, w: lmk.embed(torch.tensor([[3, 39, 3]]), w, position_table=torch.ones(3, 64), type_table=x[0, :2]),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("op", CALLS)
@torch.no_grad()
def test_ops_take_quantised_weights_where_they_take_weights(op, kind):
    *shapes, call = CALLS[op]
    weights = [quantize_weight(torch.randn(shape) / 8, kind) for shape in shapes]
    x = torch.randn(2, 3, 64)
    expected = call(x, *(w.dequantize() for w in weights))
    assert (call(x, *weights) - expected).norm() < 0.015 * expected.norm()  # by the rounding of x


def test_a_token_beyond_a_quantised_table_is_a_named_error():
    with pytest.raises(ValueError, match="token_ids must lie between 0 and 39, got values from 1 to 40"):
        lmk.embed(torch.tensor([1, 40]), quantize_weight(torch.randn(40, 64), "int8"))
