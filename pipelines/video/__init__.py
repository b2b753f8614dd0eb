"""A prompt file to videos: what to make, how, and what is there already."""

from xattn_video_pipelines.video.command import generate
from xattn_video_pipelines.video.settings import GenerateSettings, VideoSettings

__all__ = ["GenerateSettings", "VideoSettings", "generate"]
