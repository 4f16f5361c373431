"""The engine: what each work gets is what it would get alone, and no work disturbs another."""

import asyncio
import random
from itertools import pairwise

import pytest
import torch

import mnemic
from mnemic.core.errors import ConfigError, UnsupportedError
from mnemic.hosts.stream import Stream
from mnemic.serving.engine import Engine
from mnemic.serving.errors import (
    DeadlineExceeded,
    InvalidRequest,
    OutOfMemory,
    Overloaded,
    ShuttingDown,
    StepFailed,
    TooLarge,
)
from mnemic.serving.requests import Finished, Limits, Progress, SamplingParams, Token, Work
from tests.hosts.models import word_tokenizer
from tests.serving.serving_models import GREEDY, collect, ids_of, serve, served_model, text_of
from tests.tiny import VOCABULARY, random_ids, tiny_host


@pytest.fixture(scope="module")
def lm2():
    return served_model("lm2")


def prompt(count, seed=0):
    return random_ids(count, seed=seed).tolist()


def greedy(count, **given):
    return SamplingParams(temperature=0, max_tokens=count, **given)


def alone(model, ids, count, stream=None):
    """A local stream that reads and generates: its tokens, and itself."""
    stream = model.stream() if stream is None else stream.fork()
    new = stream.generate([ids], return_ids=True, max_new_tokens=count, do_sample=False)
    return new, stream


def same_state(found, expected):
    assert torch.equal(found.cache.open, expected.cache.open)
    assert torch.equal(found.cache.seen, expected.cache.seen)
    mine, theirs = found._tensors(), expected._tensors()
    # Traces and buffers may hold unused room, as large as that of a neighbour once was.
    for name in (n for n in theirs if not n.startswith(("trace/", "buffers/"))):
        torch.testing.assert_close(mine[name], theirs[name], atol=1e-5, rtol=0, msg=name)


@pytest.mark.parametrize("memory", ["lm2", "rmt", "window", "titans", "gated-deltanet", "dmc"])
def test_works_that_join_and_leave_at_random_get_what_they_would_get_alone(memory):
    model, draw = served_model(memory), random.Random(3)
    works = [(prompt(draw.randint(1, 30), seed=i), draw.randint(1, 6)) for i in range(16)]
    delays = [draw.random() * 0.15 for _ in works]

    async def talk(engine):
        async def one(delay, ids, count):
            await asyncio.sleep(delay)
            return await collect(engine, Work(prompt=ids, sampling=greedy(count)))

        first = await asyncio.gather(*(one(d, *w) for d, w in zip(delays, works, strict=True)))
        # Second turns of some, together.
        turns = (Work(prompt=[5, 6, 7], sampling=greedy(3), stream=last.stream) for _, last in first[:4])
        return first, await asyncio.gather(*(collect(engine, work) for work in turns))

    limits = Limits(max_rows=7, prefill_chunk=12, prefill_tokens=40)
    first, second = serve(model, talk, limits=limits)
    streams = []
    for (ids, count), (events, last) in zip(works, first, strict=True):
        expected, stream = alone(model, ids, count)
        assert ids_of(events) == expected
        same_state(last.stream, stream)
        assert (last.reason, last.usage.prompt_tokens, last.usage.completion_tokens) == ("length", len(ids), count)
        streams.append(stream)
    for (events, last), before in zip(second, streams, strict=False):
        expected, stream = alone(model, [5, 6, 7], 3, before)
        assert ids_of(events) == expected
        same_state(last.stream, stream)
        assert last.usage.cached_tokens == before.tokens_seen


def test_the_stream_given_stays_as_it_is(lm2):
    stream = lm2.stream()
    stream.feed([prompt(11)])
    before = {n: t.clone() for n, t in stream._tensors().items()}
    events, last = serve(lm2, lambda e: collect(e, Work(prompt=prompt(9, 1), sampling=greedy(4), stream=stream)))
    assert all(torch.equal(t, before[n]) for n, t in stream._tensors().items())
    assert (stream.tokens_seen, last.stream.tokens_seen) == (11, 24)
    again = Stream.from_bytes(lm2, last.stream.to_bytes())
    assert again.generate(return_ids=True, max_new_tokens=3, do_sample=False) == last.stream.generate(
        return_ids=True, max_new_tokens=3, do_sample=False
    )
    assert len(ids_of(events)) == 4


