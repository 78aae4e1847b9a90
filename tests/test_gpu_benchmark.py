"""python -m benchmarks.gpu where there is no GPU: what it says, and all that it does but for the device.

The lines run on the CPU in sizes that need no speed; what it must survive (crashes, silence, its own end) comes from
small programs in the place of the process that measures.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import harness
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu.lines import PARTS, Setting
from benchmarks.gpu.processes import OutOfTime, Process
from benchmarks.gpu.worker import Task, measured
from lmkernels import _library

ROOT = Path(__file__).parents[1]
SMALL = Task((), "cpu", seconds=0.001, scale=256, compiled=False)
CEILINGS = {"matmul": {"float32": 1e11, "bfloat16": 1e12, "float16": 1e12}, "read": 1e10, "copy": 1e10}


@pytest.fixture(autouse=True)
def harness_as_it_was():
    gc.freeze()  # as the worker does
    yield
    gc.unfreeze()
    harness.device = torch.device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_in_one_line_what_it_needs():
    run = subprocess.run([sys.executable, "-m", "benchmarks.gpu"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1 and run.stdout == ""
    (line,) = run.stderr.splitlines()
    assert line.startswith("benchmarks.gpu: it needs an NVIDIA GPU from sm_80 on, a CUDA build of torch and Triton 3.6")
    assert f"this is torch {torch.__version__}" in line


def test_a_python_without_torch_is_told_in_one_line():
    command = [sys.executable, "-S", "-m", "benchmarks.gpu"]
    run = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": ""}, capture_output=True, text=True)
    assert run.returncode == 1 and run.stdout == ""
    assert run.stderr == (
        f"benchmarks.gpu: {sys.executable} has no package torch; `make gpu GPU_PYTHON=...` names another Python\n"
    )


def test_a_gpu_that_is_too_old_or_a_missing_triton_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(_library, "triton_error", None)
    assert gpu.absence().endswith("got Tesla T4 with sm_75")
    monkeypatch.setattr(_library, "triton_error", "the package triton is not installed")
    assert gpu.absence().endswith("the package triton is not installed")
    monkeypatch.setattr(_library, "triton_error", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert gpu.absence() is None


def test_the_command_line(capsys):
    assert gpu.main(["--list"]) == 0
    assert capsys.readouterr().out.split() == ["build", "tests", "sanitizer", *PARTS]
    with pytest.raises(SystemExit) as stop:
        gpu.main(["--help"])
    assert stop.value.code == 0 and "--minutes" in capsys.readouterr().out
    for wrong, reason in (
        (["--minutes", "0"], "--minutes must be more than 0, got 0.0"),
        (["--seconds", "-1"], "--seconds must be more than 0, got -1.0"),
        (["--only", "everything"], "invalid choice: 'everything'"),
    ):
        with pytest.raises(SystemExit) as stop:
            gpu.main(wrong)
        assert stop.value.code == 2 and reason in capsys.readouterr().err


# --- the lines ---


def test_the_most_important_comes_first():
    assert list(PARTS)[:5] == ["attention", "decode", "training", "loss", "norms"]
    first = PARTS["attention"](Setting())[0]
    assert first.case == "b2-s8192-h16-d128-full" and first.dtype == "bfloat16" and first.direction == "forward"


@pytest.mark.parametrize("part", PARTS)
def test_every_line_of_a_part_is_measured_on_small_shapes(part, monkeypatch):
    torch.manual_seed(0)
    # a peer of the CPU
    monkeypatch.setitem(sys.modules, "openvino", None)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "openvino" else find(name))
    events = list(measured(replace(SMALL, parts=(part,), ceilings=CEILINGS)))
    assert "cpu" in events[0]["conditions"] and events[-1] == {"done": True}
    rows = [event["row"] for event in events if "row" in event]
    assert [row["name"] for row in rows] == [event["started"] for event in events if "started" in event]
    assert len({row["name"] for row in rows}) == len(rows) and (rows or part == "compiled")
    for row in rows:
        assert "error" not in row, row
        assert row["ours"] > 0 and row["% of ceiling"] >= 0
        # what has no peer but FlexAttention has none without a compiler
        assert row["ratio"] > 0 if part != "features" else row.get("ratio", 1.0) > 0


@pytest.mark.parametrize(
    ("part", "scale", "lines"),
    # of attention: all pairs, a triangle, a triangle of grouped heads
    [
        ("attention", 256, (0, 1, 2, 3, 12, 13)),
        ("features", 64, range(6)),
        ("loss", 256, (0, 1)),
        ("norms", 256, range(4)),
    ],
)
def test_peers_that_are_compiled_compute_what_ours_does(part, scale, lines, monkeypatch):
    """Traced as on a GPU, and then run as plain torch: what a GPU's compiler makes of it needs a GPU."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    # there is a backward pass for the CPU, but none that is compiled: torch refuses
    monkeypatch.setattr(torch.nn.attention.flex_attention, "_validate_device", lambda q, k, v: None)
    made = PARTS[part](Setting(scale))
    for line in (made[i] for i in lines):
        results = {name: function() for name, function in line.competitors().items() if "SDPA" not in name}
        (name,) = results.keys() & {"FlexAttention", "torch.compile"}
        results = {key: x if isinstance(x, tuple) else (x,) for key, x in results.items()}
        for ours, theirs in zip(results["ours"], results[name], strict=True):
            theirs = theirs.transpose(1, 2) if name == "FlexAttention" else theirs
            assert (ours - theirs).norm() < 0.02 * theirs.norm(), line.name
        torch.compiler.reset()


