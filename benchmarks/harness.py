"""What every benchmark needs: fair timing, the ceilings of the machine, a record of the conditions, a table."""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import lmkernels

REPOSITORY = Path(__file__).parents[1]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# A sample shorter than this says more about the clock than about the function.
SHORTEST_SAMPLE = 1e-3
# More than any GPU's second-level cache holds; to fill it takes a GPU longer than most calls take to be launched.
FLUSHED_BYTES = 2**29

# Where the functions that are timed compute. benchmarks.gpu sets it once, for its whole process.
device = torch.device("cpu")


@dataclass(frozen=True)
class Options:
    """What the command line asks every benchmark for."""

    cases: str = ""  # only the cases whose group and name contain this
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    seconds: float = 1.0  # for each line of the table, warm-up not counted
    peers: bool = False  # all that are installed, where a benchmark has some that take long to set up
    plot: Path | None = None  # a file for a picture of the table, where a benchmark draws one


@dataclass(frozen=True)
class Timing:
    """Seconds of one call over the samples taken."""

    median: float
    p10: float
    p90: float
    samples: int

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        ordered = sorted(seconds)

        def quantile(q: float) -> float:
            return ordered[round(q * (len(ordered) - 1))]

        return cls(statistics.median(ordered), quantile(0.1), quantile(0.9), len(ordered))


def interleaved(functions: dict[str, Callable[[], object]], seconds: float, least: int = 5) -> dict[str, Timing]:
    """Times the functions in turn, A B A B ..., for about `seconds` in all and at least `least` times each.

    So whatever else the machine does falls on all of them alike. Each is called before until its time is known, which
    warms caches and threads up; a short one is called several times per sample. On a GPU each call finds the caches
    without its data.
    """
    repeats = {name: _repeats(function) for name, function in functions.items()}
    samples = {name: [] for name in functions}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(samples.values()))) < least:
        for name, function in functions.items():
            samples[name].append(_time(function, repeats[name]))
    return {name: Timing.of(taken) for name, taken in samples.items()}


def _time(function: Callable[[], object], repeats: int) -> float:
    if device.type == "cuda":
        return _time_on_gpu(function, repeats)
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    return (time.perf_counter() - start) / repeats


def _time_on_gpu(function: Callable[[], object], repeats: int) -> float:
    """Between events of the stream: what the CPU takes to launch a call counts where the GPU has to wait for it."""
    other_data = _flushed()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in events:
        other_data.zero_()
        start.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return sum(start.elapsed_time(end) for start, end in events) / 1e3 / repeats


@functools.cache
def _flushed() -> torch.Tensor:
    return torch.empty(FLUSHED_BYTES, dtype=torch.int8, device=device)


def _repeats(function: Callable[[], object]) -> int:
    """How many calls make a sample of at least SHORTEST_SAMPLE."""
    function()
    repeats = 1
    while (seconds := _time(function, repeats)) * repeats < SHORTEST_SAMPLE:
        repeats = max(2 * repeats, math.ceil(SHORTEST_SAMPLE / max(seconds, 1e-9)))
    return repeats


@dataclass(frozen=True)
class Ceilings:
    """The best that torch reaches on this machine: the measure for a share, taken in the same run."""

    matmul: dict[str, float]  # FLOP/s by dtype, 2048 x 2048 x 2048; on a GPU 8192 x 8192 x 8192
    read: float  # bytes/s of a sum over 512 MB; on a GPU 4 GB
    copy: float  # bytes/s, read and written, of a copy of half of that

    def seconds(self, dtype: str, flops: float, bytes_read: float, bytes_written: float = 0.0) -> float:
        """The time that neither the arithmetic nor the memory allows to beat."""
        memory = (bytes_read + bytes_written) / (self.copy if bytes_written else self.read)
        return max(flops / self.matmul.get(dtype, self.matmul["float32"]), memory)

    def rows(self) -> list[dict]:
        """For the table that the shares stand in."""
        matmuls = [{"name": f"ceiling, {dtype} matmul", **flop_rate(rate)} for dtype, rate in self.matmul.items()]
        memory = [{"name": f"ceiling, {name}", **byte_rate(getattr(self, name))} for name in ("read", "copy")]
        return [*matmuls, *memory]


def flop_rate(rate: float) -> dict[str, float]:
    return {"TFLOP/s": round(rate / 1e12, 2)} if device.type == "cuda" else {"GFLOP/s": round(rate / 1e9, 1)}


def byte_rate(rate: float) -> dict[str, float]:
    return {"TB/s": round(rate / 1e12, 3)} if device.type == "cuda" else {"GB/s": round(rate / 1e9, 1)}


def measure_ceilings(dtypes: Iterable[str], seconds: float = 1.0) -> Ceilings:
    n, numbers = (8192, 2**30) if device.type == "cuda" else (2048, 2**27)
    matmul = {}
    for dtype in dict.fromkeys(["float32", *dtypes]):
        a, b = (torch.randn(n, n, device=device).to(DTYPES[dtype]) for _ in "ab")
        functions = {"torch": lambda a=a, b=b: a @ b}
        if dtype == "float32" and device.type == "cpu" and torch.backends.mkldnn.is_available():
            # a @ b goes to MKL, which does badly on some CPUs; oneDNN does not
            functions["oneDNN"] = lambda a=a, b=b: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
        best = min(timing.p10 for timing in interleaved(functions, seconds).values())
        matmul[dtype] = 2 * n**3 / best
    x = torch.ones(numbers, device=device)
    half, other = x.chunk(2)
    memory = interleaved({"sum": x.sum, "copy": lambda: half.copy_(other)}, seconds)
    return Ceilings(matmul, x.nbytes / memory["sum"].p10, x.nbytes / memory["copy"].p10)


