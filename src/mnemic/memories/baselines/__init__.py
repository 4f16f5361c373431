"""Baselines: what a host does without a memory."""
