"""Launch configurations, measured on this GPU."""

from typing import TYPE_CHECKING

from xattn_video.fronts import lazy

if TYPE_CHECKING:
    from xattn_video_eval.tune.command import tune as tune
    from xattn_video_eval.tune.compile import workers as workers
    from xattn_video_eval.tune.like_jit import TARGETS as TARGETS
    from xattn_video_eval.tune.like_jit import compile_like_jit as compile_like_jit
    from xattn_video_eval.tune.settings import TuneSettings as TuneSettings
else:
    __getattr__, __dir__, __all__ = lazy(
        __name__,
        {
            "command": ["tune"],
            "compile": ["workers"],
            "like_jit": ["TARGETS", "compile_like_jit"],
            "settings": ["TuneSettings"],
        },
    )
