"""Memories that are searched or read as a prefix: pools, stores and caches outside of the window."""
