"""Durable knowledge on disk that memories read."""

from .building import build
from .chunk_database import ChunkDatabase, open_database
from .faiss_index import build_index
from .overlap import overlap

__all__ = ["ChunkDatabase", "build", "build_index", "open_database", "overlap"]
