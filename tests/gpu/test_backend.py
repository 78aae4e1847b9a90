"""When the Triton backend runs, and what it says when it does not."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from lmkernels import _library, layer_norm
from lmkernels.ops import _dispatch, _triton, norms

X = torch.ones(3, 8)


def refusal(x=X) -> str:
    with pytest.raises(NotImplementedError) as error:
        layer_norm(x, None, None, 1e-5, backend="triton")
    return str(error.value)


@pytest.fixture
def present(monkeypatch):
    """As where triton is installed, and no interpreter asked for."""
    monkeypatch.setattr(_library, "triton_error", None)
    monkeypatch.setattr(_triton, "direct", False)


def test_tensors_on_the_cpu_are_refused_with_the_way_to_run_them(present):
    assert "backend 'triton' cannot run this: the kernels run on CUDA tensors, got device 'cpu'" in refusal()
    assert "TRITON_INTERPRET=1" in refusal()


def test_the_interpreter_is_never_the_default(present, monkeypatch):
    monkeypatch.setattr(_triton, "direct", True)
    backends = norms.api.BACKENDS
    assert (
        _dispatch.choose("layer_norm", {"triton": backends["triton"], "last": backends["reference"]}, None, X)
        is (backends["reference"])
    )
    assert _dispatch.choose("layer_norm", backends, "triton", X) is backends["triton"]


def test_float64_is_refused(present, monkeypatch):
    monkeypatch.setattr(_triton, "direct", True)
    assert "dtype torch.float64 is not one of float32, bfloat16, float16" in refusal(X.double())


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "the package triton is not installed"),
        ("__version__ = '3.5.1'", "the kernels need triton 3.6 or later, got 3.5.1"),
        ("no version", "the kernels need triton 3.6 or later, got an unknown version"),
        ("__version__ = '3.6.0'", None),
        ("__version__ = '3.10.2+git1234'", None),
        ("__version__ = '4.0.0'", None),
    ],
)
def test_a_triton_that_is_missing_or_too_old_is_told(text, reason, tmp_path, monkeypatch):
    (tmp_path / "triton").mkdir()
    if text is not None:
        (tmp_path / "triton/__init__.py").write_text(text + "\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "triton", raising=False)
    found = _library._find_triton()
    assert found is None if reason is None else found.startswith(reason)
    monkeypatch.setattr(_library, "triton_error", found)
    if reason is not None:
        assert reason in _library.backends()["triton"] and reason in refusal()


def test_a_gpu_that_is_too_old_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    reason = _library.gpu_absence(torch.device("cuda", 0))
    assert reason == "the kernels need an NVIDIA GPU from sm_80 on, got Tesla T4 with sm_75"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert _library.gpu_absence(torch.device("cuda", 0)) is None


OPS = """
    norm_fwd norm_bwd softmax_fwd softmax_bwd rotary embed_fwd embed_bwd linear_fwd linear_bwd activation_bwd
    qkv_projection_fwd qkv_projection_bwd linear_cross_entropy_fwd linear_cross_entropy_bwd
"""


def test_every_op_of_a_triton_backend_is_registered_for_cuda():
    for name in OPS.split():
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"lmkernels::{name}", "CUDA")


def test_calling_an_op_on_the_cpu_does_not_import_triton():
    program = (
        "import sys, torch; before = 'triton' in sys.modules; import lmkernels; "
        "lmkernels.layer_norm(torch.ones(3, 8), None, None, 1e-5); print(before or 'triton' not in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stdout == "True\n", run.stderr
