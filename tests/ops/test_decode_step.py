"""decode_step: as accurate as plain torch layer by layer, and the same bits on any threads and in any batch."""

from __future__ import annotations

import copy
import dataclasses
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lmkernels.ops.decode_step import StepLayer, StepModel, decode_step
from lmkernels.ops.linear.reference import ACTIVATIONS
from lmkernels.ops.quantize_weight import quantize_weight
from lmkernels.ops.rotary import reference as rotary
from lmkernels.testing import cases, numerics

ON_EVERY_ISA = r"test_(threads|batch)|test_(as_accurate_as_plain_torch|pages|tokens_of).*native"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CASE = {case.name: case for case in cases.DECODE_STEP}
SPLIT = [CASE[name] for name in ("deep enough for chunks", "16 rows, ragged", "many keys, in shares", "int4", "int8")]
ROWS = "token_ids", "position_ids", "starts", "lengths"


def step(backend: str | None = "native", **arguments) -> tuple[Tensor, list[Tensor]]:
    """The logits, and the caches after the step, which works on copies; what they do not hold is 0."""
    arguments["caches"] = [cache.clone() for cache in arguments["caches"]]
    logits = decode_step(**arguments, backend=backend)
    return logits, [cache.nan_to_num(0.0) for cache in arguments["caches"]]


def converted(model: StepModel, dtype: torch.dtype) -> StepModel:
    """The same weights in another dtype, but for those that are quantised."""

    def convert(x):
        return x.to(dtype) if isinstance(x, Tensor) else x

    def fields(x) -> dict:
        return {field.name: convert(getattr(x, field.name)) for field in dataclasses.fields(x)}

    layers = tuple(StepLayer(**fields(layer)) for layer in model.layers)
    return StepModel(**fields(model) | {"layers": layers})


def in_dtype(arguments: dict, dtype: torch.dtype) -> dict:
    caches = [cache.to(dtype) for cache in arguments["caches"]]
    return arguments | {"caches": caches, "model": converted(arguments["model"], dtype)}


def plain(token_ids, position_ids, starts, lengths, caches, model) -> Tensor:
    """What one writes in eager torch, sequence by sequence, every result in the dtype of the weights."""
    rows = []
    for r, (token, position) in enumerate(zip(token_ids, position_ids, strict=True)):
        x = model.tokens[token]
        if model.positions is not None:
            x = x + model.positions[position]

        def norm(x, weight, bias):
            if model.rms:
                return F.rms_norm(x, x.shape, weight, model.eps)
            return F.layer_norm(x, x.shape, weight, bias, model.eps)

        def rotated(x, position=position):  # (h, d)
            if model.cos is None:
                return x
            return rotary.forward(x[None], model.cos, model.sin, position[None], model.interleaved)[0]

        for i, layer in enumerate(model.layers):
            qkv = F.linear(norm(x, layer.norm1, layer.norm1_bias), layer.qkv, layer.qkv_bias).view(-1, model.head_dim)
            q, k, v = qkv.split((model.heads, model.heads_kv, model.heads_kv))
            begin, end = starts[r], lengths[r]
            keys = torch.cat([caches[i][0, r, :, begin:end], rotated(k)[:, None]], 1)  # (h_kv, s, d)
            values = torch.cat([caches[i][1, r, :, begin:end], v[:, None]], 1)
            scale = model.scale / (i + 1) if model.scale_by_layer else model.scale
            out = F.scaled_dot_product_attention(
                rotated(q)[None, :, None], keys[None], values[None], scale=scale, enable_gqa=True
            )
            x = x + F.linear(out.flatten(), layer.project, layer.project_bias)
            y = norm(x, layer.norm2, layer.norm2_bias)
            up, activation = F.linear(y, layer.up, layer.up_bias), ACTIVATIONS[model.activation]
            hidden = activation(up) if layer.gate is None else activation(F.linear(y, layer.gate, layer.gate_bias)) * up
            x = x + F.linear(hidden, layer.down, layer.down_bias)
        rows.append(F.linear(norm(x, model.norm, model.norm_bias), model.head))
    return torch.stack(rows)


