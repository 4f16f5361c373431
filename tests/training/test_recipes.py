"""Every recipe is a valid experiment, and runs when its host and sizes are made small."""

import tomllib
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from mnemic.benchmarks.building import build
from mnemic.benchmarks.comparison import Comparison
from mnemic.benchmarks.experiment import Experiment
from mnemic.benchmarks.runs import run
from mnemic.hosts import parameter_report
from mnemic.training import word_tokenizer
from tests.tiny import host_config

FOLDER = Path(__file__).parents[2] / "recipes"
RECIPES = sorted(FOLDER.rglob("*.toml"))
COMPARISONS = [p for p in RECIPES if p.parent.name == "compare"]
EXPERIMENTS = [
    p for p in RECIPES if p not in COMPARISONS and "part" not in tomllib.loads(p.read_text(encoding="utf-8"))
]


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda p: p.stem)
def test_recipes_are_experiments_with_cost_and_goal(path):
    experiment = Experiment.read(path)
    assert Experiment.from_dict(tomllib.loads(experiment.to_toml())) == experiment
    if path.parent == FOLDER:
        text = path.read_text(encoding="utf-8")
        assert "# Cost (estimate" in text
        assert "# Should reach" in text


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda p: p.stem)
def test_the_models_of_a_comparison_are_equally_large(path):
    comparison = Comparison.read(path)
    first = comparison.jobs[0].board
    for job in comparison.jobs:
        # The models of the other boards differ in vocabulary alone, whose tokenizer takes long to make.
        if job.board == first:
            model, _ = build(job.experiment)
            size = sum(part["total"] for part in parameter_report(model).values())
            assert abs(size - job.experiment.parameters) < 500


@pytest.mark.parametrize("name", ["lm2-attached", "rmt-babilong", "armt-babilong"])
def test_recipes_for_pretrained_hosts_run_at_a_small_size(name, tmp_path):
    tokenizer = word_tokenizer(["Mary went to the garden . Where is Mary ?"], 256)
    kind = "gpt2" if "babilong" in name else "llama"
    host = AutoModelForCausalLM.from_config(host_config(kind, vocab_size=len(tokenizer)))
    host.save_pretrained(tmp_path / "host")
    tokenizer.save_pretrained(tmp_path / "host")
    small = {"host": str(tmp_path / "host"), "segment": 64, "steps": 2, "batch_size": 2, "warmup_steps": 1}
    options = {"memory_options": {"num_tokens": 2} if kind == "gpt2" else {"num_slots": 8}}
    experiment = Experiment.read(FOLDER / f"{name}.toml", {**small, **options, "most_segments": (2,)})
    log = run(experiment, tmp_path / "run", progress=False)
    assert log["history"][-1]["step"] == 2
