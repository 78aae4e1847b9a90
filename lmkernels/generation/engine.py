"""Continuous batching: requests join and leave a running batch at any step."""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import torch

from ..ops.decode_step import decode_step
from .cache import PackedCache
from .config import Settings, settings_for
from .fused import FEW_TOKENS, MOST_ROWS, unsupported
from .graphed import step_by_ops
from .loop import as_list, plan_for
from .pages import Pages, SequenceCache
from .plan import Plan, process
from .search import next_tokens
from .stopping import EndToken


class QueueFull(RuntimeError):
    """An Engine has as many requests waiting as it may have."""


class Request:
    """A prompt that an Engine continues. Iterate over it for the new tokens as they come.

    prompt, tokens     lists of token ids; `tokens` grows, an end token included
    finish_reason      None, then "stop" (an end token, stop string or criterion), "length", "cancelled" or "error"
    error              what went wrong, for "error"; iterating raises it
    logprobs           where they were asked for, per new token its log probability, and those of the likeliest tokens
    """

    def __init__(self, engine: "Engine", plan: Plan, logprobs: int | None):
        self.engine, self.plan = engine, plan
        self.prompt: list[int] = plan.ids[0].tolist()
        self.tokens: list[int] = []
        self.finish_reason: str | None = None
        self.error: Exception | None = None
        self.top = logprobs
        self.logprobs: list[tuple[float, dict[int, float]]] = []
        self.cancelled = False
        self.processors = plan.processors(plan.padding)
        self.is_greedy = not self.processors and not plan.settings.do_sample
        self.ends_by_token = all(isinstance(criterion, EndToken) for criterion in plan.criteria)
        self.ids = plan.ids.new_zeros(1, plan.total)  # prompt and new tokens
        self.ids[:, : plan.prompt] = plan.ids
        self.is_short = plan.prompt <= FEW_TOKENS and engine.model.device.type == "cpu"
        # a prompt that a step reads gets other bits than as the begin of a longer one
        self.names = engine.pages.names(self.prompt) if plan.prompt > FEW_TOKENS else []
        self.pages: list[int] = []
        self.table: torch.Tensor | None = None  # of the pages, (most pages of a sequence,)
        self.read = 0  # tokens of the prompt whose keys and values are in the pages

    @property
    def length(self) -> int:
        """Tokens of prompt and text."""
        return len(self.prompt) + len(self.tokens)

    @property
    def unread(self) -> int:
        """Tokens whose keys and values are not in the pages: of the prompt, then the newest one."""
        return 1 if self.tokens else len(self.prompt) - self.read

    @property
    def done(self) -> bool:
        return self.finish_reason is not None

    def cancel(self) -> None:
        """Ends the request where it stands. May be called from any thread, and more than once."""
        self.engine.cancel(self)

    def __iter__(self) -> Iterator[int]:
        """The new tokens; the engine is stepped while there are none."""
        read = 0
        while True:
            done = self.done  # before the tokens are looked at: after it there are no more
            while read < len(self.tokens):
                yield self.tokens[read]
                read += 1
            if done:
                break
            self.engine.step()
        if self.error is not None:
            raise self.error


