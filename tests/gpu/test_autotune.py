"""LMKERNELS_AUTOTUNE=1: what is tried, what is kept, and that nothing happens without it."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch

from lmkernels import _library, attention
from lmkernels.ops import _triton, _triton_autotune
from lmkernels.testing import compiled

DEFAULT = {"BLOCK_M": 64, "BLOCK_N": 16, "num_warps": 8, "num_stages": 1}
GPU = torch.device("cuda", 0)
needs_triton = pytest.mark.skipif(
    _library.triton_error is not None or _library.triton_interpreted, reason=f"no compiler: {_library.triton_error}"
)


@pytest.fixture
def tuning(tmp_path, monkeypatch):
    """Tuning without a GPU: tuning[...] = seconds of a configuration, by its tile; and which have been tried."""
    times: dict[tuple[int, int], float] = {}
    tried = []

    def seconds(launch, option):
        launch(option)
        tried.append(option)
        return times.get((option["BLOCK_M"], option["BLOCK_N"], option["num_warps"]), 1.0)

    monkeypatch.setenv("LMKERNELS_CACHE", str(tmp_path))
    monkeypatch.setattr(_triton_autotune, "seconds", seconds)
    monkeypatch.setattr(_triton_autotune, "gpu", lambda device: "GPU X")
    monkeypatch.setattr(_triton_autotune, "version", lambda name: "3.6.0")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    _triton_autotune.load.cache_clear()
    yield times, tried
    _triton_autotune.load.cache_clear()


def best(*key, launch=lambda option: None):
    return _triton_autotune.best(key, GPU, DEFAULT, launch)


def test_the_default_comes_first_and_tiles_stay_at_16_or_more():
    options = _triton_autotune.candidates(DEFAULT)
    assert options[0] == DEFAULT and len(options) == len({tuple(x.values()) for x in options}) == 12
    assert {(x["BLOCK_M"], x["BLOCK_N"]) for x in options} == {(64, 16), (32, 16)}


def test_the_fastest_is_taken_and_kept(tuning, tmp_path):
    times, tried = tuning
    times[32, 16, 4] = 0.5
    launched = []
    found = best("fwd", torch.bfloat16, 1024, launch=launched.append)
    assert found == {"BLOCK_M": 32, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1} and launched == tried
    assert json.loads((tmp_path / "autotune.json").read_text()) == {"GPU X|3.6.0|fwd|torch.bfloat16|1024": found}
    count = len(tried)
    assert best("fwd", torch.bfloat16, 1024) == found and len(tried) == count
    # another process
    _triton_autotune.load.cache_clear()
    times.clear()
    assert best("fwd", torch.bfloat16, 1024) == found and len(tried) == count
    assert best("fwd", torch.bfloat16, 2048) == DEFAULT and len(tried) == 2 * count


def test_equally_fast_ones_leave_the_default(tuning):
    assert best("fwd") == DEFAULT


def test_what_others_have_found_meanwhile_is_kept(tuning, tmp_path):
    best("fwd")
    (tmp_path / "autotune.json").write_text(json.dumps({"theirs": DEFAULT}))
    best("bwd_q")
    assert list(json.loads((tmp_path / "autotune.json").read_text())) == [
        "GPU X|3.6.0|bwd_q",
        "GPU X|3.6.0|fwd",
        "theirs",
    ]


def test_a_file_that_is_broken_is_made_anew(tuning, tmp_path):
    (tmp_path / "autotune.json").write_text('{"GPU X|3.6.0|fwd": {"BLOCK_M"')
    assert best("fwd") == DEFAULT
    assert json.loads((tmp_path / "autotune.json").read_text()) == {"GPU X|3.6.0|fwd": DEFAULT}


def test_nothing_is_tried_while_a_graph_is_captured(tuning, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert best("fwd") == DEFAULT and tuning[1] == [] and not (tmp_path / "autotune.json").exists()


@needs_triton
def test_a_configuration_without_the_resources_is_never_the_fastest(monkeypatch):
    from triton.runtime.errors import OutOfResources

    def launch(option):
        raise OutOfResources(300_000, 232_448, "shared memory")

    monkeypatch.setattr("triton.testing.do_bench", lambda function, **options: function())
    assert _triton_autotune.seconds(launch, DEFAULT) == float("inf")
    monkeypatch.setattr("triton.testing.do_bench", lambda function, **options: 0.25)
    assert _triton_autotune.seconds(launch, DEFAULT) == 0.25


@pytest.mark.parametrize("value", ["1", "0", None])
def test_it_happens_on_request_only(value, monkeypatch):
    if value is None:
        monkeypatch.delenv("LMKERNELS_AUTOTUNE", raising=False)
    else:
        monkeypatch.setenv("LMKERNELS_AUTOTUNE", value)
    spec = importlib.util.spec_from_file_location("lmkernels.ops._again", _triton_autotune.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.enabled == (value == "1")


@needs_triton
def test_attention_asks_once_for_each_kernel_and_launches_what_it_gets(monkeypatch):
    asked = []

    def smaller(key, device, default, launch):
        asked.append(key[0])
        return {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1}

    monkeypatch.setattr(_triton_autotune, "enabled", True)
    monkeypatch.setattr(_triton_autotune, "best", smaller)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda x: x.is_meta))
    launched = []
    with compiled.launches("sm_90"), torch.device("meta"):
        monkeypatch.setattr(_triton, "launch", lambda kernel, grid, *rest, **options: launched.append((grid, options)))
        q, k, v = (torch.empty(2, 100, h, 64, dtype=torch.bfloat16, requires_grad=True) for h in (4, 2, 2))
        out = attention(q, k, v, backend="triton")
        torch.autograd.grad(out, (q, k, v), torch.empty_like(out))
    assert asked == ["fwd", "bwd_q", "bwd_kv"]
    grids = [grid for grid, options in launched if options.get("BLOCK_N") == 32]
    assert grids == [(4 * 4 * 2,), (4 * 4 * 2,), (4 * 2 * 2,)]
