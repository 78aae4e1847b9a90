from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

# Threads that wait must not spin: the shapes of tests are small, and on a busy machine spinning takes ten times longer.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# What cuBLAS wants from those who ask for deterministic algorithms, as `poisoned_memory` does.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ["LMKERNELS_POISON_MEMORY"] = "1"

import pytest
import torch

import lmkernels
from lmkernels import _library

OPS = Path(__file__).parent / "ops"
# Other processes run a part of tests/ops once more, by option: each file of tests says in a variable of this name which
# of its tests, by a regular expression for their names.
PARTS = {"--interpreted": "INTERPRETED", "--on-every-isa": "ON_EVERY_ISA"}


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="device that the ops are tested on (default: cpu)")
    parser.addoption(
        "--interpreted",
        action="store_true",
        help="only what is short enough for Triton's interpreter, TRITON_INTERPRET=1",
    )
    parser.addoption(
        "--on-every-isa", action="store_true", help="only what is run on every instruction set, LMKERNELS_CPU_ISA"
    )
    parser.addoption(
        "--every-configuration", action="store_true", help="compile every Triton kernel there is, not only the hot ones"
    )


def pytest_configure(config):
    """What a test makes without naming a device is made where the ops are tested."""
    device = config.getoption("--device")
    if device == "cpu":
        return
    torch.set_default_device(device)
    for name in ("rand", "randn", "randint", "randperm"):
        setattr(torch, name, draws_where_the_generator_is(getattr(torch, name)))
    # `poisoned_memory` is about memory; that an op of torch's sums in any order is no matter
    config.addinivalue_line("filterwarnings", "ignore:.*deterministic:UserWarning")


def draws_where_the_generator_is(function: Callable) -> Callable:
    """The function, but a generator on the CPU draws the numbers that it always does, which then go to the device."""

    @functools.wraps(function)
    def draw(*arguments, generator: torch.Generator | None = None, device=None, **options):
        # torch puts its default in the place of None only for the function that it knows by this name
        device = torch.get_default_device() if device is None else device
        if generator is None:
            return function(*arguments, device=device, **options)
        return function(*arguments, generator=generator, device=generator.device, **options).to(device)

    return draw


@pytest.fixture(scope="session")
def device(request) -> str:
    return request.config.getoption("--device")


def backends_for(device: str, module: ModuleType | None = None) -> tuple[str, ...]:
    """On the CPU triton needs its interpreter, which is a matter of the whole process, and too slow for the others.

    A module of tests whose op has CUDA C++ kernels says so: NATIVE_ON_CUDA = True.
    """
    if _library.triton_interpreted:
        return ("triton",)
    if device == "cpu":
        return ("reference", "native")
    return ("reference", "triton", *["native"] * getattr(module, "NATIVE_ON_CUDA", False))


def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames:
        names = backends_for(metafunc.config.getoption("--device"), metafunc.module)
        metafunc.parametrize("backend", names, indirect=True, scope="session")


def pytest_collection_modifyitems(config, items):
    for option, name in PARTS.items():
        if config.getoption(option):
            asked = [item for item in items if hasattr(item.module, name)]
            chosen = [item for item in asked if re.search(getattr(item.module, name), item.name)]
            if unused := {item.path for item in asked} - {item.path for item in chosen}:
                raise pytest.UsageError(f"{name} chooses no test of {', '.join(map(str, unused))}")
            config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
            items[:] = chosen


@pytest.fixture(scope="session")
def rerun() -> Callable:
    """rerun(option, "attention", VARIABLE=value): the tests of attention that take part in it, in a process of its own.

    Its groups are "attention" and "others".
    """

    def run(option: str, group: str, **environment: str) -> None:
        files = [path for path in sorted(OPS.glob("test_*.py")) if f"\n{PARTS[option]} = " in path.read_text()]
        files = [str(path) for path in files if ("attention" in path.name) == (group == "attention")]
        assert files
        command = [sys.executable, "-m", "pytest", *files, option, "-q", "--tb=short", "-p", "no:cacheprovider"]
        process = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
        given = " ".join(f"{name}={value}" for name, value in environment.items())
        output = process.stdout[-8000:] + process.stderr[-2000:]
        assert process.returncode == 0, f"{given} {' '.join(command)}\n{output}"

    return run


