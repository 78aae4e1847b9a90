"""The settings of `generate`: Hugging Face's names and defaults, and what they may be."""

import math
import numbers
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch

from .prompts import as_ends


@dataclass
class Settings:
    """What a call of `generate` may set, with the defaults of Hugging Face's GenerationConfig.

    presence_penalty and frequency_penalty are OpenAI's, of the tokens that have been generated.
    """

    # length
    max_length: int | None = None
    max_new_tokens: int | None = None
    min_length: int = 0
    min_new_tokens: int | None = None
    max_time: float | None = None
    stop_strings: str | Sequence[str] | None = None
    # strategy
    do_sample: bool = False
    num_beams: int = 1
    num_return_sequences: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    use_cache: bool = True
    # distribution
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    min_p: float | None = None
    typical_p: float = 1.0
    epsilon_cutoff: float = 0.0
    eta_cutoff: float = 0.0
    renormalize_logits: bool = False
    # scores
    sequence_bias: dict[tuple[int, ...], float] | Sequence | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram_size: int = 0
    bad_words_ids: Sequence[Sequence[int]] | None = None
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | Sequence[int] | None = None
    remove_invalid_values: bool = False
    exponential_decay_length_penalty: tuple[int, float] | None = None
    suppress_tokens: Sequence[int] | None = None
    begin_suppress_tokens: Sequence[int] | None = None
    # speculation
    prompt_lookup_num_tokens: int | None = None
    max_matching_ngram_size: int = 2
    num_assistant_tokens: int = 20
    num_assistant_tokens_schedule: str = "constant"
    assistant_confidence_threshold: float = 0.4
    # special tokens
    eos_token_id: int | Sequence[int] | torch.Tensor | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    # results
    return_dict_in_generate: bool = False
    output_scores: bool = False
    output_logits: bool = False


DEFAULTS = {field.name: field.default for field in fields(Settings)}
# None switches the filter off
OFF = {"top_k": 0}
# entries of Hugging Face's GenerationConfig that ask for nothing here
IGNORED = {
    *("transformers_version", "compile_config", "disable_compile", "max_cache_len", "decoder_start_token_id"),
    *("is_assistant", "assistant_lookbehind", "target_lookbehind", "synced_gpus"),
}
# features of Hugging Face's that are absent here, with the value that leaves them out
ABSENT = {
    **dict.fromkeys(("guidance_scale", "encoder_repetition_penalty", "num_beam_groups"), 1),
    **dict.fromkeys(("encoder_no_repeat_ngram_size", "diversity_penalty"), 0),
    **dict.fromkeys(("use_mtp", "token_healing", "low_memory", "output_attentions", "output_hidden_states"), False),
    **dict.fromkeys(("top_h", "watermarking_config", "penalty_alpha", "dola_layers", "cache_config"), None),
    **dict.fromkeys(("constraints", "force_words_ids", "negative_prompt_ids", "negative_prompt_attention_mask"), None),
    **dict.fromkeys(("assistant_early_exit", "assistant_ensemble_weight", "assistant_tokenizer"), None),
    **dict.fromkeys(("speculation_type", "custom_generate", "inputs_embeds", "past_key_values"), None),
    **dict.fromkeys(("prefill_chunk_size", "continuous_batching_config"), None),
    "cache_implementation": "dynamic",
}


