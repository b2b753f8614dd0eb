"""What the demo's transformer is trained on, step by step: phases from short small clips to full size, and batches."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from xattn_video_pipelines.demo import world
from xattn_video_pipelines.demo.training.latents import ClipSize, clip_scene
from xattn_video_pipelines.demo.training.loop import phase_at

# Sampling's shift of the noise levels at full size; smaller clips have fewer tokens to average noise over.
FLOW_SHIFT = 4.0
# The share of captions that are left empty, for guidance.
_DROPPED = 0.1


@dataclass(frozen=True)
class Anchor:
    """One latent frame with less noise than the others, in a share of the steps; it does not count in the loss.

    It is the first of those that the step sees, or any of them. Its noise level is a share of its clip's, drawn
    evenly from the range `noise`.
    """

    share: float
    noise: tuple[float, float]
    first: bool = False


@dataclass(frozen=True)
class Phase:
    """A part of the training: up to the share `until` of all steps, `batch` clips of one size from `clips` many.

    With `kept`, a step sees that many latent frames of its clips, drawn anew each time, at their own places in time:
    for a part of the price the model learns distances that only long clips have. With `cut`, it sees a square of so
    many tokens a side of each clip, anywhere in it. `shift` moves the noise levels upwards as a sampler's flow shift
    does; None is what goes with the size.

    Raises:
        ValueError: an anchor, but no frame beside it.
    """

    until: float
    size: ClipSize
    batch: int
    clips: int
    kept: int | None = None
    cut: int | None = None
    shift: float | None = None
    anchor: Anchor | None = None

    def __post_init__(self) -> None:
        if self.anchor is not None and (self.kept or self.size.latent_frames) < 2:
            raise ValueError("an anchor needs another frame beside it")

    @property
    def tokens(self) -> int:
        """The tokens that a step sees of each clip."""
        side = self.size.side_tokens if self.cut is None else self.cut
        return side**2 * (self.kept or self.size.latent_frames)


FULL = ClipSize(33, 128)
# Many small steps: 1,000 of eight times these batches left the shapes ragged.
PHASES = (
    Phase(0.40, ClipSize(1, 80), 24, 6144),
    Phase(0.65, ClipSize(5, 80), 8, 3072),
    Phase(0.83, ClipSize(9, 96), 4, 2304),
    Phase(0.95, ClipSize(17, 104), 2, 768),
    Phase(1.00, FULL, 1, 384),
)
# For a model that PHASES has taught to draw, but neither to tell 14 tokens in time or space from none (there the second
# of the rotary frequencies comes around) nor which way a shape goes. That is settled while there is almost nothing but
# noise, and where a shape is gives it away, since its whole way lies in the picture. In a square cut out anywhere it
# does not. First one frame says where the shape is, and the words where it goes from there; then that frame has more
# noise, and is any frame; then most steps do without it, and whole pictures come back.
CONTINUED_PHASES = (
    Phase(0.19, FULL, 12, 1536, kept=4, cut=10, shift=24.0, anchor=Anchor(1.0, (0.0, 0.6), first=True)),
    Phase(0.37, FULL, 12, 1536, kept=4, cut=10, shift=24.0, anchor=Anchor(1.0, (0.2, 1.0))),
    Phase(0.56, FULL, 8, 1536, kept=6, cut=10, shift=16.0, anchor=Anchor(0.5, (0.6, 1.0))),
    Phase(0.72, FULL, 5, 1536, kept=5, shift=12.0, anchor=Anchor(0.25, (0.2, 1.0))),
    Phase(0.92, FULL, 3, 1536, kept=8),
    Phase(1.00, FULL, 1, 1536),
)
# Of the learning rates, for weights that know something already, and of the steps, over which the rates fall.
CONTINUED_RATE, CONTINUED_COOLDOWN = 0.8, 0.6


@dataclass(frozen=True)
class Batch:
    """What a step sees: the numbers of its clips, their captions (empty where dropped), noise levels in (0, 1).

    `frames` are the latent frames of them that are kept, in order. `corners` `[clips, 2]` are the upper left tokens
    (row, column) of what is cut out of each, None where nothing is. `anchored` is which of `frames` has less noise, and
    for each clip the share of its noise level that is left there; None without one.
    """

    phase: Phase
    clips: np.ndarray
    captions: list[str]
    sigmas: np.ndarray
    frames: np.ndarray
    corners: np.ndarray | None = None
    anchored: tuple[int, np.ndarray] | None = None


def draw_batch(seed: int, step: int, steps: int, phases: tuple[Phase, ...] = PHASES) -> Batch:
    """The batch of a step, from the seed and the step alone."""
    rng = np.random.default_rng([seed, step])
    phase = phase_at(phases, step, steps)
    clips = rng.integers(phase.clips, size=phase.batch)
    captions = [world.caption(clip_scene(int(number)), int(rng.integers(2**31))) for number in clips]
    captions = ["" if rng.random() < _DROPPED else words for words in captions]
    # One noise level from each of `batch` equal parts: less chance in the loss than with independent ones.
    uniform = (rng.permutation(phase.batch) + rng.random(phase.batch)) / phase.batch
    shift = phase.shift or max(1.0, FLOW_SHIFT * (phase.size.tokens / FULL.tokens) ** 0.5)
    frames = np.arange(phase.size.latent_frames)
    if phase.kept is not None:
        frames = np.sort(rng.choice(frames, size=phase.kept, replace=False))
    corners = anchored = None
    if phase.cut is not None:
        corners = rng.integers(phase.size.side_tokens - phase.cut + 1, size=(phase.batch, 2))
    if phase.anchor is not None and rng.random() < phase.anchor.share:
        place = 0 if phase.anchor.first else int(rng.integers(len(frames)))
        anchored = place, rng.uniform(*phase.anchor.noise, size=phase.batch)
    return Batch(phase, clips, captions, shift * uniform / (1 + (shift - 1) * uniform), frames, corners, anchored)
