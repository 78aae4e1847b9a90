from importlib.util import find_spec

import pytest
import torch

import lmkernels.hf

collect_ignore_glob = [] if find_spec("transformers") else ["test_*.py"]


@pytest.fixture(autouse=True, scope="session")
def registered():
    lmkernels.hf.register()
    lmkernels.hf.register()  # changes nothing


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The models here are so small that threads which wait for each other would take longer than the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny():
    """tiny("gpt2"): a model with random weights that all tests share, in eval mode."""
    from .tiny_models import build

    built = {}

    def get(name):
        if name not in built:
            built[name] = build(name)
        return built[name].eval()

    return get
