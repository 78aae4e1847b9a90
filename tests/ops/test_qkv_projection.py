"""qkv_projection and output_projection: as accurate as plain torch, rotated or not, any heads, any positions."""

from __future__ import annotations

import pytest
import torch

from lmkernels import attention, linear, output_projection, qkv_projection
from lmkernels.testing import cases, numerics

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
INTERPRETED = r"^(?!.*(compile|-float16|-float64)).*triton"
ON_EVERY_ISA = r"plain_torch.*native"


def short(dtype) -> str:
    return str(dtype).removeprefix("torch.")


def plain_qkv(x, weight, bias, *, num_heads, num_kv_heads=None, cos=None, sin=None, interleaved=False, positions=None):
    """As a careful user writes it in eager torch: the product rounded only after the rotation, as a fused one does."""
    acc = torch.promote_types(x.dtype, torch.float32)
    h_kv = num_kv_heads or num_heads
    y = (x.to(acc) @ weight.to(acc).t() + bias.to(acc)).unflatten(-1, (num_heads + 2 * h_kv, -1))
    # the gradient of the product is an operand of the matmuls for dx and dweight
    y.register_hook(lambda dy: dy.to(x.dtype).to(acc))
    q, k, v = y.split((num_heads, h_kv, h_kv), 2)
    if cos is not None:
        index = torch.arange(x.shape[1]) if positions is None else positions
        c, s = (table.to(acc)[index].unsqueeze(-2) for table in (cos, sin))  # ([b,] s, 1, rotated / 2)
        half = cos.shape[1]

        def rotate(z):
            turning, rest = z[..., : 2 * half], z[..., 2 * half :]
            a, b = (turning[..., ::2], turning[..., 1::2]) if interleaved else turning.chunk(2, -1)
            turned = (a * c - b * s, b * c + a * s)
            turned = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
            return torch.cat((turned, rest), -1)

        q, k = rotate(q), rotate(k)
    return q.to(x.dtype), k.to(x.dtype), v.to(x.dtype)


def reference(*arguments, **options):
    return qkv_projection(*arguments, **options | {"backend": "reference"})