def assert_accurate(case, dtype, backend):
    arguments = case.make(dtype)
    logits, caches = step(backend, **arguments)
    golden, golden_caches = step("reference", **in_dtype(arguments, torch.float64))
    assert logits.dtype == torch.float32
    if case.quantized:
        # x is rounded to 8-bit integers, where a last digit may decide between two neighbours
        error = ((logits - golden).square().mean() / golden.square().mean()).sqrt()
        assert error < (2e-4 if dtype == torch.float32 else 3e-2), error
    else:
        low_precision = plain(**in_dtype(arguments, dtype))
        numerics.assert_as_accurate(logits, golden, low_precision.float(), "logits")
    # what 16 bits round between layers sends some integers to their neighbours
    near = 6e-2 if case.quantized and dtype != torch.float32 else 2e-2
    for cache, exact, before in zip(caches, golden_caches, arguments["caches"], strict=True):
        torch.testing.assert_close(cache, exact.to(dtype), rtol=near, atol=near)
        untouched = ~before.isnan()
        assert torch.equal(cache[untouched], before[untouched]), "what the cache held must stay"
        assert (cache[..., 0] != 0).sum() == untouched[..., 0].sum() + cache[:, :, :, 0, 0].numel(), "one token more"


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("case", cases.DECODE_STEP, ids=str)
def test_as_accurate_as_plain_torch(case, dtype, backend):
    assert_accurate(case, dtype, backend)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("case", SPLIT, ids=str)
def test_threads_do_not_change_the_bits(case, dtype, monkeypatch):
    arguments = case.make(dtype)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            found += [step(**arguments) for _ in range(3)]
    finally:
        torch.set_num_threads(before)
    for logits, caches in found[1:]:
        assert torch.equal(logits, found[0][0])
        assert all(map(torch.equal, caches, found[0][1]))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize(
    "name", ["45 rows", "7 rows, padded", "many keys, in shares", "deep enough for chunks", "int8", "int4"]
)
def test_batch_does_not_change_the_bits(name, dtype):
    arguments = CASE[name].make(dtype)
    together, caches = step(**arguments)
    for r in range(together.shape[0]):
        one = {k: arguments[k][r : r + 1] for k in ROWS}
        own = [cache[:, r : r + 1] for cache in arguments["caches"]]
        alone, own = step(**arguments | one | {"caches": own})
        assert torch.equal(alone[0], together[r])
        assert all(torch.equal(mine[:, 0], all_[:, r]) for mine, all_ in zip(own, caches, strict=True))


def test_padding_and_the_capacity_of_the_cache_change_nothing():
    arguments = CASE["one row"].make(torch.float32)
    expected, _ = step(**arguments)
    padded = [F.pad(cache, (0, 0, 9, 20), value=torch.nan) for cache in arguments["caches"]]
    moved = {"starts": arguments["starts"] + 9, "lengths": arguments["lengths"] + 9, "caches": padded}
    assert torch.equal(step(**arguments | moved)[0], expected)


