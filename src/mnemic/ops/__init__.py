"""Tensor operations with references. Nothing here imports the rest of mnemic."""
