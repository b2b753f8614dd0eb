"""Attach XAttention to real models. Each module here loads its framework when it is imported, not before."""
