"""GPT-2 computes what GPT-2 computes, and its checkpoints are Hugging Face's."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

import lmkernels
from lmkernels import rotary_tables
from lmkernels.generation import KVCache
from lmkernels.models import GPT2Config, GPT2LMHeadModel
from lmkernels.models.gpt2 import Conv1D

SHAPE = {"vocab_size": 61, "n_positions": 32, "n_embd": 24, "n_layer": 2, "n_head": 3}


def small(**overrides) -> GPT2LMHeadModel:
    """A model whose weights are large enough for every part to matter."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**(SHAPE | overrides))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def token_ids(b=2, s=7) -> torch.Tensor:
    return torch.randint(SHAPE["vocab_size"], (b, s), generator=torch.Generator().manual_seed(1))


def relative_error(x: torch.Tensor, expected: torch.Tensor) -> float:
    return ((x - expected).norm() / expected.norm()).item()


def plain_gpt2(weights: dict, config: GPT2Config, ids: torch.Tensor) -> torch.Tensor:
    """GPT-2 written out: ids (b, s) to logits (b, s, vocab)."""
    b, s = ids.shape
    h = config.n_head

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + config.layer_norm_epsilon).sqrt()
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def project(x, name):
        return x @ weights[f"{name}.weight"] + weights[f"{name}.bias"]

    x = weights["transformer.wte.weight"][ids] + weights["transformer.wpe.weight"][:s]
    future = torch.ones(s, s, dtype=torch.bool).triu(1)
    for layer in range(config.n_layer):
        block = f"transformer.h.{layer}"
        q, k, v = project(norm(x, f"{block}.ln_1"), f"{block}.attn.c_attn").chunk(3, -1)
        q, k, v = (y.view(b, s, h, -1).transpose(1, 2) for y in (q, k, v))  # (b, h, s, d)
        scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
        weighted = scores.masked_fill(future, -math.inf).softmax(-1) @ v
        x = x + project(weighted.transpose(1, 2).reshape(b, s, -1), f"{block}.attn.c_proj")
        hidden = project(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc")
        hidden = 0.5 * hidden * (1 + torch.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
        x = x + project(hidden, f"{block}.mlp.c_proj")
    return norm(x, "transformer.ln_f") @ weights["transformer.wte.weight"].T


def test_logits_loss_and_gradients_match_plain_torch():
    model, ids = small(), token_ids()
    plain = {name: tensor.double().requires_grad_() for name, tensor in model.state_dict().items()}
    logits = plain_gpt2(plain, model.config, ids)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()

    out = model(ids, labels=ids)
    out.loss.backward()
    torch.testing.assert_close(out.logits.double(), logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out.loss.double(), loss, rtol=1e-5, atol=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad.double(), plain[name].grad, rtol=2e-3, atol=2e-5, msg=name)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale_attn_by_inverse_layer_idx": True, "scale_attn_weights": False},
        {"n_inner": 40, "activation_function": "relu"},
        {"tie_word_embeddings": False, "activation_function": "gelu"},
    ],
)
def test_hugging_face_gives_the_same_logits_loss_and_gradients(tmp_path, options):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model, ids = small(**options), token_ids()
    model.save_pretrained(tmp_path)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    mask = torch.ones_like(ids)
    mask[0, -2:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    out, expected = model(ids, attention_mask=mask, labels=labels), theirs(ids, attention_mask=mask, labels=labels)
    assert relative_error(out.logits[mask.bool()], expected.logits[mask.bool()]) < 1e-5
    assert relative_error(out.loss, expected.loss) < 1e-5
    out.loss.backward()
    expected.loss.backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert gradients.keys() == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        assert relative_error(parameter.grad, gradients[name]) < 1e-4, name


def test_hugging_face_reads_and_writes_the_same_tensors(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    small().save_pretrained(tmp_path / "ours")
    transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    GPT2LMHeadModel.from_pretrained(tmp_path / "theirs").save_pretrained(tmp_path / "again")
    first, second, third = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs", "again"))
    assert first.keys() == second.keys() == third.keys()
    assert all(torch.equal(first[name], second[name]) and torch.equal(first[name], third[name]) for name in first)


@pytest.mark.parametrize(
    "name, layers, heads, width, millions",
    [
        ("gpt2", 12, 12, 768, 124),
        ("gpt2-medium", 24, 16, 1024, 355),
        ("gpt2-large", 36, 20, 1280, 774),
        ("gpt2-xl", 48, 25, 1600, 1558),
    ],
)
def test_the_released_sizes_have_their_numbers_of_parameters(name, layers, heads, width, millions):
    config = GPT2Config.from_name(name)
    assert (config.n_layer, config.n_head, config.n_embd) == (layers, heads, width)
    with torch.device("meta"):
        assert round(GPT2LMHeadModel(config).num_parameters() / 1e6) == millions


def test_fresh_weights_follow_the_paper():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=500, n_positions=64, n_embd=128, n_layer=8, n_head=4))
    state = model.state_dict()
    assert state["transformer.wte.weight"].std() == pytest.approx(0.02, rel=0.05)
    assert state["transformer.h.3.attn.c_attn.weight"].std() == pytest.approx(0.02, rel=0.05)
    for name in ("attn.c_proj", "mlp.c_proj"):
        assert state[f"transformer.h.3.{name}.weight"].std() == pytest.approx(0.02 / 4, rel=0.05)
        assert not state[f"transformer.h.3.{name}.bias"].any()
    assert torch.equal(state["transformer.ln_f.weight"], torch.ones(128))


