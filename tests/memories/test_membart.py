"""MemBART against loops over heads with the block mask written out; independence, gate, reset, copies; dialogue."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mnemic
from mnemic import State
from mnemic.training.turns import backward_turns
from tests.contract.encoder_decoders import tiny_encoder_decoder
from tests.memories.dialogues import accuracy, dialogue, tiny_bart
from tests.tiny import random_ids

SLOTS, TOKENS = 3, 5


def attached(host: str = "bart", slots: int = SLOTS, noise: float = 0.2, **changes: Any) -> Any:
    """In float64, with noise on the memory's weights so that none of them is as the host's or as at the start."""
    model = tiny_encoder_decoder(host, **changes).double()
    torch.manual_seed(1)
    model = mnemic.attach(model, "membart", segment=16, num_slots=slots)
    with torch.no_grad():
        for parameter in model.memory.parameters():
            parameter.add_(torch.randn_like(parameter) * noise)
    return model


def plain_encoder(model: Any) -> Any:
    """The same host's encoder without a memory."""
    name = model.config.model_type
    host = tiny_encoder_decoder(name, encoder_layers=model.config.encoder_layers).double()
    host.load_state_dict({n: t for n, t in model.state_dict().items() if not n.startswith("memory.")})
    return host.get_encoder()


def joint_block(own: Any, block: Any, m: Tensor, x: Tensor, real: list[bool], heads: int, first: bool) -> Any:
    """One block for one row, slots m (k, d) and tokens x (T, d). first: norms stand before their parts."""
    k, count = len(m), len(m) + len(x)
    width = x.shape[1] // heads
    norm_x, norm_m = block.self_attn_layer_norm, own.attention_norm
    mi, xi = (norm_m(m), norm_x(x)) if first else (m, x)
    attention = block.self_attn
    query = torch.cat([own.query(mi), attention.q_proj(xi)])
    keys, values = (torch.cat([a(mi), b(xi)]) for a, b in ((own.key, attention.k_proj), (own.value, attention.v_proj)))
    rows = []
    for i in range(count):
        seen = [j for j in range(count) if (j == i if i < k and j < k else j < k or real[j - k])]
        parts = []
        for h in range(heads):
            part = slice(h * width, (h + 1) * width)
            scores = torch.stack([query[i, part].dot(keys[j, part]) / width**0.5 for j in seen])
            weights = scores.exp() / scores.exp().sum()
            parts.append(sum(w * values[j, part] for w, j in zip(weights, seen, strict=True)))
        rows.append(torch.cat(parts))
    read = torch.stack(rows)
    m, x = m + own.out(read[:k]), x + attention.out_proj(read[k:])
    m, x = (m, x) if first else (norm_m(m), norm_x(x))
    norm_x, norm_m = block.final_layer_norm, own.final_norm
    activation = block.activation_fn
    m = m + own.fc2(activation(own.fc1(norm_m(m) if first else m)))
    x = x + block.fc2(activation(block.fc1(norm_x(x) if first else x)))
    return (m, x) if first else (norm_m(m), norm_x(x))


def naive(model: Any, ids: Tensor, real: list[bool], slots: Tensor) -> tuple[Tensor, Tensor]:
    """What the decoder reads of one row, (k + T, d), and its slots after the turn, from slots (k, d)."""
    memory, encoder, inputs = model.memory, plain_encoder(model), []
    hook = encoder.layers[0].register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with torch.no_grad():
        encoder(ids)
    hook.remove()
    x, first = inputs[0][0], memory.last_norm is not None
    entry = F.layer_norm(slots + memory.bias, slots.shape[-1:], memory.entry_norm.weight, memory.entry_norm.bias)
    m = entry
    for own, block in zip(memory.blocks, encoder.layers, strict=True):
        m, x = joint_block(own, block, m, x, real, model.config.encoder_attention_heads, first)
    if first:
        m, x = memory.last_norm(m), encoder.layer_norm(x)
    dense, _, out = memory.gate
    alpha = torch.sigmoid(out(F.gelu(dense(m))))
    after = alpha * m + (1 - alpha) * entry
    return torch.cat([after, x]), after


