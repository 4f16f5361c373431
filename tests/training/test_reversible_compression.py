"""R3Mem's losses against a loop with a plain host, in float64; expansion; the archive; the toy."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig

import mnemic
from mnemic import ConfigError, InputError, StateError
from mnemic.store.memory_archive import MemoryArchive
from mnemic.training.reversible_compression import (
    compress,
    expand,
    read_segment,
    recall,
    reconstruct,
    remember,
    reversible_loss,
)
from tests.memories.test_r3mem import MEMORY, SEGMENT, attached, phi
from tests.tiny import random_ids, tiny_host


def written_by_hand(memory, host, embeds: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of a segment's embeddings (B, n, d) behind the memory `kept`, and the memory after it."""
    whole = torch.cat([kept, embeds, kept + memory.write_tokens], dim=1)
    seen = torch.ones(whole.shape[1], whole.shape[1], dtype=torch.bool).tril()
    seen[:MEMORY, :MEMORY] = True
    seen[-MEMORY:, -MEMORY:] = True
    hidden = host.base_model(
        inputs_embeds=whole,
        attention_mask=seen[None, None].expand(len(whole), 1, -1, -1),
        position_ids=torch.arange(whole.shape[1]).expand(len(whole), -1),
        use_cache=False,
    ).last_hidden_state
    return host.get_output_embeddings()(hidden)[:, MEMORY:-MEMORY], phi(memory, hidden[:, -MEMORY:])


