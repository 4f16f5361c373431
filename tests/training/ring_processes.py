"""What the processes of the ring tests run: each compares its part with the whole, and leaves its errors."""

import json
import os
import socket
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, multiprocessing

from mnemic.ops.attention import attend, merge
from mnemic.training.ring import Sharding, ring_attention
from mnemic.training.ring_host import over_ring
from tests.tiny import random_ids, tiny_host

LENGTH, HEADS, KEY_HEADS, WIDTH = 64, 4, 2, 8
Errors = dict[str, float]


def full(dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """Queries, keys, values, the gradient of the output, and keys and values of a memory."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(2, h, n, WIDTH) for h, n in ((HEADS, LENGTH), (KEY_HEADS, LENGTH), (KEY_HEADS, LENGTH), (HEADS, LENGTH))]
    shapes += [(2, KEY_HEADS, 5, WIDTH)] * 2
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def largest(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max())


def attention(sharding: Sharding, causal: bool, dtype: torch.dtype, group: Any) -> Errors:
    *whole, d_out, _, _ = full(dtype)
    # In float64: what is bounded is the ring's rounding, not also the reference's.
    exact = [t.detach().double().requires_grad_() for t in whole]
    expected = F.scaled_dot_product_attention(*exact, is_causal=causal, enable_gqa=True)
    wanted = torch.autograd.grad(expected, exact, d_out.double())
    mine = sharding.places(LENGTH)
    parts = [t.detach()[:, :, mine].requires_grad_() for t in whole]
    out, _ = ring_attention(*parts, sharding, causal=causal, group=group)
    found = torch.autograd.grad(out, parts, d_out[:, :, mine])
    errors = {"out": largest(out, expected[:, :, mine])}
    return errors | {n: largest(g, w[:, :, mine]) for n, g, w in zip(("dq", "dk", "dv"), found, wanted, strict=True)}


def with_memory(sharding: Sharding, group: Any) -> Errors:
    """A memory's keys and values, which every process has, as one more part of the merge."""
    q, k, v, d_out, memory_k, memory_v = (t.requires_grad_() for t in full(torch.float32))
    seen = torch.cat([torch.ones(LENGTH, 5), torch.ones(LENGTH, LENGTH).tril()], dim=1).bool()
    joined = [torch.cat(pair, dim=2) for pair in ((memory_k, k), (memory_v, v))]
    expected = F.scaled_dot_product_attention(q, *joined, attn_mask=seen, enable_gqa=True)
    wanted = torch.autograd.grad(expected, (q, k, v, memory_k, memory_v), d_out)
    mine = sharding.places(LENGTH)
    parts = [t.detach()[:, :, mine].requires_grad_() for t in (q, k, v)]
    extra = [t.detach().clone().requires_grad_() for t in (memory_k, memory_v)]
    ring = ring_attention(*parts, sharding, group=group)
    out, _ = merge([ring, attend(parts[0], *extra, scale=WIDTH**-0.5)])
    found = list(torch.autograd.grad(out, [*parts, *extra], d_out[:, :, mine]))
    for gradient in found[3:]:
        dist.all_reduce(gradient, group=group)
    errors = {n: largest(g, w[:, :, mine]) for n, g, w in zip(("dq", "dk", "dv"), found, wanted, strict=False)}
    errors |= {n: largest(g, w) for n, g, w in zip(("memory_dk", "memory_dv"), found[3:], wanted[3:], strict=True)}
    return errors | {"out": largest(out, expected[:, :, mine])}


def language_model(sharding: Sharding, group: Any) -> Errors:
    """Loss and gradients of a model of two layers; most labels are in the first part."""
    ids = random_ids(2, LENGTH)
    labels = ids.masked_fill(torch.arange(LENGTH) > 40, -100)
    model = tiny_host().train()
    loss = model(input_ids=ids, labels=labels, use_cache=False).loss
    loss.backward()
    wanted = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    with over_ring(model, sharding, group):
        part = model(**sharding.shard(ids, labels), use_cache=False).loss
        part.backward()
    total = part.detach().clone()
    dist.all_reduce(total, group=group)
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad, group=group)
    assert model.config._attn_implementation == "sdpa"
    gradients = max(largest(p.grad, wanted[n]) for n, p in model.named_parameters())
    return {"loss": largest(total, loss.detach()), "gradients": gradients}


def checks(sharding: Sharding, group: Any = None) -> dict[str, Errors]:
    """All comparisons of one layout, by name."""
    errors = {
        f"{'causal' if causal else 'full'}-{str(dtype).removeprefix('torch.')}": attention(
            sharding, causal, dtype, group
        )
        for causal in (True, False)
        for dtype in (torch.float32, torch.float64)
    }
    return errors | {"memory": with_memory(sharding, group), "model": language_model(sharding, group)}


def work(rank: int, world: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", rank=rank, world_size=world)
    errors = {layout: checks(Sharding(rank, world, layout)) for layout in ("contiguous", "zigzag")}
    if world == 4:
        # Two rings side by side.
        groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        errors["pairs"] = checks(Sharding(rank % 2, 2), groups[rank // 2])
    (Path(folder) / f"{rank}.json").write_text(json.dumps(errors), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def start(world: int, folder: Path) -> list[dict[str, dict[str, Errors]]]:
    """Errors of every process, by layout and comparison."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    multiprocessing.spawn(work, (world, port, str(folder)), nprocs=world, join=True)
    return [json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(world)]
