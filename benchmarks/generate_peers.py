"""What `python -m benchmarks generate --peers` compares with: other programs that decode a GPT-2 on a CPU.

A peer is a function of prompts (a list of token lists) and a number of new tokens that writes so many after each
prompt, greedily, and returns them and the times: of the start, and of when each step's tokens were there. All get the
weights of one float32 model, which they round in their own ways.

Peers whose packages are not installed are left out and named: transformers; ctranslate2; llama-cpp-python with gguf,
built with -DGGML_NATIVE=ON for this machine (LLAMA_CPP_LIB_PATH names another build's folder); onnx with onnxruntime.
"""

from __future__ import annotations

import importlib.util
import logging
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from benchmarks import harness
from lmkernels.models import GPT2LMHeadModel

Peer = Callable[[list[list[int]], int], tuple[list[list[int]], list[float]]]


class Clock:
    """A streamer that notes when tokens come. The prompt, which comes first, is the start."""

    def __init__(self):
        self.times = []

    def put(self, tokens) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None: ...


def missing(*packages: str) -> bool:
    return any(importlib.util.find_spec(package) is None for package in packages)


def peers_of(name: str, model: GPT2LMHeadModel) -> tuple[dict[str, Peer], list[str]]:
    """The peers that compute in format `name`, with the weights of the float32 `model`; and who is not installed."""
    peers, absent = {}, []
    for peer, (make, formats, packages) in PEERS.items():
        if name in formats:
            if missing(*packages):
                absent.append(f"{peer} ({', '.join(packages)})")
            else:
                peers[peer] = make(model, formats[name])
    return peers, absent


def hugging_face(model: GPT2LMHeadModel, dtype: str) -> Peer:
    import transformers

    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**model.config.to_dict()))
    theirs.load_state_dict(model.state_dict(), strict=False)
    theirs = theirs.to(harness.DTYPES[dtype]).eval()

    def write(prompts: list[list[int]], new: int) -> tuple[list[list[int]], list[float]]:
        width, clock = max(map(len, prompts)), Clock()
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
        if len(prompts) > 1:  # its streamers are for one prompt
            clock.put(None)
            options["stopping_criteria"] = [lambda ids, scores: clock.put(None) or torch.zeros(len(ids), dtype=bool)]
        else:
            options["streamer"] = clock
        written = theirs.generate(ids, attention_mask=mask, **options)
        return written[:, width:].tolist(), clock.times

    return write


def ctranslate2_model(model: GPT2LMHeadModel, compute_type: str) -> Peer:
    import ctranslate2
    import transformers
    from ctranslate2.converters import transformers as converters

    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**model.config.to_dict()))
    theirs.load_state_dict(model.state_dict(), strict=False)
    spec = converters.GPT2Loader().get_model_spec(theirs)
    spec.register_vocabulary([str(i) for i in range(theirs.config.vocab_size)])
    spec.config.unk_token = spec.config.bos_token = spec.config.eos_token = "0"
    with tempfile.TemporaryDirectory() as folder:
        spec.validate()
        spec.optimize(quantization=None)
        spec.save(folder)
        generator = ctranslate2.Generator(
            folder, device="cpu", compute_type=compute_type, intra_threads=torch.get_num_threads(), inter_threads=1
        )

    def write(prompts: list[list[int]], new: int) -> tuple[list[list[int]], list[float]]:
        steps: dict[int, float] = {}

        def note(result) -> bool:
            steps[result.step] = time.perf_counter()  # of the last row
            return False

        texts = [[str(i) for i in prompt] for prompt in prompts]
        start = time.perf_counter()
        options = {"max_length": new, "min_length": new, "sampling_topk": 1, "include_prompt_in_result": False}
        results = generator.generate_batch(texts, callback=note, **options)
        return [r.sequences_ids[0] for r in results], [start, *(steps[step] for step in sorted(steps))]

    return write


