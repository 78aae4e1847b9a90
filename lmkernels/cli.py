"""The command line: lmkernels doctor | pretrain | finetune | evaluate | generate | serve | bench."""

import argparse
import importlib.util
import inspect
import json
import subprocess
import sys
import time
import types
import typing
from dataclasses import fields

BERT = {"objective": "mlm", "block_size": 512, "vocab_size": 30522}
PRESETS = {
    "tiny": {"n_layer": 4, "n_head": 4, "n_embd": 256, "block_size": 256, "vocab_size": 4096},
    "small": {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "vocab_size": 8192},
    "medium": {"n_layer": 8, "n_head": 8, "n_embd": 512, "block_size": 512, "vocab_size": 16384},
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "vocab_size": 50257},
    "gpt2-medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024, "block_size": 1024, "vocab_size": 50257},
    "gpt2-large": {"n_layer": 36, "n_head": 20, "n_embd": 1280, "block_size": 1024, "vocab_size": 50257},
    "gpt2-xl": {"n_layer": 48, "n_head": 25, "n_embd": 1600, "block_size": 1024, "vocab_size": 50257},
    "bert-base": BERT | {"n_layer": 12, "n_head": 12, "n_embd": 768},
    "bert-large": BERT | {"n_layer": 24, "n_head": 16, "n_embd": 1024},
}
BAD_INPUT = (ValueError, TypeError, NotImplementedError, FileNotFoundError, NotADirectoryError)


def main(argv: list[str] | None = None) -> int:
    """Runs one command. Returns 0, 1 (it failed), 2 (bad input) or 130 (Ctrl-C)."""
    arguments = parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except BAD_INPUT as error:
        return fail(error, 2)
    except (OSError, FloatingPointError, ImportError) as error:
        return fail(error, 1)
    except KeyboardInterrupt:
        return fail("interrupted", 130)


def fail(error: Exception | str, code: int) -> int:
    """Prints one line and returns the exit code."""
    print(f"lmkernels: {' '.join(str(error).split())}", file=sys.stderr)
    return code


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="lmkernels", description="Fast GPT- and BERT-class models in plain PyTorch.")
    commands = top.add_subparsers(required=True, metavar="command")
    add_doctor(commands)
    add_pretrain(commands)
    add_finetune(commands)
    add_evaluate(commands)
    add_generate(commands)
    add_serve(commands)
    add_bench(commands)
    return top


def add_command(commands, name: str, run, text: str, **options) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", **options)
    command.set_defaults(run=run)
    return command


def add_doctor(commands) -> None:
    command = add_command(commands, "doctor", doctor, "show what this machine offers and what could be better")
    command.add_argument("--json", action="store_true", help="print one JSON object")


def doctor(arguments) -> int:
    from ._doctor import diagnosis, text

    report = diagnosis()
    print(json.dumps(report) if arguments.json else text(report))
    return 0


def add_pretrain(commands) -> None:
    from .training import Settings

    command = add_command(
        commands,
        "pretrain",
        pretrain,
        "train a GPT, or a BERT (--objective mlm), on text: tokenizer, tokens, model, checkpoints, log and loss plot",
        epilog="Ctrl-C finishes the step and saves a checkpoint; --resume goes on exactly where a run stopped.",
        argument_default=argparse.SUPPRESS,
    )
    command.add_argument("--out", required=True, metavar="DIR", help="folder for all that the run leaves")
    command.add_argument("--resume", action="store_true", default=False, help="go on from the last checkpoint in --out")
    command.add_argument("--json", action="store_true", default=False, help="print one JSON object at the end, no text")
    command.add_argument(
        "--preset", choices=PRESETS, default=None, help="sizes; an option given by itself overrides it"
    )
    add_settings(command, Settings)


def add_settings(command, settings) -> None:
    """An option for every field of the dataclass `settings`."""
    limits = command.add_mutually_exclusive_group()
    for field in fields(settings):
        kind, default = value_type(field.type), field.default
        many = {"nargs": "+", "metavar": "PATH"} if field.name == "corpus" else {"metavar": kind.__name__.upper()}
        shown = "" if field.name == "corpus" or default in (None, "") else f" (default {default})"
        target = limits if field.name in ("steps", "minutes", "epochs") else command
        if kind is bool:
            many = {"action": argparse.BooleanOptionalAction}
        else:
            many["type"] = kind
        target.add_argument(option_name(field.name), help=field.metadata["help"] + shown, **many)


