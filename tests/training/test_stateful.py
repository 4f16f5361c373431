"""Stateful batches: rows go on from step to step, and nothing leaks between documents."""

from itertools import islice, pairwise
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainingArguments

import mnemic
from mnemic.core.state import State
from mnemic.training import Collator, MemoryTrainer, Mixture, StatefulRows
from mnemic.training.mixture import Part
from mnemic.training.stateful import StreamState, streams_of
from tests.tiny import random_ids, tiny_host
from tests.training.shard_files import numbered, store

SEGMENT, SEGMENTS = 8, 2
WIDTH = SEGMENT * SEGMENTS
MEMORIES: dict[str, dict] = {
    "lm2": {"num_slots": 4},
    "rmt": {"num_tokens": 2},
    "armt": {"num_tokens": 2},
    "transformer-xl": {"memory_lengths": 12},
    "deltanet": {},
    "gated-deltanet": {},
    "titans": {"head_dim": 16, "chunk": 4, "num_persistent": 2, "theta_max": 0.2},
    "memorizing-transformers": {},
    "memoryllm": {"new_states": 3, "blocks": 3, "min_chunk": 8, "rank": 2, "dropout": 0.0, "redraw": False},
    "lime": {},
    "none": {},
}


def attached(name="lm2", seed=0, **changes):
    torch.manual_seed(seed)
    model = mnemic.attach(tiny_host(), name, segment=SEGMENT, **{**MEMORIES[name], **changes}).double().train()
    model.loss_function = loss
    return model


def loss(logits, labels, vocab_size, num_items_in_batch=1, **kwargs):
    """The hosts' own in their precision: theirs is float32."""
    flat = logits[:, :-1].reshape(-1, vocab_size), labels[:, 1:].reshape(-1)
    return torch.nn.functional.cross_entropy(*flat, reduction="sum") / num_items_in_batch


def rows(mixture, count, segments=SEGMENTS, segment=SEGMENT):
    return StatefulRows(mixture, segment, segments, count)


def one_part(folder, documents):
    return Mixture([Part(store(folder, documents, vocabulary=2**16), 1)])


def documents_of(*lengths):
    return [random_ids(length, seed=i).tolist() for i, length in enumerate(lengths)]


def run(model, calls):
    """Loss sums and gradients of calls [(ids (B, n), lengths, reset)], the state handed from call to call."""
    stream, total, losses = StreamState(model), torch.zeros((), dtype=torch.float64), []
    for ids, lengths, reset in calls:
        mask = (torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]).long()
        labels = ids.masked_fill(mask == 0, -100)
        given = {"input_ids": ids, "attention_mask": mask, "labels": labels, "reset": torch.tensor(reset)}
        out = model(**stream.enter(given), use_cache=False, num_items_in_batch=1)
        stream.leave(out)
        losses.append(out.loss.detach())
        total = total + out.loss
    model.zero_grad()
    total.backward()
    return torch.stack(losses), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def same(found, expected, scale=1e-12):
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=scale, atol=scale, msg=name)


@pytest.mark.parametrize("name", ["lm2", "rmt", "deltanet", "transformer-xl", "titans"])
def test_two_documents_in_one_batch_are_each_alone(name):
    model = attached(name)
    first, second = (random_ids(1, 3 * WIDTH, seed=s) for s in (1, 2))
    # Row 0 reads `first` for three calls; row 1 the end of `second`, 5 tokens long, then another document.
    third = random_ids(1, WIDTH, seed=3)
    row_1 = [(second[:, :WIDTH], WIDTH, True), (second[:, WIDTH : WIDTH + 5], 5, False), (third, WIDTH, True)]
    row_0 = [(first[:, i * WIDTH : (i + 1) * WIDTH], WIDTH, i == 0) for i in range(3)]

    def padded(ids):
        return torch.nn.functional.pad(ids, (0, WIDTH - ids.shape[1]))

    together = [
        (torch.cat([padded(a), padded(b)]), (n, m), (r, q)) for (a, n, r), (b, m, q) in zip(row_0, row_1, strict=True)
    ]
    losses, gradients = run(model, together)
    alone = [run(model, [(ids, (n,), (r,)) for ids, n, r in part]) for part in (row_0, row_1[:2], row_1[2:])]
    expected = alone[0][0] + torch.cat([alone[1][0], alone[2][0]])
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-12)
    names = set().union(*(g for _, g in alone))
    zero = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    same(gradients, {n: sum(g.get(n, zero[n]) for _, g in alone) for n in names})


@pytest.mark.parametrize("name", MEMORIES)
def test_going_on_is_reading_at_once(name):
    """What memory_state carries is all there is: logits of two calls equal those of one."""
    model = attached(name).eval()
    ids = random_ids(2, 3 * WIDTH)
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits
        stream, parts = StreamState(model), []
        for i in range(3):
            inputs = {"input_ids": ids[:, i * WIDTH : (i + 1) * WIDTH], "reset": torch.full((2,), i == 0)}
            out = model(**stream.enter(inputs), use_cache=False)
            stream.leave(out)
            parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-11, atol=1e-11)


