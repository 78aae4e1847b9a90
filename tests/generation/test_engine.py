"""The engine: each request gets the tokens and bits that it gets alone, and every page comes back."""

import threading

import pytest
import torch
from torch import nn

from lmkernels.generation import Engine, QueueFull, engine
from lmkernels.generation.pages import Pages
from lmkernels.models.quantized import quantize

from .conftest import VOCAB, random_model
from .test_fused import LLAMA

MODELS = {
    "float32": ({}, torch.float32, None),
    "bfloat16": ({}, torch.bfloat16, None),
    "as Llama": (LLAMA, torch.float32, None),
    "as Llama, bfloat16": (LLAMA, torch.bfloat16, None),
    "int8": ({}, torch.float32, "int8"),
    "int4": (LLAMA, torch.bfloat16, "int4"),
}
LONG = {"n_positions": 160, "n_embd": 48, "n_head": 4}


@pytest.fixture(scope="module", params=MODELS)
def any_model(request):
    sizes, dtype, bits = MODELS[request.param]
    model = random_model(**(LONG | sizes)).to(dtype)
    if bits is not None:
        quantize(model, bits)
    return model


@pytest.fixture(scope="module")
def long_model():
    return random_model(**LONG)


def prompts(count: int, longest: int = 90) -> list[list[int]]:
    """Of all lengths; every second one begins as the others do."""
    random = torch.Generator().manual_seed(0)
    draw = lambda n: torch.randint(VOCAB - 1, (n,), generator=random).tolist()  # noqa: E731
    common = draw(longest)
    lengths = torch.randint(1, longest, (count,), generator=random).tolist()
    return [(common[: n - n // 4] if i % 2 else []) + draw(n // 4 + 1 if i % 2 else n) for i, n in enumerate(lengths)]


def run(engine: Engine) -> list:
    """The requests in the order in which they ended."""
    ended = []
    while engine.busy:
        ended += [request for request in engine.step() if request.done]
    return ended


def all_free(engine: Engine) -> bool:
    pages = engine.pages
    return pages.free == pages.count and not any(pages.users) and not engine.busy


def new_tokens(model, prompt: list[int], **settings) -> list[int]:
    return model.generate([prompt], **settings)[0, len(prompt) :].tolist()


def test_every_request_gets_the_tokens_that_generate_writes(any_model):
    """More rows than a step takes, few pages, short passes, prompts that share pages, arrivals while others run."""
    engine = Engine(any_model, max_rows=20, pages=80, page_size=8, chunk=40)
    settings = [
        {"max_new_tokens": 1 + 3 * i % 17, "do_sample": bool(i % 3), "seed": i, "repetition_penalty": 1 + i % 2 / 5}
        for i in range(30)
    ]
    requests = []
    for prompt, s in zip(prompts(30), settings, strict=True):
        requests.append(engine.add(prompt, **s))
        engine.step()
    run(engine)
    for request, s in zip(requests, settings, strict=True):
        assert request.tokens == new_tokens(any_model, request.prompt, **s)
        assert request.finish_reason == ("stop" if request.tokens[-1] == VOCAB - 1 else "length")
    assert all_free(engine)


def test_logits_are_the_same_bits_whatever_else_runs(any_model):
    def keep(rows):
        def processor(ids, scores):
            rows.append(scores.clone())
            return scores

        return processor

    def logits(engine, prompt):
        seen = []
        request = engine.add(prompt, max_new_tokens=12, logits_processor=[keep(seen)], eos_token_id=[])
        return request, seen

    some = prompts(9)
    together = Engine(any_model, max_rows=9, page_size=8, chunk=36)
    for _ in range(2):  # the second time from shared pages
        found = [logits(together, prompt)[1] for prompt in some]
        run(together)
        for prompt, seen in zip(some, found, strict=True):
            alone = Engine(any_model, max_rows=1, page_size=16)
            expected = logits(alone, prompt)[1]
            run(alone)
            options = {"output_logits": True, "return_dict_in_generate": True, "eos_token_id": []}
            written = any_model.generate([prompt], max_new_tokens=12, **options).logits
            assert len(seen) == len(expected) == len(written) == 12
            assert all(map(torch.equal, seen, expected)) and all(map(torch.equal, seen, written))


def test_a_prompt_of_a_few_tokens_lends_no_pages(long_model):
    """It is read in a pass of a few rows, whose bits are others."""
    prompt = [*range(40), *range(24)]
    engine, options = Engine(long_model, page_size=8), {"max_new_tokens": 3, "eos_token_id": [], "logprobs": 9}
    alone = engine.add(prompt, **options)
    run(engine)
    engine = Engine(long_model, page_size=8)
    short = engine.add(prompt[:32], **options)
    engine.step()
    after = engine.add(prompt, **options)
    engine.step()
    assert not set(after.pages) & set(short.pages)
    run(engine)
    assert after.logprobs == alone.logprobs


def test_prompts_are_read_together(long_model, monkeypatch):
    """Long ones in a pass of theirs, up to where they begin alike; short ones with the tokens that are written."""
    engine_, passes, steps, step = Engine(long_model, max_rows=16, page_size=8), [], [], engine.decode_step
    forward = long_model.forward
    monkeypatch.setattr(long_model, "forward", lambda ids, **o: (passes.append(ids.shape[1]), forward(ids, **o))[1])
    monkeypatch.setattr(engine, "decode_step", lambda ids, *a, **o: (steps.append(ids.numel()), step(ids, *a, **o))[1])
    settings = {"max_new_tokens": 5, "eos_token_id": []}
    requests = [engine_.add([1, 2], **settings)]
    engine_.step()
    requests += [engine_.add([i] * n, **settings) for i, n in ((3, 40), (4, 32), (5, 50), (6, 1), (3, 47), (7, 33))]
    engine_.step()
    assert passes == [40 + 50, 47 - 8 + 33], "a page of the first is shared"
    assert steps == [2, 1 + 32 + 1]
    run(engine_)
    for request in requests:
        assert request.tokens == new_tokens(long_model, request.prompt, **settings)
    assert all_free(engine_)


def test_tokens_come_as_they_are_written(long_model):
    engine = Engine(long_model)
    first = engine.add([1, 2, 3], max_new_tokens=9, eos_token_id=[])
    tokens = iter(first)
    got = [next(tokens), next(tokens)]
    assert not first.done and len(first.tokens) == 2
    second = engine.add([1, 2, 3], max_new_tokens=9, eos_token_id=[])
    got += list(tokens)
    assert got == first.tokens and first.finish_reason == "length"
    assert list(second) == first.tokens == list(first), "read again, and after the end"


def test_a_long_prompt_does_not_stall_the_others(long_model):
    engine = Engine(long_model, chunk=36, page_size=8)
    short = engine.add([1, 2], max_new_tokens=60, eos_token_id=[])
    engine.step()
    long = engine.add(prompts(1)[0] + [3] * 60, max_new_tokens=2)
    steps = 0
    while not long.tokens:
        before = len(short.tokens)
        engine.step()
        steps += 1
        assert len(short.tokens) == before + 1
    assert steps >= len(long.prompt) // 40


def test_first_come_first_served_in_the_rows_that_there_are(long_model):
    engine = Engine(long_model, max_rows=2)
    requests = [engine.add([i], max_new_tokens=4, eos_token_id=[]) for i in range(5)]
    begun = []
    while engine.busy:
        engine.step()
        assert len(engine.running) <= 2
        begun += [r for r in requests if r.tokens and r not in begun]
    assert begun == requests


def test_requests_wait_for_pages_and_are_never_overtaken(long_model):
    engine = Engine(long_model, pages=10, page_size=8)
    large = [engine.add([1] * 44, max_new_tokens=10, eos_token_id=[]) for _ in range(2)]  # 7 pages each, 1 is shared
    small = engine.add([5], max_new_tokens=2, eos_token_id=[])
    engine.step()
    assert large[0].tokens and not large[1].tokens and not small.tokens
    assert [r for r in run(engine) if r in large] == large
    assert all_free(engine)
    for request in (*large, small):
        assert request.tokens == new_tokens(
            long_model, request.prompt, max_new_tokens=len(request.tokens), eos_token_id=[]
        )


def test_prompts_that_begin_alike_share_pages_and_are_read_once(long_model):
    engine = Engine(long_model, pages=40, page_size=8)
    common = [*range(40), *range(30)]  # 8 pages and a part
    first = engine.add(common, max_new_tokens=20, eos_token_id=[])
    engine.step()
    used = engine.pages.count - engine.pages.free
    second = engine.add([*common[:50], 7, *common[:33]], max_new_tokens=20, eos_token_id=[])
    engine.step()
    # 6 pages are the same
    assert second.pages[:6] == first.pages[:6] and not set(second.pages[6:]) & set(first.pages)
    assert engine.pages.count - engine.pages.free == used + len(second.pages) - 6
    run(engine)
    assert all_free(engine)
    third = engine.add(common, max_new_tokens=1)
    passes = []
    hook = lambda ids, **_: passes.append(ids.shape[1])  # noqa: E731
    forward = engine.model.forward
    engine.model.forward = lambda *arguments, **options: (hook(*arguments), forward(*arguments, **options))[1]
    try:
        run(engine)
    finally:
        del engine.model.forward
    assert third.tokens == first.tokens[:1]
    assert passes == [len(common) - 32], "what a request that is done has left"


def test_pages_that_are_needed_are_forgotten_the_longest_unused_first():
    pages = Pages(4, 2)
    old, new = pages.names([1, 2]), pages.names([1, 2, 3, 4])
    assert new[0] == old[0] and pages.names([3, 4])[0] != new[1]
    taken = pages.take(2)
    pages.hold(taken[0], new[0])
    pages.hold(taken[1], new[1])
    assert pages.find(new) == taken
    pages.give_back(taken)
    assert pages.free == 4 and pages.find(new) == taken
    assert not set(pages.take(2)) & set(taken), "empty ones first"
    assert pages.take(1) == [taken[1]], "then the end of a prompt"
    assert pages.find(new) == [taken[0]]
    assert pages.take(2, shared=[taken[0]]) is None and pages.free == 1 and pages.users[taken[0]] == 0
    assert pages.take(1, shared=[taken[0]]) == [taken[0]]


def test_a_cancelled_request_frees_its_pages_wherever_it_stands(long_model):
    engine = Engine(long_model, max_rows=2, chunk=36, page_size=8)
    kept = engine.add([1, 2, 3], max_new_tokens=40, eos_token_id=[])
    running = engine.add([3], max_new_tokens=40, eos_token_id=[])
    reading = engine.add([4] * 100, max_new_tokens=40)
    waiting = engine.add([5], max_new_tokens=40)
    engine.step()
    running.cancel()
    engine.step()
    assert engine.reading == [reading]
    for request in (reading, waiting, waiting):
        request.cancel()
    assert not engine.waiting and not engine.reading
    assert engine.pages.count - engine.pages.free == len(kept.pages)
    count = len(running.tokens)
    run(engine)
    kept.cancel()
    assert [r.finish_reason for r in (kept, running, reading, waiting)] == ["length"] + 3 * ["cancelled"]
    assert len(running.tokens) == count and list(reading) == []
    assert kept.tokens == new_tokens(long_model, [1, 2, 3], max_new_tokens=40, eos_token_id=[])
    assert all_free(engine)


def test_what_goes_wrong_ends_the_request_that_it_is_about(long_model):
    def late(ids, scores):
        if ids.shape[1] > 5:
            raise ArithmeticError("late")
        return scores

    def interrupt(ids, scores):
        if ids.shape[1] == 5 and not interrupted:
            interrupted.append(True)
            raise KeyboardInterrupt
        return scores

    interrupted = []
    engine = Engine(long_model)
    good = engine.add([1, 2, 3], max_new_tokens=10, eos_token_id=[], logits_processor=[interrupt])
    wrong = engine.add([1, 2, 3], max_new_tokens=10, eos_token_id=[], logits_processor=[late])
    barred = engine.add([1, 2, 3], max_new_tokens=10, suppress_tokens=list(range(VOCAB)))
    with pytest.raises(KeyboardInterrupt):
        run(engine)
    run(engine)
    assert good.tokens == new_tokens(long_model, [1, 2, 3], max_new_tokens=10, eos_token_id=[])
    assert wrong.tokens == good.tokens[:3] and wrong.finish_reason == "error"
    with pytest.raises(ArithmeticError, match="late"):
        list(wrong)
    with pytest.raises(ValueError, match="leave no token to choose"):
        list(barred)
    assert all_free(engine)


def test_a_broken_checkpoint_is_named(long_model):
    broken = random_model(**LONG)
    broken.transformer.ln_f.weight.data[0] = torch.nan
    with pytest.raises(FloatingPointError, match="NaN or infinity"):
        list(Engine(broken).add([1], max_new_tokens=3))


def test_a_failing_pass_or_step_leaves_no_pages_taken(long_model, monkeypatch):
    def fail(*_, **__):
        raise MemoryError("none left")

    running, reading = Engine(long_model), Engine(long_model)
    first = running.add([1], max_new_tokens=3, eos_token_id=[])
    running.step()
    monkeypatch.setattr(engine, "decode_step", fail)
    monkeypatch.setattr(reading.model, "forward", fail)
    requests = [first, running.add([2], max_new_tokens=3)]
    requests += [reading.add([i] * 30, max_new_tokens=3) for i in range(2)]
    for request in requests:
        with pytest.raises(MemoryError):
            list(request)
    assert all_free(running) and all_free(reading)


def test_stop_strings_and_criteria(long_model):
    class Tokenizer:
        def decode(self, ids, skip_special_tokens):
            return " ".join(map(str, ids)) + " "

    engine = Engine(long_model)
    plain = list(engine.add([1, 2], max_new_tokens=8, eos_token_id=[]))
    text = f" {plain[3]} {plain[4]} "
    stopped = engine.add([1, 2], max_new_tokens=8, eos_token_id=[], stop_strings=text, tokenizer=Tokenizer())
    assert list(stopped) == plain[:5] and stopped.finish_reason == "stop"
    criterion = lambda ids, scores: ids.shape[1] == 4  # noqa: E731
    assert list(engine.add([1, 2], max_new_tokens=8, eos_token_id=[], stopping_criteria=criterion)) == plain[:2]


def test_log_probabilities(long_model):
    request = Engine(long_model).add([1, 2], max_new_tokens=4, eos_token_id=[], logprobs=3)
    tokens = list(request)
    options = {"return_dict_in_generate": True, "output_logits": True, "eos_token_id": []}
    written = long_model.generate([[1, 2]], max_new_tokens=4, **options).logits
    for token, logits, (log_p, top) in zip(tokens, written, request.logprobs, strict=True):
        expected = logits[0].log_softmax(-1)
        assert log_p == expected[token] and top == {token: log_p} | top
        assert list(top.values()) == expected.topk(3).values.tolist()


def test_draws_without_a_seed_follow_torchs(long_model):
    def draw():
        torch.manual_seed(4)
        engine = Engine(long_model)
        requests = [engine.add([1, 2], max_new_tokens=8, do_sample=True, eos_token_id=[]) for _ in range(2)]
        run(engine)
        return [request.tokens for request in requests]

    assert draw() == draw() and draw()[0] != draw()[1]


def test_threads_add_iterate_and_cancel_at_once(long_model):
    engine = Engine(long_model, max_rows=4, pages=40, page_size=8, chunk=36)
    settings = {"max_new_tokens": 12, "eos_token_id": []}
    expected = {tuple(prompt): new_tokens(long_model, prompt, **settings) for prompt in prompts(6)}
    errors = []

    def work(number):
        for i, (prompt, tokens) in enumerate(expected.items()):
            request = engine.add(list(prompt), **settings)
            if (i + number) % 4 == 0:
                next(iter(request))
                request.cancel()
            elif list(request) != tokens:
                errors.append((number, prompt))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    run(engine)
    assert not errors and all_free(engine)


def test_ten_thousand_requests_leave_no_page_taken(monkeypatch):
    """Short ones, half of which end otherwise than they would: cancelled, refused, or by an error of their own."""
    model = random_model(n_layer=1, n_embd=8, n_head=1)
    engine = Engine(model, max_rows=16, pages=30, page_size=4, max_queue=20)
    random = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 30, (10_000,), generator=random).tolist()
    ends, live, refused = {}, [], 0

    def fail(ids, scores):
        raise ValueError("on purpose")

    for i, n in enumerate(lengths):
        try:
            request = engine.add([1] * n, max_new_tokens=1 + i % 3, logits_processor=[fail] if i % 7 == 0 else None)
        except QueueFull:
            refused += 1
            engine.step()
            continue
        live.append(request)
        if i % 4 == 0:
            live.pop(i % len(live)).cancel()
        if i % 9 == 0:
            for changed in engine.step():
                ends[changed.finish_reason] = ends.get(changed.finish_reason, 0) + 1
            live = [request for request in live if not request.done]
        assert engine.pages.free == engine.pages.users.count(0)
    run(engine)
    assert all_free(engine) and all(request.done and not request.pages for request in live)
    assert refused > 100 and ends["error"] > 100 and ends["length"] > 100


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_rows": 0}, ValueError, "max_rows must be a whole number of at least 1, got 0"),
        ({"max_queue": 1.5}, ValueError, "max_queue must be a whole number"),
        ({"chunk": 32}, ValueError, "chunk must be a whole number of at least 33, got 32"),
        ({"memory": 10}, ValueError, "memory must hold a page of .* bytes or more"),
        ({"memory": 10, "pages": 3}, ValueError, "give one of them"),
    ],
)
def test_bad_sizes_are_named_errors(model, options, error, message):
    with pytest.raises(error, match=message):
        Engine(model, **options)


