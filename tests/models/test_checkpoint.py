"""Checkpoints in every form that Hugging Face's have had, written as transformers reads them, and refused by name."""

import json
import logging
import pickle
import warnings
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lmkernels.models import GPT2Config, GPT2LMHeadModel
from lmkernels.models.pretrained import PretrainedConfig, PretrainedModel

SHAPE = {"vocab_size": 61, "n_positions": 32, "n_embd": 24, "n_layer": 2, "n_head": 3}
IDS = torch.arange(14).view(2, 7)


def small(**overrides) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(**(SHAPE | overrides), initializer_range=0.2)).eval()


@pytest.fixture
def folder(tmp_path) -> Path:
    small().save_pretrained(tmp_path)
    return tmp_path


def shards(tensors: dict) -> list[dict]:
    names = sorted(tensors)
    return [{name: tensors[name] for name in names[start::3]} for start in range(3)]


def as_safetensors(folder, tensors):
    save_file(tensors, folder / "model.safetensors")


def as_safetensors_shards(folder, tensors):
    for i, part in enumerate(shards(tensors), 1):
        save_file(part, folder / f"model-{i:05}-of-00003.safetensors")
    write_index(folder, tensors, "model", "safetensors")


def as_pickle(folder, tensors):
    torch.save(tensors, folder / "pytorch_model.bin")


def as_old_pickle(folder, tensors):
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def as_pickle_shards(folder, tensors):
    for i, part in enumerate(shards(tensors), 1):
        torch.save(part, folder / f"pytorch_model-{i:05}-of-00003.bin")
    write_index(folder, tensors, "pytorch_model", "bin")


def write_index(folder, tensors, stem, suffix):
    places = {name: f"{stem}-{i:05}-of-00003.{suffix}" for i, part in enumerate(shards(tensors), 1) for name in part}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


FORMS = [as_safetensors, as_safetensors_shards, as_pickle, as_old_pickle, as_pickle_shards]