def test_a_reset_forgets_exactly_and_only_its_row():
    model = attached("rmt").eval()
    ids, other = random_ids(2, WIDTH, seed=1), random_ids(2, WIDTH, seed=2)
    with torch.no_grad():
        before = model(input_ids=ids, use_cache=False).memory_state
        reset = torch.tensor([True, False])
        mixed = model(input_ids=other, memory_state=before, memory_reset=reset, use_cache=False)
        fresh = model(input_ids=other, use_cache=False)
        kept = model(input_ids=other, memory_state=before, use_cache=False)
    assert torch.equal(mixed.logits[0], fresh.logits[0])
    assert torch.equal(mixed.logits[1], kept.logits[1])
    assert mixed.memory_state.select([0]).equal(fresh.memory_state.select([0]))
    assert not torch.equal(fresh.logits[1], kept.logits[1])


def test_a_reset_row_trains_the_first_state_and_truncation_leaves_it_alone():
    """Only the first states of reset rows are read, so the gradient is that of those rows alone."""
    ids = random_ids(2, WIDTH, seed=4)

    def gradient(calls_reset, **given):
        model = attached("rmt")
        before = model(input_ids=ids, use_cache=False).memory_state.detach()
        out = model(
            input_ids=ids, labels=ids, memory_state=before, memory_reset=torch.tensor(calls_reset), use_cache=False,
            num_items_in_batch=1, **given,
        )  # fmt: skip
        out.loss.backward()
        return {n: p.grad for n, p in model.memory.named_parameters()}

    learned = [n for n, p in attached("rmt").memory.named_parameters() if p.requires_grad]
    both, first, second = (gradient(r) for r in ([True, True], [True, False], [False, True]))
    neither = gradient([False, False])
    first_state = [n for n in learned if neither[n] is None or not bool(neither[n].any())] or learned
    for name in first_state:
        zero = torch.zeros_like(both[name])
        parts = [zero if g[name] is None else g[name] for g in (first, second, neither)]
        torch.testing.assert_close(parts[0] + parts[1] - parts[2], both[name], rtol=1e-11, atol=1e-12)
        assert bool(both[name].any())
    # A cut at every commit cuts what the rows carry on, never the first state.
    cut = gradient([True, True], truncation=mnemic.Truncation("chunk", 1))
    assert all(bool(cut[name].any()) for name in first_state)


@pytest.mark.parametrize("reset", [[True], [1, 0], [False, False]])
def test_resets_that_cannot_be(reset):
    model = attached("rmt")
    with pytest.raises(mnemic.InputError, match="memory_reset"):
        model(input_ids=random_ids(2, 8), memory_reset=torch.tensor(reset))


# The data


