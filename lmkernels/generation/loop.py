"""Writing tokens with a causal language model, with Hugging Face's arguments and defaults."""

from collections.abc import Callable, Sequence

import torch

from .beams import beam_search
from .config import Settings, settings_for, warn_of_lengths
from .decoder import Decoder
from .outputs import GenerateOutput
from .plan import Plan
from .prompts import as_batch, as_ends, check_tokens, total_length
from .search import search
from .speculative import Draft, PromptLookup, speculate
from .stopping import EndToken, MaxTime, StopStrings


@torch.no_grad()
def generate(
    model,
    inputs: torch.Tensor | Sequence[Sequence[int] | torch.Tensor] | None = None,
    generation_config=None,
    *,
    input_ids: torch.Tensor | Sequence[Sequence[int] | torch.Tensor] | None = None,
    attention_mask: torch.Tensor | None = None,
    logits_processor: Sequence[Callable] | None = None,
    stopping_criteria: Sequence[Callable] | None = None,
    prefix_allowed_tokens_fn: Callable[[int, torch.Tensor], list[int]] | None = None,
    assistant_model=None,
    streamer=None,
    tokenizer=None,
    seed: int | None = None,
    **settings,
) -> torch.Tensor | GenerateOutput:
    """Continues every prompt until its end token or the maximal length.

    Greedy search, sampling, beam search and beam sampling give Hugging Face's tokens on the same float32 weights, with
    torch.manual_seed also the sampled ones. A setting that is not given comes from generation_config, else from
    model.generation_config, else it has the default below, which is Hugging Face's; None switches a filter off.

    inputs: (b, s)          prompts, shorter ones padded on the left with attention_mask 0; or a list of b prompts of
                            any lengths, which are padded here; or None: the bos token. `input_ids` is the same.
    attention_mask: (b, s)  0 = padding; default: pad_token_id marks the padding when it is no end token
    generation_config       an object with the settings as attributes, or a dict
    logits_processor        functions of (ids (rows, length), scores (rows, vocab)) that return new scores
    stopping_criteria       functions of (ids, scores) that return a bool, or one per row
    prefix_allowed_tokens_fn  function of (prompt number, ids (length,)) that returns the tokens that may follow
    assistant_model         a smaller model of the same vocabulary that guesses ahead: speculative decoding, b = 1
    streamer                its put(tokens) gets the prompts, then each step's tokens; then end() is called
    tokenizer               for stop_strings: Hugging Face's, or one of the package tokenizers
    seed                    makes the draw repeatable by itself; without it torch.manual_seed rules

    Settings and defaults:
    max_length                        tokens with the prompt; default: the prompt and 20 more
    max_new_tokens                    tokens without the prompt; wins over max_length
    min_length 0, min_new_tokens      no end token before
    max_time                          seconds after which no further token is begun
    stop_strings                      a text or several that end a row when they have been written
    eos_token_id                      one or several; an empty list or None: never end early
    pad_token_id                      follows the end in rows that are done; default: the end token
    do_sample False                   draw from the distribution; otherwise the likeliest token is taken
    temperature 1.0, top_k 50, top_p 1.0, min_p, typical_p 1.0, epsilon_cutoff 0.0, eta_cutoff 0.0
                                      narrow the distribution, in this order
    repetition_penalty 1.0            divides the scores of tokens that have occurred
    presence_penalty 0.0, frequency_penalty 0.0
                                      OpenAI's: subtracted from the scores of tokens that have been generated, once, and
                                      once for each time
    no_repeat_ngram_size 0, bad_words_ids, sequence_bias, suppress_tokens, begin_suppress_tokens, forced_bos_token_id,
    forced_eos_token_id, exponential_decay_length_penalty, remove_invalid_values, renormalize_logits
                                      as Hugging Face's
    num_return_sequences 1            samples, or beams, per prompt, side by side in the result
    num_beams 1, length_penalty 1.0, early_stopping False
                                      beam search; early_stopping may be "never"
    prompt_lookup_num_tokens, max_matching_ngram_size 2
                                      guess ahead from the text so far: speculative decoding, b = 1
    num_assistant_tokens 20, num_assistant_tokens_schedule "constant", assistant_confidence_threshold 0.4
                                      how far assistant_model guesses
    use_cache True                    keep keys and values
    return_dict_in_generate False, output_scores False, output_logits False
                                      return a GenerateOutput with these

    Returns (b * num_return_sequences, length), prompts included.
    Raises ValueError or TypeError for bad arguments, NotImplementedError for settings of Hugging Face's that are absent
    here, and FloatingPointError when the model's logits hold NaN.
    """
    s = settings_for(model, generation_config, settings)
    plan = plan_for(
        model,
        s,
        only_one(inputs, input_ids),
        attention_mask,
        as_list(logits_processor, "logits_processor"),
        as_list(stopping_criteria, "stopping_criteria"),
        prefix_allowed_tokens_fn,
        streamer,
        tokenizer,
        seed,
    )
    check_assistant(model, plan, assistant_model)
    plan.put(plan.ids.repeat_interleave(max(s.num_beams, s.num_return_sequences), 0))
    decoder = Decoder(model, plan.mask, plan.total, s.use_cache)
    if s.prompt_lookup_num_tokens is not None:
        return speculate(plan, decoder, PromptLookup(s))
    if assistant_model is not None:
        return speculate(plan, decoder, Draft(plan, assistant_model))
    return beam_search(plan, decoder) if s.num_beams > 1 else search(plan, decoder)


