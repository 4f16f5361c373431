"""Memory Decoder: the mixture against two models run apart, with caches and padding; loading and tuning."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import mnemic
from mnemic.training import listed_tokenizer
from mnemic.training.companion import attach_companion, best_weight, load_companion, tune_alpha
from tests.tiny import HOSTS, VOCABULARY, random_ids, tiny_host

SEGMENT = 8


def small(kind: str = "llama", vocab_size: int = VOCABULARY, seed: int = 5) -> Any:
    """A companion narrower than the hosts."""
    torch.manual_seed(seed)
    options: dict[str, Any] = {"vocab_size": vocab_size, "initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 2}
    if kind == "gpt2":
        options |= {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "tie_word_embeddings": True}
    else:
        options |= {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
                    "num_key_value_heads": 1}  # fmt: skip
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **options)).eval()


def segments(model: Any, ids: Tensor) -> Tensor:
    """Logits with each segment a fresh context."""
    return torch.cat([model(part, use_cache=False).logits for part in ids.split(SEGMENT, dim=1)], dim=1)


def mixture(host: Any, companion: Any, ids: Tensor, alpha: float) -> Tensor:
    """The equation, in probabilities."""
    a, b = (segments(m, ids).softmax(-1) for m in (host, companion))
    return (alpha * b + (1 - alpha) * a).log()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("host", ["llama", "gpt2", "gemma2"])
def test_equals_two_models_run_apart(host, kind):
    """Values and every gradient, in float64."""
    ids, base, companion = random_ids(2, 21), tiny_host(host).double(), small(kind).double()
    model = attach_companion(copy.deepcopy(base), companion, alpha=0.3, segment=SEGMENT)
    # One matrix becomes two in the memory.
    if kind == "gpt2":
        companion.lm_head.weight = torch.nn.Parameter(companion.lm_head.weight.detach().clone())
    got, expected = model(ids).logits, mixture(base, companion, ids, 0.3)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(got.exp().sum(-1), torch.ones(2, 21, dtype=torch.float64))
    pull = torch.randn(got.shape, generator=torch.Generator().manual_seed(0), dtype=got.dtype)
    for logits in (got, expected):
        (logits * pull).sum().backward()
    theirs = {n: p.grad for n, p in base.named_parameters()}
    theirs |= {f"memory.model.{n}": p.grad for n, p in companion.named_parameters()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name], rtol=0, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")


def test_alpha_zero_is_the_host_and_one_the_memory_bit_for_bit():
    ids, companion = random_ids(2, 21), small()
    for alpha, alone in ((0.0, tiny_host()), (1.0, companion)):
        model = attach_companion(tiny_host(), companion, alpha=alpha, segment=SEGMENT)
        assert model.memory.identity_at_attach == (alpha == 0)
        with torch.no_grad():
            assert torch.equal(model(ids, use_cache=False).logits, segments(alone, ids))


def test_generation_equals_recomputing_everything():
    """Left-padded rows side by side, over two borders, greedy: the rows alone, each token from scratch."""
    host, companion = tiny_host(), small()
    model = attach_companion(tiny_host(), companion, alpha=0.5, segment=SEGMENT)
    rows = [random_ids(1, n, seed=n) for n in (11, 5)]
    ids, mask = torch.zeros(2, 11, dtype=torch.long), torch.zeros(2, 11, dtype=torch.long)
    expected = []
    for i, row in enumerate(rows):
        ids[i, 11 - row.shape[1] :], mask[i, 11 - row.shape[1] :] = row[0], 1
        with torch.no_grad():
            for _ in range(14):
                row = torch.cat([row, mixture(host, companion, row, 0.5)[:, -1:].argmax(-1)], dim=1)
        expected.append(row[0, rows[i].shape[1] :].tolist())
    got = model.generate(ids, attention_mask=mask, max_new_tokens=14, do_sample=False)
    assert got[:, 11:].tolist() == expected
    assert len(set(expected[0])) > 1


def test_token_by_token_equals_the_sequence():
    model, ids = attach_companion(tiny_host("gpt2"), small("gpt2"), segment=SEGMENT), random_ids(1, 19)
    stream = model.stream()
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
    parts = [stream.feed(ids[:, i : i + 1], return_logits=True) for i in range(19)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-5)


def test_alpha_may_change_within_a_stream():
    model, ids = attach_companion(tiny_host(), small(), alpha=0.0, segment=SEGMENT), random_ids(1, 7)
    stream = model.stream().feed(ids[:, :4])
    model.memory.config = model.memory.config.replace(alpha=0.7)
    got = stream.feed(ids[:, 4:], return_logits=True)
    with torch.no_grad():
        torch.testing.assert_close(got, mixture(tiny_host(), small(), ids, 0.7)[:, 4:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("other", ["rmt", "window", "lm2"])
def test_beside_another_memory(other):
    """The host has its memory tokens, window or bank; the companion reads the text alone."""
    ids, options = random_ids(2, 21), {"rmt": {"num_tokens": 3}, "lm2": {"num_slots": 4}}.get(other, {})
    from mnemic.core import memory_config

    torch.manual_seed(3)
    first = memory_config(other, **options)
    alone = mnemic.attach(tiny_host(), first, segment=SEGMENT)
    decoder = memory_config("memory-decoder", alpha=0.4, model={"model_type": "llama", **_SMALL})
    model = mnemic.attach(tiny_host(), [first, decoder], segment=SEGMENT)
    companion = small()
    model.memory.parts["memory-decoder"].companion.load_state_dict(companion.state_dict())
    model.memory.parts[other].load_state_dict(alone.memory.state_dict())
    with torch.no_grad():
        a = alone(ids, use_cache=False).logits.softmax(-1)
        if other == "window":
            b = mnemic.attach(small(), "window", segment=SEGMENT)(ids, use_cache=False).logits.softmax(-1)
        else:
            b = segments(companion, ids).softmax(-1)
        expected = (0.4 * b + 0.6 * a).log()
        torch.testing.assert_close(model(ids, use_cache=False).logits, expected, rtol=0, atol=1e-4)
    stream = model.stream(2)
    parts = [stream.feed(part, return_logits=True) for part in ids.split([5, 1, 9, 6], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=0, atol=1e-4)


_SMALL = {k: v for k, v in small().config.to_diff_dict().items() if k in (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")}  # fmt: skip


def test_vocabularies_of_two_sizes():
    """The mixture is over the shared ids; the rest of the host's has no probability."""
    ids = random_ids(2, 9).clamp_max(49)
    model = attach_companion(tiny_host(), small(vocab_size=50), alpha=0.5, segment=SEGMENT)
    logits = model(ids, labels=ids, use_cache=False)
    host = segments(tiny_host(), ids)[..., :50].softmax(-1)
    expected = (0.5 * host + 0.5 * segments(small(vocab_size=50), ids).softmax(-1)).log()
    torch.testing.assert_close(logits.logits[..., :50], expected, rtol=0, atol=1e-5)
    assert bool((logits.logits[..., 50:] == -float("inf")).all())
    assert bool(logits.loss.isfinite())
    with pytest.raises(mnemic.InputError, match="0 to 49"):
        model(torch.full((1, 3), 55), use_cache=False)


