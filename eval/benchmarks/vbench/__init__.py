"""VBench scores of dense and sparse videos."""
