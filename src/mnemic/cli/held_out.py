"""`mnemic eval --tasks text`: loss and perplexity on documents kept apart, with the state carried and without."""

import json
import platform
import time
from itertools import islice
from pathlib import Path
from typing import Any

import typer


def evaluate_held_out(
    folders: list[Path], data: str | None, samples: int, batch_size: int, seeds: str, output: Path | None
) -> None:
    """One run, as many documents as `samples`; results-text.json in `output`, by default in the folder of the run."""
    import torch
    import transformers

    import mnemic

    from ..benchmarks.held_out import evaluate_text, summarise
    from ..benchmarks.shipped import open_trained
    from ..core.errors import InputError
    from ..core.files import replace_atomically
    from ..hosts import base_model
    from ..hosts.saving import describe
    from ._shared import numbers

    if len(folders) > 1 or len(numbers(seeds, "--seeds")) > 1:
        raise InputError("Held-out text is measured of one run with one seed at a time.")
    folder = folders[0]
    trained = open_trained(folder)
    settings = {
        "run": folder.name, "task": "text", "samples": samples, "batch_size": batch_size,
        "seed": numbers(seeds, "--seeds")[0],
        "data": data if data is not None else trained.experiment.data if trained.experiment else None,
    }  # fmt: skip
    documents = _documents(trained, settings)
    place = folder if output is None else output
    place.mkdir(parents=True, exist_ok=True)
    started, base = time.perf_counter(), base_model(trained.model)
    records = evaluate_text(trained.model, documents, batch_size=batch_size, progress=True)
    result = {
        "settings": settings,
        "model": {k: v for k, v in describe(base).items() if k in ("memory", "segment")},
        "host": base.mnemic.host_class.__name__,
        "versions": {
            "mnemic": mnemic.__version__, "torch": torch.__version__, "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "device": str(base.device),
        "threads": torch.get_num_threads(),
        "seconds": round(time.perf_counter() - started, 1),
        **summarise(records),
        "records": records,
    }  # fmt: skip
    path = place / "results-text.json"
    text = json.dumps(result, indent=1, ensure_ascii=False)
    replace_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    _print(result)
    typer.echo(f"Written: {path}, {result['seconds']} s", err=True)


def _documents(trained: Any, settings: dict[str, Any]) -> list[Any]:
    """Held-out documents of the data, of each part its share, in an order that the seed shuffles."""
    from ..core.errors import ConfigError, DataError
    from ..training import Mixture
    from ..training.mixture import is_prepared
    from ..training.shards import VALIDATION
    from ..training.tokenizer import tokenizer_fingerprint

    data, folder = settings["data"], trained.folder
    if data is None or not is_prepared(data):
        raise ConfigError(
            f"{data or folder}: text is measured on documents kept apart; prepare them with mnemic prepare "
            "--validation-fraction X and name the folder with --data."
        )
    mixture = Mixture.open(data, split=VALIDATION, seed=settings["seed"])
    if tokenizer_fingerprint(trained.tokenizer) != mixture.parts[0].store.fingerprint:
        raise DataError(
            f"{data} was prepared with another tokenizer; prepare it with that of the run: --tokenizer {folder}."
        )
    settings["samples"] = min(settings["samples"], sum(len(part.store) for part in mixture.parts))
    chosen = islice(mixture.documents(), settings["samples"])
    return [mixture.parts[part].store[document] for part, document in chosen]


def _print(result: dict[str, Any]) -> None:
    from ._shared import console, table

    title = f"held-out text, {result['documents']:,} documents, {result['tokens']:,} tokens predicted"
    shown = table(title, "state", "loss", "perplexity", right=("loss", "perplexity"))
    said = {"carried": "carried through a document", "anew": "new for every segment"}
    for s in result["scores"]:
        shown.add_row(said[s["state"]], f"{s['loss']:.4f}", f"{s['perplexity']:,.2f}")
    interval = "" if result["interval"] is None else f" ± {result['interval']:.4f}"
    shown.add_row("gain of carrying", f"{result['gain']:.4f}{interval}", "")
    console().print(shown)
