"""Inputs for tests and benchmarks."""

from .synthetic import causal_text_like_qkv, video_like_qkv

__all__ = ["causal_text_like_qkv", "video_like_qkv"]
