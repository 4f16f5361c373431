"""Saving and loading models: adapters, whole models, LoRA; what comes back computes the same numbers."""

import json
import shutil

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import mnemic
from mnemic import FileFormatError, HostError, InputError, MnemicError, StateError
from mnemic.core.files import read_file
from tests.hosts.models import MEMORIES, SEGMENT, logits_of, stir, tiny_model
from tests.tiny import host_config, random_ids, tiny_host

IDS = random_ids(2, 21, seed=5)
LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


@pytest.fixture
def host_folder(tmp_path):
    tiny_host().save_pretrained(tmp_path / "host")
    return tmp_path / "host"


def options(memory):
    return {"segment": SEGMENT, **MEMORIES[memory]}


# Adapters


@pytest.mark.parametrize("memory", MEMORIES)
def test_an_adapter_comes_back_on_its_host(memory, tmp_path):
    model = tiny_model(memory)
    folder = mnemic.save(model, tmp_path / "adapter")
    assert [p.name for p in folder.iterdir()] == ["memory.safetensors"]
    loaded = mnemic.load(folder, host=tiny_host())
    assert torch.equal(logits_of(loaded, IDS), logits_of(model, IDS))
    assert loaded.memory.config == model.memory.config
    assert loaded.mnemic.layout == model.mnemic.layout


def test_an_adapter_holds_the_memory_only(tmp_path):
    model = tiny_model(host=tiny_host(vocab_size=5000, intermediate_size=512))
    folder = mnemic.save(model, tmp_path)
    size = sum(p.stat().st_size for p in folder.iterdir())
    memory = 4 * sum(t.numel() for t in model.memory.state_dict().values())
    assert memory < size < memory + 20_000
    assert size < 0.2 * 4 * sum(p.numel() for p in model.parameters())
    header, tensors = read_file(folder / "memory.safetensors", "adapter")
    assert tensors.keys() == model.memory.state_dict().keys()
    assert header["memory"]["memory"] == "lm2"
    assert header["host"]["class"] == "LlamaForCausalLM"


def test_an_adapter_finds_its_host_by_the_recorded_name_or_by_a_path(host_folder, tmp_path):
    model = mnemic.attach(host_folder, "lm2", **options("lm2"))
    stir(model)
    mnemic.save(model, tmp_path / "adapter")
    expected = logits_of(model, IDS)
    for host in (None, str(host_folder), host_folder, AutoModelForCausalLM.from_pretrained(host_folder)):
        loaded = mnemic.load(tmp_path / "adapter", host)
        assert torch.equal(logits_of(loaded, IDS), expected)
    narrow = mnemic.load(str(tmp_path / "adapter"), dtype=torch.bfloat16)
    assert narrow.dtype == torch.bfloat16
    assert {p.dtype for p in narrow.memory.parameters()} == {torch.bfloat16}
    shutil.move(host_folder, tmp_path / "moved")
    with pytest.raises(HostError, match=r"adapter needs the host .*host'"):
        mnemic.load(tmp_path / "adapter")
    assert torch.equal(logits_of(mnemic.load(tmp_path / "adapter", tmp_path / "moved"), IDS), expected)


def test_an_adapter_of_a_nameless_host_asks_for_it(tmp_path):
    mnemic.save(tiny_model(), tmp_path)
    with pytest.raises(HostError, match=r"LlamaForCausalLM without a name; pass host="):
        mnemic.load(tmp_path)


def test_an_adapter_is_refused_by_other_hosts(tmp_path):
    mnemic.save(tiny_model(), tmp_path)
    wrong = {
        "other weights of the host": tiny_host(seed=1),
        "another architecture or width": tiny_host(hidden_size=64),
    }
    for message, host in wrong.items():
        with pytest.raises(StateError, match=message) as caught:
            mnemic.load(tmp_path, host)
        assert str(tmp_path) in str(caught.value)
        assert not mnemic.is_attached(host)
    for name in ("qwen3", "gpt2"):
        with pytest.raises(StateError, match="another architecture"):
            mnemic.load(tmp_path, tiny_host(name))
    with pytest.raises(HostError, match="already has the memory"):
        mnemic.load(tmp_path, tiny_model())


