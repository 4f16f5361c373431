"""Memories whose weights learn while they read: matrices and networks updated at every token."""
