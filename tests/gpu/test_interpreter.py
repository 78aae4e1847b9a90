"""The Triton kernels without a GPU: the ops' own tests, run by Triton's interpreter in a process of its own.

Each file of tests/ops says in INTERPRETED which of its tests are short enough. By hand, any of them:
`TRITON_INTERPRET=1 python -m pytest tests/ops/test_norms.py -k triton`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lmkernels import _library

OPS = Path(__file__).parents[1] / "ops"
FILES = [path for path in sorted(OPS.glob("test_*.py")) if "\nINTERPRETED" in path.read_text()]
GROUPS = {
    "attention": [path for path in FILES if "attention" in path.name],
    "others": [path for path in FILES if "attention" not in path.name],
}


@pytest.mark.skipif(_library.triton_error is not None, reason=str(_library.triton_error))
@pytest.mark.parametrize("group", [name for name, files in GROUPS.items() if files])
def test_the_kernels_pass_the_tests_of_their_ops(group):
    command = [sys.executable, "-m", "pytest", *map(str, GROUPS[group]), "--interpreted", "-q", "--tb=short"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run([*command, "-p", "no:cacheprovider"], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, f"TRITON_INTERPRET=1 {' '.join(command)}\n{run.stdout[-8000:]}{run.stderr[-2000:]}"
