"""`xattn-video bench --model`: the time to the first token, dense and sparse, after a check of the logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook

from tests.language_families import save_language_model
from xattn_video_eval.bench import first_token
from xattn_video_pipelines.cli import main

from transformers import PreTrainedModel  # isort: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_language_model(tmp_path_factory.mktemp("language") / "model")


def command(model: Path, *more: str) -> list[str]:
    sizes = ["--tokens", "400", "700", "--block-size", "16", "--threshold", "0.5", "--rounds", "2", "--json"]
    return ["bench", "--model", str(model), "--device", "cpu", *sizes, *more]


def test_a_row_a_length_with_both_times_and_the_density(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.setattr(first_token, "LEDGER", tmp_path / "rows.jsonl")
    assert main(command(model, "--record")) == 0
    captured = capfd.readouterr()
    printed, document = captured.err.splitlines(), json.loads(captured.out)
    assert document["ok"]
    rows = document["rows"]
    assert [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()] == rows
    for row, length in zip(rows, (400, 700), strict=True):
        assert 0.9 * length < row["tokens"] <= length + 1
        assert 0 < row["density"] < 0.9
        assert row["dense_calls"] == {}
        for side in ("dense", "sparse"):
            # Not the warm-up.
            assert len(row["seconds"][side]) == row["rounds"] == 2
            assert 0 < row["best_seconds"][side] == min(row["seconds"][side]) <= row["median_seconds"][side]
        assert row["speedup"] == row["best_seconds"]["dense"] / row["best_seconds"]["sparse"]
        assert row["ideal_of_attention"] == pytest.approx(1 / (row["density"] + 1 / 16))
        assert (row["dtype"], row["config"]["warmup_steps"]) == ("float32", 0)
        assert row["device"]
        assert any(line.split()[:2] == [f"{row['tokens']:,}", f"{row['density']:.3f}"] for line in printed)


def test_the_prompts_end_may_stay_dense(model: Path, capfd: Any) -> None:
    densities = {}
    for last in (0, 40):
        assert main(command(model, "--tokens", "400", "--rounds", "1", "--dense-last", str(last))) == 0
        (row,) = json.loads(capfd.readouterr().out)["rows"]
        assert row["config"]["dense_last"] == last
        densities[last] = row["density"]
    assert densities[0] < densities[40] < 1
    assert main(["bench", "--tokens", "256", "--device", "cpu", "--dense-last", "40"]) == 2
    assert capfd.readouterr().err.splitlines()[-1].endswith("error: --dense-last goes with --model")


def test_a_model_whose_sparse_logits_are_wrong_is_not_timed(model: Path, capfd: Any) -> None:
    calls = []

    def off_by_a_little(module: torch.nn.Module, _: Any, output: Any) -> None:
        if isinstance(module, PreTrainedModel) and hasattr(output, "logits"):
            calls.append(module)
            output.logits = output.logits * (1.001 if len(calls) == 2 else 1.0)

    with register_module_forward_hook(off_by_a_little):
        assert main(command(model)) == 1
    printed = capfd.readouterr()
    assert len(calls) == 2
    told = printed.err.splitlines()[-1]
    assert told.startswith("wrong result, nothing timed: threshold 1 is off dense logits by 1.0")
    assert json.loads(printed.out)["rows"] == []


def test_the_model_stays_dense_in_its_own_rounds(model: Path) -> None:
    seen = []

    def note(module: torch.nn.Module, _: Any, output: Any) -> None:
        if isinstance(module, PreTrainedModel) and hasattr(output, "logits"):
            seen.append(module.config._attn_implementation)

    with register_module_forward_hook(note):
        assert main(command(model)) == 0
    # The gate, then for each of two lengths a warm-up and two rounds.
    assert [name.partition("_")[0] for name in seen] == ["sdpa", "xattention"] * (1 + 2 * 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--heads", "4"], "--heads does not go with --model"),
        (["--inputs", "text"], "--inputs does not go with --model"),
        (["--causal"], "--causal does not go with --model"),
        (["--dtype", "fp32", "bf16"], "--dtype takes one type with --model, got float32 bfloat16"),
        (["--tokens", "5"], "--tokens: "),
        (["--model", "/nowhere"], "--model /nowhere"),
    ],
)
def test_bad_input_is_one_line(options: list[str], message: str, model: Path, capfd: Any) -> None:
    assert main(command(model, *options)) == 2
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("xattn-video: error: ")
    assert message in error
