"""Whether other work slowed down the making of videos, which their manifest's `cpu_share` tells."""

from __future__ import annotations

from collections.abc import Iterable

from xattn_video_pipelines.video.manifest import Record

# A video that got less than this share of the time of its threads had to share the cores. The rest is what Python and
# the ends of parallel parts cost.
_LEAST_SHARE = 0.75
# Seconds. In a shorter time the share says more of Python's own cost than of other work.
_LONG_ENOUGH = 5.0


def busy(records: Iterable[Record]) -> str | None:
    """Why the times of these videos are not reliable, in words; None where nothing speaks against them.

    Args:
        records: of a manifest. Videos of an accelerator, short ones, those of earlier versions and those made with
            `--compile` tell nothing: the compiler uses one thread, and processes whose time is not known here.
    """
    shares = [
        record["cpu_share"]
        for record in records
        if record.get("cpu_share") is not None
        and (record.get("seconds") or 0.0) >= _LONG_ENOUGH
        and not record.get("compile")
    ]
    if not shares or min(shares) >= _LEAST_SHARE:
        return None
    return f"this machine was busy (a video got {100 * min(shares):.0f} % of the time of its threads)"