def option_name(field: str) -> str:
    return f"--{field.replace('_', '-')}"


def value_type(annotation) -> type:
    """int of `int`, of `int | None` and of `list[int]`."""
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is list:
        return typing.get_args(annotation)[0]
    return annotation


def pretrain(arguments) -> int:
    from .training import Settings
    from .training import pretrain as train

    preset = PRESETS[arguments.preset] if arguments.preset is not None else {}
    return run_training("pretrain", train, preset | given_settings(arguments, Settings), arguments)


def given_settings(arguments, settings) -> dict:
    given = vars(arguments)
    return {field.name: given[field.name] for field in fields(settings) if field.name in given}


def run_training(command: str, train, options: dict, arguments) -> int:
    say = (lambda _: None) if arguments.json else print
    try:
        result = train(arguments.out, options, resume=arguments.resume, say=say)
    except KeyboardInterrupt:
        return fail("interrupted; --resume goes on from a checkpoint if there is one, else start anew", 130)
    if arguments.json:
        print(json.dumps(result))
    if not result["finished"]:
        step, out = result["step"], arguments.out
        return fail(f"stopped after step {step}; go on with: lmkernels {command} --out {out} --resume", 130)
    for name in ("accuracy", "masked_accuracy", "precision", "recall", "exact_match", "f1"):
        if name in result:
            say(f"{name}: {result[name]:.2f} %")
    say(f"checkpoint: {result['checkpoint']}\nlog: {result['log']}\nplot: {result['plot']}")
    return 0


def add_finetune(commands) -> None:
    from .training import FinetuneSettings

    command = add_command(
        commands,
        "finetune",
        finetune,
        "train a BERT on labelled data: checkpoints, log, loss plot and the scores on held-back data",
        epilog="Data, each perhaps a .gz: text-classification reads .tsv (text, tab, label), .csv or .jsonl (text, "
        "label); token-classification CoNLL (word and tag per line); question-answering SQuAD 1.1's JSON. "
        "Ctrl-C finishes the step and saves a checkpoint; --resume goes on exactly where a run stopped.",
        argument_default=argparse.SUPPRESS,
    )
    command.add_argument("--out", required=True, metavar="DIR", help="folder for all that the run leaves")
    command.add_argument("--resume", action="store_true", default=False, help="go on from the last checkpoint in --out")
    command.add_argument("--json", action="store_true", default=False, help="print one JSON object at the end, no text")
    add_settings(command, FinetuneSettings)


def finetune(arguments) -> int:
    from .training import FinetuneSettings
    from .training import finetune as train

    return run_training("finetune", train, given_settings(arguments, FinetuneSettings), arguments)


def add_evaluate(commands) -> None:
    command = add_command(
        commands,
        "evaluate",
        evaluate,
        "score a model on held-back data: perplexity of a GPT, masked accuracy of a pretrained BERT; accuracy, F1 or "
        "exact match of a fine-tuned one",
        argument_default=argparse.SUPPRESS,
    )
    command.add_argument("--model", required=True, metavar="DIR", help="a checkpoint, or the folder of a run")
    command.add_argument("--data", required=True, metavar="FILE", help="text, or what finetune reads for the task")
    command.add_argument("--batch-size", type=int, metavar="N", help="sequences per forward pass")
    command.add_argument("--max-length", type=int, metavar="N", help="tokens per sequence, or window of a text")
    command.add_argument("--stride", type=int, metavar="N", help="tokens a GPT window moves on, a BERT window shares")
    command.add_argument(
        "--mask-share", type=float, metavar="X", help="pretrained BERT: of a window hidden at a time (0: one token)"
    )
    command.add_argument("--dtype", help="of the weights: float32, bfloat16; default: the checkpoint's")
    command.add_argument("--quantize", choices=("int8", "int4"), help="GPT: weights in 8 or 4 bits")
    command.add_argument("--device", help="cpu, cuda or auto (default)")
    command.add_argument("--threads", type=int, default=None, help="CPU threads; default: torch's choice")
    command.add_argument("--json", action="store_true", default=False, help="print one JSON object at the end, no text")


