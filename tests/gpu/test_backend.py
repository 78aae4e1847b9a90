"""When the Triton backend runs, and what it says when it does not."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import lmkernels as lmk
from lmkernels import _library, layer_norm
from lmkernels.ops import _dispatch, _triton, attention, attention_decode, attention_varlen, norms

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
    attention_fwd attention_bwd attention_varlen_fwd attention_varlen_bwd attention_decode
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


def here(*shape: int) -> torch.Tensor:
    return torch.ones(shape)


def away(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """On another device than `here`."""
    return torch.ones(shape, dtype=dtype, device="meta")


def integers(*shape: int, make=here) -> torch.Tensor:
    return make(*shape).to(torch.int64)


Q = (1, 4, 2, 8)
WHOLE = torch.tensor([0, 4])
MIXED = {
    "attention": ("k must be on q's", lambda: lmk.attention(here(*Q), away(*Q), here(*Q))),
    "attention sink": ("sink must be on q's", lambda: lmk.attention(here(*Q), here(*Q), here(*Q), sink=away(2))),
    "attention_varlen": (
        "v must be on q's",
        lambda: lmk.attention_varlen(here(4, 2, 8), here(4, 2, 8), away(4, 2, 8), WHOLE, WHOLE, 4, 4),
    ),
    "attention_decode": (
        "kv_lengths must be on q's",
        lambda: lmk.attention_decode(here(1, 1, 2, 8), here(*Q), here(*Q), integers(1, make=away)),
    ),
    "scaled_dot_product_attention": (
        "value must be on query's",
        lambda: lmk.scaled_dot_product_attention(here(*Q), here(*Q), away(*Q)),
    ),
    "attention_weights": ("k must be on q's", lambda: lmk.attention_weights(here(*Q), away(*Q))),
    "linear": ("weight must be on x's", lambda: lmk.linear(here(4, 8), away(6, 8))),
    "qkv_projection": (
        "cos must be on x's",
        lambda: lmk.qkv_projection(here(1, 4, 8), here(24, 8), num_heads=1, cos=away(4, 4), sin=away(4, 4)),
    ),
    "output_projection": (
        "residual must be on x's",
        lambda: lmk.output_projection(here(1, 4, 2, 4), here(6, 8), residual=away(1, 4, 6)),
    ),
    "mlp": ("w_out must be on x's", lambda: lmk.mlp(here(4, 8), here(16, 8), None, away(8, 16), None)),
    "swiglu_mlp": ("w_up must be on x's", lambda: lmk.swiglu_mlp(here(4, 8), here(16, 8), away(16, 8), here(8, 16))),
    "rotary": ("cos must be on x's", lambda: lmk.rotary(here(*Q), away(4, 4), away(4, 4))),
    "embed": ("token_ids must be on token_table's", lambda: lmk.embed(integers(4, make=away), here(6, 8))),
    "add_positions": ("table must be on x's", lambda: lmk.add_positions(here(4, 8), away(4, 8))),
    "layer_norm": ("weight must be on x's", lambda: lmk.layer_norm(here(4, 8), away(8), None, 1e-5)),
    "rms_norm": ("residual must be on x's", lambda: lmk.rms_norm(here(4, 8), None, 1e-5, residual=away(4, 8))),
    "linear_cross_entropy": (
        "weight must be on hidden's",
        lambda: lmk.linear_cross_entropy(here(4, 8), away(6, 8), integers(4)),
    ),
}


@pytest.mark.parametrize("op", MIXED)
def test_tensors_on_different_devices_are_named(op):
    message, call = MIXED[op]
    with pytest.raises(ValueError, match=f"^{message} device {torch.empty(0).device}, got meta$"):
        call()


class OnGpu(torch.Tensor):
    """What a tensor on a GPU says of itself."""

    is_cuda, is_cpu, device = True, False, torch.device("cuda", 0)


def test_tensors_on_a_gpu_that_is_too_old_are_refused_by_name_and_else_go_to_the_reference(present, monkeypatch):
    reason = "the kernels need an NVIDIA GPU from sm_80 on, got Tesla T4 with sm_75"
    monkeypatch.setattr(_triton, "_gpu_absence", lambda device: reason)
    x, backends = X.as_subclass(OnGpu), norms.api.BACKENDS
    with pytest.raises(NotImplementedError, match=f"layer_norm: backend 'triton' cannot run this: {reason}"):
        _dispatch.choose("layer_norm", backends, "triton", x)
    assert _dispatch.choose("layer_norm", backends, None, x) is backends["reference"]


@pytest.mark.parametrize(("op", "axes"), [(attention, 4), (attention_varlen, 3), (attention_decode, 4)])
def test_head_sizes_beyond_the_kernels_are_refused_by_name_and_else_go_to_the_reference(op, axes, present, monkeypatch):
    for module, function in ((_triton, "_gpu_absence"), (_library, "gpu_absence")):
        monkeypatch.setattr(module, function, lambda device: None)
    name, backends = op.__name__.rpartition(".")[2], op.api.BACKENDS
    q, fits = (torch.zeros([1] * (axes - 1) + [d]).as_subclass(OnGpu) for d in (257, 256))
    with pytest.raises(NotImplementedError, match=f"{name}: backend 'triton' cannot run this: head sizes go up to 256"):
        _dispatch.choose(name, backends, "triton", q, q, q)
    assert _dispatch.choose(name, backends, None, q, q, q) is backends["reference"]
    assert _dispatch.choose(name, backends, None, fits, fits, fits) is backends["triton"]
