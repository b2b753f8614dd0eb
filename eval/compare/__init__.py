"""Sparse videos against dense ones."""

from xattn_video_eval.compare.command import compare
from xattn_video_eval.compare.settings import FLOOR, SUMMARY_JSON, CompareSettings
from xattn_video_eval.compare.summary import read_summary
from xattn_video_eval.compare.table import COLUMN_HEADS

__all__ = ["COLUMN_HEADS", "FLOOR", "SUMMARY_JSON", "CompareSettings", "compare", "read_summary"]
