"""The server: OpenAI's answers and errors, and no client, however it behaves, keeps a page of the cache."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from lmkernels import serve
from lmkernels.cli import main
from lmkernels.generation import Engine
from lmkernels.models import GPT2Config, GPT2LMHeadModel

END = 256


def byte_tokenizer() -> Tokenizer:
    """One token per byte, and one that ends a text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    return tokenizer


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=257, n_positions=400, n_embd=24, n_layer=2, n_head=3, bos_token_id=END, eos_token_id=END
    )
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        model.transformer.ln_f.bias.sub_(3 * model.transformer.wte.weight[END])  # texts seldom end by themselves
    return model


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served") / "tiny"
    model.save_pretrained(folder)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def slowed(engine: Engine, seconds: float) -> Engine:
    """Its steps take a while, so that a test sees requests that run and wait."""
    step = engine.step

    def slow_step():
        time.sleep(seconds)
        return step()

    engine.step = slow_step
    return engine


class Running:
    """A server in a thread, on a free port."""

    def __init__(self, engine: Engine, **options):
        self.engine = engine
        grace = options.pop("grace", 0.2)
        made = serve.app(engine, byte_tokenizer(), name="tiny", **options)
        self.server, self.service = serve.Server(made, grace), made.state.service
        self.listening = serve.listen("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self.listening.getsockname()[1]}"
        self.client = httpx.Client(base_url=self.url, timeout=20)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.listening]})

    def __enter__(self):
        self.thread.start()
        until(lambda: self.server.started)
        return self

    def __exit__(self, *_):
        self.client.close()
        self.server.should_exit = True
        self.thread.join(15)
        assert not self.thread.is_alive() and not self.service.thread.is_alive()
        assert all_free(self.engine)

    def post(self, **body) -> httpx.Response:
        return self.client.post("/v1/completions", json=body)


def until(holds, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


def all_free(engine: Engine) -> bool:
    return not engine.busy and engine.pages.free == engine.pages.count


@pytest.fixture(scope="module")
def server(model):
    with Running(Engine(model, page_size=8), max_body=5000, max_tokens=100) as running:
        yield running
        until(lambda: all_free(running.engine))


def text_of(model, prompt: str, count: int, **settings) -> str:
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode(prompt).ids
    tokens = model.generate([ids], max_new_tokens=count, **settings)[0, len(ids) :].tolist()
    return tokenizer.decode([token for token in tokens if token != END])


def events(response: httpx.Response) -> list[dict]:
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]" and all(line.startswith("data: ") for line in lines)
    return [json.loads(line[6:]) for line in lines[:-1]]


def whole_characters(text: str) -> str:
    """Without the replacement characters of bytes that make none, which come at other places in pieces of a text."""
    return text.replace("\ufffd", "")


def test_a_completion_is_what_generate_writes(server, model):
    answer = server.post(model="tiny", prompt="def read(", max_tokens=12, temperature=0)
    assert answer.status_code == 200
    body = answer.json()
    (choice,) = body["choices"]
    assert whole_characters(choice["text"]) == whole_characters(text_of(model, "def read(", 12))
    assert choice["index"] == 0 and choice["logprobs"] is None and choice["finish_reason"] == "length"
    assert body["usage"] == {"prompt_tokens": 9, "completion_tokens": 12, "total_tokens": 21}
    assert body["object"] == "text_completion" and body["model"] == "tiny" and body["id"].startswith("cmpl-")
    assert answer.headers["content-type"] == "application/json"


def test_prompts_choices_seeds_and_echo(server, model):
    many = server.post(prompt=["ab", "cd"], n=2, seed=5, max_tokens=8, echo=True).json()["choices"]
    assert [choice["index"] for choice in many] == [0, 1, 2, 3]
    for choice, prompt in zip(many, ("ab", "ab", "cd", "cd"), strict=True):
        seed = 5 + choice["index"]
        expected = text_of(model, prompt, 8, do_sample=True, top_k=0, seed=seed)
        assert choice["text"].startswith(prompt)
        assert whole_characters(choice["text"][2:]) == whole_characters(expected)
    tokens = byte_tokenizer().encode("ab").ids
    for prompt in (tokens, [tokens]):
        again = server.post(prompt=prompt, seed=5, max_tokens=8, echo=True).json()["choices"][0]
        assert again["text"] == many[0]["text"]
    assert server.post(prompt="", max_tokens=3).json()["usage"]["prompt_tokens"] == 1


