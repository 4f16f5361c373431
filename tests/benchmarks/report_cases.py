"""Results of an evaluation that never was, in the form that reports are made from."""

import random
from typing import Any

LENGTHS = {"qa1": ("0k", "1k", "4k"), "segment_mqar": ("2", "4", "8", "16"), "niah": ("1k", "4k", "16k")}
CHANCE = {"qa1": 1 / 6, "segment_mqar": 1 / 64, "niah": None}


def score(
    model: str, task: str, length: str, mean: float, *, train_seed: Any = 0, seed: int = 1, **changes: Any
) -> dict:
    official = {"mean": mean, "low": max(0.0, mean - 0.08), "high": min(1.0, mean + 0.08)}
    return {
        **{"model": model, "task": task, "length": length, "train_seed": train_seed, "seed": seed, "count": 100},
        **{
            "chance": None,
            "mean_tokens": 1000,
            "truncated": 0,
            "official": official,
            "fixed": dict(official),
            **changes,
        },
    }


def model(name: str, **changes: Any) -> dict:
    return {
        **{"model": name, "memory": name, "parameters": 1_234_567, "state_bytes": 2**20, "tokens_trained": 5_000_000},
        **{"note": None, **changes},
    }


def results(*scores: dict, models: tuple[dict, ...] = (), grouped: tuple[dict, ...] = (), **changes: Any) -> dict:
    names = dict.fromkeys(entry["model"] for entry in scores)
    return {
        **{"title": "Memories", "scale": None, "settings": {}, "models": list(models or map(model, names))},
        **{"scores": list(scores), "grouped": list(grouped), **changes},
    }


def realistic(names: tuple[str, ...] = ("lm2", "rmt", "armt", "titans", "window", "none"), train_seeds: int = 1) -> Any:
    """Results and costs of several models on three tasks; equal arguments give equal data."""
    draw = random.Random(7)
    scores, grouped, costs = [], [], []
    for skill, name in enumerate(names):
        for train_seed in range(train_seeds):
            for task, lengths in LENGTHS.items():
                for step, length in enumerate(lengths):
                    run = {"model": name, "task": task, "length": length, "train_seed": train_seed, "seed": 1}
                    mean = round(
                        max(0.02, min(1.0, 0.97 - 0.03 * skill - 0.05 * skill * step + draw.gauss(0, 0.02))), 2
                    )
                    made = score(name, task, length, mean, train_seed=train_seed, chance=CHANCE[task])
                    if task == "qa1":
                        made["fixed"] = {**made["official"], "mean": max(0.0, mean - 0.02)}
                    if name == "none" and length == "16k":
                        made["truncated"] = 12_345
                    scores.append(made)
                    costs.append(
                        {
                            **run,
                            **{"seconds": 3.5 * (step + 1), "tokens_per_second": 30_000 / (skill + 1)},
                            "peak_bytes": 2**30 + skill * 2**26,
                        }
                    )
                    if task == "niah":
                        by, values = "depth", range(0, 101, 10)
                    elif task == "segment_mqar":
                        by, values = "distance", range(1, int(length))
                    else:
                        continue
                    for value in values:
                        part = max(0.0, min(1.0, mean - 0.01 * value / len(values) + draw.gauss(0, 0.05)))
                        grouped.append({**run, "by": by, "value": value, "count": 10, "official": part, "fixed": part})
    models = [
        model(name, memory=f"{name}:paper", state_bytes=2**12 * (len(names) - 1 - i)) for i, name in enumerate(names)
    ]
    models.append(model("retro", note="not run: needs a database of neighbours", state_bytes=None, tokens_trained=None))
    made = results(*scores, models=tuple(models), grouped=tuple(grouped), title="Memories at equal budget")
    return {**made, "scale": "CPU scale", "settings": {"count": 100, "tasks": LENGTHS, "steps": 2000}}, costs
