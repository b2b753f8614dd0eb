"""The settings of each program: the same from Python and from the command line, with the library's defaults."""

from __future__ import annotations

import importlib
import inspect
from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from xattn_video import XAttnConfig
from xattn_video.config import PRESETS
from xattn_video_eval.bench import BenchSettings
from xattn_video_eval.benchmarks.needle import NeedleSettings
from xattn_video_eval.compare import CompareSettings
from xattn_video_eval.report import ReportSettings
from xattn_video_eval.sweep import SweepSettings
from xattn_video_eval.tune import TuneSettings
from xattn_video_eval.tune.problems import KERNELS
from xattn_video_pipelines.cli import COMMANDS, build_app, module_of
from xattn_video_pipelines.common.errors import UserError
from xattn_video_pipelines.common.program import run_app
from xattn_video_pipelines.common.settings import Settings
from xattn_video_pipelines.demo import DemoSettings, JudgeSettings
from xattn_video_pipelines.qa import QaSettings
from xattn_video_pipelines.status import StatusSettings
from xattn_video_pipelines.video import GenerateSettings, VideoPreset

VIDEOS: dict[str, Any] = {"model": "demo", "prompts": Path("prompts.txt")}
# A command, and settings in which values of each kind differ from the defaults.
EXAMPLES: dict[str, Settings] = {
    "generate": GenerateSettings(
        **VIDEOS,
        seeds=(3, 1),
        threshold=0.5,
        attention="all",
        lossless=True,
        height=64,
        preset="fast",
        extrapolate=False,
    ),
    "sweep": SweepSettings(**VIDEOS, thresholds=(0.5, 0.9), strides=(8,), lpips=False, plot=False, grid=True),
    "compare": CompareSettings(Path("a"), Path("b"), lpips_net="vgg", floor=False, workers=2),
    "report": ReportSettings(Path("run"), max_megabytes=1.5, lpips=False),
    "qa": QaSettings(video=Path("a.mp4"), question="What?", options=("a b", "c"), answer="c", fps=2.5),
    "status": StatusSettings(Path("out")),
    "demo": DemoSettings(limit=2, overwrite=True, preset="balanced"),
    "judge": JudgeSettings((Path("a"), Path("b"))),
    "bench": BenchSettings(tokens=(512, 1024), dtype=("fp32", "bf16"), inputs="text", causal=True),
    "tune": TuneSettings(head_dim=(64, 128), kernel=("block_sparse",)),
    "needle": NeedleSettings(model="m", out=Path("o"), tasks=("single",), depths=(0.0, 50.0), chat=False),
}


@pytest.mark.parametrize("command", EXAMPLES)
def test_the_command_line_makes_the_settings_that_python_makes(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, entry = module_of(command), COMMANDS[command]
    run, seen = getattr(module, entry.function), []

    def record(settings: Any, **more: Any) -> int:
        seen.append(settings)
        return 0

    record.__signature__ = inspect.signature(run)  # type: ignore[attr-defined]
    record.__annotations__ = get_type_hints(run, include_extras=True)
    monkeypatch.setattr(module, entry.function, record)
    settings = EXAMPLES[command]
    assert run_app(build_app(command), [command, *settings.arguments()], tuple(COMMANDS)) == 0
    assert seen == [settings]
    with pytest.raises(FrozenInstanceError):
        setattr(settings, fields(settings)[0].name, None)


def test_defaults_are_those_of_the_library() -> None:
    assert GenerateSettings(**VIDEOS).config == XAttnConfig()
    assert SweepSettings(**VIDEOS).configs[0] == XAttnConfig().for_videos()
    assert TuneSettings().kernel == KERNELS
    assert BenchSettings().config == XAttnConfig(min_tokens=0, anchors=0)


def test_what_is_given_replaces_the_presets_value() -> None:
    preset = XAttnConfig.preset
    assert GenerateSettings(**VIDEOS, preset="balanced").config == preset("balanced")
    changed = GenerateSettings(**VIDEOS, preset="fast", threshold=0.5, extrapolate=False, refresh_every=3.0, anchors=0)
    assert changed.config == preset("fast", threshold=0.5, extrapolate=False, refresh_every=3, anchors=0)
    assert GenerateSettings(**VIDEOS, preset="fast", residual="off").config == preset("fast", residual="off")
    assert GenerateSettings(**VIDEOS, residual="int4", refresh_every=0.25).config.refresh_every == 0.25


def test_the_presets_of_videos_are_the_librarys_without_those_of_other_models() -> None:
    assert set(get_args(VideoPreset)) == PRESETS.keys() - {"qwen2-vl", "language"}
    assert all(XAttnConfig.preset(name).stride == 8 for name in get_args(VideoPreset))


def test_a_sweep_makes_its_videos_with_its_own_settings() -> None:
    of_videos = SweepSettings(**VIDEOS, seeds=(1,), steps=4, block_size=64, min_tokens=0).of_videos
    expected = GenerateSettings(
        **VIDEOS, out=Path("sweep"), seeds=(1,), steps=4, block_size=64, min_tokens=0, lossless=True
    )
    assert of_videos == expected


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GenerateSettings(**VIDEOS, threshold=2.0), "threshold must be in"),
        (lambda: GenerateSettings(**VIDEOS, preset="language"), "--preset must be one of fast, balanced, faithful"),
        (lambda: GenerateSettings(**VIDEOS, preset="fast", keep_masks=2), "keep_masks goes without a residual"),
        (lambda: GenerateSettings(**VIDEOS, seeds=(1, 1)), "--seeds must differ, got 1 1"),
        (lambda: GenerateSettings(**VIDEOS, attention="half"), "--attention must be one of dense, dense-alt, xattn"),
        (lambda: SweepSettings(**VIDEOS, strides=(7,)), "stride must be a power of two, got 7"),
        (lambda: QaSettings(question="What?"), "needs --video, or a file of questions as --items"),
        (lambda: BenchSettings(dense_last=4), "--dense-last goes with --model"),
        (lambda: TuneSettings(head_dim=(64, 512)), "--head-dim must be 8 or more and 256 or less, got 512"),
        (lambda: CompareSettings(Path("a"), Path("b"), workers=0), "--workers must be at least 1, got 0"),
    ],
)
def test_values_out_of_range_are_refused_when_settings_are_made(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


@pytest.mark.parametrize("command", sorted(set(COMMANDS) - {"doctor"}))
def test_every_command_takes_settings(command: str) -> None:
    module = importlib.import_module(COMMANDS[command].module)
    first = next(iter(get_type_hints(getattr(module, COMMANDS[command].function)).values()))
    assert issubclass(first, Settings)
