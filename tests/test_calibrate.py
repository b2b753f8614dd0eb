"""`xattn-video calibrate`: what is measured, what is chosen, and the file that a model takes."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.cli_tools import SIZE, Result, Run, save_tiny_wan
from tests.language_families import save_language_model, save_video_model
from xattn_video import HeadThresholds, XAttnConfig, XAttnProcessor, xattention
from xattn_video.ops import KeyMask, checked_call, dense_attention
from xattn_video_eval.calibrate import CalibrateSettings, Measurement, choose
from xattn_video_pipelines.common.errors import UserError
from xattn_video_pipelines.demo import world
from xattn_video_pipelines.video import find_model, read_manifest, write_video

# ---- the choice


def problem(rng: np.random.Generator, heads: int, values: int) -> tuple[np.ndarray, np.ndarray]:
    """Densities that fall and errors that rise with the threshold's place, as real ones do."""
    density = -np.sort(-rng.uniform(0.05, 1, (heads, values)), axis=1)
    return density, np.sort(rng.uniform(0, 0.4, (heads, values)), axis=1)


def best(density: np.ndarray, error: np.ndarray, budget: float) -> float:
    """The least total density of all combinations that keep to the budget."""
    heads, values = error.shape
    places = np.array(list(itertools.product(range(values), repeat=heads)))
    rows = np.arange(heads)
    allowed = error[rows, places].mean(axis=1) <= budget + 1e-12
    return float(density[rows, places].sum(axis=1)[allowed].min())


@pytest.mark.parametrize("spare", [10, 20, 25, 40, 50])
def test_on_whole_cells_the_choice_is_the_best_of_all_combinations(spare: int) -> None:
    rng = np.random.default_rng(spare)
    for _ in range(6):
        density, _ = problem(rng, 5, 4)
        # Whole numbers, of which 1,000 cells hold `spare`: nothing is lost by rounding.
        error = rng.integers(0, 25, (5, 4)).astype(float)
        budget = (error.min(axis=1).sum() + spare) / 5
        chosen = choose(density, error, budget)
        assert error[np.arange(5), chosen].mean() <= budget
        assert density[np.arange(5), chosen].sum() == pytest.approx(best(density, error, budget))


def test_between_the_cells_the_budget_is_kept_and_little_is_lost() -> None:
    rng = np.random.default_rng(0)
    for _ in range(6):
        density, error = problem(rng, 6, 4)
        budget = float(rng.uniform(error[:, 0].mean(), error[:, -1].mean()))
        chosen = choose(density, error, budget)
        found = density[np.arange(6), chosen].sum()
        assert error[np.arange(6), chosen].mean() <= budget
        least = error.min(axis=1).mean()
        # A cell of each head may be lost.
        assert best(density, error, budget) <= found + 1e-12
        assert found <= best(density, error, budget - (budget - least) * 6 / 1000) + 1e-12


@pytest.mark.parametrize("heads", [1, 24, 96])
def test_a_larger_budget_is_never_denser_and_one_threshold_never_better(heads: int) -> None:
    density, error = problem(np.random.default_rng(heads), heads, 8)
    rows, before = np.arange(heads), np.inf
    for budget in np.linspace(error[:, 0].mean(), error[:, -1].mean(), 15):
        chosen = choose(density, error, budget)
        total = density[rows, chosen].sum()
        assert error[rows, chosen].mean() <= budget + 1e-12
        assert total <= before + 1e-9
        before = total
    for flat in range(8):
        chosen = choose(density, error, float(error[:, flat].mean()))
        assert density[rows, chosen].sum() <= density[:, flat].sum() + 1e-9
        assert error[rows, chosen].mean() <= error[:, flat].mean() + 1e-12


def test_with_many_heads_there_are_cells_for_all() -> None:
    # More heads than the paper's 1,000 cells, and all but one of them need a little error.
    heads = 1100
    density, error = np.tile([0.9, 0.1], (heads, 1)), np.tile([0.0, 0.05], (heads, 1))
    assert 0.94 <= choose(density, error, 0.0499).mean() < 1


def test_where_nothing_can_be_spared_the_least_error_is_chosen() -> None:
    density, error = np.array([[0.9, 0.5, 0.4], [0.8, 0.3, 0.2]]), np.array([[0.1, 0.1, 0.2], [0.3, 0.2, 0.3]])
    assert choose(density, error, 0.15).tolist() == [1, 1]
    with pytest.raises(ValueError, match=r"budget must be 0\.15 or more, the least mean error measured, got 0\.1"):
        choose(density, error, 0.1)


# ---- the measurement