def llama_cpp(model: GPT2LMHeadModel, kind: str) -> Peer:
    import llama_cpp as lib

    logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)
    lib.llama_backend_init()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.gguf")
        write_gguf(model, kind, path)
        options = lib.llama_model_default_params()
        options.use_mmap = False
        theirs = lib.llama_model_load_from_file(str(path).encode(), options)
    if not theirs:
        raise RuntimeError(f"llama.cpp did not load GPT-2 in {kind}")
    most, positions, vocab = 32, model.config.n_positions, model.config.vocab_size

    def context(rows: int):
        options = lib.llama_context_default_params()
        options.n_ctx, options.n_seq_max = rows * 512 if rows > 1 else positions, rows
        options.n_batch, options.n_ubatch = 2048, 512
        options.n_threads = options.n_threads_batch = torch.get_num_threads()
        options.kv_unified = False
        return lib.llama_init_from_model(theirs, options)

    contexts: dict[int, object] = {}
    batch = lib.llama_batch_init(2048, 0, 1)

    def decode(ctx, tokens: list[tuple[int, int, int, bool]]) -> None:
        """Tokens, each with its position, its row and whether its logits are wanted."""
        batch.n_tokens = len(tokens)
        for i, (token, position, row, wanted) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, row
        if lib.llama_decode(ctx, batch):
            raise RuntimeError("llama.cpp could not decode")

    def best(ctx, place: int) -> int:
        return int(np.ctypeslib.as_array(lib.llama_get_logits_ith(ctx, place), (vocab,)).argmax())

    def write(prompts: list[list[int]], new: int) -> tuple[list[list[int]], list[float]]:
        rows = len(prompts)
        if rows > most:
            raise ValueError(f"at most {most} rows, got {rows}")
        ctx = contexts.get(rows) or contexts.setdefault(rows, context(rows))
        lib.llama_memory_clear(lib.llama_get_memory(ctx), False)
        times, chosen = [time.perf_counter()], [0] * rows
        # prompts one after the other, as many at once as a batch holds
        flat = [(t, i, row, i == len(p) - 1) for row, p in enumerate(prompts) for i, t in enumerate(p)]
        for first in range(0, len(flat), 2048):
            part = flat[first : first + 2048]
            decode(ctx, part)
            for place, (_, _, row, wanted) in enumerate(part):
                if wanted:
                    chosen[row] = best(ctx, place)
        times.append(time.perf_counter())
        written = [chosen]
        for step in range(new - 1):
            decode(ctx, [(chosen[row], len(p) + step, row, True) for row, p in enumerate(prompts)])
            chosen = [best(ctx, row) for row in range(rows)]
            written.append(chosen)
            times.append(time.perf_counter())
        return [list(row) for row in zip(*written)], times

    # in a thread of its own: it sets the shapes of AMX's tiles once for each thread, and others set theirs
    thread = ThreadPoolExecutor(max_workers=1)
    return lambda prompts, new: thread.submit(write, prompts, new).result()


