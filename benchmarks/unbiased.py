"""Bias and variance of gradients that keep few encodings, against full back-propagation, on a toy.

    python -m benchmarks.unbiased [--segments 16] [--seeds 2000] [--output results/unbiased.json]

The toy compresses each segment of 8 random tokens to one key and value with a low-rank encoder on a frozen linear map;
every token attends to the memories of all earlier segments, and predicts a token of a random one of them. Compared are
gradients of the encoder with the activations of S encodings kept:

    last        the memories of the S segments before carry gradients: plain truncation
    reservoir   `incremental_backward` without importance weights
    unbiased    `incremental_backward`

relative to the norm of the full gradient: bias, the distance of the mean over seeds; its standard error, which a bias
of zero would show too; spread, the standard deviation of one estimate; error, the root mean square distance of one.
"""

import argparse
import json
import platform
import random
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from mnemic import State
from mnemic.training.unbiased import incremental_backward

WIDTH, TOKENS, RANK = 16, 8, 4


class Compressor(nn.Module):
    """A frozen linear host with a low-rank encoder: a segment (T, d) -> one key and one value (1, d)."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def weights(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=torch.float64, generator=generator) / shape[0] ** 0.5

        self.base = weights(WIDTH, WIDTH)
        self.down, self.up = nn.Parameter(weights(WIDTH, RANK)), nn.Parameter(weights(RANK, WIDTH))

    def encode(self, segment: tuple[Tensor, Tensor]) -> State:
        pooled = torch.tanh(segment[0] @ (self.base + self.down @ self.up)).mean(0, keepdim=True)
        return State({"key": pooled, "value": pooled @ self.base.T})

    def loss(self, segment: tuple[Tensor, Tensor], memories: Any) -> Tensor:
        tokens, targets = segment
        keys = torch.cat([tokens, *(m["key"] for m in memories)])
        values = torch.cat([tokens, *(m["value"] for m in memories)])
        read = torch.softmax(tokens @ self.base @ keys.T / WIDTH**0.5, dim=-1) @ values
        return (read - targets).square().mean()


def draw(segments: int, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    """Tokens (T, d) and targets (T, d) of each segment."""
    generator, rng = torch.Generator().manual_seed(seed), random.Random(seed)
    tokens = [torch.randn(TOKENS, WIDTH, dtype=torch.float64, generator=generator) for _ in range(segments)]
    return [(x, tokens[rng.randrange(t + 1)]) for t, x in enumerate(tokens)]


def gradient(model: Compressor) -> Tensor:
    """The gradient of the encoder, (n,), which is then forgotten."""
    found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad(set_to_none=True)
    return found


def full(model: Compressor, segments: list[tuple[Tensor, Tensor]], reach: int | None = None) -> Tensor:
    """By one backward pass; with `reach`, only the memories of that many segments before carry gradients."""
    memories = [model.encode(x) for x in segments]
    losses = []
    for t, x in enumerate(segments):
        first = 0 if reach is None else max(t - reach, 0)
        losses.append(model.loss(x, [m.detach() if s < first else m for s, m in enumerate(memories[:t])]))
    torch.stack(losses).sum().backward()
    return gradient(model)


def estimates(
    model: Compressor, segments: list[tuple[Tensor, Tensor]], live: int, seeds: int, weighted: bool
) -> Tensor:
    """(seeds, n)."""
    drawn = []
    for seed in range(seeds):
        incremental_backward(segments, model.encode, model.loss, live=live, seed=seed, weighted=weighted)
        drawn.append(gradient(model))
    return torch.stack(drawn)


def summary(drawn: Tensor, truth: Tensor) -> dict[str, float]:
    away, unit = drawn - truth, float(truth.norm())
    spread = float((drawn - drawn.mean(0)).square().sum(1).mean().sqrt())
    return {
        "bias": float(away.mean(0).norm()) / unit,
        "standard_error": spread / len(drawn) ** 0.5 / unit,
        "spread": spread / unit,
        "error": float(away.square().sum(1).mean().sqrt()) / unit,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--segments", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=2000)
    parser.add_argument("--live", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--output", type=Path, default=Path("results/unbiased.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model, segments = Compressor(), draw(arguments.segments)
    truth = full(model, segments)
    rows = []
    for live in track(arguments.live, description="kept"):
        found = {
            "last": full(model, segments, reach=live)[None],
            "reservoir": estimates(model, segments, live, arguments.seeds, weighted=False),
            "unbiased": estimates(model, segments, live, arguments.seeds, weighted=True),
        }
        rows += [{"live": live, "method": name, **summary(drawn, truth)} for name, drawn in found.items()]
    results = {
        "settings": {"segments": arguments.segments, "seeds": arguments.seeds, "live": arguments.live},
        "versions": {"torch": torch.__version__},
        "machine": {"processor": platform.machine(), "threads": 1},
        "rows": rows,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    grid = Table(title=f"gradients of {arguments.segments} segments, relative to the full one")
    for column in ("kept", "method", "bias", "standard error", "spread", "error"):
        grid.add_column(column, justify="left" if column == "method" else "right")
    for row in rows:
        grid.add_row(
            str(row["live"]), row["method"], *(f"{row[n]:.4f}" for n in ("bias", "standard_error", "spread", "error"))
        )
    Console().print(grid)


if __name__ == "__main__":
    main()
