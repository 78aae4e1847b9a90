"""Choosing a backend: the named one runs or says why not, and nothing else happens silently."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import lmkernels
from lmkernels.ops import _dispatch
from lmkernels.ops._precision import cuda_float32, float32_parts


def _backend(reason: str | None) -> SimpleNamespace:
    return SimpleNamespace(unsupported=lambda *arguments: reason)


FAST, SLOW, BROKEN = _backend(None), _backend(None), _backend("head sizes go up to 256, got 300")


def test_none_takes_the_first_backend():
    assert _dispatch.choose("op", {"fast": FAST, "slow": SLOW}, None) is FAST


def test_none_passes_over_a_backend_that_objects():
    assert _dispatch.choose("op", {"broken": BROKEN, "slow": SLOW}, None) is SLOW


def test_a_named_backend_runs():
    assert _dispatch.choose("op", {"fast": FAST, "slow": SLOW}, "slow") is SLOW


def test_a_named_backend_that_objects_raises_its_reason_and_never_falls_back():
    with pytest.raises(
        NotImplementedError, match="op: backend 'broken' cannot run this: head sizes go up to 256, got 300"
    ):
        _dispatch.choose("op", {"broken": BROKEN, "slow": SLOW}, "broken")


def test_an_unknown_name_raises_the_known_ones():
    with pytest.raises(ValueError, match="backend must be one of fast, slow or None, got 'quick'"):
        _dispatch.choose("op", {"fast": FAST, "slow": SLOW}, "quick")


def test_every_reason_is_told_when_no_backend_can():
    with pytest.raises(
        NotImplementedError, match="op: no backend can run this; broken: head sizes go .* 300; gone: no file"
    ):
        _dispatch.choose("op", {"broken": BROKEN, "gone": _backend("no file")}, None)


def test_the_arguments_reach_the_backend():
    seen = []
    backend = SimpleNamespace(unsupported=lambda *arguments: seen.append(arguments))
    _dispatch.choose("op", {"fast": backend}, None, 1, "two")
    assert seen == [(1, "two")]


def test_backends_says_what_is_present_and_why_not():
    backends = lmkernels.backends()
    assert list(backends) == ["reference", "native", "triton"]
    assert backends["reference"] is None
    assert all(reason is None or len(reason) > 10 for reason in backends.values())


def test_a_named_native_backend_runs_or_raises_the_reason_that_backends_tells():
    q = torch.zeros(1, 2, 1, 4)
    reason = lmkernels.backends()["native"]
    if reason is None:
        assert lmkernels.attention(q, q, q, backend="native").shape == q.shape
    else:
        with pytest.raises(NotImplementedError) as error:
            lmkernels.attention(q, q, q, backend="native")
        assert reason in str(error.value)


def test_a_head_size_that_native_lacks_is_refused_by_name_and_run_by_the_reference_otherwise(native):
    q = torch.randn(1, 2, 1, 300)
    with pytest.raises(NotImplementedError, match="head sizes go up to 256, got 300 and 300"):
        lmkernels.attention(q, q, q, backend=native)
    torch.testing.assert_close(lmkernels.attention(q, q, q), lmkernels.attention(q, q, q, backend="reference"))


@pytest.mark.parametrize("precision, kernel", [("tf32", "tf32"), ("ieee", "ieee"), ("none", "ieee")])
def test_triton_takes_tf32_where_torch_allows_it_by_either_name(precision, kernel):
    matmul = torch.backends.cuda.matmul
    try:
        matmul.fp32_precision = precision
        assert cuda_float32() == kernel
    finally:
        matmul.fp32_precision = "none"
    try:
        matmul.allow_tf32 = precision == "tf32"
        assert cuda_float32() == kernel
    finally:
        matmul.allow_tf32 = False


@pytest.mark.parametrize("precision, parts", [("tf32", 2), ("bf16", 1), ("ieee", 3)])
def test_the_cpu_follows_torchs_newer_name_of_its_precision(precision, parts):
    matmul = torch.backends.mkldnn.matmul
    assert float32_parts() == 3
    try:
        matmul.fp32_precision = precision
        assert float32_parts() == parts
    finally:
        matmul.fp32_precision = "none"