def test_an_empty_prompt_goes_on_from_what_was_read(lm2):
    stream = lm2.stream()
    stream.feed([prompt(11)])
    events, last = serve(lm2, lambda e: collect(e, Work(prompt=[], sampling=greedy(5), stream=stream)))
    assert ids_of(events) == stream.fork().generate(return_ids=True, max_new_tokens=5, do_sample=False)
    assert last.usage.prompt_tokens == 0


def test_reading_alone_reports_progress_and_makes_nothing(lm2):
    ids = prompt(50)
    work = Work(prompt=ids, sampling=greedy(0))
    events, last = serve(lm2, lambda e: collect(e, work), limits=Limits(prefill_chunk=16))
    assert [(e.tokens_read, e.total) for e in events[:-1]] == [(16, 50), (32, 50), (48, 50), (50, 50)]
    assert last.reason == "read"
    same_state(last.stream, lm2.stream().feed([ids]))


def test_seeds_give_the_same_tokens_alone_and_in_company(lm2):
    work = Work(prompt=prompt(9), sampling=SamplingParams(seed=11, max_tokens=8, top_p=0.95))
    lone = ids_of(serve(lm2, lambda e: collect(e, work))[0])

    async def crowd(engine):
        others = [
            Work(prompt=prompt(n, n), sampling=SamplingParams(seed=n, temperature=n % 3, top_k=n % 5, max_tokens=n))
            for n in range(2, 12)
        ]
        return await asyncio.gather(*(collect(engine, w) for w in (*others, work, work)))

    *_, one, other = serve(lm2, crowd)
    assert ids_of(one[0]) == ids_of(other[0]) == lone
    differing = serve(lm2, lambda e: collect(e, Work(prompt=prompt(9), sampling=SamplingParams(seed=12, max_tokens=8))))
    assert ids_of(differing[0]) != lone


def test_end_tokens_end_the_answer_and_are_read(lm2):
    expected, _ = alone(lm2, prompt(9), 8)
    lm2.generation_config.eos_token_id = expected[3]
    try:
        events, last = serve(lm2, lambda e: collect(e, Work(prompt=prompt(9), sampling=greedy(8))))
        local, stream = alone(lm2, prompt(9), 8)
    finally:
        lm2.generation_config.eos_token_id = None
    assert last.reason == "end"
    assert ids_of(events) == local == expected[: expected.index(expected[3]) + 1]
    same_state(last.stream, stream)


def test_stop_strings_end_the_text(lm2):
    tokenizer = word_tokenizer()
    expected, _ = alone(lm2, prompt(9), 8)
    whole = tokenizer.decode(expected, skip_special_tokens=True)
    stop = whole[2:][4:9]
    work = Work(prompt=prompt(9), sampling=greedy(8, stop=[stop]))
    events, last = serve(lm2, lambda e: collect(e, work), tokenizer)
    assert (last.reason, last.stop) == ("stop", stop)
    assert text_of(events) == whole[: whole.index(stop)]
    # What was made is read, the token that completed the stop string included.
    made = len(ids_of(events))
    assert tokenizer.decode(expected[:made]).find(stop) >= 0 > tokenizer.decode(expected[: made - 1]).find(stop)
    assert last.stream.tokens_seen == 9 + made
    full, _ = serve(lm2, lambda e: collect(e, Work(prompt=prompt(9), sampling=greedy(8))), tokenizer)
    assert text_of(full) == whole


def test_what_closes_an_answer_is_read_once(lm2):
    expected, stream = alone(lm2, prompt(9), 4)
    closing = [7, 8]
    work = Work(prompt=prompt(9), sampling=greedy(4), closing=closing)
    same_state(serve(lm2, lambda e: collect(e, work))[1].stream, stream.fork().feed([closing]))
    work = Work(prompt=prompt(9), sampling=greedy(4), closing=[expected[-1], 8])
    same_state(serve(lm2, lambda e: collect(e, work))[1].stream, stream.fork().feed([[8]]))


def test_log_probabilities_are_those_of_the_hosts_logits(lm2):
    sampling = SamplingParams(seed=3, temperature=0.7, max_tokens=5, logprobs=3, logit_bias={9: 5.0})
    events, _ = serve(lm2, lambda e: collect(e, Work(prompt=prompt(9), sampling=sampling)))
    tokens = [e for e in events if isinstance(e, Token)]
    stream = lm2.stream().feed([prompt(9)])
    for token in tokens:
        logs = stream.cache.last_logits[0].float().log_softmax(-1)
        values, ids = logs.topk(3)
        assert token.logprob == pytest.approx(float(logs[token.id]), abs=1e-5)
        assert [i for i, _ in token.top] == ids.tolist()
        assert [v for _, v in token.top] == pytest.approx(values.tolist(), abs=1e-5)
        stream.feed([[token.id]])


