"""Sparse videos against dense ones."""
