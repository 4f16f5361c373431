"""Speeds of the entries of a comparison, measured in quiet: one at a time, each beside the host without memory.

A training step is forward, backward and AdamW over random tokens, in batches of the board's size and its longest
samples. Decoding is one token after the other on a stream of one row that has read a long history. Round after round
every entry has its turn, the host right behind it, and the ratio is taken within the turn; medians over the rounds are
reported. Weights are as drawn, since few memories' work depends on them.
"""

import dataclasses
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

import torch
import transformers
from rich.progress import track
from transformers import set_seed

from ..core.errors import ConfigError, HostError, UnsupportedError
from ..core.files import replace_atomically
from ..core.memory import check_option, option
from ..hosts import base_model
from .building import build
from .experiment import Experiment
from .trained import stream_bytes

if TYPE_CHECKING:
    from .comparison import Comparison

SPEEDS = "speeds.json"
KINDS = ("train", "decode")
_REFUSALS = (ConfigError, HostError, UnsupportedError)


@dataclass(frozen=True, kw_only=True)
class Costs:
    """How speeds are measured.

    Raises:
        ConfigError: settings that cannot be.
    """

    board: str | None = option(None, "the board whose models are measured; None for the first")
    history: int = option(2048, "tokens that a stream has read before it is decoded from", minimum=1)
    tokens: int = option(64, "tokens decoded in a turn", minimum=1)
    steps: int = option(2, "training steps in a turn", minimum=1)
    rounds: int = option(5, "turns of every entry; one more warms up", minimum=1)

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for f in dataclasses.fields(self):
            check_option("costs", f, hints[f.name], getattr(self, f.name))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Costs":
        ConfigError.check_names("setting of costs", values, {f.name for f in dataclasses.fields(cls)})
        return cls(**values)


class Contender:
    """A fresh model and its two kinds of work.

    Attributes:
        carried: bytes that its stream carries after the history; None before that is read.

    Raises:
        What building raises: ConfigError, HostError, UnsupportedError, ...
    """

    def __init__(self, experiment: Experiment, costs: Costs):
        set_seed(experiment.seed)
        self.model: Any = build(experiment)[0].to("cuda" if torch.cuda.is_available() else "cpu")
        self.experiment, self.costs = experiment, costs
        self.base = base_model(self.model)
        self.device = self.base.device
        self.carried: int | None = None
        self._optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-4)
        self._batch = self._ids(experiment.batch_size, experiment.most_segments[-1] * experiment.counted)
        self._cache: Any = None

    def speed(self, kind: str) -> float:
        """Tokens a second of one turn; the history is read before, once."""
        if kind == "decode" and self._cache is None:
            self.model.eval()
            stream = self.base.stream().feed(self._ids(1, self.costs.history))
            self._cache, self.carried = stream.cache, stream_bytes(stream)
        self._wait()
        started = time.perf_counter()
        tokens = self._train() if kind == "train" else self._decode()
        self._wait()
        return tokens / (time.perf_counter() - started)

    def _train(self) -> int:
        self.model.train()
        truncation = self.experiment.parsed_truncation()
        for _ in range(self.costs.steps):
            output = self.model(
                input_ids=self._batch, labels=self._batch, use_cache=False, truncation=truncation,
                replay=self.experiment.replay,
            )  # fmt: skip
            output.loss.backward()
            self._optimizer.step()
            self._optimizer.zero_grad()
        return self._batch.numel() * self.costs.steps

    @torch.no_grad()
    def _decode(self) -> int:
        self.model.eval()
        for token in self._ids(1, self.costs.tokens)[0]:
            self.base(token.view(1, 1), past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        return self.costs.tokens

    def _ids(self, rows: int, length: int) -> torch.Tensor:
        generator, vocabulary = torch.Generator().manual_seed(1), self.base.get_input_embeddings().num_embeddings
        return torch.randint(vocabulary, (rows, length), generator=generator).to(self.device)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def measure(comparison: "Comparison", *, progress: bool = False) -> dict[str, Any]:
    """Speeds of the entries on one board, with the training of its first seed.

    The stream of an entry is kept from round to round, so its history grows by what is decoded. All models are in
    memory at a time.

    Returns: {"settings", "environment", "models"}. A model has "model", and "refused", the reason, where it did not
        take part; else "train" and "decode", each tokens_per_second and ratio (to the host without memory) with the
        lowest and highest of the rounds ("low", "high"), and "state_bytes" that a row carries after the history.
    """
    costs = comparison.costs
    board = comparison.jobs[0].board if costs.board is None else costs.board
    experiments = {
        job.entry: job.experiment
        for job in comparison.jobs
        if job.board == board and job.seed == comparison.jobs[0].seed
    }
    entries = list(experiments)
    like = next((e for e in experiments.values() if e.memory == "none"), experiments[entries[0]])
    host = Contender(dataclasses.replace(like, memory="none", memory_options={}), costs)
    models: list[dict[str, Any]] = []
    made: dict[str, Contender] = {}
    for entry in entries:
        try:
            made[entry] = Contender(experiments[entry], costs)
        except _REFUSALS as error:
            models.append({"model": entry, "refused": str(error)})
    pairs: dict[tuple[str, str], list[tuple[float, float]]] = {}
    turns = [(kind, number, entry) for kind in KINDS for number in range(costs.rounds + 1) for entry in made]
    for kind, number, entry in track(turns, description="costs", disable=not progress):
        if entry not in made:
            continue
        try:
            pair = made[entry].speed(kind), host.speed(kind)
        except _REFUSALS as error:
            models.append({"model": entry, "refused": str(error)})
            del made[entry]
            continue
        if number:
            pairs.setdefault((entry, kind), []).append(pair)
    for entry, contender in made.items():
        speeds = {kind: _summary(pairs[entry, kind]) for kind in KINDS}
        models.append({"model": entry, **speeds, "state_bytes": contender.carried})
    return {
        "settings": {**dataclasses.asdict(costs), "board": board},
        "environment": {
            "device": torch.cuda.get_device_name() if host.device.type == "cuda" else host.device.type,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "models": sorted(models, key=lambda model: entries.index(model["model"])),
    }


def _summary(pairs: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Of tokens a second of an entry and, in the same turn, of the host."""
    ratios = [own / host for own, host in pairs]
    return {
        "tokens_per_second": round(statistics.median(own for own, _ in pairs), 1),
        "ratio": round(statistics.median(ratios), 3),
        "low": round(min(ratios), 3),
        "high": round(max(ratios), 3),
    }


def write(found: Mapping[str, Any], folder: str | Path) -> Path:
    """Into SPEEDS in the folder of a comparison."""
    path, text = Path(folder) / SPEEDS, json.dumps(found, indent=1)
    replace_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return path


def with_speeds(results: Mapping[str, Any], folder: str | Path) -> dict[str, Any]:
    """Results of a comparison with what SPEEDS in its folder says, if it is there.

    "speeds" has settings and environment, and "speeds" of a model its own; what a model had before is left out.
    """
    path = Path(folder) / SPEEDS
    if not path.is_file():
        return dict(results)
    found = json.loads(path.read_text(encoding="utf-8"))
    own = {model.pop("model"): model for model in found["models"]}
    models = [{**m, "speeds": own[m["model"]]} if m["model"] in own else m for m in results["models"]]
    return {**results, "models": models, "speeds": {**found["settings"], **found["environment"]}}
