import pytest
import torch
import transformers

import lmkernels.hf
from lmkernels.hf import attention

from .tiny_models import MODELS, build


def lines(report):
    return {line.what: line for line in report.lines}


@pytest.mark.parametrize("name", MODELS)
def test_every_model_agrees(tiny, name):
    report = lmkernels.hf.check(tiny(name), verbose=False)
    assert report.ok, str(report)
    found = lines(report)
    assert found["outputs"].passed and found["attention layers"].passed and found["gradients"].passed
    assert (found["generate"].passed is None) == (name in ("bert", "roberta", "layoutlm")), str(report)
    if name != "whisper":  # which has no padding
        assert found["outputs without padding"].passed and found["padded = unpadded rows"].passed
    assert all(line.passed or line.note for line in report.lines)  # what was not checked says why


def test_bfloat16(tiny):
    report = lmkernels.hf.check(build("gpt2").to(torch.bfloat16), verbose=False)
    assert report.ok, str(report)
    assert 1e-4 < lines(report)["outputs"].error < 5e-2


@pytest.mark.parametrize(
    "fault, model, where",
    [
        ("no mask", "bert", "attention layers"),
        ("no mask", "t5", "outputs"),
        ("not causal", "gpt2", "outputs without padding"),
        ("not causal", "bart", "outputs without padding"),
        ("no window", "mistral", "attention layers"),
        ("no sinks", "gpt_oss", "attention layers"),
        ("no bias", "t5", "outputs"),
        ("no gradient of the bias", "t5", "gradients"),
        ("raises", "llama", "outputs"),
    ],
)
def test_a_fault_is_found(monkeypatch, fault, model, where):
    """Fresh weights, as small as they come: the hardest case."""
    forward, mask = attention.attention_forward, attention.attention_mask

    def faulty_mask(*arguments, **options):
        if fault == "no mask":
            return None
        found = mask(*arguments, **options)
        return found[:, 0] if fault == "no window" and found is not None and found.dim() == 3 else found

    def faulty_forward(module, *arguments, **options):
        if fault == "raises":
            raise RuntimeError("on purpose")
        if fault == "not causal":
            options["is_causal"] = False
        if fault == "no sinks":
            del options["s_aux"]
        if "bias" in fault:
            bias = options.pop("position_bias")
            options["position_bias"] = bias.detach() if "gradient" in fault else None
        return forward(module, *arguments, **options)

    monkeypatch.setattr(attention, "attention_forward", faulty_forward)
    monkeypatch.setattr(attention, "attention_mask", faulty_mask)
    model_class = getattr(transformers, MODELS[model][0])
    try:
        report = lmkernels.hf.check(model_class(model_class.config_class(**MODELS[model][1])), verbose=False)
    finally:
        monkeypatch.undo()
        lmkernels.hf.register()
    assert not report.ok and lines(report)[where].passed is False, str(report)
    assert "DOES NOT AGREE" in str(report)


def test_the_model_is_left_as_it_was(monkeypatch, capsys):
    model = build("t5")
    model.set_attn_implementation({"": "sdpa"})
    model.train()
    model.encoder.eval()
    model.shared.weight.grad = torch.ones_like(model.shared.weight)
    weights = {name: x.clone() for name, x in model.state_dict().items()}
    configs = [module.config for module in model.modules() if hasattr(module, "config")]
    before = [config._attn_implementation for config in configs]
    modes = [module.training for module in model.modules()]
    draw = torch.get_rng_state()

    def same():
        assert [config._attn_implementation for config in configs] == before
        assert [module.training for module in model.modules()] == modes
        assert all(torch.equal(x, weights[name]) for name, x in model.state_dict().items())
        assert torch.equal(model.shared.weight.grad, torch.ones_like(model.shared.weight))
        assert all(p.grad is None for p in model.parameters() if p is not model.shared.weight)
        assert torch.equal(torch.get_rng_state(), draw)
        assert not any(module._forward_hooks for module in model.modules())

    report = lmkernels.hf.check(model)
    assert report.ok and str(report) in capsys.readouterr().out
    same()
    monkeypatch.setattr(model.decoder.block[1], "forward", lambda *arguments, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        lmkernels.hf.check(model)
    same()


def test_inputs_of_the_users_own(tiny):
    report = lmkernels.hf.check(tiny("bert"), {"input_ids": torch.arange(4, 12)[None]}, verbose=False)
    assert report.ok
    assert lines(report)["padded = unpadded rows"].passed is None


def test_pixels():
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    model = transformers.ViTModel(transformers.ViTConfig(**small, image_size=16, patch_size=8))
    assert lmkernels.hf.check(model, verbose=False).ok


def test_attention_that_is_not_transformers_interface():
    """RemBERT computes its own attention: nothing is compared, and the report says so."""
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    model = transformers.RemBertModel(transformers.RemBertConfig(**small, vocab_size=64, input_embedding_size=16))
    report = lmkernels.hf.check(model, verbose=False)
    assert not report.ok and "nothing was compared" in str(report)
    assert "does not call transformers' AttentionInterface" in report.lines[0].note


@pytest.mark.parametrize("model", [None, torch.nn.Linear(2, 2)])
def test_what_is_no_model(model):
    with pytest.raises(TypeError, match="model must be a Hugging Face model"):
        lmkernels.hf.check(model)
