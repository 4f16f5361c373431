"""Memories in keys and values: what attention keeps, mixed, chosen or made smaller."""