def test_a_model_that_is_compiled_has_the_losses_of_ours(monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    (event,) = [
        event
        for event in measured(replace(SMALL, parts=("compiled",), compiled=True, ceilings=CEILINGS))
        if "row" in event
    ]
    assert event["row"]["torch.compile"] > 0


def test_lines_that_others_have_measured_are_skipped_with_their_ceilings(monkeypatch):
    def lines(part):
        good = torch.zeros
        return lambda setting: [
            harness.Line("", f"{part} {i}", "float32", "", lambda: {"ours": lambda: good(1)}, lambda: None)
            for i in range(3)
        ]

    for part in ("layers", "positions"):
        monkeypatch.setitem(PARTS, part, lines(part))
    task = replace(SMALL, parts=("layers", "positions"), ceilings=CEILINGS)
    for skip in (0, 2, 4):
        events = list(measured(replace(task, skip=skip)))
        assert events[0]["ceilings"] == CEILINGS
        names = [f"{part} {i} float32" for part in task.parts for i in range(3)]
        assert [event["started"] for event in events if "started" in event] == names[skip:]


def test_no_time_is_given_for_what_is_wrong_or_fails(monkeypatch):
    def raises():
        raise RuntimeError("no such\nkernel")

    def lines(setting):
        def line(name, competitors, wrong=lambda: None):
            return harness.Line("", name, "float32", "", lambda: competitors, wrong, flops=1.0)

        good = torch.zeros
        return [
            line("wrong", {"ours": lambda: good(1)}, lambda: "it is 3 and not 2"),
            line("fails", {"ours": raises, "peer": lambda: good(1)}),
            line("peer fails", {"ours": lambda: good(1), "first": raises, "second": lambda: good(1)}),
            line("alone", {"ours": lambda: good(1), "first": raises}),
        ]

    monkeypatch.setitem(PARTS, "layers", lines)
    events = measured(replace(SMALL, parts=("layers",), ceilings=CEILINGS))
    wrong, fails, peer_fails, alone = [event["row"] for event in events if "row" in event]
    assert wrong == {"name": "wrong float32", "error": "it is 3 and not 2"}
    assert fails == {"name": "fails float32", "error": "RuntimeError: no such\nkernel"}
    assert peer_fails["lacking"] == {"first": "RuntimeError: no such"} and peer_fails["ratio"] > 0
    assert "first" not in peer_fails and peer_fails["second"] > 0
    assert alone["ours"] > 0 and "ratio" not in alone


def test_a_part_that_cannot_be_made_costs_that_part(monkeypatch):
    def raises(setting):
        raise RuntimeError("no room")

    monkeypatch.setitem(PARTS, "layers", raises)
    for skip in (0, 1):
        events = measured(replace(SMALL, parts=("layers", "precision"), skip=skip, ceilings=CEILINGS))
        found = [(event["part"], event["row"].get("error")) for event in events if "row" in event]
        assert found == [("layers", "RuntimeError: no room")] * (skip == 0) + [("precision", None)] * 4


# --- processes, and the record ---


def program(text: str) -> list[str]:
    return [sys.executable, "-u", "-c", f"import json, os, sys, time\n{text}"]


def alive(number: int) -> bool:
    try:
        return Path(f"/proc/{number}/stat").read_text().split()[2] not in "ZX"
    except OSError:
        return False


def test_a_process_ends_with_its_block_and_takes_its_children_along(tmp_path):
    begin = time.monotonic()
    sleeper = "import subprocess; p = subprocess.Popen(['sleep', '60']); print(p.pid); time.sleep(60)"
    with Process(program(sleeper), tmp_path) as process:
        lines = process.lines(begin + 60)
        child = int(next(lines))
    assert time.monotonic() - begin < 20 and process.process.returncode == -signal.SIGTERM
    while alive(child):
        assert time.monotonic() - begin < 40
        time.sleep(0.05)


def test_what_a_process_prints_and_when_it_has_printed_nothing_for_too_long(tmp_path):
    far = time.monotonic() + 60
    with Process(program("print('a\\nb'); sys.stdout.write('c')"), tmp_path) as process:
        assert list(process.lines(far)) == ["a", "b", "c"] and process.code() == 0
    with Process(program("print('a'); time.sleep(60)"), tmp_path) as process:
        lines = process.lines(far, silence=1.0)
        assert next(lines) == "a"
        with pytest.raises(OutOfTime):
            next(lines)


# A worker that measures lines 0 .. 5 of two parts, and does something at one of them.
WORKER = """
task = json.loads(sys.argv[1])
if task["skip"] >= %d:
    sys.exit(7)
say = lambda **event: print(json.dumps(event), flush=True)
say(conditions={"gpu": "none"}, ceilings=%r)
for i in range(task["skip"], 6):
    part = task["parts"][i // 3]
    say(started=f"line {i}", part=part)
    if i == %d:
        %s
    say(row={"name": f"line {i}", "unit": "ms", "ours": 1.0, "ratio": 2.0}, part=part)
say(done=True)
"""


@pytest.fixture
def worker(monkeypatch):
    """worker(line, code, last): what measures is a program that runs code at that line, and does not begin at last."""

    def replaced(line: int, code: str, last: int = 100) -> None:
        text = WORKER % (last, CEILINGS, line, code)
        original = Process.__init__

        def init(self, command, *arguments, **options):
            if "benchmarks.gpu.worker" in command:
                command = [*program(text), command[-1]]
            original(self, command, *arguments, **options)

        monkeypatch.setattr(Process, "__init__", init)

    return replaced


def record_in(tmp_path: Path) -> gpu.Record:
    return gpu.Record("python -m benchmarks.gpu", tmp_path / "gpu.json")


def saved(tmp_path: Path) -> dict:
    return json.loads((tmp_path / "gpu.json").read_text())


@pytest.mark.parametrize(
    ("code", "reason"),
    [("os.kill(os.getpid(), 9)", "the process ended with code -9"), ("time.sleep(60)", "no result after 3 s")],
)
def test_a_line_that_crashes_or_hangs_costs_that_line(code, reason, worker, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu, "LINE_SECONDS", 3.0)
    worker(2, code)
    assert gpu.run(record_in(tmp_path), ["attention", "norms"], 100, SMALL) == 1
    found = saved(tmp_path)
    assert found["status"] == "finished" and found["not_reached"] == []
    rows = [row for rows in found["parts"].values() for row in rows]
    assert [row["name"] for row in rows] == [f"line {i}" for i in range(6)]
    assert [row.get("error") for row in rows] == [None, None, reason, None, None, None]
    out = capsys.readouterr().out
    assert f"attention: line 2: error {reason}" in out
    assert re.search(r"\nnorms\nname +unit +ours +ratio\n[- ]+\nline 3 +ms +1 +2\n", out)


@pytest.mark.parametrize(("last", "told"), [(0, "begin"), (3, "go on")])
def test_processes_that_end_before_any_line_are_not_begun_for_ever(last, told, worker, tmp_path, capsys):
    worker(2, "say(row={'name': 'line 2'}, part=part); sys.exit(7)", last)
    assert gpu.run(record_in(tmp_path), ["attention", "norms"], 100, SMALL) == 1
    found = saved(tmp_path)
    assert found["status"].startswith(f"stuck: measuring does not {told}: the process ended with code 7; see ")
    assert sum(map(len, found["parts"].values())) == last and found["not_reached"][-1] == "norms"
    assert "stuck: measuring does not" in capsys.readouterr().out


def test_when_the_time_is_over_it_keeps_what_it_has(worker, tmp_path, capsys):
    worker(4, "time.sleep(60)")
    begin = time.monotonic()
    assert gpu.run(record_in(tmp_path), ["attention", "norms", "layers"], 2, SMALL) == 0
    assert time.monotonic() - begin < 20
    found = saved(tmp_path)
    assert found["status"] == "out of time" and found["not_reached"] == ["norms", "layers"]
    assert [row["name"] for row in found["parts"]["norms"]] == ["line 3"] and found["ceilings"] == CEILINGS
    assert "out of time after 2 s; not reached: norms, layers" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_keeps_what_there_is(number, worker, tmp_path, capsys, monkeypatch):
    worker(4, f"time.sleep(1); os.kill(os.getppid(), {number}); time.sleep(60)")
    monkeypatch.setattr(gpu, "absence", lambda: None)
    monkeypatch.setattr(gpu, "Task", lambda parts, **options: SMALL)
    before = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}
    try:
        code = gpu.main(["--only", "attention", "--only", "norms", "--json", str(tmp_path / "gpu.json")])
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
    found = saved(tmp_path)
    assert code == 130 and found["status"] == "interrupted" and found["not_reached"] == ["norms"]
    assert [len(rows) for rows in found["parts"].values()] == [3, 1]
    assert found["command"].startswith("python -m benchmarks.gpu --only attention")
    assert "interrupted after" in capsys.readouterr().out


