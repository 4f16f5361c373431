"""generate() is the host's own: what it yields equals recomputing everything from scratch at every step."""

import pytest
import torch

import mnemic
from tests.contract.cases import assert_states_close, attached, build, case, parallel
from tests.tiny import random_ids

MEMORIES = ("lm2", "rmt", "none", "window")
PAIRS = [(m, h) for m in MEMORIES for h in ("llama", "gpt2")]
MORE = [(m, h) for m in ("lm2", "rmt") for h in ("gemma2", "opt", "mistral", "qwen3_moe")]
pairs = pytest.mark.parametrize(
    "memory, host",
    [pytest.param(m, h, id=f"{m}-{h}") for m, h in PAIRS + MORE] + [pytest.param("lm2_update_every", "llama")],
)
few = pytest.mark.parametrize("memory, host", [pytest.param(m, h, id=f"{m}-{h}") for m, h in PAIRS])


def naive(model, ids, steps, choose=None, mask=None):
    """Every step reads everything again, without a cache."""
    mask = torch.ones_like(ids) if mask is None else mask
    for _ in range(steps):
        logits = parallel(model, ids, attention_mask=mask).logits[:, -1].float()
        new = logits.argmax(-1) if choose is None else choose(logits)
        ids = torch.cat([ids, new[:, None]], dim=1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    return ids


def padded(lengths, side="left", seed=0):
    rows = [random_ids(1, n, seed=seed + i) for i, n in enumerate(lengths)]
    width = max(lengths)
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        n = row.shape[1]
        place = slice(width - n, None) if side == "left" else slice(0, n)
        ids[i, place], mask[i, place] = row[0], 1
    return rows, ids, mask


@pairs
def test_greedy_equals_recomputing(memory, host):
    model = attached(case(memory), host)
    ids = random_ids(2, 13)
    # 13 + 30 tokens: four borders lie in what is generated.
    expected = naive(model, ids, 30)
    assert model.generate(ids, max_new_tokens=30, do_sample=False).tolist() == expected.tolist()
    assert model.generate(ids, max_new_tokens=30, do_sample=False, use_cache=False).tolist() == expected.tolist()


@few
@pytest.mark.parametrize("length", [1, 7, 8, 9, 16])
def test_prompts_around_borders(memory, host, length):
    model = attached(case(memory), host)
    ids = random_ids(1, length)
    assert model.generate(ids, max_new_tokens=12, do_sample=False).tolist() == naive(model, ids, 12).tolist()


@few
def test_a_prompt_of_many_segments(memory, host):
    """20 segments, or as many as fit where a window counts positions in a table."""
    model = attached(case(memory), host)
    ids = random_ids(1, 110 if memory == "window" and host == "gpt2" else 160)
    assert model.generate(ids, max_new_tokens=12, do_sample=False).tolist() == naive(model, ids, 12).tolist()


@few
def test_sampling_with_a_seed(memory, host):
    model = attached(case(memory), host)
    ids = random_ids(2, 13)
    options = {"max_new_tokens": 20, "do_sample": True, "top_k": 0, "temperature": 0.8}
    torch.manual_seed(11)
    got = model.generate(ids, **options)
    torch.manual_seed(11)
    choose = lambda logits: torch.multinomial((logits / 0.8).softmax(-1), 1)[:, 0]  # noqa: E731
    assert got.tolist() == naive(model, ids, 20, choose).tolist()
    torch.manual_seed(12)
    assert model.generate(ids, **options).tolist() != got.tolist()


@few
@pytest.mark.parametrize("returned", [1, 3])
def test_beams(memory, host, returned):
    model = attached(case(memory), host)
    ids = random_ids(2, 13)
    options = {"max_new_tokens": 14, "num_beams": 3, "num_return_sequences": returned, "do_sample": False}
    options |= {"return_dict_in_generate": True, "output_scores": True}
    got, expected = (model.generate(ids, use_cache=cached, **options) for cached in (True, False))
    assert got.sequences.shape[0] == 2 * returned
    assert got.sequences.tolist() == expected.sequences.tolist()
    torch.testing.assert_close(got.sequences_scores, expected.sequences_scores, atol=1e-4, rtol=0)


@few
def test_beams_with_padding(memory, host):
    model = attached(case(memory), host)
    rows, ids, mask = padded((13, 6))
    options = {"max_new_tokens": 12, "num_beams": 3, "do_sample": False}
    got = model.generate(ids, attention_mask=mask, **options)
    for i, row in enumerate(rows):
        assert got[i, ids.shape[1] :].tolist() == model.generate(row, **options)[0, row.shape[1] :].tolist()


@few
def test_several_samples_of_one_prompt(memory, host):
    """Without a choice to make, all returned sequences are the greedy one."""
    model = attached(case(memory), host)
    ids = random_ids(1, 13)
    got = model.generate(ids, max_new_tokens=12, do_sample=True, top_k=1, num_return_sequences=3)
    assert got.tolist() == naive(model, ids, 12).expand(3, -1).tolist()


@pytest.mark.parametrize("side", ["left", "right"])
@pairs
def test_padded_batches_equal_single_runs(memory, host, side):
    model = attached(case(memory), host)
    rows, ids, mask = padded((21, 13, 5, 8), side)
    got = model.generate(ids, attention_mask=mask, max_new_tokens=14, do_sample=False)
    for i, row in enumerate(rows):
        alone = model.generate(row, max_new_tokens=14, do_sample=False)
        assert got[i, ids.shape[1] :].tolist() == alone[0, row.shape[1] :].tolist()


@few
def test_rows_that_end_stop_changing(memory, host):
    """The end token is what the rows say anyway at different steps; afterwards nothing of theirs moves."""
    model = attached(case(memory), host)
    rows, ids, mask = padded((21, 13, 8), seed=3)
    free = model.generate(ids, attention_mask=mask, max_new_tokens=30, do_sample=False)[:, ids.shape[1] :]
    # Row 1 ends at its sixth token, whatever the others then say.
    ends = {"eos_token_id": int(free[1, 5]), "pad_token_id": 0}
    cache = mnemic.hosts.MemoryCache(model.mnemic.layout)
    options = {"max_new_tokens": 30, "do_sample": False, **ends}
    got = model.generate(ids, attention_mask=mask, past_key_values=cache, **options)[:, ids.shape[1] :]
    lengths = []
    for i, row in enumerate(rows):
        alone = mnemic.hosts.MemoryCache(model.mnemic.layout)
        single = model.generate(row, past_key_values=alone, **options)[0, row.shape[1] :]
        n = len(single)
        lengths.append(n)
        assert got[i, :n].tolist() == single.tolist()
        assert not got[i, n:].any()
        assert (cache.seen[i], cache.open[i]) == (alone.seen[0], alone.open[0])
        assert_states_close(cache.state.select([i]), alone.state)
        torch.testing.assert_close(cache.last_logits[i], alone.last_logits[0], atol=1e-4, rtol=0)
    assert lengths[1] <= 6
    assert len(set(lengths)) > 1


@pairs
def test_a_carried_cache_goes_on(memory, host):
    """Two calls of generate() with one cache are one."""
    model = attached(case(memory), host)
    ids = random_ids(1, 13)
    whole = model.generate(ids, max_new_tokens=25, do_sample=False)
    first = model.generate(ids, max_new_tokens=11, do_sample=False, return_dict_in_generate=True)
    second = model.generate(first.sequences, past_key_values=first.past_key_values, max_new_tokens=14, do_sample=False)
    assert second.tolist() == whole.tolist()


@few
def test_a_conversation_over_one_cache(memory, host):
    """New user tokens between two calls; the whole history is given, as transformers does."""
    model = attached(case(memory), host)
    first = model.generate(random_ids(1, 13), max_new_tokens=9, do_sample=False, return_dict_in_generate=True)
    history = torch.cat([first.sequences, random_ids(1, 10, seed=4)], dim=1)
    got = model.generate(history, past_key_values=first.past_key_values, max_new_tokens=12, do_sample=False)
    assert got.tolist() == naive(model, history, 12).tolist()


@few
def test_outputs_per_step(memory, host):
    model = attached(case(memory), host)
    ids = random_ids(2, 13)
    out = model.generate(
        ids, max_new_tokens=10, do_sample=False, return_dict_in_generate=True, output_scores=True, output_logits=True
    )
    whole = parallel(model, out.sequences).logits
    assert len(out.logits) == len(out.scores) == 10
    torch.testing.assert_close(torch.stack(out.logits, 1), whole[:, 12:-1].float(), atol=1e-4, rtol=0)
    torch.testing.assert_close(torch.stack(out.scores, 1), whole[:, 12:-1].float(), atol=1e-4, rtol=0)
    assert out.past_key_values.seen.tolist() == [22, 22]


@few
def test_embeddings_as_prompt(memory, host):
    model = attached(case(memory), host)
    _, ids, mask = padded((21, 13))
    embeds = model.get_input_embeddings()(ids).detach()
    got = model.generate(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=14, do_sample=False)
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=14, do_sample=False)
    assert got.tolist() == expected[:, ids.shape[1] :].tolist()


