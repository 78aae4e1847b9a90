"""Builds, tests and measures the library on an NVIDIA GPU, in ten minutes or what you give it.

The most important comes first. Each result is printed and written as it comes, so a stop (Ctrl-C, or the end of the
time) loses nothing; and kernels run in other processes than this one, so one that crashes or hangs costs its line only.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

try:
    import torch

    from benchmarks import harness
    from benchmarks.gpu.lines import PARTS
    from benchmarks.gpu.processes import OutOfTime, Process
    from benchmarks.gpu.worker import Task
    from lmkernels import _library
    from lmkernels._files import write_files
except ModuleNotFoundError as error:
    sys.exit(
        f"benchmarks.gpu: {sys.executable} has no package {error.name}; `make gpu GPU_PYTHON=...` names another Python"
    )

# What is done, in this order, and the share of the time after which it has to make way for the rest.
STEPS = {"build": 0.3, "tests": 0.55, "sanitizer": 0.6, **dict.fromkeys(PARTS, 1.0)}
TESTS = ("tests/ops", "tests/gpu", "tests/nn", "tests/models", "tests/generation", "tests/hf")
# A few: under compute-sanitizer a kernel takes tens of times longer.
SANITIZED = "as_plain_torch and bfloat16 and (triton or native) and (odd or causal)"
LINE_SECONDS = 150.0  # some peers take a minute to be compiled
CODES = {"finished": 0, "out of time": 0, "interrupted": 130}


class Stuck(Exception):
    """A process that measures ended before it had begun with a line: the next one would too."""


@dataclass
class Record:
    """All that is known so far; `save` writes it, whole, to the file that the caller named."""

    command: str
    path: Path | None = None
    status: str = "running"
    seconds: float = 0.0
    conditions: dict = field(default_factory=dict)
    ceilings: dict = field(default_factory=dict)
    build: dict = field(default_factory=dict)
    tests: dict = field(default_factory=dict)
    sanitizer: dict = field(default_factory=dict)
    parts: dict[str, list[dict]] = field(default_factory=dict)  # rows by part
    not_reached: list[str] = field(default_factory=list)

    def save(self) -> None:
        if self.path is not None:
            found = {name: value for name, value in asdict(self).items() if name != "path"}
            text = json.dumps(found, indent=1) + "\n"
            write_files(self.path.parent, {self.path.name: lambda path: path.write_text(text)})

    def log(self, step: str) -> Path:
        """Where the output of a step goes."""
        return Path(os.devnull) if self.path is None else self.path.with_suffix(f".{step}.log")

    def wrong(self) -> bool:
        """Whether anything failed; what was not reached has not."""
        rows = [row for part in self.parts.values() for row in part]
        return any("error" in result for result in (self.build, self.tests, self.sanitizer, *rows))


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results to FILE, and logs beside it")
    parser.add_argument("--minutes", type=float, default=10.0, help="for everything (default: 10)")
    parser.add_argument("--only", action="append", choices=STEPS, metavar="STEP", help="may be given again; see --list")
    parser.add_argument("--list", action="store_true", help="print the steps, in their order, and stop")
    parser.add_argument("--seconds", type=float, default=0.5, help="for each line of a table (default: 0.5)")
    parser.add_argument(
        "--no-compile", action="store_true", help="without torch.compile and FlexAttention, which take long to compile"
    )
    options = parser.parse_args(arguments)
    for name in ("minutes", "seconds"):
        if not getattr(options, name) > 0:
            parser.error(f"--{name} must be more than 0, got {getattr(options, name)}")
    return options


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    if options.list:
        print("\n".join(STEPS))
        return 0
    if reason := absence():
        print(f"benchmarks.gpu: {reason}", file=sys.stderr)
        return 1
    steps = [step for step in STEPS if step in (options.only or STEPS)]
    record = Record(f"python -m benchmarks.gpu {shlex.join(arguments)}".rstrip(), options.json)
    task = Task((), seconds=options.seconds, compiled=not options.no_compile)
    # shells have programs in the background ignore it; and what stops a job in a queue is an interruption too
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.raise_signal(signal.SIGINT))
    return run(record, steps, 60 * options.minutes, task)


def absence() -> str | None:
    """None, or what this machine lacks."""
    needs = "it needs an NVIDIA GPU from sm_80 on, a CUDA build of torch and Triton 3.6 or later"
    if not torch.cuda.is_available():
        build = "a build without CUDA" if torch.version.cuda is None else "which sees no GPU"
        return f"{needs}; this is torch {torch.__version__}, {build}"
    reason = _library.triton_error or _library.gpu_absence(torch.device("cuda", torch.cuda.current_device()))
    return reason and f"{needs}; {reason}"


def run(record: Record, steps: list[str], seconds: float, task: Task) -> int:
    """Does the steps for so many seconds at most; returns the exit code."""
    start = time.monotonic()
    harness.device = torch.device(task.device)

    def end_of(step: str) -> float:
        share = 1.0 if step == steps[-1] else STEPS[step]
        return start + share * seconds

    parts = [step for step in steps if step in PARTS]
    record.not_reached = list(steps)
    try:
        for step, function in (("build", build), ("tests", test), ("sanitizer", sanitize)):
            if step in steps:
                record.not_reached.remove(step)
                function(record, end_of(step), task.device)
                print(f"{step}: {summary(getattr(record, step))}", flush=True)
                record.save()
        if parts:
            measure(record, replace(task, parts=tuple(parts)), start + seconds)
        record.status = "finished"
    except OutOfTime:
        record.status = "out of time"
    except KeyboardInterrupt:
        record.status = "interrupted"
    except Stuck as error:
        record.status = f"stuck: {error}"
    record.seconds = round(time.monotonic() - start, 1)
    record.save()
    report(record)
    return CODES.get(record.status, 1) or int(record.wrong())


def summary(result: dict) -> str:
    return ", ".join(f"{name} {value}" for name, value in result.items() if not isinstance(value, list))


def report(record: Record) -> None:
    """All tables once more, together, and what they were measured on."""
    for part, rows in record.parts.items():
        columns = [{name: value for name, value in row.items() if name != "lacking"} for row in rows]
        print(f"\n{part}\n{harness.table(columns)}")
    lacking = {
        f"{name}: {why}"
        for rows in record.parts.values()
        for row in rows
        for name, why in row.get("lacking", {}).items()
    }
    if lacking:
        print("\npeers that cannot do a line:\n" + "\n".join(sorted(lacking)))
    if record.ceilings:
        print(f"\n{harness.table(harness.Ceilings(**record.ceilings).rows())}")
    print("\n" + "\n".join(f"{key}: {value}" for key, value in record.conditions.items()))
    for step in ("build", "tests", "sanitizer"):
        if result := getattr(record, step):
            print(f"{step}: {summary(result)}")
            for name in result.get("failures", []):
                print(f"  {name}")
    missing = f"; not reached: {', '.join(record.not_reached)}" if record.not_reached else ""
    print(f"{record.status} after {record.seconds:.0f} s{missing}")


# --- build, tests, sanitizer ---


def logged(record: Record, step: str, command: list[str], end: float, use: Callable[[str], None], **environment) -> int:
    """Runs a command, gives each line of its output to `use` and to the step's log; returns the exit code."""
    print(f"+ {shlex.join(command)}", flush=True)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])  # for ninja
    environment = {"PATH": path, "PYTHONUNBUFFERED": "1", **environment}
    with record.log(step).open("w") as log:
        with Process(command, harness.REPOSITORY, environment, errors=subprocess.STDOUT) as process:
            for line in process.lines(end):
                log.write(f"{line}\n")
                use(line)
            return process.code()


