"""encoder_layers: the bits of the ops called one by one, as accurate as plain torch, and errors with names."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lmkernels import attention, attention_varlen, layer_norm, linear, quantize_weight
from lmkernels.ops.encoder_layers import encoder_layers
from lmkernels.ops.encoder_layers.autograd import Layer
from lmkernels.testing import numerics

ON_EVERY_ISA = r"(one_by_one|accurate).*native|composed"
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
HEADS = 3
LENGTHS = [(40, 40), (1,), (9, 0, 60, 1)]  # of sequences; packed where they differ


def layers(n: int, dtype: torch.dtype, d_model: int = 48, d_ff: int = 100, quantized: str | None = None) -> list:
    shapes = [(d_model, d_model)] * 4 + [(d_model,), (d_ff, d_model), (d_model, d_ff), (d_model,)]
    parameters = []
    for shape in shapes * n:
        weight = torch.randn(shape) * (shape[1] ** -0.5 if len(shape) == 2 else 1.0)
        if quantized and len(shape) == 2:
            parameters.append(quantize_weight(weight, quantized))
        else:
            parameters.append(weight.to(dtype))
        parameters.append((0.1 * torch.randn(shape[0])).to(dtype))
    return parameters


def tokens(lengths: tuple[int, ...], dtype: torch.dtype, d_model: int = 48) -> tuple[Tensor, dict]:
    """x, (b, s, d_model) of sequences of one length, else packed; and what says where they lie."""
    if len(set(lengths)) == 1:
        return torch.randn(len(lengths), lengths[0], d_model).to(dtype), {}
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    return torch.randn(sum(lengths), d_model).to(dtype), {"cu_seqlens": bounds, "max_seqlen": max(lengths)}


def one_by_one(x: Tensor, parameters: list, eps: float, activation: str, bounds: dict, backend: str) -> Tensor:
    pairs = list(zip(parameters[::2], parameters[1::2], strict=True))
    for first in range(0, len(pairs), 8):
        query, key, value, output, norm1, up, down, norm2 = pairs[first : first + 8]
        q, k, v = (linear(x, *part, backend=backend).unflatten(-1, (HEADS, -1)) for part in (query, key, value))
        if bounds:
            starts, most = bounds["cu_seqlens"], bounds["max_seqlen"]
            out = attention_varlen(q, k, v, starts, starts, most, most, backend=backend)
        else:
            out = attention(q, k, v, backend=backend)
        x = layer_norm(linear(out.flatten(-2), *output, residual=x, backend=backend), *norm1, eps, backend=backend)
        hidden = linear(x, *up, activation=activation, backend=backend)
        x = layer_norm(linear(hidden, *down, residual=x, backend=backend), *norm2, eps, backend=backend)
    return x


def plain(x: Tensor, parameters: list, eps: float, bounds: dict) -> Tensor:
    """What one writes in torch, with gelu, sequence by sequence."""
    if bounds:
        starts = bounds["cu_seqlens"].tolist()
        parts = [x[first:last] for first, last in zip(starts, starts[1:]) if last > first]
        return torch.cat([plain(part[None], parameters, eps, {})[0] for part in parts])
    pairs = list(zip(parameters[::2], parameters[1::2], strict=True))
    for first in range(0, len(pairs), 8):
        query, key, value, output, norm1, up, down, norm2 = pairs[first : first + 8]
        q, k, v = (F.linear(x, *part).unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)
        x = F.layer_norm(x + F.linear(out, *output), norm1[0].shape, *norm1, eps)
        x = F.layer_norm(x + F.linear(F.gelu(F.linear(x, *up)), *down), norm2[0].shape, *norm2, eps)
    return x


@pytest.mark.parametrize("quantized", [None, "int8", "int4"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gives_the_bits_of_the_ops_one_by_one(dtype, lengths, quantized, backend):
    if quantized and dtype == torch.float64:
        pytest.skip("quantised weights take no float64 in the library")
    parameters = layers(2, dtype, quantized=quantized)
    x, bounds = tokens(lengths, dtype)
    with torch.no_grad():
        actual = encoder_layers(x, parameters, HEADS, activation="silu", eps=1e-5, backend=backend, **bounds)
        expected = one_by_one(x, parameters, 1e-5, "silu", bounds, backend)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


# 33 to 64 tokens go another way than in linear
@pytest.mark.parametrize("lengths", [*LENGTHS, (9, 0, 33, 1), (64,)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_is_as_accurate_as_plain_torch(dtype, lengths, backend):
    parameters = layers(2, dtype)
    x, bounds = tokens(lengths, dtype)
    golden = plain(x.double(), [p.double() for p in parameters], 1e-5, bounds)
    actual = encoder_layers(x, parameters, HEADS, eps=1e-5, backend=backend, **bounds)
    # an error in a layer reaches the whole row through its norm
    numerics.assert_as_accurate(actual, golden, plain(x, parameters, 1e-5, bounds), samples=sum(lengths), products=12)


def test_threads_change_no_bit(native):
    parameters = layers(1, torch.float32, d_model=96, d_ff=384)
    x, bounds = tokens((70, 3, 128), torch.float32, d_model=96)
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            results.append(encoder_layers(x, parameters, HEADS, **bounds))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_parameters_may_be_float32_beside_16_bits(dtype, native):
    parameters = layers(1, torch.float32)
    x, _ = tokens((5, 5), dtype)
    expected = one_by_one(x, parameters, 1e-12, "gelu", {}, "native")
    torch.testing.assert_close(encoder_layers(x, parameters, HEADS), expected, rtol=0, atol=0)


def test_strides_and_no_layers(native):
    x = torch.randn(48, 4, 6).permute(2, 1, 0)
    parameters = layers(1, torch.float32)
    parameters[0] = torch.randn(48, 48).t()
    parameters[2] = torch.randn(48, 96)[:, ::2]  # neither axis contiguous
    torch.testing.assert_close(
        encoder_layers(x, parameters, HEADS), encoder_layers(x.contiguous(), parameters, HEADS), rtol=0, atol=0
    )
    expected = one_by_one(x, parameters, 1e-12, "gelu", {}, "native")
    torch.testing.assert_close(encoder_layers(x, parameters, HEADS), expected, rtol=0, atol=0)
    assert torch.equal(encoder_layers(x, [], HEADS), x)
    assert encoder_layers(x[:0], parameters, HEADS).shape == (0, 4, 48)


def trained(lengths: tuple[int, ...], **chances: float) -> Layer:
    """For x (t, d_model) of such sequences, with silu."""
    if len(set(lengths)) == 1:
        return Layer(HEADS, "silu", 1e-5, batch=len(lengths), **chances)
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    return Layer(HEADS, "silu", 1e-5, cu_seqlens=starts, max_seqlen=max(lengths), **chances)


@pytest.mark.parametrize("chances", [{}, {"attention_p": 0.2, "p": 0.3}], ids=["kept", "dropped"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize(
    ("dtype", "narrow"),
    [*((dtype, None) for dtype in DTYPES), (torch.float32, torch.bfloat16), (torch.float32, torch.float16)],
    ids=str,
)
def test_a_layer_in_training_is_what_it_is_composed_of(dtype, narrow, lengths, chances, native):
    parameters = [p.requires_grad_() for p in layers(1, dtype)]
    x = torch.randn(sum(lengths), 48).to(dtype).requires_grad_()
    layer, dy = trained(lengths, **chances), torch.randn(sum(lengths), 48).to(dtype)
    with torch.autocast("cpu", narrow or torch.bfloat16, enabled=narrow is not None):
        y = layer(x, parameters)
    chance = y.grad_fn.chance
    expected = layer.composed(chance, x, *parameters)
    torch.testing.assert_close(y, expected, rtol=0, atol=0)
    actual = torch.autograd.grad(y, [x, *parameters], dy)
    product = chance[-1]
    tolerance = 8 * max(torch.finfo(product).eps, torch.finfo(dtype).eps)
    for i, (mine, theirs) in enumerate(zip(actual, torch.autograd.grad(expected, [x, *parameters], dy), strict=True)):
        assert mine.dtype == theirs.dtype and mine.shape == theirs.shape
        if i != 4:  # of the keys' bias it is zero but for rounding
            assert (mine - theirs).norm() <= tolerance * theirs.norm() + 1e-6, i
    alone = torch.autograd.grad(layer(x, parameters), x, dy)[0]
    assert alone.shape == x.shape and (chances or torch.equal(alone, actual[0]) or narrow)


@pytest.mark.parametrize("lengths", [(3, 3), (2, 4)], ids=str)
def test_a_layers_gradients_pass_gradcheck(lengths, native):
    parameters = [p.requires_grad_() for p in layers(1, torch.float64, d_model=6, d_ff=5)]
    x = torch.randn(sum(lengths), 6, dtype=torch.float64, requires_grad=True)
    layer = trained(lengths, attention_p=0.2, p=0.3)

    def seeded(x, *parameters):
        with torch.random.fork_rng():
            torch.manual_seed(5)
            return layer(x, parameters)

    torch.autograd.gradcheck(seeded, (x, *parameters))
    torch.autograd.gradgradcheck(seeded, (x, *parameters), atol=1e-4)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("code", [0, 1])
def test_the_ops_of_training_pass_opcheck(code, packed, native):
    parameters, x = layers(1, torch.float32), torch.randn(12, 48)
    starts = torch.tensor([0, 5, 12]).int() if packed else None
    numbers = (starts, 2, 7, HEADS, 0.25, 3)
    drops = (torch.tensor(7), 0.1, 6000, 8, 9)
    arguments = (x, parameters, *numbers, 1e-5, *drops, code)
    torch.library.opcheck(torch.ops.lmkernels.encoder_layer_fwd.default, arguments)
    _, *saved = torch.ops.lmkernels.encoder_layer_fwd(*arguments)
    y1 = saved.pop(8)
    saved = saved if code else [*saved, x, y1]
    for needed in (False, True):
        torch.library.opcheck(
            torch.ops.lmkernels.encoder_layer_bwd.default,
            (torch.randn(12, 48), saved, parameters, *numbers, *drops, needed),
        )


@pytest.mark.parametrize("packed", [False, True])
def test_the_op_passes_opcheck_and_compiles(packed, native):
    parameters = layers(1, torch.float32)
    x, bounds = tokens((4, 7) if packed else (6, 6), torch.float32)
    starts = bounds["cu_seqlens"].int() if packed else None
    arguments = (x, parameters, starts, 7, HEADS, 0.25, 1, 1e-5)
    torch.library.opcheck(torch.ops.lmkernels.encoder_layers.default, arguments)
    with torch.no_grad():
        compiled = torch.compile(lambda x: encoder_layers(x, parameters, HEADS, **bounds), fullgraph=True)
        torch.testing.assert_close(compiled(x), encoder_layers(x, parameters, HEADS, **bounds))


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"x": torch.randn(4, 48)}, r"x must be \(b, s, d_model\), got \(4, 48\)"),
        ({"x": torch.randn(2, 4, 48).int()}, "x must be float32, bfloat16, float16 or float64, got torch.int32"),
        ({"x": torch.randn(2, 4, 32)}, "heads must divide d_model = 32, got 3"),
        ({"x": torch.randn(2, 4, 24)}, r"weight of query of layer 0 must be \(out, in\) = \(24, 24\), got \(48, 48\)"),
        ({"x": torch.randn(2, 4, 48).double()}, "weight of query of layer 0 must be torch.float64, got torch.float32"),
        ({"heads": 0}, "heads must divide d_model = 48, got 0"),
        ({"activation": "gelo"}, "activation must be one of .*, got 'gelo'"),
        ({"eps": -1.0}, "eps must be at least 0, got -1.0"),
        ({"parameters": slice(0, 15)}, "parameters must be 16 for each layer, got 15"),
        ({"parameters": (6, torch.randn(40, 48))}, r"weight of output of layer 0 must be .*\(48, 48\), got \(40, 48\)"),
        ({"parameters": (10, torch.randn(100, 47))}, r"weight of up of layer 0 must be .*, got \(100, 47\)"),
        ({"parameters": (13, torch.randn(47))}, r"bias of down of layer 0 must be .*, got \(47,\)"),
        ({"parameters": (14, torch.randn(47))}, r"weight of norm2 of layer 0 must be \(48,\), got \(47,\)"),
        ({"parameters": (1, None)}, "bias of query of layer 0 must be a torch.Tensor, got None"),
        ({"cu_seqlens": torch.tensor([0, 4])}, r"x must be \(t, d_model\) with cu_seqlens, got \(2, 4, 48\)"),
        ({"cu_seqlens": torch.tensor([0.0, 4.0]), "x": torch.randn(4, 48)}, "cu_seqlens must be int32 or int64"),
        ({"x": torch.randn(2, 4, 48, requires_grad=True)}, "encoder_layers has no gradient"),
    ],
)
def test_bad_input(change, error, backend):
    arguments = {"x": torch.randn(2, 4, 48), "parameters": layers(1, torch.float32), "heads": HEADS}
    match change.get("parameters"):
        case slice() as part:
            change = {"parameters": arguments["parameters"][part]}
        case (place, parameter):
            arguments["parameters"][place] = parameter
            change = {}
    with pytest.raises((ValueError, TypeError), match=error):
        encoder_layers(**arguments | change, backend=backend)


def test_unknown_and_impossible_backends(native):
    x, parameters = torch.randn(1, 2, 600), layers(1, torch.float32, d_model=600)
    with pytest.raises(NotImplementedError, match="head sizes go up to 256, got 300"):
        encoder_layers(x, parameters, 2, backend="native")
    assert encoder_layers(x, parameters, 2).shape == x.shape  # by the reference
    with pytest.raises(ValueError, match="backend must be one of native, reference or None"):
        encoder_layers(x, parameters, 2, backend="triton")