def test_the_process_that_measures(tmp_path, capsys):
    assert gpu.run(record_in(tmp_path), ["precision"], 100, replace(SMALL, ceilings=CEILINGS)) == 0
    rows = saved(tmp_path)["parts"]["precision"]
    assert len(rows) == 4 and all(row["ours"] > 0 and row["SDPA flash"] > 0 for row in rows)


# --- build, tests, sanitizer ---

CONFTEST = """
def pytest_addoption(parser):
    parser.addoption("--device")
"""
EXAMPLE = """
import pytest

def test_good(request):
    assert request.config.getoption("--device") == "cpu"

@pytest.mark.parametrize("x", ["odd [lengths] 3%", "even"])
def test_more(x):
    assert x == "even"

@pytest.mark.skip(reason="no")
def test_skipped(): ...

@pytest.fixture
def broken():
    raise RuntimeError

def test_error(broken): ...

def test_last(): ...
"""


@pytest.fixture
def example(tmp_path, monkeypatch) -> Path:
    """The suite is a file of six tests in a folder of its own."""
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_example.py").write_text(EXAMPLE)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    monkeypatch.setattr(harness, "REPOSITORY", tmp_path)
    monkeypatch.setattr(gpu, "TESTS", ["test_example.py"])
    # plugins that take most of a second to load, in each process
    monkeypatch.setenv("PYTEST_ADDOPTS", "-p no:hypothesispytest -p no:anyio -p no:benchmark")
    return tmp_path