@few
def test_hidden_states_are_refused(memory, host):
    model = attached(case(memory), host)
    for name in ("output_hidden_states", "output_attentions"):
        with pytest.raises(mnemic.UnsupportedError, match=name):
            model.generate(random_ids(1, 9), max_new_tokens=2, return_dict_in_generate=True, **{name: True})


@few
def test_processors_and_criteria(memory, host):
    """Repetition penalty, forbidden tokens and a time-free stop see the ids that transformers gives them."""
    model = attached(case(memory), host)
    ids = random_ids(1, 13)
    options = {"max_new_tokens": 16, "do_sample": False, "repetition_penalty": 1.7, "suppress_tokens": [7, 8, 9]}
    options["no_repeat_ngram_size"] = 2
    got, expected = (model.generate(ids, use_cache=cached, **options) for cached in (True, False))
    assert got.tolist() == expected.tolist()
    assert not set(got[0, 13:].tolist()) & {7, 8, 9}


@few
def test_prefill_in_chunks(memory, host):
    model = attached(case(memory), host)
    ids = random_ids(2, 37)
    got = model.generate(ids, max_new_tokens=9, do_sample=False, prefill_chunk_size=10)
    assert got.tolist() == naive(model, ids, 9).tolist()


@few
def test_streams_generate_what_models_generate(memory, host):
    model = attached(case(memory), host)
    ids = random_ids(1, 21)
    expected = model.generate(ids, max_new_tokens=15, do_sample=False)[0, 21:].tolist()
    assert model.stream().generate(ids, max_new_tokens=15, do_sample=False, return_ids=True) == expected
    fed = model.stream().feed(ids)
    assert fed.generate(max_new_tokens=15, do_sample=False, return_ids=True) == expected
    assert fed.tokens_seen == 36
    more = fed.generate(random_ids(1, 4, seed=7), max_new_tokens=6, do_sample=False, return_ids=True)
    history = torch.cat([ids, torch.tensor([expected]), random_ids(1, 4, seed=7)], dim=1)
    assert more == naive(model, history, 6)[0, 40:].tolist()
    beams = model.stream().feed(ids).generate(max_new_tokens=8, num_beams=3, do_sample=False, return_ids=True)
    assert beams == model.generate(ids, max_new_tokens=8, num_beams=3, do_sample=False)[0, 21:].tolist()


