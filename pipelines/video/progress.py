"""Progress on stderr: an outer bar over videos, an inner one over denoising steps, both with the time left.

The inner bar stands in for the pipeline's own one, which every diffusers pipeline has, also those that take no
step callback; so it is also the clock that tells seconds a step.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from tqdm import tqdm

from xattn_video_pipelines.common.tables import duration
from xattn_video_pipelines.common.terminal import is_quiet, say

# In a log file a bar is a new line each time: every half minute is enough.
_LOG_INTERVAL = 30.0
# Seconds; a run that is over by then is not worth a line about how long it takes.
_SHORT_RUN = 60.0


class VideoProgress:
    """The outer bar. `steps` goes in place of a pipeline's `progress_bar` method.

    Args:
        total: videos to make.
        synchronize: waits for the device, so that a step's end is its real end.
    """

    def __init__(self, total: int, synchronize: Callable[[], None]) -> None:
        self._tty = sys.stderr.isatty()
        self._synchronize = synchronize
        self._bar = tqdm(
            total=total, unit="video", desc="videos", file=sys.stderr, position=0, dynamic_ncols=self._tty,
            mininterval=0.2 if self._tty else _LOG_INTERVAL, disable=is_quiet(),
        )  # fmt: skip
        self._last_log = time.perf_counter()
        self.step_seconds: list[float] = []
        self.cpu_seconds = 0.0
        self._videos, self._first_step_told = total, False

    @contextmanager
    def video(self, name: str) -> Iterator[None]:
        """While it is open, this video is in work.

        `step_seconds` has its steps, `cpu_seconds` the time that the threads of this process computed in them, and the
        bar has its name.
        """
        self.forget_steps()
        self._bar.set_description(name)
        yield
        self._bar.set_postfix_str("", refresh=False)
        self._bar.update()

    def forget_steps(self) -> None:
        """The steps of this video begin again."""
        self.step_seconds, self.cpu_seconds = [], 0.0

    def steps(self, iterable: Iterable[Any] | None = None, total: int | None = None) -> Any:
        """A bar over denoising steps, as `DiffusionPipeline.progress_bar` gives one."""
        return _StepBar(self, iterable, total)

    def start_step(self) -> None:
        """A step begins now."""
        self._synchronize()
        self._started, self._started_cpu = time.perf_counter(), time.process_time()

    def step_done(self, done: int, total: int | None) -> None:
        """A step has ended, and the next one begins."""
        started, started_cpu = self._started, self._started_cpu
        self.start_step()
        now, seconds = self._started, self._started - started
        self.step_seconds.append(seconds)
        self.cpu_seconds += self._started_cpu - started_cpu
        if not self._first_step_told:
            self._first_step_told = True
            line = told_of_first_step(seconds, total, self._videos)
            if line:
                say(line, sys.stderr, progress=True)
        if not self._tty:
            # The inner bar needs a terminal; in a log the outer one tells the steps.
            self._bar.set_postfix_str(f"step {done}/{total or '?'}", refresh=False)
            if now - self._last_log >= _LOG_INTERVAL:
                self._last_log = now
                self._bar.refresh()

    def __enter__(self) -> VideoProgress:
        return self

    def __exit__(self, *error: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._bar.close()


def told_of_first_step(seconds: float, steps: int | None, videos: int) -> str | None:
    """What the first step of a run lets expect of the rest of it, or None where the whole run is over in a minute.

    Args:
        seconds: that it took.
        steps: of a video; None where nobody knows.
        videos: that are to be made.
    """
    if steps is None or seconds * steps * videos < _SHORT_RUN:
        return None
    video = duration(seconds * steps)
    return f"first step took {seconds:.1f} s: about {video} a video, {duration(seconds * steps * videos)} in all"


class _StepBar(tqdm):  # type: ignore[misc]  # tqdm has no types of its own
    def __init__(self, progress: VideoProgress, iterable: Iterable[Any] | None, total: int | None) -> None:
        super().__init__(
            iterable, total=total, unit="step", desc="steps", file=sys.stderr, position=1, leave=False,
            disable=is_quiet() or not sys.stderr.isatty(), dynamic_ncols=True,
        )  # fmt: skip
        self._progress = progress
        self._done = 0
        self._total = total
        progress.start_step()

    def update(self, n: float | None = 1) -> bool | None:
        self._note()
        shown: bool | None = super().update(n)
        return shown

    def __iter__(self) -> Any:
        for item in super().__iter__():
            yield item
            self._note()

    def _note(self) -> None:
        self._done += 1
        self._progress.step_done(self._done, self._total)
