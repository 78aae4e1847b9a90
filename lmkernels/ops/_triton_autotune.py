"""The fastest of several configurations of a kernel, found by trying, on request: LMKERNELS_AUTOTUNE=1.

What is found stays on disk, $LMKERNELS_CACHE/autotune.json (default: ~/.cache/lmkernels), by the GPU's name, the
version of Triton, the kernel and all that the choice may depend on. Without the variable nothing is read or tried.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch

from .._files import write_files

Configuration = dict[str, int]

enabled: bool = os.environ.get("LMKERNELS_AUTOTUNE") == "1"


def path() -> Path:
    return Path(os.environ.get("LMKERNELS_CACHE", Path.home() / ".cache" / "lmkernels")) / "autotune.json"


def candidates(default: Configuration) -> list[Configuration]:
    """The default first, then its neighbours: half the tile, 4 or 8 warps, up to 3 stages."""
    found = [default]
    for m, n in ((1, 1), (2, 1), (1, 2)):
        for warps in (4, 8):
            for stages in (1, 2, 3):
                smaller = {"BLOCK_M": default["BLOCK_M"] // m, "BLOCK_N": default["BLOCK_N"] // n}
                if min(smaller.values()) >= 16:
                    found.append({**smaller, "num_warps": warps, "num_stages": stages})
    return [option for i, option in enumerate(found) if option not in found[:i]]


def best(
    key: tuple, device: torch.device, default: Configuration, launch: Callable[[Configuration], None]
) -> Configuration:
    """The configuration for a kernel whose every launch writes all of its results anew.

    key: the kernel's name, and what else the choice may depend on; while a CUDA graph is captured nothing is tried.
    """
    name = "|".join(map(str, (gpu(device), version("triton"), *key)))
    known = load(path())
    if name in known:
        return known[name]
    if torch.cuda.is_current_stream_capturing():
        return default
    times = [(seconds(launch, option), i, option) for i, option in enumerate(candidates(default))]
    known[name] = min(times)[2]
    # those that other processes have found since are kept
    text = json.dumps(read(path()) | known, indent=1, sort_keys=True) + "\n"
    write_files(path().parent, {path().name: lambda file: file.write_text(text)})
    return known[name]


@functools.cache
def gpu(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


@functools.cache
def load(file: Path) -> dict[str, Configuration]:
    """What the file held when it was first asked for, and what this process has found since."""
    return read(file)


def read(file: Path) -> dict[str, Configuration]:
    """Nothing where there is no file, or one that is no JSON: what it held is found again."""
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return {}


def seconds(launch: Callable[[Configuration], None], option: Configuration) -> float:
    """Infinity for a configuration that the GPU has not the registers or the shared memory for."""
    from triton.runtime.errors import OutOfResources, PTXASError
    from triton.testing import do_bench

    try:
        return do_bench(lambda: launch(option), warmup=5, rep=20, return_mode="median")
    except (OutOfResources, PTXASError):
        return float("inf")
