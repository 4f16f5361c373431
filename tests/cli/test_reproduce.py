"""mnemic reproduce: what it says before it runs, what it refuses, and that a run goes on."""

import json

import pytest

from mnemic.benchmarks import reproduction
from mnemic.benchmarks.reproduction import cost
from mnemic.benchmarks.reproduction.recipe import parse
from tests.benchmarks.test_reproduction import SMALL
from tests.cli.conftest import invoke, succeed


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(reproduction, "recipe", lambda system, scale: parse(SMALL))


def test_the_full_configuration_is_printed_and_not_run():
    said = succeed("reproduce", "lm2", "--full").stdout
    assert "hidden_size = 2048" in said
    assert "GPU-hours" in said
    assert "Nothing was run." in said


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("lm3", "--dry-run"), "Did you mean 'lm2'"),
        (("lm3", "--full"), "Did you mean 'lm2'"),
        (("lm2", "--scale", "gpus", "--dry-run"), "Did you mean 'gpu'"),
        (("lm2",), "--output names the folder"),
    ],
)
def test_refused(arguments, message):
    result = invoke("reproduce", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_without_a_gpu_its_scale_is_counted_and_not_run(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    text = SMALL.replace('ship = "lm2"', 'ship = "lm2"\ngpu = true').replace(
        "steps = 2", "steps = 2\nparameters = 9000"
    )
    monkeypatch.setattr(reproduction, "recipe", lambda system, scale: parse(text))
    said = succeed("reproduce", "lm2", "--scale", "gpu", "--dry-run")
    assert "Counted, not measured" in said.stderr
    assert "main, lm2, seed 0" in said.stdout
    refused = invoke("reproduce", "lm2", "--scale", "gpu", "--output", tmp_path / "run")
    assert refused.exit_code == 2
    assert "for a CUDA GPU" in refused.stderr
    assert not (tmp_path / "run").exists()


def test_a_folder_of_another_recipe_and_a_file(tmp_path):
    (tmp_path / "recipe.toml").write_text("another", encoding="utf-8")
    assert "by another recipe" in invoke("reproduce", "lm2", "--output", tmp_path).stderr
    assert "is a file" in invoke("reproduce", "lm2", "--output", tmp_path / "recipe.toml").stderr


def test_no_room_is_told_before_anything_is_run(small, tmp_path, monkeypatch):
    monkeypatch.setattr(cost, "free_memory", lambda: 2**20)
    monkeypatch.setattr(
        cost, "costs", lambda *_, **__: [cost.Cost(parse(SMALL).comparison.jobs[0], 1, 1, 1.0, 2**30, 1)]
    )
    result = invoke("reproduce", "lm2", "--output", tmp_path / "run")
    assert result.exit_code == 2
    assert "1.0 GiB of memory and 1.0 MiB are free" in result.stderr
    assert not (tmp_path / "run" / "runs").exists()


@pytest.mark.slow
def test_a_run_is_planned_made_exported_and_goes_on(small, tmp_path):
    planned = succeed("reproduce", "lm2", "--dry-run")
    assert "main, none + end, seed 0" in planned.stdout
    assert not list(tmp_path.iterdir())
    made = succeed("reproduce", "lm2", "--output", tmp_path / "run", "--export", tmp_path / "model")
    assert "6/6" in made.stderr
    assert {"recipe.toml", "findings.json", "tables.md", "curves.png", "report.html"} <= {
        p.name for p in (tmp_path / "run").iterdir()
    }
    found = (tmp_path / "run" / "findings.json").read_bytes()
    again = succeed("reproduce", "lm2", "--output", tmp_path / "run")
    assert "0 minutes of training and measuring" in again.stderr
    assert (tmp_path / "run" / "findings.json").read_bytes() == found
    assert json.loads(found)["main"] == "main"
    assert "lm2, from Small" in (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