def paged(arguments: dict, size: int) -> dict:
    """The same sequences, without their padding, in pages that lie in any order; what they do not hold is NaN."""
    starts, lengths = arguments["starts"], arguments["lengths"] - arguments["starts"]
    blocks = int(lengths.max()) // size + 1
    table = torch.randperm(lengths.numel() * blocks + 3, generator=torch.Generator().manual_seed(0))
    table = table[: lengths.numel() * blocks].view(-1, blocks)
    caches = []
    for cache in arguments["caches"]:
        pages = cache.new_full((2, int(table.max()) + 1, cache.shape[2], size, cache.shape[4]), torch.nan)
        for r, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
            slots = torch.arange(length)
            pages[:, table[r, slots // size], :, slots % size] = cache[:, r, :, start : start + length].permute(
                2, 0, 1, 3
            )
        caches.append(pages)
    unused = torch.arange(blocks) > lengths[:, None] // size
    table = table.masked_fill(unused, 10**6)
    return arguments | {"starts": torch.zeros_like(starts), "lengths": lengths, "caches": caches, "block_table": table}


@pytest.mark.parametrize("size", [1, 7, 16])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("name", ["7 rows, padded", "16 rows, ragged", "many keys, in shares", "as Llama", "int4"])
def test_pages_do_not_change_the_bits(name, dtype, size, backend):
    arguments = CASE[name].make(dtype)
    in_pages = paged(arguments, size)
    expected, caches = step(backend, **arguments)
    logits, pages = step(backend, **in_pages)
    if backend == "native":
        assert torch.equal(logits, expected)
    else:  # plain torch sums over all slots at once, and here there are others
        torch.testing.assert_close(logits, expected)
    moved = paged(arguments | {"caches": caches, "lengths": arguments["lengths"] + 1}, size)["caches"]
    for page, wanted in zip(pages, moved, strict=True):
        if page.shape == wanted.shape:
            torch.testing.assert_close(page, wanted.nan_to_num(0.0))


SEVERAL = ["7 rows, padded", "many keys, in shares", "deep enough for chunks", "as Llama", "int8", "int4"]


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("name", SEVERAL)
@pytest.mark.parametrize("in_pages", [False, True])
def test_tokens_of_a_sequence_at_once_have_the_bits_of_one_by_one(name, dtype, in_pages, backend):
    """Three more of every second sequence, one of the others, in any order of sequences; then those of some rows."""
    arguments = CASE[name].make(dtype)
    b = arguments["token_ids"].numel()
    if in_pages:
        arguments = paged(arguments, 8)
        # two pages more for each, of which one may be empty
        used, room = arguments["lengths"] // 8 + 1, torch.arange(2 * b).view(b, 2) + arguments["caches"][0].shape[1]
        table = F.pad(arguments["block_table"], (0, 2))
        table.scatter_(1, used[:, None] + torch.arange(2), room)
        arguments["block_table"] = table
        arguments["caches"] = [
            F.pad(cache, (0, 0, 0, 0, 0, 0, 0, 2 * b), value=torch.nan) for cache in arguments["caches"]
        ]
    counts = torch.tensor([3 if i % 2 == 0 else 1 for i in range(b)])
    order = torch.arange(b).flip(0)
    sequences = order.repeat_interleave(counts[order])
    new = torch.cat([torch.arange(n) for n in counts[order].tolist()])
    together = {
        "token_ids": (arguments["token_ids"][sequences] + 7 * new) % arguments["model"].tokens.shape[0],
        "position_ids": arguments["position_ids"][sequences] + new,
        "starts": arguments["starts"][sequences],
        "lengths": arguments["lengths"][sequences] + new,
    }
    logits, caches = step(backend, **arguments | together, sequences=sequences)
    one_by_one = [cache.clone() for cache in arguments["caches"]]
    for i in range(3):
        rows = (new == i).nonzero()[:, 0]
        at = {k: together[k][rows] for k in ROWS}
        alone = decode_step(**arguments | at | {"caches": one_by_one}, sequences=sequences[rows], backend=backend)
        if backend == "native":
            assert torch.equal(logits[rows], alone)
        else:
            torch.testing.assert_close(logits[rows], alone)
    for cache, wanted in zip(caches, one_by_one, strict=True):
        torch.testing.assert_close(cache, wanted.nan_to_num(0.0))
    wanted = torch.tensor([sequences.numel() - 1, 0])
    some, _ = step(backend, **arguments | together, sequences=sequences, logits_of=wanted)
    assert torch.equal(some, logits[wanted]) if backend == "native" else some.shape[0] == 2


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"block_table": torch.tensor([[3, 0]])}, ValueError, "block_table must lie between 0 and 2, got values from"),
        ({"block_table": torch.tensor([[-1, 0]])}, ValueError, "block_table must lie between 0 and 2, got values from"),
        ({"block_table": torch.tensor([[0.0, 1.0]])}, TypeError, "block_table must be int32 or int64"),
        ({"block_table": torch.tensor([0, 1])}, ValueError, r"block_table must be \(1, 0\), got \(2,\)"),
        ({"block_table": torch.tensor([[0, 1]] * 2)}, ValueError, r"block_table must be \(1, 2\), got \(2, 2\)"),
        ({"lengths": torch.tensor([16])}, ValueError, "lengths must lie between 0 and 15"),
        ({"starts": torch.tensor([1])}, ValueError, "starts must be 0 with a block_table"),
        ({"caches": [torch.zeros(2, 3, 3, 0, 16)] * 2}, ValueError, "a page of caches must hold a token or more"),
    ],
)
def test_bad_pages_are_named_errors(change, error, message, backend):
    arguments = CASE["one row"].make(torch.float32)
    arguments |= {"starts": torch.tensor([0]), "lengths": torch.tensor([9]), "block_table": torch.tensor([[2, 0]])}
    arguments["caches"] = [torch.zeros(2, 3, 3, 8, 16)] * 2
    assert step(backend, **arguments)[0].isfinite().all()
    with pytest.raises(error, match=message):
        decode_step(**arguments | change, backend=backend)


