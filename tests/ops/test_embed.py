"""embed: accuracy, gradients and their bits, the contract with torch."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from lmkernels import embed
from lmkernels.testing import cases, numerics

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
INTERPRETED = r"^(?!.*(compiled|GPT-2|places-float32|BERT,|-float16|-float64)).*triton"
ON_EVERY_ISA = r"(?=.*native).*(accurate|gradcheck|beyond)"
CASE = {case.name: case for case in cases.EMBED}
NAMES = ("token_ids", "token_table", "positions", "position_table", "type_ids", "type_table")


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def definition(**arguments):
    return embed(**arguments, backend="reference")


def plain(token_ids, token_table, position_table=None, positions=None, type_ids=None, type_table=None):
    """The sum of torch's embeddings, as GPT-2 and BERT are written."""
    out = F.embedding(token_ids, token_table)
    if position_table is not None:
        positions = torch.arange(token_ids.shape[-1]) if positions is None else positions
        out = out + F.embedding(positions, position_table).to(out.dtype)
    if type_table is not None:
        type_ids = torch.zeros_like(token_ids) if type_ids is None else type_ids
        out = out + F.embedding(type_ids, type_table).to(out.dtype)
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("case", cases.EMBED, ids=str)
def test_results_and_gradients_are_as_accurate_as_plain_torch(case, dtype, backend):
    inputs, tables = case.make(dtype)

    def function(**arguments):
        out = embed(**arguments, backend=backend)
        assert out.dtype == dtype and out.is_contiguous()
        return out

    numerics.assert_op_as_accurate(function, definition, plain, inputs, tables, dtype=dtype)


def test_the_sum_is_rounded_once(backend):
    """bfloat16: 1 + 2^-8 + 2^-8 is exact in the sum and lost where each step is rounded."""
    one, small = torch.ones(1, 8, dtype=torch.bfloat16), torch.full((1, 8), 2.0**-8, dtype=torch.bfloat16)
    ids = torch.zeros(1, dtype=torch.int64)
    out = embed(ids, one, position_table=small, type_table=small, type_ids=ids, backend=backend)
    assert torch.equal(out, torch.full_like(one, 1 + 2.0**-7))


@pytest.mark.parametrize("case", ["BERT", "packed", "positions of each token"])
def test_gradcheck_to_the_second_order(case, backend):
    inputs, tables = replace(CASE[case], s=3, d=2, vocab=4).make(torch.float64)

    def function(*tables_):
        return embed(**inputs | dict(zip(tables, tables_, strict=True)), backend=backend)

    leaves = [inputs[name].requires_grad_() for name in tables]
    torch.autograd.gradcheck(function, leaves)
    torch.autograd.gradgradcheck(function, leaves)
    # the second derivative in another dtype than the first's: of a float32 table beside 16 bits
    wide, ids = torch.randn(3, 2, requires_grad=True), torch.tensor([0, 2, 2])
    narrow = torch.randn(3, 2, dtype=torch.bfloat16, requires_grad=True)
    dout = torch.randn(3, 2, dtype=torch.bfloat16, requires_grad=True)
    out = embed(ids, narrow, position_table=wide, backend=backend)
    (dwide,) = torch.autograd.grad(out, wide, dout, create_graph=True)
    (ddout,) = torch.autograd.grad(dwide, dout, torch.ones_like(dwide))
    assert ddout.dtype == torch.bfloat16 and torch.equal(ddout, torch.ones_like(ddout))


def test_gradients_are_exact_sums_in_the_order_of_the_tokens(native):
    inputs, tables = CASE["one token in many places"].make(torch.float32)
    table = inputs["token_table"].requires_grad_()
    dout = torch.randn(4, 200, 136)
    (dtable,) = torch.autograd.grad(embed(**inputs, backend=native), table, dout)
    expected = torch.zeros_like(table)
    for token, row in zip(inputs["token_ids"].flatten().tolist(), dout.flatten(0, 1), strict=True):
        expected[token] += row
    assert torch.equal(dtable, expected)


