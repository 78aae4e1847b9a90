"""attention_decode: as accurate as plain torch for every cache, dtype, backend and instruction set."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lmkernels import attention_decode
from lmkernels.ops.attention_decode.reference import quantise
from lmkernels.testing import cases, numerics

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
NATIVE_ON_CUDA = True
INTERPRETED = (
    r"plain_torch\[triton-((one key in|short|groups of seven|head size 37|two|pages of 5|rotary|alibi|sink).*-float32|"
    r"(rotary, partial|softcap|window|queries that|everything).*-bfloat16)|nearest.*triton-(short|rotary)\]|"
    r"its_values_give\[triton-(short|everything at once|rotary)-(float32|bfloat16)"
)
ON_EVERY_ISA = r"(accurate|int8_cache|alone|not_finite).*native"
CASE = {case.name: case for case in cases.DECODE}
EVERYTHING = CASE["everything at once"]


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def decode(backend: str | None = None, **arguments) -> tuple[Tensor, ...]:
    """out, lse and the caches after the call, which works on copies with the same strides."""
    arguments = copy.deepcopy(arguments)
    out, lse = attention_decode(**arguments, return_lse=True, backend=backend)
    return out, lse, *(arguments[name] for name in ("k_cache", "v_cache", "k_scale", "v_scale") if name in arguments)


def flat(cache: Tensor, block_table: Tensor | None) -> Tensor:
    """(b, capacity, h_kv, d), gathered where the cache is paged."""
    return cache if block_table is None else cache[block_table.long()].flatten(1, 2)


def written(results: tuple[Tensor, ...], arguments: dict) -> tuple[Tensor, ...]:
    """out, lse and what a sequence's cache holds where it has tokens, zero elsewhere."""
    out, lse, *caches = results
    table = arguments.get("block_table")
    caches = [flat(cache, table) for cache in caches]
    total = arguments["kv_lengths"] + (arguments["k_new"].shape[1] if "k_new" in arguments else 0)
    empty = torch.arange(caches[0].shape[1]) >= total[:, None]  # (b, capacity)
    return out, lse, *(cache.masked_fill(empty.reshape(*empty.shape, *[1] * (cache.dim() - 2)), 0) for cache in caches)


def rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, positions: Tensor) -> Tensor:
    """x (s, h, d) rotated as eager code does, in x's dtype: x cos + (x with its halves swapped) sin."""
    half = cos.shape[1]
    c, s = (table[positions.clamp(min=0)][:, None].to(x.dtype) for table in (cos, sin))
    head, rest = x[..., : 2 * half], x[..., 2 * half :]
    if interleaved:
        swapped = torch.stack((-head[..., 1::2], head[..., ::2]), -1).flatten(-2)
        c, s = c.repeat_interleave(2, -1), s.repeat_interleave(2, -1)
    else:
        swapped = torch.cat((-head[..., half:], head[..., :half]), -1)
        c, s = torch.cat((c, c), -1), torch.cat((s, s), -1)
    return torch.cat((head * c + swapped * s, rest), -1)


def plain(
    q,
    k_cache,
    v_cache,
    kv_lengths,
    *,
    k_new=None,
    v_new=None,
    cos=None,
    sin=None,
    interleaved=False,
    block_table=None,
    **options,
) -> tuple[Tensor, ...]:
    """What one writes in eager torch: rotate, append, and the attention of each sequence by itself."""
    k, v = flat(k_cache, block_table).clone(), flat(v_cache, block_table).clone()
    s_q, s_new = q.shape[1], 0 if k_new is None else k_new.shape[1]
    outs, lses = [], []
    for b, before in enumerate(kv_lengths.tolist()):
        total = before + s_new
        query = q[b]
        if cos is not None:
            query = rotated(query, cos, sin, interleaved, torch.arange(total - s_q, total))
        if s_new:
            new = k_new[b] if cos is None else rotated(k_new[b], cos, sin, interleaved, torch.arange(before, total))
            k[b, before:total], v[b, before:total] = new, v_new[b]
        k[b, total:], v[b, total:] = 0, 0
        if total == 0:
            outs.append(torch.zeros(1, s_q, q.shape[2], v.shape[3], dtype=q.dtype))
            lses.append(torch.full((1, q.shape[2], s_q), -torch.inf, dtype=torch.promote_types(q.dtype, torch.float32)))
            continue
        query = query[None].detach().requires_grad_()
        out, lse = numerics.plain_attention(query, k[b : b + 1, :total], v[b : b + 1, :total], causal=True, **options)
        outs.append(out.detach())
        lses.append(lse.detach())
    return torch.cat(outs), torch.cat(lses), k, v


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("case", [*cases.DECODE, cases.DECODE_LONG], ids=str)
def test_results_and_caches_are_as_accurate_as_plain_torch(case, dtype, backend):
    arguments = case.make(dtype)
    numerics.assert_op_as_accurate(
        lambda **x: written(decode(backend, **x), x),
        lambda **x: written(decode("reference", **x), x),
        plain,
        arguments,
        dtype=dtype,
    )


