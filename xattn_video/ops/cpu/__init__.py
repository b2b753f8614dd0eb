"""The CPU backend: plain PyTorch over several threads."""
