"""The CUDA C++ kernels without a GPU: what nvcc made of them, and the kernels themselves, run on a CPU.

With a GPU the ops' own tests run them: `python -m pytest tests/ops/test_attention_decode.py --device cuda -k native`.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import native_build
import pytest
import torch

from lmkernels import _library
from lmkernels.ops import _dispatch
from lmkernels.ops.attention_decode import api, native
from lmkernels.testing.compiled import SHARED_LIMIT

ROOT = Path(__file__).parents[2]
LIBRARY = ROOT / "lmkernels/_C_cuda.so"
ARCHITECTURES = {"sm_80": "sm_80", "sm_90a": "sm_90"}  # and the names of their limits

needs_library = pytest.mark.skipif(not LIBRARY.exists(), reason="lmkernels/_C_cuda.so is not built: there was no nvcc")


@cache
def cuobjdump(*arguments: str) -> str:
    """What it tells of the library; triton brings the program, and the disassembler that it calls."""
    folders = [os.environ["PATH"]]
    if spec := importlib.util.find_spec("triton"):
        folders.append(str(Path(spec.origin).parent / "backends/nvidia/bin"))
    program = shutil.which("cuobjdump", path=os.pathsep.join(folders))
    if program is None:
        pytest.skip("cuobjdump is not installed; triton and CUDA bring it")
    environment = os.environ | {"PATH": os.pathsep.join(folders)}
    run = subprocess.run([program, *arguments, LIBRARY], env=environment, capture_output=True, text=True)
    if run.returncode:
        pytest.skip(f"{program} does not know what nvcc has made: {run.stderr[-300:]}")
    return run.stdout


def kernels(listing: str, architecture: str, function: str) -> dict[str, str]:
    """{mangled name: the text about it} out of a listing of all architectures."""
    (section,) = [part for part in listing.split("Fatbin elf code")[1:] if f"arch = {architecture}\n" in part]
    parts = re.split(function, section)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@needs_library
def test_the_library_has_code_for_each_gpu_and_for_later_ones():
    code = cuobjdump("-res-usage")
    assert re.findall(r"Fatbin elf code:\n=+\narch = (\w+)", code) == list(ARCHITECTURES)
    assert re.search(r"PTX file\s+1: \S*sm_90\.ptx", cuobjdump("-lptx"))


@needs_library
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nothing_spills_and_shared_memory_is_there(architecture):
    usage = kernels(cuobjdump("-res-usage"), architecture, r"Function (\w+):")
    assert sum("attend" in name for name in usage) == 4 * 3 * 2  # element types, head sizes, rows
    assert sum("append" in name for name in usage) == 4 and sum("combine" in name for name in usage) == 1
    for name, text in usage.items():
        of = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", text)}
        assert of["STACK"] == of["LOCAL"] == 0, (name, of)
        # what a block may have without asking for more, and so that two blocks fit into a multiprocessor
        assert of["SHARED"] <= 48 * 1024 and 2 * of["SHARED"] <= SHARED_LIMIT[ARCHITECTURES[architecture]], (name, of)
        assert 2 * 128 * of["REG"] <= 64 * 1024, (name, of)


@needs_library
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_caches_are_read_16_bytes_at_a_time_and_asynchronously(architecture):
    code = kernels(cuobjdump("-sass"), architecture, r"Function : (\w+)")
    attend = {name: text for name, text in code.items() if "attend" in name}
    assert attend
    for name, text in attend.items():
        assert "LDGSTS.E.BYPASS.128" in text and "LDS.128" in text, name
        assert re.search(r"\b(LDL|STL)\b", text) is None, name


@needs_library
@pytest.mark.skipif(shutil.which("nm") is None, reason="nm is not installed")
def test_the_library_asks_for_the_stable_abi_of_torch_and_no_cuda_library():
    listing = subprocess.run(["nm", "-DC", "--undefined-only", LIBRARY], capture_output=True, text=True, check=True)
    symbols = [line.split(maxsplit=1)[1] for line in listing.stdout.splitlines()]
    assert {"aoti_torch_get_current_cuda_stream", "torch_library_impl"} <= set(symbols)
    strange = r"\b(at|c10|torch|caffe2|pybind11)::|^_?Py|^cu[A-Z]|^cuda[A-Z]"
    assert [symbol for symbol in symbols if re.search(strange, symbol)] == []


def test_kernel_files_include_no_torch():
    for path in (ROOT / "csrc/cuda").iterdir():
        includes = re.findall(r"#\s*include\s*[<\"]([^>\"]+)", path.read_text())
        assert path.name == "bindings.cpp" or not any(name.startswith(("torch", "ATen", "c10")) for name in includes)


# --- when they run ---


def test_the_op_shares_schema_and_fake_with_the_cpu():
    cpu, cuda = torch.ops.lmkernels.attention_decode.default, torch.ops.lmkernels.attention_decode_cuda.default
    assert str(cuda._schema) == str(cpu._schema).replace("attention_decode", "attention_decode_cuda")
    q, cache = torch.empty(2, 1, 4, 64, device="meta"), torch.empty(2, 9, 2, 64, device="meta")
    lengths = torch.empty(2, dtype=torch.int64, device="meta")
    rest = [None] * 4, False, None, 0.1, 0.0, -1, None, None, None, None
    for op in (cpu, cuda):
        out, lse = op(q, cache, cache.clone(), lengths, *rest[0], *rest[1:])
        assert out.shape == (2, 1, 4, 64) and lse.shape == (2, 4, 1)


class OnCuda(torch.Tensor):
    """What a tensor on a GPU says of itself."""

    is_cuda, is_cpu, device = True, False, torch.device("cuda", 0)


def test_they_run_on_request_only(monkeypatch):
    monkeypatch.setattr(_library, "cuda_error", None)
    monkeypatch.setattr(_library, "gpu_absence", lambda device: None)
    q = torch.zeros(1, 1, 2, 64, dtype=torch.bfloat16).as_subclass(OnCuda)
    backends = {"native": native, "reference": api.BACKENDS["reference"]}
    assert _dispatch.choose("attention_decode", backends, None, q, q, q) is backends["reference"]
    assert _dispatch.choose("attention_decode", backends, "native", q, q, q) is native


@pytest.mark.parametrize(
    ("name", "value", "dtype", "reason"),
    [
        ("cuda_error", "_C_cuda.so does not exist", torch.float32, "_C_cuda.so does not exist"),
        ("gpu_absence", lambda device: "need sm_80 on, got sm_75", torch.float32, "need sm_80 on, got sm_75"),
        ("cuda_error", None, torch.float64, "torch.float64 is not one of float32, bfloat16, float16"),
    ],
)
def test_what_they_cannot_do_is_told(name, value, dtype, reason, monkeypatch):
    monkeypatch.setattr(_library, "cuda_error", None)
    monkeypatch.setattr(_library, "gpu_absence", lambda device: None)
    monkeypatch.setattr(_library, name, value)
    q = torch.zeros(1, 1, 2, 64, dtype=dtype).as_subclass(OnCuda)
    with pytest.raises(NotImplementedError, match=reason):
        _dispatch.choose("attention_decode", api.BACKENDS, "native", q, q, q)


def test_a_torch_without_cuda_does_not_load_them():
    assert torch.version.cuda is not None or "is a build without CUDA" in _library.cuda_error


# --- what they compute ---

EMULATED = (
    "native and (as_plain_torch and (float32 or bfloat16) and not 000 and not several and not prompt"
    " or int8_cache_gives and float16 and not 000 or nearest or spoil or seen or empty or never_looked"
    " or bits_of_append) or alone_and_in_a_batch and (bfloat16 or int8) and everything"
    " or contiguous_one and shares and 3- or are_clamped"
)


@pytest.mark.skipif(native_build.missing() is not None, reason=str(native_build.missing()))
def test_the_kernels_pass_the_tests_of_their_op_on_an_emulated_gpu():
    """The same sources, with threads, warps, barriers and copies of common.cuh's other version."""
    (library,) = native_build.build("emulated/_C_cuda.so")
    command = [
        sys.executable,
        "-m",
        "pytest",
        *map(str, sorted((ROOT / "tests/ops").glob("test_attention_decode*.py"))),
    ]
    command += ["-q", "-k", EMULATED, "--tb=short", "-p", "emulated_cuda", "-p", "no:cacheprovider"]
    paths = [str(Path(__file__).parent / "emulated"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "LMKERNELS_EMULATED_CUDA": str(library)}
    run = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert run.returncode == 0, f"{' '.join(command)}\n{run.stdout[-8000:]}{run.stderr[-2000:]}"
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) > 100
