"""The settings of sparse attention in plain words, from a manifest's record of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from xattn_video import HeadThresholds, XAttnConfig


def in_words(config: Mapping[str, Any]) -> list[str]:
    """A line for each thing that was asked for; the first two are always there.

    Args:
        config: `XAttnConfig.to_dict()` of the version that made the video. What was no setting then had its default.
    """
    made = XAttnConfig.from_dict(config)
    lines = [f"{_rule(made)}, stride {made.stride}, blocks of {made.block_size} tokens", _dense_steps(made)]
    if made.threshold_ramp:
        change = "falls" if made.threshold_ramp > 0 else "rises"
        lines.append(f"the threshold {change} by {abs(made.threshold_ramp):g} over the sparse steps")
    if made.anchors:
        lines.append(f"always kept: {_many(made.anchors, 'neighbour')} of each block, in the sequence and in time")
    if made.per_head:
        lines.append("the threshold is shared out among the heads of all layers in the last dense step")
    if made.keep_masks > 1:
        lines.append(f"one choice of blocks for {made.keep_masks} sparse steps")
    if made.residual != "off":
        continued = ", and their change is continued in between" if made.extrapolate else ""
        lines.append(f"what the kept blocks miss is remembered ({made.residual}) and added back")
        lines.append(f"refreshes: {_refreshes(made)}{continued}")
    return lines


def _rule(config: XAttnConfig) -> str:
    if config.selection == "top_k":
        return f"{_many(config.top_k or 0, 'key block')} per query block"
    if config.selection == "top_ratio":
        return f"{_share(config.top_ratio or 0)} of the key blocks"
    if isinstance(config.threshold, HeadThresholds):
        return f"thresholds of each layer and head, measured on {config.threshold.model}"
    if isinstance(config.threshold, tuple):
        return f"threshold {min(config.threshold):g} to {max(config.threshold):g}, one per head"
    return f"threshold {config.threshold:g}"


def _dense_steps(config: XAttnConfig) -> str:
    most = "" if config.warmup is None else f", at most {_share(config.warmup)} of all,"
    last = f" and the last {_many(config.last_steps, 'step')}" if config.last_steps else ""
    return f"dense: the first {_many(config.warmup_steps, 'step')}{most}{last}".removesuffix(",")


def _refreshes(config: XAttnConfig) -> str:
    if isinstance(config.refresh_rule, tuple):
        return f"at the sparse steps {', '.join(map(str, config.refresh_rule))}, counted from 0"
    # None stands for this share.
    every = 0.2 if config.refresh_every is None else config.refresh_every
    gap = _many(every, "step") if isinstance(every, int) else f"{_share(every)} of all steps"
    return f"one layer after another, each every {gap}" if config.refresh_rule == "fixed" else f"gaps grow to {gap}"


def _share(value: float) -> str:
    return f"{100 * value:g} %"


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"
