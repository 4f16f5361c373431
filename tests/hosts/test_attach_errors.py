"""What cannot be attached or read is refused in plain words, and the host stays as it was."""

import copy
import dataclasses

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.cache_utils import DynamicCache

import mnemic
from mnemic import ConfigError, HostError, InputError, MnemicError, StateError, UnknownNameError
from mnemic.core import State
from tests.hosts.models import MEMORIES, SEGMENT, logits_of, tiny_model
from tests.tiny import HOSTS, VOCABULARY, host_config, random_ids, tiny_host

IDS = random_ids(2, 9, seed=3)


def snapshot(host) -> dict:
    """Everything that attaching may touch."""
    return {
        "class": type(host),
        "attributes": set(vars(host)),
        "modules": [(n, type(m), m.training) for n, m in host.named_modules()],
        "hooks": [(n, len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in host.named_modules()],
        "config": copy.deepcopy(host.config.to_dict()) if hasattr(host, "config") else None,
        "weights": {n: t.clone() for n, t in host.state_dict().items()},
        "flags": [(n, p.requires_grad, p.grad is None) for n, p in host.named_parameters()],
    }


def check_untouched(host, before):
    after = snapshot(host)
    for name in before:
        if name != "weights":
            assert after[name] == before[name], name
    assert after["weights"].keys() == before["weights"].keys()
    assert all(torch.equal(t, after["weights"][n]) for n, t in before["weights"].items())
    assert not mnemic.is_attached(host)


ATTACH = {
    "unknown memory, close": ("lm3", {}, UnknownNameError, r"No memory is called 'lm3'\. Did you mean .*'lm2'"),
    "unknown memory, far": ("zzzzzz", {}, UnknownNameError, r"No memory is called 'zzzzzz'\. Known: .*lm2.*rmt"),
    "empty name": ("", {}, UnknownNameError, r"No memory is called ''\. Known: "),
    "unknown option, close": (
        "lm2", {"num_slot": 8}, ConfigError,
        r"No option of lm2 is called 'num_slot'.*'num_slots'",
    ),
    "unknown option, far": ("rmt", {"qqqq": 1}, ConfigError, r"No option of rmt is called 'qqqq'.*Known: .*num_tokens"),
    "option of none": ("none", {"num_slots": 1}, ConfigError, r"No option of none is called 'num_slots'"),
    "unknown preset": ("lm2:papr", {}, UnknownNameError, r"No preset of lm2 is called 'papr'.*'paper'"),
    "unknown preset, by keyword": ("rmt", {"preset": "deep"}, UnknownNameError, r"No preset of rmt is called 'deep'"),
    "text for a number": ("lm2", {"num_slots": "8"}, ConfigError, r"num_slots = '8', expected int.*slots N"),
    "float for an integer": ("lm2", {"num_slots": 8.0}, ConfigError, r"num_slots = 8\.0, expected int"),
    "flag for a number": ("lm2", {"num_slots": True}, ConfigError, r"num_slots = True, expected int"),
    "number for a flag": ("rmt", {"memory_causal": 1}, ConfigError, r"memory_causal = 1, expected bool"),
    "none for a number": ("lm2", {"num_slots": None}, ConfigError, r"num_slots = None, expected int"),
    "unknown choice": ("lm2", {"num_slots": 8, "init": "zeros"}, ConfigError, r"init = 'zeros', expected .*'identity'"),
    "too small": ("lm2", {"num_slots": 0}, ConfigError, r"num_slots = 0, expected at least 1"),
    "negative": ("rmt", {"num_tokens": -1}, ConfigError, r"num_tokens = -1, expected at least 0"),
    "too large": (
        "lm2", {"num_slots": 8, "retention": 1.5}, ConfigError,
        r"retention = 1\.5, expected between 0 and 1",
    ),
    "on the border": (
        "lm2", {"num_slots": 8, "retention": 1.0}, ConfigError,
        r"retention = 1\.0, expected .*less than 1",
    ),
    "not a number": ("lm2", {"num_slots": 8, "retention": float("nan")}, ConfigError, r"retention = nan, expected"),
    "segment 0": ("none", {"segment": 0}, ConfigError, r"segment = 0, expected a number of tokens of at least 1"),
    "segment negative": ("none", {"segment": -5}, ConfigError, r"segment = -5, expected"),
    "segment float": ("none", {"segment": 8.0}, ConfigError, r"segment = 8\.0, expected"),
    "segment text": ("none", {"segment": "8"}, ConfigError, r"segment = '8', expected"),
    "segment flag": ("none", {"segment": True}, ConfigError, r"segment = True, expected"),
    "segment too long": ("none", {"segment": 129}, ConfigError, r"LlamaForCausalLM has 128; use segment=128 or less"),
    "segment and tokens too long": (
        "rmt", {"segment": 120, "num_tokens": 5}, ConfigError,
        r"120 tokens with 10 memory tokens needs 130 positions.*use segment=118 or less",
    ),
    "layer out of range": (
        "lm2", {"num_slots": 8, "memory_layers": (0, 2)}, ConfigError,
        r"memory_layers = \(0, 2\).*below 2",
    ),
    "layer negative": (
        "lm2", {"num_slots": 8, "memory_layers": (-1,)}, ConfigError,
        r"memory_layers = \(-1,\).*below 2",
    ),
    "layers twice": (
        "lm2", {"num_slots": 8, "memory_layers": (1, 1)}, ConfigError,
        r"memory_layers = \(1, 1\), expected increasing",
    ),
    "layers backwards": (
        "lm2", {"num_slots": 8, "memory_layers": (1, 0)}, ConfigError,
        r"expected increasing block numbers",
    ),
    "too many layers": (
        "lm2", {"num_slots": 8, "memory_layers": 3}, ConfigError,
        r"memory_layers = 3, expected .*below 2",
    ),
    "layers as text": (
        "lm2", {"num_slots": 8, "memory_layers": "all"}, ConfigError,
        r"memory_layers = 'all', expected int or tuple",
    ),
    "heads": (
        "lm2", {"num_slots": 8, "num_heads": 5}, ConfigError,
        r"num_heads = 5 does not divide the host's width 32",
    ),
    "slots": (
        "lm2", {"num_slots": 33}, ConfigError,
        r"33 slots cannot start as unit vectors of width 32; use at most 32",
    ),
    "slots by default": ("lm2", {}, ConfigError, r"64 slots cannot start as unit vectors of width 32"),
    "update_every": (
        "lm2", {"num_slots": 8, "segment": 8, "update_every": 3}, ConfigError,
        r"update_every = 3 does not divide",
    ),
    "identity routing": (
        "lm2", {"num_slots": 4, "segment": 8, "route": "identity"}, ConfigError,
        r"num_slots = segment; got 4 and 8",
    ),
    "a class": (mnemic.Stream, {}, MnemicError, r"memory"),
    "nothing": (None, {}, MnemicError, r"memory"),
    "a number": (3, {}, MnemicError, r"memory"),
}  # fmt: skip


@pytest.fixture(scope="module")
def untouched():
    """One host for all refusals: what one of them left behind would show in the next."""
    host = tiny_host().train()
    host.model.layers[0].eval()
    return host, snapshot(host), logits_of(host, IDS)


@pytest.mark.parametrize("case", ATTACH)
def test_what_cannot_be_attached_is_refused(case, untouched):
    host, before, logits = untouched
    memory, options, error, message = ATTACH[case]
    with pytest.raises(error, match=message):
        mnemic.attach(host, memory, **options)
    check_untouched(host, before)
    assert torch.equal(logits_of(host, IDS), logits)


def seq2seq():
    return AutoModelForSeq2SeqLM.from_config(
        AutoConfig.for_model("t5", vocab_size=61, d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2)
    )


def bart():
    small = {k: 8 for k in ("encoder_ffn_dim", "decoder_ffn_dim")} | {
        k: 1 for k in ("encoder_layers", "decoder_layers", "encoder_attention_heads", "decoder_attention_heads")
    }
    return AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("bart", vocab_size=61, d_model=16, **small))