def settings_for(model, generation_config, given: dict) -> Settings:
    """The settings of a call: its own arguments, else generation_config's, else the model's, else the defaults."""
    if isinstance(generation_config, Mapping):
        given, generation_config = {**generation_config, **given}, None
    unknown = [name for name, value in given.items() if value is not None and not known(name)]
    if unknown:
        raise ValueError(
            f"The following `model_kwargs` are not used by the model: {unknown} (note: typos in the"
            " generate arguments will also show up in this list)"
        )
    entries = models_own(model) | (entries_of(generation_config) if generation_config is not None else {}) | given
    for name, neutral in ABSENT.items():
        value = entries.get(name)
        if value is not None and (isinstance(value, torch.Tensor) or value != neutral):
            raise NotImplementedError(f"{name} must be {neutral}: generate does not support it, got {value!r:.60}")
    settings = Settings()
    for name, default in DEFAULTS.items():
        if name in entries:
            value = entries[name]
            setattr(settings, name, OFF.get(name, default) if value is None else value)
    check(settings)
    warn(settings, given)
    if isinstance(settings.sequence_bias, list):
        settings.sequence_bias = {tuple(tokens): bias for tokens, bias in settings.sequence_bias}
    if settings.forced_eos_token_id is not None:
        settings.forced_eos_token_id = as_ends(settings.forced_eos_token_id)
    return settings


def known(name: str) -> bool:
    return name in DEFAULTS or name in ABSENT or name in IGNORED


def entries_of(config) -> dict:
    """What a GenerationConfig, or whatever has such attributes, sets."""
    entries = (
        config if isinstance(config, Mapping) else config.to_dict() if hasattr(config, "to_dict") else vars(config)
    )
    return {name: value for name, value in entries.items() if value is not None}


def models_own(model) -> dict:
    """model.generation_config, or where the checkpoint has none, the special tokens of its config."""
    if own := getattr(model, "generation_config", None):
        return entries_of(own)
    names = ("eos_token_id", "pad_token_id", "bos_token_id")
    return {name: getattr(model.config, name) for name in names if getattr(model.config, name, None) is not None}


def check(s: Settings) -> None:
    """Raises for values without a meaning and for settings that contradict each other."""

    def must(holds: bool, name: str, what: str) -> None:
        if not holds:
            raise ValueError(f"{name} must be {what}, got {getattr(s, name)!r:.60}")

    for name in ("max_length", "max_new_tokens", "prompt_lookup_num_tokens"):
        must(getattr(s, name) is None or is_int(getattr(s, name), 1), name, "a positive whole number")
    for name in ("num_beams", "num_return_sequences", "num_assistant_tokens", "max_matching_ngram_size"):
        must(is_int(getattr(s, name), 1), name, "a positive whole number")
    for name in ("min_length", "no_repeat_ngram_size"):
        must(is_int(getattr(s, name), 0), name, "a whole number, 0 for no limit")
    must(is_int(s.top_k, 0), "top_k", "a whole number, 0 or None for no limit")
    must(s.min_new_tokens is None or is_int(s.min_new_tokens, 0), "min_new_tokens", "a whole number")
    greedy = " (do_sample=False is greedy decoding)" if s.temperature == 0 else ""
    if not is_real(s.temperature, above=0):
        raise ValueError(f"temperature must be a positive number, got {s.temperature!r}{greedy}")
    must(is_real(s.repetition_penalty, above=0), "repetition_penalty", "a positive number, 1 for no penalty")
    for name in ("presence_penalty", "frequency_penalty", "length_penalty"):
        must(is_real(getattr(s, name)), name, "a number")
    must(s.max_time is None or is_real(s.max_time, above=0), "max_time", "a positive number of seconds")
    for name in ("top_p", "typical_p"):
        value = getattr(s, name)
        if not is_real(value, above=0) or value > 1:
            raise ValueError(f"{name} must lie in (0, 1], got {value!r}")
    for name in ("min_p", "epsilon_cutoff", "eta_cutoff", "assistant_confidence_threshold"):
        value = getattr(s, name)
        if value is not None and not (is_real(value) and 0 <= value <= 1):
            raise ValueError(f"{name} must lie in [0, 1], got {value!r}")
    must(s.num_assistant_tokens_schedule in SCHEDULES, "num_assistant_tokens_schedule", f"one of {SCHEDULES}")
    for name in ("suppress_tokens", "begin_suppress_tokens"):
        value = getattr(s, name)
        must(value is None or all(is_int(token) for token in value), name, "a list of token ids")
    check_words(s.bad_words_ids)
    check_biases(s.sequence_bias)
    if s.early_stopping not in (True, False, "never"):
        raise ValueError(f"`early_stopping` must be a boolean or 'never', but is {s.early_stopping}.")
    if s.num_return_sequences > 1 and s.num_beams == 1 and not s.do_sample:
        raise ValueError(
            "Greedy methods (do_sample != True) without beam search do not support "
            f"`num_return_sequences` different than 1 (got {s.num_return_sequences})."
        )
    if s.num_return_sequences > s.num_beams > 1:
        raise ValueError(
            f"`num_return_sequences` ({s.num_return_sequences}) has to be smaller or equal to `num_beams` "
            f"({s.num_beams})."
        )


