"""How much memory work takes at most."""

import sys
from pathlib import Path

import torch

from ..training.summary import peak_memory as _peak_of_process

_CLEAR = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


def reset_peak_memory(device: torch.device) -> None:
    """Forget the largest use so far, where the system can: on CUDA, and for the resident size on Linux."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        try:
            _CLEAR.write_text("5")  # proc(5): reset the peak resident set size
        except OSError:
            return


def peak_memory(device: torch.device) -> int | None:
    """Bytes used at most since the reset: on CUDA those allocated, elsewhere the resident size of the process.

    Where nothing can be reset (macOS), since the process began; None on Windows.
    """
    if device.type != "cuda" and sys.platform == "linux":
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return _peak_of_process(device)