def bert():
    config = {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return AutoModel.from_config(AutoConfig.for_model("bert", intermediate_size=16, **config))


def bert_mlm():
    from transformers import AutoModelForMaskedLM

    config = {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return AutoModelForMaskedLM.from_config(AutoConfig.for_model("bert", intermediate_size=16, **config))


def mamba():
    config = {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", **config))


def with_attention(name):
    def build():
        host = tiny_host()
        host.config._attn_implementation = name
        return host

    return build


def crowded():
    host = tiny_host()
    host.memory = nn.Linear(2, 2)
    return host


def narrow_embeddings():
    return tiny_host("opt", word_embed_proj_dim=16)


UNFIT = {
    "t5": (seq2seq, r"T5ForConditionalGeneration is no decoder-only language model.*LlamaForCausalLM"),
    "bart": (bart, r"BartForConditionalGeneration is no decoder-only"),
    "bert": (bert, r"BertModel is no decoder-only"),
    "bert with a head": (bert_mlm, r"BertForMaskedLM"),
    "mamba": (mamba, r"MambaForCausalLM"),
    "without a head": (lambda: AutoModel.from_config(host_config("llama")), r"LlamaModel is no decoder-only"),
    "plain module": (lambda: nn.Linear(3, 3), r"Linear is no transformers model; a host is a causal language model"),
    "flash": (
        with_attention("flash_attention_2"),
        r"attn_implementation='flash_attention_2'.*attn_implementation='sdpa'",
    ),
    "flex": (with_attention("flex_attention"), r"attn_implementation='flex_attention'.*load it with"),
    "crowded": (crowded, r"an attribute 'memory' or 'mnemic' of its own"),
    "narrow embeddings": (narrow_embeddings, r"OPTForCausalLM embeds tokens in 16 dimensions but runs on 32"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNFIT)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_hosts_that_do_not_fit_are_refused(name):
    build, message = UNFIT[name]
    host = build().train()
    before = snapshot(host)
    with pytest.raises(HostError, match=message):
        mnemic.attach(host, "lm2", segment=SEGMENT, num_slots=8)
    check_untouched(host, before)


def test_a_config_of_no_language_model_is_refused():
    with pytest.raises(HostError, match="ViTConfig describes no causal language model"):
        mnemic.attach(AutoConfig.for_model("vit"), "none")


def test_a_second_memory_is_refused_and_the_first_stays():
    model = tiny_model("lm2")
    expected = logits_of(model, IDS)
    with pytest.raises(HostError, match=r"LlamaForCausalLM already has the memory 'lm2'; detach it first"):
        mnemic.attach(model, "rmt", segment=SEGMENT)
    assert model.memory.name == "lm2"
    assert torch.equal(logits_of(model, IDS), expected)


def test_detaching_needs_a_memory():
    with pytest.raises(HostError, match="LlamaForCausalLM has no memory to detach"):
        mnemic.detach(tiny_host())


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("memory", MEMORIES)
def test_detaching_gives_the_host_back(memory, host):
    model = tiny_host(host).train()
    before, logits = snapshot(model), logits_of(model.eval(), IDS)
    model.train()
    mnemic.attach(model, memory, segment=SEGMENT, **MEMORIES[memory])
    assert model.training
    model.eval().stream().feed(IDS[:1])
    assert mnemic.detach(model.train()) is model
    check_untouched(model, before)
    assert torch.equal(logits_of(model.eval(), IDS), logits)


def test_a_failure_late_in_attaching_is_undone(monkeypatch):
    host = tiny_host().train()
    before = snapshot(host)

    def fail(base):
        raise KeyboardInterrupt

    monkeypatch.setattr("mnemic.hosts.probe.check_memory", fail)
    with pytest.raises(KeyboardInterrupt):
        mnemic.attach(host, "rmt", segment=SEGMENT, num_tokens=2)
    check_untouched(host, before)


# Input of a model


@pytest.fixture(scope="module")
def model():
    return tiny_model()


BAD_IDS = {
    "float": (torch.ones(1, 4), r"dtype torch\.float32, expected int64"),
    "bool": (torch.ones(1, 4, dtype=torch.bool), r"dtype torch\.bool, expected int64"),
    "1-D": (torch.tensor([3, 4]), r"shape \(2,\), expected \(batch, tokens\)"),
    "3-D": (torch.ones(1, 2, 3, dtype=torch.long), r"shape \(1, 2, 3\), expected \(batch, tokens\)"),
    "0-D": (torch.tensor(3), r"shape \(\), expected"),
    "no columns": (torch.ones(1, 0, dtype=torch.long), r"shape \(1, 0\).*at least one token"),
    "no rows": (torch.ones(0, 3, dtype=torch.long), r"shape \(0, 3\).*at least one token"),
    "too high": (torch.tensor([[3, VOCABULARY]]), r"from 3 to 61, expected 0 to 60.*tokenizer"),
    "negative": (torch.tensor([[-1, 3]]), r"from -1 to 3, expected 0 to 60"),
}


@pytest.mark.parametrize("case", BAD_IDS)
def test_ids_that_cannot_be_read_are_refused(model, case):
    ids, message = BAD_IDS[case]
    with pytest.raises(InputError, match=message):
        model(ids)


def test_embeddings_that_cannot_be_read_are_refused(model):
    with pytest.raises(InputError, match=r"shape \(1, 32\), expected \(batch, tokens, width\)"):
        model(inputs_embeds=torch.zeros(1, 32))
    for inputs in ({}, {"input_ids": IDS, "inputs_embeds": torch.zeros(2, 9, 32)}):
        with pytest.raises(InputError, match="either input_ids or inputs_embeds"):
            model(**inputs)
    with pytest.raises(InputError, match=r"have width 16, expected the host's 32"):
        model(inputs_embeds=torch.zeros(1, 4, 16))


def test_masks_that_cannot_be_read_are_refused(model):
    for shape in ((2, 8), (1, 9), (9,), (2, 1, 9, 9), (3, 9)):
        with pytest.raises(InputError, match=r"attention_mask of shape .* expected \(2, 9\)"):
            model(IDS, attention_mask=torch.ones(shape))
    with pytest.raises(InputError, match="Every row of this call is padding"):
        model(IDS, attention_mask=torch.zeros(2, 9))


def test_caches_and_states_of_others_are_refused(model):
    with pytest.raises(InputError, match="past_key_values is a DynamicCache, expected the MemoryCache"):
        model(IDS, past_key_values=DynamicCache())
    with torch.no_grad():
        output = model(IDS, use_cache=True)
    with pytest.raises(InputError, match="The cache holds 2 rows, the input 1"):
        model(IDS[:1], past_key_values=output.past_key_values)
    with pytest.raises(InputError, match="either past_key_values or memory_state"):
        model(IDS, past_key_values=output.past_key_values, memory_state=output.memory_state)
    others = {
        "memory": tiny_model("rmt"), "slots": tiny_model(num_slots=4),
        "width": tiny_model(host=tiny_host(hidden_size=64)), "banks": tiny_model(memory_scope="per_layer"),
    }  # fmt: skip
    for other in others.values():
        with pytest.raises(StateError, match="States of different memories cannot be mixed"):
            model(IDS, memory_state=other(IDS).memory_state)
    with pytest.raises(StateError, match="cannot be mixed"):
        model(IDS, memory_state=State())
    with pytest.raises(InputError, match="memory_state has 1 rows, the input 2"):
        model(IDS, memory_state=model(IDS[:1]).memory_state)


def test_a_cache_of_another_model_is_refused(model):
    for other in (tiny_model("rmt"), tiny_model(segment=16), tiny_model("none"), tiny_model(num_slots=4)):
        with torch.no_grad():
            cache = other(IDS, use_cache=True).past_key_values
        with pytest.raises(StateError, match="cache of a model with another memory or segment"):
            model(IDS, past_key_values=cache)


def test_a_window_ends_with_the_table_of_positions():
    model = tiny_model("window", "gpt2", segment=16)
    stream = model.stream().feed(random_ids(120, seed=1).tolist())
    with pytest.raises(InputError, match=r"131 tokens does not fit the 128 positions that GPT2LMHeadModel has.*rotary"):
        stream.feed(random_ids(11, seed=2).tolist())
    with pytest.raises(InputError, match=r"129 tokens does not fit the 128 positions"):
        logits_of(model, random_ids(1, 129))
    assert stream.tokens_seen == 120
    assert stream.feed(random_ids(8, seed=2).tolist()).tokens_seen == 128
    # Rotary positions have no end.
    assert tiny_model("window", segment=16).stream().feed(random_ids(300).tolist()).tokens_seen == 300


def test_outputs_that_are_not_joined_are_refused(model):
    for name in ("output_hidden_states", "output_attentions"):
        with pytest.raises(mnemic.UnsupportedError, match="forward hook"):
            model(IDS, **{name: True})


def test_a_caught_refusal_leaves_the_model_as_it_was(model):
    expected = logits_of(model, IDS)
    for ids, _ in BAD_IDS.values():
        with pytest.raises(InputError):
            model(ids)
    assert torch.equal(logits_of(model, IDS), expected)
    with pytest.raises(dataclasses.FrozenInstanceError):
        model.memory.config.num_slots = 3