def test_results_depend_neither_on_threads_nor_on_the_batch(native):
    inputs, tables = CASE["one token in many places"].make(torch.float32)
    dout = torch.randn(4, 200, 136)

    def run():
        leaves = {name: inputs[name].detach().requires_grad_() for name in tables}
        out = embed(**inputs | leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves.values(), dout)]

    expected = run()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert all(map(torch.equal, run(), expected))
    finally:
        torch.set_num_threads(threads)
    alone = embed(**inputs | {"token_ids": inputs["token_ids"][2:3]})
    assert torch.equal(alone, expected[0][2:3])


def test_the_gradient_of_a_large_table_is_like_any_tensor(native):
    """It lives in memory of its own: views outlive it, in-place operations and copies work, it can be accumulated."""
    table = torch.randn(20000, 128, requires_grad=True)  # 10 MB
    ids = torch.tensor([[5, 19999, 5]])
    for _ in range(2):
        embed(ids, table, backend=native).sum().backward()
    expected = torch.zeros(20000, 128)
    expected[5], expected[19999] = 4.0, 2.0
    assert torch.equal(table.grad, expected)
    table.grad.mul_(2).add_(1)
    view = table.grad[19990:].t()
    copy, table.grad = table.grad.clone(), None
    assert torch.equal(view, (expected * 2 + 1)[19990:].t()) and torch.equal(copy, expected * 2 + 1)
    small = torch.randn(20000, 128, dtype=torch.float64, requires_grad=True)
    embed(ids, small, backend=native).sum().backward()
    assert torch.equal(small.grad, expected.double() / 2)