@pytest.mark.parametrize("case", cases.DECODE, ids=str)
def test_the_reference_is_the_composition_of_its_parts(case):
    arguments = case.make(torch.float64)
    for name, actual, expected in zip(
        ("out", "lse", "k_cache", "v_cache"),
        written(decode("reference", **arguments), arguments),
        plain(**arguments),
        strict=True,
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


# --- int8 ---


def in_int8(arguments: dict) -> dict:
    """The same with caches of int8; scales lie one head after the other."""
    quantised = dict(arguments)
    for name in ("k", "v"):
        cache, scale = quantise(arguments[f"{name}_cache"])
        quantised[f"{name}_cache"] = torch.empty_like(arguments[f"{name}_cache"], dtype=torch.int8).copy_(cache)
        quantised[f"{name}_scale"] = scale.transpose(1, 2).contiguous().transpose(1, 2)
    return quantised


INT8_TOLERANCE = {torch.float32: 3e-4, torch.bfloat16: 2**-7, torch.float16: 1e-3}


@pytest.mark.parametrize("dtype", INT8_TOLERANCE, ids=short)
@pytest.mark.parametrize("case", [*cases.DECODE, cases.DECODE_LONG], ids=str)
def test_an_int8_cache_gives_what_its_values_give(case, dtype, backend):
    """Against float64 on the integers times their scales; queries and weights of the kernels have 16 bits."""
    arguments = in_int8(case.make(dtype))
    out, lse, *caches = decode(backend, **arguments)
    assert out.dtype == dtype and lse.dtype == torch.float32
    k, v = (cache.double() * scale.double()[..., None] for cache, scale in zip(caches[:2], caches[2:], strict=True))
    exact = {name: x for name, x in arguments.items() if name not in ("k_scale", "v_scale", "k_new", "v_new")}
    exact = numerics.in_dtype(exact, torch.float64)
    exact |= {"k_cache": k, "v_cache": v, "kv_lengths": arguments["kv_lengths"] + case.tokens_new}
    golden, golden_lse, *_ = decode("reference", **exact)
    tolerance = INT8_TOLERANCE[dtype]
    torch.testing.assert_close(out.double(), golden, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.double(), golden_lse, rtol=3e-4, atol=3e-4)


@pytest.mark.parametrize("case", [case for case in cases.DECODE if case.tokens_new], ids=str)
def test_int8_rows_are_the_nearest_integers(case, backend):
    arguments = in_int8(case.make(torch.float32))
    actual = written(decode(backend, **arguments), arguments)[2:]
    expected = written(decode("reference", **arguments), arguments)[2:]
    if case.rotary:  # a product may be rounded once or twice
        torch.testing.assert_close(actual[2:], expected[2:], rtol=1e-6, atol=0)
        assert all((a.int() - e.int()).abs().max() <= 1 for a, e in zip(actual[:2], expected[:2], strict=True))
        assert all((a != e).float().mean() < 1e-3 for a, e in zip(actual[:2], expected[:2], strict=True))
    else:
        assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_the_error_of_int8_against_float32(backend):
    """As the docstring says: below 1 % of the values' size, and the less the more keys share the weight."""
    errors = []
    for length in (1, 64, 4096):
        case = cases.DecodeCase("", (length,), 16, 64)
        arguments = case.make(torch.float32)
        exact = decode(backend, **arguments)[0]
        errors.append((decode(backend, **in_int8(arguments))[0] - exact).square().mean().sqrt().item())
    assert errors[0] < 0.01 and errors[2] < 0.001 and errors[0] > errors[1] > errors[2]


def test_rows_that_are_not_finite_spoil_what_sees_them(backend):
    arguments = in_int8(cases.DecodeCase("", (20, 20), 2, 16).make(torch.float32))
    for name in ("k_new", "v_new", "q"):
        for value in (torch.nan, torch.inf):
            spoilt = copy.deepcopy(arguments)
            spoilt[name][1, 0, 1, 3] = value
            out = decode(backend, **spoilt)[0]
            assert out[1, 0, 1].isnan().all() and torch.equal(out.isnan().sum(), torch.tensor(16)), (name, value)


# --- which instruction set, thread, page and neighbour computes it changes nothing ---


def assert_same_bits(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]):
    for name, a, e in zip(("out", "lse", "k_cache", "v_cache"), actual, expected, strict=False):
        assert torch.equal(a, e), f"{name}: {(a != e).sum()} elements differ"