# Errors about numbers in tensors, which are read on the CPU only.
ABOUT_VALUES = (
    r"got values from|must lie between|between 0 and|must start at 0|must not decrease|at least every|labels must"
)


def pytest_runtest_setup(item):
    """On a GPU nobody waits for values: our kernels clamp them, and torch's may end the whole process's use of it."""
    if item.config.getoption("--device") == "cpu" or not hasattr(item, "callspec"):
        return
    given = item.callspec.params
    texts = [*given.values(), *getattr(item.module, "BAD", {}).get(given.get("name"), ())]
    if any(isinstance(text, str) and re.search(ABOUT_VALUES, text) for text in texts):
        pytest.skip("numbers in tensors on a GPU are not read")


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    """float64 is for the CPU, where gradients are checked by finite differences."""
    try:
        return (yield)
    except NotImplementedError as error:
        if "cannot run this: dtype torch.float64" in str(error):
            pytest.skip(str(error))
        raise


@pytest.fixture(scope="session")
def backend(request, device) -> str:
    """Each backend by name; a test that takes it runs once per backend that this machine has."""
    on_gpu = request.param == "native" and device != "cpu"
    reason = _library.cuda_error if on_gpu else lmkernels.backends()[request.param]
    if reason is not None:
        pytest.skip(reason)
    return request.param


@pytest.fixture(scope="session")
def native(device) -> str:
    """The name of the compiled library, for what only it promises."""
    if device != "cpu":
        pytest.skip("the compiled library runs on the CPU")
    reason = lmkernels.backends()["native"]
    if reason is not None:
        pytest.skip(reason)
    return "native"


@pytest.fixture
def compiled(device, request) -> str:
    """The same, for what the CUDA C++ kernels promise too."""
    if device == "cpu":
        return request.getfixturevalue("native")
    if _library.cuda_error is not None:
        pytest.skip(_library.cuda_error)
    return "native"


@pytest.fixture(scope="session")
def triton(device) -> str:
    """The name of the Triton backend, for what only it promises."""
    if "triton" not in backends_for(device):
        pytest.skip("Triton kernels run with --device cuda or TRITON_INTERPRET=1")
    reason = lmkernels.backends()["triton"]
    if reason is not None:
        pytest.skip(reason)
    return "triton"


@pytest.fixture
def matmul_precision():
    """Sets torch's precision of float32 products, as torch.set_float32_matmul_precision, until the test ends."""
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision("highest")


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of public data sets: $LMKERNELS_DATA, or shared/data beside the checkout."""
    folder = Path(os.environ.get("LMKERNELS_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no data sets: {folder} is not a folder; set LMKERNELS_DATA")
    return folder


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fresh memory holds NaN (the largest value for integers): what a kernel forgets to write shows.

    torch fills every tensor that aten::empty and its siblings make, the compiled library its own. Unlike
    torch.use_deterministic_algorithms this imports no compiler, which takes more than a second.
    """
    torch.set_deterministic_debug_mode("warn")
    yield
    torch.set_deterministic_debug_mode("default")


@pytest.fixture(autouse=True)
def errors_of_a_gpu_belong_to_the_test(device):
    """A kernel that touched memory that is not its own ends the whole process's use of the GPU.

    With pytest-xdist the process ends too: this test has failed, and another process goes on with the next.
    """
    yield
    if torch.device(device).type == "cuda":
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            if "PYTEST_XDIST_WORKER" in os.environ:
                os._exit(3)
            raise


@pytest.fixture(autouse=True)
def same_random_numbers_every_time():
    torch.manual_seed(0)
