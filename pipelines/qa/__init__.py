"""Questions about videos, answered by a language model with sparse prefill."""

from xattn_video_pipelines.qa.command import answer_questions
from xattn_video_pipelines.qa.settings import QaSettings

__all__ = ["QaSettings", "answer_questions"]
