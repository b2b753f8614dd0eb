"""How fast sparse attention is beside dense attention, after a correctness gate."""

from xattn_video_eval.bench.command import bench
from xattn_video_eval.bench.settings import BenchSettings

__all__ = ["BenchSettings", "bench"]