def test_rows_read_documents_on_and_on(tmp_path):
    mixture = one_part(tmp_path, numbered(40, 16, 5, 70, 33, 1))
    samples = list(islice(rows(mixture, 2), 60))
    for row in (samples[0::2], samples[1::2]):
        assert row[0]["reset"]
        for before, after in pairwise(row):
            ids, following = before["input_ids"], after["input_ids"]
            assert after["labels"] == [-100, *following[1:]]
            if after["reset"]:
                assert following[0] % 100 == 0
                # The document before was read to its end, but for a last token that nothing could predict.
                length = (40, 16, 5, 70, 33, 1)[ids[-1] // 100]
                assert ids[-1] % 100 + 1 == length - (length == 33)
            else:
                assert following[0] == ids[-1] + 1
                assert len(ids) == WIDTH
    opened = [s["input_ids"][0] // 100 for s in samples if s["reset"]]
    assert sorted(opened[:5]) == [0, 1, 2, 3, 4]
    other = Mixture(mixture.parts, seed=1)
    assert [s["input_ids"][0] // 100 for s in islice(rows(other, 2), 60) if s["reset"]] != opened


def test_every_call_predicts_something(tmp_path):
    mixture = one_part(tmp_path / "mixed", numbered(17, 1, 2, 33))
    for segments in (1, 2):
        assert all(any(i != -100 for i in s["labels"]) for s in islice(rows(mixture, 1, segments), 60))
    with pytest.raises(mnemic.DataError, match="one token"):
        rows(one_part(tmp_path / "ones", numbered(1, 1)), 1)
    with pytest.raises(mnemic.ConfigError, match="0 rows"):
        rows(mixture, 0)


def test_a_position_is_found_again(tmp_path):
    mixture = one_part(tmp_path, numbered(40, 16, 5, 70, 33))
    whole = list(islice(rows(mixture, 3), 50))
    for at in (0, 1, 17, 30):
        stopped, later = rows(mixture, 3), rows(mixture, 3)
        assert len(list(islice(stopped, at))) == at
        later.load_state_dict(stopped.state_dict())
        assert list(islice(later, 50 - at)) == whole[at:]
    with pytest.raises(mnemic.DataError, match="other data"):
        rows(mixture, 2).load_state_dict(rows(mixture, 3).state_dict())


# The trainer


def trainer(folder, model, data, **changes):
    settings = {"max_steps": 4, "per_device_train_batch_size": 2, "report_to": [], "learning_rate": 1e-2} | changes
    arguments = TrainingArguments(
        str(folder), use_cpu=True, save_strategy="no", logging_steps=1, disable_tqdm=True, remove_unused_columns=False,
        dataloader_pin_memory=False, lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=0.0, optim="sgd",
        **settings,
    )  # fmt: skip
    return MemoryTrainer(model, arguments, train_dataset=data, data_collator=Collator(), stateful=True)


def by_hand(model, data, batches, per_step):
    """Plain SGD over stateful batches, with the state handed on."""
    optimizer, stream, losses = torch.optim.SGD(model.parameters(), lr=1e-2), StreamState(model), []
    samples = iter(data)
    for _ in range(batches // per_step):
        group = [Collator()([next(samples) for _ in range(2)]) for _ in range(per_step)]
        items = sum(int((b["labels"] != -100).sum()) for b in group)
        optimizer.zero_grad()
        for batch in group:
            out = model(**stream.enter(batch), use_cache=False, num_items_in_batch=items)
            stream.leave(out)
            out.loss.backward()
            losses.append(out.loss.item())
        optimizer.step()
    return losses, stream


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_trainer_carries_the_state(tmp_path, accumulation):
    mixture = one_part(tmp_path / "data", documents_of(40, 16, 5, 70, 33))
    reference = attached("rmt")
    losses, stream = by_hand(reference, rows(mixture, 2), 4 * accumulation, accumulation)
    model = attached("rmt")
    used = trainer(tmp_path / "run", model, rows(mixture, 2), gradient_accumulation_steps=accumulation)
    used.train()
    logged = [entry["loss"] for entry in used.state.log_history if "loss" in entry]
    expected = [sum(losses[i : i + accumulation]) for i in range(0, len(losses), accumulation)]
    assert logged == pytest.approx(expected, rel=1e-6)
    same(dict(model.named_parameters()), dict(reference.named_parameters()))
    assert State(used.stream_state()).equal(stream.kept)


def test_states_are_carried_in_bfloat16(tmp_path):
    mixture = one_part(tmp_path / "data", documents_of(40, 16, 70))
    used = trainer(tmp_path / "run", attached("rmt").float(), rows(mixture, 2), bf16=True, max_steps=2)
    used.train()
    assert used.stream_state()


def test_a_stream_goes_on_in_another_trainer(tmp_path):
    mixture = one_part(tmp_path / "data", documents_of(40, 16, 5, 70, 33))
    model = attached("rmt")
    whole = trainer(tmp_path / "run", model, rows(mixture, 2))
    whole.train()
    half = attached("rmt")
    first = trainer(tmp_path / "run", half, rows(mixture, 2), max_steps=2)
    first.train()
    data = rows(mixture, 2)
    data.load_state_dict({**data.state_dict(), "samples": 4})
    second = trainer(tmp_path / "run", half, data, max_steps=2)
    second.load_stream_state(first.stream_state())
    second.train()
    same(dict(half.named_parameters()), dict(model.named_parameters()), scale=0)
    assert State(second.stream_state()).equal(State(whole.stream_state()))


def test_what_stateful_batches_need(tmp_path):
    model = attached("rmt")
    stream = StreamState(model)
    ids = random_ids(2, 8)
    with pytest.raises(mnemic.InputError, match="reset"):
        stream.enter({"input_ids": ids})
    with pytest.raises(mnemic.StateError, match="load_stream_state"):
        stream.enter({"input_ids": ids, "reset": torch.tensor([True, False])})
    stream.kept = model.memory.initial_state(3)
    with pytest.raises(mnemic.StateError, match="2 rows"):
        stream.enter({"input_ids": ids, "reset": torch.tensor([True, False])})
    mixture = one_part(tmp_path / "data", documents_of(40, 16))
    plain = trainer(tmp_path / "run", model, rows(mixture, 2))
    plain._streams = None
    with pytest.raises(mnemic.ConfigError, match="stateful=True"):
        plain.train()


@pytest.mark.parametrize("name, options", [("ahn", {"num_sinks": 2}), ("dmc", {}), ("window", {})])
def test_streams_that_are_more_than_a_state_are_refused(name, options):
    with pytest.raises(mnemic.UnsupportedError, match="CorpusSamples"):
        StreamState(mnemic.attach(tiny_host(), name, segment=SEGMENT, **options))


def test_sharded_weights_are_refused():
    with pytest.raises(mnemic.UnsupportedError, match="FSDP"):
        streams_of(SimpleNamespace(is_fsdp_enabled=True), attached("rmt"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_two_processes_have_their_own_rows(tmp_path):
    from tests.training.stateful_ranks import start, train

    store(tmp_path / "data", documents_of(40, 16, 5, 70, 33, 21))
    train(tmp_path, 1, "alone")
    start(2, tmp_path, "both")
    alone, *both = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("alone-0", "both-0", "both-1"))
    for rank in both:
        for name, weight in alone["weights"].items():
            torch.testing.assert_close(rank["weights"][name], weight, rtol=0, atol=1e-5, msg=name)
    for name, state in alone["stream"].items():
        torch.testing.assert_close(torch.cat([rank["stream"][name] for rank in both]), state, rtol=0, atol=1e-4)