def check(case, dtype, backend):
    inputs, options = case.make(dtype)

    def plain(x, weight, bias, backend=None, **options):
        return plain_qkv(x, weight, bias, **options)

    numerics.assert_op_as_accurate(
        qkv_projection, reference, plain, inputs, inputs, dtype=dtype, backend=backend, **options
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("case", cases.QKV, ids=str)
def test_results_and_gradients_are_as_accurate_as_plain_torch(case, dtype, backend):
    check(case, dtype, backend)


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_factors_are_rounded_only_as_far_as_torchs_precision_says(precision, matmul_precision, native):
    matmul_precision(precision)
    for case in cases.QKV:
        check(case, torch.float32, native)


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_without_rotation_it_is_linear_bit_for_bit(precision, matmul_precision, native):
    matmul_precision(precision)
    inputs, _ = cases.QKVCase("plain", 2, 40, 96, 4, 2, 24).make(torch.float32)
    whole = linear(**inputs, backend=native).view(2, 40, 8, 24)
    q, k, v = qkv_projection(**inputs, num_heads=4, num_kv_heads=2, backend=native)
    assert torch.equal(q, whole[:, :, :4]) and torch.equal(k, whole[:, :, 4:6]) and torch.equal(v, whole[:, :, 6:])


def test_a_transposed_weight_gets_a_gradient_in_its_layout(backend):
    """GPT-2's checkpoints hold (d_model, 3 d_model)."""
    inputs, _ = cases.QKVCase("conv1d", 2, 10, 24, 3, 3, 8).make(torch.float32)
    stored = inputs["weight"].t().contiguous().requires_grad_()
    q, k, v = qkv_projection(inputs["x"], stored.t(), inputs["bias"], num_heads=3, backend=backend)
    (q.square().sum() + k.sum() + v.sum()).backward()
    weight = inputs["weight"].clone().requires_grad_()
    q, k, v = qkv_projection(inputs["x"], weight, inputs["bias"], num_heads=3, backend=backend)
    (q.square().sum() + k.sum() + v.sum()).backward()
    torch.testing.assert_close(stored.grad.t(), weight.grad)
    assert stored.grad.is_contiguous()


def test_positions_read_the_tables(backend):
    inputs, options = cases.QKVCase("positions", 2, 9, 32, 2, 1, 16, rotated=16).make(torch.float32)
    q, k, v = qkv_projection(**inputs, **options, backend=backend)
    moved = {name: options[name].roll(5, 0) for name in ("cos", "sin")}
    positions = (torch.arange(9) + 5).expand(2, 9)
    for index in (positions, positions[0], positions.int()):
        again = qkv_projection(**inputs, **options | moved, positions=index, backend=backend)
        assert all(torch.equal(a, b) for a, b in zip(again, (q, k, v)))


@pytest.mark.parametrize("interleaved", [False, True])
def test_gradients_agree_with_finite_differences(interleaved, backend):
    inputs, options = cases.QKVCase("tiny", 2, 3, 5, 2, 1, 6, rotated=4, interleaved=interleaved).make(torch.float64)
    leaves = [x.requires_grad_() for x in inputs.values()]

    def function(*leaves):
        return qkv_projection(*leaves, **options, backend=backend)

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_ops_pass_opcheck(native):
    inputs, options = cases.QKVCase("opcheck", 2, 3, 10, 2, 1, 6, rotated=4).make(torch.float32)
    x, weight, bias = inputs["x"].flatten(0, 1), inputs["weight"], inputs["bias"]
    tables = (options["cos"], options["sin"], torch.arange(6), 3, 2, 1, True)
    torch.library.opcheck(torch.ops.lmkernels.qkv_projection_fwd.default, (x, weight, bias, *tables))
    heads = torch.ops.lmkernels.qkv_projection_fwd(x, weight, bias, *tables)
    torch.library.opcheck(
        torch.ops.lmkernels.qkv_projection_bwd.default, (*heads, x, weight, *tables, True, True, True)
    )


def test_an_attention_layer_compiles_without_a_graph_break_for_any_length(native):
    torch.compiler.reset()

    def layer(x, weight, bias, w_out, **options):
        q, k, v = qkv_projection(x, weight, bias, backend=native, **options)
        return output_projection(attention(q, k, v, causal=True), w_out, residual=x, backend=native)

    compiled = torch.compile(layer, fullgraph=True, dynamic=True)

    def run(s):
        inputs, options = cases.QKVCase("layer", 2, s, 32, 2, 1, 16, rotated=8).make(torch.float32)
        inputs["w_out"] = torch.randn(32, 32) / 6
        actual = numerics.results(compiled, inputs, inputs, **options)
        for name, expected in numerics.results(layer, inputs, inputs, **options).items():
            torch.testing.assert_close(actual[name], expected, rtol=1e-5, atol=1e-5)

    run(20)
    with torch.compiler.set_stance("fail_on_recompile"):
        run(33)
    torch.compiler.reset()


def test_output_projection_is_linear_of_the_heads_side_by_side(backend):
    attn, weight, bias, residual = torch.randn(2, 7, 3, 8), torch.randn(10, 24), torch.randn(10), torch.randn(2, 7, 10)
    expected = linear(attn.reshape(2, 7, 24), weight, bias, residual=residual, backend=backend)
    assert torch.equal(output_projection(attn, weight, bias, residual=residual, backend=backend), expected)
    packed = output_projection(attn[0], weight, backend=backend)
    assert packed.shape == (7, 10)
    with pytest.raises(ValueError, match="attn must be"):
        output_projection(attn[0, 0], weight)


x, w = torch.randn(2, 5, 12), torch.randn(24, 12)
tables = {"cos": torch.ones(5, 4), "sin": torch.ones(5, 4)}
BAD = {
    "x of 2 axes": ((x[0], w), {}, ValueError, "x must be (b, s, d_model) with 3 axes, got (5, 12)"),
    "no heads": ((x, w), {"num_heads": 0}, ValueError, "num_heads must be a positive integer, got 0"),
    "heads that do not divide": ((x, w), {"num_heads": 3, "num_kv_heads": 2}, ValueError, "multiple of num_kv_heads"),
    "rows that are no heads": ((x, w), {"num_heads": 5}, ValueError, "weight must have (h + 2 h_kv) d rows"),
    "cos alone": ((x, w), {"cos": tables["cos"]}, ValueError, "cos and sin come together, got cos alone"),
    "tables too wide": ((x, w), {"cos": torch.ones(5, 5), "sin": torch.ones(5, 5)}, ValueError, "cos must be"),
    "tables too short": (
        (torch.randn(2, 6, 12), w),
        tables,
        ValueError,
        "cos and sin must cover 6 positions, got 5",
    ),
    "a table with a gradient": (
        (x, w),
        tables | {"cos": torch.ones(5, 4).requires_grad_()},
        ValueError,
        "cos must not require a gradient",
    ),
    "positions without tables": ((x, w), {"positions": torch.arange(5)}, ValueError, "positions say where"),
    "positions beyond": (
        (x, w),
        tables | {"positions": torch.arange(5) + 1},
        ValueError,
        "positions must lie in [0, 5)",
    ),
    "positions as floats": ((x, w), tables | {"positions": torch.ones(5)}, TypeError, "positions must be an int32 or"),
    "positions of another length": (
        (x, w),
        tables | {"positions": torch.arange(4)},
        ValueError,
        "positions must be (s,)",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_argument_is_named(name):
    arguments, options, error, message = BAD[name]
    with pytest.raises(error) as caught:
        qkv_projection(*arguments, **{"num_heads": 1} | options)
    assert message in str(caught.value)
