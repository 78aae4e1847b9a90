"""Runs the cases of every op that has a native backend, forward and backward, for test_sanitizers.py.

    python sanitized_ops.py float32 float64 ...    with inputs of these dtypes
    python sanitized_ops.py poison                 what must end in a report

This looks for accesses beyond memory and for undefined behaviour; that results are right, the ops' own tests show. What
runs is written to stderr, so that it stands above a sanitizer's report.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

os.environ["LMKERNELS_POISON_MEMORY"] = "1"  # fresh memory of the library holds NaN

import torch

import lmkernels as lmk
from lmkernels import _library
from lmkernels.ops import _skinny  # noqa: F401
from lmkernels.ops import decode_step as step
from lmkernels.ops import encoder_layers as layers
from lmkernels.ops.dropout import drop
from lmkernels.ops.encoder_layers.autograd import Layer
from lmkernels.testing import cases
from lmkernels.testing.numerics import attention_results, results

ACTIVATIONS = (None, "gelu", "gelu_tanh", "silu", "relu", "tanh")


def native(function):
    return partial(function, backend="native")


# One generator for each op: it runs a case and yields its name before.


def attention(dtype: torch.dtype) -> Iterator[str]:
    for precision in ("highest", "high") if dtype == torch.float32 else ("highest",):
        torch.set_float32_matmul_precision(precision)
        for case in cases.ATTENTION:
            yield f"{case.name}, {precision}"
            attention_results(lmk.attention, case.make(dtype), backend="native")
    torch.set_float32_matmul_precision("highest")
    shapes = [case for case in cases.ATTENTION if "odd" in case.name or "head size" in case.name]
    for case in shapes if dtype == torch.float32 else ():
        yield f"{case.name}, float16"
        attention_results(lmk.attention, case.make(torch.float16), backend="native")

    def biased(q, k, v, table, **options):
        bias = lmk.RelativeBias(table, bidirectional=not options["causal"], max_distance=64)
        return lmk.attention(q, k, v, bias=bias, backend="native", **options)

    for causal, h_kv in ((False, 4), (True, 2)):
        yield f"relative bias, causal={causal}"
        shapes = {"q": (2, 90, 4, 40), "k": (2, 77, h_kv, 40), "v": (2, 77, h_kv, 40), "table": (32, 4)}
        inputs = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
        results(biased, inputs, inputs, causal=causal)


def attention_varlen(dtype: torch.dtype) -> Iterator[str]:
    for case in cases.ATTENTION_VARLEN:
        yield str(case)
        attention_results(lmk.attention_varlen, case.make(dtype), backend="native")


def attention_decode(dtype: torch.dtype) -> Iterator[str]:
    for case in cases.DECODE:
        yield case.name
        arguments = case.make(dtype)
        lmk.attention_decode(**arguments, backend="native")
        if dtype != torch.float64:  # the same with a cache of 8-bit integers
            for name in ("k", "v"):
                cache = arguments[f"{name}_cache"]
                arguments[f"{name}_cache"] = torch.zeros_like(cache, dtype=torch.int8)
                arguments[f"{name}_scale"] = torch.full(cache.shape[:3], 0.01)
            lmk.attention_decode(**arguments, backend="native")


def decode_step(dtype: torch.dtype) -> Iterator[str]:
    if dtype == torch.float64:
        return
    for case in cases.DECODE_STEP:
        for threads in (1, 3):
            yield f"{case.name}, {threads} threads"
            torch.set_num_threads(threads)
            step.decode_step(**case.make(dtype), backend="native")


def encoder_layers(dtype: torch.dtype) -> Iterator[str]:
    def parameters(quantized: str | None) -> Iterator[torch.Tensor]:
        for d_out, d_in in [(36, 36)] * 4 + [(36, 0), (50, 36), (36, 50), (36, 0)]:
            weight = torch.randn(d_out, d_in) if d_in else torch.randn(d_out)
            yield lmk.quantize_weight(weight, quantized) if d_in and quantized else weight.to(dtype)
            yield torch.randn(d_out).to(dtype)

    for quantized in (None, "int8", "int4") if dtype != torch.float64 else (None,):
        for rows in (3, 41):
            yield f"{rows} rows, {quantized}"
            given = list(parameters(quantized))
            layers.encoder_layers(torch.randn(2, rows, 36).to(dtype), given, 3, backend="native")
            bounds = {"cu_seqlens": torch.tensor([0, 2, 2, rows]), "max_seqlen": rows}
            layers.encoder_layers(torch.randn(rows, 36).to(dtype), given, 3, **bounds, backend="native")
    given = [p.requires_grad_() for p in parameters(None)]
    for narrow in (False, True) if dtype == torch.float32 else (False,):
        yield f"training, narrow={narrow}"
        for options in ({"batch": 2}, {"cu_seqlens": torch.tensor([0, 2, 2, 42]).int(), "max_seqlen": 40}):
            x = torch.randn(42, 36).to(dtype).requires_grad_()
            with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
                Layer(3, "gelu", 1e-5, 0.1, 0.1, **options)(x, given).sum().backward()


def embed(dtype: torch.dtype) -> Iterator[str]:
    for case in cases.EMBED:
        yield case.name
        inputs, tables = case.make(dtype)
        results(native(lmk.embed), inputs, tables)
        results(native(lmk.add_positions), case.make_added(dtype), ["x", "table"], scale=1.5)


def linear(dtype: torch.dtype) -> Iterator[str]:
    small = [case for case in cases.LINEAR if case.d_in * case.d_out < 1e6]
    for case, activation in zip(small, itertools.cycle(ACTIVATIONS)):
        yield case.name
        inputs = case.make(dtype)
        inputs["residual"] = torch.randn(*case.lead, case.d_out).to(dtype)
        results(native(lmk.linear), inputs, inputs, activation=activation)
    for layout, precision in itertools.product(("rows", "columns"), ("high", "medium")):
        yield f"strides of {layout}, {precision}"
        torch.set_float32_matmul_precision(precision)
        inputs = cases.LinearCase("parts", (70,), 90, 130, layout=layout).make(dtype)
        results(native(lmk.linear), inputs, inputs)
    torch.set_float32_matmul_precision("highest")
    for rows, d_in, d_out, layout in ((1, 100, 70, "rows"), (5, 33, 129, "columns"), (16, 770, 33, "padded")):
        yield f"{rows} rows"
        inputs = cases.LinearCase("few rows", (rows,), d_in, d_out, layout=layout).make(dtype)
        torch.ops.lmkernels.skinny_linear_fwd(*inputs.values(), torch.randn(rows, d_out).to(dtype), 1)
        torch.ops.lmkernels.skinny_linear_fwd(inputs["x"], inputs["weight"], None, None, 0)


def linear_cross_entropy(dtype: torch.dtype) -> Iterator[str]:
    options = ({}, {"softcap": 5.0, "z_loss": 0.1}, {"label_smoothing": 0.1, "reduction": "none"})
    for (rows, d, vocab), some in itertools.product(((1, 33, 7), (70, 40, 1003), (131, 64, 257)), options):
        yield f"{rows} rows of {d}, {vocab} words, {some}"
        labels = torch.randint(vocab, (rows,))
        labels[::3] = -100
        inputs = {"hidden": torch.randn(rows, d), "weight": torch.randn(vocab, d), "bias": torch.randn(vocab)}
        inputs = {name: x.to(dtype) for name, x in inputs.items()}
        results(native(lmk.linear_cross_entropy), {**inputs, "labels": labels}, inputs, **some)
    for precision, weight in itertools.product(("highest", "high"), (torch.randn(203, 801), torch.randn(801, 203).t())):
        yield f"rows and infinities at {precision} precision, strides {weight.stride()}"
        hidden = torch.randn(77, 801)
        hidden[70, 5] = torch.inf
        inputs = {"hidden": hidden.to(dtype), "weight": weight.to(dtype)}
        torch.set_float32_matmul_precision(precision)
        results(native(lmk.linear_cross_entropy), {**inputs, "labels": torch.arange(77)}, inputs)
    torch.set_float32_matmul_precision("highest")


def mlp(dtype: torch.dtype) -> Iterator[str]:
    def normal(*shape):
        return torch.randn(shape).to(dtype)

    for rows, d_model, d_ff in ((1, 40, 150), (70, 33, 97)):
        yield f"{rows} rows"
        x, w_in, w_out = normal(rows, d_model), normal(d_ff, d_model), normal(d_model, d_ff)
        biases = {"b_in": normal(d_ff), "b_out": normal(d_model)}
        inputs = {"x": x, "w_in": w_in, "w_out": w_out, "residual": x} | biases
        results(native(lmk.mlp), inputs, inputs)
        inputs = {"x": x, "w_gate": w_in, "w_up": normal(d_ff, d_model), "w_down": w_out, "residual": x}
        results(native(lmk.swiglu_mlp), inputs, inputs)


def norms(dtype: torch.dtype) -> Iterator[str]:
    def layer_norm(x, residual=None, weight=None, bias=None):
        return lmk.layer_norm(x, weight, bias, 1e-5, residual=residual, backend="native")

    def rms_norm(x, residual=None, weight=None, bias=None):
        return lmk.rms_norm(x, weight, 1e-5, residual=residual, backend="native")

    for case in cases.NORM:
        yield case.name
        inputs = case.make(dtype)
        results(layer_norm, inputs, inputs)
        results(rms_norm, inputs, [name for name in inputs if name != "bias"])


def qkv_projection(dtype: torch.dtype) -> Iterator[str]:
    for case in cases.QKV:
        yield case.name
        inputs, options = case.make(dtype)
        results(native(lmk.qkv_projection), inputs, inputs, **options)


def quantize_weight(dtype: torch.dtype) -> Iterator[str]:
    if dtype == torch.float64:
        return
    for kind, (rows, d_in, d_out) in itertools.product(
        ("int8", "int4"), ((1, 33, 1), (3, 700, 70), (17, 131, 37), (70, 64, 130))
    ):
        yield f"{rows} rows, {kind}"
        weight = lmk.quantize_weight(torch.randn(d_out, d_in), kind)
        x, residual = torch.randn(rows, d_in).to(dtype), torch.randn(rows, d_out).to(dtype)
        lmk.linear(x, weight, torch.randn(d_out).to(dtype), residual=residual, activation="gelu", backend="native")


def rotary(dtype: torch.dtype) -> Iterator[str]:
    for case in cases.ROTARY:
        yield case.name
        inputs, options = case.make(dtype)
        results(native(lmk.rotary), inputs, ["x"], **options)


def dropout(dtype: torch.dtype) -> Iterator[str]:
    for n, residual_dtype in itertools.product((0, 1, 127, 130, 20_000), (None, dtype, torch.float32)):
        if dtype == torch.float64 and residual_dtype == torch.float32:
            continue
        yield f"{n} elements, residual {residual_dtype}"
        x = torch.randn(n).to(dtype).requires_grad_()
        residual = None if residual_dtype is None else torch.randn(n).to(residual_dtype).requires_grad_()
        drop(torch.nn.Dropout(0.3), x, residual).sum().backward()


def softmax(dtype: torch.dtype) -> Iterator[str]:
    for case in cases.SOFTMAX:
        yield case.name
        results(native(lmk.softmax), case.make(dtype), ["x"], dim=case.dim)
        lmk.softmax(case.make(dtype)["x"], case.dim, dtype=torch.promote_types(dtype, torch.float32), backend="native")


OPS = {
    run.__name__: run
    for run in (
        attention,
        attention_decode,
        attention_varlen,
        decode_step,
        encoder_layers,
        embed,
        linear,
        linear_cross_entropy,
        mlp,
        norms,
        qkv_projection,
        quantize_weight,
        rotary,
        softmax,
        dropout,
    )
}


def run_every_case(dtypes: list[str]) -> None:
    for op, run in OPS.items():
        for dtype in dtypes:
            for case in run(getattr(torch, dtype)):
                print(op, dtype, case, file=sys.stderr)
        print(op)


def read_poisoned_memory() -> None:
    """The last key is out of bounds."""
    q, k, v = (torch.randn(1, 8, 1, 16) for _ in range(3))
    ctypes.CDLL(None).__asan_poison_memory_region(ctypes.c_void_p(k[0, -1].data_ptr()), ctypes.c_size_t(64))
    lmk.attention(q, k, v, backend="native")


if __name__ == "__main__":
    assert _library.native_error is None, _library.native_error
    assert b"__asan_init" in Path(_library.__file__).with_name("_C.so").read_bytes(), _library.__file__
    torch.set_deterministic_debug_mode("warn")  # fresh memory of torch too
    read_poisoned_memory() if sys.argv[1:] == ["poison"] else run_every_case(sys.argv[1:])
