"""What the paper's own configuration would cost: counted on a model without weights, never run."""

import tomllib

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ...core.registry import memory_class, memory_config
from ...hosts.anatomy import host_spec
from ...training.budget import training_memory
from ..building import SMALL_HOST
from ..expected import tokens_expected
from ..experiment import Experiment
from .cost import PEAK, shown

_GPUS = 64
_SHARE = 0.4
"""Of what the GPU could do, what training of large models reaches."""


def estimate(text: str) -> str:
    """Parameters, memory, operations and GPU-hours of an experiment as TOML, in words; nothing of it is run."""
    experiment = Experiment.from_dict(tomllib.loads(text))
    config = AutoConfig.for_model(experiment.host, **{**SMALL_HOST, **experiment.host_options})
    with torch.device("meta"):
        host = AutoModelForCausalLM.from_config(config)
        own = memory_config(experiment.memory, **experiment.memory_options)
        memory = memory_class(own.name)(own, host_spec(host))
    sizes = [sum(p.numel() for p in part.parameters()) for part in (host, memory)]
    both = torch.nn.ModuleList([host, memory])
    one, spread = (training_memory(both, processes=n).total for n in (1, _GPUS))
    tokens = tokens_expected(experiment) * _GPUS
    # Forward and backward, and the forward pass again with replay.
    each = (8 if experiment.replay else 6) * sum(sizes)
    hours = each * tokens / (PEAK * _SHARE) / 3600
    return (
        f"parameters: {sum(sizes):,} ({sizes[0]:,} of the host, {sizes[1]:,} of the memory)\n"
        f"weights, gradients and AdamW in float32: {shown(one)} on one GPU, {shown(spread)} on each of {_GPUS}\n"
        f"tokens: {tokens:,} in {experiment.steps:,} steps on {_GPUS} GPUs\n"
        f"operations: {each * tokens:.1e} ({each / sum(sizes):.0f} a parameter and token)\n"
        f"estimate: {hours:,.0f} GPU-hours at {_SHARE:.0%} of {PEAK / 1e12:.0f} teraflops, "
        f"{hours / _GPUS / 24:.1f} days on {_GPUS} GPUs\n"
        "needed: those GPUs, 0.5 TB of prepared text, and disk for checkpoints of three times the weights each.\n"
        "Nothing was run."
    )
