"""A server of completions in the form of OpenAI's API: POST /v1/completions, GET /v1/models, GET /health.

One thread runs the engine's steps; an event loop reads requests, tells each when its tokens have come, and writes.
"""

import asyncio
import json
import math
import socket
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from .generation import Engine, QueueFull
from .generation import Request as EngineRequest

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import JSONResponse, Response, StreamingResponse
    from starlette.routing import Route
except ImportError as error:
    raise ImportError(f"serving needs starlette and uvicorn: pip install 'lmkernels[serve]' ({error})") from error

MOST_CHOICES, MOST_STOPS, CONTEXT = 128, 16, 16
LOGPROBS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")


class Refused(Exception):
    """What is answered with an error."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        if self.status == 429:
            kind = "rate_limit_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        headers = {"Retry-After": "1"} if self.status in (429, 503) else None
        return JSONResponse(self.body(), self.status, headers)


# --- what a request may say


def is_whole(least: int, most: float = math.inf) -> Callable[[object], bool]:
    return lambda x: isinstance(x, int) and not isinstance(x, bool) and least <= x <= most


def is_number(least: float, most: float, above: bool = False) -> Callable[[object], bool]:
    return lambda x: (
        isinstance(x, int | float) and not isinstance(x, bool) and least <= x <= most and not (above and x == least)
    )


def is_bias(x) -> bool:
    within = is_number(-100, 100)
    return isinstance(x, dict) and all(key.isdecimal() and within(value) for key, value in x.items())


def is_stop(x) -> bool:
    stops = [x] if isinstance(x, str) else x
    return isinstance(stops, list) and len(stops) <= MOST_STOPS and all(isinstance(s, str) and s for s in stops)


def is_flag(x) -> bool:
    return isinstance(x, bool)


def is_text(x) -> bool:
    return isinstance(x, str)


# name: (default, what is valid, in words)
PARAMETERS = {
    "model": (None, is_text, "a name of GET /v1/models"),
    "max_tokens": (None, is_whole(1), "a positive whole number"),
    "temperature": (1.0, is_number(0, 2), "a number from 0 to 2"),
    "top_p": (1.0, is_number(0, 1, above=True), "a number above 0, at most 1"),
    "n": (1, is_whole(1, MOST_CHOICES), f"a whole number from 1 to {MOST_CHOICES}"),
    "stop": ([], is_stop, f"a text or a list of up to {MOST_STOPS}, none of them empty"),
    "seed": (None, is_whole(-(2**63), 2**63 - 1), "a whole number of 64 bits"),
    "presence_penalty": (0.0, is_number(-2, 2), "a number from -2 to 2"),
    "frequency_penalty": (0.0, is_number(-2, 2), "a number from -2 to 2"),
    "logit_bias": ({}, is_bias, "an object of token ids, as texts, and numbers from -100 to 100"),
    "logprobs": (None, is_whole(0, 5), "a whole number from 0 to 5"),
    "echo": (False, is_flag, "true or false"),
    "stream": (False, is_flag, "true or false"),
    "stream_options": ({}, lambda x: isinstance(x, dict) and set(x) <= {"include_usage"}, '{"include_usage": true}'),
    "user": (None, is_text, "a text"),
    "best_of": (None, is_whole(1), "as many as n"),
    "suffix": (None, lambda x: x == "", "left out: it is not supported"),
    # beyond OpenAI's
    "top_k": (0, is_whole(0), "a whole number, 0 for all tokens"),
    "min_p": (None, is_number(0, 1), "a number from 0 to 1"),
    "repetition_penalty": (1.0, is_number(0, 100, above=True), "a number above 0, at most 100"),
}


class Completion:
    """The body of a POST /v1/completions, checked: `prompts`, texts or lists of token ids, and every parameter."""

    def __init__(self, body: bytes):
        try:
            given = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise Refused(400, f"the body must be JSON: {error}") from None
        if not isinstance(given, dict):
            raise Refused(400, f"the body must be a JSON object, got {type(given).__name__}")
        if "prompt" not in given:
            raise Refused(400, "prompt must be given", "prompt")
        self.prompts = as_prompts(given.pop("prompt"))
        for name, value in given.items():
            if name not in PARAMETERS:
                raise Refused(400, f"Unrecognized request argument supplied: {name:.60}", name[:60])
            _, valid, words = PARAMETERS[name]
            if value is not None and not valid(value):
                raise Refused(400, f"{name} must be {words}, got {value!r:.60}", name)
        vars(self).update({name: default for name, (default, _, _) in PARAMETERS.items()})
        vars(self).update({name: value for name, value in given.items() if value is not None})
        if self.best_of not in (None, self.n):
            raise Refused(400, f"best_of must be as many as n, got {self.best_of}", "best_of")
        if self.echo and self.logprobs is not None:
            raise Refused(400, "logprobs must be left out with echo: those of a prompt are not computed", "logprobs")
        if (count := len(self.prompts)) * self.n > MOST_CHOICES:
            raise Refused(400, f"n must keep prompts times n within {MOST_CHOICES}, got {count} * {self.n}", "n")

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop

    def settings(self) -> dict:
        """The arguments of `Engine.add`."""
        penalties = ("presence_penalty", "frequency_penalty", "repetition_penalty")
        settings = {name: getattr(self, name) for name in penalties}
        if self.logit_bias:
            settings["sequence_bias"] = {(int(token),): float(bias) for token, bias in self.logit_bias.items()}
        if self.temperature == 0:
            return settings | {"do_sample": False}
        drawn = {name: getattr(self, name) for name in ("temperature", "top_p", "top_k", "min_p")}
        return settings | {"do_sample": True} | drawn


def as_prompts(prompt) -> list:
    """Texts, or lists of token ids."""
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, list) and prompt and len(prompt) <= MOST_CHOICES and all(map(is_text, prompt)):
        return prompt
    is_token = is_whole(0)
    if isinstance(prompt, list) and prompt and all(map(is_token, prompt)):
        return [prompt]
    if isinstance(prompt, list) and 0 < len(prompt) <= MOST_CHOICES:
        if all(isinstance(ids, list) and ids and all(map(is_token, ids)) for ids in prompt):
            return prompt
    raise Refused(
        400,
        f"prompt must be a text, a list of token ids, or a list of up to {MOST_CHOICES} of either, got {prompt!r:.60}",
        "prompt",
    )


# --- what is answered


class Text:
    """The text of a choice as its tokens come, up to the first of the stop strings."""

    def __init__(self, tokenizer: Tokenizer, prompt: list[int], stops: list[str]):
        self.tokenizer, self.stops = tokenizer, stops
        self.stream = DecodeStream(skip_special_tokens=True)
        self.held, self.stopped = "", False  # what may be the begin of a stop string
        for token in prompt[-CONTEXT:]:  # how a token reads may depend on those before it
            self.stream.step(tokenizer, token)

    def add(self, token: int) -> str:
        """What is certain to belong to the text since the last call."""
        self.held += self.stream.step(self.tokenizer, token) or ""
        found = [place for stop in self.stops if (place := self.held.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self.end(min(found))
        longest = max((overlap(self.held, stop) for stop in self.stops), default=0)
        piece, self.held = self.held[: len(self.held) - longest], self.held[len(self.held) - longest :]
        return piece

    def end(self, length: int | None = None) -> str:
        """What has been held back, after the last token."""
        piece, self.held = self.held[:length], ""
        return piece


def overlap(text: str, stop: str) -> int:
    """How much of the end of `text` is a begin of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


