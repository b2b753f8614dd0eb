"""Sparse videos without a sparse call: told before a model is loaded where it is known, and at the end."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from xattn_video_pipelines.video.manifest import Record

if TYPE_CHECKING:
    from xattn_video import XAttnConfig
    from xattn_video_pipelines.video.models import Recipe

# What changes it, by the reason of the dense calls.
_REMEDIES = {
    "warmup": "give fewer --warmup-steps, or --warmup 0.25, which keeps them to a quarter of all steps",
    "last_steps": "give fewer --last-steps",
    "min_tokens": "give a smaller --min-tokens, or a larger video",
    "no_backend": "xattn-video doctor --full says what is missing",
}


@contextmanager
def told_at_the_end() -> Iterator[None]:
    """While a command runs that says it at the end, with its own options, the library's warning is left out."""
    from xattn_video.integrations.diffusers import NothingSparse

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NothingSparse)
        yield


def foreseen(config: XAttnConfig, recipe: Recipe) -> str | None:
    """Why every call of a video with these settings will be dense and what changes it, or None where one is not."""
    from xattn_video.integrations.diffusers import Schedule

    steps, tokens = recipe.settings.steps, recipe.tokens
    schedule = Schedule(config, steps)
    if schedule.sparse_steps == 0:
        if schedule.warmup < steps:
            return (
                f"--warmup-steps {config.warmup_steps} and --last-steps {config.last_steps} cover all {steps} steps; "
                "give fewer"
            )
        return f"the {config.warmup_steps} warm-up steps cover all {steps} steps; {_REMEDIES['warmup']}"
    # Text in the same sequence is counted too, and how much there is depends on the prompt.
    if tokens is not None and tokens < config.min_tokens and not recipe.model.has_joint_text:
        return f"{tokens:,} tokens are fewer than --min-tokens {config.min_tokens:,}; {_REMEDIES['min_tokens']}"
    return None


def warn_of_all_dense(configs: Iterable[XAttnConfig | None], recipe: Recipe) -> list[str]:
    """A line for each of these settings (None: dense) whose videos will have no sparse call; each is said once."""
    told = [(config, foreseen(config, recipe)) for config in configs if config is not None]
    return list(dict.fromkeys(f"warning: {c.label()}: every call will be dense: {why}" for c, why in told if why))


def is_all_dense(record: Record) -> bool:
    """Whether the video of a record should be sparse and had no sparse call."""
    if record.get("attention") != "xattn":
        return False
    calls = record.get("sparse_calls")
    # Manifests of earlier versions do not tell the number.
    return calls == 0 if calls is not None else record.get("mean_density") == 1.0


def told_of_all_dense(records: Sequence[Record]) -> str | None:
    """One line about those of a run's videos that should be sparse and had no sparse call, or None."""
    sparse = [record for record in records if record["attention"] == "xattn"]
    dense = [record for record in sparse if is_all_dense(record)]
    if not dense:
        return None
    reasons = dense[0].get("dense_reasons") or {}
    counted = ", ".join(f"{number} {reason}" for reason, number in reasons.items())
    # What stands against sparse calls beside the steps that are meant to be dense counts for more than these.
    main = next((reason for reason in reasons if reason not in ("warmup", "last_steps")), next(iter(reasons), ""))
    remedy = _REMEDIES.get(main, "docs/python.md says what each reason means")
    return (
        f"warning: {len(dense)} of {len(sparse)} sparse videos had no sparse call (dense calls of the first: "
        f"{counted}); {remedy}"
    )