def evaluate(arguments) -> int:
    import torch

    from . import training
    from .models import checkpoint as model_files
    from .training.finetune import find_model

    options = dict(vars(arguments))
    model, data, threads, as_json = (options.pop(name) for name in ("model", "data", "threads", "json"))
    del options["run"]
    if threads is not None:
        if threads < 1:
            raise ValueError(f"threads must be positive, got {threads}")
        torch.set_num_threads(threads)
    folder = find_model(model)
    config = model_files.read_config(folder)
    if config.get("model_type") == "gpt2":
        what, score = "GPT", training.perplexity
    elif not {"BertForMaskedLM", "BertForPreTraining"}.isdisjoint(config.get("architectures") or ()):
        what, score = "pretrained BERT", training.pseudo_perplexity
    else:
        what, score = "fine-tuned BERT", training.evaluate
    for name in options:
        if name not in inspect.signature(score).parameters:
            raise ValueError(f"{option_name(name)} must be left out where the model is a {what}")
    result = score(folder, data, progress=not as_json, **options)
    if as_json:
        print(json.dumps(result))
    else:
        for name, value in result.items():
            print(f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}")
    return 0


def add_generate(commands) -> None:
    command = add_command(commands, "generate", generate, "write text with a trained model, as it comes")
    command.add_argument("--model", required=True, metavar="DIR", help="a checkpoint, or a folder of pretrain")
    command.add_argument("--prompt", help="text to continue; default: standard input; at a terminal, line by line")
    command.add_argument("--max-new-tokens", type=int, metavar="N", help="default: 200, or what the context leaves")
    command.add_argument("--temperature", type=float, metavar="T", help="default 1.0; lower is safer")
    command.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens (default 50; 0: all)")
    command.add_argument("--top-p", type=float, metavar="P", help="draw from the tokens that make up probability P")
    command.add_argument("--min-p", type=float, metavar="P", help="draw from tokens P times as likely as the likeliest")
    command.add_argument("--repetition-penalty", type=float, metavar="X", help="above 1: repeat less (default 1.0)")
    command.add_argument("--greedy", action="store_true", help="take the most likely token each time")
    command.add_argument("--num-beams", type=int, metavar="N", help="search for the likeliest text with N beams")
    command.add_argument("--stop", action="append", metavar="TEXT", help="end after this text; may be given repeatedly")
    command.add_argument("--num-return-sequences", type=int, default=1, metavar="N", help="samples of the prompt")
    command.add_argument("--seed", type=int, help="makes the samples repeatable")
    command.add_argument("--prompt-lookup", type=int, metavar="N", help="guess N tokens ahead from the text so far")
    command.add_argument("--draft-model", metavar="DIR", help="a smaller model that guesses ahead, in the same format")
    command.add_argument("--dtype", help="of the weights: float32, bfloat16; default: the checkpoint's")
    command.add_argument("--quantize", choices=["int8", "int4"], help="hold the weights in 8 or 4 bits")
    command.add_argument("--threads", type=int, help="CPU threads; default: torch's choice")
    command.add_argument("--stats", action="store_true", help="report speed and memory on standard error")
    command.add_argument("--json", action="store_true", help="print one JSON object per prompt instead of text")


def generate(arguments) -> int:
    import torch

    from .models import GPT2LMHeadModel
    from .training.checkpoint import find, load_tokenizer

    draws = [name for name in ("temperature", "top_k", "top_p", "min_p") if getattr(arguments, name) is not None]
    if draws and (arguments.greedy or arguments.num_beams is not None):
        option = "--greedy" if arguments.greedy else "--num-beams"
        raise ValueError(f"{option} leaves nothing to draw from: drop it or {option_name(draws[0])}")
    if arguments.threads is not None:
        if arguments.threads < 1:
            raise ValueError(f"--threads must be at least 1, got {arguments.threads}")
        torch.set_num_threads(arguments.threads)
    folder = find(arguments.model)
    model = GPT2LMHeadModel.from_pretrained(folder, dtype=arguments.dtype, quantize=arguments.quantize)
    tokenizer = load_tokenizer(folder)
    given = {name: getattr(arguments, name) for name in (*draws, "repetition_penalty", "num_beams")}
    settings = {name: value for name, value in given.items() if value is not None} | {
        "do_sample": not arguments.greedy and arguments.num_beams is None,
        "num_return_sequences": arguments.num_return_sequences,
        "seed": arguments.seed,
        "stop_strings": arguments.stop,
        "tokenizer": tokenizer,
        "prompt_lookup_num_tokens": arguments.prompt_lookup,
        "assistant_model": arguments.draft_model
        and GPT2LMHeadModel.from_pretrained(
            find(arguments.draft_model), dtype=arguments.dtype, quantize=arguments.quantize
        ),
    }
    if arguments.prompt is None and sys.stdin.isatty():
        return converse(arguments, model, tokenizer, settings)
    prompt = sys.stdin.read().removesuffix("\n") if arguments.prompt is None else arguments.prompt
    write(arguments, model, tokenizer, settings, prompt)
    return 0


