"""The rows that the project keeps, and how they are written."""

from xattn_video_eval.results.bootstrap import mean_interval
from xattn_video_eval.results.ledger import RESULTS, append_rows, provenance

__all__ = ["RESULTS", "append_rows", "mean_interval", "provenance"]
