import os
import signal
from contextlib import contextmanager

import pytest
import torch

from lmkernels.training.trainer import Trainer


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The models here are so small that threads which wait for each other would take longer than the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder of Python-like text, large enough for a small model."""
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(8):
        lines = [f"def f{i}(x):\n    return x + {i * number}\n\n" for i in range(120)]
        (folder / f"part{number}.py").write_text("".join(lines))
    return folder


@pytest.fixture
def options(corpus):
    """Settings of a run that takes a second."""
    return {
        "corpus": [str(corpus)],
        "vocab_size": 300,
        "n_layer": 1,
        "n_head": 2,
        "n_embd": 16,
        "block_size": 16,
        "batch_size": 4,
        "dropout": 0.1,
        "warmup": 2,
        "steps": 8,
        "eval_every": 4,
        "eval_windows": 6,
        "save_every": 100,
        "lr": 1e-2,
        "device": "cpu",
        "threads": 1,
    }


@pytest.fixture
def ctrl_c(monkeypatch):
    """`with ctrl_c(before=n)`: the run that it encloses gets Ctrl-C as it begins step n, which is still finished."""

    @contextmanager
    def interrupted(before: int):
        step = Trainer.step

        def interrupted_step(self):
            if self.progress.step == before - 1:
                os.kill(os.getpid(), signal.SIGINT)
            return step(self)

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "step", interrupted_step)
            yield

    return interrupted