def converse(arguments, model, tokenizer, settings: dict) -> int:
    """One text for every line, until Ctrl-D. Ctrl-C ends the text that is being written."""
    importlib.import_module("readline")  # history and editing for input()
    print("One prompt per line; Ctrl-C stops a text, Ctrl-D ends.", file=sys.stderr)
    while True:
        try:
            prompt = input("> ")
        except EOFError:
            print()
            return 0
        try:
            write(arguments, model, tokenizer, settings, prompt)
        except KeyboardInterrupt:
            print()
        except ValueError as error:
            fail(error, 2)


def write(arguments, model, tokenizer, settings: dict, prompt: str) -> None:
    """Prints one prompt's text, as it comes where one text is written token by token."""
    import resource

    import torch

    from .generation import TextStreamer

    ids = tokenizer.encode(prompt).ids or [model.config.bos_token_id]
    single = arguments.num_return_sequences == 1 and arguments.num_beams is None and not arguments.json
    clock = Clock(TextStreamer(tokenizer, skip_prompt=False) if single else None)
    max_new_tokens = arguments.max_new_tokens
    if max_new_tokens is None:
        max_new_tokens = max(1, min(200, model.config.n_positions - len(ids)))
    streamer = None if arguments.num_beams is not None else clock
    start = time.perf_counter()
    tokens = model.generate([ids], max_new_tokens=max_new_tokens, streamer=streamer, **settings)
    seconds = time.perf_counter() - start
    new = tokens[:, len(ids) :]
    completions = [tokenizer.decode(row.tolist()) for row in new]
    ended = torch.isin(new, torch.tensor(model.config.eos_token_id or [])).long()
    # what follows a row's first end token is padding
    count = int((ended.cumsum(1) - ended == 0).sum())
    stats = {
        "prompt_tokens": len(ids),
        "tokens": count,
        "seconds": round(seconds, 3),
        "tokens_per_second": round(count / seconds, 1),
        **clock.rates(len(ids), count),
        **(floor_share(model, clock, len(ids) + len(new[0]) // 2, len(new)) if arguments.stats else {}),
        "weight_bytes": model.get_memory_footprint(),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024),
    }
    if arguments.json:
        print(json.dumps({"prompt": prompt, "completions": completions} | stats))
    elif not single:
        print("\n---\n".join(prompt + completion for completion in completions))
    if arguments.stats:
        print(stats_text(stats), file=sys.stderr)


class Clock:
    """A streamer that notes when tokens come and how many, and passes them on."""

    def __init__(self, streamer=None):
        self.streamer, self.times, self.counts = streamer, [], []

    def put(self, tokens) -> None:
        if self.streamer is not None:
            self.streamer.put(tokens)
        self.times.append(time.perf_counter())
        self.counts.append(tokens.numel())

    def end(self) -> None:
        if self.streamer is not None:
            self.streamer.end()

    def rates(self, prompt_tokens: int, tokens: int) -> dict:
        """Tokens per second of the step that reads the prompt, and of those after it, if there were any."""
        if len(self.times) < 3:
            return {}
        first, rest = self.times[1] - self.times[0], self.times[-1] - self.times[1]
        return {
            "prompt_tokens_per_second": round(prompt_tokens / first, 1),
            "decode_tokens_per_second": round((tokens - self.counts[1]) / rest, 1),
        }


def floor_share(model, clock: Clock, context: int, rows: int) -> dict:
    """The steps that were made after the prompt, of those that memory would feed: one reads every weight, and the keys
    and values of `rows` texts of `context` tokens. Empty where there were too few, or where it is not the CPU's memory.
    """
    import torch

    weights = model.step_model() if model.device.type == "cpu" and len(clock.times) > 2 else None
    if weights is None:
        return {}
    x, seconds = torch.ones(2**26), []
    for _ in range(6):
        start = time.perf_counter()
        x.sum()
        seconds.append(time.perf_counter() - start)
    kv = 2 * len(weights.layers) * weights.heads_kv * weights.head_dim * weights.norm.element_size()
    step = (clock.times[-1] - clock.times[1]) / (len(clock.times) - 2)
    rate, size = x.nbytes / min(seconds), weights.nbytes + kv * context * rows
    return {
        "read_bytes_per_second": round(rate),
        "step_bytes": size,
        "percent_of_floor": round(100 * size / rate / step, 1),
    }


def stats_text(stats: dict) -> str:
    apart = ""
    if "decode_tokens_per_second" in stats:
        apart = (
            f" (prompt of {stats['prompt_tokens']}: {stats['prompt_tokens_per_second']} tokens/s; "
            f"then {stats['decode_tokens_per_second']} tokens/s"
        )
        if "percent_of_floor" in stats:
            apart += (
                f", {stats['percent_of_floor']:.0f} % of what reading {stats['step_bytes'] / 1e6:,.0f} MB a step at "
                f"{stats['read_bytes_per_second'] / 1e9:.1f} GB/s allows"
            )
        apart += ")"
    return (
        f"{stats['tokens']} tokens in {stats['seconds']:.2f} s, {stats['tokens_per_second']} tokens/s{apart}, "
        f"{stats['weight_bytes'] / 1e6:,.0f} MB of weights, at most {stats['peak_bytes'] / 1e6:,.0f} MB in use"
    )


def add_serve(commands) -> None:
    command = add_command(
        commands,
        "serve",
        serve,
        "serve a model over HTTP, as OpenAI's /v1/completions",
        epilog="Requests are answered together, each as if it were alone. Ctrl-C lets them finish for a few seconds.",
    )
    command.add_argument("--model", required=True, metavar="DIR", help="a checkpoint, or a folder of pretrain")
    command.add_argument("--name", help="of the model, for clients; default: the name of the folder")
    command.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine)")
    command.add_argument("--port", type=int, default=8000, metavar="N", help="default 8000; 0: one that is free")
    command.add_argument("--max-rows", type=int, default=16, metavar="N", help="texts written at once (default 16)")
    command.add_argument("--queue", type=int, default=256, metavar="N", help="texts that may wait (default 256)")
    command.add_argument("--max-tokens", type=int, metavar="N", help="per text; default: what the context leaves")
    command.add_argument("--memory", type=int, metavar="MB", help="for keys and values; default: max-rows contexts")
    command.add_argument("--max-body", type=int, default=2**20, metavar="N", help="bytes of a request (default 1 MiB)")
    command.add_argument("--grace", type=float, default=5.0, metavar="S", help="seconds to finish in (default 5)")
    command.add_argument("--dtype", help="of the weights: float32, bfloat16; default: the checkpoint's")
    command.add_argument("--quantize", choices=["int8", "int4"], help="hold the weights in 8 or 4 bits")
    command.add_argument("--threads", type=int, help="CPU threads; default: torch's choice")


