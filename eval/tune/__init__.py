"""Launch configurations, measured on this GPU."""

from xattn_video_eval.tune.command import tune
from xattn_video_eval.tune.settings import TuneSettings

__all__ = ["TuneSettings", "tune"]
