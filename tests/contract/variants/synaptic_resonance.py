"""Synaptic resonance: token by token with a guard that is felt; in chunks; Hebb's rule alone in one block."""

VARIANTS = {
    "synaptic": {"max_norm": 0.5, "preset": "default"},
    "synaptic_content": {"rho": "content", "max_norm": 0.5, "preset": "default"},
    "synaptic_hebb": {"rho": "content", "correct": False, "memory_layers": (1,), "preset": "default"},
}