@pytest.mark.parametrize("causal", [False, True])
def test_what_is_measured_is_what_a_sparse_call_gives(causal: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, heads, 150, 32, generator=generator) * scale for heads, scale in ((4, 2), (2, 2), (2, 1))
    )
    lens = torch.tensor([150, 131], dtype=torch.int32)
    mask = KeyMask(causal, kv_lens=lens)
    call = checked_call(query, key, value, mask, threshold=1.0, dense_tokens=None if causal else (120, 150))
    grid = (0.9, 0.5)
    sizes = {"stride": 8, "block_size": 16}
    measurement = Measurement(grid, **sizes, dense_last=20 if causal else 0)
    measurement("a", call)
    measurement.on = False
    measurement("a", call)
    density, error = measurement.means("a")
    assert measurement.calls == {"a": 1}
    assert density.shape == error.shape == (4, 2)
    dense = dense_attention(query, key, value, mask)
    config = XAttnConfig(**sizes, min_tokens=0, dense_last=20 if causal else 0)
    for place, threshold in enumerate(grid):
        output, stats = xattention(
            query, key, value, config.replace(threshold=threshold), causal=causal, kv_lens=lens, return_stats=True,
            dense_tokens=call.dense_tokens,
        )  # fmt: skip
        assert density[:, place].mean() == pytest.approx(stats.density)
        for head in range(4):
            ratio = (output[:, head] - dense[:, head]).norm() / dense[:, head].norm()
            assert error[head, place] == pytest.approx(float(ratio), rel=1e-3)
    assert (density[:, 1] < density[:, 0]).all()
    assert (error[:, 1] > error[:, 0]).all()


def test_means_are_over_the_calls_of_a_layer() -> None:
    measurement = Measurement((0.5,), stride=8, block_size=16)
    found = []
    for seed in range(2):
        query, key, value = torch.randn(3, 1, 2, 128, 16, generator=torch.Generator().manual_seed(seed)) * 2
        call = checked_call(query, key, value, KeyMask(), threshold=1.0)
        alone = Measurement((0.5,), stride=8, block_size=16)
        for one in (measurement, alone):
            one("a", call)
        found.append(alone.means("a"))
    assert np.allclose(measurement.means("a"), np.mean(found, axis=0))
    assert not np.allclose(found[0], found[1])


# ---- the command