@pytest.mark.parametrize(
    ("prompt", "settings", "error", "message"),
    [
        ([], {}, ValueError, "got an empty prompt"),
        ([VOCAB], {}, ValueError, "input_ids must lie in"),
        ([1] * 10, {"max_new_tokens": 16}, ValueError, r"cache of 24 tokens, got 10 \+ 16: give it more memory"),
        ([1] * 40, {"max_new_tokens": 10}, ValueError, "max_new_tokens must keep prompt and new tokens within n_posi"),
        ([1], {"num_beams": 2}, NotImplementedError, "num_beams must be 1 in an Engine, got 2"),
        ([1], {"do_sample": True, "num_return_sequences": 2}, NotImplementedError, "num_return_sequences must be 1"),
        ([1], {"top_q": 2}, ValueError, "top_q"),
        ([1], {"logprobs": -1}, ValueError, "logprobs must be a whole number"),
        ([1], {"temperature": 0.0}, ValueError, "temperature must be a positive number"),
    ],
)
def test_what_can_never_run_is_refused_at_once(model, prompt, settings, error, message):
    engine = Engine(model, pages=3, page_size=8)
    with pytest.raises(error, match=message):
        engine.add(prompt, **settings)
    assert not engine.busy
    assert len(list(engine.add([1] * 10, max_new_tokens=15, eos_token_id=[]))) == 15, "what just fits runs"


def test_a_full_queue_refuses_and_memory_says_how_many_pages(model):
    page_bytes = 2 * 2 * 24 * 8 * 4
    engine = Engine(model, memory=5 * page_bytes + 7, page_size=8, max_queue=2)
    assert engine.pages.count == 5
    for _ in range(2):
        engine.add([1], max_new_tokens=2)
    with pytest.raises(QueueFull, match="2 requests are waiting"):
        engine.add([1], max_new_tokens=2)
    engine.step()
    engine.add([1], max_new_tokens=2)


def test_models_that_are_not_plain_are_refused_with_the_reason():
    hooked, replaced = random_model(), random_model()
    hooked.lm_head.register_forward_hook(lambda *_: None)
    with pytest.raises(NotImplementedError, match="lm_head has a hook"):
        Engine(hooked)

    class Mine(nn.Linear):
        pass

    replaced.lm_head = Mine(24, VOCAB, bias=False)
    with pytest.raises(NotImplementedError, match="a module has been replaced"):
        Engine(replaced)
