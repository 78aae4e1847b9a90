"""What is built: wheels for every Python, sources for every CPU, a library for every torch."""

import os
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
KERNELS = sorted(path for path in (ROOT / "csrc/cpu").glob("*.cpp") if path.name != "bindings.cpp")
MICRO = ROOT / "tests/micro/micro.cpp"


def build_wheel(folder, **environment):
    """The wheel of a copy of the project whose only C++ source is isa.cpp: the tag and the files, in seconds."""
    project = folder / "project"
    shutil.copytree(ROOT / "lmkernels", project / "lmkernels", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copytree(ROOT / "csrc/cpu", project / "csrc/cpu", ignore=lambda _, names: set(names) - {"isa.h", "isa.cpp"})
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, project)
    run = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index",
         "--wheel-dir", folder, project],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel, zipfile.ZipFile(wheel).namelist()


def tag(wheel):
    return wheel.stem.split("-", 2)[2]


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++")) is None, reason="there is no C++ compiler")
def test_wheel_serves_every_python(tmp_path):
    wheel, files = build_wheel(tmp_path)
    assert tag(wheel).startswith("py3-none-") and tag(wheel) != "py3-none-any"
    assert "lmkernels/_C.so" in files
    assert "lmkernels/py.typed" in files
    assert {name.partition("/")[0].partition("-")[0] for name in files} == {"lmkernels"}


@pytest.mark.parametrize(
    "environment", [{"LMKERNELS_NO_EXTENSION": "1"}, {"CXX": "no-such-compiler"}], ids=["unwanted", "no compiler"]
)
def test_wheel_without_the_library(environment, tmp_path):
    wheel, files = build_wheel(tmp_path, **environment)
    assert tag(wheel) == "py3-none-any"
    assert [name for name in files if name.endswith(".so")] == []


@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")
def test_a_missing_cuda_compiler_is_told_in_one_line(tmp_path):
    (tmp_path / "c++").symlink_to(shutil.which("c++"))
    environment = {**os.environ, "PATH": str(tmp_path), "CXX": "c++", "CUDA_HOME": str(tmp_path)}
    command = [sys.executable, "setup.py", "--quiet", "--version"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    told = [line for line in run.stderr.splitlines() if line.startswith("lmkernels")]
    assert told == ["lmkernels: no CUDA compiler (nvcc): built without the CUDA kernels"]


CROSS_COMPILER = "aarch64-linux-gnu-g++"


@pytest.mark.skipif(shutil.which(CROSS_COMPILER) is None, reason=f"{CROSS_COMPILER} is not installed")
@pytest.mark.parametrize("source", [*KERNELS, MICRO], ids=lambda path: path.name)
def test_kernels_compile_for_aarch64(source, tmp_path):
    includes = [f"-I{ROOT}/csrc/cpu", f"-I{MICRO.parent}"]
    flags = ["-std=c++20", "-O1", "-Wall", "-Werror", "-Wno-maybe-uninitialized", *includes]
    subprocess.run([CROSS_COMPILER, *flags, "-c", source, "-o", tmp_path / "kernel.o"], check=True)


OTHER_TORCH = os.environ.get("LMKERNELS_OTHER_TORCH")
COMPARE = """
import torch, lmkernels
assert lmkernels.backends()["native"] is None, lmkernels.backends()["native"]
q, k, v = (torch.randn(2, 37, 4, 64, requires_grad=True) for _ in range(3))
results = {}
for backend in ("native", "reference"):
    out = lmkernels.attention(q, k, v, causal=True, backend=backend)
    results[backend] = (out, *torch.autograd.grad(out.square().sum(), (q, k, v)))
for native, reference in zip(*results.values()):
    torch.testing.assert_close(native, reference, rtol=1e-4, atol=1e-4)
print(torch.__version__)
"""


needs_other_torch = pytest.mark.skipif(
    OTHER_TORCH is None, reason="LMKERNELS_OTHER_TORCH names no Python; `make test-other-torch` does"
)


@needs_other_torch
def test_library_runs_under_other_torch():
    """The library as built here, in the Python that LMKERNELS_OTHER_TORCH names."""
    import torch

    run = subprocess.run(
        [OTHER_TORCH, "-c", COMPARE],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() != torch.__version__


@needs_other_torch
@pytest.mark.parametrize("source", ["csrc/cpu/bindings.cpp", "csrc/cuda/bindings.cpp"])
def test_sources_compile_with_other_torch(source):
    program = "from torch.utils.cpp_extension import include_paths; print(*include_paths(), sep='\\n')"
    run = subprocess.run([OTHER_TORCH, "-c", program], capture_output=True, text=True, check=True)
    flags = ["-std=c++20", "-DTORCH_TARGET_VERSION=0x020b000000000000", "-DUSE_CUDA"]
    flags += [f"-I{path}" for path in run.stdout.splitlines()]
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    run = subprocess.run([*compiler, "-fsyntax-only", *flags, ROOT / source], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
