"""One HTML page about a run."""

from xattn_video_eval.report.command import write_report
from xattn_video_eval.report.paper_tables import compare_orders, load_paper_tables
from xattn_video_eval.report.settings import ReportSettings

__all__ = ["ReportSettings", "compare_orders", "load_paper_tables", "write_report"]
