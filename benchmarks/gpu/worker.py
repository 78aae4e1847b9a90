"""The process that measures: one JSON object a line on its standard output, for the process that keeps the record.

A kernel that fails on a GPU takes the whole process with it. So this one does nothing but measure: `started` names the
line it is about to measure, `row` is its result, and a process after it goes on with the next.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
import torch._functorch.config as functorch_config

from benchmarks import harness
from benchmarks.gpu.lines import PARTS, Setting


@dataclass(frozen=True)
class Task:
    parts: tuple[str, ...]
    device: str = "cuda"
    seconds: float = 0.5  # for each line, warm-up not counted
    scale: int = 1
    compiled: bool = True
    skip: int = 0  # lines that others have measured, or died of
    ceilings: dict | None = None  # that others have measured

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def measured(task: Task) -> Iterator[dict]:
    """{"conditions", "ceilings"}, then for every line {"started", "part"} and {"row", "part"}; at last {"done"}."""
    harness.device = torch.device(task.device)
    # backward passes run again over one graph
    functorch_config.donated_buffer = False
    ceilings = task.ceilings and harness.Ceilings(**task.ceilings)
    if ceilings is None:
        dtypes = ("bfloat16", "float16") if task.scale == 1 else ("bfloat16",)
        ceilings = harness.measure_ceilings(dtypes, task.seconds)
    yield {"conditions": harness.conditions(), "ceilings": asdict(ceilings)}
    number = 0
    for part in task.parts:
        for line in lines_of(part, Setting(task.scale, task.compiled)):
            number += 1
            if number <= task.skip:
                continue
            yield {"started": line.name, "part": part}
            yield {"row": {"name": line.name, **row_of(line, ceilings, task.seconds)}, "part": part}
            clean_up(task.compiled)
    yield {"done": True}


def lines_of(part: str, setting: Setting) -> list[harness.Line]:
    """Where there are none because of an error, one that tells it."""
    try:
        with harness.device:
            return PARTS[part](setting)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        return [harness.Line(part, part, "", "", dict, lambda: reason)]


def row_of(line: harness.Line, ceilings: harness.Ceilings, seconds: float) -> dict:
    """Figures, or {"error": why there are none}."""
    try:
        with harness.device:
            if error := line.wrong():
                return {"error": error}
            competitors = line.competitors()
            lacking = {}
            for name in [name for name in competitors if name != "ours"]:
                if reason := failure(competitors[name]):
                    lacking[name] = reason
                    del competitors[name]
        memory = peak_memory(competitors)
        # as a program runs: without the search for torch's default device in every call
        row = harness.figures(line, harness.interleaved(competitors, seconds, least=3), ceilings)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return row | memory | ({"lacking": lacking} if lacking else {})


def failure(function: Callable[[], object]) -> str | None:
    """Why a peer cannot do this, if it cannot."""
    try:
        function()
        synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return None


def peak_memory(competitors: dict[str, Callable[[], object]]) -> dict:
    """What ours and the first peer allocate at the peak of a call beyond what is there between calls."""
    if harness.device.type != "cuda":
        return {}
    peaks = {}
    for column, name in zip(("MB", "peer's MB"), competitors):
        competitors[name]()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        competitors[name]()
        torch.cuda.synchronize()
        peaks[column] = round((torch.cuda.max_memory_allocated() - before) / 1e6, 1)
    return peaks


def synchronize() -> None:
    if harness.device.type == "cuda":
        torch.cuda.synchronize()


def clean_up(compiled: bool) -> None:
    """Frees the memory of a line; raises where the GPU can do nothing more for this process."""
    if compiled:
        # a function is compiled for a few shapes only, and for those after them runs as it stands
        torch.compiler.reset()
    gc.collect()
    synchronize()
    if harness.device.type == "cuda":
        torch.cuda.empty_cache()


def main() -> None:
    task = Task(**json.loads(sys.argv[1]))
    # what is here stays: clean_up need not look through it each time
    gc.freeze()
    # whatever else prints goes to stderr
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)
        for event in measured(task):
            print(json.dumps(event), file=out, flush=True)


if __name__ == "__main__":
    main()
