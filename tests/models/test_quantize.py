"""quantize="int8" and "int4": every linear layer packed, near the original, saved packed and mapped back as it was."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lmkernels import QuantizedWeight
from lmkernels.models import GPT2Config, GPT2LMHeadModel
from lmkernels.models.pretrained import PretrainedConfig, PretrainedModel
from lmkernels.models.quantized import Quantized, QuantizedEmbedding, QuantizedLinear

SHAPE = {"vocab_size": 61, "n_positions": 32, "n_embd": 64, "n_layer": 2, "n_head": 4}
KINDS = ("int8", "int4")
IDS = torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def folder(tmp_path):
    GPT2LMHeadModel(GPT2Config(**SHAPE, initializer_range=0.1)).save_pretrained(tmp_path / "original")
    return tmp_path / "original"


def dequantized(quantized: GPT2LMHeadModel, original: GPT2LMHeadModel) -> GPT2LMHeadModel:
    """The original, its weights replaced by what the packed ones stand for."""
    state = original.state_dict()
    for name, module in quantized.named_modules():
        if isinstance(module, Quantized) and f"{name}.weight" in state:
            weight = module.quantized_weight.dequantize()
            is_conv1d = not isinstance(original.get_submodule(name), (nn.Linear, nn.Embedding))
            state[f"{name}.weight"] = weight.t() if is_conv1d else weight
    original.load_state_dict(state)
    return original


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_loss_are_those_of_the_weights_that_the_packed_ones_stand_for(folder, kind):
    quantized = GPT2LMHeadModel.from_pretrained(folder, quantize=kind)
    expected = dequantized(quantized, GPT2LMHeadModel.from_pretrained(folder))(IDS, labels=IDS)
    out = quantized(IDS, labels=IDS)
    # what is left is that layers round their input to 8 bits
    assert (out.logits - expected.logits).norm() < 0.02 * expected.logits.norm()
    torch.testing.assert_close(out.loss, expected.loss, rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("kind, error", [("int8", 0.02), ("int4", 0.3)])
def test_logits_stay_near_the_original(folder, kind, error):
    exact = GPT2LMHeadModel.from_pretrained(folder)(IDS).logits
    logits = GPT2LMHeadModel.from_pretrained(folder, quantize=kind)(IDS).logits
    assert 0 < (logits - exact).norm() < error * exact.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_every_linear_layer_is_packed_and_the_head_shares_the_embedding(folder, kind):
    model = GPT2LMHeadModel.from_pretrained(folder, quantize=kind)
    packed = {name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    layers = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert packed == {"lm_head", *(f"transformer.h.{i}.{layer}" for i in range(2) for layer in layers)}
    assert isinstance(model.transformer.wte, QuantizedEmbedding)
    assert isinstance(model.lm_head.quantized_weight, QuantizedWeight)
    assert model.lm_head.quantized_weight is model.transformer.wte.quantized_weight
    assert {name for name, _ in model.named_parameters() if name.endswith("weight")} == {
        "transformer.wpe.weight",
        "transformer.ln_f.weight",
        *(f"transformer.h.{i}.{norm}.weight" for i in range(2) for norm in ("ln_1", "ln_2")),
    }
    original = GPT2LMHeadModel.from_pretrained(folder)
    for options in ({}, {"exclude_embeddings": True}):
        assert model.num_parameters(**options) == original.num_parameters(**options)
    assert model.num_parameters(only_trainable=True) == 0
    assert model.get_memory_footprint() < {"int8": 0.35, "int4": 0.25}[kind] * original.get_memory_footprint()


def test_an_embedding_without_a_quantised_head_stays_as_it_is(tmp_path):
    GPT2LMHeadModel(GPT2Config(**SHAPE, tie_word_embeddings=False)).save_pretrained(tmp_path)
    model = GPT2LMHeadModel.from_pretrained(tmp_path, quantize="int8")
    assert type(model.transformer.wte) is nn.Embedding and isinstance(model.lm_head, QuantizedLinear)
    model.save_pretrained(tmp_path / "packed")
    assert torch.equal(GPT2LMHeadModel.from_pretrained(tmp_path / "packed")(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_packed_checkpoint_loads_mapped_and_gives_the_same_bits(folder, tmp_path, kind, dtype, monkeypatch):
    model = GPT2LMHeadModel.from_pretrained(folder, quantize=kind, dtype=dtype)
    model.save_pretrained(tmp_path / "packed")
    assert json.loads((tmp_path / "packed" / "config.json").read_text())["quantization"]["dtype"] == kind
    assert not any(name.startswith("lm_head") for name in load_file(tmp_path / "packed" / "model.safetensors"))

    def unwanted(*_):
        raise AssertionError("quantised again")

    monkeypatch.setattr("lmkernels.models.quantized.quantize_weight", unwanted)
    for quantize in (None, kind):
        loaded = GPT2LMHeadModel.from_pretrained(tmp_path / "packed", quantize=quantize)
        assert loaded.quantization == kind and str(loaded.dtype) == f"torch.{dtype}"
        assert loaded.lm_head.quantized_weight is loaded.transformer.wte.quantized_weight
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)
        assert torch.equal(loaded.generate(IDS, max_new_tokens=4), model.generate(IDS, max_new_tokens=4))
    mapped = [line for line in open("/proc/self/maps") if "packed/model.safetensors" in line]
    assert mapped
    address = loaded.lm_head.quantized_weight.data.data_ptr()
    spans = (tuple(int(x, 16) for x in line.split()[0].split("-")) for line in mapped)
    assert any(first <= address < last for first, last in spans)


def test_a_packed_model_survives_state_dict_and_dtype(folder):
    model = GPT2LMHeadModel.from_pretrained(folder, quantize="int4")
    other = GPT2LMHeadModel.from_pretrained(folder, quantize="int4")
    for weight in (module.quantized_weight for module in other.modules() if isinstance(module, Quantized)):
        weight.data.zero_()
    assert not torch.equal(other(IDS).logits, model(IDS).logits)
    assert other.load_state_dict(model.state_dict()) == ([], [])
    assert torch.equal(other(IDS).logits, model(IDS).logits)
    other.double().float()
    assert torch.equal(other(IDS).logits, model(IDS).logits)
    with pytest.raises(RuntimeError, match="Missing key.*lm_head.weight.data"):
        other.load_state_dict({})


def test_training_and_backward_are_refused(folder):
    model = GPT2LMHeadModel.from_pretrained(folder, quantize="int8")
    assert not model.training and model.eval() is model
    with pytest.raises(ValueError, match="int8 is for inference .* load the original without quantize"):
        model.train()
    with pytest.raises(RuntimeError, match="does not require grad"):
        model(IDS, labels=IDS).loss.backward()
    model.requires_grad_(True)
    with pytest.raises(ValueError, match="must be a tensor where a gradient is wanted, got int8"):
        model(IDS)


def test_bad_arguments_and_files_are_named_errors(folder, tmp_path):
    with pytest.raises(ValueError, match="quantize must be one of 'int8', 'int4' or None, got 'int3'"):
        GPT2LMHeadModel.from_pretrained(folder, quantize="int3")
    GPT2LMHeadModel.from_pretrained(folder, quantize="int8").save_pretrained(tmp_path / "packed")
    with pytest.raises(ValueError, match="quantize must be None or 'int8', which the checkpoint's .*, got 'int4'"):
        GPT2LMHeadModel.from_pretrained(tmp_path / "packed", quantize="int4")

    file, config = (tmp_path / "packed" / name for name in ("model.safetensors", "config.json"))
    tensors, entries = load_file(file), json.loads(config.read_text())
    save_file({name: x for name, x in tensors.items() if name != "transformer.wte.weight.scales"}, file)
    with pytest.raises(ValueError, match="missing transformer.wte.weight.scales"):
        GPT2LMHeadModel.from_pretrained(tmp_path / "packed")
    save_file(tensors | {"transformer.wte.weight.data": tensors["transformer.wte.weight.data"].short()}, file)
    with pytest.raises(ValueError, match=r"transformer.wte: data of an int8 weight .* torch.uint8 .* got torch.int16"):
        GPT2LMHeadModel.from_pretrained(tmp_path / "packed")
    config.write_text(json.dumps(entries | {"quantization": {"dtype": "int8", "layout": 0}}))
    with pytest.raises(ValueError, match="in layout 1, got .* quantise the original again"):
        GPT2LMHeadModel.from_pretrained(tmp_path / "packed")


def test_a_model_of_another_kind_is_quantised_too(tmp_path):
    """What quantising needs is in PretrainedModel: linear layers found by type, torch's layout (out, in) among them."""
    from dataclasses import dataclass

    from lmkernels.ops.linear import linear

    @dataclass
    class Config(PretrainedConfig):
        width: int = 32
        initializer_range: float = 0.02
        tie_word_embeddings: bool = False
        model_type = "two_layers"

    class TwoLayers(PretrainedModel):
        config_class = Config
        base_model_prefix = "base"

        def __init__(self, config):
            super().__init__(config)
            self.first = nn.Linear(config.width, 3 * config.width)
            self.second = nn.Linear(3 * config.width, 5, bias=False)
            self.post_init()

        def forward(self, x):
            return linear(linear(x, self.first.weight, self.first.bias, activation="gelu"), self.second.weight)

    model = TwoLayers(Config())
    model.save_pretrained(tmp_path)
    packed, x = TwoLayers.from_pretrained(tmp_path, quantize="int8"), torch.randn(4, 32)
    assert 0 < (packed(x) - model(x)).norm() < 0.02 * model(x).norm()
