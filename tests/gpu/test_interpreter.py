"""The Triton kernels without a GPU: the ops' own tests, run by Triton's interpreter in a process of its own.

Each file of tests/ops says in INTERPRETED which of its tests are short enough. By hand, any of them:
`TRITON_INTERPRET=1 python -m pytest tests/ops/test_norms.py -k triton`.
"""

from __future__ import annotations

import pytest

from lmkernels import _library


@pytest.mark.skipif(_library.triton_error is not None, reason=str(_library.triton_error))
@pytest.mark.parametrize("group", ["attention", "others"])
def test_the_kernels_pass_the_tests_of_their_ops(group, rerun, device):
    if device != "cpu":
        pytest.skip("the tests themselves run the kernels, compiled")
    rerun("--interpreted", group, TRITON_INTERPRET="1")