@dataclass(frozen=True)
class Line:
    """One line of a table: what is compared on which inputs, and the least that it costs.

    Most of it is made only when the line is measured: large inputs must not all exist at once.
    """

    group: str  # lines of a group, dtype and direction share a geometric mean
    case: str
    dtype: str
    direction: str  # "forward", "forward+backward", ...
    competitors: Callable[[], dict[str, Callable[[], object]]]  # "ours" first, then the peers
    wrong: Callable[[], str | None]  # why our result is wrong, or None
    flops: float = 0.0
    bytes_read: float = 0.0
    bytes_written: float = 0.0
    tokens: int = 0  # of one call, where tokens per second say more than milliseconds

    @property
    def name(self) -> str:
        return " ".join(part for part in (self.case, self.dtype, self.direction) if part)


def measure(lines: list[Line], options: Options) -> list[dict]:
    """A row for each line that the options choose, the geometric mean of every group, and the ceilings.

    "ratio" is the first peer's time over ours; with several peers, "best peer" is that of the fastest.
    """
    chosen = [line for line in lines if line.dtype in options.dtypes and options.cases in f"{line.group} {line.case}"]
    if not chosen:
        every = ", ".join(dict.fromkeys(f"{line.group} {line.case}" for line in lines))
        raise SystemExit(f"--cases {options.cases!r} matches no group and no case: {every}")
    ceilings = measure_ceilings(options.dtypes)
    rows, ratios = [], {}
    for line in tqdm(chosen, unit="line", file=sys.stderr):
        if error := line.wrong():
            rows.append({"name": line.name, "error": error})
            continue
        row = figures(line, interleaved(line.competitors(), options.seconds), ceilings)
        ratios.setdefault((line.group, line.dtype, line.direction), []).append(row["ratio"])
        rows.append({"name": line.name, **row})
    means = [
        {"name": f"geometric mean, {' '.join(key)}", "ratio": round(geometric_mean(values), 2)}
        for key, values in ratios.items()
        if len(values) > 1
    ]
    return rows + means + ceilings.rows()


def figures(line: Line, timings: dict[str, Timing], ceilings: Ceilings) -> dict:
    ours, *peers = timings.values()
    row = {
        "unit": "ms",
        "ours": round(ours.median * 1e3, 4),
        "p10": round(ours.p10 * 1e3, 4),
        "p90": round(ours.p90 * 1e3, 4),
        **{name: round(timing.median * 1e3, 4) for name, timing in timings.items() if name != "ours"},
    }
    if peers:
        row["ratio"] = round(peers[0].median / ours.median, 2)
    if len(peers) > 1:
        row["best peer"] = round(min(peer.median for peer in peers) / ours.median, 2)
    moved = line.bytes_read + line.bytes_written
    if line.tokens:
        row["tokens/s"] = round(line.tokens / ours.median, 1)
    if line.flops:
        row |= flop_rate(line.flops / ours.median)
    if moved:
        row |= byte_rate(moved / ours.median)
    least = ceilings.seconds(line.dtype, line.flops, line.bytes_read, line.bytes_written)
    return row | {"% of ceiling": round(100 * least / ours.median, 1)}


def conditions() -> dict:
    """Machine and versions, without which a time means nothing."""
    return {
        **(_gpu() if device.type == "cuda" else {}),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "matmul_precision": torch.get_float32_matmul_precision(),
        "isa": torch.ops.lmkernels.cpu_isa() if lmkernels.backends()["native"] is None else None,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lmkernels": lmkernels.__version__,
        "commit": _output("git", "describe", "--always", "--dirty"),
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }


def _gpu() -> dict:
    properties = torch.cuda.get_device_properties(device)
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "gpu": properties.name,
        "capability": f"sm_{properties.major}{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory": f"{properties.total_memory / 2**30:.0f} GiB",
        "driver": driver and driver.splitlines()[0],
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "triton": importlib.metadata.version("triton"),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _output(*command: str) -> str | None:
    """What a command of the repository's folder prints; None where it fails or does not exist."""
    try:
        run = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    except OSError:
        return None
    return run.stdout.strip() if run.returncode == 0 else None


def geometric_mean(values: Iterable[float]) -> float:
    return statistics.geometric_mean(values)


def table(rows: list[dict]) -> str:
    """Rows with the same keys as aligned columns: numbers to the right, text to the left, nothing for None."""
    header = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_cell(row.get(key)) for key in header] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
    right = [any(isinstance(row.get(key), int | float) for row in rows) for key in header]

    def line(texts: list[str]) -> str:
        aligned = (
            text.rjust(width) if to_the_right else text.ljust(width)
            for text, width, to_the_right in zip(texts, widths, right, strict=True)
        )
        return "  ".join(aligned).rstrip()

    return "\n".join([line(header), line(["-" * width for width in widths]), *map(line, cells)])


def _cell(value) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cases", default="", metavar="TEXT", help="only the cases whose group and name contain TEXT")
    parser.add_argument(
        "--dtype", action="append", choices=DTYPES, help="may be given again (default: float32, bfloat16)"
    )
    parser.add_argument("--seconds", type=float, default=1.0, help="budget of each line of the table (default: 1)")
    parser.add_argument("--peers", action="store_true", help="generate: also those that take long to set up")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="generate: draw the table into FILE, a .png")
    parser.add_argument("--threads", type=int, metavar="N", help="torch.set_num_threads(N)")
    parser.add_argument(
        "--matmul-precision",
        choices=("highest", "high", "medium"),
        default="highest",
        help="torch.set_float32_matmul_precision, for all that is timed (default: highest)",
    )
