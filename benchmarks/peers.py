"""Other people's packages in the speed comparison: a training step of a model as large as the host.

None is needed to run the rest; `pip install 'mnemic[peers]'` brings those that install beside this project.
"""

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

PACKAGES = {
    "titans-mac": "titans_pytorch",
    "titans-memory": "titans_pytorch",
    "product-keys": "product_key_memory",
    "rmt": "recurrent_memory_transformer_pytorch",
}


def available() -> list[str]:
    return [name for name, package in PACKAGES.items() if importlib.util.find_spec(package)]


def loss_of(name: str, host: Any, vocabulary: int, segment: int) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """The peer's model and its loss on ids (B, T); `host` is a plain Llama that it may change."""
    width, layers = host.config.hidden_size, host.config.num_hidden_layers
    if name == "titans-mac":
        from titans_pytorch import MemoryAsContextTransformer

        model = MemoryAsContextTransformer(
            num_tokens=vocabulary, dim=width, depth=layers, segment_len=segment, dim_head=32, heads=width // 32,
            # Chunks and heads as in ours; at chunks of 16 with one head of the model's width a step takes a minute.
            neural_memory_segment_len=64, neural_memory_kwargs={"heads": width // 64, "dim_head": 64},
            num_persist_mem_tokens=4, num_longterm_mem_tokens=4,
        )  # fmt: skip
        return model, lambda ids: model(ids, return_loss=True)
    if name == "rmt":
        from recurrent_memory_transformer_pytorch import RecurrentMemoryTransformer, RecurrentMemoryTransformerWrapper

        # Only what RMT is: no keys and values from the segment before, all gradients.
        transformer = RecurrentMemoryTransformer(
            dim=width, num_tokens=vocabulary, depth=layers, num_memory_tokens=16, seq_len=segment, dim_head=32,
            heads=width // 32, use_flash_attn=True, abs_pos_emb=False, rotary_pos_emb=True, use_xl_memories=False,
            emb_gradient_frac=1.0, next_write_mem_stop_grad=False, num_residual_streams=1,
        )  # fmt: skip
        model = RecurrentMemoryTransformerWrapper(transformer)
        return model, lambda ids: model(ids, return_loss=True)[0]
    if name == "titans-memory":
        from titans_pytorch import NeuralMemory

        extra: nn.Module = NeuralMemory(dim=width, heads=4, dim_head=width // 4, chunk_size=64)
        attention = host.model.layers[layers // 2].self_attn
        attention.register_forward_hook(
            lambda module, args, kwargs, output: (output[0] + extra(kwargs["hidden_states"])[0], *output[1:]),
            with_kwargs=True,
        )
    else:
        from product_key_memory import PKM

        extra = PKM(dim=width)
        host.model.layers[layers // 2].mlp = extra
    model = nn.ModuleDict({"host": host, "extra": extra})
    return model, lambda ids: host(input_ids=ids, labels=ids, use_cache=False).loss


def train_step(name: str, host: Any, ids: Tensor, vocabulary: int, segment: int) -> Callable[[], None]:
    model, loss = loss_of(name, host, vocabulary, segment)
    model.to(ids.device).train()
    for parameter in model.parameters():
        # Some are views of one number, which an optimiser cannot step outside its fused path.
        parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def train() -> None:
        loss(ids).backward()
        optimizer.step()
        optimizer.zero_grad()

    return train
