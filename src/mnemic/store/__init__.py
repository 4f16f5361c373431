"""Durable knowledge on disk that memories read."""

from .chunk_database import ChunkDatabase, build, build_index, open_database, overlap

__all__ = ["ChunkDatabase", "build", "build_index", "open_database", "overlap"]
