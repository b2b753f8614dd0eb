"""The result rows that the project keeps: JSON lines under eval/results/, with what they were measured on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from xattn_video_pipelines.common.environment import source_commit, versions
from xattn_video_pipelines.common.errors import UserError

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
    try:
        ledger.parent.mkdir(parents=True, exist_ok=True)
        with ledger.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    except OSError as error:
        raise UserError(f"{ledger}: cannot write: {error.strerror}") from None
    print(f"appended {len(rows)} rows to {ledger}")
