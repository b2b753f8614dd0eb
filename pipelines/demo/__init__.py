"""A small Wan pipeline of diffusers' and transformers' real classes, and the program that shows it."""

from typing import Any

__all__ = ["DemoSettings", "JudgeSettings", "demo", "judge_folders"]


def __getattr__(name: str) -> Any:
    # Not when this package is imported: whoever needs a file of the demo alone would load all programs.
    if name in ("DemoSettings", "JudgeSettings"):
        from xattn_video_pipelines.demo import settings

        return getattr(settings, name)
    if name == "demo":
        from xattn_video_pipelines.demo.command import demo

        return demo
    if name == "judge_folders":
        from xattn_video_pipelines.demo.judging import judge_folders

        return judge_folders
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