def write_gguf(model: GPT2LMHeadModel, kind: str, path: Path) -> None:
    """A GPT-2 in llama.cpp's format, every matrix in `kind`; the head is the table of tokens."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_context_length(config.n_positions)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(config.d_ff)
    writer.add_block_count(config.n_layer)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    matrix_type = gguf.GGMLQuantizationType[kind]

    def add(name: str, x: torch.Tensor, *, matrix: bool) -> None:
        array = x.detach().float().contiguous().numpy()
        kind = matrix_type if matrix else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)

    body = model.transformer
    add("token_embd.weight", body.wte.weight, matrix=True)
    add("position_embd.weight", body.wpe.weight, matrix=False)
    for i, block in enumerate(body.h):
        linears = {"attn_qkv": block.attn.c_attn, "attn_output": block.attn.c_proj}
        linears |= {"ffn_up": block.mlp.c_fc, "ffn_down": block.mlp.c_proj}
        for name, layer in linears.items():
            add(f"blk.{i}.{name}.weight", layer.weight.T, matrix=True)
            add(f"blk.{i}.{name}.bias", layer.bias, matrix=False)
        for name, norm in {"attn_norm": block.ln_1, "ffn_norm": block.ln_2}.items():
            add(f"blk.{i}.{name}.weight", norm.weight, matrix=False)
            add(f"blk.{i}.{name}.bias", norm.bias, matrix=False)
    add("output_norm.weight", body.ln_f.weight, matrix=False)
    add("output_norm.bias", body.ln_f.bias, matrix=False)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def onnx_runtime(model: GPT2LMHeadModel, dtype: str) -> Peer:
    """The graph that ONNX Runtime's optimiser makes of a GPT-2, with its fused attention on past keys and values."""
    import onnxruntime

    config = model.config
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(onnx_graph(model), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    head = config.n_embd // config.n_head

    def write(prompts: list[list[int]], new: int) -> tuple[list[list[int]], list[float]]:
        if len(prompts) > 1:
            raise ValueError(f"one prompt at a time, got {len(prompts)}")
        times, ids, past, written = [time.perf_counter()], np.array(prompts), 0, []
        value = onnxruntime.OrtValue.ortvalue_from_numpy
        empty = np.zeros((2, 1, config.n_head, 0, head), np.float32)
        state = [value(empty) for _ in range(config.n_layer)]
        for _ in range(new):
            inputs = {"ids": value(ids), "positions": value(np.arange(past, past + ids.shape[1])[None])}
            inputs |= {f"past_{i}": x for i, x in enumerate(state)}
            logits, *state = session.run_with_ort_values(names, inputs)
            past += ids.shape[1]
            ids = logits.numpy().argmax(-1)[:, None]
            written.append(ids.item())
            times.append(time.perf_counter())
        return [written], times

    return write


def onnx_graph(model: GPT2LMHeadModel) -> bytes:
    """ids, positions (b, s) and past_i (2, b, h, past, d) to the last place's logits (b, vocab) and present_i."""
    from onnx import TensorProto, helper, numpy_helper

    config, body, nodes, weights = model.config, model.transformer, [], []

    def constant(name: str, x: torch.Tensor) -> str:
        weights.append(numpy_helper.from_array(x.detach().float().contiguous().numpy(), name))
        return name

    def node(op: str, *inputs: str, outputs: tuple[str, ...] = (), **attributes) -> str:
        outputs = outputs or (f"{op}_{len(nodes)}",)
        nodes.append(helper.make_node(op, inputs, outputs, **attributes))
        return outputs[0]

    def norm(x: str, name: str, module) -> str:
        scale, bias = constant(f"{name}.weight", module.weight), constant(f"{name}.bias", module.bias)
        return node("LayerNormalization", x, scale, bias, axis=-1, epsilon=config.layer_norm_epsilon)

    def linear(x: str, name: str, module) -> str:
        y = node("MatMul", x, constant(f"{name}.weight", module.weight))
        return node("Add", y, constant(f"{name}.bias", module.bias))

    table = constant("wte", body.wte.weight)
    x = node("Add", node("Gather", table, "ids"), node("Gather", constant("wpe", body.wpe.weight), "positions"))
    for i, block in enumerate(body.h):
        qkv = block.attn.c_attn
        operands = [
            norm(x, f"{i}.ln_1", block.ln_1),
            constant(f"{i}.qkv", qkv.weight),
            constant(f"{i}.qkv_b", qkv.bias),
        ]
        own = {"domain": "com.microsoft", "num_heads": config.n_head, "unidirectional": 1}
        attended = node("Attention", *operands, "", f"past_{i}", outputs=(f"attended_{i}", f"present_{i}"), **own)
        x = node("Add", x, linear(attended, f"{i}.project", block.attn.c_proj))
        hidden = node("MatMul", norm(x, f"{i}.ln_2", block.ln_2), constant(f"{i}.up", block.mlp.c_fc.weight))
        hidden = node("FastGelu", hidden, constant(f"{i}.up_b", block.mlp.c_fc.bias), domain="com.microsoft")
        x = node("Add", x, linear(hidden, f"{i}.down", block.mlp.c_proj))
    weights.append(numpy_helper.from_array(np.array(-1), "last"))
    last = node("Gather", norm(x, "ln_f", body.ln_f), "last", axis=1)
    node("MatMul", last, constant("head", body.wte.weight.T), outputs=("logits",))

    def info(name: str, shape: tuple, kind=TensorProto.FLOAT):
        return helper.make_tensor_value_info(name, kind, shape)

    d = config.n_embd // config.n_head
    inputs = [info(name, ("b", "s"), TensorProto.INT64) for name in ("ids", "positions")]
    inputs += [info(f"past_{i}", (2, "b", config.n_head, "past", d)) for i in range(config.n_layer)]
    outputs = [info("logits", ("b", config.vocab_size))]
    outputs += [info(f"present_{i}", (2, "b", config.n_head, "all", d)) for i in range(config.n_layer)]
    versions = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph(nodes, "gpt2", inputs, outputs, weights)
    return helper.make_model(graph, opset_imports=versions, ir_version=8).SerializeToString()


# name: (how it is made, our formats and what it calls them, its packages)
PEERS = {
    "Hugging Face": (hugging_face, {"float32": "float32", "bfloat16": "bfloat16"}, ("transformers",)),
    "CTranslate2": (ctranslate2_model, {"float32": "float32", "int8": "int8"}, ("ctranslate2", "transformers")),
    "llama.cpp": (
        llama_cpp,
        {"float32": "F32", "bfloat16": "BF16", "int8": "Q8_0", "int4": "Q4_0"},
        ("llama_cpp", "gguf"),
    ),
    "ONNX Runtime": (onnx_runtime, {"float32": "float32"}, ("onnxruntime", "onnx")),
}
