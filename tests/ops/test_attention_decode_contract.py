"""attention_decode: what it writes and reads, bad arguments, and how it behaves inside torch."""

from __future__ import annotations

import copy

import pytest
import torch

from lmkernels import attention_decode, rotary
from lmkernels.ops.attention_decode import native as native_ops
from lmkernels.ops.attention_decode.reference import quantise
from lmkernels.testing import cases

NATIVE_ON_CUDA = True
INTERPRETED = r"(only_the_new_rows.*triton-.*-False|nothing|without_new|counts_as|never_looked|finite|empty|no_pages).*"
CASE = {case.name: case for case in cases.DECODE}
EVERYTHING = CASE["everything at once"]
NAN = float("nan")
op = torch.ops.lmkernels.attention_decode


# --- what is written ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8], ids=str)
@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("page", [None, 4])
def test_only_the_new_rows_of_the_caches_change_and_they_hold_the_new_tokens(dtype, rotated, page, backend):
    """The caches are slices of larger tensors, of which every other element keeps its bits."""
    b, s_new, h_kv, d, capacity = 3, 5, 2, 24, 40
    wide = torch.float32 if dtype == torch.int8 else dtype
    outer, length = (b, capacity) if page is None else (b * capacity // page, page)
    table = None if page is None else torch.randperm(outer).view(b, -1).int()
    whole = [torch.randint(-99, 99, (outer, h_kv + 2, length + 3, d + 7)).to(dtype) for _ in "kv"]
    caches = [x[:, 1:-1, 2:-1, 3:-4].transpose(1, 2) for x in whole]
    scales = [torch.rand(outer, length, h_kv) for _ in "kv"]
    new = [torch.randn(b, s_new, h_kv, d).to(wide) for _ in "kv"]
    lengths = torch.tensor([0, 7, capacity - s_new])
    arguments = {"block_table": table, "backend": backend}
    if dtype == torch.int8:
        arguments |= {"k_scale": scales[0], "v_scale": scales[1]}
    positions = lengths[:, None] + torch.arange(s_new)  # (b, s_new)
    rows = [x.clone() for x in new]
    if rotated:
        arguments |= {"cos": torch.randn(capacity, 5).to(wide), "sin": torch.randn(capacity, 5).to(wide)}
        rows[0] = rotary(new[0], arguments["cos"], arguments["sin"], positions=positions, backend=backend)
    where = (torch.arange(b)[:, None].expand_as(positions), positions)
    if page is not None:
        where = table.long().gather(1, positions // page), positions % page
    expected, expected_scales = [x.clone() for x in whole], [x.clone() for x in scales]
    for target, scale, x in zip(expected, expected_scales, rows, strict=True):
        if dtype == torch.int8:
            x, scale[where] = quantise(x)
        target[:, 1:-1, 2:-1, 3:-4].transpose(1, 2)[where] = x

    q = torch.randn(b, 1, 4, d).to(wide)
    attention_decode(q, *caches, lengths, k_new=new[0], v_new=new[1], **arguments)
    for actual, wanted in zip(whole + scales, expected + expected_scales, strict=True):
        assert torch.equal(actual, wanted)


def test_nothing_but_the_caches_is_modified(backend):
    arguments = EVERYTHING.make(torch.float32)
    before = copy.deepcopy(arguments)
    attention_decode(**arguments, backend=backend)
    for name, x in before.items():
        if isinstance(x, torch.Tensor) and name not in ("k_cache", "v_cache"):
            assert torch.equal(arguments[name], x), name


def test_without_new_tokens_nothing_is_written(backend):
    arguments = CASE["rotary of the queries alone"].make(torch.float32)
    before, versions = copy.deepcopy(arguments), [arguments[name]._version for name in ("k_cache", "v_cache")]
    attention_decode(**arguments, backend=backend)
    for name, version in zip(("k_cache", "v_cache"), versions, strict=True):
        assert torch.equal(arguments[name].nan_to_num(), before[name].nan_to_num())
        assert arguments[name]._version == version


def test_writing_counts_as_a_modification_for_autograd(backend):
    arguments = CASE["short"].make(torch.float32)
    x = torch.ones_like(arguments["k_cache"], requires_grad=True)
    product = (x * arguments["k_cache"]).sum()
    with torch.no_grad():
        attention_decode(**arguments, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


# --- what is read ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8], ids=str)
def test_pages_before_the_window_and_behind_the_end_are_never_looked_at(dtype, backend):
    b, h, d, page, length, left = 2, 2, 16, 4, 200, 50
    wide = torch.float32 if dtype == torch.int8 else dtype
    lengths = torch.tensor([length, 70])
    caches = [torch.randn(2 * length // page, page, h, d).to(wide) for _ in "kv"]
    table = torch.arange(2 * length // page).view(2, -1).int()
    arguments = {"block_table": table, "window": (left, 0), "backend": backend}
    if dtype == torch.int8:
        (caches[0], k_scale), (caches[1], v_scale) = quantise(caches[0]), quantise(caches[1])
        arguments |= {"k_scale": k_scale, "v_scale": v_scale}
    q = torch.randn(b, 1, h, d).to(wide)
    expected = attention_decode(q, *caches, lengths, **arguments)
    gone = table.clone()
    for row, n in enumerate(lengths.tolist()):
        first, last = (n - 1 - left) // page, (n - 1) // page
        for block in range(table.shape[1]):
            if not first <= block <= last:
                gone[row, block] = 0
    used = set(gone[gone > 0].tolist())
    for number in range(2 * length // page):
        if number not in used:
            for x in (*caches, *(arguments.get(name) for name in ("k_scale", "v_scale"))):
                if x is not None and x.is_floating_point():
                    x[number] = NAN
    gone[gone == 0] = -1
    actual = attention_decode(q, *caches, lengths, **arguments | {"block_table": gone})
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_query_that_is_not_finite_spoils_its_own_row_and_no_other(dtype, backend):
    arguments = CASE["eight queries"].make(dtype)
    clean = attention_decode(**copy.deepcopy(arguments), backend=backend)
    arguments["q"][1, 3, 5, 7] = NAN
    out = attention_decode(**arguments, backend=backend)
    spoilt = torch.zeros(clean.shape[:3], dtype=torch.bool)
    spoilt[1, 3, 5] = True
    assert out[spoilt].isnan().all() and torch.equal(out[~spoilt], clean[~spoilt])


def test_lengths_and_pages_out_of_range_are_clamped_by_the_kernels(compiled):
    """The op itself, as torch.compile calls it: results are meaningless, memory is safe."""
    k, v = torch.randn(6, 4, 2, 8), torch.randn(6, 4, 2, 8)
    q, new = torch.randn(3, 2, 4, 8), torch.randn(3, 2, 2, 8)
    table = torch.tensor([[0, 2**31 - 1], [-(2**31), -1], [5, 6]], dtype=torch.int32)
    cos = torch.randn(3, 4)
    for lengths in (torch.tensor([-5, 2**40, 7]), torch.tensor([2**31 - 1, -(2**31), 3], dtype=torch.int32)):
        for arguments in ((new, new, cos, cos), (None,) * 4):
            out, _ = native_ops.forward(
                q, k, v, lengths, *arguments, False, table, 0.3, 0.0, -1, None, None, None, None
            )
            assert out.isfinite().all()


# --- empty sizes ---


@pytest.mark.parametrize("empty", ["b", "s_q", "s_new", "h", "capacity"])
def test_empty_sizes(empty, backend):
    sizes = {"b": 2, "s_q": 1, "s_new": 1, "h": 4, "capacity": 8} | {empty: 0}
    b, s_q, s_new, h, capacity = sizes.values()
    s_new = min(s_new, capacity)
    h_kv = h // 2
    k, v = torch.full((b, capacity, h_kv, 8), NAN), torch.full((b, capacity, h_kv, 6), NAN)
    new = torch.randn(b, s_new, h_kv, 8)
    q = torch.randn(b, s_q, h, 8)
    lengths = torch.zeros(b, dtype=torch.int64)
    out, lse = attention_decode(q, k, v, lengths, k_new=new, v_new=new[..., :6], return_lse=True, backend=backend)
    assert out.shape == (b, s_q, h, 6) and lse.shape == (b, h, s_q)
    if s_new == 0:
        assert (out == 0).all() and (lse == float("-inf")).all()
    else:
        assert torch.equal(k[:, 0], new[:, 0]) and torch.equal(v[:, 0], new[:, 0, :, :6])


def test_no_pages_at_all(backend):
    k = torch.empty(0, 4, 2, 8)
    for columns in (0, 2):
        table = torch.full((2, columns), -1, dtype=torch.int32)
        out = attention_decode(
            torch.randn(2, 1, 4, 8), k, k, torch.zeros(2, dtype=torch.int32), block_table=table, backend=backend
        )
        assert (out == 0).all()


# --- bad arguments ---

B, H, H_KV, D, LENGTH = 2, 4, 2, 8, 16


def good() -> dict:
    return {
        "q": torch.zeros(B, 1, H, D),
        "k_cache": torch.zeros(B, LENGTH, H_KV, D),
        "v_cache": torch.zeros(B, LENGTH, H_KV, D),
        "kv_lengths": torch.tensor([3, 5]),
        "k_new": torch.ones(B, 1, H_KV, D),
        "v_new": torch.ones(B, 1, H_KV, D),
    }


PAGED = {"k_cache": torch.zeros(8, 4, H_KV, D), "v_cache": torch.zeros(8, 4, H_KV, D)}
TABLE = torch.arange(8, dtype=torch.int32).view(2, 4)
INT8 = {
    "k_cache": torch.zeros(B, LENGTH, H_KV, D, dtype=torch.int8),
    "v_cache": torch.zeros(B, LENGTH, H_KV, D, dtype=torch.int8),
    "k_scale": torch.zeros(B, LENGTH, H_KV),
    "v_scale": torch.zeros(B, LENGTH, H_KV),
}


def table_with(value: int, at: tuple[int, int]) -> torch.Tensor:
    table = TABLE.clone()
    table[at] = value
    return table


BAD = {
    "list for q": ({"q": [1.0]}, TypeError, "q must be a torch.Tensor, got list"),
    "q of 3 axes": ({"q": torch.zeros(B, H, D)}, ValueError, r"q must have 4 axes, got \(2, 4, 8\)"),
    "integer q": (
        {"q": torch.zeros(B, 1, H, D, dtype=torch.int32)},
        TypeError,
        "q must be float32, .*torch.int32",
    ),
    "cache in another dtype": (
        {"k_cache": torch.zeros(B, LENGTH, H_KV, D, dtype=torch.bfloat16)},
        TypeError,
        "k_cache must be torch.float32, as q is, or int8 .*, got torch.bfloat16",
    ),
    "one cache in int8": ({"v_cache": INT8["v_cache"]}, TypeError, "v_cache must be torch.float32.* got torch.int8"),
    "float values beside int8": (
        INT8 | {"v_cache": torch.zeros(B, LENGTH, H_KV, D)},
        TypeError,
        "v_cache must be int8",
    ),
    "cache elsewhere": (
        {"v_cache": torch.zeros(B, LENGTH, H_KV, D, device="meta")},
        ValueError,
        f"v_cache must be on q's device {torch.empty(0).device}, got meta",
    ),
    "strided last axis": (
        {"k_cache": torch.zeros(B, LENGTH, D, H_KV).transpose(2, 3)},
        ValueError,
        "k_cache must be contiguous in its last axis",
    ),
    "head sizes differ": (
        {"k_cache": torch.zeros(B, LENGTH, H_KV, 7)},
        ValueError,
        "must have q's head size 8",
    ),
    "head size 0": (
        {"q": torch.zeros(B, 1, H, 0), "k_cache": torch.zeros(B, LENGTH, H_KV, 0)},
        ValueError,
        "head sizes must be at least 1",
    ),
    "caches of two lengths": (
        {"v_cache": torch.zeros(B, 9, H_KV, D)},
        ValueError,
        r"v_cache must have k_cache's first three axes, got \(2, 9, 2, 8\)",
    ),
    "batch sizes differ": (
        {"k_cache": torch.zeros(3, LENGTH, H_KV, D), "v_cache": torch.zeros(3, LENGTH, H_KV, D)},
        ValueError,
        "k_cache and v_cache must have q's batch size 2",
    ),
    "heads that do not divide": (
        {"q": torch.zeros(B, 1, 3, D)},
        ValueError,
        "number of heads of q must be a multiple of the cache's, got 3 and 2",
    ),
    "list for lengths": ({"kv_lengths": [3, 5]}, TypeError, "kv_lengths must be a torch.Tensor, got list"),
    "float lengths": ({"kv_lengths": torch.tensor([3.0, 5.0])}, TypeError, "kv_lengths must be int32 or int64"),
    "one length": ({"kv_lengths": torch.tensor([3])}, ValueError, r"kv_lengths must be \(b,\) = \(2,\), got \(1,\)"),
    "negative length": (
        {"kv_lengths": torch.tensor([3, -1])},
        ValueError,
        "kv_lengths must lie between 0 and .* 16 - s_new = 15, got values from -1 to 3",
    ),
    "a full cache": ({"kv_lengths": torch.tensor([3, 16])}, ValueError, "16 - s_new = 15, got values from 3 to 16"),
    "beyond the cache": (
        {"kv_lengths": torch.tensor([3, 17]), "k_new": None, "v_new": None},
        ValueError,
        "room for a sequence, 16, got values from 3 to 17",
    ),
    "more tokens than room": (
        {"k_new": torch.zeros(B, 17, H_KV, D), "v_new": torch.zeros(B, 17, H_KV, D)},
        ValueError,
        "k_new holds 17 tokens, and a sequence of the cache has room for 16",
    ),
    "k_new alone": ({"v_new": None}, ValueError, "v_new must be given with k_new"),
    "v_new alone": ({"k_new": None}, ValueError, "k_new must be given with v_new"),
    "k_new in another dtype": (
        {"k_new": torch.zeros(B, 1, H_KV, D).double()},
        TypeError,
        "k_new must have q's dtype torch.float32, got torch.float64",
    ),
    "k_new of other heads": (
        {"k_new": torch.zeros(B, 1, H, D)},
        ValueError,
        r"k_new must be \(b, s_new, h_kv, d\) with b = 2, h_kv = 2, d = 8, got \(2, 1, 4, 8\)",
    ),
    "v_new of another length": ({"v_new": torch.zeros(B, 2, H_KV, D)}, ValueError, "v_new must have k_new's 1 tokens"),
    "expanded cache": (
        {"k_cache": torch.zeros(1, LENGTH, H_KV, D).expand(B, -1, -1, -1)},
        ValueError,
        "k_cache must not be expanded",
    ),
    "cos alone": ({"cos": torch.zeros(16, 4)}, ValueError, "sin must be given with cos"),
    "cos too wide": (
        {"cos": torch.zeros(16, 5), "sin": torch.zeros(16, 5)},
        ValueError,
        r"cos must be \(max_pos, d_rot / 2\) with d_rot / 2 from 1 to 4, got \(16, 5\)",
    ),
    "sin of another shape": ({"cos": torch.zeros(16, 4), "sin": torch.zeros(16, 3)}, ValueError, "sin must have cos'"),
    "cos in float64": ({"cos": torch.zeros(16, 4).double(), "sin": torch.zeros(16, 4)}, TypeError, "cos must be"),
    "cos too short": (
        {"cos": torch.zeros(5, 4), "sin": torch.zeros(5, 4)},
        ValueError,
        r"cos and sin must have a row per position, 6 or more, got \(5, 4\)",
    ),
    "window of one": ({"window": (3,)}, ValueError, "window must be two integers"),
    "scale nan": ({"scale": NAN}, ValueError, "scale must be a finite number"),
    "softcap negative": ({"softcap": -1.0}, ValueError, "softcap must be a finite number >= 0"),
    "slopes of another length": ({"alibi_slopes": torch.zeros(3)}, ValueError, r"alibi_slopes must be \(h,\)"),
    "sink of another length": ({"sink": torch.zeros(3)}, ValueError, r"sink must be \(h,\) = \(4,\), got \(3,\)"),
    "float table": (PAGED | {"block_table": TABLE.float()}, TypeError, "block_table must be int32 or int64"),
    "table of one sequence": (PAGED | {"block_table": TABLE[:1]}, ValueError, r"block_table must be \(b, max_blocks\)"),
    "page -1": (
        PAGED | {"block_table": table_with(-1, (1, 0))},
        ValueError,
        r"page numbers from 0 to 7 for the 6 tokens of sequence 1, got -1 at \[1, 0\]",
    ),
    "page 8": (PAGED | {"block_table": table_with(8, (1, 1))}, ValueError, r"got 8 at \[1, 1\]"),
    "page beyond 32 bits": (
        PAGED | {"block_table": table_with(0, (0, 0)).long() + 2**32},
        ValueError,
        "block_table must hold page numbers",
    ),
    "one page for two": (
        PAGED | {"block_table": table_with(0, (1, 0)), "kv_lengths": torch.tensor([3, 3])},
        ValueError,
        "block_table must give each sequence pages of its own",
    ),
    "beyond the pages": (
        PAGED | {"block_table": TABLE[:, :1]},
        ValueError,
        "kv_lengths must lie between 0 and .* 4 - s_new = 3, got values from 3 to 5",
    ),
    "int8 without scales": (INT8 | {"v_scale": None}, ValueError, r"v_scale must be given .* float32 \(2, 16, 2\)"),
    "scales without int8": ({"k_scale": INT8["k_scale"]}, ValueError, "k_scale must be None: it belongs to .* int8"),
    "scales in bfloat16": (INT8 | {"k_scale": INT8["k_scale"].bfloat16()}, TypeError, "k_scale must be float32"),
    "scales of another shape": (INT8 | {"k_scale": torch.zeros(B, LENGTH)}, ValueError, "k_scale must be .* per row"),
    "int8 in float64": (
        INT8 | {"q": torch.zeros(B, 1, H, D).double()},
        TypeError,
        "q must be .* with a cache",
    ),
    "gradient of q": ({"q": torch.zeros(B, 1, H, D, requires_grad=True)}, ValueError, "gives no gradient"),
    "gradient of the sink": ({"sink": torch.zeros(H, requires_grad=True)}, ValueError, "gives no gradient"),
    "unknown backend": ({"backend": "cuda"}, ValueError, "backend must be one of native, triton, reference or None"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_argument_is_named_before_anything_is_written(name, backend):
    change, kind, text = BAD[name]
    arguments = good() | {"backend": backend} | copy.deepcopy(change)
    caches = [arguments[cache] for cache in ("k_cache", "v_cache")]
    with pytest.raises(kind, match=text):
        attention_decode(**arguments)
    assert all((cache == 0).all() for cache in caches if not cache.is_meta)


def test_the_good_arguments_are_good(backend):
    for change in ({}, PAGED | {"block_table": TABLE}, PAGED | {"block_table": TABLE.long()}, INT8):
        attention_decode(**good() | copy.deepcopy(change), backend=backend)


def test_head_sizes_beyond_the_kernels_go_to_the_reference(native):
    q, cache = torch.randn(1, 1, 1, 300), torch.randn(1, 4, 1, 300)
    attention_decode(q, cache, cache.clone(), torch.tensor([3]))
    with pytest.raises(NotImplementedError, match="head sizes go up to 256"):
        attention_decode(q, cache, cache.clone(), torch.tensor([3]), backend=native)


# --- inside torch ---


def op_arguments(case: cases.DecodeCase, int8: bool = False) -> tuple:
    x = case.make(torch.float32)
    scales = (None, None)
    if int8:
        (x["k_cache"], k_scale), (x["v_cache"], v_scale) = quantise(x["k_cache"]), quantise(x["v_cache"])
        scales = k_scale.nan_to_num(), v_scale.nan_to_num()
    else:
        x["k_cache"].nan_to_num_(), x["v_cache"].nan_to_num_()
    return (
        *(x.get(name) for name in ("q", "k_cache", "v_cache", "kv_lengths", "k_new", "v_new", "cos", "sin")),
        case.interleaved,
        x.get("block_table"),
        case.scale or 0.1,
        case.softcap,
        case.window[0],
        x.get("alibi_slopes"),
        x.get("sink"),
        *scales,
    )


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("name", ["short", "one key in the cache", "several shares", "a prompt", "everything at once"])
def test_the_op_passes_opcheck(name, int8, native):
    torch.library.opcheck(op.default, op_arguments(CASE[name], int8))


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("name", ["several shares", "everything at once", "one key in the cache"])
def test_a_compiled_call_has_no_graph_break_and_the_same_results_and_caches(name, backend, fresh_compiler):
    arguments = CASE[name].make(torch.float32)
    for cache in ("k_cache", "v_cache"):
        arguments[cache].nan_to_num_()
    expected_arguments = copy.deepcopy(arguments)
    inductor = "inductor" if backend == "native" else "aot_eager"
    compiled = torch.compile(attention_decode, fullgraph=True, backend=inductor)
    actual = compiled(**arguments, return_lse=True, backend=backend)
    expected = attention_decode(**expected_arguments, return_lse=True, backend=backend)
    tolerance = 0 if backend == "native" else 1e-5
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    for cache in ("k_cache", "v_cache"):
        torch.testing.assert_close(arguments[cache], expected_arguments[cache], rtol=tolerance, atol=tolerance)


def test_a_model_around_it_compiles_and_dynamic_lengths_compile_once(native, fresh_compiler):
    """Two layers, each with keys and values of its own."""

    def model(x, w, buffers, lengths):
        for keys, values in buffers:
            q, k, v = (x @ w).unflatten(-1, (3, 4, 16)).unbind(2)  # (b, 1, 4, 16)
            keys, values = keys.transpose(1, 2), values.transpose(1, 2)
            x = x + attention_decode(q, keys, values, lengths, k_new=k, v_new=v, backend=native).flatten(2)
        return x.relu()

    compiled = torch.compile(model, fullgraph=True, dynamic=True)

    def run(b, capacity):
        x, w = torch.randn(b, 1, 64), torch.randn(64, 192) / 8
        filled, expected = (
            [[torch.zeros(b, 4, capacity, 16) for _ in "kv"] for _ in range(2)] for _ in ("compiled", "eager")
        )
        for step in range(3):
            lengths = torch.full((b,), step)
            torch.testing.assert_close(compiled(x, w, filled, lengths), model(x, w, expected, lengths))
            torch.testing.assert_close(filled, expected)
            for cache in (cache for layer in filled for cache in layer):
                assert (cache[:, :, step] != 0).all() and (cache[:, :, step + 1] == 0).all()

    run(2, 40)
    with torch.compiler.set_stance("fail_on_recompile"):
        run(3, 55)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast_the_rest_takes_the_dtype_of_the_cache(dtype, backend):
    arguments = CASE["several shares"].make(torch.float32)
    narrow = {
        name: x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for name, x in arguments.items()
    }
    mixed = arguments | {name: narrow[name].clone() for name in ("k_cache", "v_cache")}
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        actual = attention_decode(**mixed, backend=backend)
    expected = attention_decode(**narrow, backend=backend)
    assert actual.dtype == dtype and torch.equal(actual, expected)
    assert torch.equal(mixed["k_cache"].nan_to_num(), narrow["k_cache"].nan_to_num())


def test_inference_mode_and_no_grad(backend):
    arguments = CASE["short"].make(torch.float32)
    expected = attention_decode(**copy.deepcopy(arguments), backend=backend)
    leaf = arguments | {"q": arguments["q"].clone().requires_grad_()}
    with torch.no_grad():
        out = attention_decode(**copy.deepcopy(leaf), backend=backend)
        assert not out.requires_grad and torch.equal(out, expected)
    with torch.inference_mode():
        fresh = {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
        assert torch.equal(attention_decode(**fresh, backend=backend), expected)
