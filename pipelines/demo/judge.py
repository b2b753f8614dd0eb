"""Reads a video of the shapes world back: colour, shape, motion, background, size.

Classical image processing on the pixels alone: the judge knows the world's words, never the prompt. The background
is the colour of the picture's border; what differs from it is the thing; its colour, outline and path are compared
with what the world can draw. Where nothing fits, the answer is None, so that a smear is no circle.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Protocol

import numpy as np
from skimage.color import rgb2lab
from skimage.measure import label, regionprops

from xattn_video_pipelines.demo.world import BACKGROUNDS, COLOURS, MOTIONS, SHAPES, SIZES, Scene, signed_distance

# A pixel belongs to the thing if it differs this much (CIE76) from the background.
_DIFFERENT = 18.0
# A colour further than this (CIE76) from every word is none of them.
_SAME_COLOUR = 25.0
# Smaller things are specks; two things are two unless one of them is a speck. As shares of the picture's height.
_SPECK_SIDE = 0.06
# The share of the frames that must show exactly one thing.
_ENOUGH_FRAMES = 0.75
# Overlap (intersection over union) with the ideal outline below which it is no shape of this world.
_SHAPE_OVERLAP = 0.75
# A thing moves if its centre goes this far in all, as a share of the picture's height.
_MOVES = 0.12
# The way across must be smaller than this share of the way along.
_STRAIGHT = 0.6
# Pixel grid of the outlines that are compared, and its half width in units of a shape's equal-area radius.
_GRID, _HALF_WIDTH = 64, 2.0


@dataclass(frozen=True)
class Verdict:
    """What the judge saw; None where it saw nothing that this world has a word for.

    `one_thing` is the share of frames that show exactly one thing; `overlap` is how well the outline fits the shape
    named (mean intersection over union, 0 to 1).
    """

    colour: str | None
    shape: str | None
    motion: str | None
    background: str | None
    size: str | None
    one_thing: float
    overlap: float

    def right(self, scene: Scene) -> dict[str, bool]:
        """For each of colour, shape, motion and background: whether it is the scene's; `all`: whether all four are.

        The size is not asked for here, because a caption need not name it.
        """
        checks = {
            name: getattr(self, name) == getattr(scene, name) for name in ("colour", "shape", "motion", "background")
        }
        return {**checks, "all": all(checks.values())}

    def to_dict(self) -> dict[str, str | float | None]:
        """The fields as a JSON-ready dictionary."""
        return asdict(self)


def judge(video: np.ndarray) -> Verdict:
    """Say what a video shows.

    Args:
        video: uint8 RGB `[frames, height, width, 3]`.

    Raises:
        ValueError: another shape or dtype, or a picture below 32 pixels.
    """
    if video.ndim != 4 or video.shape[3] != 3 or video.dtype != np.uint8:
        raise ValueError(f"video must be uint8 [frames, height, width, 3], got {video.dtype} {list(video.shape)}")
    frames, height, width, _ = video.shape
    if frames < 1 or min(height, width) < 32:
        raise ValueError(f"video must have frames of at least 32 x 32 pixels, got {frames} of {width} x {height}")
    lab = rgb2lab(video)
    border = np.concatenate([lab[:, :2].reshape(-1, 3), lab[:, -2:].reshape(-1, 3), lab[:, :, 0].reshape(-1, 3)])
    border = np.concatenate([border, lab[:, :, -1].reshape(-1, 3)])
    ground = np.median(border, axis=0)
    things = [_only_thing(np.linalg.norm(frame - ground, axis=-1) > _DIFFERENT) for frame in lab]
    found = [(time, thing) for time, thing in enumerate(things) if thing is not None]
    background = _nearest_colour(ground, BACKGROUNDS)
    if len(found) < max(1, _ENOUGH_FRAMES * frames):
        return Verdict(None, None, None, background, None, len(found) / frames, 0.0)

    inside = np.concatenate([lab[time][_core(thing)] for time, thing in found])
    shape, overlap = _shape(found)
    return Verdict(
        colour=_nearest_colour(np.median(inside, axis=0), COLOURS),
        shape=shape,
        motion=_motion(found, frames, height),
        background=background,
        size=_size(found, shape),
        one_thing=len(found) / frames,
        overlap=overlap,
    )


class _Thing(Protocol):
    """What is read of a region that scikit-image found in a frame; its own class has no types."""

    area: float
    bbox: tuple[int, int, int, int]
    centroid: tuple[float, float]
    coords: np.ndarray
    image: np.ndarray


def _only_thing(mask: np.ndarray) -> _Thing | None:
    """The region of the one thing in a frame, or None if there is none or more than one."""
    speck = (_SPECK_SIDE * mask.shape[0]) ** 2
    regions: list[_Thing] = [region for region in regionprops(label(mask)) if region.area >= speck]
    return regions[0] if len(regions) == 1 else None


def _core(thing: _Thing) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the thing's pixels near its centre, away from blended edges and codec ringing."""
    rows, columns = thing.coords.T
    away = np.hypot(rows - thing.centroid[0], columns - thing.centroid[1])
    near = away <= max(1.5, 0.5 * np.sqrt(thing.area / np.pi))
    # A ring has nothing near its centre: then all of it counts.
    near = near if near.any() else np.ones_like(near)
    return rows[near], columns[near]


