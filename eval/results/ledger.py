"""The result rows that the project keeps: JSON lines under eval/results/, with what they were measured on."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from xattn_video_pipelines.common import jsonl
from xattn_video_pipelines.common.environment import source_commit, versions
from xattn_video_pipelines.common.files import make_writable

RESULTS = Path(__file__).resolve().parent


def provenance(*packages: str) -> dict[str, Any]:
    """Versions of this project, torch and `packages`, commit and time: what every row says beside its device."""
    return {
        "versions": versions(("xattn-video", "torch", *packages)),
        "commit": source_commit(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def append_rows(ledger: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Add rows to a ledger. Raises UserError if it cannot be written."""
    make_writable(ledger.parent)
    jsonl.append(ledger, rows)
    print(f"appended {len(rows)} rows to {ledger}")