def test_a_folder_of_a_trained_model_is_loaded_and_saved_again(tmp_path):
    companion, ids = small("gpt2"), random_ids(2, 21)
    companion.save_pretrained(tmp_path / "small")
    model = attach_companion(tiny_host(), tmp_path / "small", alpha=1.0, segment=SEGMENT)
    with torch.no_grad():
        torch.testing.assert_close(model(ids, use_cache=False).logits, segments(companion, ids), rtol=0, atol=1e-6)
        mnemic.save(model, tmp_path / "adapter")
        mnemic.save(model, tmp_path / "whole", whole=True)
        for loaded in (mnemic.load(tmp_path / "adapter", tiny_host()), mnemic.load(tmp_path / "whole")):
            assert loaded.memory.config == model.memory.config
            assert torch.equal(loaded.eval()(ids, use_cache=False).logits, model(ids, use_cache=False).logits)


def test_only_the_companion_learns_when_the_host_is_frozen():
    model, ids = mnemic.freeze_host(mnemic.attach(tiny_host(), "memory-decoder", segment=SEGMENT)), random_ids(2, 16)
    model(ids, labels=ids).loss.backward()
    grads = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert grads == {n for n, _ in model.named_parameters() if n.startswith("memory.")}


@pytest.mark.parametrize("shift", [-9.0, -0.7, 0.0, 0.4, 9.0])
def test_the_best_weight_is_that_of_a_fine_grid(shift):
    make = torch.Generator().manual_seed(0)
    host, memory = (-torch.rand(200, generator=make, dtype=torch.float64) * 5 for _ in range(2))
    memory = memory + shift
    grid = torch.linspace(0, 1, 4001, dtype=torch.float64)
    scores = ((1 - grid)[:, None] * host.exp() + grid[:, None] * memory.exp()).log().mean(1)
    assert best_weight(host, memory) == pytest.approx(float(grid[scores.argmax()]), abs=3e-4)


