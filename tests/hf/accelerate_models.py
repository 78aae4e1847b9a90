"""Tiny models of transformers for the tests of accelerate, with random parameters, zeros of biases included."""

from __future__ import annotations

import copy

import torch
import transformers as tf

VOCAB = 97
SIZES = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
BERT = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 48, **SIZES}
SEQ2SEQ = {
    **{f"{side}_layers": 2 for side in ("encoder", "decoder")},
    **{f"{side}_attention_heads": 2 for side in ("encoder", "decoder")},
    **{f"{side}_ffn_dim": 48 for side in ("encoder", "decoder")},
    "d_model": 32,
    "decoder_start_token_id": 1,
    **SIZES,
}
DECODER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, **SIZES}

MODELS = {
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(n_layer=2, n_head=2, n_embd=32, n_positions=64, **SIZES)),
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(num_key_value_heads=2, **DECODER)),
    "gemma": lambda: tf.GemmaForCausalLM(tf.GemmaConfig(num_key_value_heads=2, head_dim=8, **DECODER)),
    "bert": lambda: tf.BertForMaskedLM(tf.BertConfig(max_position_embeddings=64, **BERT)),
    "bert pretraining": lambda: tf.BertForPreTraining(tf.BertConfig(max_position_embeddings=64, **BERT)),
    "bert classes": lambda: tf.BertForSequenceClassification(tf.BertConfig(**BERT)),
    "bert entities": lambda: tf.BertForTokenClassification(tf.BertConfig(**BERT)),
    "bert answers": lambda: tf.BertForQuestionAnswering(tf.BertConfig(**BERT)),
    "roberta": lambda: tf.RobertaForMaskedLM(tf.RobertaConfig(max_position_embeddings=66, **BERT)),
    "t5": lambda: tf.T5ForConditionalGeneration(
        tf.T5Config(num_layers=2, num_heads=2, d_model=32, d_kv=16, d_ff=48, decoder_start_token_id=1, **SIZES)
    ),
    "bart": lambda: tf.BartForConditionalGeneration(tf.BartConfig(max_position_embeddings=64, **SEQ2SEQ)),
    "marian": lambda: tf.MarianMTModel(tf.MarianConfig(max_position_embeddings=64, scale_embedding=True, **SEQ2SEQ)),
    "whisper": lambda: tf.WhisperForConditionalGeneration(
        tf.WhisperConfig(
            num_mel_bins=8,
            max_source_positions=16,
            max_target_positions=32,
            suppress_tokens=None,
            begin_suppress_tokens=None,
            **SEQ2SEQ,
        )
    ),
}


def make(name: str) -> torch.nn.Module:
    """In evaluation mode. Embeddings of padding stay zero, or every model would learn from it."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for module in model.modules():
            for parameter in module.parameters(recurse=False):
                parameter.add_(torch.empty_like(parameter).uniform_(-0.2, 0.2))
            if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx] = 0
    return model


def twins(name: str, **options) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A model, and its accelerated copy."""
    from lmkernels.hf import accelerate

    plain = make(name)
    ours = copy.deepcopy(plain)
    accelerate(ours, verbose=False, **options)
    return ours, plain


def batch(name: str, b: int = 2, s: int = 9, padded: bool = True) -> dict[str, torch.Tensor]:
    """Inputs with labels; the second row is shorter, padded on the left for decoders and on the right for others."""
    torch.manual_seed(1)
    ids = torch.randint(3, VOCAB, (b, s))
    mask = torch.ones_like(ids)
    if padded:
        mask[1, slice(0, 3) if name in ("gpt2", "llama", "gemma") else slice(-3, None)] = 0
        ids[mask == 0] = 0
    labels = ids.masked_fill(mask == 0, -100)
    if name == "whisper":
        return {"input_features": torch.randn(b, 8, 32), "labels": labels}
    inputs = {"input_ids": ids, "attention_mask": mask}
    if name.startswith("bert"):
        inputs["token_type_ids"] = (torch.arange(s) > 4).long().expand(b, s)
    if name == "bert classes":
        return inputs | {"labels": torch.tensor([0, 1])}
    if name == "bert answers":
        return inputs | {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 40])}
    if name == "bert entities":
        return inputs | {"labels": labels.clamp(max=1)}
    if name == "bert pretraining":
        inputs["next_sentence_label"] = torch.tensor([1, 0])
    return inputs | {"labels": labels}


def without_dropout(model: torch.nn.Module) -> torch.nn.Module:
    """In training mode with nothing dropped."""
    for module in model.train().modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "activation_dropout", "attention_dropout", "encoder_layerdrop", "decoder_layerdrop"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


def assert_gradients(ours: torch.nn.Module, plain: torch.nn.Module, limit: float = 1e-4) -> None:
    """Relative to each parameter's largest gradient, or where that is none (biases of keys) to the model's."""
    largest = max(p.grad.abs().max() for p in plain.parameters() if p.grad is not None)
    expected = dict(plain.named_parameters())
    for name, parameter in ours.named_parameters():
        gradient = expected[name].grad
        assert (parameter.grad is None) == (gradient is None), name
        if gradient is not None:
            error = (parameter.grad - gradient).abs().max() / max(gradient.abs().max(), 1e-2 * largest)
            assert error < limit, f"{name}: {error:.1e}"


def assert_close(actual: torch.Tensor, expected: torch.Tensor, limit: float = 1e-4) -> None:
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    error = (actual.double() - expected.double()).norm() / expected.double().norm()
    assert error < limit, f"{error:.1e}"
