"""Questions about videos, answered by a language model with sparse prefill."""

from typing import TYPE_CHECKING

from xattn_video.fronts import lazy

if TYPE_CHECKING:
    from xattn_video_pipelines.qa.answers import Answer as Answer
    from xattn_video_pipelines.qa.answers import generate_answer as generate_answer
    from xattn_video_pipelines.qa.command import answer_questions as answer_questions
    from xattn_video_pipelines.qa.command import load_video_model as load_video_model
    from xattn_video_pipelines.qa.command import print_answer as print_answer
    from xattn_video_pipelines.qa.command import prompts_of as prompts_of
    from xattn_video_pipelines.qa.command import summary_table as summary_table
    from xattn_video_pipelines.qa.load import load_model as load_model
    from xattn_video_pipelines.qa.load import reach as reach
    from xattn_video_pipelines.qa.load import read_answers as read_answers
    from xattn_video_pipelines.qa.load import weights_of as weights_of
    from xattn_video_pipelines.qa.questions import read_questions as read_questions
    from xattn_video_pipelines.qa.qwen_positions import repair_positions as repair_positions
    from xattn_video_pipelines.qa.settings import ANSWERS as ANSWERS
    from xattn_video_pipelines.qa.settings import DEMO as DEMO
    from xattn_video_pipelines.qa.settings import SUMMARY as SUMMARY
    from xattn_video_pipelines.qa.settings import LoadSettings as LoadSettings
    from xattn_video_pipelines.qa.settings import PrefillSettings as PrefillSettings
    from xattn_video_pipelines.qa.settings import QaSettings as QaSettings
else:
    __getattr__, __dir__, __all__ = lazy(
        __name__,
        {
            "answers": ["Answer", "generate_answer"],
            "command": ["answer_questions", "load_video_model", "print_answer", "prompts_of", "summary_table"],
            "load": ["load_model", "reach", "read_answers", "weights_of"],
            "questions": ["read_questions"],
            "qwen_positions": ["repair_positions"],
            "settings": ["ANSWERS", "DEMO", "SUMMARY", "LoadSettings", "PrefillSettings", "QaSettings"],
        },
    )
