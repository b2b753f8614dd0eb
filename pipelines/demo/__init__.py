"""A small Wan pipeline of diffusers' and transformers' real classes, and the program that shows it."""

from typing import TYPE_CHECKING

from xattn_video.fronts import lazy

if TYPE_CHECKING:
    from xattn_video_pipelines.demo.command import demo as demo
    from xattn_video_pipelines.demo.judging import judge_folder as judge_folder
    from xattn_video_pipelines.demo.judging import judge_folders as judge_folders
    from xattn_video_pipelines.demo.settings import JUDGED_JSON as JUDGED_JSON
    from xattn_video_pipelines.demo.settings import DemoSettings as DemoSettings
    from xattn_video_pipelines.demo.settings import JudgeSettings as JudgeSettings
    from xattn_video_pipelines.demo.stories import KINDS as KINDS
    from xattn_video_pipelines.demo.stories import SCENE_FRAMES as SCENE_FRAMES
    from xattn_video_pipelines.demo.stories import draw_question as draw_question
    from xattn_video_pipelines.demo.stories import draw_story as draw_story
    from xattn_video_pipelines.demo.timing import attention_speedup as attention_speedup
    from xattn_video_pipelines.demo.timing import loaded as loaded
    from xattn_video_pipelines.demo.timing import read_timing as read_timing
    from xattn_video_pipelines.demo.world import FPS as FPS
    from xattn_video_pipelines.demo.world import asked as asked
else:
    __getattr__, __dir__, __all__ = lazy(
        __name__,
        {
            "command": ["demo"],
            "judging": ["judge_folder", "judge_folders"],
            "settings": ["JUDGED_JSON", "DemoSettings", "JudgeSettings"],
            "stories": ["KINDS", "SCENE_FRAMES", "draw_question", "draw_story"],
            "timing": ["attention_speedup", "loaded", "read_timing"],
            "world": ["FPS", "asked"],
        },
    )