def test_output_reads_as_attributes_as_a_dict_and_as_a_tuple():
    model, ids = small(), token_ids()
    out = model(ids, labels=ids, use_cache=False)
    assert list(out) == ["loss", "logits"] and out.past_key_values is None
    assert out["loss"] is out.loss is out[0] and out[1] is out.logits
    with torch.no_grad():
        assert isinstance(model(ids).past_key_values, KVCache)
    with pytest.raises(AttributeError, match="logits"):
        out.hidden_states  # noqa: B018


def test_loss_ignores_minus_100_and_divides_by_num_items_in_batch():
    model, ids = small(), token_ids()
    labels = ids.clone()
    labels[0, :4] = -100
    counted = (labels[:, 1:] != -100).sum()
    mean = model(ids, labels=labels).loss
    assert mean.dtype == torch.float32
    torch.testing.assert_close(model(ids, labels=labels, num_items_in_batch=counted).loss, mean)
    torch.testing.assert_close(model(ids, labels=labels, num_items_in_batch=2 * int(counted)).loss, mean / 2)


def test_two_accumulated_halves_give_the_whole_batch_gradient():
    model, ids = small(), token_ids(b=4)
    items = ids[:, 1:].numel()
    model(ids, labels=ids).loss.backward()
    whole = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    for half in ids.split(2):
        model(half, labels=half, num_items_in_batch=items).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, whole[name], rtol=1e-4, atol=1e-6, msg=name)


def test_logits_to_keep_returns_the_last_positions():
    model, ids = small(), token_ids()
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, model(ids).logits[:, -2:])


def test_dropout_acts_in_training_only_and_follows_the_seed():
    model, ids = small(attn_pdrop=0.5), token_ids()
    assert torch.equal(model(ids).logits, model(ids).logits)
    model.train()
    torch.manual_seed(3)
    first = model(ids).logits
    assert not torch.equal(first, model(ids).logits)
    torch.manual_seed(3)
    assert torch.equal(first, model(ids).logits)


