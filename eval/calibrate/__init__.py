"""Thresholds for every layer and head of a model: the paper's minimum threshold prediction."""

from typing import TYPE_CHECKING

from xattn_video.fronts import lazy

if TYPE_CHECKING:
    from xattn_video_eval.calibrate.choose import choose as choose
    from xattn_video_eval.calibrate.command import calibrate as calibrate
    from xattn_video_eval.calibrate.measure import Measurement as Measurement
    from xattn_video_eval.calibrate.settings import CalibrateSettings as CalibrateSettings
else:
    __getattr__, __dir__, __all__ = lazy(
        __name__,
        {
            "choose": ["choose"],
            "command": ["calibrate"],
            "measure": ["Measurement"],
            "settings": ["CalibrateSettings"],
        },
    )