def losses_by_hand(memory, host, ids: Tensor, query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    embed, head = host.get_input_embeddings(), host.get_output_embeddings()
    kept, said, back, cycle = memory.first_tokens.expand(len(ids), -1, -1), [], [], []
    for part in ids.split(SEGMENT, dim=1):
        logits, after = written_by_hand(memory, host, embed(part), kept)
        said.append(logits)
        behind = torch.cat([memory.prompt(after), embed(query), embed(part)], dim=1)
        states = host.base_model(inputs_embeds=behind, use_cache=False).last_hidden_state
        rebuilt = head(states)[:, -part.shape[1] - 1 : -1]
        back.append(F.cross_entropy(rebuilt.float().flatten(0, 1), part.flatten()))
        expected = rebuilt.float().softmax(-1).double() @ embed.weight
        again = written_by_hand(memory, host, expected, kept)[1]
        cycle.append(1 - F.cosine_similarity(after.detach(), again, dim=-1).mean())
        kept = after
    whole, asked = torch.cat(said, dim=1), written_by_hand(memory, host, embed(query), kept)[0]
    forward = F.cross_entropy(whole[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
    forward = forward + F.cross_entropy(asked[:, :-1].flatten(0, 1).float(), query[:, 1:].flatten())
    return forward, torch.stack(back).mean(), torch.stack(cycle).mean()


@pytest.mark.parametrize("host", ["gpt2", "llama"])
def test_the_losses_equal_a_loop_forward_and_backward(host):
    """Losses are taken in float32, as transformers does."""
    model, plain = attached(host), tiny_host(host).double()
    ids, query = random_ids(2, 2 * SEGMENT + 3), random_ids(2, 3, seed=5)
    found = reversible_loss(model, ids, query, backward=0.7, cycle=0.3)
    forward, back, cycle = losses_by_hand(model.memory, plain, ids, query)
    for mine, theirs in ((found.forward, forward), (found.backward, back), (found.cycle, cycle)):
        torch.testing.assert_close(mine.double(), theirs.double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(found.loss.double(), (forward + 0.7 * back + 0.3 * cycle).double(), rtol=0, atol=1e-6)
    weights = list(model.memory.parameters())
    grads = [torch.autograd.grad(x, weights) for x in (found.loss, forward + 0.7 * back + 0.3 * cycle)]
    for mine, theirs in zip(*grads, strict=True):
        assert bool(mine.any())
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-7)


def test_whole_segments_are_read_as_the_model_reads_them():
    model, ids = attached(), random_ids(2, 3 * SEGMENT)
    with torch.no_grad():
        output, found = model(ids, labels=ids, use_cache=False), reversible_loss(model, ids, backward=0, cycle=0)
    torch.testing.assert_close(found.forward, output.loss, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.memories[:, -1], output.memory_state["memory"], rtol=0, atol=1e-12)
    assert float(found.backward) == float(found.cycle) == 0


def test_a_short_last_segment_is_written_too():
    model, ids = attached(), random_ids(2, SEGMENT + 2)
    with torch.no_grad():
        memories = compress(model, ids)
        other = compress(model, torch.cat([ids[:, :-1], (ids[:, -1:] + 1) % 58 + 3], dim=1))
    assert [m.shape for m in memories] == [(2, MEMORY, 32)] * 2
    assert torch.equal(memories[0], other[0])
    assert float((memories[1] - other[1]).abs().max()) > 1e-3


def test_reconstruction_is_causal_and_does_not_see_what_it_predicts():
    model, ids = attached(), random_ids(1, SEGMENT)
    memory, other = torch.randn(1, MEMORY, 32, dtype=torch.float64), ids.clone()
    other[0, 3] = (ids[0, 3] + 1) % 58 + 3
    with torch.no_grad():
        difference = (reconstruct(model, memory, ids) - reconstruct(model, memory, other)).abs().amax(-1)[0]
    assert torch.equal(difference[:4], torch.zeros(4, dtype=torch.float64))
    assert float(difference[4:].min()) > 1e-6


def test_what_is_expanded_stays_out_of_the_scored_text():
    """The model's own logits and state are the same with an expansion in between."""
    model, ids = attached(), random_ids(2, 3 * SEGMENT)
    with torch.no_grad():
        first = model(ids[:, : 2 * SEGMENT])
        expand(model, first.memory_state["memory"], 4)
        rest = model(ids[:, 2 * SEGMENT :], memory_state=first.memory_state)
        whole = model(ids)
    torch.testing.assert_close(rest.logits, whole.logits[:, 2 * SEGMENT :], rtol=0, atol=1e-12)


@pytest.mark.parametrize("host", ["llama", "gpt2", "gemma2"])
def test_expansion_is_the_likeliest_token_again_and_again(host):
    model, query = attached(host), random_ids(2, 2, seed=3)
    with torch.no_grad():
        memory = compress(model, random_ids(2, SEGMENT))[-1]
        text = expand(model, memory, 5, query)
        best = reconstruct(model, memory, text, query).argmax(-1)
    assert text.shape == (2, 5)
    assert torch.equal(text, best)


def test_a_question_finds_the_memory_written_of_the_same_words():
    model, archive = attached(), MemoryArchive()
    contexts = [random_ids(1, n, seed=n) for n in (SEGMENT, SEGMENT + 3, 2 * SEGMENT)]
    remember(model, archive, contexts[0], "entity", start=0)
    remember(model, archive, contexts[1], "paragraph", start=10)
    added = remember(model, archive, contexts[2], "paragraph", start=30)
    assert [(e.level, e.span) for e in archive.entries] == [
        ("entity", (0, SEGMENT)),
        ("paragraph", (10, 10 + SEGMENT)), ("paragraph", (10 + SEGMENT, 13 + SEGMENT)),
        ("paragraph", (30, 30 + SEGMENT)), ("paragraph", (30 + SEGMENT, 30 + 2 * SEGMENT)),
    ]  # fmt: skip
    entry, text = recall(model, archive, contexts[2], "paragraph")
    assert entry is added[-1]
    assert text.shape == (SEGMENT,)
    assert recall(model, archive, contexts[2], "entity")[0] is archive.entries[0]


def test_an_archive_belongs_to_the_model_that_wrote_it(tmp_path):
    model, archive, ids = attached(), MemoryArchive(), random_ids(1, SEGMENT)
    remember(model, archive, ids, "entity")
    archive.save(tmp_path / "archive")
    again = MemoryArchive.load(tmp_path / "archive")
    assert torch.equal(recall(model, again, ids)[1], recall(model, archive, ids)[1])
    with torch.no_grad():
        for parameter in model.memory.parameters():
            parameter.add_(1.0)
    with pytest.raises(StateError, match="other weights of the memory"):
        recall(model, again, ids)
    with pytest.raises(StateError, match="other weights of the memory"):
        remember(model, again, ids, "entity")


def test_what_does_not_fit_is_refused():
    model, ids = attached(), random_ids(2, SEGMENT)
    memory = torch.zeros(2, MEMORY, 32, dtype=torch.float64)
    with pytest.raises(ConfigError, match="'r3mem' alone"):
        compress(mnemic.attach(tiny_host(), "rmt", segment=SEGMENT), ids)
    with pytest.raises(ConfigError, match="'r3mem' alone"):
        compress(tiny_host(), ids)
    with pytest.raises(InputError, match="A segment of 7 tokens"):
        read_segment(model, random_ids(2, 7), model.memory.initial_state(2))
    with pytest.raises(InputError, match="do not fit the 128 positions"):
        expand(model, memory, 127)
    with pytest.raises(InputError, match="length = 0"):
        expand(model, memory, 0)
    with pytest.raises(InputError, match="expected ids"):
        reversible_loss(model, ids.float())
    with pytest.raises(InputError, match="one context at a time"):
        remember(model, MemoryArchive(), ids, "entity")
    with pytest.raises(InputError, match="has none"):
        recall(model, MemoryArchive(), ids[:1])


def accuracy_of_reconstruction(backward: float, steps: int = 300) -> list[float]:
    """Share of the symbols of a first and a second segment that are named from their memories, after training."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=64, tie_word_embeddings=False, initializer_range=0.04,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    model = mnemic.attach(config, "r3mem", segment=8, num_tokens=4, num_blocks=2, bottleneck=32).train()
    make, rate = torch.Generator().manual_seed(1), 3e-3
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 50, max(0.05, (steps - step) / (0.3 * steps)))
        ids = torch.randint(16, (32, 16), generator=make)
        optimizer.zero_grad()
        reversible_loss(model, ids, backward=backward, cycle=0.1 * backward).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()
    with torch.no_grad():
        ids = torch.randint(16, (512, 16), generator=torch.Generator().manual_seed(9))
        memories = compress(model, ids)
        pairs = zip(memories, ids.split(8, dim=1), strict=True)
        return [float((reconstruct(model, m, part).argmax(-1) == part).float().mean()) for m, part in pairs]


@pytest.mark.slow
def test_a_segment_comes_back_from_its_memory_only_where_that_was_trained():
    """Eight random symbols of sixteen in four vectors; a guess is right with probability 0.0625."""
    assert min(accuracy_of_reconstruction(backward=1.0)) > 0.95
    assert max(accuracy_of_reconstruction(backward=0.0, steps=200)) < 0.3