class Choice:
    """One of the texts that answer a request."""

    def __init__(self, index: int, request: EngineRequest, text: Text, ends: list[int], tokenizer: Tokenizer):
        self.index, self.request, self.text, self.ends, self.tokenizer = index, request, text, ends, tokenizer
        self.read = self.written = 0  # tokens, characters
        self.finish_reason: str | None = None

    def advance(self) -> tuple[str, dict | None]:
        """The text since the last call, and the log probabilities of its tokens where they were asked for."""
        done = self.request.done  # before the tokens are read
        tokens, piece = self.request.tokens[self.read :], ""
        logprobs = None if self.request.top is None else {name: [] for name in LOGPROBS}
        for token in tokens:
            if logprobs is not None:
                own, top = self.request.logprobs[self.read]
                logprobs["tokens"].append(self.name(token))
                logprobs["token_logprobs"].append(own)
                logprobs["top_logprobs"].append({self.name(other): value for other, value in top.items()})
                logprobs["text_offset"].append(self.written + len(piece))
            self.read += 1
            if token not in self.ends:
                piece += self.text.add(token)
            if self.text.stopped:
                self.finish_reason = "stop"
                self.request.cancel()
                break
        if done and self.finish_reason is None:
            piece += self.text.end()
            self.finish_reason = self.request.finish_reason
        self.written += len(piece)
        return piece, logprobs

    def name(self, token: int) -> str:
        """What the token reads as, or where it is a part of a character, its entry in the vocabulary."""
        text = self.tokenizer.decode([token], skip_special_tokens=False)
        return self.tokenizer.id_to_token(token) if "\ufffd" in text else text

    def failure(self) -> Refused | None:
        """Why there is no whole text, where it has ended."""
        if self.finish_reason == "cancelled":
            return Refused(503, "the server is shutting down", code="shutting_down")
        if self.finish_reason == "error":
            return Refused(500, f"the text could not be written: {self.request.error}")
        return None