def rewritten(folder: Path, form) -> Path:
    """The checkpoint's weights in another form."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    form(folder, {name: tensor.clone() for name, tensor in tensors.items()})
    return folder


@pytest.mark.parametrize("prefix", [True, False], ids=["prefix", "no_prefix"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_file_gives_the_same_model(folder, form, prefix):
    if not prefix:
        tensors = load_file(folder / "model.safetensors")
        tensors = {name.removeprefix("transformer."): x.clone() for name, x in tensors.items()}
        tensors |= {f"h.{i}.attn.bias": torch.ones(1, 1, 32, 32).tril() for i in range(2)}
        save_file(tensors | {"h.0.attn.masked_bias": torch.tensor(-1e4)}, folder / "model.safetensors")
    model = GPT2LMHeadModel.from_pretrained(rewritten(folder, form))
    assert torch.equal(model(IDS).logits, small()(IDS).logits)


class Code:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("hidden_in", ["entry", "beside"])
def test_a_pickle_with_code_is_refused_and_nothing_runs(folder, tmp_path, zipped, hidden_in):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    trap = tmp_path / "executed"
    content = tensors | {"transformer.extra": Code(trap)} if hidden_in == "entry" else [tensors, Code(trap)]
    torch.save(content, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match="holds code beside its tensors; it was refused, and nothing in it was exec"):
        GPT2LMHeadModel.from_pretrained(folder)
    assert not trap.exists()
    # the trap works
    pickle.loads(pickle.dumps(Code(trap)))
    assert trap.exists()


def test_a_pickle_of_something_else_is_a_named_error(folder):
    (folder / "model.safetensors").unlink()
    torch.save({"state": {"w": torch.ones(1)}}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="must hold a dict of tensors"):
        GPT2LMHeadModel.from_pretrained(folder)


def cut(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])


@pytest.mark.parametrize("size", [0, 1, 100, -1000, -1])
@pytest.mark.parametrize("form", FORMS)
def test_a_truncated_file_is_a_named_error(folder, form, size):
    rewritten(folder, form)
    file = sorted([*folder.glob("*.bin"), *folder.glob("*.safetensors")])[-1]
    cut(file, size)
    with pytest.raises(ValueError, match=f"{file.name} is damaged"):
        GPT2LMHeadModel.from_pretrained(folder)


def edit_index(folder, change) -> None:
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    change(index)
    file.write_text(json.dumps(index))


LN_F = "transformer.ln_f.bias"


@pytest.mark.parametrize(
    "damage, error, message",
    [
        (lambda p: (p / "model-00002-of-00003.safetensors").unlink(), FileNotFoundError, "lacks model-00002-of-00003"),
        (lambda p: edit_index(p, lambda i: i.clear()), ValueError, "index.json is damaged: its weight_map"),
        (lambda p: edit_index(p, lambda i: i["weight_map"].update({LN_F: "../x"})), ValueError, "got '../x'"),
        (lambda p: edit_index(p, lambda i: i["weight_map"].update({LN_F: None})), ValueError, "got None"),
        (
            lambda p: edit_index(p, lambda i: i["weight_map"].update(extra="model-00002-of-00003.safetensors")),
            ValueError,
            "model-00002-of-00003.safetensors lacks extra",
        ),
        (lambda p: (p / "model.safetensors.index.json").write_text("{"), ValueError, "index.json is damaged"),
        (lambda p: (p / "model.safetensors.index.json").unlink(), FileNotFoundError, "has no weights"),
    ],
)
def test_a_damaged_index_or_a_missing_shard_is_a_named_error(folder, damage, error, message):
    rewritten(folder, as_safetensors_shards)
    damage(folder)
    with pytest.raises(error, match=message):
        GPT2LMHeadModel.from_pretrained(folder)


@pytest.mark.parametrize(
    "entries, message",
    [
        ({"model_type": "bert"}, "must hold a model of type 'gpt2', got 'bert'"),
        ({"model_type": None, "architectures": ["BertModel"]}, "of type 'gpt2', got 'BertModel'"),
    ],
)
def test_another_architecture_is_a_named_error(folder, entries, message):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | entries))
    with pytest.raises(ValueError, match=message):
        GPT2LMHeadModel.from_pretrained(folder)


def test_config_overrides_replace_what_the_file_says(folder):
    model = GPT2LMHeadModel.from_pretrained(folder, attn_pdrop=0.25, pad_token_id=3)
    assert (model.config.attn_pdrop, model.config.pad_token_id) == (0.25, 3)
    with pytest.raises(TypeError, match="unexpected keyword argument 'atn_pdrop': GPT2Config has .*attn_pdrop"):
        GPT2LMHeadModel.from_pretrained(folder, atn_pdrop=0.25)
    with pytest.raises(TypeError, match="config must be a GPT2Config, got dict"):
        GPT2LMHeadModel({})


# --- the hub


@pytest.fixture
def hub(folder, tmp_path, monkeypatch):
    """A cache that holds owner/name, as huggingface_hub leaves it, and no connection."""
    cache = tmp_path / "cache"
    (cache / "models--owner--name" / "refs").mkdir(parents=True)
    (cache / "models--owner--name" / "refs" / "main").write_text("0" * 40)
    snapshot = cache / "models--owner--name" / "snapshots" / ("0" * 40)
    small().save_pretrained(snapshot)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return snapshot


def test_a_name_on_the_hub_comes_from_the_local_cache(hub):
    model = GPT2LMHeadModel.from_pretrained("owner/name")
    assert torch.equal(model(IDS).logits, small()(IDS).logits)


@pytest.mark.parametrize("lacking", ["model.safetensors", "config.json"])
def test_what_the_cache_lacks_is_downloaded_without_what_is_not_needed(hub, monkeypatch, lacking):
    patterns, content = [], (hub / lacking).read_bytes()
    (hub / lacking).unlink()
    snapshot_download = huggingface_hub.snapshot_download

    def download(name, allow_patterns=None, local_files_only=False):
        if not local_files_only:
            patterns.append(allow_patterns)
            (hub / lacking).write_bytes(content)
        return snapshot_download(name, local_files_only=True)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert torch.equal(GPT2LMHeadModel.from_pretrained("owner/name")(IDS).logits, small()(IDS).logits)
    assert len(patterns) == 1 and "config.json" in patterns[0] and not any("bin" in x or x == "*" for x in patterns[0])


@pytest.mark.parametrize("name", ["gpt2", "owner/another"])
def test_a_name_that_cannot_be_had_says_what_would_do(hub, name):
    with pytest.raises(FileNotFoundError, match=f"'{name}' is not a folder here, .* Give the folder .* connection"):
        GPT2LMHeadModel.from_pretrained(name)


@pytest.mark.parametrize("path", ["./nowhere", "a/b/c", Path("gpt2"), "owner/na me"])
def test_what_is_neither_folder_nor_name_is_a_named_error(hub, path):
    with pytest.raises(FileNotFoundError, match="path must be a folder with config.json and .*, or a name on the"):
        GPT2LMHeadModel.from_pretrained(path)


def test_a_file_is_not_a_folder(folder):
    with pytest.raises(FileNotFoundError, match="must be a folder .*, got the file"):
        GPT2LMHeadModel.from_pretrained(folder / "model.safetensors")


# --- writing


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.mark.parametrize("max_shard_size", ["50GB", "8KB"])
def test_hugging_face_to_ours_and_back_keeps_every_byte(tmp_path, transformers, max_shard_size):
    config = transformers.GPT2Config(**SHAPE, bos_token_id=0, eos_token_id=0)
    theirs = transformers.GPT2LMHeadModel(config)
    theirs.generation_config.update(do_sample=True, top_k=7)
    theirs.save_pretrained(tmp_path / "theirs")
    model = GPT2LMHeadModel.from_pretrained(tmp_path / "theirs")
    model.save_pretrained(tmp_path / "ours", max_shard_size=max_shard_size)
    again, info = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    again.save_pretrained(tmp_path / "again")
    first, last = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "again"))
    assert first.keys() == last.keys() and all(torch.equal(first[name], last[name]) for name in first)
    written = {}
    for file in (tmp_path / "ours").glob("*.safetensors"):
        written |= load_file(file)
    assert written.keys() == first.keys() and all(torch.equal(written[name], first[name]) for name in first)
    assert (again.generation_config.do_sample, again.generation_config.top_k) == (True, 7)
    assert again.config.eos_token_id == 0


def test_large_weights_are_spread_and_an_earlier_save_leaves_nothing(tmp_path):
    model = small()
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    files = sorted(tmp_path.glob("*.safetensors"))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(files) > 2 and files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    assert index["weight_map"].keys() == model.state_dict().keys()
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in model.state_dict().values())
    assert torch.equal(GPT2LMHeadModel.from_pretrained(tmp_path)(IDS).logits, model(IDS).logits)

    (tmp_path / "notes.txt").write_text("stays")
    other = small(n_layer=1)
    other.save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors", "notes.txt"}
    model.save_pretrained(tmp_path, max_shard_size=8000)
    assert not (tmp_path / "model.safetensors").exists()
    assert torch.equal(GPT2LMHeadModel.from_pretrained(tmp_path)(IDS).logits, model(IDS).logits)


def test_a_bad_shard_size_is_a_named_error_and_writes_nothing(tmp_path):
    for size in ("8 parsecs", None):
        with pytest.raises(ValueError, match="max_shard_size must be bytes or a text such as '5GB'"):
            small().save_pretrained(tmp_path / "new", max_shard_size=size)
    assert not (tmp_path / "new").exists()


def test_state_dict_leaves_out_what_is_tied_and_loads_with_or_without_it():
    model, other = small(), small()
    state = model.state_dict()
    assert "lm_head.weight" not in state and "lm_head.weight" in small(tie_word_embeddings=False).state_dict()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert other.load_state_dict(state) == ([], [])
    assert torch.equal(other(IDS).logits, model(IDS).logits)
    assert other.lm_head.weight is other.transformer.wte.weight
    other.load_state_dict(state | {"lm_head.weight": state["transformer.wte.weight"]})
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict({name: x for name, x in state.items() if name != "transformer.wte.weight"})
    wrapped = nn.Sequential(model)
    assert wrapped.load_state_dict(wrapped.state_dict()) == ([], [])


def test_embeddings_can_be_had_and_exchanged():
    model = small()
    assert model.get_input_embeddings() is model.transformer.wte
    model.set_input_embeddings(nn.Embedding(61, 24))
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.base_model is model.transformer and model.num_parameters(only_trainable=True) == model.num_parameters()
    rest = model.num_parameters() - (61 + 32) * 24
    assert model.num_parameters(exclude_embeddings=True) == rest
    assert model.get_memory_footprint() == 4 * model.num_parameters()


# --- what a class may say of its checkpoints


@dataclass
class ToyConfig(PretrainedConfig):
    width: int = 8
    num_labels: int = 3
    initializer_range: float = 0.5
    tie_word_embeddings: bool = True
    model_type = "toy"


class Toy(PretrainedModel):
    config_class = ToyConfig
    base_model_prefix = "toy"
    _renames = ((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias"))
    _keys_to_ignore_on_load_unexpected = (r"position_ids$",)
    _heads = ("toy.pooler.", "classifier.", "cls.")

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, ToyModel):
            module.steps.copy_(torch.arange(4))


class ToyModel(Toy):
    """An encoder by itself, as BertModel is."""

    def __init__(self, config, pooler=True):
        super().__init__(config)
        self.dense = nn.Linear(config.width, config.width)
        self.LayerNorm = nn.LayerNorm(config.width)
        if pooler:
            self.pooler = nn.Linear(config.width, config.width)
        self.register_buffer("steps", torch.arange(4), persistent=False)
        self.post_init()


class ToyForClassification(Toy):
    def __init__(self, config):
        super().__init__(config)
        self.toy = ToyModel(config)
        self.classifier = nn.Linear(config.width, config.num_labels)
        self.post_init()


class ToyForMaskedLM(Toy):
    _tied_weights_keys = {"cls.weight": "toy.dense.weight"}

    def __init__(self, config):
        super().__init__(config)
        self.toy = ToyModel(config, pooler=False)
        self.cls = nn.Linear(config.width, config.width)
        self.post_init()


def same_encoder(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(x, other.get_parameter(name)) for name, x in one.named_parameters() if "pooler" not in name)


def test_a_missing_head_is_initialised_with_one_warning_that_names_it(tmp_path):
    encoder = ToyModel(ToyConfig())
    encoder.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="has no classifier.bias, classifier.weight: initialised at random") as caught:
        model = ToyForClassification.from_pretrained(tmp_path, num_labels=5)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert same_encoder(encoder, model.toy) and torch.equal(model.toy.pooler.weight, encoder.pooler.weight)
    assert model.classifier.weight.shape == (5, 8) and not model.classifier.bias.any()
    assert 0.2 < model.classifier.weight.std() < 0.8
    assert torch.equal(model.toy.steps, torch.arange(4))


def test_heads_of_another_task_are_ignored_with_a_note(tmp_path, caplog):
    masked = ToyForMaskedLM(ToyConfig())
    masked.save_pretrained(tmp_path)
    caplog.set_level(logging.INFO, "lmkernels")
    with pytest.warns(UserWarning, match="has no classifier.bias, classifier.weight, toy.pooler.bias, toy.pooler.w"):
        model = ToyForClassification.from_pretrained(tmp_path)
    assert same_encoder(masked.toy, model.toy)
    assert "not used by ToyForClassification: cls.bias" in caplog.text
    with pytest.warns(UserWarning, match="has no pooler.bias, pooler.weight"):
        assert same_encoder(masked.toy, ToyModel.from_pretrained(tmp_path))


def test_a_whole_checkpoint_loads_silently_and_old_names_are_renamed(tmp_path):
    model = ToyForClassification(ToyConfig())
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["toy.LayerNorm.gamma"] = tensors.pop("toy.LayerNorm.weight")
    tensors["toy.LayerNorm.beta"] = tensors.pop("toy.LayerNorm.bias")
    save_file(tensors | {"toy.position_ids": torch.arange(4)}, tmp_path / "model.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = ToyForClassification.from_pretrained(tmp_path)
    assert all(torch.equal(x, loaded.get_parameter(name)) for name, x in model.named_parameters())


def test_a_tied_tensor_may_be_in_the_file_by_either_name(tmp_path):
    model = ToyForMaskedLM(ToyConfig())
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    weight = tensors["toy.dense.weight"].clone()
    save_file(tensors | {"cls.weight": weight}, tmp_path / "model.safetensors")
    assert torch.equal(ToyForMaskedLM.from_pretrained(tmp_path).cls.weight, weight)
    del tensors["toy.dense.weight"]
    save_file(tensors | {"cls.weight": weight}, tmp_path / "model.safetensors")
    assert torch.equal(ToyForMaskedLM.from_pretrained(tmp_path).toy.dense.weight, weight)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("toy.dense.bias"), "missing toy.dense.bias"),
        (lambda t: t.pop("classifier.bias"), "missing classifier.bias"),
        (lambda t: t.update({"toy.extra.weight": torch.ones(1)}), "not part of the model: toy.extra.weight"),
        (lambda t: t.update({"other.weight": torch.ones(1)}), "not part of the model: other.weight"),
        (
            lambda t: t.update({"toy.LayerNorm.gamma": torch.ones(8)}),
            "two names of one tensor: toy.LayerNorm.(gamma|weight) and toy.LayerNorm",
        ),
        (lambda t: t.update({"toy.gamma": torch.ones(8)}), "not part of the model: toy.gamma"),
    ],
)
def test_what_an_encoder_lacks_or_has_too_much_is_a_named_error(tmp_path, change, message):
    ToyForClassification(ToyConfig()).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        ToyForClassification.from_pretrained(tmp_path)


def test_labels_that_contradict_the_checkpoints_head_are_a_named_error(tmp_path):
    ToyForClassification(ToyConfig(num_labels=2)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"classifier.weight must be \(4, 8\), got \(2, 8\) \(num_labels is 4\)"):
        ToyForClassification.from_pretrained(tmp_path, num_labels=4)