@pytest.mark.parametrize("xdist", [True, False])
def test_the_suite_is_counted_with_its_failures(xdist, example, monkeypatch):
    if xdist:
        pytest.importorskip("xdist")
    else:
        monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    record = record_in(example)
    gpu.test(record, time.monotonic() + 100, "cpu")
    assert [record.tests[name] for name in ("passed", "failed", "skipped")] == [3, 2, 1]
    assert record.tests["whole suite"] and record.tests["error"] == "2 failures" and record.wrong()
    assert sorted(record.tests["failures"]) == [
        "test_example.py::test_error",
        "test_example.py::test_more[odd [lengths] 3%]",
    ]
    assert "assert 'odd [lengths] 3%' == 'even'" in record.log("tests").read_text()


def test_a_suite_that_takes_too_long_is_told_as_far_as_it_came(tmp_path, monkeypatch):
    pytest_that_hangs = tmp_path / "python"
    pytest_that_hangs.write_text(
        "#!/bin/sh\necho '[gw0] [  1%] PASSED a.py::x '\necho 'a.py::y PASSED [ 2%]'\nsleep 60\n"
    )
    pytest_that_hangs.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(pytest_that_hangs))
    record = record_in(tmp_path)
    gpu.test(record, time.monotonic() + 2, "cpu")
    assert record.tests["passed"] == 2 and not record.tests["whole suite"] and record.tests["seconds"] < 20
    assert not record.wrong()


