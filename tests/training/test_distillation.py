"""Distillation: what the trainer computes, and a toy domain that a small memory must help two hosts with."""

import copy
import random
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Trainer, TrainingArguments

import mnemic
from mnemic.ops.mixture import mix_logits
from mnemic.training import Collator, listed_tokenizer, word_tokenizer
from mnemic.training.companion import attach_companion, tune_alpha
from mnemic.training.distillation import DistillationTrainer, TargetCollator, distil
from mnemic.training.neighbour_targets import NeighbourTargets
from tests.tiny import random_ids, tiny_host

NAMES = [a + b for a in ("Ka", "Lo", "Mi", "Ru", "Ta", "Ve", "Zo", "Be") for b in ("ra", "len", "vi", "dor", "sun")]
PLACES = [a + b for a in ("Nor", "Sul", "Est", "Wes") for b in ("holm", "ford", "by", "wick", "dale")]
JOBS = ["baker", "miner", "judge", "tailor", "pilot", "singer", "farmer", "doctor", "welder", "guard"]
ANIMALS = ["cat", "dog", "goat", "horse", "crow", "hare", "fox", "owl", "toad", "mole"]
GENERAL = [
    "{name} met {other} in {place} .", "the {job} from {place} saw a {animal} .", "{name} and {other} like {place} .",
    "a {animal} followed {name} to {place} .", "the {job} gave {name} a {animal} .", "{name} is in {place} .",
]  # fmt: skip
DOMAIN = {
    "place": ["{name} lives in {place} .", "the home of {name} is {place} .", "in {place} lives {name} ."],
    "job": ["{name} works as a {job} .", "the job of {name} is {job} .", "{name} the {job} works ."],
    "animal": ["{name} owns a {animal} .", "the {animal} belongs to {name} .", "{name} keeps a {animal} ."],
}


def general_text(count: int, seed: int) -> list[str]:
    """Sentences in which any word goes with any other."""
    rng = random.Random(f"general|{seed}")
    pick = {"name": NAMES, "other": NAMES, "place": PLACES, "job": JOBS, "animal": ANIMALS}
    return [rng.choice(GENERAL).format(**{k: rng.choice(v) for k, v in pick.items()}) for _ in range(count)]


def domain_text() -> tuple[list[str], list[str], list[str]]:
    """Each name has one place, job and animal, told in three ways: 300 sentences to learn, 30 to tune, 30 to test."""
    rng = random.Random("domain")
    facts = {n: {"place": rng.choice(PLACES), "job": rng.choice(JOBS), "animal": rng.choice(ANIMALS)} for n in NAMES}
    told = [t.format(name=n, **facts[n]) for n in NAMES for templates in DOMAIN.values() for t in templates]
    rng.shuffle(told)
    return told[:300], told[300:330], told[330:]


def llama(width: int, layers: int, vocabulary: int, seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64, pad_token_id=0, bos_token_id=2,
        eos_token_id=2,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


def train(model: PreTrainedModel, documents: list[list[int]], folder: Path, steps: int, rate: float) -> PreTrainedModel:
    rows: Any = [{"input_ids": d, "labels": d} for d in documents]
    arguments = TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=32, learning_rate=rate, report_to=[],
        save_strategy="no", disable_tqdm=True, remove_unused_columns=False, use_cpu=True,
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=rows, data_collator=Collator()).train()
    return model.eval()