def test_a_client_that_leaves_frees_its_row(lm2):
    async def talk(engine):
        async with engine.submit(Work(prompt=prompt(9), sampling=greedy(4000))) as answer:
            async for event in answer:
                if isinstance(event, Token):
                    break
        # One row: this one runs only once the other's is free.
        events, _ = await collect(engine, Work(prompt=prompt(9), sampling=GREEDY))
        return ids_of(events), engine.stats()

    found, stats = serve(lm2, talk, limits=Limits(max_rows=1))
    assert found == alone(lm2, prompt(9), 6)[0]
    assert (stats.cancelled, stats.finished, stats.failed, stats.waiting) == (1, 1, 0, 0)


def test_a_closed_answer_has_no_more_events(lm2):
    async def talk(engine):
        answer = engine.submit(Work(prompt=prompt(9), sampling=GREEDY))
        await answer.aclose()
        return [event async for event in answer]

    assert serve(lm2, talk) == []


POISON = 60


class Bad:
    """A model that fails on a token, or has no memory for more than so many rows."""

    def __init__(self, model, rows=None):
        self.model, self.rows, self.calls = model, rows, []
        self.forward = type(model).forward

    def __enter__(self):
        def forward(model, input_ids, **given):
            self.calls.append(tuple(input_ids.shape))
            output = self.forward(model, input_ids, **given)
            # Late: the cache has been written to.
            if self.rows is not None and len(input_ids) > self.rows:
                raise torch.OutOfMemoryError("too many rows")
            if self.rows is None and bool((input_ids == POISON).any()):
                raise ValueError("a secret")
            return output

        type(self.model).forward = forward
        return self

    def __exit__(self, *_):
        type(self.model).forward = self.forward


@pytest.mark.parametrize("memory", ["lm2", "dmc"])
@pytest.mark.parametrize("place", ["prompt", "answer"])
def test_a_step_that_fails_fails_only_the_work_whose_fault_it_is(memory, place):
    model = served_model(memory)
    ids = [[t if t != POISON else 3 for t in prompt(20, seed)] for seed in range(6)]
    bad = SamplingParams(temperature=0, max_tokens=6, logit_bias={POISON: 100.0} if place == "answer" else {})
    avoid = {POISON: -100.0}

    async def talk(engine):
        works = [Work(prompt=row, sampling=greedy(6, logit_bias=avoid)) for row in ids]
        poisoned = ids[0] if place == "answer" else [*ids[0][:15], POISON, *ids[0][15:]]
        works.insert(2, Work(prompt=poisoned, sampling=bad))
        found = await asyncio.gather(*(collect(engine, w) for w in works), return_exceptions=True)
        return found, engine.stats()

    with Bad(model):
        found, stats = serve(model, talk)
    failed = found.pop(2)
    assert isinstance(failed, StepFailed)
    assert "secret" not in str(failed)
    assert isinstance(failed.__cause__, ValueError)
    assert (stats.failed, stats.finished) == (1, 6)

    lone = [
        serve(model, lambda e, row=row: collect(e, Work(prompt=row, sampling=greedy(6, logit_bias=avoid))))
        for row in ids
    ]
    for (events, last), (lone_events, lone_last) in zip(found, lone, strict=True):
        assert ids_of(events) == ids_of(lone_events)
        same_state(last.stream, lone_last.stream)


def test_out_of_memory_makes_steps_smaller_and_fails_nobody_who_fits(lm2):
    async def talk(engine):
        works = [Work(prompt=prompt(9, seed), sampling=greedy(5)) for seed in range(11)]
        return await asyncio.gather(*(collect(engine, w) for w in works))

    with Bad(lm2, rows=4) as bad:
        found = serve(lm2, talk)
    for seed, (events, last) in enumerate(found):
        expected, stream = alone(lm2, prompt(9, seed), 5)
        assert ids_of(events) == expected
        same_state(last.stream, stream)
    # It learns: few steps are tried in vain.
    assert sum(rows > 4 for rows, _ in bad.calls) <= 4