def plan_for(model, s: Settings, inputs, attention_mask, custom, criteria, allowed, streamer, tokenizer, seed) -> Plan:
    """Checks what the settings alone could not tell, and puts everything into its final form."""
    config, ends = model.config, as_ends(s.eos_token_id)
    ids, mask = as_batch(inputs, attention_mask, s.pad_token_id, s.bos_token_id, ends, model.device)
    check_tokens(ids, mask, config.vocab_size)
    longest = int(mask.sum(-1).max())
    # Hugging Face's MaxLengthCriteria and EosTokenCriteria stand in for the settings
    limits = [c.max_length for c in criteria if hasattr(c, "max_length")]
    lengths = (limits[-1], None) if limits else (s.max_length, s.max_new_tokens)
    total = total_length(ids.shape[1], longest, *lengths, config.n_positions)
    warn_of_lengths(s, ids.shape[1], total)
    if streamer is not None and s.num_beams > 1:
        raise ValueError("`streamer` cannot be used with beam search (yet!). Make sure that `num_beams` is set to 1.")
    stops: list[Callable] = []
    if s.max_time is not None:
        stops.append(MaxTime(s.max_time))
    if s.stop_strings is not None:
        if tokenizer is None:
            raise ValueError(
                "There are one or more stop strings, either in the arguments to `generate` or in the model's "
                "generation config, but we could not locate a tokenizer. When generating with stop strings, you must "
                "pass the model's tokenizer to the `tokenizer` argument of `generate`."
            )
        stops.append(StopStrings(s.stop_strings, tokenizer))
    if ends and not any(hasattr(c, "eos_token_id") for c in criteria):
        stops.append(EndToken(ends, ids.device))
    shown = s.return_dict_in_generate and (s.output_scores or s.output_logits)
    return Plan(
        settings=s,
        ids=ids,
        mask=mask,
        total=total,
        vocab=config.vocab_size,
        ends=ends,
        pad=s.pad_token_id if s.pad_token_id is not None else ends[0] if ends else 0,
        criteria=stops + criteria,
        custom=custom,
        allowed=allowed,
        generator=None if seed is None else torch.Generator(ids.device).manual_seed(seed),
        streamer=streamer,
        private=not (custom or criteria or allowed or shown),
    )


def only_one(inputs, input_ids):
    if inputs is not None and input_ids is not None:
        raise ValueError("inputs and input_ids are the same argument: give one of them")
    return input_ids if inputs is None else inputs


def as_list(functions, name: str) -> list[Callable]:
    """Hugging Face's lists are lists; a single function will do."""
    functions = [] if functions is None else list(functions) if isinstance(functions, list | tuple) else [functions]
    if not all(callable(function) for function in functions):
        raise TypeError(f"{name} must be a list of functions, got {functions!r:.80}")
    return functions


def check_assistant(model, plan: Plan, assistant_model) -> None:
    s = plan.settings
    if assistant_model is None and s.prompt_lookup_num_tokens is None:
        return
    if assistant_model is not None:
        if s.prompt_lookup_num_tokens is not None:
            raise ValueError("assistant_model and prompt_lookup_num_tokens both guess ahead: give one of them")
        if not isinstance(assistant_model, type(model)):
            raise TypeError(f"assistant_model must be a {type(model).__name__}, got {type(assistant_model).__name__}")
        if assistant_model.config.vocab_size != model.config.vocab_size:
            raise ValueError(
                f"assistant_model must have the model's vocabulary of {model.config.vocab_size} tokens, "
                f"got {assistant_model.config.vocab_size}"
            )
        if plan.total - 1 > assistant_model.config.n_positions:
            raise ValueError(
                f"assistant_model must reach the {plan.total} tokens of prompt and text, got n_positions = "
                f"{assistant_model.config.n_positions}"
            )
    if s.num_beams > 1:
        raise ValueError(f"num_beams must be 1 when doing assisted generate, got {s.num_beams}")
    if s.num_return_sequences > 1:
        raise ValueError(
            f"num_return_sequences has to be 1 when doing assisted generate, but is {s.num_return_sequences}."
        )
    if plan.ids.shape[0] > 1:
        raise ValueError("assisted generate is only supported for batch_size = 1")
    if not s.use_cache:
        raise ValueError("use_cache must be True: assisted decoding requires a cache")
