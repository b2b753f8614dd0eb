"""Quality and speed over settings."""

from xattn_video_eval.sweep.command import sweep, table
from xattn_video_eval.sweep.settings import SweepSettings

__all__ = ["SweepSettings", "sweep", "table"]
