"""Quotas a minute: what is refused, when it goes through, and that others do not notice."""

import asyncio
import math
import random
from types import SimpleNamespace

import pytest

from mnemic.core.errors import ConfigError
from mnemic.serving.auth import Tenant, Tenants, hash_of, new_key
from mnemic.serving.errors import RateExceeded
from mnemic.serving.rates import Bucket
from tests.serving.http_tests import client_of, complete, new_session, refused
from tests.serving.serving_models import served_model

KEYS = {name: new_key()[0] for name in ("asks", "reads", "free")}


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(Bucket.__init__, "__defaults__", (clock,))
    return clock


def test_a_bucket_says_exactly_when():
    clock, draw = Clock(), random.Random(3)
    for per_minute in (1, 7, 60, 1000):
        bucket = Bucket(per_minute, clock)
        for _ in range(300):
            amount = draw.choice([1, draw.uniform(0, 1.5 * per_minute)])
            seconds = bucket.seconds_until(amount)
            if seconds:
                clock.now += 0.99 * seconds
                assert bucket.seconds_until(amount) == pytest.approx(0.01 * seconds, abs=1e-3)
                clock.now += 0.01 * seconds
            assert bucket.seconds_until(amount) == 0
            bucket.take(amount)
            clock.now += draw.uniform(0, 2)


def test_in_the_long_run_a_bucket_gives_its_rate_and_one_minute_more():
    clock = Clock()
    bucket, taken = Bucket(90, clock), 0
    while clock.now < 1000 + 600:
        if bucket.seconds_until(1):
            clock.now += 0.1
        else:
            bucket.take(1)
            taken += 1
    assert taken == 10 * 90 + 90


def test_what_is_overdrawn_comes_in_first():
    clock = Clock()
    bucket = Bucket(60, clock)
    assert bucket.seconds_until(1000) == 0
    bucket.take(1000)
    assert bucket.seconds_until(1) == 941
    assert bucket.seconds_until(1000) == 1000


def test_tenants_have_buckets_of_their_own(clock):
    tenants = {n: Tenant(name=n, keys=[hash_of(n)], requests_per_minute=2) for n in ("a", "b")}
    counted = Tenants(tenants)
    for _ in range(2):
        with counted.running(tenants["a"]):
            pass
    with (
        pytest.raises(RateExceeded, match="2 requests a minute: try again in 30 s") as caught,
        counted.running(tenants["a"]),
    ):
        pass
    assert caught.value.headers == {"Retry-After": "30"}
    with counted.running(tenants["b"]):
        pass
    # What was refused does not count.
    clock.now += 30
    with counted.running(tenants["a"]):
        pass


def test_a_request_beyond_those_that_may_run_takes_none_of_the_minute(clock):
    tenant = Tenant(name="a", keys=[hash_of("a")], requests_per_minute=2, max_running=1)
    counted = Tenants({"a": tenant})
    with counted.running(tenant):
        for _ in range(3):
            with pytest.raises(Exception, match="1 requests running"), counted.running(tenant):
                pass
    with counted.running(tenant):
        pass


@pytest.mark.parametrize("name", ["requests_per_minute", "tokens_per_minute"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, "9"])
def test_quotas_that_cannot_be_used(name, value):
    with pytest.raises(ConfigError, match=name):
        Tenant(name="a", keys=[hash_of("a")], **{name: value})


@pytest.fixture(scope="module")
def model():
    return served_model()


@pytest.fixture
def client(model, tmp_path, clock):
    tenants = {
        "asks": Tenant(name="asks", keys=[hash_of(KEYS["asks"])], requests_per_minute=2),
        "reads": Tenant(name="reads", keys=[hash_of(KEYS["reads"])], tokens_per_minute=60),
        "free": Tenant(name="free", keys=[hash_of(KEYS["free"])]),
    }
    with client_of(tmp_path, model, tenants=tenants) as client:
        yield client


def as_(client, name):
    client.headers["Authorization"] = f"Bearer {KEYS[name]}"
    return client


def test_requests_a_minute(client, clock):
    asks = as_(client, "asks")
    session = new_session(asks)
    assert complete(asks, [5]).status_code == 200
    assert asks.post(f"/v1/sessions/{session}/documents", content=b"w5").status_code == 200
    for response in (complete(asks, [5]), asks.post(f"/v1/sessions/{session}/documents", content=b"w5")):
        refused(response, 429, "rate_limit_exceeded")
        assert response.headers["retry-after"] == "30"
    # Looking things up costs nothing, and others are not concerned.
    assert asks.get(f"/v1/sessions/{session}").json()["version"] == 1
    assert complete(as_(client, "free"), [5]).status_code == 200
    clock.now += 30
    assert complete(as_(client, "asks"), [5]).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_of_prompts_and_answers_a_minute(client, clock, stream):
    reads = as_(client, "reads")
    assert complete(reads, [5] * 30, 40, stream=stream).status_code == 200
    response = complete(reads, [5] * 20)
    assert "60 tokens a minute" in refused(response, 429, "rate_limit_exceeded")
    # 70 of 60 were used; 20 are there when 30 have come in.
    assert response.headers["retry-after"] == "30"
    clock.now += 29
    assert complete(reads, [5] * 20, 1).status_code == 429
    clock.now += 1
    assert complete(reads, [5] * 20, 1).status_code == 200


def test_choices_count_each(client, clock):
    reads = as_(client, "reads")
    assert complete(reads, [5] * 10, 5, n=4).status_code == 200
    assert complete(reads, [5]).headers["retry-after"] == "1"


def test_a_refused_request_leaves_its_session_as_it_was(client, clock):
    reads = as_(client, "reads")
    session = new_session(reads)
    assert complete(reads, [5] * 60, 1, session=session).status_code == 200
    assert complete(reads, [5], session=session).status_code == 429
    assert reads.get(f"/v1/sessions/{session}").json()["version"] == 1
    clock.now += 5
    assert complete(reads, [5], session=session).json()["session"]["version"] == 2


def test_a_document_that_has_begun_waits_for_the_next_minute(client, clock, monkeypatch):
    # 20 lines, which are 40 tokens.
    monkeypatch.setattr("mnemic.serving.uploads.LONGEST", 120)
    monkeypatch.setattr("mnemic.serving.uploads.PIECE", 120)
    waited = []

    async def fast(seconds):
        waited.append(seconds)
        clock.now += seconds

    monkeypatch.setattr("mnemic.serving.feeding.asyncio", SimpleNamespace(to_thread=asyncio.to_thread, sleep=fast))
    reads = as_(client, "reads")
    session, words = new_session(reads), 200
    fed = reads.post(f"/v1/sessions/{session}/documents", content=b"w5 w5\n" * (words // 2))
    assert fed.json()["tokens_read"] == words
    # What a minute holds was there at the beginning; the last piece may be paid back later.
    assert words - 60 - 40 <= sum(waited) <= words - 60 + 2
    assert max(waited) <= 1
    response = reads.post(f"/v1/sessions/{session}/documents", content=b"w5 " * 50)
    refused(response, 429, "rate_limit_exceeded")
    clock.now += math.floor(float(response.headers["retry-after"])) + 1
    assert reads.post(f"/v1/sessions/{session}/documents", content=b"w5 " * 50).status_code == 200
