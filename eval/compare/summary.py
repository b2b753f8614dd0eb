"""summary.json as `compare` writes it, and what it must hold to be read again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypedDict

from xattn_video_eval.compare.settings import SUMMARY_JSON
from xattn_video_pipelines.common.files import read_own
from xattn_video_pipelines.common.schema import Count, Range, Seconds, Share, complaint, parse_json

_MOST_BYTES = 2**30
# Decibels, and measures from 0 to 1 or little more.
_Measure = Annotated[float, Range(-1e6, 1e6)]
_Ratio = Annotated[float, Range(0, 1e12)] | None


class _Row(TypedDict):
    """A video of a summary."""

    id: str
    seed: Annotated[int, Range(0, 2**63 - 1)]
    frames: Count
    height: Count
    width: Count
    psnr: _Measure
    psnr_worst_frame: _Measure
    ssim: _Measure
    density: Share | None
    dense_seconds: Seconds | None
    sparse_seconds: Seconds | None
    speedup: _Ratio
    flicker_worst_frame: Count | None
    worst_region: str | None
    worst_region_share: Share | None


class _Source(TypedDict):
    lossless: Count
    mp4: Count


class _Unmatched(TypedDict):
    dense_only: list[str]
    sparse_only: list[str]


class _Summary(TypedDict):
    """What a report takes from a summary. What other versions do not have is measured again."""

    pairs: Count
    density: Share | None
    psnr: _Measure
    ssim: _Measure
    lpips: _Measure | None
    flicker: _Measure | None
    border_excess_db: _Measure | None
    dense_seconds: Seconds | None
    sparse_seconds: Seconds | None
    speedup: _Ratio
    source: _Source
    identical_frames: Count
    different_devices: Count
    busy: str | None
    lpips_unavailable: str | None
    psnr_cap_db: _Measure
    definitions: dict[str, str]
    unmatched: _Unmatched
    videos: list[_Row]


def read_summary(folder: Path) -> dict[str, Any]:
    """The summary in `folder`.

    Raises:
        OSError: it cannot be read, or is a link.
        ValueError: it is no summary of this version; the message says what is wrong.
    """
    value: dict[str, Any] = parse_json(read_own(folder / SUMMARY_JSON, _MOST_BYTES))
    if (wrong := complaint(value, _Summary)) is not None:
        raise ValueError(wrong)
    return value
