"""The kernels compiled for sm_80 and sm_90, and what the compiler reports: no GPU is needed for that.

`make test` compiles what is hot; `make test-gpu-compile` every configuration, dtype and architecture.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch

from lmkernels import (
    RelativeBias,
    _library,
    add_positions,
    attention,
    attention_decode,
    attention_varlen,
    embed,
    layer_norm,
    linear,
    linear_cross_entropy,
    qkv_projection,
    rms_norm,
    rotary,
    softmax,
    swiglu_mlp,
)
from lmkernels.testing import compiled

pytestmark = pytest.mark.skipif(
    _library.triton_error is not None or _library.triton_interpreted, reason=f"no compiler: {_library.triton_error}"
)

DTYPES = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Products of float32, multiplied one by one, are so many multiplications that ptxas leaves a few of their operands in
# memory.
FLOAT32_SPILLED = 32


@dataclass(frozen=True)
class Call:
    """An op on tensors of the device "meta", which is torch's default device while it runs."""

    name: str
    run: Callable[[torch.dtype], None]
    hot: bool = False  # compiled in every run of the tests
    wide: bool = True  # memory is read 16 bytes at a time; not where rows begin anywhere
    products: tuple[str, ...] = ()  # the kernels that multiply with the matrix units, unless float32 is to be exact
    wgmma: tuple[str, ...] = ()  # those that use sm_90's, which take 64 rows of 16 bits
    # bytes of a thread's stack that are allowed, where something rare wants too many registers
    spilled: int = 0
    spilled_float32: int = FLOAT32_SPILLED

    def __str__(self) -> str:
        return self.name


def leaf(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, requires_grad=True)


def with_gradients(function: Callable, *leaves: torch.Tensor) -> None:
    outs = function(*leaves)
    outs = outs if isinstance(outs, tuple) else (outs,)
    torch.autograd.grad(outs, leaves, [torch.empty_like(out) for out in outs])


def norm(d: int, residual: bool, center: bool = True, **options) -> Call:
    def run(dtype):
        x, weight = leaf(1000, d, dtype=dtype), leaf(d, dtype=dtype)
        added = leaf(1000, d, dtype=dtype).detach() if residual else None
        if center:
            with_gradients(
                lambda x, weight, bias: layer_norm(x, weight, bias, 1e-5, residual=added, backend="triton"),
                x,
                weight,
                leaf(d, dtype=dtype),
            )
        else:
            with_gradients(lambda x, weight: rms_norm(x, weight, 1e-5, residual=added, backend="triton"), x, weight)

    return Call(f"{'layer' if center else 'rms'}_norm {d}{' residual' * residual}", run, **options)


def softmax_of(d: int, **options) -> Call:
    return Call(
        f"softmax {d}",
        lambda dtype: with_gradients(lambda x: softmax(x, backend="triton"), leaf(1000, d, dtype=dtype)),
        **options,
    )


