"""replace: what it exchanges, what it leaves and why, and that nobody notices but the clock."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch.nn.utils import parametrizations, prune

from lmkernels import nn
from lmkernels.nn.linear import Conv1D

from .conftest import assert_same, results


class Subclass(torch.nn.Linear):
    pass


def transformer():
    return torch.nn.Transformer(16, 2, 2, 2, 24, dropout=0.0, batch_first=True)


def same(model, before, *inputs):
    assert_same(results(model, inputs), results(before, inputs))


def test_a_whole_transformer():
    model = transformer()
    before = copy.deepcopy(model)
    parameters = {name: id(p) for name, p in model.named_parameters()}
    report = nn.replace(model, verbose=False)
    assert {name: id(p) for name, p in model.named_parameters()} == parameters
    kinds = [type(m) for m in model.modules()]
    # an encoder layer has 1, a decoder layer 2 attentions
    assert kinds.count(nn.TransformerEncoderLayer) == 2 and kinds.count(nn.MultiheadAttention) == 6
    assert kinds.count(nn.Linear) == 8 and kinds.count(nn.LayerNorm) == 2 * 2 + 2 * 3 + 2
    assert len(report.swapped) == 2 + 6 + 8 + 12 and report.left == ()
    same(model, before, torch.randn(2, 5, 16), torch.randn(2, 3, 16))
    assert nn.replace(model, verbose=False).swapped == ()  # there is nothing left to do

    undone = nn.restore(model)
    assert len(undone.swapped) == len(report.swapped)
    assert [type(m) for m in model.modules()] == [type(m) for m in before.modules()]


def test_the_model_itself():
    model = torch.nn.Linear(3, 4)
    (change,) = nn.replace(model, verbose=False).swapped
    assert type(model) is nn.Linear and change.before == "torch.nn.Linear" and change.after == "lmkernels.nn.Linear"


def test_ties_optimizers_hooks_and_mode_stay():
    model = torch.nn.Sequential(torch.nn.Embedding(7, 5), torch.nn.RMSNorm(5), torch.nn.Linear(5, 7, bias=False)).eval()
    model[2].weight = model[0].weight
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = []
    model[2].register_forward_hook(lambda *arguments: seen.append(1))
    nn.replace(model, verbose=False)
    assert type(model[1]) is nn.RMSNorm and type(model[2]) is nn.Linear
    assert model[2].weight is model[0].weight and not model[2].training
    before = model[2].weight.clone()
    model(torch.tensor([1, 2])).sum().backward()
    optimizer.step()
    assert seen == [1] and not torch.equal(model[2].weight, before)


def test_what_is_left_and_why():
    patched = torch.nn.Linear(3, 3)
    patched.forward = lambda x: x
    model = torch.nn.ModuleDict(
        {
            "subclass": Subclass(3, 3),
            "lazy": torch.nn.LazyLinear(3),
            "parametrized": parametrizations.weight_norm(torch.nn.Linear(3, 3)),
            "patched": patched,
            "complex": torch.nn.Linear(3, 3, dtype=torch.complex64),
            "plain": torch.nn.Linear(3, 3),
        }
    )
    report = nn.replace(model, verbose=False)
    assert [change.name for change in report.swapped] == ["plain"]
    reasons = {change.name: change.reason for change in report.left}
    assert reasons == {
        "subclass": "a subclass of torch.nn.Linear",
        "lazy": "its parameters do not exist before the first call",
        "parametrized": "it is parametrized",
        "patched": "it has a forward of its own",
        "complex": "weight is torch.complex64",
    }
    assert type(model["lazy"]) is torch.nn.LazyLinear
    model["lazy"](torch.randn(2, 5))
    assert [change.name for change in nn.replace(model, verbose=False).swapped] == ["lazy"]


def test_pruned_modules_keep_their_masks():
    model = torch.nn.Sequential(torch.nn.Linear(6, 4))
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    x = torch.randn(3, 6)
    expected = results(model, [x])
    nn.replace(model, verbose=False)
    assert type(model[0]) is nn.Linear
    assert_same(results(model, [x]), expected)


def test_the_report(capsys):
    model = torch.nn.Sequential(*(torch.nn.Sequential(torch.nn.Linear(3, 3), Subclass(3, 3)) for _ in range(11)))
    report = nn.replace(model)
    assert capsys.readouterr().out == f"{report}\n"
    header, *rows, summary = str(report).splitlines()
    plain, subclass = map(str.split, rows)
    assert plain == ["*.*", "torch.nn.Linear", "lmkernels.nn.Linear", "x", "11"]
    assert subclass == ["*.*", f"{__name__}.Subclass", "left:", "a", "subclass", "of", "torch.nn.Linear", "x", "11"]
    assert header.split() == ["module", "from", "to"] and summary == "11 swapped, 11 left as they were"


def test_on_the_meta_device_and_loaded_afterwards():
    with torch.device("meta"):
        model = transformer()
    nn.replace(model, verbose=False)
    before = transformer()
    model.load_state_dict(before.state_dict(), assign=True)
    same(model, before, torch.randn(2, 5, 16), torch.randn(2, 3, 16))


def test_saved_and_loaded():
    model = transformer()
    nn.replace(model, verbose=False)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    same(torch.load(file, weights_only=False), model, torch.randn(2, 5, 16), torch.randn(2, 3, 16))


def test_conv1d_of_transformers():
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    model = torch.nn.Sequential(conv1d(30, 20))
    before = copy.deepcopy(model)
    (change,) = nn.replace(model, verbose=False).swapped
    assert (change.before, change.after) == ("transformers.pytorch_utils.Conv1D", "lmkernels.nn.Conv1D")
    assert isinstance(model[0], conv1d) and isinstance(model[0], Conv1D)
    x = torch.randn(2, 5, 20)
    same(model, before, x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(twin[0], Conv1D)
        same(twin, before, x)
    nn.restore(model)
    assert type(model[0]) is conv1d


def test_a_model_of_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=50, n_positions=32)
    model = transformers.GPT2LMHeadModel(config).eval()
    ids = torch.randint(50, (2, 9))
    expected = model(ids).logits
    report = nn.replace(model, verbose=False)
    assert len(report.swapped) == 2 * (2 + 4) + 1 + 1 + 2 and not report.left
    assert model.lm_head.weight is model.transformer.wte.weight
    assert_same({"": model(ids).logits}, {"": expected})


def test_compiled_models_take_the_new_modules():
    model = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.LayerNorm(4))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 6)
    expected = compiled(x)
    nn.replace(compiled, verbose=False)
    assert type(model[0]) is nn.Linear
    assert_same({"": compiled(x)}, {"": expected})
