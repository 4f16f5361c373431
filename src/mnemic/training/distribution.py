"""Many processes: what DDP and FSDP2 need to know of a model with memory."""

from typing import Any

from ..core.errors import UnsupportedError

_ADDED = ("memory_state", "memory_loss", "memory_diagnostics")


class Kept:
    """What the memory added to the last output of a model."""

    def __init__(self) -> None:
        self._added: dict[str, Any] = {}

    def take(self, output: Any) -> None:
        """The model's `memory_sink`."""
        self._added = {name: getattr(output, name, None) for name in _ADDED}

    def put_back(self, output: Any) -> None:
        """DDP and mixed precision make a new output of the fields of the model's; put back what is no field."""
        for name, value in self._added.items():
            if getattr(output, name, None) is None:
                setattr(output, name, value)


def check_sharding(trainer: Any) -> None:
    """What a launch asks for must be what the model gets.

    Raises:
        UnsupportedError: FSDP where accelerate would train replicas without a word; context or sequence parallelism;
        Liger's kernels, which replace the `forward` that reads the segments.
    """
    arguments = trainer.args
    if arguments.fsdp and not trainer.is_fsdp_enabled:
        raise UnsupportedError(
            f"FSDP is asked for, but accelerate shards over GPUs and other accelerators only, and this run is on "
            f"{arguments.device.type} ({trainer.accelerator.distributed_type.value}). Leave out fsdp (and "
            "ACCELERATE_USE_FSDP) to train replicas with DDP."
        )
    parallel = getattr(trainer.accelerator, "parallelism_config", None)
    if parallel is not None and (parallel.cp_enabled or getattr(parallel, "sp_enabled", False)):
        raise UnsupportedError(
            "Context parallelism cuts every sample over the processes, and a memory reads its segments in order. Shard "
            "the batch instead (DDP or FSDP2). For hosts without memory, torch's own runs on GPUs (not over gloo), and "
            "mnemic.training.ring_host.over_ring on any."
        )
    if arguments.use_liger_kernel:
        raise UnsupportedError(
            "use_liger_kernel replaces the forward of the host and its feed-forward parts, and the memory with them. "
            "chunked_loss=N keeps the logits of a sample from existing together."
        )