def test_a_trained_host_is_told_apart(tmp_path):
    model = tiny_model()
    mnemic.save(model, tmp_path)
    mnemic.detach(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 1.05
    with pytest.raises(StateError, match="other weights of the host"):
        mnemic.load(tmp_path, model)


def test_damaged_adapters_are_refused(tmp_path):
    mnemic.save(tiny_model(), tmp_path)
    path = tmp_path / "memory.safetensors"
    good = path.read_bytes()
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 1
    for bad in (good[:-10], good[: len(good) // 2], b"", b"text", bytes(flipped)):
        path.write_bytes(bad)
        host = tiny_host()
        with pytest.raises(FileFormatError, match=r"memory\.safetensors"):
            mnemic.load(tmp_path, host)
        assert not mnemic.is_attached(host)
    path.unlink()
    with pytest.raises(FileFormatError, match=r"holds neither memory\.safetensors nor mnemic\.json"):
        mnemic.load(tmp_path, tiny_host())
    with pytest.raises(FileFormatError, match="holds neither"):
        mnemic.load(tmp_path / "missing")
    tiny_model().stream().feed([3, 4]).save(path)
    with pytest.raises(FileFormatError, match="holds a mnemic stream; expected a mnemic adapter file"):
        mnemic.load(tmp_path, tiny_host())


def test_saving_needs_a_memory_and_a_folder(tmp_path):
    with pytest.raises(HostError, match="has no memory; save it with save_pretrained"):
        mnemic.save(tiny_host(), tmp_path)
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        for whole in (False, True):
            with pytest.raises(InputError, match=str(folder)):
                mnemic.save(tiny_model(), folder, whole=whole)


def test_an_adapter_and_a_whole_model_do_not_share_a_folder(tmp_path):
    model = tiny_model()
    mnemic.save(model, tmp_path / "adapter")
    mnemic.save(model, tmp_path / "adapter")
    with pytest.raises(InputError, match="holds an adapter; choose another folder for a whole model"):
        mnemic.save(model, tmp_path / "adapter", whole=True)
    mnemic.save(model, tmp_path / "whole", whole=True)
    with pytest.raises(InputError, match="holds a whole model; choose another folder for an adapter"):
        mnemic.save(model, tmp_path / "whole")
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(FileFormatError, match=r"holds an adapter .* and a whole model .* of its own"):
        mnemic.load(tmp_path / "adapter", tiny_host())


# Whole models


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("way", ["save", "save_pretrained"])
def test_a_whole_model_comes_back_in_one_call(memory, way, tmp_path):
    model = tiny_model(memory)
    expected = logits_of(model, IDS)
    if way == "save":
        mnemic.save(model, tmp_path / "whole", whole=True)
    else:
        model.save_pretrained(tmp_path / "whole")
    assert torch.equal(logits_of(model, IDS), expected)
    loaded = mnemic.load(tmp_path / "whole")
    assert isinstance(loaded, LlamaForCausalLM)
    assert torch.equal(logits_of(loaded, IDS), expected)
    assert {n: t.shape for n, t in loaded.state_dict().items()} == {n: t.shape for n, t in model.state_dict().items()}
    # And once more from what was loaded.
    mnemic.save(loaded, tmp_path / "again", whole=True)
    assert torch.equal(logits_of(mnemic.load(tmp_path / "again"), IDS), expected)


@pytest.mark.parametrize("host", ["llama", "gpt2", "qwen3_moe", "opt"])
def test_a_whole_folder_still_is_the_host(host, tmp_path):
    # qwen3_moe stores its experts otherwise than it computes with them.
    plain = logits_of(tiny_host(host), IDS)
    model = tiny_model(host=host)
    mnemic.save(model, tmp_path, whole=True)
    loaded = mnemic.load(tmp_path)
    assert torch.equal(logits_of(loaded, IDS), logits_of(model, IDS))
    host_again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not mnemic.is_attached(host_again)
    assert torch.equal(logits_of(host_again, IDS), plain)
    assert torch.equal(logits_of(mnemic.detach(loaded), IDS), plain)


@pytest.mark.parametrize("host", ["llama", "qwen3_moe"])
def test_a_whole_model_in_shards(host, tmp_path):
    model = tiny_model(host=host)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert torch.equal(logits_of(mnemic.load(tmp_path), IDS), logits_of(model, IDS))


def test_saving_whole_over_shards_leaves_no_old_weights(tmp_path):
    tiny_model(seed=1).save_pretrained(tmp_path, max_shard_size="20KB")
    model = tiny_model(seed=2)
    mnemic.save(model, tmp_path, whole=True)
    assert torch.equal(logits_of(mnemic.load(tmp_path), IDS), logits_of(model, IDS))


def test_options_of_from_pretrained_reach_the_host(tmp_path):
    model = tiny_model()
    mnemic.save(model, tmp_path, whole=True)
    narrow = mnemic.load(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in narrow.parameters()} == {torch.bfloat16}
    assert (logits_of(narrow, IDS).float() - logits_of(model, IDS)).abs().max() < 0.5
    eager = mnemic.load(tmp_path, attn_implementation="eager")
    assert (logits_of(eager, IDS) - logits_of(model, IDS)).abs().max() < 1e-4


def test_damaged_whole_models_are_refused(tmp_path):
    mnemic.save(tiny_model(), tmp_path, whole=True)
    header = json.loads((tmp_path / "mnemic.json").read_text())
    weights = (tmp_path / "model.safetensors").read_bytes()
    bad_headers = ["{", "[]", "null", "", '{"memory": {}}', json.dumps({**header, "format_version": 99}),
                   json.dumps({**header, "format_version": "x"}),
                   json.dumps({**header, "memory": {**header["memory"], "num_slots": -1}}),
                   json.dumps({**header, "memory": {**header["memory"], "memory": "lm3"}}),
                   json.dumps({**header, "memory": 3}), json.dumps({**header, "segment": "8"})]  # fmt: skip
    for bad in bad_headers:
        (tmp_path / "mnemic.json").write_text(bad)
        with pytest.raises(MnemicError):
            mnemic.load(tmp_path)
    (tmp_path / "mnemic.json").write_text(json.dumps({**header, "format_version": 99}))
    with pytest.raises(FileFormatError, match=r"format version 99; this release reads up to 1"):
        mnemic.load(tmp_path)
    (tmp_path / "mnemic.json").write_text(json.dumps({**header, "memory": {**header["memory"], "num_slots": 4}}))
    with pytest.raises(StateError, match="do not fit the memory"):
        mnemic.load(tmp_path)
    (tmp_path / "mnemic.json").write_text(json.dumps(header))
    for bad in (weights[: len(weights) // 2], b""):
        (tmp_path / "model.safetensors").write_bytes(bad)
        with pytest.raises(FileFormatError, match="holds no complete host"):
            mnemic.load(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileFormatError, match="holds no complete host"):
        mnemic.load(tmp_path)
    # A folder of the host alone under a header that promises more.
    tiny_host().save_pretrained(tmp_path)
    with pytest.raises(StateError, match="do not fit the memory"):
        mnemic.load(tmp_path)


# LoRA


def with_lora(order):
    torch.manual_seed(3)
    if order == "memory first":
        model = mnemic.add_lora(tiny_model(), peft.LoraConfig(**LORA))
    else:
        model = peft.get_peft_model(tiny_host(), peft.LoraConfig(**LORA))
        assert mnemic.attach(model, "lm2", **options("lm2")) is model
        stir(model.get_base_model())
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@pytest.mark.parametrize("order", ["memory first", "lora first"])
def test_lora_and_memory_train_together(order):
    model = with_lora(order)
    assert isinstance(model, peft.PeftModel)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    assert all(flag == ("lora_" in n or ".memory." in n) for n, flag in flags.items())
    model.train()
    loss = model(IDS, labels=IDS).loss
    loss.backward()
    for name, parameter in model.named_parameters():
        trained = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        assert trained == flags[name], name
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    optimizer.step()
    with torch.no_grad():
        assert model(IDS, labels=IDS).loss < loss
    report = mnemic.parameter_report(model)
    assert report["host"]["trainable"] == 0
    assert report["memory"]["trainable"] == report["memory"]["total"] > 0
    # q: 32 -> 32, v: 32 -> 16, rank 2, two layers.
    assert report["lora"] == {"total": 448, "trainable": 448}


@pytest.mark.parametrize("order", ["memory first", "lora first"])
def test_lora_and_memory_generate_and_stream(order):
    model = with_lora(order)
    new = model.generate(input_ids=IDS, max_new_tokens=6)
    assert new.shape == (2, 27)
    ids = IDS[:1]
    for _ in range(6):
        ids = torch.cat([ids, logits_of(model, ids)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(new[:1], ids)
    stream = model.stream()
    stream.feed(IDS[:1, :10])
    assert stream.generate(IDS[:1, 10:], max_new_tokens=6, return_ids=True) == ids[0, 21:].tolist()
    assert mnemic.is_attached(model)


@pytest.mark.parametrize("order", ["memory first", "lora first"])
def test_lora_and_memory_are_saved_and_loaded_together(order, tmp_path):
    model = with_lora(order)
    expected = logits_of(model, IDS)
    mnemic.save(model, tmp_path / "adapter")
    assert {"memory.safetensors", "adapter_config.json", "adapter_model.safetensors"} <= {
        p.name for p in (tmp_path / "adapter").iterdir()
    }
    loaded = mnemic.load(tmp_path / "adapter", tiny_host()).eval()
    assert isinstance(loaded, peft.PeftModel)
    assert torch.equal(logits_of(loaded, IDS), expected)
    report = mnemic.parameter_report(loaded)
    assert report["lora"] == {"total": 448, "trainable": 0}
    assert report["memory"]["trainable"] == report["memory"]["total"]
    trainable = mnemic.load(tmp_path / "adapter", tiny_host(), trainable=True)
    assert mnemic.parameter_report(trainable)["lora"] == {"total": 448, "trainable": 448}
    trainable(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in trainable.parameters() if p.requires_grad)
    with pytest.raises(HostError, match="merge the LoRA weights first"):
        mnemic.save(model, tmp_path / "whole", whole=True)
    merged = model.merge_and_unload()
    mnemic.save(merged, tmp_path / "merged", whole=True)
    assert (logits_of(mnemic.load(tmp_path / "merged"), IDS) - expected).abs().max() < 1e-4


def test_a_stream_of_a_lora_model_is_saved_and_loaded(tmp_path):
    model = with_lora("memory first")
    stream = model.stream()
    stream.feed(IDS[:1])
    stream.save(tmp_path / "a.mnemic")
    loaded = mnemic.Stream.load(model, tmp_path / "a.mnemic")
    assert torch.equal(loaded.feed([5, 6], return_logits=True), stream.feed([5, 6], return_logits=True))


# Parameters


def test_freezing_the_host_leaves_the_memory_to_train():
    model = tiny_model()
    report = mnemic.parameter_report(model)
    host = sum(p.numel() for p in tiny_host().parameters())
    assert report["host"] == {"total": host, "trainable": host}
    assert report["lora"] == {"total": 0, "trainable": 0}
    assert mnemic.freeze_host(model) is model
    assert mnemic.parameter_report(model)["host"] == {"total": host, "trainable": 0}
    assert mnemic.parameter_report(model)["memory"] == report["memory"]
    model(IDS, labels=IDS).loss.backward()
    assert {n.split(".")[0] for n, p in model.named_parameters() if p.grad is not None} == {"memory"}
    mnemic.freeze_host(model, False)
    assert mnemic.parameter_report(model) == report


# Where hosts come from


def test_attaching_to_a_path_a_name_and_a_config(host_folder):
    expected = logits_of(tiny_host(), IDS)
    for host in (host_folder, str(host_folder)):
        model = mnemic.attach(host, "lm2", segment=64, num_slots=8)
        assert type(model).__name__ == "LlamaForCausalLM"
        # Hosts with weights get the preset that leaves their logits alone.
        assert (logits_of(model, IDS) - expected).abs().max() < 1e-5
    fresh = mnemic.attach(host_config("llama"), "lm2", segment=8, num_slots=8)
    assert fresh.memory.alpha is None
    assert fresh.memory.config.identity_start is False
    assert logits_of(fresh, IDS).shape == (2, 21, 61)


def test_hosts_that_do_not_exist(tmp_path, monkeypatch):
    with pytest.raises(HostError, match=r"Cannot load a host from .*nothing-here'.*Give a folder") as caught:
        mnemic.attach(tmp_path / "nothing-here")
    assert "config to build a fresh host" in str(caught.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(HostError, match=r"Cannot load a host from .*empty"):
        mnemic.attach(str(tmp_path / "empty"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HostError, match=r"Cannot load a host from 'no-such/model-name'"):
        mnemic.attach("no-such/model-name")
    for bad in (None, 3, object()):
        with pytest.raises(HostError, match="model, config, name or path; got"):
            mnemic.attach(bad)
