"""The bench: a correctness gate before any timing, one JSON line at the end, a ledger only when asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from eval import efficiency
from pipelines.cli import main

ARGUMENTS = ["bench", "--device", "cpu", "--tokens", "1100", "--heads", "2", "--rounds", "1"]


def test_bench_prints_a_table_and_ends_in_json(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(efficiency, "LEDGER", tmp_path / "ledger.jsonl")
    assert main([*ARGUMENTS, "--dtype", "fp32", "bf16"]) == 0
    assert not efficiency.LEDGER.exists()
    lines = capsys.readouterr().out.splitlines()
    report = json.loads(lines[-1])
    assert report["ok"] is True
    assert [row["dtype"] for row in report["rows"]] == ["fp32", "bf16"]
    for row in report["rows"]:
        assert row["tokens"] == 1100
        assert 0 < row["density"] <= 1
        assert row["ideal_speedup"] == pytest.approx(1 / (row["density"] + 1 / 16))
        assert row["speedup"] == pytest.approx(row["best_ms"]["sdpa"] / row["best_ms"]["total"])
        assert {"score", "select", "attend", "total", "sdpa"} == set(row["median_ms"])
        assert row["device"]
        assert row["versions"]["torch"] == torch.__version__
        assert row["config"]["threshold"] == 0.9
    assert sum(line.strip().startswith("video-1100") for line in lines) == 2

    assert main([*ARGUMENTS, "--causal", "--record"]) == 0
    capsys.readouterr()
    assert main([*ARGUMENTS, "--record"]) == 0
    recorded = [json.loads(line) for line in efficiency.LEDGER.read_text().splitlines()]
    assert [row["name"] for row in recorded] == ["causal-1100", "video-1100"]


def test_nothing_is_timed_or_recorded_when_the_result_is_wrong(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    right = efficiency.block_sparse_attention

    def wrong(*args: object, backend: str = "auto", **kwargs: object) -> object:
        output = right(*args, backend=backend, **kwargs)
        return output if backend == "reference" else output * 1.01

    monkeypatch.setattr(efficiency, "block_sparse_attention", wrong)
    monkeypatch.setattr(efficiency, "LEDGER", tmp_path / "ledger.jsonl")
    assert main([*ARGUMENTS, "--record"]) == 1
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["ok"] is False
    assert report["rows"] == []
    assert "sparse output" in report["failures"][0]
    assert not efficiency.LEDGER.exists()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--tokens", "10"], "--tokens"),
        (["--heads", "0"], "--heads"),
        (["--rounds", "0"], "--rounds"),
        (["--locality", "1.5"], "--locality"),
        (["--stride", "3"], "stride"),
        (["--threshold", "0"], "threshold"),
        (["--device", "tpu"], "--device"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_two(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*ARGUMENTS, *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert named in error
    assert "\n" not in error
