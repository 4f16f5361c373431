"""lm-evaluation-harness on models with memory: real tasks offline, log-likelihoods by hand, requests apart."""

import json
import random
import subprocess
import sys
import warnings

import pytest
import torch

import mnemic
from tests.tiny import tiny_host

with warnings.catch_warnings():
    # Deprecations of what the harness itself imports.
    warnings.simplefilter("ignore")
    lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'mnemic[eval]'")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from mnemic.benchmarks.harness import MnemicLM

NAMES = "where is mary john the milk kitchen garden went to took and A B . ?"
WORDS = ["<pad>", "<s>", "</s>", "<unk>", *NAMES.split()]
SEGMENT = 8
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)


def attached(memory="lm2", segment=SEGMENT, **options):
    torch.manual_seed(0)
    model = mnemic.attach(tiny_host(vocab_size=len(WORDS)), memory, segment=segment, **options).eval()
    with torch.no_grad():
        # A memory that starts as the identity would hide what it remembers.
        for parameter in model.memory.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module")
def model():
    return attached(num_slots=4)


@pytest.fixture(scope="module")
def harness(model, tokenizer):
    return MnemicLM(model, tokenizer, batch_size=3)


def text(words, seed):
    return " ".join(random.Random(seed).choices(WORDS[4:], k=words))


def requests(kind, arguments):
    return [Instance(request_type=kind, doc={}, arguments=given, idx=i) for i, given in enumerate(arguments)]


def pairs():
    lengths = [(3, 2), (30, 1), (30, 5), (17, 9), (0, 4), (8, 8), (1, 1), (41, 3)]
    found = [(text(a, i), " " + text(b, 100 + i)) for i, (a, b) in enumerate(lengths)]
    # Same context, other single token: read once.
    return [*found, (found[1][0], " milk"), (found[1][0], " garden")]


def by_hand(model, context, continuation):
    with torch.no_grad():
        logits = model(torch.tensor([[*context, *continuation]]), use_cache=False).logits[0].double()
    logits = logits[len(context) - 1 : -1].log_softmax(-1)
    chosen = torch.tensor(continuation)
    return float(logits.gather(1, chosen[:, None]).sum()), bool((logits.argmax(-1) == chosen).all())


def test_loglikelihoods_equal_a_direct_computation(harness, model, tokenizer):
    found = harness.loglikelihood(requests("loglikelihood", pairs()), disable_tqdm=True)
    greedy = 0
    for (context, continuation), (value, likeliest) in zip(pairs(), found, strict=True):
        ids = tokenizer(context)["input_ids"] or [tokenizer.bos_token_id]
        expected, expected_greedy = by_hand(model, ids, tokenizer(continuation)["input_ids"])
        assert value == pytest.approx(expected, abs=1e-4)
        assert likeliest == expected_greedy
        greedy += likeliest
    # The likeliest continuation itself, so that both answers occur.
    context = pairs()[1][0]
    with torch.no_grad():
        best = int(model(tokenizer(context, return_tensors="pt")["input_ids"], use_cache=False).logits[0, -1].argmax())
    [(_, likeliest)] = harness.loglikelihood(requests("loglikelihood", [(context, " " + WORDS[best])]), True)
    assert likeliest
    assert greedy < len(found)


def test_rolling_reads_whole_documents(harness, model, tokenizer):
    documents = [text(n, n) for n in (1, 8, 50, 133)]
    found = harness.loglikelihood_rolling(requests("loglikelihood_rolling", [(d,) for d in documents]), True)
    for document, value in zip(documents, found, strict=True):
        expected, _ = by_hand(model, [tokenizer.bos_token_id], tokenizer(document)["input_ids"])
        assert value == pytest.approx(expected, abs=1e-4 * max(1, abs(expected) / 100))


def test_memory_counts(harness, model, tokenizer):
    """What stands segments before the continuation changes its log-likelihood, and resetting there does too."""
    near = text(SEGMENT, 1)
    one, two = (f"{text(3 * SEGMENT, seed)} {near}" for seed in (2, 3))
    found = harness.loglikelihood(requests("loglikelihood", [(c, " milk") for c in (one, two, near)]), True)
    assert len({round(value, 3) for value, _ in found}) == 3


@pytest.mark.parametrize("kind", ["loglikelihood", "loglikelihood_rolling", "generate_until"])
def test_requests_do_not_see_each_other(model, tokenizer, kind):
    options = {"until": ["."], "max_gen_toks": 6}
    given = {
        "loglikelihood": pairs(),
        "loglikelihood_rolling": [(text(n, n),) for n in (5, 29, 12, 16)],
        "generate_until": [(text(n, n), options) for n in (3, 26, 9, 16, 31)],
    }[kind]
    shuffled = random.Random(0).sample(range(len(given)), len(given))

    def answers(order, batch_size, repeat=1):
        harness = MnemicLM(model, tokenizer, batch_size=batch_size)
        for _ in range(repeat):
            found = getattr(harness, kind)(requests(kind, [given[i] for i in order]), disable_tqdm=True)
        return [found[order.index(i)] for i in range(len(given))]

    apart = MnemicLM(model, tokenizer)
    alone = [getattr(apart, kind)(requests(kind, [one]), disable_tqdm=True)[0] for one in given]
    for found in (answers(list(range(len(given))), 4, repeat=2), answers(shuffled, 2), answers(shuffled, 1)):
        for one, expected in zip(found, alone, strict=True):
            if kind == "loglikelihood":
                assert one[0] == pytest.approx(expected[0], abs=1e-4)
                assert one[1] == expected[1]
            else:
                assert one == (expected if kind == "generate_until" else pytest.approx(expected, abs=1e-3))