def serve(arguments) -> int:
    import torch

    from . import serve as server
    from .generation import Engine
    from .models import GPT2LMHeadModel
    from .training.checkpoint import find, load_tokenizer

    for name in ("threads", "max_tokens", "memory", "max_body"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ValueError(f"{option_name(name)} must be at least 1, got {value}")
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    folder = find(arguments.model)
    model = GPT2LMHeadModel.from_pretrained(folder, dtype=arguments.dtype, quantize=arguments.quantize)
    memory = None if arguments.memory is None else arguments.memory * 10**6
    engine = Engine(model, max_rows=arguments.max_rows, max_queue=arguments.queue, memory=memory)
    server.serve(
        engine,
        load_tokenizer(folder),
        name=arguments.name or folder.resolve().name,
        host=arguments.host,
        port=arguments.port,
        grace=arguments.grace,
        max_tokens=arguments.max_tokens,
        max_body=arguments.max_body,
        say=lambda text: print(text, flush=True),
    )
    return 0


def add_bench(commands) -> None:
    command = add_command(commands, "bench", bench, "run python -m benchmarks of a checkout", add_help=False)
    command.add_argument("arguments", nargs=argparse.REMAINDER)


def bench(arguments) -> int:
    if importlib.util.find_spec("benchmarks") is None:
        raise FileNotFoundError("the benchmarks are not installed: run this in a checkout of lmkernels")
    return subprocess.run([sys.executable, "-m", "benchmarks", *arguments.arguments]).returncode