@torch.no_grad()
def test_cached_pieces_give_the_logits_of_one_pass():
    model, ids = small(), token_ids(s=20)
    cache, pieces = KVCache(model.config.n_layer, capacity=3), []
    for piece in ids.split([6, 1, 1, 9, 3], dim=1):
        pieces.append(model(piece, past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(pieces, 1), model(ids).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_cache_grows_in_place_and_survives_an_interrupted_pass():
    cache = KVCache(n_layer=2, capacity=8)
    k = torch.randn(1, 3, 2, 4)
    cache.update(0, k, k)
    # the second layer never ran: the pass does not count
    keys, _ = cache.update(0, 2 * k, k)
    assert cache.length == 0 and torch.equal(keys, 2 * k)
    cache.update(1, k, k)
    cache.advance(3)
    first, _ = cache.update(0, k, k)
    assert first.data_ptr() == keys.data_ptr()
    with pytest.raises(ValueError, match="batch"):
        cache.update(0, torch.randn(2, 1, 2, 4), torch.randn(2, 1, 2, 4))


@torch.no_grad()
def test_left_padding_does_not_change_a_rows_logits():
    model, ids = small(), token_ids(b=1)
    padded = torch.cat([torch.full((1, 3), 5), ids], 1)
    mask = torch.tensor([[0] * 3 + [1] * ids.shape[1]])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(padded, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(logits[:, 3:], model(ids).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_left_padded_rows_are_hugging_faces(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model, ids = small(), token_ids(b=3)
    model.save_pretrained(tmp_path)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    mask = torch.ones_like(ids)
    mask[0, :3], mask[1, :5] = 0, 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    inputs = {"attention_mask": mask, "position_ids": positions}
    ours, expected = model(ids, **inputs).logits[mask.bool()], theirs(ids, **inputs).logits[mask.bool()]
    assert relative_error(ours, expected) < 1e-5


def test_embeddings_may_be_given_instead_of_tokens():
    model, ids = small(), token_ids()
    embeds = model.get_input_embeddings()(ids)
    torch.testing.assert_close(model(inputs_embeds=embeds).logits, model(ids).logits)
    embeds.retain_grad()
    model(inputs_embeds=embeds, labels=ids).loss.backward()
    assert embeds.grad.abs().sum() > 0


def test_arguments_that_hugging_faces_model_takes_are_understood_or_refused():
    model, ids = small(), token_ids()
    nothing = dict.fromkeys(("token_type_ids", "encoder_hidden_states", "output_attentions"))
    out = model(ids, **nothing, output_hidden_states=False, return_dict=True)
    loss, logits = model(ids, labels=ids, return_dict=False)
    assert torch.equal(out.logits, logits) and loss.dim() == 0
    with pytest.raises(NotImplementedError, match="output_attentions must be None: .*, got bool"):
        model(ids, output_attentions=True)
    with pytest.raises(NotImplementedError, match="token_type_ids must be None"):
        model(ids, token_type_ids=torch.zeros_like(ids))
    with pytest.raises(TypeError, match="unexpected keyword argument 'label'"):
        model(ids, label=ids)


# --- the switches


LLAMA = {
    "norm": "rms_norm",
    "position": "rotary",
    "rope_theta": 500.0,
    "mlp": "swiglu",
    "num_kv_heads": 2,
    "bias": False,
    "n_head": 4,
    "n_embd": 32,
    "n_inner": 48,
    "tie_word_embeddings": False,
}


def as_llama(model: GPT2LMHeadModel) -> dict:
    """The weights under the names of Hugging Face's Llama."""
    c, weights = model.config, {name: x.detach() for name, x in model.named_parameters()}
    d = c.n_embd // c.n_head
    llama = {
        "model.embed_tokens.weight": weights["transformer.wte.weight"],
        "model.norm.weight": weights["transformer.ln_f.weight"],
        "lm_head.weight": weights["lm_head.weight"],
    }
    for i in range(c.n_layer):
        ours, theirs = f"transformer.h.{i}", f"model.layers.{i}"
        q, k, v = weights[f"{ours}.attn.c_attn.weight"].t().split([c.n_embd, c.kv_heads * d, c.kv_heads * d])
        llama |= {f"{theirs}.self_attn.{name}_proj.weight": x for name, x in zip("qkv", (q, k, v))}
        llama[f"{theirs}.self_attn.o_proj.weight"] = weights[f"{ours}.attn.c_proj.weight"].t()
        for name, own in (("gate", "c_gate"), ("up", "c_up"), ("down", "c_proj")):
            llama[f"{theirs}.mlp.{name}_proj.weight"] = weights[f"{ours}.mlp.{own}.weight"].t()
        llama[f"{theirs}.input_layernorm.weight"] = weights[f"{ours}.ln_1.weight"]
        llama[f"{theirs}.post_attention_layernorm.weight"] = weights[f"{ours}.ln_2.weight"]
    return llama


def test_with_all_switches_it_is_hugging_faces_llama():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model, ids = small(**LLAMA), token_ids()
    c = model.config
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=c.vocab_size,
            hidden_size=c.n_embd,
            intermediate_size=c.n_inner,
            num_hidden_layers=c.n_layer,
            num_attention_heads=c.n_head,
            num_key_value_heads=c.num_kv_heads,
            max_position_embeddings=c.n_positions,
            rms_norm_eps=c.layer_norm_epsilon,
            rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
            bos_token_id=0,
            eos_token_id=0,
        )
    ).eval()
    theirs.load_state_dict(as_llama(model))
    out, expected = model(ids, labels=ids), theirs(ids, labels=ids)
    assert relative_error(out.logits, expected.logits) < 1e-5
    assert relative_error(out.loss, expected.loss) < 1e-5
    out.loss.backward()
    expected.loss.backward()
    theirs_grad = {name: x.grad for name, x in theirs.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.grad)
    for name, gradient in as_llama(model).items():
        assert relative_error(gradient, theirs_grad[name]) < 1e-4, name


SWITCHES = [
    {"norm": "rms_norm"},
    {"position": "rotary"},
    {"position": "rotary", "rotary_fraction": 0.5},
    {"mlp": "swiglu"},
    {"num_kv_heads": 1},
    {"bias": False},
    LLAMA,
]


@pytest.mark.parametrize("options", SWITCHES, ids=lambda options: "-".join(map(str, options.values()))[:40])
@torch.no_grad()
def test_every_switch_works_in_a_checkpoint_with_a_cache_and_quantised(tmp_path, options):
    model, ids = small(**options), token_ids(s=20)
    model.save_pretrained(tmp_path)
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path)
    assert loaded.config == model.config
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "lmkernels_gpt"
    logits = model(ids).logits
    assert torch.equal(loaded(ids).logits, logits)

    cache, pieces = KVCache(model.config.n_layer), []
    for piece in ids.split([6, 1, 1, 9, 3], dim=1):
        pieces.append(model(piece, past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(pieces, 1), logits, rtol=1e-4, atol=1e-4)
    tokens = model.generate(ids, max_new_tokens=6, eos_token_id=[])
    assert torch.equal(tokens, model.generate(ids, max_new_tokens=6, eos_token_id=[], use_cache=False))

    packed = GPT2LMHeadModel.from_pretrained(tmp_path, quantize="int8")
    assert relative_error(packed(ids).logits, logits) < 0.05
    assert {id(module) for module in packed.modules() if isinstance(module, Conv1D)} == set()
    plain = GPT2LMHeadModel(GPT2Config(**SHAPE)).config.to_dict()
    assert plain["model_type"] == "gpt2" and plain.keys().isdisjoint({"norm", "position", "mlp", "bias"})


@pytest.mark.parametrize("fraction", [1.0, 0.5])
@torch.no_grad()
def test_rotary_positions_are_relative(fraction):
    model, ids = small(position="rotary", rotary_fraction=fraction), token_ids()
    positions = torch.arange(ids.shape[1])[None]
    there = model(ids, position_ids=positions + 20).logits
    torch.testing.assert_close(there, model(ids, position_ids=positions).logits, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(there, model(ids, position_ids=2 * positions).logits, rtol=1e-2, atol=1e-2)


def test_rotary_tables_stay_exact_in_16_bits(tmp_path):
    small(position="rotary").save_pretrained(tmp_path)
    model = GPT2LMHeadModel.from_pretrained(tmp_path, dtype="bfloat16")
    cos, sin = rotary_tables(SHAPE["n_positions"], SHAPE["n_embd"] // SHAPE["n_head"])
    assert torch.equal(model.transformer.rotary.cos, cos) and torch.equal(model.transformer.rotary.sin, sin)


def test_hugging_face_refuses_a_model_that_it_cannot_be(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    small(**LLAMA).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="lmkernels_gpt"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


# --- under Hugging Face's Trainer


class Texts(torch.utils.data.Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, i):
        ids = torch.randint(SHAPE["vocab_size"], (9,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": ids, "labels": ids.masked_fill(torch.arange(9) < i % 4, -100)}


def test_hugging_faces_trainer_trains_evaluates_saves_and_resumes(tmp_path):
    """As it does their model: num_items_in_batch, which counts labels beyond the first, divides the loss."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    small(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0).save_pretrained(tmp_path / "start")
    options = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 3,
        "max_steps": 4,
        "save_steps": 2,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": torch.get_default_device().type == "cpu",
        "learning_rate": 1e-2,
        "disable_tqdm": True,
    }

    def trained(model, out, **resume):
        arguments = transformers.TrainingArguments(output_dir=tmp_path / out, **options)
        trainer = transformers.Trainer(model, arguments, train_dataset=Texts(), eval_dataset=Texts())
        trainer.train(**resume)
        return [row["loss"] for row in trainer.state.log_history if "loss" in row], trainer.evaluate(), trainer

    ours = GPT2LMHeadModel.from_pretrained(tmp_path / "start")
    losses, evaluation, trainer = trained(ours, "ours")
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "start")
    # by the name of their class the Trainer does not see that it shifts labels, and counts the first ones too
    theirs.loss_type = "ForCausalLM"
    expected, expected_evaluation, _ = trained(theirs, "theirs")
    assert losses == pytest.approx(expected, rel=1e-3)
    assert evaluation["eval_loss"] == pytest.approx(expected_evaluation["eval_loss"], rel=1e-3)
    assert evaluation["eval_loss"] < losses[0]
    assert trainer.predict(Texts()).predictions.shape == (12, 9, SHAPE["vocab_size"])

    again = GPT2LMHeadModel.from_pretrained(tmp_path / "start")
    resumed, _, _ = trained(again, "again", resume_from_checkpoint=str(tmp_path / "ours" / "checkpoint-2"))
    assert resumed[-2:] == losses[-2:]
    state = ours.state_dict()
    assert all(torch.equal(x, state[name]) for name, x in again.state_dict().items())
    ours.save_pretrained(tmp_path / "saved")
    assert torch.equal(GPT2LMHeadModel.from_pretrained(tmp_path / "saved").lm_head.weight, ours.lm_head.weight)


def test_bfloat16_autocast_stays_near_float32():
    model, ids = small(), token_ids()
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        logits = model(ids).logits
    reference = model(ids).logits
    assert (logits - reference).norm() < 0.03 * reference.norm()


def test_saved_model_loads_as_it_was(tmp_path):
    model, ids = small(), token_ids()
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path)
    assert loaded.config == model.config and not loaded.training
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert loaded.lm_head.weight is loaded.transformer.wte.weight


def test_dtype_is_the_checkpoints_or_the_one_asked_for(tmp_path):
    small().bfloat16().save_pretrained(tmp_path)
    assert GPT2LMHeadModel.from_pretrained(tmp_path).dtype == torch.bfloat16
    assert GPT2LMHeadModel.from_pretrained(tmp_path, dtype=torch.float32).dtype == torch.float32
    assert GPT2LMHeadModel.from_pretrained(tmp_path, dtype="float16").dtype == torch.float16
    with pytest.raises(ValueError, match="dtype must be a floating torch dtype"):
        GPT2LMHeadModel.from_pretrained(tmp_path, dtype="int9")


def test_untied_head_is_saved_and_loaded(tmp_path):
    model = small(tie_word_embeddings=False)
    assert model.lm_head.weight is not model.transformer.wte.weight
    model.save_pretrained(tmp_path)
    assert torch.equal(GPT2LMHeadModel.from_pretrained(tmp_path).lm_head.weight, model.lm_head.weight)


def test_old_checkpoints_without_prefix_and_with_mask_buffers_load(tmp_path):
    model, ids = small(), token_ids()
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
    for layer in range(model.config.n_layer):
        tensors[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 32, 32).tril()
        tensors[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(tensors, file)
    assert torch.equal(GPT2LMHeadModel.from_pretrained(tmp_path)(ids).logits, model(ids).logits)


def edit(folder, change) -> None:
    """Rewrites a checkpoint's tensors through `change`."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def cut(folder, n) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:n])


def set_config(folder, **entries) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | entries))


@pytest.mark.parametrize(
    "damage, error, message",
    [
        (lambda p: (p / "model.safetensors").unlink(), FileNotFoundError, "has no weights: model.safetensors"),
        (lambda p: (p / "config.json").unlink(), FileNotFoundError, "has no config.json"),
        (lambda p: (p / "config.json").write_text('{"n_embd": 2'), ValueError, "config.json is damaged"),
        (lambda p: (p / "config.json").write_text("[]"), ValueError, "must hold an object"),
        (lambda p: set_config(p, model_type="bert"), ValueError, "type 'gpt2', got 'bert'"),
        (lambda p: set_config(p, n_head=5), ValueError, "n_embd must be a multiple of n_head"),
        (lambda p: set_config(p, add_cross_attention=True), NotImplementedError, "cross attention"),
        (lambda p: cut(p, 0), ValueError, "damaged or truncated"),
        (lambda p: cut(p, 100), ValueError, "damaged or truncated"),
        (lambda p: cut(p, -1), ValueError, "damaged or truncated"),
        (lambda p: edit(p, lambda t: t.pop("transformer.ln_f.bias")), ValueError, "missing transformer.ln_f.bias"),
        (lambda p: edit(p, lambda t: t.update(extra=torch.ones(1))), ValueError, "not part of the model: extra"),
        (
            lambda p: edit(p, lambda t: t.update({"transformer.ln_f.bias": torch.ones(7)})),
            ValueError,
            r"ln_f.bias must be \(24,\), got \(7,\)",
        ),
        (lambda p: edit(p, lambda t: t.update({"lm_head.weight": torch.ones(61, 24)})), ValueError, "tie_word"),
    ],
)
def test_bad_checkpoint_is_a_named_error(tmp_path, damage, error, message):
    small().save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(error, match=message):
        GPT2LMHeadModel.from_pretrained(tmp_path)


def test_failed_save_leaves_the_old_files(tmp_path, monkeypatch):
    model = small()
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr("lmkernels._files.sync", lambda path: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space left"):
        small(n_layer=1).save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_saving_onto_a_file_is_a_named_error(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(ValueError, match="path must be a folder"):
        small().save_pretrained(tmp_path / "taken")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"input_ids": torch.tensor([1, 2])}, r"input_ids must be integers \(b, s\)"),
        ({"input_ids": torch.ones(1, 2)}, r"input_ids must be integers \(b, s\)"),
        ({"input_ids": torch.tensor([[61]])}, r"input_ids must lie in \[0, 61\) \(vocab_size\), got 61"),
        ({"input_ids": torch.tensor([[-1]])}, r"got -1"),
        ({"input_ids": torch.ones(1, 33, dtype=torch.long)}, "beyond n_positions = 32, got 33"),
        ({"input_ids": torch.ones(1, 2, dtype=torch.long), "position_ids": torch.tensor([[0, 32]])}, "position_ids"),
        ({"input_ids": torch.ones(1, 2, dtype=torch.long), "attention_mask": torch.ones(1, 3)}, "attention_mask"),
        ({"input_ids": torch.ones(1, 2, dtype=torch.long), "labels": torch.tensor([[1]])}, "labels must be"),
        ({"input_ids": torch.ones(1, 2, dtype=torch.long), "use_cache": True}, "gradients are recorded"),
        ({}, "input_ids or inputs_embeds must be given, and not both"),
        ({"input_ids": torch.ones(1, 2, dtype=torch.long), "inputs_embeds": torch.ones(1, 2, 24)}, "not both"),
        ({"inputs_embeds": torch.ones(1, 2, 23)}, r"inputs_embeds must be \(b, s, 24\), got \(1, 2, 23\)"),
    ],
)
def test_bad_input_is_a_named_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        small()(**arguments)


@pytest.mark.parametrize(
    "entries, message",
    [
        ({"n_layer": 0}, "n_layer must be a positive whole number, got 0"),
        ({"n_embd": 10, "n_head": 3}, "n_embd must be a multiple"),
        ({"activation_function": "swish9"}, "activation_function must be one of"),
        ({"attn_pdrop": 1.5}, r"attn_pdrop must lie in \[0, 1\)"),
        ({"norm": "batch_norm"}, "norm must be one of layer_norm, rms_norm, got 'batch_norm'"),
        ({"position": "alibi"}, "position must be one of learned, rotary"),
        ({"mlp": "moe"}, "mlp must be one of plain, swiglu"),
        ({"num_kv_heads": 5}, "n_head must be a multiple of num_kv_heads = 5, got 12"),
        ({"num_kv_heads": 0}, "num_kv_heads must be a positive whole number, got 0"),
        ({"position": "rotary", "rotary_fraction": 0.01}, "keep 2 or more of a head's 64 columns, got 0.01"),
        ({"position": "rotary", "rotary_fraction": 1.5}, r"rotary_fraction must lie in \(0, 1\]"),
    ],
)
def test_bad_config_is_a_named_error(entries, message):
    with pytest.raises(ValueError, match=message):
        GPT2Config(**entries)


def test_unknown_size_is_a_named_error():
    with pytest.raises(ValueError, match="name must be one of gpt2, gpt2-medium"):
        GPT2Config.from_name("gpt3")


# --- the script


@pytest.fixture
def folder_with_tokenizer(tmp_path):
    """A checkpoint with a GPT2Tokenizer that was trained on the spot."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(["once upon a time there was a model of language"] * 9, trainer)
    parts = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(merge) for merge in parts["merges"]]
    transformers.GPT2Tokenizer(vocab=parts["vocab"], merges=merges).save_pretrained(tmp_path)
    end = parts["vocab"]["<|endoftext|>"]
    shape = SHAPE | {"vocab_size": len(parts["vocab"]), "n_positions": 64}
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=end, eos_token_id=end, initializer_range=0.3))
    model.save_pretrained(tmp_path)
    return tmp_path


def test_the_script_writes_five_samples(folder_with_tokenizer):
    script = Path(__file__).parents[2] / "examples" / "generate_gpt2.py"
    command = [sys.executable, str(script), str(folder_with_tokenizer), "once upon a time"]
    environment = os.environ | {"PYTHONPATH": str(Path(lmkernels.__file__).parents[1]), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run([*command, "--quantize", "int8"], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    samples = re.findall(r"^\d: once upon a time", run.stdout, re.MULTILINE)
    assert len(samples) == 5


def test_the_script_in_one_process_gives_hugging_faces_samples(folder_with_tokenizer):
    import transformers

    tokenizer = transformers.GPT2Tokenizer.from_pretrained(folder_with_tokenizer)
    input_ids = tokenizer.encode("once upon a time", return_tensors="pt")
    texts = []
    for model_class in (GPT2LMHeadModel, transformers.GPT2LMHeadModel):
        model = model_class.from_pretrained(folder_with_tokenizer)
        torch.manual_seed(1)
        samples = model.generate(input_ids, max_length=50, num_return_sequences=5, do_sample=True)
        texts.append([tokenizer.decode(sample) for sample in samples])
        with pytest.raises(ValueError) as caught:
            model.generate(input_ids, max_length=50, num_return_sequences=5)
        texts[-1].append(str(caught.value))
    assert len(texts[0]) == 6 and len(set(texts[0])) == 6
    assert texts[0] == texts[1]
