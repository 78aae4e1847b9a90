import pytest
import torch

from lmkernels.models import GPT2Config, GPT2LMHeadModel

VOCAB = 50


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """The models here are so small that threads which wait for each other would take longer than the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def random_model(seed: int = 0, **sizes) -> GPT2LMHeadModel:
    """A model that has opinions: its weights are large enough for the likeliest tokens to differ from row to row."""
    torch.manual_seed(seed)
    defaults = {"vocab_size": VOCAB, "n_positions": 48, "n_embd": 24, "n_layer": 2, "n_head": 3}
    model = GPT2LMHeadModel(GPT2Config(**(defaults | sizes), eos_token_id=VOCAB - 1)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="session")
def model() -> GPT2LMHeadModel:
    return random_model()


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(VOCAB - 1, (3, 8), generator=torch.Generator().manual_seed(2))


@pytest.fixture
def ragged() -> torch.Tensor:
    """An attention mask of `ids`: prompts of 4, 8 and 1 tokens."""
    return torch.arange(8) >= torch.tensor([[4], [0], [7]])
