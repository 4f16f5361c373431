"""RETRO over a tiny database that is built when this module is first imported."""

import tempfile
from pathlib import Path

from mnemic.memories.knowledge.retro import build_database
from tests.tiny import random_ids

# Lives as long as the test process.
_FOLDER = tempfile.TemporaryDirectory(prefix="retro-")
_TEXTS = [random_ids(n, seed=n).tolist() for n in range(5, 40)]
_FOUR, _THREE = (str(build_database(Path(_FOLDER.name) / str(m), _TEXTS, m, progress=False).folder) for m in (4, 3))
_RETRO = {"database": _FOUR, "chunk_length": 4, "encoder_width": 16, "encoder_heads": 2}
VARIANTS = {
    "retro": {**_RETRO, "preset": "default", "memory_layers": (0, 1)},
    "retro_attach": {**_RETRO, "preset": "attach"},
    "retro_no_null": {**_RETRO, "preset": "default", "null_kv": False, "neighbours": 3, "memory_layers": (0, 1)},
    # Chunks that do not end where segments end.
    "retro_odd_chunks": {
        **_RETRO, "preset": "default", "memory_layers": (0,), "encoder_layers": 1, "database": _THREE,
        "chunk_length": 3,
    },
}  # fmt: skip