def test_out_of_memory_for_one_row_fails_that_work_and_the_engine_lives(lm2):
    async def talk(engine):
        with Bad(lm2, rows=0), pytest.raises(OutOfMemory, match="ran out of memory"):
            await collect(engine, Work(prompt=prompt(9), sampling=GREEDY))
        return await collect(engine, Work(prompt=prompt(9), sampling=GREEDY))

    assert ids_of(serve(lm2, talk)[0]) == alone(lm2, prompt(9), 6)[0]


def test_logits_that_are_no_numbers_fail_the_work(lm2):
    stream = lm2.stream().feed([prompt(9)])
    stream.cache.last_logits = stream.cache.last_logits * float("nan")

    async def talk(engine):
        bad, good = Work(prompt=[], sampling=GREEDY, stream=stream), Work(prompt=prompt(9), sampling=GREEDY)
        return await asyncio.gather(*(collect(engine, w) for w in (bad, good)), return_exceptions=True)

    bad, good = serve(lm2, talk)
    assert isinstance(bad, StepFailed)
    assert ids_of(good[0]) == alone(lm2, prompt(9), 6)[0]


class Mute:
    """A tokenizer that fails on one token."""

    def decode(self, ids, **_):
        if POISON in ids:
            raise RuntimeError("no such token")
        return "x" * len(ids)


def test_a_tokenizer_that_fails_fails_only_that_work(lm2):
    async def talk(engine):
        bad = Work(prompt=prompt(9), sampling=greedy(6, logit_bias={POISON: 100.0}))
        good = [Work(prompt=prompt(9, n), sampling=greedy(6, logit_bias={POISON: -100.0})) for n in range(3)]
        return await asyncio.gather(*(collect(engine, w) for w in (bad, *good)), return_exceptions=True)

    bad, *good = serve(lm2, talk, Mute())
    assert isinstance(bad, StepFailed)
    assert [text_of(events) for events, _ in good] == ["x" * 6] * 3


def test_a_long_document_stops_no_answer(lm2):
    steps = []

    async def talk(engine):
        document = asyncio.create_task(collect(engine, Work(prompt=prompt(600), sampling=greedy(0))))
        answers = [collect(engine, Work(prompt=prompt(5, n), sampling=greedy(12))) for n in range(3)]
        await asyncio.gather(*answers)
        before = len(steps)
        await document
        return before

    before = serve(lm2, talk, limits=Limits(prefill_chunk=16), observe=steps.append)
    kinds = [step.kind for step in steps[:before]]
    first = kinds.index("decode")
    last = before - 1 - kinds[::-1].index("decode")
    between = kinds[first : last + 1]
    assert between.count("decode") >= 12
    assert "prefill" in between
    assert all(pair != ("prefill", "prefill") for pair in pairwise(between))
    assert max(step.tokens for step in steps if step.kind == "prefill") <= 3 * 5 + 16
    assert len(kinds) < len(steps), "the document was read before the answers were made"


def test_tenants_take_turns(lm2):
    order = []

    async def talk(engine):
        async def one(name, tenant):
            await collect(engine, Work(prompt=prompt(3), sampling=greedy(1), tenant=tenant))
            order.append(name)

        await asyncio.gather(*(one(f"a{n}", "a") for n in range(4)), *(one(f"b{n}", "b") for n in range(2)))

    serve(lm2, talk, limits=Limits(max_rows=1))
    assert order.index("b0") < order.index("a2")
    assert order.index("b1") < order.index("a3")
    assert [name for name in order if name[0] == "a"] == ["a0", "a1", "a2", "a3"]


def test_the_queue_has_limits(lm2):
    async def talk(engine):
        long = Work(prompt=prompt(9), sampling=greedy(4000))
        running = engine.submit(long)
        async for event in running:
            if isinstance(event, Token):
                break
        waiting = [engine.submit(Work(prompt=prompt(9), sampling=GREEDY)) for _ in range(2)]
        with pytest.raises(Overloaded) as caught:
            engine.submit(Work(prompt=prompt(9), sampling=GREEDY))
        assert engine.stats().waiting == 2
        await waiting[1].aclose()
        await running.aclose()
        events = [event async for event in waiting[0]]
        return caught.value, events

    error, events = serve(lm2, talk, limits=Limits(max_rows=1, max_waiting=2))
    assert error.status == 429
    assert int(error.headers["Retry-After"]) >= 1
    assert isinstance(events[-1], Finished)

    async def many_tokens(engine):
        running = engine.submit(Work(prompt=prompt(9), sampling=greedy(4000)))
        async for event in running:
            if isinstance(event, Token):
                break
        engine.submit(Work(prompt=prompt(60), sampling=GREEDY))
        with pytest.raises(Overloaded):
            engine.submit(Work(prompt=prompt(60), sampling=GREEDY))

    serve(lm2, many_tokens, limits=Limits(max_rows=1, max_waiting_tokens=100))


