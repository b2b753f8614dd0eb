"""A prompt file to videos: what to make, how, and what is there already."""

from xattn_video_pipelines.video.all_dense import (
    is_all_dense,
    told_at_the_end,
    told_of_all_dense,
    warn_of_all_dense,
)
from xattn_video_pipelines.video.command import generate, print_video
from xattn_video_pipelines.video.cost import Cost, estimate, first_line
from xattn_video_pipelines.video.io import frame_times, iter_frames, read_video, video_info, write_video
from xattn_video_pipelines.video.make import load_pipeline, observe, produce
from xattn_video_pipelines.video.manifest import NAME as MANIFEST
from xattn_video_pipelines.video.manifest import (
    Key,
    Record,
    check_exists,
    finished_videos,
    lossless_copy,
    read_manifest,
    video_file,
    video_name,
)
from xattn_video_pipelines.video.models import (
    Model,
    ResolvedSettings,
    check_available,
    find_model,
    hub_message,
    import_diffusers,
    offline_message,
    sampled_digest,
)
from xattn_video_pipelines.video.plan import Job, Plan, make_plan
from xattn_video_pipelines.video.prompts import MAX_SEED, evenly_spaced
from xattn_video_pipelines.video.settings import (
    GenerateSettings,
    PresetOption,
    VideoPreset,
    VideoSettings,
    steps_or_share,
)
from xattn_video_pipelines.video.timing import busy

__all__ = [
    "MANIFEST",
    "MAX_SEED",
    "Cost",
    "GenerateSettings",
    "Job",
    "Key",
    "Model",
    "Plan",
    "PresetOption",
    "Record",
    "ResolvedSettings",
    "VideoPreset",
    "VideoSettings",
    "busy",
    "check_available",
    "check_exists",
    "estimate",
    "evenly_spaced",
    "find_model",
    "finished_videos",
    "first_line",
    "frame_times",
    "generate",
    "hub_message",
    "import_diffusers",
    "is_all_dense",
    "iter_frames",
    "load_pipeline",
    "lossless_copy",
    "make_plan",
    "observe",
    "offline_message",
    "print_video",
    "produce",
    "read_manifest",
    "read_video",
    "sampled_digest",
    "steps_or_share",
    "told_at_the_end",
    "told_of_all_dense",
    "video_file",
    "video_info",
    "video_name",
    "warn_of_all_dense",
    "write_video",
]
