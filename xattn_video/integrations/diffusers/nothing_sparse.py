"""Warn of a generation in which no attention call was sparse, with the main reason and the setting that changes it."""

from __future__ import annotations

import sys
import warnings
from collections import Counter

from ...config import XAttnConfig
from .schedule import Schedule

# A reason of the statistics -> what it says of a whole generation, and what changes that. `min_tokens` and the reasons
# of the schedule are told with numbers, below.
_WORDS = {
    "no_backend": "this device has no fast implementation; `xattn-video doctor --full` says why",
    "autograd": "the inputs require a gradient; call the model under torch.no_grad()",
    "dropout": "the attention uses dropout; call model.eval()",
    "mask": "the model passes a mask that is not a simple range of valid keys; no setting changes that",
    "joint_text": "text shares the sequence with the video in a class of models that is not known; "
    "xattn_video.supported() lists those that are",
    "packed_rows": "the video is not at one end of its packed sequence; no setting changes that",
    "cross_attention": "queries and keys have different lengths; no setting changes that",
    "refresh": "every step after the warm-up found the residual again; set a larger refresh_every, or list fewer steps "
    "in refresh",
}

# Packages whose code runs between the line that asks for a generation and a forward of it.
_BETWEEN = {"accelerate", "diffusers", "torch", "xattn_video"}


class NothingSparse(UserWarning):
    """A generation has no sparse attention call, so that it is as slow as with dense attention."""


class Generation:
    """The present generation of one processor, seen from the host alone: no tensor is read.

    Args:
        config: the settings.
    """

    def __init__(self, config: XAttnConfig) -> None:
        self._config = config
        self._schedule: Schedule | None = None
        self._video: int | None = None
        # file and line that the warning points to
        self._asked_by = ("", 0)
        # whether there is nothing to say, or it was said
        self._settled = True
        # why forwards were dense; how many tokens a forward had that `min_tokens` keeps dense
        self._reasons: Counter[str] = Counter()
        self._tokens: int | None = None

    def begin_forward(self, video: int, schedule: Schedule) -> None:
        """A forward of this generation starts. The first one ends the generation before, and tells a hopeless plan."""
        if video == self._video:
            return
        self.end(complete=False)
        self._video, self._schedule, self._settled = video, schedule, False
        self._asked_by = _caller()
        self._reasons.clear()
        self._tokens = None
        if schedule.all_dense is not None:
            self._warn(schedule.all_dense)

    def end_forward(self, step: int, *, sparse: bool, reason: str | None, tokens: int | None) -> None:
        """A forward is over.

        Args:
            step: its step.
            sparse: whether one of its calls was sparse.
            reason: why the others were dense; None where `dense_layers` asks for all of them.
            tokens: keys of a call that was too short, where known.
        """
        assert self._schedule is not None
        self._settled = self._settled or sparse
        # the last step of a warm-up is a refresh where there is a residual
        reason = "warmup" if reason is not None and step < self._schedule.warmup else reason
        if reason is not None:
            self._reasons[reason] += 1
        self._tokens = tokens or self._tokens

    def end(self, *, complete: bool) -> None:
        """The generation is over.

        Args:
            complete: whether its last step has run. One that was interrupted in its warm-up gives no reason to warn.
        """
        if self._settled or self._schedule is None:
            return
        beyond = Counter(
            {name: number for name, number in self._reasons.items() if name not in ("warmup", "last_steps")}
        )
        if not beyond and not complete and self._schedule.total is not None:
            return
        # what is dense by the schedule matters only where nothing else is
        for reason, _ in (beyond or self._reasons).most_common(1):
            self._warn(self._why(reason))

    def _why(self, reason: str) -> str:
        config = self._config
        if reason == "min_tokens":
            calls = "its calls have fewer" if self._tokens is None else f"its calls have {self._tokens} keys, fewer"
            return f"{calls} than min_tokens={config.min_tokens}; set a smaller min_tokens, or make a larger video"
        if reason in ("warmup", "last_steps"):
            return f"all its steps were in the warm-up; set a smaller warmup_steps than {config.warmup_steps}"
        return _WORDS[reason]

    def _warn(self, why: str) -> None:
        self._settled = True
        text = f"no attention call of this generation is sparse: {why}"
        # Python's own registry would show only the first of the generations with the same text.
        warnings.warn_explicit(text, NothingSparse, *self._asked_by, module=__name__)


def _caller() -> tuple[str, int]:
    """File and line of the code that asked for this generation: the call of the pipeline, or that of a model.

    It is looked up at the start, since the end may be seen at a later line, or when the garbage collector runs.
    `warnings.warn(skip_file_prefixes=...)` only looks at the present line, and needs Python 3.12.
    """
    frame = sys._getframe()
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).partition(".")[0] in _BETWEEN:
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno
