"""A compiled segment step gives the numbers of the eager one, forward and backward, without a graph break."""

import pytest
import torch

from tests.contract.cases import (
    CASES,
    FIRST,
    LENGTH,
    assert_states_close,
    build,
    case,
    chunked,
    pairs,
    parallel,
    random_ids,
)
from tests.tiny import HOSTS

# Dynamo looks at `.grad` of every tensor it is given, those that are not leaves included.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")

# A trace takes from ten seconds to two minutes, so most memories are compiled by the slow tests alone.
DEFAULT = (*FIRST, "deltanet")
USUAL = [c for c in CASES if c.usual and c.memory in DEFAULT]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def _trained(model, ids):
    model.zero_grad(set_to_none=True)
    output = model(ids, labels=ids)
    output.loss.backward()
    return output, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def _check_training(case, host):
    model = build(case, host).train()
    ids = random_ids(2, LENGTH)
    expected, grads = _trained(model, ids)
    model.compile_step(backend="aot_eager", fullgraph=True)
    got, same = _trained(model, ids)
    torch.testing.assert_close(got.logits, expected.logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(got.loss, expected.loss, atol=1e-5, rtol=0)
    assert_states_close(got.memory_state, expected.memory_state, atol=1e-5)
    assert same.keys() == grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(same[name], grad, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def _check_cached(case, host):
    model = build(case, host)
    ids = random_ids(2, LENGTH)
    expected = parallel(model, ids)
    model.compile_step(backend="aot_eager", fullgraph=True)
    logits, cache = chunked(model, ids, [5, 1, 1, 9, 13])
    torch.testing.assert_close(logits, expected.logits, atol=1e-4, rtol=0)
    assert_states_close(cache.state, expected.memory_state)


@pairs(USUAL, hosts=("llama", "gpt2"), usual_hosts=("llama",))
def test_compiled_training(case, host):
    _check_training(case, host)


def test_compiled_reading_with_a_cache():
    _check_cached(case("lm2"), "llama")


@pytest.mark.slow
@pytest.mark.parametrize("host", [h for h in HOSTS if h not in ("llama", "gpt2")])
def test_compiled_training_on_all_hosts(host):
    _check_training(case("lm2"), host)


@pytest.mark.slow
@pytest.mark.parametrize("c", [c for c in CASES if c not in USUAL], ids=lambda c: c.id)
def test_compiled_training_of_all_settings(c):
    _check_training(c, "llama")


@pytest.mark.slow
@pairs([c for c in CASES if c.usual], hosts=("llama", "gpt2", "gemma2"), usual_hosts=("llama",))
def test_compiled_reading_on_more_hosts(case, host):
    case.needs("compiled reading with a cache")
    _check_cached(case, host)
