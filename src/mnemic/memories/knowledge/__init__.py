"""Memories of a database of text that is searched while reading."""
