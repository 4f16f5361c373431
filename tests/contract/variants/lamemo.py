"""LaMemo: memory longer than a segment, the paper's scores, and memory shorter than a segment."""

VARIANTS = {
    "lamemo": {"memory_length": 12},
    "lamemo_relative": {"memory_length": 20, "positions": "relative"},
    "lamemo_short": {"memory_length": 5},
}
