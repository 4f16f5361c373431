"""Hosts beyond the ten: each either gives the right numbers, or is refused by name and left as it was."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

import mnemic
from tests.contract.cases import CHUNKINGS, assert_states_close, chunked, parallel, plain_segments
from tests.tiny import _COMMON, _GPT2, random_ids

C: dict[str, Any] = {**_COMMON, "initializer_range": 0.15}
PLAIN: dict[str, Any] = {k: v for k, v in C.items() if k not in ("num_key_value_heads", "head_dim")}
G: dict[str, Any] = {**_GPT2, "initializer_range": 0.15}
FALCON: dict[str, Any] = {k: v for k, v in PLAIN.items() if k != "intermediate_size"}
NARROW: dict[str, Any] = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
MEMORIES: dict[str, dict[str, Any]] = {
    "lm2": {"num_slots": 6, "preset": "default"},
    "rmt": {"num_tokens": 3},
    "window": {},
}

# Name -> (model type, config, memories that attach). What does not attach must say why.
ALL = ("lm2", "rmt", "window")
HOSTS: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "cohere": ("cohere", C, ALL),
    "cohere2": ("cohere2", {**C, "sliding_window": 6}, ALL),
    "starcoder2": ("starcoder2", {**C, "sliding_window": 6}, ALL),
    "granite": ("granite", C, ALL),
    "glm": ("glm", C, ALL),
    "gemma3": ("gemma3_text", {**C, **NARROW, "query_pre_attn_scalar": 8}, ALL),
    "smollm3": ("smollm3", {**C, "no_rope_layers": [1, 0]}, ALL),
    "llama4": (
        "llama4_text",
        {**C, "num_local_experts": 2, "attention_chunk_size": 6, "intermediate_size_mlp": 48,
         "interleave_moe_layer_step": 1, "no_rope_layers": [1, 0]},
        ALL,
    ),
    "gpt_oss": ("gpt_oss", {**C, **NARROW, "num_local_experts": 4, "num_experts_per_tok": 2,
                            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}, ALL),
    "deepseek_v3": (
        "deepseek_v3",
        {**C, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
         "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16,
         "first_k_dense_replace": 1, "num_key_value_heads": 4, "head_dim": 4},
        ALL,
    ),
    "biogpt": ("biogpt", PLAIN, ALL),
    "gpt_bigcode": ("gpt_bigcode", G, ALL),
    "xglm": ("xglm", {"vocab_size": 61, "d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4,
                      "max_position_embeddings": 128, "pad_token_id": 0, "init_std": 0.15}, ALL),
    "bert_decoder": ("bert", {**PLAIN, "is_decoder": True}, ALL),
    # Attention modules that take no keyword arguments: the frame of the running step is found all the same.
    "stablelm": ("stablelm", C, ALL),
    "nemotron": ("nemotron", C, ALL),
    # Nothing is handed down to the module that runs the layers, so what write tokens become is not seen.
    "falcon": ("falcon", {**FALCON, "new_decoder_architecture": False}, ("lm2", "window")),
    "gptj": ("gptj", {**G, "rotary_dim": 4}, ("lm2", "window")),
    # Positions or masks that the host makes itself.
    "falcon_alibi": ("falcon", {**FALCON, "alibi": True}, ()),
    "bloom": ("bloom", {"vocab_size": 61, "hidden_size": 32, "n_layer": 2, "n_head": 4}, ()),
    "mpt": ("mpt", {"vocab_size": 61, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128}, ()),
    "gpt_neo": (
        "gpt_neo",
        {"vocab_size": 61, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "window_size": 6,
         "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 128, "initializer_range": 0.15},
        (),
    ),
    "bert": ("bert", PLAIN, ()),
    # Not decoders, or layers without keys and values.
    "t5": ("t5", {"vocab_size": 61, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}, ()),
    "mamba": ("mamba", {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}, ()),
    "jamba": (
        "jamba",
        {**C, "num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4,
         "expert_layer_period": 2, "expert_layer_offset": 1},
        (),
    ),
    "qwen3_next": (
        "qwen3_next",
        {**C, "layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 4, "num_experts": 2,
         "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "num_experts_per_tok": 1,
         "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
        (),
    ),
    "lfm2": ("lfm2", {**C, "layer_types": ["conv", "full_attention"]}, ()),
}  # fmt: skip

ATTACHING = [pytest.param(h, m, id=f"{m}-{h}") for h, (_, _, ok) in HOSTS.items() for m in ok]
REFUSED = [pytest.param(h, m, id=f"{m}-{h}") for h, (_, _, ok) in HOSTS.items() for m in MEMORIES if m not in ok]


def host_of(name):
    kind, settings, _ = HOSTS[name]
    torch.manual_seed(0)
    auto = AutoModelForSeq2SeqLM if kind == "t5" else AutoModelForCausalLM
    model = auto.from_config(AutoConfig.for_model(kind, **settings)).eval()
    model.generation_config.eos_token_id = None
    return model


@pytest.mark.parametrize("host, memory", ATTACHING)
def test_hosts_that_attach_give_the_right_numbers(host, memory):
    model = mnemic.attach(host_of(host), memory, segment=8, **MEMORIES[memory])
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.memory.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    ids = random_ids(2, 29)
    whole = parallel(model, ids)
    for chunks in CHUNKINGS.values():
        logits, cache = chunked(model, ids, chunks)
        torch.testing.assert_close(logits, whole.logits, atol=1e-4, rtol=0)
        assert_states_close(cache.state, whole.memory_state)
    mask = torch.ones_like(ids)
    mask[0, :9], mask[1, 20:] = 0, 0
    padded = parallel(model, ids, attention_mask=mask).logits
    torch.testing.assert_close(padded[:1, 9:], parallel(model, ids[:1, 9:]).logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(padded[1:, :20], parallel(model, ids[1:, :20]).logits, atol=1e-4, rtol=0)
    ragged, _ = chunked(model, ids, [12, 3, 14], mask)
    torch.testing.assert_close(ragged[mask.bool()], padded[mask.bool()], atol=1e-4, rtol=0)
    changed = ids.clone()
    changed[:, 18] = (changed[:, 18] + 1) % 61
    difference = (parallel(model, changed).logits - whole.logits).abs().amax((0, 2))
    assert difference[:18].max() < 1e-6 < difference[18]
    prompt = ids[:, :13]
    generated = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False)
    said = parallel(model, generated).logits.argmax(-1)
    assert generated[:, 13:].tolist() == said[:, 12:-1].tolist()


@pytest.mark.parametrize("host", [h for h, (_, _, ok) in HOSTS.items() if ok])
def test_without_memory_segments_are_the_host(host):
    plain = host_of(host)
    ids = random_ids(2, 29)
    expected = plain_segments(plain, ids)
    with torch.no_grad():
        long = plain(ids, use_cache=False).logits
    model = mnemic.attach(plain, "none", segment=8)
    torch.testing.assert_close(parallel(model, ids).logits, expected, atol=1e-5, rtol=0)
    mnemic.detach(model)
    mnemic.attach(plain, "window", segment=32)
    torch.testing.assert_close(parallel(plain, ids).logits, long, atol=1e-5, rtol=0)
    mnemic.detach(plain)
    with torch.no_grad():
        assert torch.equal(plain(ids, use_cache=False).logits, long)


@pytest.mark.parametrize("host, memory", REFUSED)
def test_hosts_that_do_not_attach_say_why_and_stay_as_they_were(host, memory):
    model = host_of(host).train()
    before = type(model), sorted(vars(model)), {n: t.clone() for n, t in model.state_dict().items()}
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    name = type(model).__name__.split("For")[0].removesuffix("LMHeadModel")
    with pytest.raises(mnemic.HostError, match=name) as caught:
        mnemic.attach(model, memory, segment=8, **MEMORIES[memory])
    assert len(str(caught.value)) > 60, "the reason is missing"
    assert (type(model), sorted(vars(model))) == before[:2]
    assert model.training
    assert all(torch.equal(t, before[2][n]) for n, t in model.state_dict().items())
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