def _nearest_colour(lab: np.ndarray, words: dict[str, tuple[int, int, int]]) -> str | None:
    palette = rgb2lab(np.array(list(words.values()), np.uint8)[None])[0]
    distances = np.linalg.norm(palette - lab, axis=-1)
    return list(words)[distances.argmin()] if distances.min() <= _SAME_COLOUR else None


def _outline(shape: str) -> np.ndarray:
    """The ideal shape, bool `[_GRID, _GRID]`, with its centre of mass in the middle and the area of a unit circle."""
    line = (np.arange(_GRID) + 0.5) / _GRID * 2 * _HALF_WIDTH - _HALF_WIDTH
    # Area and centre of mass on a wide canvas first, then the same shape moved and scaled.
    wide = np.linspace(-2.5, 2.5, 501)
    x, y = np.meshgrid(wide, wide)
    mask = signed_distance(shape, x, y, 1.0) < 0
    scale = np.sqrt(mask.sum() * (wide[1] - wide[0]) ** 2 / np.pi)
    x, y = np.meshgrid(line * scale + x[mask].mean(), line * scale + y[mask].mean())
    return signed_distance(shape, x, y, 1.0) < 0


_OUTLINES = {shape: _outline(shape) for shape in SHAPES}


def _shape(found: list[tuple[int, _Thing]]) -> tuple[str | None, float]:
    """The shape whose outline overlaps best, on average over the frames, and that overlap."""
    overlaps = np.mean([_overlaps(thing) for _, thing in found], axis=0)
    best = int(overlaps.argmax())
    return (SHAPES[best] if overlaps[best] >= _SHAPE_OVERLAP else None), float(overlaps[best])


def _overlaps(thing: _Thing) -> list[float]:
    """Intersection over union of a thing, moved and scaled to the outlines' grid, with each of them."""
    radius = np.sqrt(thing.area / np.pi)
    line = ((np.arange(_GRID) + 0.5) / _GRID * 2 * _HALF_WIDTH - _HALF_WIDTH) * radius
    top, left, bottom, right = thing.bbox
    rows = np.rint(line + thing.centroid[0]).astype(int) - top
    columns = np.rint(line + thing.centroid[1]).astype(int) - left
    seen = np.zeros((_GRID, _GRID), bool)
    valid_rows = (rows >= 0) & (rows < bottom - top)
    valid_columns = (columns >= 0) & (columns < right - left)
    seen[np.ix_(valid_rows, valid_columns)] = thing.image[np.ix_(rows[valid_rows], columns[valid_columns])]
    return [(seen & ideal).sum() / (seen | ideal).sum() for ideal in _OUTLINES.values()]


def _motion(found: list[tuple[int, _Thing]], frames: int, height: int) -> str | None:
    """The direction of the straight line that fits the centres best, or `still`."""
    if frames == 1:
        return None
    times = np.array([time for time, _ in found])
    centres = np.array([(thing.centroid[1], thing.centroid[0]) for _, thing in found])
    if len(found) < 2:
        return None
    way = np.polyfit(times, centres, 1)[0] * (frames - 1)
    if np.abs(way).max() < _MOVES * height:
        # Going and coming back is no standing still.
        wandering = np.ptp(centres, axis=0).max() > 2 * _MOVES * height
        return None if wandering else "still"
    along = int(np.abs(way).argmax())
    if abs(way[1 - along]) > _STRAIGHT * abs(way[along]):
        return None
    direction = [0, 0]
    direction[along] = int(np.sign(way[along]))
    return next(word for word, step in MOTIONS.items() if step == tuple(direction))


def _size(found: list[tuple[int, _Thing]], shape: str | None) -> str | None:
    """The word whose area, in pixels of this world, is nearest in ratio; the median over the frames."""
    if shape is None:
        return None
    line = np.linspace(-2.5, 2.5, 501)
    unit_area = (signed_distance(shape, *np.meshgrid(line, line), 1.0) < 0).sum() * (line[1] - line[0]) ** 2
    radius = np.sqrt(np.median([thing.area for _, thing in found]) / unit_area)
    votes = Counter({word: -abs(np.log(radius / size)) for word, size in SIZES.items()})
    return votes.most_common(1)[0][0]