def test_the_distribution_follows_its_settings(server, model):
    settings = {"temperature": 0.7, "top_p": 0.8, "presence_penalty": 0.5, "frequency_penalty": 0.25, "min_p": 0.01}
    settings |= {"repetition_penalty": 1.1, "top_k": 40}
    text = server.post(prompt="ab", seed=1, max_tokens=20, **settings).json()["choices"][0]["text"]
    assert whole_characters(text) == whole_characters(text_of(model, "ab", 20, do_sample=True, seed=1, **settings))
    token = byte_tokenizer().encode("z").ids[0]
    biased = server.post(prompt="ab", logit_bias={str(token): 100}, max_tokens=5, temperature=0).json()
    assert biased["choices"][0]["text"] == "zzzzz"


def test_a_text_ends_before_the_stop_string_whole_or_in_a_stream(server):
    token = byte_tokenizer().encode("z").ids[0]
    other = byte_tokenizer().encode("y").ids[0]
    wish = {"prompt": "ab", "max_tokens": 30, "temperature": 0}
    wish |= {"logit_bias": {str(token): 100, str(other): 100}, "frequency_penalty": 2, "presence_penalty": 2}
    full = server.post(**wish).json()["choices"][0]
    assert set(full["text"]) == {"y", "z"} and len(full["text"]) == 30
    stop = full["text"][10:15]
    expected = full["text"][: full["text"].find(stop)]
    for body in ({"stop": stop}, {"stop": ["no such", stop]}):
        whole = server.post(**wish, **body).json()["choices"][0]
        assert whole["text"] == expected and whole["finish_reason"] == "stop"
        streamed = events(server.post(**wish, **body, stream=True))
        assert "".join(e["choices"][0]["text"] for e in streamed) == expected
        assert streamed[-1]["choices"][0]["finish_reason"] == "stop"


def test_the_end_token_ends_a_text_and_is_not_part_of_it(server):
    answer = server.post(prompt="ab", logit_bias={str(END): 100}, temperature=0).json()
    assert answer["choices"][0]["text"] == "" and answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == 1


