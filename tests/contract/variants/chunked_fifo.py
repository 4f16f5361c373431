"""Chunked-FIFO: its three paths, chunks without the segment, and memory alone behind a gate."""

VARIANTS = {
    "chunked_fifo": {"chunk": 3, "num_rows": 5, "paths": "all"},
    "chunked_fifo_linear": {"chunk": 3, "num_rows": 5, "paths": "linear", "candidate": "last"},
    "chunked_fifo_attach": {"chunk": 4, "num_rows": 20, "paths": "memory", "candidate": "token"},
}