class Job:
    """The choices of one HTTP request. A response: it is written as it comes, and ended when the client leaves."""

    def __init__(self, service: "Service", completion: Completion, prompts: list[list[int]]):
        self.service, self.completion, self.prompts = service, completion, prompts
        self.changed = asyncio.Event()
        self.head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": service.name,
        }
        self.choices: list[Choice] = []
        try:
            for prompt in prompts:
                for _ in range(completion.n):
                    self.add(prompt)
        except BaseException:
            self.close()
            raise

    def add(self, prompt: list[int]) -> None:
        service, completion, index = self.service, self.completion, len(self.choices)
        seed = None if completion.seed is None else (completion.seed + index) % 2**63
        try:
            request = service.engine.add(
                prompt,
                max_new_tokens=completion.max_tokens,
                seed=seed,
                logprobs=completion.logprobs,
                **completion.settings(),
            )
        except QueueFull as error:
            raise Refused(429, f"the server is busy: {error}; try again later", code="queue_full") from None
        except (ValueError, TypeError, NotImplementedError) as error:
            raise Refused(400, str(error)) from None
        service.job_of[request] = self
        text = Text(service.tokenizer, prompt, completion.stops)
        self.choices.append(Choice(index, request, text, request.plan.ends, service.tokenizer))
        service.work.set()

    def close(self) -> None:
        for choice in self.choices:
            choice.request.cancel()
            self.service.job_of.pop(choice.request, None)

    async def pieces(self) -> AsyncIterator[tuple[Choice, str, dict | None]]:
        """The texts as they come; a choice's last piece comes with its finish_reason."""
        unfinished = list(self.choices)
        if self.completion.echo:
            for choice in unfinished:
                prompt = self.completion.prompts[choice.index // self.completion.n]
                yield choice, prompt if is_text(prompt) else self.service.tokenizer.decode(prompt), None
        while unfinished:
            await self.changed.wait()
            self.changed.clear()
            for choice in list(unfinished):
                piece, logprobs = choice.advance()
                if piece or choice.finish_reason or (logprobs and logprobs["tokens"]):
                    yield choice, piece, logprobs
                if choice.finish_reason is not None:
                    unfinished.remove(choice)

    def usage(self) -> dict:
        read, written = sum(map(len, self.prompts)), sum(choice.read for choice in self.choices)
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}

    async def events(self) -> AsyncIterator[str]:
        """The answer in server-sent events."""
        with_usage = self.completion.stream_options.get("include_usage") is True
        async for choice, piece, logprobs in self.pieces():
            if (failure := choice.failure()) is not None:
                yield event(failure.body())
                break
            parts = {"text": piece, "index": choice.index, "logprobs": logprobs, "finish_reason": choice.finish_reason}
            yield event(self.head | {"choices": [parts]} | ({"usage": None} if with_usage else {}))
        else:
            if with_usage:
                yield event(self.head | {"choices": [], "usage": self.usage()})
        yield "data: [DONE]\n\n"

    async def whole(self) -> Response:
        """The answer in one piece."""
        parts = [
            {"text": "", "index": choice.index, "logprobs": None, "finish_reason": None} for choice in self.choices
        ]
        async for choice, piece, logprobs in self.pieces():
            if (failure := choice.failure()) is not None:
                return failure.response()
            part = parts[choice.index]
            part["text"] += piece
            part["finish_reason"] = choice.finish_reason
            if logprobs is not None:
                kept = part["logprobs"] or {name: [] for name in logprobs}
                part["logprobs"] = {name: kept[name] + logprobs[name] for name in logprobs}
        return JSONResponse(self.head | {"choices": parts, "usage": self.usage()})

    async def __call__(self, scope, receive, send) -> None:
        async def answer() -> None:
            if self.completion.stream:
                headers = {"Cache-Control": "no-cache"}
                stream = StreamingResponse(self.events(), headers=headers, media_type="text/event-stream")
                await stream.stream_response(send)
            else:
                await (await self.whole())(scope, receive, send)

        async def client_leaves() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        tasks = [asyncio.ensure_future(answer()), asyncio.ensure_future(client_leaves())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:  # the server stops, and the client does not read
            pass
        finally:
            self.close()
            for task in tasks:
                task.cancel()
        for error in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(error, Exception) and not isinstance(error, OSError):
                raise error


def event(body: dict) -> str:
    return f"data: {json.dumps(body)}\n\n"


# --- who answers


class Service:
    """An engine in a thread of its own, and the requests that wait for it."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, name: str, max_tokens: int | None, max_body: int):
        self.engine, self.tokenizer, self.name, self.max_body = engine, tokenizer, name, max_body
        self.positions = engine.model.config.n_positions
        self.max_tokens = self.positions if max_tokens is None else max_tokens
        self.job_of: dict[EngineRequest, Job] = {}
        self.work = threading.Event()
        self.closing = False  # nothing new is taken
        self.stopped = False
        self.thread = threading.Thread(target=self.run, name="engine", daemon=True)
        self.loop: asyncio.AbstractEventLoop | None = None

    def run(self) -> None:
        while not self.stopped:
            changed = self.engine.step()
            if changed:
                self.loop.call_soon_threadsafe(self.tell, changed)
            self.work.clear()
            if not self.engine.busy and not self.stopped:
                self.work.wait()

    def tell(self, changed: list[EngineRequest]) -> None:
        for request in changed:
            if (job := self.job_of.get(request)) is not None:
                job.changed.set()

    def start(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.thread.start()

    async def stop(self) -> None:
        self.end_all()
        self.stopped = True
        self.work.set()
        await asyncio.to_thread(self.thread.join)

    def end_all(self) -> None:
        """Ends all requests where they stand, in the event loop's thread."""
        self.closing = True
        for request, job in list(self.job_of.items()):
            request.cancel()
            job.changed.set()
        self.work.set()

    async def body_of(self, request: Request) -> bytes:
        too_large = Refused(413, f"the body must have at most {self.max_body} bytes", code="body_too_large")
        length = request.headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self.max_body:
            raise too_large
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > self.max_body:
                raise too_large
        return bytes(body)

    def tokens_of(self, prompt: str | list[int]) -> list[int]:
        if not is_text(prompt):
            return prompt
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise Refused(400, f"prompt must be text that UTF-8 can hold: {error.reason}", "prompt") from None
        ids = self.tokenizer.encode(prompt).ids
        if ids:
            return ids
        if self.engine.model.config.bos_token_id is None:
            raise Refused(400, "prompt must not be empty: the model has no token that begins a text", "prompt")
        return [self.engine.model.config.bos_token_id]

    async def completions(self, request: Request):
        try:
            completion = Completion(await self.body_of(request))
        except ClientDisconnect:
            return Response(status_code=499)
        if completion.model not in (None, self.name):
            raise Refused(404, f"The model `{completion.model:.80}` does not exist", "model", "model_not_found")
        if (completion.max_tokens or 0) > self.max_tokens:
            message = f"max_tokens must be at most {self.max_tokens}, got {completion.max_tokens}"
            raise Refused(400, message, "max_tokens")
        vocab = self.engine.model.config.vocab_size
        if any(int(token) >= vocab for token in completion.logit_bias):
            raise Refused(400, f"logit_bias must be for tokens below {vocab} (vocab_size)", "logit_bias")
        prompts = await asyncio.to_thread(lambda: [self.tokens_of(prompt) for prompt in completion.prompts])
        longest = max(map(len, prompts))
        if completion.max_tokens is None:
            completion.max_tokens = max(1, min(16, self.max_tokens, self.positions - longest))
        if longest + completion.max_tokens > self.positions:
            raise Refused(
                400,
                f"This model's maximum context length is {self.positions} tokens, however you requested "
                f"{longest + completion.max_tokens} tokens ({longest} in your prompt; {completion.max_tokens} for the "
                "completion). Please reduce your prompt or completion length.",
                "prompt",
                "context_length_exceeded",
            )
        if self.closing:
            raise Refused(503, "the server is shutting down", code="shutting_down")
        return Job(self, completion, prompts)

    async def models(self, request: Request) -> Response:
        model = {"id": self.name, "object": "model", "created": 0, "owned_by": "lmkernels"}
        return JSONResponse({"object": "list", "data": [model]})

    async def health(self, request: Request) -> Response:
        engine = self.engine
        alive = self.thread.is_alive() and not self.closing
        state = {
            "status": "ok" if alive else "stopping",
            "running": len(engine.running),
            "waiting": len(engine.waiting),
            "pages": engine.pages.count,
            "free_pages": engine.pages.free,
        }
        return JSONResponse(state, 200 if alive else 503)


async def refused(_: Request, error: Refused) -> Response:
    return error.response()


async def http_error(_: Request, error: HTTPException) -> Response:
    return JSONResponse(Refused(error.status_code, error.detail).body(), error.status_code, error.headers)


async def server_error(_: Request, error: Exception) -> Response:
    return Refused(500, "the server failed").response()


def app(
    engine: Engine, tokenizer: Tokenizer, *, name: str, max_tokens: int | None = None, max_body: int = 2**20
) -> Starlette:
    """The ASGI application. Its lifespan starts and stops the thread that runs the engine.

    name           of the model, for clients
    max_tokens     of one completion; default: what the model's positions leave
    max_body       bytes of a request
    """
    service = Service(engine, tokenizer, name, max_tokens, max_body)

    @asynccontextmanager
    async def lifespan(_):
        service.start()
        yield
        await service.stop()

    made = Starlette(
        routes=[
            Route("/v1/completions", service.completions, methods=["POST"]),
            Route("/v1/models", service.models),
            Route("/health", service.health),
        ],
        exception_handlers={Refused: refused, HTTPException: http_error, Exception: server_error},
        lifespan=lifespan,
    )
    made.state.service = service
    return made


class Server(uvicorn.Server):
    """Stops at Ctrl-C: what is running has `grace` seconds to finish and is then ended, at a second Ctrl-C at once."""

    def __init__(self, app: Starlette, grace: float = 5.0):
        limit = math.ceil(grace) + 5  # for clients that do not read
        super().__init__(
            uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=limit, ws="none")
        )
        self.service, self.grace = app.state.service, grace

    def handle_exit(self, sig, frame) -> None:
        if self.should_exit:
            self.service.loop.call_soon_threadsafe(self.service.end_all)
        else:
            super().handle_exit(sig, frame)

    async def shutdown(self, sockets=None) -> None:
        self.service.closing = True
        timer = self.service.loop.call_later(self.grace, self.service.end_all)
        await super().shutdown(sockets)
        timer.cancel()


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises OSError, with the address, when it cannot."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        raise OSError(f"cannot listen on {host} port {port}: {error.strerror or error}") from None


def serve(
    engine: Engine,
    tokenizer: Tokenizer,
    *,
    name: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    grace: float = 5.0,
    say: Callable[[str], None] = print,
    **options,
) -> None:
    """Serves until Ctrl-C. `options` are those of `app`; port 0 takes a free one; `say` gets the address."""
    if not 0 <= port < 2**16:
        raise ValueError(f"port must lie in [0, 65536), got {port}")
    made = app(engine, tokenizer, name=name, **options)
    with listen(host, port) as listening:
        address = f"[{host}]" if ":" in host else host
        say(f"serving {name} at http://{address}:{listening.getsockname()[1]}/v1/completions; Ctrl-C stops")
        try:
            Server(made, grace).run(sockets=[listening])
        except KeyboardInterrupt:  # which uvicorn passes on after it has stopped
            pass