class Engine:
    """Continues any number of prompts, `max_rows` at a time, in a cache of bounded size.

    engine = Engine(model)
    request = engine.add(ids, max_new_tokens=50)
    for token in request: ...

    model         a GPT2LMHeadModel without hooks or replaced modules; it must not change while the engine lives
    max_rows      requests that are written at once; a step computes up to 64 tokens together, and more in groups
    memory        bytes for keys and values; or `pages`, their number; default: max_rows sequences of full length
    page_size     tokens of a page
    max_queue     requests that may wait; another is refused with QueueFull
    chunk         tokens of prompts that are read per step, or a few more: what the running requests wait for at most.
                  As many prompts as it holds are read together; short ones with the tokens that are written

    Requests are served in their order. One is begun when the pages for all that it may write are free, so that none
    ever runs out of them. Prompts that begin alike share the pages that they fill, those of requests that are done too
    while their memory is not needed.

    A request's tokens, and the bits of its logits, do not depend on what else the engine does, and are those of
    `generate` for this prompt alone. What is drawn without a seed gets one from torch's default generator when it is
    added.

    add and cancel may be called from any thread at any time; a step is run by one thread at a time, others wait.
    Kwon et al. 2023, arXiv:2309.06180; Yu et al. 2022 (Orca, OSDI).
    """

    def __init__(
        self,
        model,
        *,
        max_rows: int = 16,
        memory: int | None = None,
        pages: int | None = None,
        page_size: int = 16,
        max_queue: int = 1024,
        chunk: int = 512,
    ):
        given = {"max_rows": (max_rows, 1), "page_size": (page_size, 1), "max_queue": (max_queue, 1)}
        for name, (value, least) in (given | {"chunk": (chunk, FEW_TOKENS + 1)}).items():
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
        if memory is not None and pages is not None:
            raise ValueError("memory and pages both say how large the cache is: give one of them")
        reason = unsupported(model)
        self.step_model = None if reason else model.step_model()
        if self.step_model is None:
            raise NotImplementedError(f"model must be a plain model of ours: {reason or 'a module has been replaced'}")
        self.model, self.max_rows, self.max_queue, self.chunk = model, max_rows, max_queue, chunk
        self.longest = -(-model.config.n_positions // page_size)  # pages of a sequence
        norm, layers = self.step_model.norm, len(self.step_model.layers)
        shape = (self.step_model.heads_kv, page_size, self.step_model.head_dim)
        page_bytes = 2 * layers * shape[0] * shape[1] * shape[2] * norm.element_size()
        if memory is not None:
            pages = memory // page_bytes
        if pages is None:
            pages = max_rows * self.longest
        if pages < 1:
            raise ValueError(f"memory must hold a page of {page_bytes} bytes or more, got {pages} of them")
        self.pages = Pages(pages, page_size)
        self.buffers = [norm.new_empty(2, pages, *shape) for _ in range(layers)]
        self.waiting: deque[Request] = deque()
        self.reading: list[Request] = []  # whose prompts are being read
        self.running: list[Request] = []
        self._lock, self._queue_lock = threading.Lock(), threading.Lock()

    @property
    def busy(self) -> bool:
        """Whether a step has anything to do."""
        return bool(self.waiting or self.reading or self.running)

    def add(
        self,
        prompt: Sequence[int] | torch.Tensor,
        generation_config=None,
        *,
        logits_processor: Sequence[Callable] | None = None,
        stopping_criteria: Sequence[Callable] | None = None,
        prefix_allowed_tokens_fn: Callable[[int, torch.Tensor], list[int]] | None = None,
        tokenizer=None,
        seed: int | None = None,
        logprobs: int | None = None,
        **settings,
    ) -> Request:
        """Queues a prompt: (s,) token ids, with the arguments and settings of `generate` that are for one sequence.

        logprobs: keep the log probabilities of the new tokens, and of so many of the likeliest at each place.

        Raises QueueFull when max_queue requests wait, ValueError for a request that the whole cache could not hold, and
        what `generate` raises.
        """
        s = settings_for(self.model, generation_config, settings)
        check_settings(s)
        if logprobs is not None and not (isinstance(logprobs, int) and 0 <= logprobs <= self.model.config.vocab_size):
            raise ValueError(f"logprobs must be a whole number up to the vocabulary's size, got {logprobs!r}")
        if seed is None and s.do_sample:
            seed = int(torch.randint(2**63 - 1, ()))
        plan = plan_for(
            self.model,
            s,
            [prompt],
            None,
            as_list(logits_processor, "logits_processor"),
            as_list(stopping_criteria, "stopping_criteria"),
            prefix_allowed_tokens_fn,
            None,
            tokenizer,
            seed,
        )
        needed = self.pages.needed(plan.total - 1)
        if needed > self.pages.count:
            raise ValueError(
                f"prompt and new tokens must fit into the engine's cache of {self.pages.count * self.pages.size} "
                f"tokens, got {plan.prompt} + {plan.total - plan.prompt}: give it more memory, or lower max_new_tokens"
            )
        request = Request(self, plan, logprobs)
        with self._queue_lock:
            if len(self.waiting) >= self.max_queue:
                raise QueueFull(f"{self.max_queue} requests are waiting, which is as many as may (max_queue)")
            self.waiting.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """Ends a request: its pages are free at once or, where a step is being run, with the next."""
        request.cancelled = True
        if self._lock.acquire(blocking=False):
            try:
                self._drop_cancelled()
            finally:
                self._lock.release()

    @torch.no_grad()
    def step(self) -> list[Request]:
        """Reads a chunk of the waiting prompts, then writes one token of every running request.

        Returns the requests that have got a token or ended.
        """
        with self._lock:
            changed = self._drop_cancelled()
            running, budget, short = list(self.running), self.chunk, []
            while budget > 0 and (parts := self._parts(budget, short)):
                budget -= sum(cost(*part) for part in parts)
                short += [request for request, _ in parts if request.is_short]
                if long := [part for part in parts if not part[0].is_short]:
                    changed += self._read(long)
            for group in groups(running + short):
                changed += self._write_tokens(group)
            return list(dict.fromkeys(changed))

    def _drop_cancelled(self) -> list[Request]:
        with self._queue_lock:
            dropped = [request for request in self.waiting if request.cancelled]
            if dropped:
                self.waiting = deque(request for request in self.waiting if not request.cancelled)
        dropped += [request for request in self.running + self.reading if request.cancelled]
        for request in dropped:
            self._end(request, "cancelled")
        return dropped

    def _end(self, request: Request, reason: str, error: Exception | None = None) -> None:
        if request.done:
            return
        for active in (self.reading, self.running):
            if request in active:
                active.remove(request)
        self.pages.give_back(request.pages)
        request.pages = []
        request.error, request.finish_reason = error, reason

    def _parts(self, budget: int, short: list[Request]) -> list[tuple[Request, int]]:
        """Prompts to be read together, each with a number of its tokens; those in `short` have their turn already."""
        parts, names = [], set()
        begun = [request for request in self.reading if request not in short]
        while budget > 0 and len(parts) < FEW_TOKENS:  # logits of more rows would be summed in another order
            request = begun.pop(0) if begun else self._begin(names)
            if request is None:
                break
            count = min(request.unread, budget)
            # a row has the same bits in every pass of more than FEW_TOKENS rows, so a longer prompt has no other parts
            if request.unread - count <= FEW_TOKENS:
                count = request.unread
            elif count <= FEW_TOKENS:
                break
            parts.append((request, count))
            names.update(request.names[:1])
            budget -= cost(request, count)
        return parts

    def _begin(self, names: set[bytes]) -> Request | None:
        """The first in the queue, once there is room for it. One of these names waits for the pages to share."""
        if not self.waiting or len(self.running) + len(self.reading) == self.max_rows:
            return None
        request = self.waiting[0]
        if not names.isdisjoint(request.names[:1]):
            return None
        # what is left to read gives the logits, and must be too long for a pass of a few rows
        most = max(0, len(request.prompt) - FEW_TOKENS - 1) // self.pages.size
        shared = self.pages.find(request.names[:most])
        pages = self.pages.take(self.pages.needed(request.plan.total - 1), shared)
        if pages is None:
            return None
        with self._queue_lock:
            self.waiting.popleft()
        request.pages, request.read = pages, len(shared) * self.pages.size
        request.table = torch.zeros(self.longest, dtype=torch.int32)
        request.table[: len(pages)] = torch.tensor(pages, dtype=torch.int32)
        request.table = request.table.to(self.model.device)
        self.reading.append(request)
        return request

    def _read(self, parts: list[tuple[Request, int]]) -> list[Request]:
        """Reads parts of prompts in one pass, layer by layer, and writes the first tokens of those that end."""
        counts = [count for _, count in parts]
        spans = [(request, request.read, request.read + count) for request, count in parts]
        caches = [SequenceCache(self.buffers, r.table[: len(r.pages)].long(), begin) for r, begin, _ in spans]
        device = self.model.device
        try:
            out = self.model(
                torch.cat([request.ids[:, begin:end] for request, begin, end in spans], 1),
                past_key_values=PackedCache(caches, counts),
                position_ids=torch.cat([torch.arange(begin, end, device=device) for _, begin, end in spans])[None],
                use_cache=True,
                logits_to_keep=torch.tensor(counts, device=device).cumsum(0) - 1,
            )
        except Exception as error:
            for request, _ in parts:
                self._end(request, "error", error)
            return [request for request, _ in parts]
        for request, begin, end in spans:
            for page in range(begin // self.pages.size, min(end // self.pages.size, len(request.names))):
                self.pages.hold(request.pages[page], request.names[page])
        ends = [i for i, (request, _, end) in enumerate(spans) if end == len(request.prompt)]
        if ends:
            self._choose([parts[i][0] for i in ends], out.logits[0, ends].float())
        for request, _, end in spans:
            request.read = end  # last, so that an interrupted pass is run again
        return [parts[i][0] for i in ends]

    def _write_tokens(self, requests: list[Request]) -> list[Request]:
        counts = [request.unread for request in requests]
        tokens = torch.cat([r.ids[0, r.length - count : r.length] for r, count in zip(requests, counts, strict=True)])
        places = [place for r, n in zip(requests, counts, strict=True) for place in range(r.length - n, r.length)]
        lengths = torch.tensor(places, device=tokens.device)
        tables = torch.stack([request.table for request in requests])
        starts, several = torch.zeros_like(lengths), {}
        if len(tokens) > len(requests):
            of_requests = torch.tensor(counts)
            several["sequences"] = torch.arange(len(requests)).repeat_interleave(of_requests)
            several["logits_of"] = of_requests.cumsum(0) - 1
        try:
            if tokens.is_cuda:
                logits = step_by_ops(tokens, lengths, self.buffers, self.step_model, block_table=tables)
            else:
                logits = decode_step(
                    tokens, lengths, starts, lengths, self.buffers, self.step_model, block_table=tables, **several
                )
        except Exception as error:
            for request in requests:
                self._end(request, "error", error)
            return requests
        self._choose(requests, logits.float())
        return requests

    def _choose(self, requests: list[Request], logits: torch.Tensor) -> None:
        """Appends to each request the token that its row of logits (rows, vocab) chooses.

        What goes wrong ends the request that it is about.
        """
        finite, best = logits.sum(-1).isfinite().tolist(), logits.max(-1).indices.tolist()
        for request, row, is_finite, token in zip(requests, logits.split(1), finite, best, strict=True):
            try:
                if not is_finite:
                    request.plan.check(row[:, None])
                self._append(request, row, token)
            except Exception as error:
                self._end(request, "error", error)

    def _append(self, request: Request, logits: torch.Tensor, best: int) -> None:
        plan, length, token = request.plan, request.length, best
        if not request.is_greedy:
            scores = process(request.processors, request.ids[:, :length], logits)
            token = int(next_tokens(plan, scores, torch.zeros(1, dtype=torch.long), 1))
        request.ids[0, length] = token
        ended = token in plan.ends if request.ends_by_token else bool(plan.finished(request.ids[:, : length + 1]))
        if request.top is not None:
            request.logprobs.append(log_probabilities(logits[0], token, request.top))
        if request in self.reading:
            self.reading.remove(request)
            self.running.append(request)
        request.tokens.append(token)
        if ended or length + 1 == plan.total:
            self._end(request, "stop" if ended else "length")


def cost(request: Request, count: int) -> int:
    """Of reading tokens of a prompt, in tokens of a long one: in a step they take about twice as long."""
    return 2 * count if request.is_short else count


def groups(requests: list[Request]) -> Iterator[list[Request]]:
    """The requests in their order, as many together as a step takes."""
    group, rows = [], 0
    for request in requests:
        if rows + request.unread > MOST_ROWS:
            yield group
            group, rows = [], 0
        group.append(request)
        rows += request.unread
    if group:
        yield group


def check_settings(s: Settings) -> None:
    """Raises for what `generate` does and an engine does not."""
    neutral = {"num_beams": 1, "num_return_sequences": 1, "prompt_lookup_num_tokens": None, "use_cache": True}
    for name, value in (neutral | {"return_dict_in_generate": False}).items():
        if getattr(s, name) != value:
            raise NotImplementedError(f"{name} must be {value} in an Engine, got {getattr(s, name)!r}")


def log_probabilities(logits: torch.Tensor, token: int, top: int) -> tuple[float, dict[int, float]]:
    """Of a token, and of the `top` likeliest tokens."""
    log_p = logits.log_softmax(-1)
    best = log_p.topk(top)
    return float(log_p[token]), dict(zip(best.indices.tolist(), best.values.tolist(), strict=True))
