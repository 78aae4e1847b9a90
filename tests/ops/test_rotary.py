"""rotary and rotary_tables: accuracy, gradients, layouts, the contract with torch, agreement with transformers."""

from __future__ import annotations

import re

import pytest
import torch

from lmkernels import rotary, rotary_tables
from lmkernels.ops.rotary import reference
from lmkernels.testing import cases, numerics

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
INTERPRETED = r"^(?!.*(compiled|tasks|-float16|-float64)).*triton"
ON_EVERY_ISA = r"(?=.*native).*(accurate|gradcheck|beyond)"
CASE = {case.name: case for case in cases.ROTARY}


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def definition(x, cos, sin, interleaved=False, positions=None):
    return reference.forward(x, cos, sin, positions, interleaved)


def as_hugging_face_writes_it(x, cos, sin, interleaved=False, positions=None):
    """transformers' apply_rotary_pos_emb (Llama and GPT-J), in x's dtype; the rest of a row passes through."""
    cos, sin = (table if positions is None else table[positions] for table in (cos, sin))
    cos, sin = (table[..., : x.shape[-3], :].to(x.dtype)[..., None, :] for table in (cos, sin))
    d_rot = 2 * cos.shape[-1]
    rotated, rest = x[..., :d_rot], x[..., d_rot:]
    if interleaved:
        cos, sin = cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1)
        turned = torch.stack((-rotated[..., 1::2], rotated[..., ::2]), -1).flatten(-2)
    else:
        cos, sin = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
        turned = torch.cat((-rotated[..., d_rot // 2 :], rotated[..., : d_rot // 2]), -1)
    return torch.cat((rotated * cos + turned * sin, rest), -1)


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("case", cases.ROTARY, ids=str)
def test_results_and_gradients_are_as_accurate_as_plain_torch(case, dtype, backend):
    tensors, options = case.make(dtype)

    def function(x, cos, sin, **options):
        out = rotary(x, cos, sin, backend=backend, **options)
        assert out.dtype == x.dtype and out.is_contiguous()
        return out

    numerics.assert_op_as_accurate(
        function, definition, as_hugging_face_writes_it, tensors, ["x"], dtype=dtype, **options
    )


def test_a_rotation_is_one_of_complex_numbers(backend):
    """The paper's definition, without the library's reference."""
    x, angles = torch.randn(2, 7, 3, 10, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)
    out = rotary(x, angles.cos(), angles.sin(), interleaved=True, backend=backend)
    turned = torch.view_as_complex(x.unflatten(-1, (5, 2))) * torch.polar(torch.ones_like(angles), angles)[:, None]
    torch.testing.assert_close(out, torch.view_as_real(turned).flatten(-2))
    columns = torch.arange(10).view(5, 2).t().flatten()  # (0, 2, 4, ..., 1, 3, 5, ...)
    halves = rotary(x[..., columns], angles.cos(), angles.sin(), backend=backend)
    torch.testing.assert_close(halves, out[..., columns])


@pytest.mark.parametrize("interleaved", [False, True])
def test_gradcheck_to_the_second_order(interleaved, backend):
    x = torch.randn(2, 3, 2, 7, dtype=torch.float64, requires_grad=True)
    angles = torch.randn(5, 3, dtype=torch.float64)
    positions = torch.tensor([[0, 4, 1], [2, 2, 3]])

    def function(x):
        return rotary(x, angles.cos(), angles.sin(), interleaved=interleaved, positions=positions, backend=backend)

    torch.autograd.gradcheck(function, x)
    torch.autograd.gradgradcheck(function, x)


def test_tables_that_want_a_gradient_go_to_the_reference(native):
    x, angles = torch.randn(2, 3, 2, 8, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64, requires_grad=True)

    def function(angles):
        return rotary(x, angles.cos(), angles.sin())

    torch.autograd.gradcheck(function, angles)
    with pytest.raises(NotImplementedError, match="no gradient of cos and sin"):
        rotary(x, angles.cos(), angles.sin(), backend=native)


def test_float64_takes_the_float32_tables_of_rotary_tables(backend):
    x = torch.randn(1, 5, 2, 8, dtype=torch.float64)
    cos, sin = rotary_tables(5, 8)
    expected = rotary(x, cos.double(), sin.double(), backend=backend)
    torch.testing.assert_close(rotary(x, cos, sin, backend=backend), expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=short)
def test_every_value_of_16_bits_passes_through_an_angle_of_zero(dtype, backend):
    """Subnormals too; NaN stays NaN."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    x = torch.where(x.isinf(), 1.0, x)  # infinity times 0 is NaN
    nan = x.isnan()
    out = rotary(
        torch.where(nan, 1.0, x).view(1, 1024, 1, 64), torch.ones(1024, 32), torch.zeros(1024, 32), backend=backend
    )
    assert torch.equal(out.flatten()[~nan], x[~nan])
    rows = x[nan][: nan.sum() // 64 * 64].view(1, -1, 1, 64)
    s = rows.shape[1]
    assert rotary(rows, torch.ones(s, 32), torch.zeros(s, 32), backend=backend).isnan().all()


@pytest.mark.parametrize("shape", [(0, 5, 2, 8), (2, 0, 2, 8), (2, 5, 0, 8), (0, 2, 8), (2, 5, 2, 0)], ids=str)
def test_empty_tensors(shape, backend):
    x = torch.randn(shape, requires_grad=True)
    cos = torch.randn(5, shape[-1] // 2)
    out = rotary(x, cos, cos, backend=backend)
    assert out.shape == x.shape
    out.sum().backward()
    assert x.grad.shape == x.shape


def test_results_depend_neither_on_threads_nor_on_the_batch(native):
    tensors, options = CASE["several tasks of tokens"].make(torch.float32)
    expected = rotary(**tensors, **options)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(rotary(**tensors, **options), expected)
    finally:
        torch.set_num_threads(threads)
    alone = rotary(tensors["x"][1:2], tensors["cos"], tensors["sin"], positions=options["positions"][1:2])
    assert torch.equal(alone, expected[1:2])


X, T = torch.randn(2, 5, 3, 8), torch.randn(5, 4)
BAD = {
    "x is a list": ((X.tolist(), T, T), {}, TypeError, "x must be a torch.Tensor, got list"),
    "x of integers": ((X.int(), T, T), {}, TypeError, "x must be float32, bfloat16, float16 or float64, got"),
    "x of two axes": ((X[0, 0], T, T), {}, ValueError, "x must be (b, s, h, d) or (t, h, d), got (3, 8)"),
    "cos of another dtype": ((X, T.half(), T), {}, TypeError, "cos must be torch.float32, got torch.float16"),
    "sin of another shape": ((X, T, T[:, 1:]), {}, ValueError, "sin must have cos's shape"),
    "tables of one axis": ((X, T[0], T[0]), {}, ValueError, "cos and sin must be (n, d_rot // 2)"),
    "tables too wide": (
        (X, torch.cat([T, T], 1), torch.cat([T, T], 1)),
        {},
        ValueError,
        "cos and sin must have at most d // 2 = 4 columns, got 8; of tables that hold each angle twice, pass the first",
    ),
    "tables too short": ((X, T[:4], T[:4]), {}, ValueError, "a row for each of the 5 positions, got 4"),
    "rows of other tokens": ((X, T[None, :4], T[None, :4]), {}, ValueError, "with (b, s) = (2, 5), got (1, 4, 4)"),
    "rows of tokens and positions": (
        (X, T[None], T[None]),
        {"positions": torch.arange(5)},
        ValueError,
        "positions must be None where",
    ),
    "packed with rows of tokens": (
        (X[0], T[None], T[None]),
        {},
        ValueError,
        "cos and sin must be (n, d_rot // 2), got",
    ),
    "float positions": ((X, T, T), {"positions": torch.rand(5)}, TypeError, "positions must be int32 or int64"),
    "positions of another length": (
        (X, T, T),
        {"positions": torch.arange(4)},
        ValueError,
        "positions must be (5,) or (1, 5) or (2, 5), got (4,)",
    ),
    "a position beyond the table": (
        (X, T, T),
        {"positions": torch.tensor([0, 1, 2, 5, 3])},
        ValueError,
        "positions must lie between 0 and 4, got values from 0 to 5",
    ),
    "a negative position": (
        (X, T, T),
        {"positions": torch.tensor([0, 1, 2, -1, 3], dtype=torch.int32)},
        ValueError,
        "positions must lie between 0 and 4, got values from -1 to 3",
    ),
    "an unknown backend": (
        (X, T, T),
        {"backend": "cuda"},
        ValueError,
        "must be one of native, triton, reference",
    ),
}


@pytest.mark.parametrize("arguments, options, error, message", BAD.values(), ids=BAD.keys())
def test_bad_input_is_named(arguments, options, error, message, backend):
    with pytest.raises(error, match=re.escape(message)):
        rotary(*arguments, **{"backend": backend} | options)


@pytest.mark.parametrize("name", ["padded, head size 80", "packed, positions", "rows of the tokens"])
@pytest.mark.parametrize("inverse", [False, True])
def test_the_op_passes_opcheck(name, inverse, native):
    tensors, options = CASE[name].make(torch.float32)
    arguments = (*tensors.values(), options.get("positions"), options["interleaved"], inverse)
    torch.library.opcheck(torch.ops.lmkernels.rotary.default, arguments)


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def test_a_compiled_call_has_no_graph_break_and_serves_other_sizes(backend, fresh_compiler):
    compiled = torch.compile(rotary, fullgraph=True, dynamic=True, backend="aot_eager")

    def run(b, s):
        x, positions = torch.randn(b, s, 4, 16, requires_grad=True), torch.randint(64, (b, s))
        cos, sin = torch.randn(64, 6), torch.randn(64, 6)
        outs = [f(x, cos, sin, positions=positions, backend=backend) for f in (compiled, rotary)]
        torch.testing.assert_close(*outs)
        torch.testing.assert_close(*(torch.autograd.grad(out.square().sum(), x) for out in outs))

    run(2, 10)
    with torch.compiler.set_stance("fail_on_recompile"):
        run(3, 17)


def test_a_compiled_call_looks_for_positions_beyond_the_table_too(native, fresh_compiler):
    compiled = torch.compile(rotary, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match="positions must lie between 0 and 4, got values from 0 to 7"):
        compiled(X, T, T, positions=torch.tensor([0, 1, 2, 7, 3]))


def test_autocast_leaves_the_dtype_alone(backend):
    """As for any elementwise operation."""
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        assert rotary(X, T, T, backend=backend).dtype == torch.float32
        assert rotary(X.bfloat16(), T, T, backend=backend).dtype == torch.bfloat16


# --- rotary_tables

FACTORS = [1.0 + 0.1 * i for i in range(32)]
SCALINGS = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048},
    "yarn, all keys": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 512,
        "beta_fast": 20.0,
        "beta_slow": 2.0,
        "mscale": 1.0,
        "mscale_all_dim": 0.7,
        "truncate": False,
    },
    "yarn, attention_factor": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 512,
        "attention_factor": 1.3,
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    },
    "longrope": {
        "rope_type": "longrope",
        "factor": 4.0,
        "long_factor": [2 * x for x in FACTORS],
        "short_factor": FACTORS,
        "original_max_position_embeddings": 512,
    },
    "longrope, attention_factor": {
        "rope_type": "longrope",
        "attention_factor": 1.2,
        "long_factor": [2 * x for x in FACTORS],
        "short_factor": FACTORS,
        "original_max_position_embeddings": 512,
    },
}


@pytest.mark.parametrize("seq_len", [300, 2500])
@pytest.mark.parametrize("base", [10000.0, 500000.0])
@pytest.mark.parametrize("name", SCALINGS)
def test_tables_are_those_of_transformers(name, base, seq_len):
    pytest.importorskip("transformers", reason="the tables are compared with those of transformers")
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    scaling = SCALINGS[name]
    config = LlamaConfig(
        hidden_size=128,
        num_attention_heads=2,
        max_position_embeddings=2048,
        rope_parameters={**scaling, "rope_theta": base},
    )
    functions = {"default": LlamaRotaryEmbedding.compute_default_rope_parameters, **ROPE_INIT_FUNCTIONS}
    frequencies, factor = functions[scaling["rope_type"]](config, device=torch.get_default_device(), seq_len=seq_len)
    angles = torch.arange(seq_len)[:, None].float() * frequencies
    given = {**scaling, "max_position_embeddings": 2048} if "dynamic" in name else scaling
    cos, sin = rotary_tables(seq_len, 64, base=base, scaling=given)
    assert cos.dtype == sin.dtype == torch.float32 and cos.shape == sin.shape == (seq_len, 32)
    torch.testing.assert_close(cos, angles.cos() * factor, rtol=0, atol=1e-6)
    torch.testing.assert_close(sin, angles.sin() * factor, rtol=0, atol=1e-6)


def test_ntk_leaves_the_first_frequency_and_divides_the_last_by_the_factor():
    base, factor, dim = 10000.0, 4.0, 64

    def frequencies(**options):
        cos, sin = (table.double() for table in rotary_tables(2, dim, **options))
        return torch.atan2(sin[1], cos[1])

    plain = frequencies(base=base)
    stretched = frequencies(base=base, scaling={"rope_type": "ntk", "factor": factor})
    torch.testing.assert_close(stretched[0], plain[0])
    torch.testing.assert_close(stretched[-1], plain[-1] / factor, rtol=1e-5, atol=0)
    assert ((stretched <= plain) & (stretched >= plain / factor * (1 - 1e-5))).all()


def test_tables_against_float64_without_scaling():
    cos, sin = rotary_tables(4096, 64, base=10000.0)
    angles = torch.arange(4096, dtype=torch.float64)[:, None] * 10000.0 ** (-torch.arange(0, 64, 2).double() / 64)
    # an angle of 4096 in float32 is off by up to 2 ulp
    torch.testing.assert_close(cos.double(), angles.cos(), rtol=0, atol=6e-4)
    torch.testing.assert_close(sin.double(), angles.sin(), rtol=0, atol=6e-4)


def test_the_keys_of_old_configurations_are_read():
    for old, new in [({"type": "linear", "factor": 2.0}, {"rope_type": "linear", "factor": 2.0}), (None, {})]:
        for a, b in zip(rotary_tables(9, 8, scaling=old), rotary_tables(9, 8, scaling=new), strict=True):
            assert torch.equal(a, b)
    with_theta = rotary_tables(9, 8, scaling={"rope_type": "default", "rope_theta": 77.0})
    assert torch.equal(with_theta[0], rotary_tables(9, 8, base=77.0)[0])


def test_a_factor_may_come_from_the_two_lengths():
    yarn = {"rope_type": "yarn", "original_max_position_embeddings": 512}
    a = rotary_tables(9, 64, scaling=yarn | {"factor": 4.0})
    b = rotary_tables(9, 64, scaling=yarn | {"factor": None, "max_position_embeddings": 2048})
    assert torch.equal(a[0], b[0])


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"scaling": {"rope_type": "su"}}, ValueError, "scaling['rope_type'] must be one of default, linear, ntk"),
        ({"scaling": {"rope_type": "linear"}}, ValueError, "scaling of type 'linear' must have 'factor'"),
        ({"scaling": {"rope_type": "linear", "factor": "two"}}, TypeError, "scaling['factor'] must be a number"),
        ({"scaling": {"rope_type": "linear", "factor": 0}}, ValueError, "scaling['factor'] must be above 0, got 0"),
        (
            {"scaling": {"rope_type": "dynamic", "factor": 2.0}},
            ValueError,
            "must have 'original_max_position_embeddings' or 'max_position_embeddings'",
        ),
        (
            {"scaling": {"rope_type": "longrope", "long_factor": [1.0], "short_factor": [1.0]}},
            ValueError,
            "scaling['long_factor'] must hold dim // 2 = 4 numbers, got (1,)",
        ),
        ({"scaling": {"rope_type": "longrope"}}, ValueError, "scaling of type 'longrope' must have 'long_factor'"),
        ({"scaling": "linear"}, TypeError, "scaling must be a mapping or None, got str"),
        ({"seq_len": -1}, ValueError, "seq_len must be an integer >= 0, got -1"),
        ({"dim": 7}, ValueError, "dim must be an even integer >= 0, got 7"),
        ({"base": -1.0}, ValueError, "base must be above 0, got -1.0"),
    ],
)
def test_bad_input_of_tables_is_named(arguments, error, message):
    with pytest.raises(error, match=re.escape(message)):
        rotary_tables(**{"seq_len": 5, "dim": 8} | arguments)
