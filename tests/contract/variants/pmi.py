"""PMI: the usual case, and one state with weights of each block's own."""

_PMI = {"num_slots": 4, "num_banks": 2, "num_heads": 4, "top_k": 3}
VARIANTS = {
    "pmi": _PMI,
    "pmi_shared": {**_PMI, "memory_scope": "shared", "shared_weights": False},
}
