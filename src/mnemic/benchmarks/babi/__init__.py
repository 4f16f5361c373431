"""bAbI stories: the released files, a generator of all 20 tasks, and a solver that checks both.

Paper: Weston et al., Towards AI-Complete Question Answering, 2015 (arXiv 1502.05698). The surface (verbs, "there",
question forms) is that of release v1.2, which every paper and BABILong use, not of the later Lua rewrite. Each kind of
world under `worlds` says which of its choices were fitted to the released files.
"""

from .files import read, sizes
from .generator import GENERATED_TASKS, SPLITS, generate, split_of, stream
from .oracle import oracle
from .sample import BabiSample, pick
from .words import ACTORS, FILES, OBJECTS, PLACES

__all__ = [
    "ACTORS", "FILES", "GENERATED_TASKS", "OBJECTS", "PLACES", "SPLITS", "BabiSample", "generate", "oracle", "pick",
    "read", "sizes", "split_of", "stream",
]  # fmt: skip
