"""Measures: how close sparse videos stay to dense ones, and what sparsity costs and saves."""