def test_a_table_may_change_before_the_backward(backend):
    """As with torch's embedding: the gradient does not read it."""
    if backend == "reference":
        pytest.skip("plain indexing has the same freedom")
    table = torch.randn(5, 4, requires_grad=True)
    out = embed(torch.tensor([1, 1]), table, backend=backend)
    with torch.no_grad():
        table.zero_()
    out.sum().backward()
    assert table.grad[1].tolist() == [2.0] * 4


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0,)], ids=str)
def test_no_tokens(shape, backend):
    table, positions = torch.randn(5, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    out = embed(torch.zeros(shape, dtype=torch.int64), table, position_table=positions, backend=backend)
    assert out.shape == (*shape, 4)
    out.sum().backward()
    assert not table.grad.any() and not positions.grad.any()


def test_no_columns(backend):
    table = torch.randn(5, 0, requires_grad=True)
    out = embed(torch.tensor([[1, 2]]), table, backend=backend)
    assert out.shape == (1, 2, 0)
    out.sum().backward()
    assert table.grad.shape == (5, 0)


IDS, TABLE = torch.tensor([[0, 1, 2], [3, 4, 0]]), torch.randn(5, 4)
BAD = {
    "ids are a list": (([0, 1], TABLE), {}, TypeError, "token_ids must be a torch.Tensor, got list"),
    "ids are floats": ((IDS.float(), TABLE), {}, TypeError, "token_ids must be int32 or int64, got torch.float32"),
    "ids of three axes": ((IDS[None], TABLE), {}, ValueError, "token_ids must be (b, s) or (t,), got (1, 2, 3)"),
    "a table of one axis": ((IDS, TABLE[0]), {}, ValueError, "token_table must be (n, d), got (4,)"),
    "a table of integers": ((IDS, TABLE.int()), {}, TypeError, "token_table must be float32, bfloat16, float16 or"),
    "an id beyond the table": (
        (IDS + 1, TABLE),
        {},
        ValueError,
        "token_ids must lie between 0 and 4, got values from 1 to 5",
    ),
    "a negative id": (
        (IDS.int() - 1, TABLE),
        {},
        ValueError,
        "token_ids must lie between 0 and 4, got values from -1 to",
    ),
    "another width": (
        (IDS, TABLE),
        {"position_table": TABLE[:, 1:]},
        ValueError,
        "position_table must be (n, 4), got (5, 3)",
    ),
    "a narrower table": (
        (IDS, TABLE),
        {"type_table": TABLE.half()},
        TypeError,
        "type_table must be torch.float32, got",
    ),
    "too few positions": (
        (IDS, TABLE),
        {"position_table": TABLE[:2]},
        ValueError,
        "position_table must have a row for each of the 3 positions, got 2",
    ),
    "positions without a table": (
        (IDS, TABLE),
        {"positions": IDS},
        ValueError,
        "positions must be None without position_",
    ),
    "types without a table": ((IDS, TABLE), {"type_ids": IDS}, ValueError, "type_ids must be None without type_table"),
    "positions of another shape": (
        (IDS, TABLE),
        {"position_table": TABLE, "positions": IDS.t()},
        ValueError,
        "positions must be (3,) or (1, 3) or (2, 3), got (3, 2)",
    ),
    "a position beyond the table": (
        (IDS, TABLE),
        {"position_table": TABLE, "positions": torch.tensor([0, 1, 5])},
        ValueError,
        "positions must lie between 0 and 4, got values from 0 to 5",
    ),
    "a type beyond the table": (
        (IDS, TABLE),
        {"type_table": TABLE[:2], "type_ids": IDS},
        ValueError,
        "type_ids must lie between 0 and 1, got values from 0 to 4",
    ),
    "an unknown backend": (
        (IDS, TABLE),
        {"backend": "cuda"},
        ValueError,
        "must be one of native, triton, reference",
    ),
}


@pytest.mark.parametrize("arguments, options, error, message", BAD.values(), ids=BAD.keys())
def test_bad_input_is_named(arguments, options, error, message, backend):
    with pytest.raises(error, match=re.escape(message)):
        embed(*arguments, **{"backend": backend} | options)


@pytest.mark.parametrize("name", ["BERT", "float32 tables beside", "packed", "no contiguous axis"])
def test_the_ops_pass_opcheck(name, native):
    inputs, _ = CASE[name].make(torch.bfloat16)
    arguments = [inputs.get(name) for name in NAMES]
    torch.library.opcheck(torch.ops.lmkernels.embed_fwd.default, (None, 1.0, *arguments))
    dout = torch.randn(*inputs["token_ids"].shape, 5)
    torch.library.opcheck(torch.ops.lmkernels.embed_bwd.default, (dout, inputs["token_ids"], 50, False))
    torch.library.opcheck(torch.ops.lmkernels.embed_bwd.default, (dout.bfloat16(), None, 90, True))


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def test_a_compiled_call_has_no_graph_break_and_serves_other_sizes(backend, fresh_compiler):
    compiled = torch.compile(embed, fullgraph=True, dynamic=True, backend="aot_eager")
    tables = [torch.randn(n, 6, requires_grad=True) for n in (50, 40, 5)]

    def run(b, s):
        ids, types = torch.randint(50, (b, s)), torch.randint(5, (b, s))
        outs = [
            f(ids, tables[0], position_table=tables[1], type_ids=types, type_table=tables[2], backend=backend)
            for f in (compiled, embed)
        ]
        torch.testing.assert_close(*outs)
        for actual, expected in zip(*(torch.autograd.grad(out.square().sum(), tables) for out in outs), strict=True):
            torch.testing.assert_close(actual, expected)

    run(2, 10)
    with torch.compiler.set_stance("fail_on_recompile"):
        run(3, 17)


def test_a_compiled_call_looks_for_ids_beyond_the_table_too(native, fresh_compiler):
    compiled = torch.compile(embed, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match="token_ids must lie between 0 and 4, got values from 1 to 5"):
        compiled(IDS + 1, TABLE)


def test_autocast_leaves_the_dtype_alone(backend):
    """As it does torch's embedding."""
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        assert embed(IDS, TABLE, backend=backend).dtype == torch.float32