KINDS = [*DTYPES, "int8"]


def of_kind(case: cases.DecodeCase, kind) -> dict:
    return in_int8(case.make(torch.float32)) if kind == "int8" else case.make(kind)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind if kind == "int8" else short(kind))
@pytest.mark.parametrize("page", [1, 3, 16, 64, 100])
@pytest.mark.parametrize("name", ["several shares", "five queries, two new tokens", "groups of three"])
def test_a_paged_cache_gives_the_bits_of_a_contiguous_one(name, page, kind, compiled):
    case = replace(CASE[name], rotary=16)
    contiguous, paged = of_kind(case, kind), of_kind(replace(case, page=page), kind)
    table = paged["block_table"].long()
    paged |= {name: x for name, x in contiguous.items() if "cache" not in name and "scale" not in name}
    for part in ("k_cache", "v_cache", "k_scale", "v_scale"):
        if part in contiguous:
            rows, pages = contiguous[part], paged[part]
            for j in range(rows.shape[1]):
                pages[table[:, j // page], j % page] = rows[:, j]
    paged |= {"scale": contiguous["scale"], "block_table": table.int()}
    contiguous_results, paged_results = decode(compiled, **contiguous), decode(compiled, **paged)
    length = contiguous["k_cache"].shape[1]
    assert_same_bits(
        tuple(x[:, :length] if i > 1 else x for i, x in enumerate(written(paged_results, paged))),
        written(contiguous_results, contiguous),
    )


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind if kind == "int8" else short(kind))
@pytest.mark.parametrize("name", ["several shares", "a prompt", "eight queries", "everything at once"])
def test_a_sequence_has_the_same_bits_alone_and_in_a_batch(name, kind, compiled):
    arguments = of_kind(CASE[name], kind)
    together = decode(compiled, **arguments)
    per_sequence = ("q", "kv_lengths", "k_new", "v_new", "block_table")
    if "block_table" not in arguments:
        per_sequence += ("k_cache", "v_cache", "k_scale", "v_scale")
    for b in range(CASE[name].b):
        alone = {key: x[b : b + 1] if key in per_sequence else x for key, x in arguments.items()}
        out, lse, *_ = decode(compiled, **alone)
        assert torch.equal(out[0], together[0][b]) and torch.equal(lse[0], together[1][b])


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind if kind == "int8" else short(kind))
def test_any_number_of_threads_gives_the_same_bits(kind, native):
    before = torch.get_num_threads()
    try:
        for case in (cases.DECODE_LONG, CASE["a prompt"], EVERYTHING):
            arguments = of_kind(case, kind)
            torch.set_num_threads(1)
            expected = written(decode(native, **arguments), arguments)
            for run in range(6):
                torch.set_num_threads(2 + run % 2)
                assert_same_bits(written(decode(native, **arguments), arguments), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["several shares", "five queries, two new tokens", "rotary"])
def test_one_call_gives_the_bits_of_append_then_attend(name, compiled):
    """Appending without a query first, then attending without new tokens."""
    arguments = CASE[name].make(torch.float32)
    at_once = decode(compiled, **arguments)
    steps = copy.deepcopy(arguments)
    q = steps.pop("q")
    attention_decode(q[:, :0], **steps, backend=compiled)
    assert_same_bits(
        (steps["k_cache"].nan_to_num(), steps["v_cache"].nan_to_num()), [x.nan_to_num() for x in at_once[2:]]
    )
    s_new = steps.pop("k_new").shape[1]
    steps.pop("v_new")
    steps["kv_lengths"] = steps["kv_lengths"] + s_new
    assert_same_bits(decode(compiled, q=q, **steps)[:2], at_once[:2])
