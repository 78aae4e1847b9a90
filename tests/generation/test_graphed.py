"""Decoding with a recorded step, as on a GPU. A tape plays the CUDA graph: it runs the same ops on the same memory."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lmkernels.generation import decoder, graphed
from lmkernels.generation.fused import fused_decoder
from lmkernels.models.quantized import quantize

from .conftest import random_model
from .test_fused import LLAMA, SETTINGS


class Tape(TorchDispatchMode):
    """A function's ops with their arguments. A replay calls them again: no Python runs, and no value may be read."""

    made: list["Tape"] = []

    def __init__(self, function):
        super().__init__()
        self.calls, self.replays = [], 0
        function()
        with self:
            self.result = function()
        Tape.made.append(self)

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        assert op is not torch.ops.aten._local_scalar_dense.default, "a graph cannot read a value"
        out = op(*args, **(kwargs or {}))
        self.calls.append((op, args, kwargs or {}, out))
        return out

    def replay(self):
        self.replays += 1
        for op, args, kwargs, out in self.calls:
            for old, new in zip(tree_leaves(out), tree_leaves(op(*args, **kwargs)), strict=True):
                if old.data_ptr() != new.data_ptr():  # not a view of what has been written already
                    old.copy_(new)
        return self.result


@pytest.fixture
def tapes(monkeypatch) -> list[Tape]:
    """Decoding takes a recorded step; the tapes that it makes."""
    monkeypatch.setattr(Tape, "made", [])
    # as on a GPU, where no op reads values to check them
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(
        decoder, "fused_decoder", lambda model: graphed.GraphedDecoder(fused_decoder(model).model, record=Tape)
    )
    return Tape.made


def without_steps(monkeypatch, call):
    with monkeypatch.context() as patched:
        patched.setattr(decoder, "fused_decoder", lambda model: None)
        return call()


@pytest.mark.parametrize(
    "sizes", [{}, LLAMA, {"scale_attn_by_inverse_layer_idx": True}], ids=["GPT-2", "Llama", "scaled"]
)
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("padded", [False, True])
def test_tokens_are_those_of_the_layers(name, sizes, padded, ids, ragged, tapes, monkeypatch):
    model = random_model(**sizes)
    if name == "looking up the prompt":
        ids, ragged = ids[:1], ragged[:1]
    mask = ragged if padded else torch.ones_like(ragged)
    generate = lambda: model.generate(ids, attention_mask=mask, max_new_tokens=14, **SETTINGS[name])  # noqa: E731
    recorded, plain = generate(), without_steps(monkeypatch, generate)
    assert torch.equal(recorded, plain)
    assert len(tapes) == 1 and tapes[0].replays > 1


def test_one_recording_serves_all_tokens_also_when_rows_are_done(model, ids, ragged, tapes, monkeypatch):
    plain = without_steps(monkeypatch, lambda: model.generate(ids, attention_mask=ragged, max_new_tokens=20))
    ends = [int(plain[0, 10]), int(plain[1, 14])]  # rows end at different times
    generate = lambda: model.generate(ids, attention_mask=ragged, max_new_tokens=20, eos_token_id=ends)  # noqa: E731
    rows = []
    step = graphed.GraphedDecoder.step

    def counted(self, tokens, *arguments):
        rows.append(len(tokens))
        return step(self, tokens, *arguments)

    monkeypatch.setattr(graphed.GraphedDecoder, "step", counted)
    assert torch.equal(generate(), without_steps(monkeypatch, generate))
    assert len(tapes) == 1 and tapes[0].replays == len(rows) and len(set(rows)) > 1


def test_scores_that_are_kept_are_not_overwritten_by_the_next_token(model, ids, tapes, monkeypatch):
    options = {"return_dict_in_generate": True, "output_logits": True, "max_new_tokens": 6}
    recorded = model.generate(ids, **options).logits
    plain = without_steps(monkeypatch, lambda: model.generate(ids, **options).logits)
    for one, other in zip(recorded, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_a_draft_model_is_recorded_too(model, ids, tapes, monkeypatch):
    draft = random_model(seed=1, n_embd=16, n_layer=1, n_head=2)
    options = {"max_new_tokens": 20, "assistant_model": draft, "assistant_confidence_threshold": 0.0}
    expected = without_steps(monkeypatch, lambda: model.generate(ids[:1], max_new_tokens=20))
    assert torch.equal(model.generate(ids[:1], **options), expected)
    assert tapes


def test_pages_hold_what_a_cache_does(model, ids):
    """With a table of pages, as the Engine has them."""
    step_model, b = model.step_model(), len(ids)
    whole = [torch.zeros(2, b, 3, 12, 8) for _ in step_model.layers]
    paged = [torch.zeros(2, 20, 3, 4, 8) for _ in step_model.layers]
    table = torch.randperm(20)[: 3 * b].view(b, 3).to(torch.int32)
    with torch.no_grad():
        for i in range(8):
            lengths = torch.full((b,), i)
            one = graphed.step_by_ops(ids[:, i], lengths, whole, step_model)
            other = graphed.step_by_ops(ids[:, i], lengths, paged, step_model, block_table=table)
            torch.testing.assert_close(one, other)
        torch.testing.assert_close(one, model(ids).logits[:, -1], rtol=1e-4, atol=1e-4)


def test_quantised_weights_are_left_to_the_layers(ids, tapes):
    model = random_model()
    quantize(model, "int8")
    assert model.generate(ids, max_new_tokens=3).shape == (3, 11)
    assert not tapes


def test_a_gpus_model_gets_a_graph(model, monkeypatch):
    assert not isinstance(fused_decoder(model), graphed.GraphedDecoder)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    assert isinstance(fused_decoder(model), graphed.GraphedDecoder)