def rotated(d: int, d_rot: int, interleaved: bool, positions: bool, **options) -> Call:
    def run(dtype):
        cos, sin = torch.empty(2, 1000, d_rot // 2)
        of_tokens = torch.empty(4, 512, dtype=torch.int64) if positions else None
        with_gradients(
            lambda x: rotary(x, cos, sin, interleaved=interleaved, positions=of_tokens, backend="triton"),
            leaf(4, 512, 12, d, dtype=dtype),
        )

    return Call(f"rotary {d} {d_rot}{' interleaved' * interleaved}{' positions' * positions}", run, **options)


def embedded(d: int, bert: bool, **options) -> Call:
    def run(dtype):
        ids = torch.empty(8, 512, dtype=torch.int64)
        tables = [leaf(n, d, dtype=dtype) for n in ((30522, 512, 2) if bert else (50257, 1024))]
        with_gradients(
            lambda tokens, places, types=None: embed(
                ids, tokens, position_table=places, type_ids=ids if bert else None, type_table=types, backend="triton"
            ),
            *tables,
        )

    return Call(f"embed {d}{' BERT' * bert}", run, **options)


def added(d: int, **options) -> Call:
    return Call(
        f"add_positions {d}",
        lambda dtype: with_gradients(
            lambda x, table: add_positions(x, table, backend="triton"),
            leaf(8, 512, d, dtype=dtype),
            leaf(512, d, dtype=dtype),
        ),
        **options,
    )


def linear_of(activation: str | None, residual: bool, **options) -> Call:
    def run(dtype):
        added = leaf(1000, 3072, dtype=dtype).detach() if residual else None
        with_gradients(
            lambda x, weight, bias: linear(x, weight, bias, activation=activation, residual=added, backend="triton"),
            leaf(1000, 768, dtype=dtype),
            leaf(3072, 768, dtype=dtype),
            leaf(3072, dtype=dtype),
        )

    return Call(f"linear {activation}{' residual' * residual}", run, **options)


def swiglu(**options) -> Call:
    def run(dtype):
        weights = (leaf(3072, 768, dtype=dtype), leaf(3072, 768, dtype=dtype), leaf(768, 3072, dtype=dtype))
        with_gradients(
            lambda x, *weights: swiglu_mlp(x, *weights, backend="triton"), leaf(1000, 768, dtype=dtype), *weights
        )

    return Call("swiglu", run, **options)


def projected(rotated: int, **options) -> Call:
    def run(dtype):
        cos, sin = torch.empty(2, 1000, rotated // 2)
        with_gradients(
            lambda x, weight, bias: qkv_projection(
                x, weight, bias, num_heads=12, num_kv_heads=4, cos=cos, sin=sin, backend="triton"
            ),
            leaf(2, 512, 768, dtype=dtype),
            leaf(20 * 64, 768, dtype=dtype),
            leaf(20 * 64, dtype=dtype),
        )

    return Call(f"qkv_projection {rotated}", run, **options)


def loss_of(vocab: int, bias: bool, softcap: float = 0.0, **options) -> Call:
    def run(dtype):
        labels = torch.empty(4000, dtype=torch.int64)
        leaves = [leaf(4000, 768, dtype=dtype), leaf(vocab, 768, dtype=dtype), leaf(vocab, dtype=dtype)]
        with_gradients(
            lambda hidden, weight, bias=None: linear_cross_entropy(
                hidden, weight, labels, bias=bias, softcap=softcap, backend="triton"
            ),
            *leaves[: 3 if bias else 2],
        )

    return Call(f"linear_cross_entropy {vocab}{' bias' * bias}{' softcap' * (softcap > 0)}", run, **options)


def attended(d: int, features: str = "", h_kv: int = 12, s: int = 1024, **options) -> Call:
    """features: words among causal, dropout, softcap, bias, distance, slopes, sink, mask, window, varlen."""
    b, h = 2, 12

    def run(dtype):
        words, shape = features.split(), (b * s,) if "varlen" in features else (b, s)
        leaves = {"q": leaf(*shape, h, d, dtype=dtype)} | {name: leaf(*shape, h_kv, d, dtype=dtype) for name in "kv"}
        given = {}
        if "bias" in words:
            leaves["bias"] = leaf(1, h, s, s, dtype=dtype)
        if "slopes" in words:
            leaves["alibi_slopes"] = leaf(h, dtype=torch.float32)
        if "sink" in words:
            leaves["sink"] = leaf(h, dtype=torch.float32)
        if "mask" in words:
            given["mask"] = torch.empty(b, 1, 1, s, dtype=torch.bool)
        if "distance" in words:
            leaves["table"] = leaf(32, h, dtype=dtype)
        if "window" in words:
            given["window"] = (256, 0)
        if "softcap" in words:
            given["softcap"] = 30.0
        if "dropout" in words:
            given |= {"dropout_p": 0.1, "seed": torch.empty((), dtype=torch.int64)}
        names, function = list(leaves), attention
        if "distance" in words:

            def function(table, **arguments):
                return attention(**arguments, bias=RelativeBias(table, bidirectional=True, max_distance=128))

        if "varlen" in words:
            starts = torch.empty(b + 1, dtype=torch.int32)
            function = partial(
                attention_varlen, cu_seqlens_q=starts, cu_seqlens_k=starts, max_seqlen_q=s, max_seqlen_k=s
            )
        with_gradients(
            lambda *xs: function(
                **dict(zip(names, xs, strict=True)), **given, causal="causal" in words, backend="triton"
            ),
            *leaves.values(),
        )

    length = f" of {s}" * (s != 1024)
    name = f"attention {d}{f' on {h_kv}' * (h != h_kv)}{length}{' ' * bool(features)}{features}"
    products = "attention.fwd", "attention.bwd_q", "attention.bwd_kv"
    return Call(name, run, products=products, wgmma=products if s == 1024 else (), **options)


def decoded(d: int, h: int = 12, h_kv: int = 12, features: str = "", s: int = 1, **options) -> Call:
    """features: words among pages, rotary, int8, softcap, window, slopes, sink; s: new tokens."""

    def run(dtype):
        words = features.split()
        shape = (64, 64, h_kv) if "pages" in words else (4, 1024, h_kv)
        given = {f"{name}_new": torch.empty(4, s, h_kv, d, dtype=dtype) for name in "kv"}
        if "pages" in words:
            given["block_table"] = torch.empty(4, 16, dtype=torch.int32)
        if "rotary" in words:
            given["cos"], given["sin"] = torch.empty(2, 1024, d // 2)
        if "int8" in words:
            given |= {f"{name}_scale": torch.empty(shape) for name in "kv"}
        if "softcap" in words:
            given["softcap"] = 30.0
        if "window" in words:
            given["window"] = (256, 0)
        given |= {name: torch.empty(h) for name in ("alibi_slopes", "sink") if name.split("_")[-1] in words}
        attention_decode(
            torch.empty(4, s, h, d, dtype=dtype),
            *(torch.empty(*shape, d, dtype=torch.int8 if "int8" in words else dtype) for _ in "kv"),
            torch.empty(4, dtype=torch.int32),
            **given,
            backend="triton",
        )

    name = f"attention_decode {d} {h} {h_kv}{f' of {s}' * (s != 1)}{' ' * bool(features)}{features}"
    return Call(name, run, products=("attention_decode.attend",), **options)


CALLS = [
    attended(64, "causal", hot=True),
    attended(128, hot=True),
    attended(128, "causal", h_kv=4, hot=True),
    *(
        # the bias by distance is gathered from a small table
        attended(d, features, wide=features != "distance", spilled=16 * ("dropout varlen" in features))
        for d in (64, 128)
        for features in (
            "causal varlen", "causal window sink", "causal softcap", "causal slopes", "mask", "bias", "distance",
            "causal dropout", "mask dropout", "causal slopes dropout varlen", "bias dropout softcap mask",
        )
    ),
    attended(64, "causal", h_kv=4),
    *(attended(d, features) for d in (32, 80) for features in ("causal", "mask dropout")),
    attended(80, "causal", h_kv=4),
    # a key and a value of 256 floats each, in sums: what else there is goes to memory
    *(attended(256, features, h_kv, spilled=288, spilled_float32=512)
      for features, h_kv in (("causal", 12), ("mask dropout", 12), ("bias", 12), ("causal", 4))),
    # smaller tiles
    *(attended(d, features, s=s, spilled=288 if d == 256 else 16 * ("dropout" in features),
               spilled_float32=512 if d == 256 else FLOAT32_SPILLED)
      for d in (64, 128, 256) for features in ("causal", "mask dropout", "bias mask dropout") for s in (16, 32, 64)),
    decoded(64, hot=True),
    # with a window, and for many new tokens, few programs share the keys: combine reads a few numbers
    *(decoded(d, h, h_kv, features, s, wide="window" not in features and s == 1, spilled=32 * (s == 64),
              spilled_float32=512 if d == 256 else FLOAT32_SPILLED)
      for d, h, h_kv in ((64, 12, 12), (128, 32, 8), (256, 16, 1))
      for features, s in (("", 1), ("pages rotary", 1), ("int8 rotary", 1), ("softcap window slopes sink", 1),
                          ("rotary", 32), ("int8 pages rotary", 64))),
    norm(768, True, hot=True),
    norm(4096, False, center=False, hot=True),
    *(norm(d, residual, center) for d in (64, 768, 1024, 4096, 8192, 16384, 32768) for residual in (False, True)
      for center in (False, True)),
    norm(50257, True, wide=False),
    softmax_of(512, hot=True),
    *(softmax_of(d) for d in (64, 4096, 16384, 32768)),
    softmax_of(50257, wide=False),
    rotated(64, 64, False, False, hot=True),
    rotated(128, 128, True, True),
    *(rotated(d, d_rot, interleaved, True) for d, d_rot in ((80, 32), (256, 64)) for interleaved in (False, True)),
    embedded(768, False, hot=True),
    *(embedded(d, bert) for d in (64, 768, 4096) for bert in (False, True)),
    added(768),
    linear_of("gelu_tanh", False, hot=True),
    *(linear_of(activation, True) for activation in (None, "gelu", "silu", "relu", "tanh")),
    swiglu(),
    projected(64),
    projected(32),
    loss_of(50304, False, hot=True),
    loss_of(50257, False, wide=False),
    loss_of(30522, True, wide=False),
    loss_of(32000, True, 30.0),
]  # fmt: skip


def runs(config) -> list[tuple[Call, str, str]]:
    if config.getoption("--every-configuration"):
        return [
            (call, dtype, arch)
            for call in CALLS
            for dtype in DTYPES
            for arch in compiled.CAPABILITIES
            if dtype != "tf32" or call.products  # elsewhere it changes nothing
        ]
    return [
        (call, dtype, arch)
        for call in CALLS
        if call.hot
        for dtype, arch in (("bfloat16", "sm_90"), ("float32", "sm_80"))
    ]


def pytest_generate_tests(metafunc):
    if "call" in metafunc.fixturenames:
        metafunc.parametrize(("call", "dtype", "architecture"), runs(metafunc.config), ids=str)


@pytest.fixture
def ieee():
    yield
    torch.backends.cuda.matmul.allow_tf32 = False


def test_nothing_spills_reads_are_wide_and_no_sum_is_atomic(call, dtype, architecture, ieee):
    torch.backends.cuda.matmul.allow_tf32 = dtype == "tf32"
    with compiled.launches(architecture) as reports, torch.device("meta"):
        call.run(DTYPES[dtype])
    assert reports
    wrong = [
        str(report)
        for report in reports
        if report.stack > (call.spilled_float32 if DTYPES[dtype] == torch.float32 else call.spilled)
        or report.shared > compiled.SHARED_LIMIT[architecture]
        or report.atomics
        or (call.wide and report.widest_load < 16)
        or (dtype != "float32" and report.name in call.products and not report.mma)
        or (
            dtype in ("bfloat16", "float16")
            and architecture == "sm_90"
            and report.name in call.wgmma
            and not report.wgmma
        )
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("line", "atomic"),
    [
        ("@%p1 red.global.add.f32 [ %rd1 + 0 ], %f1;", True),
        ("@%p1 atom.global.gpu.acq_rel.add.noftz.f16x2 %r1, [ %rd1 + 0 ], %r2;", True),
        ("redux.sync.add.s32 %r1, %r2, 0xffffffff;", False),
        ("@%p1 st.global.b32 [ %rd1 + 0 ], { %r1 };", False),
    ],
)
def test_atomic_additions_are_seen(line, atomic):
    assert compiled.Report("", "sm_90", (1,), 4, 32, 0, 0, f"\t{line}\n").atomics == atomic
