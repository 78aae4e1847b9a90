"""python -m benchmarks attention: times this library and its peers in turn, after checking that it is right."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from . import harness

FOLDERS = ("ops", "models")


def names() -> list[str]:
    """Every benchmark: the modules of ops/ and models/, each with run(options) or, where that is all, lines()."""
    here = Path(__file__).parent
    return sorted(path.stem for folder in FOLDERS for path in (here / folder).glob("*.py") if path.stem != "__init__")


def load(name: str):
    here = Path(__file__).parent
    folder = next(folder for folder in FOLDERS if (here / folder / f"{name}.py").exists())
    return importlib.import_module(f"benchmarks.{folder}.{name}")


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("name", nargs="?", choices=names(), help="what to measure")
    parser.add_argument("--list", action="store_true", help="print the benchmarks and stop")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write results and conditions to FILE")
    parser.add_argument(
        "--base", metavar="REV", help="also measure the git revision REV, built in a worktree of its own"
    )
    harness.add_options(parser)
    options = parser.parse_args(arguments)
    if options.name is None and not options.list:
        parser.error(f"name one of {', '.join(names())}")
    if options.threads is not None and options.threads < 1:
        parser.error(f"--threads must be at least 1, got {options.threads}")
    if options.seconds <= 0:
        parser.error(f"--seconds must be more than 0, got {options.seconds}")
    return options


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    if options.list:
        print("\n".join(names()))
        return 0
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    torch.set_float32_matmul_precision(options.matmul_precision)
    chosen = harness.Options(
        cases=options.cases,
        dtypes=tuple(options.dtype or ("float32", "bfloat16")),
        seconds=options.seconds,
        peers=options.peers,
        plot=options.plot,
    )
    module = load(options.name)
    rows = module.run(chosen) if hasattr(module, "run") else harness.measure(module.lines(), chosen)
    if options.base:
        rows = beside(rows, measure_revision(options.base, arguments))
    record = {"command": f"python -m benchmarks {shlex.join(arguments)}", **harness.conditions(), "rows": rows}
    print(harness.table(rows))
    print("\n" + "\n".join(f"{key}: {value}" for key, value in record.items() if key != "rows"))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    return 1 if any("error" in row for row in rows) else 0


def measure_revision(revision: str, arguments: list[str]) -> list[dict]:
    """The rows that `revision` prints for the same arguments, from a worktree that is removed again."""
    git = ["git", "-C", str(harness.REPOSITORY)]
    with tempfile.TemporaryDirectory(prefix="lmkernels-base-") as folder:
        tree, result = Path(folder, "tree"), Path(folder, "rows.json")
        _run([*git, "worktree", "add", "--detach", str(tree), revision])
        try:
            _run([sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"], cwd=tree)
            # the last --base and --json on a command line count, and an empty base is none
            _run([sys.executable, "-m", "benchmarks", *arguments, "--base", "", "--json", str(result)], cwd=tree)
            return json.loads(result.read_text())["rows"]
        finally:
            _run([*git, "worktree", "remove", "--force", str(tree)])


def _run(command: list[str], **options) -> None:
    """Runs a step of measure_revision with its output on stderr; a failure ends the benchmark."""
    print("+ " + shlex.join(command), file=sys.stderr)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])  # for ninja
    run = subprocess.run(command, stdout=sys.stderr, env=os.environ | {"PATH": path}, **options)
    if run.returncode:
        raise SystemExit(f"{shlex.join(command)} failed with exit code {run.returncode}")


def beside(rows: list[dict], base: list[dict]) -> list[dict]:
    """rows with the base's figures of the same name in columns of their own."""
    by_name = {row["name"]: row for row in base}
    return [
        row | {f"base {key}": value for key, value in by_name.get(row["name"], {}).items() if key in ("ours", "ratio")}
        for row in rows
    ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
