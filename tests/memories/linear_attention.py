"""DeltaNet and Gated DeltaNet written with loops over tokens and heads, as their cards say it."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, PreTrainedModel

import mnemic
from mnemic.core.memory import HostSpec
from mnemic.core.registry import memory_class, memory_config
from mnemic.core.state import State
from mnemic.core.step import Step


def build(name: str, width: int = 12, layers: int = 1, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """A memory with weights large enough that every term shows."""
    spec = HostSpec(hidden_size=width, num_layers=layers, embedding_std=0.02, dtype=dtype, device=torch.device("cpu"))
    torch.manual_seed(0)
    memory = memory_class(name)(memory_config(name, **options), spec)
    with torch.no_grad():
        for p in memory.parameters():
            p += 0.4 * torch.randn(p.shape, dtype=p.dtype)
    return memory


def mix(memory: Any, x: Tensor, state: State, real: Tensor | None = None) -> tuple[Tensor, State]:
    """What block 0 makes of its attention's input (B, T, d), and the state after it."""
    step = Step.alone(memory, 0, state=state, real=real)
    out = memory.mixer(x, step)
    return out, State({**state, **step.frame.left})


def loop(memory: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs (B, T, d) and matrices (B, g, d_k, d_v) of a stream's first tokens."""
    block, config = memory.block(0), memory.config
    h, g, d_k, d_v = block.heads, block.value_heads, block.d_k, block.d_v
    outputs, matrices = [], []
    for row in x:
        projected = [block.qkv.weight @ token for token in row]
        matrix = [torch.zeros(d_k, d_v, dtype=x.dtype) for _ in range(g)]
        for t, token in enumerate(row):
            line = projected[t]
            if config.conv_kernel:
                terms = [
                    block.conv[:, config.conv_kernel - 1 - back] * projected[t - back]
                    for back in range(min(t + 1, config.conv_kernel))
                ]
                line = torch.stack(terms).sum(0)
            line = F.silu(line)
            parts = []
            for head in range(g):
                shared = head // (g // h)
                q = line[shared * d_k : (shared + 1) * d_k]
                k = line[h * d_k + shared * d_k : h * d_k + (shared + 1) * d_k]
                v = line[2 * h * d_k + head * d_v : 2 * h * d_k + (head + 1) * d_v]
                q, k = (y / (y @ y + 1e-6).sqrt() for y in (q, k))
                beta = torch.sigmoid(block.beta.weight[head] @ token) * (2 if config.allow_negative_eigenvalues else 1)
                s = matrix[head]
                if memory.name == "gated-deltanet":
                    rate = F.softplus(block.decay.weight[head] @ token + block.dt_bias[head])
                    s = torch.exp(-block.A_log[head].exp() * rate) * s
                s = s + beta * torch.outer(k, v - s.T @ k)
                matrix[head] = s
                o = s.T @ (q / d_k**0.5)
                o = o / (o.pow(2).mean() + 1e-5).sqrt() * block.norm
                if config.output_gate:
                    o = o * F.silu(block.gate.weight[head * d_v : (head + 1) * d_v] @ token)
                parts.append(o)
            outputs.append(block.out.weight @ torch.cat(parts))
        matrices.append(torch.stack(matrix))
    return torch.stack(outputs).view_as(x), torch.stack(matrices)


def assert_equals_loop(memory: Any, tokens: int) -> None:
    """Values and gradients of the module against the loop's."""
    x = torch.randn(2, tokens, memory.host.hidden_size, dtype=torch.float64, requires_grad=True)
    leaves = [x, *memory.parameters()]
    out, state = mix(memory, x, memory.initial_state(2))
    expected, matrix = loop(memory, x)
    torch.testing.assert_close(out, expected, atol=1e-10, rtol=0)
    torch.testing.assert_close(state["0/matrix"], matrix, atol=1e-10, rtol=0)
    weights = torch.randn_like(out), torch.randn_like(matrix)
    got = torch.autograd.grad((out * weights[0]).sum() + (state["0/matrix"] * weights[1]).sum(), leaves)
    wanted = torch.autograd.grad((expected * weights[0]).sum() + (matrix * weights[1]).sum(), leaves)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-8, rtol=1e-8)


def recall_host(name: str, segment: int = 64, **options: Any) -> PreTrainedModel:
    """The cards' toy: 2 layers of width 64 with 2 heads, fresh."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, tie_word_embeddings=False, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return mnemic.attach(config, name, segment=segment, **options)