def test_a_stream_is_the_same_text_in_pieces(server):
    wish = {"prompt": ["ab", "cd"], "n": 2, "max_tokens": 25, "seed": 3, "logit_bias": {"65": 3}}
    whole = server.post(**wish).json()
    with server.client.stream("POST", "/v1/completions", json=wish | {"stream": True}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        response.read()
    streamed = events(response)
    assert len({e["id"] for e in streamed}) == 1
    for choice in whole["choices"]:
        own = [e["choices"][0] for e in streamed if e["choices"][0]["index"] == choice["index"]]
        assert "".join(e["text"] for e in own) == choice["text"]
        assert [e["finish_reason"] for e in own[:-1]] == [None] * (len(own) - 1)
        assert own[-1]["finish_reason"] == choice["finish_reason"]
    *_, last = events(server.post(**wish, stream=True, stream_options={"include_usage": True}))
    assert last["choices"] == [] and last["usage"] == whole["usage"]


def test_no_token_of_a_stream_waits_for_the_next(model):
    engine = Engine(model)
    step, read = engine.step, threading.Semaphore(1)

    def step_when_read():
        if engine.busy:
            read.acquire(timeout=5)  # then it goes on, and pieces come together
        return step()

    engine.step = step_when_read
    with Running(engine) as running:
        wish = {"prompt": "ab", "max_tokens": 6, "temperature": 0, "logit_bias": {"65": 100}, "stream": True}
        pieces = []
        with running.client.stream("POST", "/v1/completions", json=wish) as response:
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    pieces.append(json.loads(line[6:])["choices"][0]["text"])
                    read.release()
    assert pieces == [byte_tokenizer().decode([65])] * 6


def test_log_probabilities(server):
    wish = {"prompt": "ab", "max_tokens": 6, "temperature": 0, "logprobs": 2}
    choice = server.post(**wish).json()["choices"][0]
    logprobs = choice["logprobs"]
    assert {len(values) for values in logprobs.values()} == {6} and logprobs["text_offset"][0] == 0
    for own, top in zip(logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True):
        assert own == max(top.values()) < 0 and len(top) <= 2
    streamed = [e["choices"][0]["logprobs"] for e in events(server.post(**wish, stream=True))]
    assert [x for part in streamed for x in part["token_logprobs"]] == logprobs["token_logprobs"]


def test_models_and_health(server):
    assert [m["id"] for m in server.client.get("/v1/models").json()["data"]] == ["tiny"]
    until(lambda: all_free(server.engine))
    health = server.client.get("/health")
    assert health.status_code == 200
    assert health.json() == {"status": "ok", "running": 0, "waiting": 0, "pages": 800, "free_pages": 800}


BAD = [
    ({}, 400, "prompt must be given", "prompt"),
    ({"prompt": 3}, 400, "prompt must be a text, a list of token ids", "prompt"),
    ({"prompt": []}, 400, "prompt must be", "prompt"),
    ({"prompt": ["a", 1]}, 400, "prompt must be", "prompt"),
    ({"prompt": [[1], []]}, 400, "prompt must be", "prompt"),
    ({"prompt": [True]}, 400, "prompt must be", "prompt"),
    ({"prompt": [257]}, 400, "input_ids must lie in", None),
    ({"prompt": "a" * 390}, 400, "maximum context length is 400 tokens, however you requested 401", "prompt"),
    ({"prompt": "a", "max_tokens": 101}, 400, "max_tokens must be at most 100, got 101", "max_tokens"),
    ({"prompt": "a", "max_tokens": 0}, 400, "max_tokens must be a positive whole number, got 0", "max_tokens"),
    ({"prompt": "a", "max_tokens": True}, 400, "max_tokens must be a positive", "max_tokens"),
    ({"prompt": "a", "temperature": -1}, 400, "temperature must be a number from 0 to 2", "temperature"),
    ({"prompt": "a", "temperature": "hot"}, 400, "temperature must be", "temperature"),
    ({"prompt": "a", "top_p": 0}, 400, "top_p must be", "top_p"),
    ({"prompt": "a", "n": 129}, 400, "n must be", "n"),
    ({"prompt": ["a"] * 65, "n": 2}, 400, r"within 128, got 65 \* 2", "n"),
    ({"prompt": "a", "stop": [""]}, 400, "stop must be", "stop"),
    ({"prompt": "a", "seed": 1.5}, 400, "seed must be", "seed"),
    ({"prompt": "a", "logit_bias": {"x": 1}}, 400, "logit_bias must be", "logit_bias"),
    ({"prompt": "a", "logit_bias": {"257": 1}}, 400, "tokens below 257", "logit_bias"),
    ({"prompt": "a", "logprobs": 6}, 400, "logprobs must be", "logprobs"),
    ({"prompt": "a", "logprobs": 1, "echo": True}, 400, "logprobs must be left out with echo", "logprobs"),
    ({"prompt": "a", "best_of": 2}, 400, "best_of must be as many as n", "best_of"),
    ({"prompt": "a", "suffix": "b"}, 400, "suffix must be left out", "suffix"),
    ({"prompt": "a", "stream": "yes"}, 400, "stream must be true or false", "stream"),
    ({"prompt": "a", "top_q": 1}, 400, "Unrecognized request argument supplied: top_q", "top_q"),
    ({"prompt": "a", "model": "gpt-5"}, 404, "`gpt-5` does not exist", "model"),
]


@pytest.mark.parametrize(("body", "status", "message", "param"), BAD, ids=lambda x: None)
def test_bad_requests_are_named_errors(server, body, status, message, param):
    if body.get("prompt") == "a" * 390:
        body = body | {"max_tokens": 11}
    answer = server.post(**body)
    error = answer.json()["error"]
    assert answer.status_code == status and re.search(message, error["message"]), error
    assert error["type"] == "invalid_request_error" and error["param"] == param


@pytest.mark.parametrize(
    ("content", "status", "message"),
    [
        (b"{", 400, "the body must be JSON"),
        (b"[" * 4000, 400, "the body must be JSON"),
        (b"\xff\xfe\x00", 400, "the body must be JSON"),
        (b"[1]", 400, "the body must be a JSON object, got list"),
        (b'{"prompt": "\\ud800"}', 400, "prompt must be text that UTF-8 can hold"),
        (b'{"prompt": "a", "temperature": NaN}', 400, "temperature must be"),
        (b" " * 5001, 413, "at most 5000 bytes"),
    ],
    ids=lambda x: None,
)
def test_bodies_that_are_no_requests(server, content, status, message):
    for body in (content, iter([content[:9], content[9:]])):  # with a length, and in chunks
        answer = server.client.post("/v1/completions", content=body)
        assert answer.status_code == status and message in answer.json()["error"]["message"]


def test_other_paths_and_methods_are_errors_of_the_same_form(server):
    assert server.client.get("/v2").status_code == 404
    answer = server.client.get("/v1/completions")
    assert answer.status_code == 405 and answer.json()["error"]["type"] == "invalid_request_error"


def test_without_a_network(model):
    """The application under any ASGI server."""

    async def ask() -> list[httpx.Response]:
        made = serve.app(Engine(model), byte_tokenizer(), name="tiny")
        transport = httpx.ASGITransport(made)
        async with (
            made.router.lifespan_context(made),
            httpx.AsyncClient(transport=transport, base_url="http://tiny") as client,
        ):
            bodies = [{"prompt": "ab" * i, "max_tokens": 5, "seed": i} for i in range(1, 30)]
            return await asyncio.gather(*(client.post("/v1/completions", json=body) for body in bodies))

    answers = asyncio.run(ask())
    assert [a.status_code for a in answers] == [200] * 29
    assert answers[3].json()["usage"] == {"prompt_tokens": 8, "completion_tokens": 5, "total_tokens": 13}


def test_an_error_of_one_request_is_its_own(server, model, monkeypatch):
    add = server.engine.add

    def broken(ids, scores):
        raise ArithmeticError("on purpose")

    monkeypatch.setattr(server.engine, "add", lambda *a, **k: add(*a, **k, logits_processor=[broken]))
    answer = server.post(prompt="a")
    assert answer.status_code == 500 and "on purpose" in answer.json()["error"]["message"]
    assert answer.json()["error"]["type"] == "server_error"
    assert events(server.post(prompt="a", stream=True))[0]["error"]["type"] == "server_error"
    monkeypatch.undo()
    assert server.post(prompt="a").status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_pages(model, stream):
    with Running(slowed(Engine(model, max_rows=1), 0.01)) as running:
        body = json.dumps({"prompt": "ab", "max_tokens": 390, "stream": stream, "logit_bias": {str(END): -100}})
        request = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
        clients = [socket.create_connection(running.listening.getsockname()) for _ in range(2)]
        for client in clients:
            client.sendall(request)
        until(lambda: running.engine.running and running.engine.waiting)
        for client in clients:
            client.close()
        until(lambda: all_free(running.engine) and not running.service.job_of, 2.0)
        assert running.post(prompt="a", max_tokens=2).status_code == 200


def test_a_flood_is_refused_and_what_was_taken_is_answered(model):
    with Running(slowed(Engine(model, max_rows=2, max_queue=6), 0.002)) as running:
        answers = []

        def ask(i):
            answer = httpx.post(f"{running.url}/v1/completions", json={"prompt": "ab", "n": 1 + i % 2}, timeout=20)
            answers.append(answer)

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(40)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        refused = [answer for answer in answers if answer.status_code == 429]
        assert len(answers) == 40 and {answer.status_code for answer in answers} == {200, 429}
        for answer in refused:
            assert answer.json()["error"]["code"] == "queue_full" and answer.headers["retry-after"] == "1"
        until(lambda: all_free(running.engine) and not running.service.job_of)
        too_many = running.post(prompt="ab", n=9)
        assert too_many.status_code == 429, "of which none may be left behind"
        until(lambda: all_free(running.engine))


def test_shutdown_ends_what_runs_and_refuses_what_comes(model):
    engine = slowed(Engine(model), 0.01)
    with Running(engine, grace=0.3) as running:
        results = {}

        def ask(stream):
            body = {"prompt": "ab", "max_tokens": 390, "stream": stream, "logit_bias": {str(END): -100}}
            results[stream] = httpx.post(f"{running.url}/v1/completions", json=body, timeout=20)

        threads = [threading.Thread(target=ask, args=(stream,)) for stream in (True, False)]
        for thread in threads:
            thread.start()
        until(lambda: len(engine.running) == 2)
        running.server.should_exit = True
        for thread in threads:
            thread.join()
        assert results[False].status_code == 503 and results[False].json()["error"]["code"] == "shutting_down"
        *pieces, last = events(results[True])
        assert pieces and last["error"]["code"] == "shutting_down"


@pytest.mark.parametrize("interrupt", [signal.SIGINT, signal.SIGTERM])
def test_the_command_serves_until_it_is_told_to_stop(folder, interrupt):
    command = [sys.executable, "-m", "lmkernels", "serve", "--model", str(folder), "--port", "0", "--grace", "10"]
    command += ["--threads", "1", "--quantize", "int8", "--max-rows", "4"]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            line = process.stdout.readline()
            address = re.fullmatch(r"serving tiny at (http://127\.0\.0\.1:\d+/v1)/completions; Ctrl-C stops\n", line)
            assert address, line + process.stderr.read()
            body = {"prompt": "ab", "max_tokens": 200, "stream": True, "logit_bias": {str(END): -100}}
            with httpx.stream("POST", f"{address[1]}/completions", json=body, timeout=20) as response:
                chunks = response.iter_raw()
                next(chunks)
                process.send_signal(interrupt)
                rest = "".join(chunk.decode() for chunk in chunks)
            assert '"finish_reason": "length"' in rest and rest.endswith("data: [DONE]\n\n"), "what runs may finish"
            code = process.wait(15)
        finally:
            process.kill()
        assert process.stderr.read() == ""
        assert code == (0 if interrupt == signal.SIGINT else -signal.SIGTERM)


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--port", "{taken}"], 1, "cannot listen on 127.0.0.1 port"),
        (["--port", "70000"], 2, "port must lie in"),
        (["--max-rows", "0"], 2, "max_rows must be"),
        (["--max-tokens", "0"], 2, "--max-tokens must be at least 1"),
        (["--threads", "0"], 2, "--threads must be at least 1"),
    ],
)
def test_bad_options_are_one_line(folder, options, code, message, capsys):
    with serve.listen("127.0.0.1", 0) as taken:
        port = str(taken.getsockname()[1])
        assert main(["serve", "--model", str(folder), *(o.replace("{taken}", port) for o in options)]) == code
    error = capsys.readouterr().err
    assert error.startswith("lmkernels: ") and message in error and error.count("\n") == 1


def test_what_is_missing_is_named():
    program = (
        "import sys; sys.modules['uvicorn'] = None\n"
        "try: import lmkernels.serve\n"
        "except ImportError as error: print(error)"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert "pip install 'lmkernels[serve]'" in out


def test_stop_strings_are_found_across_tokens():
    tokenizer = byte_tokenizer()

    def pieces(text, stops):
        made = serve.Text(tokenizer, tokenizer.encode("x").ids, stops)
        found = []
        for token in tokenizer.encode(text).ids:
            found.append(made.add(token))
            if made.stopped:
                return found
        return [*found, made.end()]

    assert pieces("abcd", []) == ["a", "b", "c", "d", ""]
    assert pieces("aabac", ["aac", "bac"]) == ["", "", "aa", "", ""]
    assert pieces("xxab", ["xxa"]) == ["", "", ""]
    assert pieces("xxx", ["xxa"]) == ["", "", "x", "xx"]
    assert pieces("é!", ["!"]) == ["", "é", ""]
    assert serve.overlap("aaa", "aab") == 2 and serve.overlap("", "a") == 0
