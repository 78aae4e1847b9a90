"""What `python -m benchmarks generate --peers` compares with has the weights and the arithmetic of our model."""

import pytest
import torch

from benchmarks import generate_peers
from benchmarks.models import generate
from lmkernels.models import GPT2Config, GPT2LMHeadModel

PROMPTS = [[5, 6, 7, 8] * 4, [3, 1, 2, 9, 4]]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = {"vocab_size": 512, "n_positions": 512, "n_embd": 128, "n_layer": 2, "n_head": 4}
    model = GPT2LMHeadModel(GPT2Config(**config, bos_token_id=0, eos_token_id=0)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("name", generate_peers.PEERS)
def test_a_peer_writes_our_tokens_and_notes_every_step(name, model):
    make, formats, packages = generate_peers.PEERS[name]
    if generate_peers.missing(*packages):
        pytest.skip(f"{', '.join(packages)} not installed")
    peer, ours = make(model, formats["float32"]), generate.ours(model)
    for prompts in ([PROMPTS[0]], PROMPTS) if name != "ONNX Runtime" else ([PROMPTS[0]],):
        (expected, own_times), (tokens, times) = ours(prompts, 6), peer(prompts, 6)
        assert tokens == expected
        assert len(own_times) == 7 <= len(times) and times == sorted(times)


def test_every_format_is_written_by_generate_and_the_engine(model):
    for name in generate.FORMATS:
        mine = generate.our_model(name, model)
        tokens, times = generate.ours_in_an_engine(mine, 4)(PROMPTS, 6)
        assert tokens == generate.ours(mine)(PROMPTS, 6)[0] and len(times) >= 7


def test_who_is_absent_is_named(model, monkeypatch):
    monkeypatch.setattr(generate_peers, "missing", lambda *packages: True)
    peers, absent = generate_peers.peers_of("int8", model)
    assert peers == {} and absent == ["CTranslate2 (ctranslate2, transformers)", "llama.cpp (llama_cpp, gguf)"]
