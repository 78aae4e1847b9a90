"""Importing lmkernels is light, and never fails for want of the compiled library."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lmkernels"


def python(program, root=PACKAGE.parent):
    """What a fresh process prints that finds lmkernels under `root`."""
    run = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(root)},
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_import_brings_nothing_heavy():
    """Beyond torch, which may bring what it likes."""
    program = "import sys, torch; before = set(sys.modules); import lmkernels; print(*(set(sys.modules) - before))"
    brought = {name.partition(".")[0] for name in python(program).split()}
    assert "lmkernels" in brought
    assert brought.isdisjoint({"matplotlib", "numpy", "safetensors", "tokenizers", "tqdm", "transformers", "triton"})


def test_backends_does_not_import_triton():
    assert python("import sys, lmkernels; lmkernels.backends(); print('triton' in sys.modules)") == "False\n"


@pytest.fixture
def bare(tmp_path):
    """A folder with a copy of the package that lacks the compiled library."""
    shutil.copytree(PACKAGE, tmp_path / "lmkernels", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return tmp_path


SERVE = """
import torch, lmkernels
print(lmkernels.backends()["native"])
q = torch.randn(2, 5, 4, 8, requires_grad=True)
out = lmkernels.attention(q, q, q, causal=True)
out.sum().backward()
print(torch.equal(out, lmkernels.attention(q, q, q, causal=True, backend="reference")))
try:
    lmkernels.attention(q, q, q, backend="native")
except NotImplementedError as error:
    print(error)
"""


def test_without_the_library_the_reference_serves(bare):
    reason, equal, refusal = python(SERVE, bare).splitlines()
    assert reason.startswith(f"{bare}/lmkernels/_C.so does not exist: lmkernels was installed without a C++ compiler")
    assert equal == "True"
    assert reason in refusal


@pytest.mark.parametrize("content", [b"", b"not a library"], ids=["empty", "garbage"])
def test_a_broken_library_is_named(bare, content):
    (bare / "lmkernels/_C.so").write_bytes(content)
    reason, equal, refusal = python(SERVE, bare).splitlines()
    assert reason.startswith(f"{bare}/lmkernels/_C.so does not load into torch ")
    assert equal == "True"
    assert reason in refusal
