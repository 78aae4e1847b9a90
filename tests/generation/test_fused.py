"""Decoding with one call per token writes what decoding layer by layer does."""

import pytest
import torch
from torch import nn

from lmkernels import capture_attention
from lmkernels.generation import decoder, fused
from lmkernels.models.quantized import quantize

from .conftest import random_model

LLAMA = {
    "n_head": 4,
    "num_kv_heads": 2,
    "norm": "rms_norm",
    "position": "rotary",
    "rotary_fraction": 0.5,
    "mlp": "swiglu",
    "bias": False,
}
SETTINGS = {
    "greedy": {},
    "sampling": {"do_sample": True, "seed": 3, "num_return_sequences": 2},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "looking up the prompt": {"prompt_lookup_num_tokens": 3},
}


@pytest.fixture
def steps(monkeypatch) -> list[int]:
    """The rows of every fused step."""
    seen = []
    step = fused.FusedDecoder.step

    def counted(self, ids, *arguments):
        seen.append(ids.shape[0])
        return step(self, ids, *arguments)

    monkeypatch.setattr(fused.FusedDecoder, "step", counted)
    return seen


def both(model, steps, monkeypatch, *arguments, **options):
    """Tokens with fused steps, and without."""
    with_steps = model.generate(*arguments, max_new_tokens=12, **options)
    count = len(steps)
    with monkeypatch.context() as patched:
        patched.setattr(decoder, "fused_decoder", lambda model: None)
        without = model.generate(*arguments, max_new_tokens=12, **options)
    assert len(steps) == count
    return with_steps, without


@pytest.mark.parametrize(
    "sizes", [{}, LLAMA, {"scale_attn_by_inverse_layer_idx": True}], ids=["GPT-2", "Llama", "scaled"]
)
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("padded", [False, True])
def test_tokens_are_those_of_the_layers(name, sizes, padded, ids, ragged, steps, monkeypatch):
    model = random_model(**sizes)
    if name == "looking up the prompt":
        ids, ragged = ids[:1], ragged[:1]
    mask = ragged if padded else torch.ones_like(ragged)
    fused_tokens, plain = both(model, steps, monkeypatch, ids, attention_mask=mask, **SETTINGS[name])
    assert torch.equal(fused_tokens, plain)
    assert steps


@pytest.mark.parametrize("sizes", [{}, LLAMA], ids=["GPT-2", "Llama"])
@pytest.mark.parametrize("kind", ["bfloat16", "float16", "int8", "int4"])
def test_logits_of_fewer_bits_are_near_those_of_the_layers(kind, sizes, ids, steps, monkeypatch):
    """Tokens would differ where two are as likely: layers round to 16 bits between them, steps do not."""
    model = random_model(**sizes)
    if kind.startswith("int"):
        quantize(model, kind)
    else:
        model.to(getattr(torch, kind))
    logits = []
    for patched in (False, True):
        if patched:
            monkeypatch.setattr(decoder, "fused_decoder", lambda model: None)
        with torch.no_grad():
            d = decoder.Decoder(model, torch.ones_like(ids, dtype=torch.bool), 20)
            d.logits(ids[:, :5])
            logits.append(torch.cat([d.logits(ids[:, : 6 + i]) for i in range(3)], 1))
    assert len(steps) == 4, "the prompt and three tokens"
    error = (logits[0] - logits[1]).norm() / logits[1].norm()
    assert error < (3e-2 if kind == "bfloat16" else 3e-3)


def test_weights_that_change_are_seen_by_the_next_call(ids, steps, monkeypatch):
    model = random_model()
    before = model.generate(ids, max_new_tokens=12)
    with torch.no_grad():
        model.transformer.h[0].ln_1.bias.add_(1.0)
        model.transformer.h[1].attn.c_attn.weight.mul_(-1.0)
    after, plain = both(model, steps, monkeypatch, ids)
    assert torch.equal(after, plain) and not torch.equal(after, before)


class Doubled(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def parameters_of_linear(self):
        weight, bias = self.inner.parameters_of_linear()
        return 2 * weight, bias


def hooked(model):
    model.transformer.h[0].register_forward_hook(lambda *_: None)


def patched(model):
    model.transformer.h[0].forward = model.transformer.h[0].forward


def replaced(model):
    model.transformer.h[0].mlp.c_fc = Doubled(model.transformer.h[0].mlp.c_fc)


def in_training(model):
    model.train()


def in_float64(model):
    model.double()


def overridden(model):
    class Louder(type(model)):
        def forward(self, *arguments, **options):
            out = super().forward(*arguments, **options)
            out.logits = -out.logits
            return out

    model.__class__ = Louder


@pytest.mark.parametrize("change", [hooked, patched, replaced, in_training, in_float64, overridden])
def test_models_that_are_not_themselves_are_not_fused(change, ids, steps):
    model = random_model()
    change(model)
    assert model.generate(ids, max_new_tokens=3).shape == (3, 11)
    assert steps == []


def test_holes_in_a_prompt_autocast_and_more_rows_are_left_to_the_layers(model, ids, steps):
    mask = torch.ones_like(ids)
    mask[0, 3] = 0
    model.generate(ids, attention_mask=mask, max_new_tokens=3)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        model.generate(ids, max_new_tokens=3)
    model.generate(ids[:1].expand(fused.MOST_ROWS + 1, -1), max_new_tokens=3)
    assert steps == []
    model.generate(ids[:1].expand(fused.MOST_ROWS, -1), max_new_tokens=3)
    assert steps == [fused.MOST_ROWS] * 2


def test_reasons_are_given(model):
    assert fused.unsupported(model) is None
    assert fused.fused_decoder(model) is not None
    assert "has no step_model()" in fused.unsupported(nn.Linear(2, 2))
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        assert "autocast" in fused.unsupported(model)
    with capture_attention():
        assert "capture_attention" in fused.unsupported(model)
    other = random_model()
    in_training(other)
    assert "dropout" in fused.unsupported(other)
    hooked(other.eval())
    assert "transformer.h.0 has a hook" in fused.unsupported(other)
    replaced(other)
    assert fused.fused_decoder(other) is None


def test_a_row_has_the_same_tokens_alone(model, ids):
    together = model.generate(ids, max_new_tokens=8, eos_token_id=[])
    for row, own in zip(together, ids, strict=True):
        assert torch.equal(model.generate(own[None], max_new_tokens=8, eos_token_id=[])[0], row)