def test_more_threads_of_the_caller_at_once():
    """Each has a pool of its own, so there are more threads than cores, and some wait for others that do not run."""
    case = CASE["deep enough for chunks"]
    arguments = [case.make(torch.float32, seed) for seed in range(4)]
    expected = [step(**a) for a in arguments]
    found = [[] for _ in arguments]

    def work(i):
        torch.set_num_threads(3)
        for _ in range(20):
            found[i].append(step(**arguments[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(arguments))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for results, (logits, caches) in zip(found, expected, strict=True):
        assert len(results) == 20
        for other, other_caches in results:
            assert torch.equal(other, logits) and all(map(torch.equal, other_caches, caches))


def test_many_steps_in_a_row_are_what_one_forward_would_be():
    """The cache that steps fill, token by token, is the one that they read."""
    case = dataclasses.replace(CASE["first token"], layers=1)
    arguments = case.make(torch.float32)
    arguments["caches"] = [cache.clone() for cache in arguments["caches"]]
    golden = in_dtype(arguments, torch.float64)
    for position in range(5):
        places = {"position_ids": torch.tensor([position]), "lengths": torch.tensor([position])}
        logits = decode_step(**arguments | places, backend="native")
        exact = decode_step(**golden | places, backend="reference")
        torch.testing.assert_close(logits.double(), exact, rtol=1e-4, atol=1e-5)


def test_a_row_that_is_not_finite_spoils_no_other():
    arguments = CASE["7 rows, padded"].make(torch.float32)
    expected, _ = step(**arguments)
    cache = arguments["caches"][0]
    cache[0, 2, :, arguments["starts"][2] :] = torch.inf
    cache[0, 3, 0, 9 - 1] = torch.nan
    logits, _ = step(**arguments)
    clean = torch.tensor([0, 1, 4, 5, 6])
    assert logits[3].isnan().all()
    assert torch.equal(logits[clean], expected[clean])


def test_opcheck():
    for name in ("7 rows, padded", "as Llama", "int4"):
        arguments = CASE[name].make(torch.float32)
        model = arguments["model"]
        weights, vectors = model.packed
        caches = [cache.nan_to_num(0.0) for cache in arguments["caches"]]
        torch.library.opcheck(
            torch.ops.lmkernels.decode_step.default,
            (
                *(arguments[k] for k in ROWS), caches, None, None, None, weights, vectors, *model.tables,
                *model.tokens.shape, model.layers[0].up.shape[0], model.heads, model.eps, model.rms, 2, model.gated,
                model.scale, False, False,
            ),
        )  # fmt: skip


def bad(**changes):
    return lambda a: a | changes


def changed_model(**changes):
    return lambda a: a | {"model": dataclasses.replace(a["model"], **changes)}


def first_layer(**changes):
    def change(a):
        first, *rest = a["model"].layers
        layers = (dataclasses.replace(first, **changes), *rest)
        return a | {"model": dataclasses.replace(a["model"], layers=layers)}

    return change


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (bad(token_ids=torch.tensor([75])), ValueError, "token_ids must lie between 0 and 74, got values from 75"),
        (bad(token_ids=torch.tensor([-1])), ValueError, "token_ids must lie between 0 and 74, got values from -1"),
        (bad(position_ids=torch.tensor([22])), ValueError, "position_ids must lie between 0 and 21"),
        (bad(lengths=torch.tensor([22])), ValueError, "lengths must lie between 0 and 21"),
        (bad(starts=torch.tensor([18])), ValueError, "starts must not lie beyond lengths"),
        (bad(starts=torch.tensor([-1])), ValueError, "starts must lie between 0 and 21"),
        (bad(lengths=torch.tensor([1, 2])), ValueError, r"lengths must be \(1,\), got \(2,\)"),
        (bad(lengths=torch.tensor([1.0])), TypeError, "lengths must be int32 or int64"),
        (bad(lengths=torch.tensor([1], dtype=torch.int32)), TypeError, "lengths must be int64"),
        (bad(sequences=torch.tensor([1])), ValueError, "sequences must lie between 0 and 0, got values from 1"),
        (bad(sequences=torch.tensor([0, 0])), ValueError, r"sequences must be \(1,\), got \(2,\)"),
        (bad(sequences=torch.tensor([0], dtype=torch.int32)), TypeError, "sequences must be int64"),
        (bad(sequences=[0]), TypeError, "sequences must be a torch.Tensor, got list"),
        (bad(logits_of=torch.tensor([1])), ValueError, "logits_of must lie between 0 and 0, got values from 1"),
        (bad(logits_of=torch.tensor([], dtype=torch.int64)), ValueError, "logits_of must name a row or more, got none"),
        (bad(logits_of=torch.tensor([[0]])), ValueError, r"logits_of must be \(1,\), got \(1, 1\)"),
        (bad(caches=[]), ValueError, "caches must hold one tensor per layer, 2, got 0"),
        (bad(caches=[torch.zeros(2, 1, 3, 9, 15)] * 2), ValueError, "caches must be .*d = 16, all alike, got"),
        (bad(caches=[torch.zeros(2, 0, 3, 9, 16)] * 2), ValueError, "caches must be .*b >= 1"),
        (bad(model=None), TypeError, "model must be a StepModel, got NoneType"),
        (changed_model(layers=()), ValueError, "layers must hold a layer or more"),
        (changed_model(heads=0), ValueError, "heads must be a positive whole number, got 0"),
        (changed_model(heads=5), ValueError, r"project must be \(d_model, h d\) with h = 5"),
        (changed_model(activation="softmax"), ValueError, "activation must be one of"),
        (changed_model(head=torch.zeros(74, 48)), ValueError, r"head must be \(vocab, d_model\) = \(75, 48\)"),
        (changed_model(positions=torch.zeros(9, 47)), ValueError, "positions must be"),
        (changed_model(cos=torch.zeros(9, 8)), ValueError, "cos must be given with sin"),
        (changed_model(cos=torch.zeros(9, 9), sin=torch.zeros(9, 9)), ValueError, "cos and sin must be"),
        (first_layer(qkv=torch.zeros(145, 48)), ValueError, "qkv must be"),
        (first_layer(down=torch.zeros(48, 99)), ValueError, r"down of layer 0 must be \(48, 100\), got \(48, 99\)"),
        (first_layer(up_bias=torch.zeros(99)), ValueError, r"up_bias of layer 0 must be \(100,\), got \(99,\)"),
        (first_layer(gate=torch.zeros(100, 48)), ValueError, "gate must be given in every layer or in none"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named_errors(change, error, message, backend):
    arguments = CASE["one row"].make(torch.float32)
    with pytest.raises(error, match=message):
        decode_step(**change(arguments), backend=backend)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed_model(positions=torch.zeros(22, 48).bfloat16()), "weights must have the dtype of the caches"),
        (first_layer(up=torch.zeros(100, 96)[:, ::2]), "weights must be dense along an axis"),
        (changed_model(head=torch.zeros(48, 75).t()), "head must have a contiguous last axis"),
    ],
)  # fmt: skip
def test_what_the_kernels_cannot_read_is_refused_with_its_reason(change, message):
    arguments = change(CASE["one row"].make(torch.float32))
    with pytest.raises(NotImplementedError, match=message):
        decode_step(**arguments, backend="native")
    assert decode_step(**arguments).shape == (1, 75), "the reference takes it"


