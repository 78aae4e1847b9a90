"""Every model that is tested, tiny and with random weights."""

import torch
import transformers

transformers.utils.logging.set_verbosity_error()
VOCAB = 64


def decoder(**options):
    return {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": VOCAB,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    } | options


def encoder_decoder(**options):
    return {
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "vocab_size": VOCAB,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 3,
        "forced_eos_token_id": None,
    } | options


GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": VOCAB, "pad_token_id": 0}
ENCODER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCAB,
}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": VOCAB, "pad_token_id": 0}
WHISPER = {"max_source_positions": 20, "max_target_positions": 32, "num_mel_bins": 8}

# class and configuration of every model that is tested, tiny
MODELS = {
    "gpt2": ("GPT2LMHeadModel", GPT2 | {"bos_token_id": 1, "eos_token_id": 2}),
    "llama": ("LlamaForCausalLM", decoder(num_key_value_heads=2)),
    "mistral": ("MistralForCausalLM", decoder(num_key_value_heads=2, sliding_window=4)),
    # a window that its layers do not pass on, so that it is the mask's to say
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        decoder(
            num_key_value_heads=2,
            use_sliding_window=True,
            sliding_window=4,
            max_window_layers=1,
            num_experts=2,
            num_experts_per_tok=1,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=16,
        ),
    ),
    "gemma2": (
        "Gemma2ForCausalLM",
        decoder(num_key_value_heads=2, head_dim=8, sliding_window=4, attn_logit_softcapping=2.0),
    ),
    "gpt_oss": (
        "GptOssForCausalLM",
        decoder(**GROUPED, sliding_window=4, num_local_experts=2, num_experts_per_tok=1) | {"intermediate_size": 16},
    ),
    "llama4": (
        "Llama4ForCausalLM",
        decoder(
            num_key_value_heads=2, head_dim=8, attention_chunk_size=4, num_local_experts=2, intermediate_size_mlp=48
        ),
    ),
    "bert": ("BertForMaskedLM", ENCODER),
    "roberta": ("RobertaForMaskedLM", ENCODER | {"max_position_embeddings": 64}),
    "layoutlm": ("LayoutLMForMaskedLM", ENCODER),
    "bart": ("BartForConditionalGeneration", encoder_decoder(max_position_embeddings=64)),
    "marian": ("MarianMTModel", encoder_decoder(max_position_embeddings=64)),
    "t5": ("T5ForConditionalGeneration", T5 | {"eos_token_id": 2, "decoder_start_token_id": 3}),
    "whisper": (
        "WhisperForConditionalGeneration",
        encoder_decoder(suppress_tokens=None, begin_suppress_tokens=None) | WHISPER,
    ),
}
DECODERS = ["gpt2", "llama", "mistral", "qwen2_moe", "gemma2", "gpt_oss", "llama4"]
ENCODERS = ["bert", "roberta", "layoutlm"]
SEQ2SEQ = ["bart", "marian", "t5", "whisper"]


def build(name, **options):
    class_name, config = MODELS[name]
    model_class = getattr(transformers, class_name)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**config | options)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:  # fresh weights are so small that attention would look at every key alike
            torch.nn.init.normal_(parameter, std=0.25)
    return model
