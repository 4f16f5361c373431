"""RxT: slots that mix over blocks with a static gate, and dynamic gates over both sources."""

VARIANTS = {
    "rxt": {"num_slots": 5},
    "rxt_gated": {"num_slots": 5, "mixing": "gated", "residual": "tanh", "gate": "linear", "gate_start": 0.0},
}
