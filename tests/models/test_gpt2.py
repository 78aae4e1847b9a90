"""GPT-2 computes what GPT-2 computes, and its checkpoints are Hugging Face's."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from lmkernels.generation import KVCache
from lmkernels.models import GPT2Config, GPT2LMHeadModel

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
    "options", [{}, {"scale_attn_by_inverse_layer_idx": True, "scale_attn_weights": False}, {"n_inner": 40}]
)
def test_hugging_face_gives_the_same_logits_loss_and_gradients(tmp_path, options):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model, ids = small(**options), token_ids()
    model.save_pretrained(tmp_path)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    mask = torch.ones_like(ids)
    mask[0, -2:] = 0
    out, expected = model(ids, attention_mask=mask, labels=ids), theirs(ids, attention_mask=mask, labels=ids)
    torch.testing.assert_close(out.logits[mask.bool()], expected.logits[mask.bool()], rtol=1e-4, atol=1e-4)
    model(ids, labels=ids).loss.backward()
    theirs(ids, labels=ids).loss.backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=2e-3, atol=2e-5, msg=name)


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


def test_bfloat16_autocast_stays_near_float32():
    model, ids = small(), token_ids()
    with torch.autocast("cpu", torch.bfloat16):
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
    ],
)
def test_bad_config_is_a_named_error(entries, message):
    with pytest.raises(ValueError, match=message):
        GPT2Config(**entries)


def test_unknown_size_is_a_named_error():
    with pytest.raises(ValueError, match="name must be one of gpt2, gpt2-medium"):
        GPT2Config.from_name("gpt3")
