"""accelerate: the same numbers as the plain model, whatever transformers, peft or a user does with it afterwards."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle

import pytest
import torch

tf = pytest.importorskip("transformers")

from lmkernels import nn  # noqa: E402
from lmkernels.hf import accelerate, restore  # noqa: E402
from lmkernels.hf.accelerate_logits import Logits  # noqa: E402
from lmkernels.nn._stand_in import StandIn  # noqa: E402

from .accelerate_models import (  # noqa: E402
    MODELS,
    VOCAB,
    assert_close,
    assert_gradients,
    batch,
    make,
    twins,
    without_dropout,
)


def kinds(model) -> dict[str, str]:
    """The stand-ins in a model: their names as modules, and those of their forwards."""
    return {name: type(m).__bases__[0].__name__ for name, m in model.named_modules() if isinstance(m, StandIn)}


def state(model) -> list:
    """All that accelerate might leave behind."""
    configs = [m.config._attn_implementation for m in model.modules() if isinstance(m, tf.PreTrainedModel)]
    return [(type(m), sorted(m.__dict__), m.training) for m in model.modules()] + configs


@pytest.mark.parametrize("name", MODELS)
def test_results_and_gradients(name):
    ours, plain = twins(name)
    inputs = batch(name)
    with torch.no_grad():
        for mine, theirs in zip(ours(**inputs).to_tuple(), plain(**inputs).to_tuple(), strict=True):
            if isinstance(theirs, torch.Tensor):
                assert_close(mine, theirs)
    mine, theirs = without_dropout(ours)(**inputs), without_dropout(plain)(**inputs)
    assert_close(mine.loss, theirs.loss)
    mine.loss.backward()
    theirs.loss.backward()
    assert_gradients(ours, plain)
    if "logits" in mine:
        assert_close(mine.logits, theirs.logits)


@pytest.mark.parametrize("name", MODELS)
def test_training_needs_no_logits(name):
    model = without_dropout(twins(name)[0])
    out = model(**batch(name))
    out.loss.backward()
    logits = out.get("logits", out.get("prediction_logits"))
    if name in ("bert classes", "bert entities", "bert answers"):
        assert type(logits) is not Logits or name == "bert answers"
    else:
        assert type(logits) is Logits and logits.values is None


SWAPPED = {
    "gpt2": {"MLP": 2, "Conv1D": 8, "LMHead": 1, "Dropout": 1 + 2 * 3},
    "llama": {"RMSNorm": 5, "SwiGLU": 2, "LMHead": 1},
    "bert": {
        "Embeddings": 1,
        "SelfAttention": 2,
        "FeedForwardChunk": 2,
        "AddAndNorm": 4,
        "LMHead": 1,
        "Dropout": 1 + 2 * 3,
    },
    "roberta": {
        "Embeddings": 1,
        "SelfAttention": 2,
        "FeedForwardChunk": 2,
        "AddAndNorm": 4,
        "LMHead": 1,
        "Dropout": 1 + 2 * 3,
    },
    "t5": {"RMSNorm": 12, "MLP": 4, "LMHead": 1},
    "gemma": {"LMHead": 1},  # its norm multiplies by 1 + weight, its gate is GELU
}


@pytest.mark.parametrize("name", SWAPPED)
def test_what_is_swapped(name):
    model = make(name)
    before = {key: id(value) for key, value in model.state_dict(keep_vars=True).items()}
    report = accelerate(model, verbose=False)
    found = list(kinds(model).values())
    assert {kind: found.count(kind) for kind in SWAPPED[name]} == SWAPPED[name]
    assert {key: id(value) for key, value in model.state_dict(keep_vars=True).items()} == before
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    assert all(isinstance(m, (nn.Linear, StandIn)) for m in linears)
    assert model.config._attn_implementation == "lmkernels"
    assert any(change.after == "attention: lmkernels" for change in report.swapped)
    left = {change.before.rpartition(".")[2]: change.reason for change in report.left}
    if name == "gemma":
        assert left["GemmaRMSNorm"] == "its forward computes something else"
        assert left["GemmaMLP"] == "act_fn is not silu"
    else:
        assert left == {}
    assert accelerate(model, verbose=False).swapped == ()  # there is nothing left to do


def test_the_report(capsys):
    model = make("llama")
    report = accelerate(model)
    assert capsys.readouterr().out == f"{report}\n"
    assert ["model.layers.*.mlp", "lmkernels.hf.SwiGLU", "x", "2"] in [
        [line.split()[0], *line.split()[2:]] for line in str(report).splitlines()
    ]


@pytest.mark.parametrize("name", MODELS)
def test_restore_leaves_no_trace(name):
    model = make(name)
    model.get_submodule(next(key for key, _ in model.named_modules() if key.count(".") > 1)).train()
    before = state(model)
    report = accelerate(model, verbose=False)
    assert state(model) != before
    assert len(restore(model).swapped) == len(report.swapped)
    assert state(model) == before
    assert restore(model).swapped == ()


def test_an_exception_leaves_the_model_as_it_was(monkeypatch):
    model = make("gpt2")

    class NoClass(type(model.transformer.h[1].mlp)):
        """An object whose class cannot be set, near the end of the model."""

        def __setattr__(self, name, value):
            if name == "__class__" and value is not NoClass:
                raise RuntimeError("no class for me")
            super().__setattr__(name, value)

    model.transformer.h[1].mlp.__class__ = NoClass
    before = state(model)
    with pytest.raises(RuntimeError, match="no class for me"):
        accelerate(model, verbose=False)
    assert state(model) == before


def test_only_models_of_transformers():
    with pytest.raises(TypeError, match="model must be or hold a transformers.PreTrainedModel, got Linear"):
        accelerate(torch.nn.Linear(2, 2))


def test_without_the_attention():
    ours, plain = twins("gpt2", attention=False)
    assert ours.config._attn_implementation == plain.config._attn_implementation == "sdpa"
    inputs = batch("gpt2")
    assert_close(ours(**inputs).logits, plain(**inputs).logits)


def test_blocks_that_are_not_what_they_seem_are_left():
    model = make("gpt2")
    first, second = (block.mlp for block in model.transformer.h)
    first.c_fc.register_forward_hook(lambda module, args, out: out + 1)
    second.forward = lambda x: x
    report = accelerate(model, verbose=False)
    reasons = {change.name: change.reason for change in report.left}
    assert reasons == {
        "transformer.h.0.mlp": "c_fc: not as transformers made it",
        "transformer.h.1.mlp": "it has a forward of its own",
    }

    class Doubling(type(first)):
        def forward(self, x):
            return 2 * super().forward(x)

    model = make("gpt2")
    model.transformer.h[0].mlp.__class__ = Doubling
    (left,) = accelerate(model, verbose=False).left
    assert (left.name, left.reason) == ("transformer.h.0.mlp", "its forward computes something else")


@pytest.mark.parametrize("part", ["mlp.c_fc", "mlp.c_proj", "mlp"])
def test_a_hook_set_later_is_called(part):
    ours, plain = twins("gpt2")
    inputs = batch("gpt2")
    for model in (ours, plain):
        model.transformer.h[0].get_submodule(part).register_forward_hook(lambda module, args, out: out + 1)
    assert_close(ours(**inputs).logits, plain(**inputs).logits)


@pytest.mark.parametrize("name", ["bert", "roberta"])
@pytest.mark.parametrize(
    "part", ["attention.self.key", "attention.output", "intermediate", "intermediate.dense", "output"]
)
def test_hooks_within_a_layer_of_bert(name, part):
    ours, plain = twins(name)
    inputs = batch(name)
    for model in (ours, plain):
        layer = model.base_model.encoder.layer[0]
        layer.get_submodule(part).register_forward_hook(lambda module, args, out: out * 2)
    assert_close(ours(**inputs).logits, plain(**inputs).logits)


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "bart", "marian", "whisper"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_generate(name, options):
    ours, plain = twins(name)
    inputs = {key: x for key, x in batch(name).items() if key != "labels"}
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, **options}
    assert torch.equal(ours.generate(**inputs, **options), plain.generate(**inputs, **options))
    ours.train()  # whose logits are computed all the same, as nobody wants a gradient
    assert ours.generate(**inputs, **options).shape[1] >= 8


@pytest.mark.parametrize("name", ["gpt2", "bert", "roberta", "llama", "t5", "bart", "bert classes"])
def test_autocast(name):
    """As near to float32 as the plain model is under autocast."""
    ours, plain = twins(name)
    exact, inputs = copy.deepcopy(plain), batch(name)
    results = []
    for model in (ours, plain, exact):
        with torch.autocast(torch.get_default_device().type, torch.bfloat16, enabled=model is not exact):
            out = without_dropout(model)(**inputs)
        out.loss.backward()
        gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        results.append((out.logits.detach(), out.loss.detach(), gradients))
    for mine, theirs, truth in zip(*results, strict=True):
        assert mine.dtype == theirs.dtype
        error, allowed = (mine - truth).norm(), 2 * (theirs - truth).norm() + 4e-3 * truth.norm()
        assert error <= allowed


@pytest.mark.parametrize("name", ["gpt2", "bert", "llama", "t5"])
def test_models_of_16_bits(name):
    plain = make(name).bfloat16()
    ours = copy.deepcopy(plain)
    accelerate(ours, verbose=False)
    inputs = batch(name)
    mine, theirs = without_dropout(ours)(**inputs), without_dropout(plain)(**inputs)
    assert_close(mine.logits, theirs.logits, 3e-2)
    assert_close(mine.loss.float(), theirs.loss.float(), 2e-2)
    mine.loss.backward()
    assert all(p.grad.dtype == torch.bfloat16 for p in ours.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", ["gpt2", "bert", "t5", "bart", "llama"])
def test_training_with_dropout(name):
    model = twins(name)[0].train()
    inputs = batch(name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    for seed, same in ((3, True), (4, False)):
        torch.manual_seed(3)
        first = model(**inputs).loss
        torch.manual_seed(seed)
        if name != "llama":  # it drops nothing
            assert (model(**inputs).loss == first) == same


def test_dropout():
    model = twins("gpt2")[0]
    dropout = model.transformer.drop.train()
    assert kinds(model)["transformer.drop"] == "Dropout"
    x = torch.ones(401, 251, requires_grad=True)
    torch.manual_seed(0)
    y = dropout(x)
    kept = y != 0
    assert torch.allclose(y[kept], torch.tensor(1 / 0.9), rtol=1e-4)
    n = x.numel()
    assert abs(kept.sum().item() - 0.9 * n) < 4 * (0.09 * n) ** 0.5
    # no two rows, and no neighbours, are dropped together more often than by chance
    pairs = (~kept[:, 1:] & ~kept[:, :-1]).sum().item(), (~kept[1:] & ~kept[:-1]).sum().item()
    assert all(abs(count - 0.01 * n) < 5 * (0.01 * n) ** 0.5 for count in pairs)
    y.sum().backward()
    assert torch.equal(x.grad, y)  # one mask for both ways
    torch.manual_seed(0)
    assert torch.equal(dropout(x), y)
    torch.manual_seed(1)
    assert not torch.equal(dropout(x), y)
    assert dropout.eval()(x) is x
    z = torch.rand(5, 7, dtype=torch.float64, requires_grad=True)

    def seeded(z):
        torch.manual_seed(0)
        return dropout.train()(z)

    assert torch.autograd.gradcheck(seeded, z) and torch.autograd.gradgradcheck(seeded, z)


def rows(name: str) -> list[dict[str, torch.Tensor]]:
    """A data set of 12 rows."""
    torch.manual_seed(5)
    ids = torch.randint(3, VOCAB, (12, 9))
    # rows count differently
    labels = torch.arange(12) % 2 if name == "bert classes" else ids.masked_fill(torch.rand(ids.shape) < 0.3, -100)
    return [{"input_ids": i, "labels": j} for i, j in zip(ids, labels, strict=True)]


@pytest.mark.parametrize("options", [{}, {"bf16": True}, {"label_smoothing_factor": 0.1}], ids=str)
@pytest.mark.parametrize("name", ["gpt2", "bert classes"])
def test_trainer(name, options, tmp_path):
    pytest.importorskip("accelerate")
    models = twins(name)
    histories = []
    for model in models:
        arguments = tf.TrainingArguments(
            output_dir=str(tmp_path),
            use_cpu=torch.get_default_device().type == "cpu",
            max_steps=3,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=1e-3,
            logging_steps=1,
            save_strategy="no",
            disable_tqdm=True,
            seed=1,
            **options,
        )
        without_dropout(model)
        trainer = tf.Trainer(model, arguments, train_dataset=rows(name), eval_dataset=rows(name))
        with contextlib.redirect_stdout(io.StringIO()):
            trainer.train()
            evaluation = trainer.evaluate()
        histories.append([e["loss"] for e in trainer.state.log_history if "loss" in e] + [evaluation["eval_loss"]])
    limit = 2e-2 if "bf16" in options else 1e-3
    assert histories[0] == pytest.approx(histories[1], rel=limit)
    if "bf16" not in options:
        for mine, theirs in zip(*(m.parameters() for m in models), strict=True):
            # Adam divides by the gradient's size: what has none (biases of keys) moves by chance
            assert ((mine - theirs).abs() < 2e-4).float().mean() > 0.9


@pytest.mark.parametrize("first", ["accelerate", "peft"])
@pytest.mark.parametrize("name", ["gpt2", "bert classes", "llama"])
def test_peft(name, first):
    peft = pytest.importorskip("peft")
    targets = {"gpt2": ["c_attn", "c_fc"], "bert classes": ["query", "intermediate.dense"], "llama": ["up_proj"]}[name]
    models = []
    for accelerated in (True, False):
        model = make(name)
        if accelerated and first == "accelerate":
            accelerate(model, verbose=False)
        torch.manual_seed(0)
        config = peft.LoraConfig(target_modules=targets, r=4, lora_alpha=8, init_lora_weights=False)
        model = peft.get_peft_model(model, config)
        if accelerated and first == "peft":
            accelerate(model, verbose=False)
        models.append(without_dropout(model))
    inputs = batch(name)
    outs = [model(**inputs) for model in models]
    for out in outs:
        out.loss.backward()
    assert_close(outs[0].logits, outs[1].logits)
    assert_gradients(*models)
    assert any(p.grad is not None for p in models[0].parameters())
    merged = [model.merge_and_unload().eval() for model in models]
    assert_close(merged[0](**inputs).logits, merged[1](**inputs).logits)
    restore(merged[0])
    assert [type(m) for m in merged[0].modules()] == [type(m) for m in merged[1].modules()]


def test_pipeline():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"[UNK]": 0, **{f"w{i}": i for i in range(1, VOCAB)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[UNK]", padding_side="left")
    texts = []
    for model in twins("gpt2"):
        pipe = tf.pipeline("text-generation", model=model, tokenizer=tokenizer, device=torch.get_default_device())
        texts.append(pipe(["w3 w4 w5", "w9"], max_new_tokens=6, do_sample=False, batch_size=2))
    assert texts[0] == texts[1]


@pytest.mark.parametrize("name", ["gpt2", "bert", "t5", "llama"])
def test_saved_as_if_nothing_had_happened(name, tmp_path):
    ours, plain = twins(name)
    for model, folder in ((ours, "ours"), (plain, "plain")):
        model.save_pretrained(tmp_path / folder)
    names = sorted(path.name for path in (tmp_path / "plain").iterdir())
    assert "model.safetensors" in names and names == sorted(path.name for path in (tmp_path / "ours").iterdir())
    for file in names:
        assert (tmp_path / "ours" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes(), file
    loaded = type(plain).from_pretrained(tmp_path / "ours")
    assert [type(m) for m in loaded.modules()] == [type(m) for m in plain.modules()]
    ours.load_state_dict(plain.state_dict())


@pytest.mark.parametrize("name", ["gpt2", "bert", "llama", "t5"])
def test_copied_and_pickled(name):
    ours, _ = twins(name)
    inputs = batch(name)
    expected = ours(**inputs).logits
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert [type(m) for m in twin.modules()] == [type(m) for m in ours.modules()]
        assert torch.equal(twin(**inputs).logits, expected)
        restore(twin)
        assert_close(twin(**inputs).logits, expected)


@pytest.mark.parametrize("name", ["gpt2", "bert", "llama"])
def test_gradient_checkpointing(name):
    ours, plain = twins(name)
    for model in (ours, plain):
        model.gradient_checkpointing_enable()
        without_dropout(model)(**batch(name)).loss.backward()
    assert_gradients(ours, plain)


@pytest.mark.parametrize("name", ["gpt2", "bert classes", "llama"])
def test_compiled(name):
    ours, plain = twins(name)
    inputs = batch(name)
    compiled = torch.compile(without_dropout(ours), backend="aot_eager")
    out, expected = compiled(**inputs), without_dropout(plain)(**inputs)
    assert_close(out.logits, expected.logits)
    assert_close(out.loss, expected.loss)
    out.loss.backward()
    expected.loss.backward()
    assert_gradients(ours, plain)


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_hidden_states_and_attention_maps(name):
    ours, plain = twins(name)
    plain.set_attn_implementation("eager")
    inputs = {**batch(name, padded=False), "output_hidden_states": True, "output_attentions": True}
    mine, theirs = ours(**inputs), plain(**inputs)
    for kind in ("hidden_states", "attentions"):
        for x, y in zip(mine[kind], theirs[kind], strict=True):
            assert_close(x, y)


def test_embeddings_given_and_positions_given():
    ours, plain = twins("bert")
    inputs = batch("bert")
    inputs["position_ids"] = torch.arange(9).flip(0).expand(2, 9)
    assert_close(ours(**inputs).logits, plain(**inputs).logits)
    embeds = torch.randn(2, 9, 32)
    inputs = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}
    assert_close(ours(**inputs).logits, plain(**inputs).logits)


def test_logits_to_keep_and_items_in_batch():
    ours, plain = map(without_dropout, twins("gpt2"))
    inputs = batch("gpt2")
    kept = [model(input_ids=inputs["input_ids"], logits_to_keep=2).logits for model in (ours, plain)]
    assert kept[0].shape == (2, 2, VOCAB)
    assert_close(*kept)
    for options in ({"num_items_in_batch": torch.tensor(31)}, {"shift_labels": inputs["labels"].roll(-1, 1)}):
        losses = [model(**inputs, **options) for model in (ours, plain)]
        assert losses[0].logits.values is None
        assert_close(losses[0].loss, losses[1].loss)
