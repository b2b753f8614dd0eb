"""Inputs for tests and benchmarks."""