def test_float64_is_the_references_own():
    arguments = in_dtype(CASE["one row"].make(torch.float32), torch.float64)
    with pytest.raises(NotImplementedError, match="dtype torch.float64"):
        decode_step(**arguments, backend="native")
    assert decode_step(**arguments).dtype == torch.float64


def test_weights_are_read_where_they_lie_and_counted():
    arguments = CASE["one row"].make(torch.float32)
    model = arguments["model"]
    before, _ = step(**arguments)
    assert model.packed[0][2].data_ptr() == model.layers[0].qkv.data_ptr()
    model.layers[0].qkv.mul_(2)
    assert not torch.equal(step(**arguments)[0], before)
    held = [model.tokens, *(w for layer in model.layers for w in layer.weights())]
    assert model.nbytes == 4 * sum(w.numel() for w in held)


def test_a_quantised_table_gives_the_rows_that_it_stands_for():
    for kind in ("int8", "int4"):
        arguments = CASE[kind].make(torch.float32)
        model = arguments["model"]
        dense = dataclasses.replace(model, tokens=model.tokens.dequantize())
        assert torch.equal(step(**arguments)[0], step(**arguments | {"model": dense})[0])


def test_mixed_weights():
    """Quantised layers under a table and a head that are not."""
    arguments = CASE["one row"].make(torch.float32)
    model = arguments["model"]
    layers = tuple(dataclasses.replace(layer, up=quantize_weight(layer.up, "int8")) for layer in model.layers)
    mixed = arguments | {"model": dataclasses.replace(model, layers=layers)}
    logits, _ = step(**mixed)
    golden, _ = step("reference", **in_dtype(mixed, torch.float64))
    torch.testing.assert_close(logits.double(), golden, rtol=1e-3, atol=1e-3)


def test_the_model_can_be_copied():
    model = CASE["int4 as Llama"].make(torch.float32)["model"]
    assert model.packed and copy.copy(model).nbytes == model.nbytes