@pytest.mark.parametrize("host", ["bart", "marian", "pegasus"])
def test_a_turn_is_the_joint_attention_written_out(host):
    model = attached(host)
    ids, mask = random_ids(2, TOKENS), torch.ones(2, TOKENS, dtype=torch.long)
    mask[1, 3:] = 0
    first = torch.randn(2, SLOTS, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    name, found, grads = model.memory.slots, [], []
    start = first.clone().requires_grad_()
    turn = model.read(ids, mask, memory_state=State({name: start}))
    later = model.read(ids, mask, memory_state=turn.memory_state).memory_state[name]
    weight = torch.randn(*turn.last_hidden_state.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    weight = weight * turn.attention_mask[..., None]
    ((turn.last_hidden_state * weight).sum() + later.sum()).backward()
    grads.append({n: p.grad for n, p in model.memory.named_parameters()} | {"first": start.grad})
    model.zero_grad()
    start = first.clone().requires_grad_()
    total: Any = 0
    for row in range(2):
        real = mask[row].bool().tolist()
        read, after = naive(model, ids[row : row + 1], real, start[row])
        kept = turn.attention_mask[row].bool()
        torch.testing.assert_close(turn.last_hidden_state[row][kept], read[kept], rtol=0, atol=1e-10)
        torch.testing.assert_close(turn.memory_state[name][row], after, rtol=0, atol=1e-10)
        found.append(naive(model, ids[row : row + 1], real, after)[1])
        total = total + (read * weight[row]).sum() + found[-1].sum()
    torch.testing.assert_close(later, torch.stack(found), rtol=0, atol=1e-10)
    total.backward()
    grads.append({n: p.grad for n, p in model.memory.named_parameters()} | {"first": start.grad})
    for gradient, expected in zip(grads[0].items(), grads[1].items(), strict=True):
        torch.testing.assert_close(
            gradient[1], expected[1], rtol=0, atol=1e-8, msg=lambda m, n=gradient[0]: f"{n}: {m}"
        )


def test_without_slots_the_encoder_is_the_hosts_own():
    model, ids = attached(slots=0), random_ids(2, TOKENS)
    with torch.no_grad():
        turn = model.read(ids)
        assert torch.equal(turn.last_hidden_state, plain_encoder(model)(ids)[0])
    assert turn.memory_state[model.memory.slots].shape == (2, 0, 32)


@pytest.mark.parametrize("layers", [1, 2])
def test_slots_meet_through_tokens_only(layers):
    """A slot changes the others from the second block on."""
    model, ids = attached(encoder_layers=layers), random_ids(1, TOKENS)
    name = model.memory.slots
    before = torch.randn(1, SLOTS, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    moved = before.clone()
    moved[0, 1, :9] += 1
    with torch.no_grad():
        after, changed = (model.read(ids, memory_state=State({name: s})).memory_state[name] for s in (before, moved))
    difference = (after - changed).abs().amax(-1)[0]
    assert difference[1] > 1e-3
    assert bool((difference[[0, 2]] < 1e-14).all()) == (layers == 1)
    assert layers == 1 or bool((difference[[0, 2]] > 1e-6).all())


def test_a_closed_gate_leaves_the_slots_as_they_entered():
    model, ids = attached(), random_ids(2, TOKENS)
    with torch.no_grad():
        model.memory.gate[2].weight.zero_()
        model.memory.gate[2].bias.fill_(-1e4)
        before = model.memory.initial_state(2)
        turn = model.read(ids, memory_state=before)
        entry = model.memory.entry_norm(model.memory.bias)
    for row in range(2):
        torch.testing.assert_close(turn.memory_state[model.memory.slots][row], entry, rtol=0, atol=1e-14)


def test_a_reset_row_is_in_its_first_turn():
    model, ids = attached(), random_ids(2, TOKENS)
    with torch.no_grad():
        state = model.read(random_ids(2, TOKENS, seed=1)).memory_state
        mixed = model.read(ids, memory_state=state, memory_reset=torch.tensor([False, True]))
        first, later = model.read(ids), model.read(ids, memory_state=state)
    assert torch.equal(mixed.last_hidden_state[1], first.last_hidden_state[1])
    assert torch.equal(mixed.last_hidden_state[0], later.last_hidden_state[0])
    assert not torch.equal(first.last_hidden_state[0], later.last_hidden_state[0])


@pytest.mark.parametrize("host", ["bart", "pegasus"])
def test_weights_begin_as_the_hosts(host):
    model = tiny_encoder_decoder(host)
    encoder = model.get_encoder()
    mnemic.attach(model, "membart", num_slots=2)
    for own, block in zip(model.memory.blocks, encoder.layers, strict=True):
        attention = block.self_attn
        pairs = [
            (own.query, attention.q_proj), (own.key, attention.k_proj), (own.value, attention.v_proj),
            (own.out, attention.out_proj), (own.fc1, block.fc1), (own.fc2, block.fc2),
            (own.attention_norm, block.self_attn_layer_norm), (own.final_norm, block.final_layer_norm),
        ]  # fmt: skip
        for mine, theirs in pairs:
            assert torch.equal(mine.weight, theirs.weight)
            assert torch.equal(mine.bias, theirs.bias)
            assert mine.weight is not theirs.weight
            assert mine.weight.data_ptr() != theirs.weight.data_ptr()
    assert (model.memory.last_norm is None) == (host == "bart")


def test_dropout_reaches_slots_in_training_only():
    model, ids = attached(dropout=0.3), random_ids(1, TOKENS)
    name = model.memory.slots
    with torch.no_grad():
        assert torch.equal(model.read(ids).memory_state[name], model.read(ids).memory_state[name])
        model.train()
        assert not torch.equal(model.read(ids).memory_state[name], model.read(ids).memory_state[name])


@pytest.mark.slow
def test_a_name_of_the_first_turn_is_known_in_the_fifth():
    """The card's dialogue, k = 4, dialogues of 2 to 5 turns in training. Measured on 512 dialogues: 100% after 5, 8 and
    20 turns; 6.6% with the memory reset before every turn, 6.1% when trained without slots; chance is 6.25%."""
    length, rate = 6, 1e-3
    model = tiny_bart()
    torch.manual_seed(1)
    model = mnemic.attach(model, "membart", segment=length, num_slots=4).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    generator = torch.Generator().manual_seed(0)
    for step in range(160):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 50)
        turns, _ = dialogue(32, int(torch.randint(2, 6, (1,), generator=generator)), length, generator)
        backward_turns(model, turns)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert accuracy(model, 5, length) > 0.9
    assert accuracy(model, 8, length) > 0.9
    assert accuracy(model, 5, length, carry=False) < 0.13