def test_generation_is_that_of_a_stream(harness, model, tokenizer):
    prompt = text(27, 5)
    [found] = harness.generate_until(requests("generate_until", [(prompt, {"until": [], "max_gen_toks": 7})]), True)
    expected = model.stream(tokenizer=tokenizer).generate(
        prompt, max_new_tokens=7, do_sample=False, pad_token_id=0, eos_token_id=2
    )
    assert found == expected
    assert found


def test_the_host_alone_is_the_harness_own_model(tokenizer):
    host = tiny_host(vocab_size=len(WORDS))
    many = [(text(i % 40, i), " " + text(i % 5 + 1, 200 + i)) for i in range(50)]
    plain = HFLM(pretrained=host, tokenizer=tokenizer, batch_size=2)
    expected = plain.loglikelihood(requests("loglikelihood", many), disable_tqdm=True)
    alone = MnemicLM(mnemic.attach(tiny_host(vocab_size=len(WORDS)), "none", segment=64), tokenizer, batch_size=2)
    found = alone.loglikelihood(requests("loglikelihood", many), disable_tqdm=True)
    for one, other in zip(found, expected, strict=True):
        assert one[0] == pytest.approx(other[0], abs=1e-5)
        assert one[1] == other[1]


def write_tasks(folder):
    rows = [
        {"story": f"{text(30, i)} {name} went to the {place} .", "question": f"where is {name} ?", "right": place}
        for i, (name, place) in enumerate([("mary", "kitchen"), ("john", "garden"), ("mary", "garden")])
    ]
    data = folder / "rows.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    common = (
        "dataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {folder / 'cache'}}}\n"
        'test_split: test\ndoc_to_text: "{{story}} {{question}}"\n'
    )
    (folder / "choice.yaml").write_text(
        f"task: mnemic_choice\noutput_type: multiple_choice\n{common}"
        'doc_to_choice: [kitchen, garden]\ndoc_to_target: "{{right}}"\nmetric_list:\n  - metric: acc\n',
        encoding="utf-8",
    )
    (folder / "words.yaml").write_text(
        f'task: mnemic_words\noutput_type: generate_until\n{common}doc_to_target: "{{{{right}}}}"\n'
        'generation_kwargs: {until: ["."], max_gen_toks: 4}\nmetric_list:\n  - metric: exact_match\n',
        encoding="utf-8",
    )
    return rows


@pytest.mark.parametrize("memory, options", [("lm2", {"num_slots": 4}), ("none", {})])
def test_a_task_of_local_files_runs_offline(tmp_path, tokenizer, monkeypatch, memory, options):
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    model = attached(memory, **options)
    mnemic.save(model, tmp_path / "model", whole=True)
    tokenizer.save_pretrained(tmp_path / "model")
    rows = write_tasks(tmp_path)
    found = lm_eval.simple_evaluate(
        model="mnemic",
        model_args={"pretrained": str(tmp_path / "model")},
        tasks=["mnemic_choice", "mnemic_words"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
    )
    right = 0
    for row in rows:
        context = tokenizer(f"{row['story']} {row['question']}")["input_ids"]
        scores = [by_hand(model, context, tokenizer(choice)["input_ids"])[0] for choice in ("kitchen", "garden")]
        right += ("kitchen", "garden")[scores.index(max(scores))] == row["right"]
    assert found["results"]["mnemic_choice"]["acc,none"] == pytest.approx(right / len(rows))
    for row, sample in zip(rows, found["samples"]["mnemic_words"], strict=True):
        said = model.stream(tokenizer=tokenizer).generate(
            f"{row['story']} {row['question']}", max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=2
        )
        assert sample["filtered_resps"] == [said.split(".")[0]]
    assert "exact_match,none" in found["results"]["mnemic_words"]
    assert found["config"]["segment"] == SEGMENT
    assert found["config"]["memory"] == model.memory.config.to_dict()


@pytest.mark.slow
def test_command_line(tmp_path, tokenizer, model):
    mnemic.save(model, tmp_path / "model", whole=True)
    tokenizer.save_pretrained(tmp_path / "model")
    write_tasks(tmp_path)
    command = [sys.executable, "-W", "ignore", "-m", "mnemic.benchmarks.harness", "--model", "mnemic"]
    command += ["--model_args", f"pretrained={tmp_path / 'model'}", "--tasks", "mnemic_choice"]
    command += ["--include_path", str(tmp_path), "--output_path", str(tmp_path / "out"), "--batch_size", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    [written] = (tmp_path / "out").rglob("results_*.json")
    assert "acc,none" in json.loads(written.read_text(encoding="utf-8"))["results"]["mnemic_choice"]


def test_what_a_memory_has_no_use_for_is_refused(model, tokenizer):
    with pytest.raises(mnemic.ConfigError, match="max_length"):
        MnemicLM(model, tokenizer, max_length=512)
    with pytest.raises(mnemic.ConfigError, match="auto"):
        MnemicLM(model, tokenizer, batch_size="auto")
    with pytest.raises(mnemic.ConfigError, match="attach"):
        MnemicLM(tiny_host(vocab_size=len(WORDS)), tokenizer)
    with pytest.raises(mnemic.ConfigError, match="tokenizer"):
        MnemicLM(model)
