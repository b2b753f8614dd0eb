"""Sparse videos against dense ones."""

from xattn_video_eval.compare.command import compare
from xattn_video_eval.compare.settings import CompareSettings

__all__ = ["CompareSettings", "compare"]
