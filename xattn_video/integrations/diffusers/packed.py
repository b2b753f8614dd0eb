"""Where the generated video is in a packed sequence: MiniMax-H3 has text, references, sound and video in one."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

# What `token_tags` calls a row of the video.
_VIDEO = 0


class Packed(NamedTuple):
    """The rows of a packed sequence.

    Attributes:
        exact: range of the tokens that stay exact on both sides; None where every token is of the video.
        reason: why every call of such a sequence is dense, or None.
        last: a row of the generated video, or the last row where there is none.
    """

    exact: tuple[int, int] | None
    reason: str | None
    last: int


def read_packed(token_tags: Tensor, timestep_indices: Tensor) -> Packed:
    """Find the generated video in a packed sequence. The host waits for it: once for each new `token_tags`.

    The generated video is the last run of video rows, without those at its start that have another timestep than its
    last row: they are references, whose noise does not change.

    Args:
        token_tags: integers `[S]`, what each row is; 0 is the video.
        timestep_indices: integers `[S]`, which of the model's timesteps a row has.
    """
    tags, times = token_tags.tolist(), timestep_indices.tolist()
    tokens = len(tags)
    end = tokens
    while end and tags[end - 1] != _VIDEO:
        end -= 1
    begin = end
    while begin and tags[begin - 1] == _VIDEO and times[begin - 1] == times[end - 1]:
        begin -= 1
    last = (end or tokens) - 1
    if begin == end or (begin and end < tokens):
        # no video, or other rows on both sides of it, which are no range
        return Packed(None, "packed_rows", last)
    if begin:
        return Packed((0, begin), None, last)
    return Packed((end, tokens) if end < tokens else None, None, last)
