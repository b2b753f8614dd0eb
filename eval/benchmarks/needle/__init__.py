"""Needle in a haystack: does a model find a sentence in a long text?"""

from xattn_video_eval.benchmarks.needle.command import needle
from xattn_video_eval.benchmarks.needle.items import make_item
from xattn_video_eval.benchmarks.needle.settings import NeedleSettings

__all__ = ["NeedleSettings", "make_item", "needle"]