@pytest.mark.parametrize("xdist", [True, False])
def test_a_suite_that_does_not_begin_is_an_error(xdist, example, monkeypatch):
    if xdist:
        pytest.importorskip("xdist")
    else:
        monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    record = record_in(example)
    monkeypatch.setattr(gpu, "TESTS", ["no_such_file.py"])
    gpu.test(record, time.monotonic() + 100, "cpu")
    assert record.tests["error"] == "pytest failed" and record.wrong()
    # pytest-xdist does not pass on which file it was
    assert ("no tests ran" if xdist else "no_such_file") in " ".join(record.tests["failures"])


def test_a_build_that_fails_is_told_with_the_end_of_its_output(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "REPOSITORY", tmp_path)
    (tmp_path / "setup.py").write_text("import sys; print('no compiler'); sys.exit(3)")
    record = record_in(tmp_path)
    gpu.build(record, time.monotonic() + 60, "cpu")
    assert record.build["error"] == "exit code 3" and record.build["failures"] == ["no compiler"] and record.wrong()
    (tmp_path / "setup.py").write_text("print('built')")
    gpu.build(record, time.monotonic() + 60, "cpu")
    assert "error" not in record.build and not record.wrong()


@pytest.mark.parametrize("code", [0, 9])
def test_the_sanitizer_is_used_where_it_is_and_its_complaints_are_kept(code, tmp_path, monkeypatch):
    record = record_in(tmp_path)
    monkeypatch.setattr(gpu.shutil, "which", lambda *arguments, **options: None)
    gpu.sanitize(record, time.monotonic() + 60, "cpu")
    assert record.sanitizer == {"skipped": "compute-sanitizer is not installed"} and not record.wrong()
    tool = tmp_path / "compute-sanitizer"
    complaint = "========= Invalid __global__ write of size 4 bytes" if code else "========= ERROR SUMMARY: 0 errors"
    tool.write_text(
        f"#!/bin/sh\necho '========= COMPUTE-SANITIZER'\necho 'a::b PASSED [1%]'\necho '{complaint}'\nexit {code}\n"
    )
    tool.chmod(0o755)
    monkeypatch.setattr(gpu.shutil, "which", lambda *arguments, **options: str(tool))
    gpu.sanitize(record, time.monotonic() + 60, "cpu")
    assert record.sanitizer["passed"] == 1 and record.wrong() == bool(code)
    assert record.sanitizer.get("failures", []) == ([complaint] if code else [])
