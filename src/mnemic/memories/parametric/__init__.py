"""Parametric memory: learned tables that are read sparsely and written by the optimiser only."""
