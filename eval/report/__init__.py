"""One HTML page about a run."""

from xattn_video_eval.report.command import write_report
from xattn_video_eval.report.settings import ReportSettings

__all__ = ["ReportSettings", "write_report"]