def test_deadlines_count_from_submission(lm2):
    async def talk(engine):
        with pytest.raises(DeadlineExceeded):
            await collect(engine, Work(prompt=prompt(9), sampling=greedy(4000), deadline=0.1))
        return engine.stats()

    assert serve(lm2, talk).failed == 1


def test_stopping_drains_or_fails_what_is_there(lm2):
    async def drained():
        engine = Engine(lm2).start()
        answer = engine.submit(Work(prompt=prompt(9), sampling=GREEDY))
        await engine.stop()
        with pytest.raises(ShuttingDown):
            engine.submit(Work(prompt=prompt(9), sampling=GREEDY))
        return [event async for event in answer]

    assert ids_of(asyncio.run(drained())) == alone(lm2, prompt(9), 6)[0]

    async def dropped():
        engine = Engine(lm2).start()
        answer = engine.submit(Work(prompt=prompt(9), sampling=greedy(4000)))
        await engine.stop(drain=False)
        return [event async for event in answer]

    with pytest.raises(ShuttingDown):
        asyncio.run(dropped())


@pytest.mark.parametrize(
    "changes, error, words",
    [
        ({"prompt": []}, InvalidRequest, "empty"),
        ({"prompt": [3, VOCABULARY]}, InvalidRequest, "expected 0 to 60"),
        ({"prompt": [-1]}, InvalidRequest, "expected 0 to 60"),
        ({"prompt": [1.5]}, InvalidRequest, "list of token ids"),
        ({"prompt": ["a"]}, InvalidRequest, "token ids"),
        ({"prompt": [[1], [2]]}, InvalidRequest, "one list"),
        ({"prompt": [2**70]}, InvalidRequest, "token ids"),
        ({"prompt": [3] * 101}, TooLarge, "takes 100"),
        ({"closing": [99]}, InvalidRequest, "closing"),
        ({"sampling": SamplingParams(max_tokens=10**9)}, InvalidRequest, "max_tokens"),
        ({"sampling": SamplingParams(stop="x")}, InvalidRequest, "tokenizer"),
        ({"sampling": SamplingParams(logit_bias={61: 1.0})}, InvalidRequest, "logit_bias"),
        ({"deadline": 0.0}, InvalidRequest, "deadline"),
    ],
)
def test_works_that_cannot_be_done_are_refused_at_once(lm2, changes, error, words):
    async def talk(engine):
        with pytest.raises(error, match=words):
            engine.submit(Work(**{"prompt": [3], **changes}))
        return engine.stats()

    assert serve(lm2, talk, limits=Limits(max_prompt=100)).waiting == 0


def test_streams_of_others_are_refused(lm2):
    other = served_model("lm2")

    async def talk(engine):
        for stream in (other.stream().feed([prompt(3)]), lm2.stream(2).feed([prompt(3), prompt(3)])):
            with pytest.raises(InvalidRequest, match="another model"):
                engine.submit(Work(prompt=[3], stream=stream))

    serve(lm2, talk)


def test_memories_that_cannot_be_served_are_refused():
    model = mnemic.attach(tiny_host(), "lm2:reference_compat", segment=32)
    with pytest.raises(UnsupportedError, match="whole segments"):
        Engine(model)
    with pytest.raises(ConfigError, match="max_rows"):
        Limits(max_rows=0)


def test_memories_that_read_one_row_at_a_time_get_one_row(monkeypatch):
    model = served_model("lm2")
    monkeypatch.setattr(type(model.memory), "batch_safe", False)

    async def talk(engine):
        works = (Work(prompt=prompt(9, seed), sampling=greedy(4)) for seed in range(4))
        return await asyncio.gather(*(collect(engine, w) for w in works))

    for seed, (events, _) in enumerate(serve(model, talk)):
        assert ids_of(events) == alone(model, prompt(9, seed), 4)[0]


def test_progress_comes_before_tokens(lm2):
    events, _ = serve(lm2, lambda e: collect(e, Work(prompt=prompt(20), sampling=GREEDY)))
    kinds = [type(event) for event in events]
    assert kinds == [Progress] * kinds.count(Progress) + [Token] * 6 + [Finished]