def test_alpha_is_tuned_on_what_counts():
    """Rows that the companion wrote: alpha 1; the host's own: 0; padding and ignored labels do not count."""
    host, companion = tiny_host(), small()
    model = attach_companion(tiny_host(), companion, segment=16).train()

    def written(author: Any) -> Tensor:
        return author.generate(random_ids(4, 1), max_new_tokens=15, do_sample=True, top_k=None, eos_token_id=None)

    torch.manual_seed(0)
    theirs, own = written(companion), written(host)
    assert tune_alpha(model, [{"input_ids": theirs}]) > 0.8
    assert tune_alpha(model, [{"input_ids": own}]) < 0.2
    both = torch.cat([theirs, own])
    labels, mask = both.clone(), torch.ones_like(both)
    labels[4:6], mask[6:] = -100, 0
    alone = tune_alpha(model, [{"input_ids": theirs}])
    assert tune_alpha(model, [{"input_ids": both, "labels": labels, "attention_mask": mask}]) == pytest.approx(alone)
    assert model.memory.config.alpha == pytest.approx(alone)
    assert model.training
    with pytest.raises(mnemic.InputError, match="no token to predict"):
        tune_alpha(model, [{"input_ids": own, "labels": torch.full_like(own, -100)}])
    assert model.memory.config.alpha == pytest.approx(alone)


def test_what_does_not_fit_is_refused(tmp_path):
    for options, message in [
        ({"alpha": 1.5}, "between 0 and 1"),
        ({"model": {"hidden_size": 8}}, "no model_type"),
        ({"model": {"model_type": "nobody"}}, "describes no causal language model"),
        ({"model": {"model_type": "gpt2", "n_embd": 16, "n_head": 2, "n_positions": 4}}, "segment=4 or less"),
    ]:
        with pytest.raises(mnemic.ConfigError, match=message):
            mnemic.attach(tiny_host(), "memory-decoder", segment=SEGMENT, **options)
    model = attach_companion(tiny_host(), small(), segment=SEGMENT)
    with pytest.raises(mnemic.InputError, match="give input_ids"):
        model(inputs_embeds=torch.zeros(1, 4, 32))
    with pytest.raises(mnemic.StateError, match="does not fit"):
        load_companion(model, small("gpt2"))
    with pytest.raises(mnemic.HostError, match="no Memory Decoder"):
        load_companion(mnemic.attach(tiny_host(), "none"), small())
    with pytest.raises(mnemic.ConfigError, match=r"no config\.json"):
        load_companion(model, tmp_path)
    with pytest.raises(mnemic.HostError, match="no causal language model"):
        load_companion(model, torch.nn.Linear(2, 2))
    words = [f"w{i}" for i in range(VOCABULARY)]
    same, moved = listed_tokenizer(words, pad_token="w0"), listed_tokenizer(words[::-1], pad_token="w0")
    load_companion(model, small(), tokenizers=(same, listed_tokenizer(words[:50], pad_token="w0")))
    with pytest.raises(mnemic.StateError, match="'w0' is 0 and 60"):
        load_companion(model, small(), tokenizers=(same, moved))
    with pytest.raises(mnemic.StateError, match="1 tokens shared"):
        load_companion(model, small(), tokenizers=(same, listed_tokenizer(["w0", "other"], pad_token="w0")))


def test_every_host_takes_one():
    ids = random_ids(1, 12)
    for host in HOSTS:
        model = attach_companion(tiny_host(host), small(), alpha=0.5, segment=SEGMENT)
        with torch.no_grad():
            expected = mixture(tiny_host(host), small(), ids, 0.5)
            torch.testing.assert_close(model(ids, use_cache=False).logits, expected, rtol=0, atol=1e-4)