def build(record: Record, end: float, device: str) -> None:
    begin, tail = time.monotonic(), []
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    try:
        code = logged(record, "build", command, end, tail.append)
        record.build = {} if code == 0 else {"error": f"exit code {code}", "failures": tail[-20:]}
    except OutOfTime:
        record.build = {"error": "it took too long"}
    record.build["seconds"] = round(time.monotonic() - begin, 1)


# As pytest prints them, by itself and with pytest-xdist: the result of a test, and its name.
RESULT = re.compile(
    r"^(?:\[gw\d+\] \[ *\d+%\] (?P<result>[A-Z]+) (?P<name>\S.*)|(?P<name1>\S.*::.*) (?P<result1>[A-Z]+) .*\[ *\d+%\])$"
)


def test(record: Record, end: float, device: str) -> None:
    command = [sys.executable, "-m", "pytest", *TESTS, "--device", device, "-v", "--tb=short", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist"):
        # a kernel that spoils the GPU for a process then costs one test: another process takes over
        command += ["-n", str(min(8, os.cpu_count() or 1)), "--dist", "worksteal", "--max-worker-restart", "1000"]
    counts, failures, tail = {"passed": 0, "failed": 0, "skipped": 0}, [], []

    def use(line: str) -> None:
        if found := RESULT.match(line):
            result, name = (found["result"] or found["result1"]).lower(), (found["name"] or found["name1"]).strip()
            result = "failed" if result == "error" else result
            counts[result] = counts.get(result, 0) + 1
            if result == "failed":
                failures.append(name)
        tail[:] = [*tail[-19:], line]

    begin = time.monotonic()
    try:
        code = logged(record, "tests", command, end, use)
        record.tests = {**counts, "whole suite": True}
        if code and not failures:
            failures += tail
    except OutOfTime:
        record.tests = {**counts, "whole suite": False}
    record.tests |= {"seconds": round(time.monotonic() - begin, 1), "failures": failures}
    if failures:
        record.tests["error"] = f"{len(failures)} failures" if counts["failed"] else "pytest failed"


def sanitize(record: Record, end: float, device: str) -> None:
    """Accesses outside the memory that was allocated, in a few of the tests."""
    program = shutil.which("compute-sanitizer", path=f"{os.environ.get('PATH', '')}{os.pathsep}/usr/local/cuda/bin")
    if program is None:
        record.sanitizer = {"skipped": "compute-sanitizer is not installed"}
        return
    command = [program, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-m", "pytest", TESTS[0]]
    command += ["-k", SANITIZED, "--device", device, "-v", "-p", "no:cacheprovider"]
    counts, complaints = {"passed": 0}, []

    def use(line: str) -> None:
        counts["passed"] += " PASSED " in line
        if line.startswith("=========") and not line.startswith(("========= COMPUTE", "========= ERROR SUMMARY: 0")):
            complaints.append(line)

    # the allocator of torch hands out parts of large blocks, in which every access is allowed
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        code = logged(record, "sanitizer", command, end, use, **environment)
        record.sanitizer = {**counts, "exit code": code}
        if code:
            record.sanitizer |= {"error": f"exit code {code}", "failures": complaints[:40]}
    except OutOfTime:
        record.sanitizer = {**counts, "stopped": "it took too long"}
        if complaints:
            record.sanitizer |= {"error": f"{len(complaints)} lines of complaint", "failures": complaints[:40]}


# --- benchmarks ---


def measure(record: Record, task: Task, end: float) -> None:
    """Fills record.parts, line by line, from workers that take over from each other."""
    waiting = task.parts
    with record.log("benchmarks").open("w") as log:
        while True:
            current, done, skipped = None, False, task.skip
            with Process(
                [sys.executable, "-m", "benchmarks.gpu.worker", task.to_json()], harness.REPOSITORY, errors=log
            ) as process:
                try:
                    for text in process.lines(end, LINE_SECONDS):
                        event = json.loads(text)
                        if "conditions" in event:
                            record.conditions, record.ceilings = event["conditions"], event["ceilings"]
                            task = replace(task, ceilings=event["ceilings"])
                        elif "started" in event:
                            current = event
                            record.not_reached = list(waiting[waiting.index(event["part"]) :])
                        elif "row" in event:
                            add(record, event["part"], event["row"])
                            task, current = replace(task, skip=task.skip + 1), None
                        done = done or "done" in event
                    if done:
                        record.not_reached = []
                        return
                    reason = f"the process ended with code {process.code()}"
                except OutOfTime:
                    if time.monotonic() >= end:
                        raise
                    reason = f"no result after {LINE_SECONDS:.0f} s"
            if current is not None:
                add(record, current["part"], {"name": current["started"], "error": reason})
                task = replace(task, skip=task.skip + 1)
            elif task.skip == skipped:
                raise Stuck(f"measuring does not {'go on' if skipped else 'begin'}: {reason}; see {log.name}")


def add(record: Record, part: str, row: dict) -> None:
    """A new row, in the record and on the screen."""
    record.parts.setdefault(part, []).append(row)
    record.save()
    hidden = ("name", "unit", "p10", "p90", "lacking")
    figures = ", ".join(f"{name} {value}" for name, value in row.items() if name not in hidden)
    print(f"{part}: {row['name']}: {figures}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
