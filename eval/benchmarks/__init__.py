"""Benchmarks of other projects, run with sparse attention."""