SCHEDULES = ("constant", "heuristic", "heuristic_transient")


def is_int(value, least: int | None = None) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and (least is None or value >= least)


def is_real(value, above: float = -math.inf) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and above < value < math.inf


def check_words(words) -> None:
    if words is None:
        return
    if not isinstance(words, list) or len(words) == 0:
        raise ValueError(f"`bad_words_ids` has to be a non-empty list, but is {words}.")
    if any(not isinstance(word, list) or not word for word in words):
        raise ValueError(f"`bad_words_ids` has to be a list of lists, but is {words}.")
    if any(not is_int(token, 0) for word in words for token in word):
        raise ValueError(f"Each list in `bad_words_ids` has to be a list of positive integers, but is {words}.")


def check_biases(biases) -> None:
    if biases is None:
        return
    if not isinstance(biases, dict | list) or len(biases) == 0:
        raise ValueError(
            f"`sequence_bias` has to be a non-empty dictionary, or non-empty list of lists but is {biases}."
        )
    for tokens, bias in biases.items() if isinstance(biases, dict) else biases:
        if not isinstance(tokens, tuple | list) or not tokens or not all(is_int(token, 0) for token in tokens):
            raise ValueError(
                f"Each key in `sequence_bias` has to be a non-empty tuple of positive integers, got {tokens!r}"
            )
        if not isinstance(bias, numbers.Real):
            raise ValueError(f"`sequence_bias` has to be a dict with floats as values, but is {biases}.")


def warn(s: Settings, given: dict) -> None:
    """Warns, as Hugging Face logs it, of arguments that the others make idle."""
    idle = []
    if not s.do_sample:
        idle += ["temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"]
    if s.num_beams == 1:
        idle += ["early_stopping", "length_penalty"]
    if not s.return_dict_in_generate:
        idle += ["output_scores", "output_logits"]
    idle = [name for name in idle if given.get(name) is not None and given[name] != DEFAULTS[name]]
    if idle:
        warnings.warn(f"The following generation flags are not valid and may be ignored: {idle}.", stacklevel=5)
    for kind in ("max", "min"):
        new, length = given.get(f"{kind}_new_tokens"), given.get(f"{kind}_length")
        if new is not None and length is not None:
            warnings.warn(
                f"Both `{kind}_new_tokens` (={new}) and `{kind}_length`(={length}) seem to have been set. "
                f"`{kind}_new_tokens` will take precedence.",
                stacklevel=5,
            )


def warn_of_lengths(s: Settings, prompt: int, total: int) -> None:
    """Warns, in Hugging Face's words, where a text must end before it may."""
    least, what = s.min_length, f"`min_length` ({s.min_length})"
    if s.min_new_tokens is not None:
        least = prompt + s.min_new_tokens
        what = f"`min_new_tokens` ({s.min_new_tokens}), when added to the prompt length ({prompt}),"
    if least > total:
        warnings.warn(
            f"Unfeasible length constraints: {what} is larger than the maximum possible length ({total}). Generation "
            "will stop at the defined maximum length. You should decrease the minimum length and/or increase the "
            "maximum length.",
            stacklevel=5,
        )