GRID = ("--values", 4, "--start", 0.9, "--factor", 0.7)
TINY = (*SIZE[:-1], 4, "--block-size", 16, "--min-tokens", 0, "--warmup-steps", 1, "--measured-steps", 2)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A video diffusion, a video-understanding and a language model, and an input for each."""
    folder = tmp_path_factory.mktemp("calibrate")
    save_tiny_wan(folder / "wan")
    save_video_model(folder / "watcher")
    save_language_model(folder / "llama")
    (folder / "prompts.txt").write_text("a red fox\na green bird\na cat\n")
    (folder / "one.txt").write_text(" ".join(f"w{number % 60}" for number in range(90)))
    (folder / "short.txt").write_text("w1 w2")
    write_video(folder / "red.mp4", world.render(world.all_scenes()[0], 0), 8)
    (folder / "items.jsonl").write_text(json.dumps({"video": "red.mp4", "question": "w5 w6 w7"}) + "\n")
    return folder


def read(done: Result) -> dict[str, Any]:
    """The document that a run printed, whose choice keeps to its budget and is no denser than one threshold."""
    assert done.code == 0, done.err
    document = json.loads(done.out)
    chosen, flat = document["chosen"], document["flat"]
    assert chosen["error"] <= document["budget"] * (1 + 1e-8)
    assert sum(chosen["heads_by_threshold"]) == document["heads"]
    assert all(chosen["density"] <= row["density"] + 1e-9 for row in flat if row["error"] <= document["budget"])
    densities = [row["density"] for row in flat]
    assert densities == sorted(densities, reverse=True)
    assert 0 < flat[0]["error"] < flat[-1]["error"]
    written = HeadThresholds.load(document["out"])
    heads = [value for layer in written.layers for value in layer.density]
    assert np.mean(heads) == pytest.approx(chosen["density"], rel=1e-4)
    assert written.mean == pytest.approx(chosen["threshold"], rel=1e-4)
    return document


def test_a_video_models_file_is_made_and_used(made: Path, tmp_path: Path, xattn: Run) -> None:
    out = tmp_path / "thresholds.json"
    asked = ("calibrate", "--model", made / "wan", "--prompts", made / "prompts.txt", "--limit", 2, *TINY, *GRID)
    document = read(xattn(*asked, "--out", out, "--json"))
    # 2 layers, 2 videos, 2 of 4 steps; Wan's guidance makes two forwards a step.
    assert (document["layers"], document["heads"], document["measured_calls"]) == (2, 4, 16)
    assert document["budget"] == document["flat"][1]["error"]
    written = HeadThresholds.load(out)
    assert written.model_class == "WanTransformer3DModel"
    assert written.calibrated_on == "prompts.txt (videos: 2), 64x64, 9 frames, 48 tokens, steps 1, 3 of 4"
    assert [layer.name for layer in written.layers] == [f"transformer.blocks.{layer}.attn1" for layer in range(2)]

    prompts = made / "prompts.txt"
    sparse = ("--attention", "xattn", *TINY[:-2], "--threshold", out)
    done = xattn("generate", "--model", made / "wan", "--prompts", prompts, "--limit", 1, "--out", tmp_path, *sparse)
    assert done.code == 0, done.err
    label = XAttnConfig(threshold=out, block_size=16, min_tokens=0, warmup_steps=1).label()
    (record,) = read_manifest(tmp_path / label).values()
    assert record["mean_density"] < 1
    assert XAttnConfig.from_dict(record["config"]).threshold == written
    # A language model refuses it, in one line.
    ask = ("--model", made / "watcher", "--items", made / "items.jsonl", "--fps", 8, "--block-size", 16)
    done = xattn("qa", *ask, "--threshold", out, "--stride", 8)
    assert done.code == 2
    assert "class Qwen2VLForConditionalGeneration, got thresholds of the model" in done.err.splitlines()[-1]
    # So does a run with another stride.
    done = xattn("generate", "--model", made / "wan", "--prompts", prompts, *sparse, "--stride", 4)
    assert done.code == 2
    assert "stride must be the one that the thresholds of" in done.err.splitlines()[-1]


def test_a_file_that_is_there_is_kept(made: Path, tmp_path: Path, xattn: Run) -> None:
    out = tmp_path / "thresholds.json"
    out.write_text("precious")
    asked = ("calibrate", "--model", made / "llama", "--texts", made / "one.txt", "--block-size", 16, *GRID)
    done = xattn(*asked, "--min-tokens", 0, "--out", out)
    assert done.code == 2
    assert "is there already" in done.err
    assert out.read_text() == "precious"
    done = xattn(*asked, "--min-tokens", 0, "--out", out, "--overwrite")
    assert done.code == 0, done.err
    assert "chosen, mean 0." in done.out
    assert HeadThresholds.load(out).calibrated_on == "one.txt, 90 to 90 tokens"


def test_a_language_models_budget_may_be_given(made: Path, tmp_path: Path, xattn: Run) -> None:
    asked = ("calibrate", "--model", made / "llama", "--texts", made / "one.txt", made / "one.txt", *GRID, "--json")
    asked += ("--block-size", 16, "--min-tokens", 0)
    first = read(xattn(*asked, "--out", tmp_path / "a.json"))
    more = read(xattn(*asked, "--out", tmp_path / "b.json", "--budget", first["flat"][3]["error"]))
    assert more["chosen"]["density"] < first["chosen"]["density"]
    assert more["measured_calls"] == 2 * more["layers"]
    done = xattn(*asked, "--out", tmp_path / "c.json", "--budget", first["flat"][0]["error"] / 10)
    assert done.code == 2
    assert "--budget: budget must be" in done.err.splitlines()[-1]
    assert not (tmp_path / "c.json").exists()


def test_a_video_understanding_models_file_is_made_and_used(made: Path, tmp_path: Path, xattn: Run) -> None:
    out = tmp_path / "thresholds.json"
    asked = ("--model", made / "watcher", "--items", made / "items.jsonl", "--fps", 8, "--block-size", 16)
    asked += ("--min-tokens", 0, "--device", "cpu")
    document = read(xattn("calibrate", *asked, *GRID, "--out", out, "--json"))
    assert document["measured_calls"] == document["layers"] == 2
    assert HeadThresholds.load(out).stride == 16
    done = xattn("qa", *asked, "--threshold", out, "--json")
    assert done.code == 0, done.err
    (answers,) = json.loads(done.out)["configurations"].values()
    assert answers["sparse_density"] < 1


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ((), "needs one of --prompts, --items and --texts, got none"),
        (("--prompts", "p.txt", "--texts", "t.txt"), "got --prompts and --texts"),
        (("--texts", "none.txt"), "none.txt: No such file"),
        (("--texts", "t.txt", "--start", 1.5), "--start must be in (0, 1], got 1.5"),
        (("--texts", "t.txt", "--factor", 1), "--factor must be in (0, 1), got 1.0"),
        (("--texts", "t.txt", "--factor", "nan"), "--factor must be in (0, 1), got nan"),
        (("--texts", "t.txt", "--values", 1), "--values must be from 2 to 255, got 1"),
        (("--texts", "t.txt", "--values", 200), "the last threshold must be 0.001 or more"),
        (("--texts", "t.txt", "--budget", -1), "--budget must be a number from 0, got -1.0"),
        (("--texts", "t.txt", "--stride", 7), "stride must be a power of two, got 7"),
        (("--texts", "t.txt", "--measured-steps", 0), "--measured-steps must be 1 or more, got 0"),
        (("--texts", "t.txt", "--out", "."), "--out .: is a folder"),
    ],
)
def test_bad_input_is_one_line(
    given: tuple[Any, ...], words: str, tmp_path: Path, xattn: Run, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    done = xattn("calibrate", "--model", "nobody/nothing", *given)
    assert done.code == 2
    assert words in done.err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_inputs_without_a_sparse_call_are_refused(made: Path, tmp_path: Path, xattn: Run) -> None:
    out = tmp_path / "thresholds.json"
    done = xattn("calibrate", "--model", made / "llama", "--texts", made / "short.txt", "--out", out)
    assert done.code == 2
    assert "--min-tokens 1024: no attention call was sparse" in done.err.splitlines()[-1]
    asked = ("calibrate", "--model", made / "wan", "--prompts", made / "prompts.txt", "--limit", 1, "--out", out)
    done = xattn(*asked, *TINY, "--min-tokens", 100)
    assert done.code == 2
    assert "the longest input has 48 tokens" in done.err.splitlines()[-1]
    done = xattn(*asked, *TINY, "--warmup-steps", 4)
    assert done.code == 2
    assert "--warmup-steps must be below the number of steps, 4, got 4" in done.err.splitlines()[-1]
    assert not out.exists()


def test_settings_give_the_grid_and_the_strides_of_the_other_commands() -> None:
    assert CalibrateSettings(model="m", texts=(Path("t"),)).grid == pytest.approx(
        [0.9 * 0.9**power for power in range(8)]
    )
    assert CalibrateSettings(model="m", prompts=Path("p")).score_stride == 8
    assert CalibrateSettings(model="m", items=Path("q")).score_stride == 16
    with pytest.raises(UserError, match="stride must divide block_size"):
        CalibrateSettings(model="m", prompts=Path("p"), stride=32, block_size=16)


# ---- the models that ship


def test_the_demos_video_model(tmp_path: Path, xattn: Run) -> None:
    (tmp_path / "prompts.txt").write_text("a red circle moving left on a white background\n")
    small = ("--height", 64, "--width", 64, "--num-frames", 17, "--steps", 3, "--warmup-steps", 2, "--block-size", 32)
    out = tmp_path / "thresholds.json"
    done = xattn(
        "calibrate", "--model", "demo", "--prompts", tmp_path / "prompts.txt", *small, "--min-tokens", 0, *GRID,
        "--out", out, "--json",
    )  # fmt: skip
    document = read(done)
    assert (document["layers"], document["heads"]) == (4, 16)
    assert document["chosen"]["density"] < document["flat"][1]["density"]

    from diffusers import WanPipeline

    pipe = WanPipeline.from_pretrained(find_model("demo").source)
    pipe.set_attn_processor(XAttnProcessor(XAttnConfig(threshold=out, block_size=32)))
    other = HeadThresholds.load(out)
    with pytest.raises(ValueError, match="must be of the layers of this WanTransformer3DModel, which has 4, got 3"):
        XAttnProcessor(threshold=HeadThresholds(**{**vars(other), "layers": other.layers[:3]}), block_size=32).attach(
            pipe
        )


def test_the_demos_model_that_watches(made: Path, tmp_path: Path, xattn: Run) -> None:
    (tmp_path / "items.jsonl").write_text(
        json.dumps({"video": str(made / "red.mp4"), "question": "What colour is the shape?", "answer": "red"}) + "\n"
    )
    asked = ("--model", "demo", "--items", tmp_path / "items.jsonl", "--min-tokens", 0, "--block-size", 32)
    out = tmp_path / "thresholds.json"
    document = read(xattn("calibrate", *asked, *GRID, "--out", out, "--json"))
    assert (document["model"], document["layers"], document["heads"]) == ("demo", 4, 16)
    done = xattn("qa", *asked, "--threshold", out, "--json")
    assert done.code == 0, done.err
    (answers,) = json.loads(done.out)["configurations"].values()
    assert answers["sparse_density"] < 1