@pytest.mark.parametrize("memory", ["lm2", "rmt"])
def test_generating_leaves_no_trace(memory):
    model = attached(case(memory), "llama")
    ids = random_ids(2, 21)
    before = parallel(model, ids).logits
    one = model.generate(ids, max_new_tokens=12, do_sample=False)
    assert model.generate(ids, max_new_tokens=12, do_sample=False).tolist() == one.tolist()
    assert torch.equal(parallel(model, ids).logits, before)
    assert model.generation_config.cache_implementation is None


@pytest.mark.parametrize("memory", ["lm2", "rmt", "window"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_trainer(memory, checkpointing, tmp_path):
    """Three steps of the stock Trainer, evaluation, a checkpoint, and going on from it."""
    from transformers import Trainer, TrainingArguments

    # transformers 5.23 renamed the option.
    fields = TrainingArguments.__dataclass_fields__
    option = "activation_checkpointing" if "activation_checkpointing" in fields else "gradient_checkpointing"

    def trainer(model, steps):
        data = [{"input_ids": row, "labels": row} for row in random_ids(12, 29)]
        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=steps, per_device_train_batch_size=2, per_device_eval_batch_size=3,
            save_steps=3, logging_steps=1, learning_rate=1e-2, report_to=[], use_cpu=True, seed=0, disable_tqdm=True,
            eval_strategy="steps", eval_steps=3, lr_scheduler_type="constant",
            **{option: checkpointing},
        )  # fmt: skip
        return Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data[:5])

    straight = build(case(memory), noise=0.1)
    before = {n: p.clone() for n, p in straight.named_parameters()}
    run = trainer(straight, 5)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert len(losses) == 5
    assert losses[-1] < losses[0]
    assert all(not torch.equal(p, before[n]) for n, p in straight.named_parameters())
    assert run.evaluate()["eval_loss"] > 0
    logits = run.predict([{"input_ids": row} for row in random_ids(5, 29)]).predictions
    assert logits.shape == (5, 29, 61)
    torch.testing.assert_close(
        torch.from_numpy(logits), parallel(straight.eval(), random_ids(5, 29)).logits, atol=1e-5, rtol=0
    )

    # Another process: a fresh model, resumed from the checkpoint after three steps, ends where the first one did.
    resumed = build(case(memory), noise=0.3)
    trainer(resumed, 5).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for (name, p), q in zip(resumed.named_parameters(), straight.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}")

    loaded = mnemic.load(tmp_path / "checkpoint-5").eval()
    ids = random_ids(2, 29)
    torch.testing.assert_close(parallel(loaded, ids).logits, parallel(straight.eval(), ids).logits, atol=1e-6, rtol=0)