def predictions(model: PreTrainedModel, documents: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Logits (N, V) and next tokens (N,) of all positions."""
    batch = Collator()([{"input_ids": d, "labels": d} for d in documents])
    ids, mask = batch["input_ids"], batch["attention_mask"]
    assert isinstance(ids, Tensor)
    assert isinstance(mask, Tensor)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    real = mask[:, 1:].bool()
    return logits[real], ids[:, 1:][real]


def perplexity(base: tuple[Tensor, Tensor], memory: tuple[Tensor, Tensor], alpha: float) -> float:
    mixed = mix_logits(base[0], memory[0], alpha)
    return float(torch.nn.functional.cross_entropy(mixed, base[1]).exp())


def plugged_in(
    base: PreTrainedModel, memory: PreTrainedModel, valid: list[list[int]], test: list[list[int]]
) -> tuple[float, float, float]:
    """The tuned alpha, and the perplexity of `test` by the host alone and with the memory attached."""
    batches: list[Any] = [Collator()([{"input_ids": d, "labels": d} for d in docs]) for docs in (valid, test)]
    model = attach_companion(copy.deepcopy(base), memory, segment=32)
    alpha, found = tune_alpha(model, batches[:1]), []
    for weight in (0.0, alpha):
        model.memory.config = model.memory.config.replace(alpha=weight)
        with torch.no_grad():
            found.append(float(model(**batches[1], use_cache=False).loss.exp()))
    return alpha, found[0], found[1]


@pytest.mark.slow
def test_a_memory_learns_a_domain_and_helps_hosts_of_two_widths(tmp_path):
    learn, valid, test = domain_text()
    everyday = general_text(2000, seed=0)
    tokenizer = word_tokenizer([*everyday, *learn, *valid, *test])

    def encode(texts: list[str]) -> list[list[int]]:
        return [[2, *tokenizer(text)["input_ids"]] for text in texts]

    size = len(tokenizer)
    bases = {w: train(llama(w, 2, size, 0), encode(everyday), tmp_path / "base", 400, 3e-3) for w in (64, 96)}
    # The datastore model is fine-tuned on the domain, as in the paper; the hosts are not.
    teacher = llama(64, 2, size, 0)
    teacher.load_state_dict(bases[64].state_dict())
    train(teacher, encode(learn), tmp_path / "teacher", 60, 1e-3)
    targets = NeighbourTargets.build(
        tmp_path / "targets", teacher, tokenizer, encode(learn), neighbours=64, batch_size=64, progress=False
    )
    memories = {}
    for beta in (0.5, 0.0):
        memories[beta] = llama(32, 1, size, 1)
        distil(memories[beta], targets, steps=400, learning_rate=3e-3, beta=beta, batch_size=32, progress=False)
        memories[beta].eval()
    texts = {
        "valid": encode(valid), "test": encode(test),
        "general valid": encode(general_text(60, seed=1)), "general test": encode(general_text(60, seed=2)),
    }  # fmt: skip
    seen = {w: {name: predictions(base, t) for name, t in texts.items()} for w, base in bases.items()}
    recalled = {b: {name: predictions(memory, t) for name, t in texts.items()} for b, memory in memories.items()}
    for width, base in bases.items():
        improved = plugged_in(base, memories[0.5], texts["valid"], texts["test"])
        print(f"width {width}, plugged in: alpha {improved[0]:.2f}, domain {improved[1]:.2f} -> {improved[2]:.2f}")
        assert improved[2] < 0.8 * improved[1]
    alphas = [i / 20 for i in range(20)]
    for width, beta in product(seen, recalled):
        table = {n: [perplexity(seen[width][n], recalled[beta][n], a) for a in alphas] for n in texts}
        # The best on the domain among those that cost general text less than 10%, both on validation text.
        allowed = [i for i in range(20) if table["general valid"][i] < 1.1 * table["general valid"][0]]
        best, free = min(allowed, key=table["valid"].__getitem__), min(range(20), key=table["valid"].__getitem__)
        domain, general = table["test"], table["general test"]
        own = perplexity(seen[width]["test"], recalled[beta]["test"], 1.0)
        print(
            f"width {width}, beta {beta}: domain {domain[0]:.2f} -> {domain[best]:.2f}, general {general[0]:.2f} -> "
            f"{general[best]:.2f} at alpha {alphas[best]}; tuned on the domain alone, alpha {alphas[free]}: "
            f"{domain[free]:.2f} and {general[free]:.2f}; memory alone {own:.2f}"
        )
        if beta == 0.5:
            assert domain[best] < 0.8 * domain[0]
            assert general[best] < 1.15 * general[0]


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> NeighbourTargets:
    tokenizer = listed_tokenizer([f"w{i}" for i in range(61)], pad_token="w0")
    documents = [random_ids(n, seed=n).tolist() for n in (6, 9, 4, 8)]
    folder = tmp_path_factory.mktemp("distil") / "targets"
    return NeighbourTargets.build(folder, tiny_host(), tokenizer, documents, neighbours=5, progress=False)


def trainer(tmp_path: Path, model: PreTrainedModel, targets: NeighbourTargets, **options: Any) -> DistillationTrainer:
    arguments = TrainingArguments(str(tmp_path), report_to=[], remove_unused_columns=False, use_cpu=True)
    return DistillationTrainer(model, arguments, train_dataset=targets, **options)


def test_loss_of_a_padded_batch_equals_dense_formula(tmp_path, targets):
    model = tiny_host(seed=3)
    loss = trainer(tmp_path, model, targets, beta=0.4).compute_loss(
        model, TargetCollator()([targets[i] for i in range(4)])
    )
    terms = []
    for example in (targets[i] for i in range(4)):
        found = model(example["input_ids"][None]).logits[0].double().log_softmax(-1)
        for t in range(len(example["input_ids"]) - 1):
            dense = torch.zeros(61, dtype=torch.float64)
            dense.index_add_(0, example["tokens"][t].long(), example["probs"][t].double())
            dense /= dense.sum()
            divergence = torch.where(dense > 0, dense * (dense.log() - found[t]), 0).sum()
            terms.append(0.4 * divergence - 0.6 * found[t, example["input_ids"][t + 1]])
    torch.testing.assert_close(loss.double(), torch.stack(terms).mean(), rtol=1e-5, atol=1e-5)


def test_accumulated_batches_are_averaged(targets):
    results = []
    for accumulation in (1, 2):
        model = tiny_host(seed=3)
        # All documents in every batch, so one batch or two have the same mean; the reported loss must agree.
        rows: Any = [targets[1]] * 8
        batch = {"batch_size": 8 // accumulation, "accumulation": accumulation}
        results.append(distil(model, rows, steps=1, learning_rate=1e-3, progress=False, **batch).training_loss)
    assert results[0] == pytest.approx(results[1], rel=1e-4)


def test_distil_trains_in_place_and_lowers_the_loss(targets):
    model = tiny_host(seed=3)
    before = [p.detach().clone() for p in model.parameters()]
    first = distil(model, targets, steps=1, learning_rate=1e-2, batch_size=4, progress=False).training_loss
    last = distil(model, targets, steps=15, learning_rate=1e-2, batch_size=4, progress=False).training_loss
    assert last < 0.8 * first
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_refusals(tmp_path, targets):
    with pytest.raises(mnemic.HostError, match="has 40 tokens"):
        distil(tiny_host(vocab_size=40), targets, steps=1, learning_rate=1e-3)
    with pytest.raises(mnemic.ConfigError, match="beta is 2"):
        trainer(tmp_path, tiny_host(), targets, beta=2)
