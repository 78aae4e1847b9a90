"""linear_cross_entropy against F.linear and F.cross_entropy: forward, and forward with backward; time and memory."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks import harness
from lmkernels import linear_cross_entropy
from lmkernels.testing import cases, numerics

PASSES = ("forward", "forward+backward")


def run(options: harness.Options) -> list[dict]:
    """The rows of lines(), and the peak of memory for each forward with backward."""
    rows = harness.measure(lines(), options)
    return rows + [
        memory_row(case, dtype)
        for case in cases.LINEAR_CROSS_ENTROPY_BENCHMARKS
        for dtype in options.dtypes
        if options.cases in f"{case}"
    ]


def lines() -> list[harness.Line]:
    """One per case, dtype and pass."""
    return [
        line(case, dtype, direction)
        for case in cases.LINEAR_CROSS_ENTROPY_BENCHMARKS
        for dtype in harness.DTYPES
        for direction in PASSES
    ]


def eager(hidden, weight, labels):
    return F.cross_entropy(F.linear(hidden, weight), labels)


FUNCTIONS = {"ours": linear_cross_entropy, "F.linear, F.cross_entropy": eager}


def calls(
    case: cases.LossCase, dtype: torch.dtype, direction: str, functions: dict[str, Callable] = FUNCTIONS
) -> dict[str, Callable[[], object]]:
    inputs = case.make(dtype)
    labels = inputs.pop("labels")
    leaves = [x.requires_grad_(direction != "forward") for x in inputs.values()]

    def call(function):
        if direction == "forward":
            return lambda: function(*leaves, labels)
        return lambda: torch.autograd.grad(function(*leaves, labels), leaves)

    return {name: call(function) for name, function in functions.items()}


@functools.cache
def wrong(case: cases.LossCase, dtype: torch.dtype) -> str | None:
    """Why losses or gradients are wrong, or None: the first tokens by the tests' rule (float64 holds all logits)."""
    tokens = 64
    inputs = case.make(dtype)
    part = inputs | {name: inputs[name][:tokens] for name in ("hidden", "labels")}
    try:
        numerics.assert_op_as_accurate(
            lambda **arguments: linear_cross_entropy(**arguments, reduction="none"),
            lambda **arguments: linear_cross_entropy(**arguments, reduction="none", backend="reference"),
            lambda hidden, weight, labels: F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="none"),
            part,
            ("hidden", "weight"),
            dtype=dtype,
            samples=tokens,
        )
    except AssertionError as error:
        return str(error)
    return None


def line(case: cases.LossCase, dtype: str, direction: str) -> harness.Line:
    torch_dtype = harness.DTYPES[dtype]
    counted = int((case.make(torch_dtype)["labels"] != -100).sum()) if case.counted < 1 else case.t
    products, passes = (1, 1) if direction == "forward" else (3, 2)
    return harness.Line(
        "head",
        case.name,
        dtype,
        direction,
        competitors=lambda: calls(case, torch_dtype, direction),
        wrong=lambda: wrong(case, torch_dtype),
        flops=products * 2 * counted * case.vocab * case.d,
        bytes_read=passes * (case.t + case.vocab) * case.d * torch_dtype.itemsize,
    )


def memory_row(case: cases.LossCase, dtype: str) -> dict:
    """Megabytes at the peak of one forward with backward above what the process held before, inputs not counted.

    Where gradients of the inputs exist at the peak, they are in the figure.
    """
    row = {"name": f"{case} {dtype} peak memory", "unit": "MB"}
    for name, function in calls(case, harness.DTYPES[dtype], "forward+backward").items():
        function()  # memory that stays with the threads is no longer new
        row[name] = round(peak_memory(function) / 1e6, 1)
    peer = row["F.linear, F.cross_entropy"]
    return row | {"ratio": round(peer / row["ours"], 2)}


def peak_memory(function: Callable[[], object]) -> int:
    """The most resident bytes during function() above those before it, sampled every millisecond."""
    done, before, most = threading.Event(), resident_bytes(), [0]

    def watch():
        while not done.is_set():
            most[0] = max(most[0], resident_bytes())
            time.sleep(1e-3)

    watcher = threading.Thread(target=watch)
    watcher.start()
    function()
    done.set()
    watcher.join()
    return most[0] - before


def resident_bytes() -> int:
    """Linux only."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmRSS:")[2].split()[0])
