"""Serving: many conversations, each with its own memory, on one model."""
