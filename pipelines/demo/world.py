"""The shapes world: one coloured shape that moves, or stands still, on a plain background.

A scene says what is seen (colour, shape, motion, background, size), a seed says where exactly, how fast and in
which words. Scenes are rendered by signed distances, so edges are anti-aliased, and every pixel follows from the
scene, the seed and the size of the picture. Sizes and speeds are in pixels, whatever the picture's size, so that
a small clip is a part of the same world.
"""

from __future__ import annotations

import functools
import itertools
import re
from dataclasses import dataclass

import numpy as np

# RGB. Far apart for a camera that has seen a video codec, grey backgrounds included.
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 35, 35),
    "orange": (250, 140, 20),
    "yellow": (245, 225, 45),
    "green": (30, 150, 60),
    "cyan": (70, 210, 225),
    "blue": (35, 70, 215),
    "purple": (150, 45, 150),
    "pink": (250, 140, 195),
}
SHAPES = ("circle", "square", "triangle", "star")
# Pixels a frame, in the picture's axes (y points down).
MOTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1), "still": (0, 0)}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (240, 240, 240),
    "grey": (128, 128, 128),
    "black": (16, 16, 16),
}
# The radius of the circle in pixels; the other shapes have about its area.
SIZES: dict[str, float] = {"small": 19.0, "large": 27.0}
SPEEDS = (1.2, 1.7)
FPS = 8

# What a prompt may say instead of this world's own words.
_OTHER_WORDS = {
    "motion": {"standing": "still", "does not move": "still"},
    "background": {"gray": "grey"},
    "size": {"little": "small", "big": "large"},
}

# Half the square's side, and the distance from centre to corner, in units of the size.
_SQUARE, _CORNER = 0.9, 1.3
# The star's inner corners, as a share of its outer radius.
_STAR_WAIST = 0.5
# Pixels between a shape and the picture's edge.
_MARGIN = 1.0


@dataclass(frozen=True, order=True)
class Scene:
    """What a video shows; each attribute is a word of COLOURS, SHAPES, MOTIONS, BACKGROUNDS or SIZES.

    Raises:
        ValueError: a word that this world does not know.
    """

    colour: str
    shape: str
    motion: str
    background: str
    size: str

    def __post_init__(self) -> None:
        for name, words in (
            ("colour", COLOURS),
            ("shape", SHAPES),
            ("motion", MOTIONS),
            ("background", BACKGROUNDS),
            ("size", SIZES),
        ):
            if getattr(self, name) not in words:
                raise ValueError(f"{name} must be one of {', '.join(words)}, got {getattr(self, name)!r}")


def all_scenes() -> list[Scene]:
    """All 960 scenes, in a fixed order."""
    return [Scene(*words) for words in itertools.product(COLOURS, SHAPES, MOTIONS, BACKGROUNDS, SIZES)]


def is_held_out(scene: Scene) -> bool:
    """Whether a scene is kept out of training: a fifth of all, and of each colour, shape and background.

    The rule ignores the size: a caption need not name it, so both sizes of a combination are held out or none.
    """
    position = (
        list(COLOURS).index(scene.colour)
        + 2 * SHAPES.index(scene.shape)
        + list(MOTIONS).index(scene.motion)
        + 3 * list(BACKGROUNDS).index(scene.background)
    )
    return position % 5 == 0


@functools.cache
def training_scenes() -> tuple[Scene, ...]:
    """The 768 scenes that training may see, in a fixed order."""
    return tuple(scene for scene in all_scenes() if not is_held_out(scene))


@functools.cache
def held_out_scenes() -> tuple[Scene, ...]:
    """The 192 scenes that training never sees, in a fixed order."""
    return tuple(scene for scene in all_scenes() if is_held_out(scene))


def caption(scene: Scene, seed: int) -> str:
    """One of several wordings for `scene`, chosen by `seed`; about a third of them leave the size out."""
    rng = np.random.default_rng([seed, 1])
    size = {"small": ("small ", "little "), "large": ("large ", "big ")}[scene.size]
    adjective = ("", *size)[rng.integers(3)]
    thing = f"a {adjective}{scene.colour} {scene.shape}"
    ground = f"a {scene.background} background"
    if scene.motion == "still":
        verb = ("standing still", "that stands still", "that does not move")[rng.integers(3)]
    else:
        verb = (f"moving {scene.motion}", f"that moves {scene.motion}", f"going {scene.motion}")[rng.integers(3)]
    return (f"{thing} {verb} on {ground}", f"{thing} {verb}, {ground}", f"on {ground}, {thing} {verb}")[rng.integers(3)]


def asked(prompt: str) -> dict[str, str]:
    """What a prompt asks of a video of this world: for each attribute that it names, the word of the scene.

    Whole words count, in any case. An attribute is left out if the prompt has no word for it, or two that differ
    ("a red and a blue circle").
    """
    text = " ".join(re.findall(r"[^\W_]+", prompt.lower()))
    wanted = {}
    for name, words in _words().items():
        meant = {meaning for word, meaning in words.items() if f" {word} " in f" {text} "}
        if len(meant) == 1:
            wanted[name] = meant.pop()
    return wanted


@functools.cache
def _words() -> dict[str, dict[str, str]]:
    """For each attribute, what a prompt may say, and the word of a scene that it means."""
    own = {"colour": COLOURS, "shape": SHAPES, "motion": MOTIONS, "background": BACKGROUNDS, "size": SIZES}
    return {name: {**{word: word for word in words}, **_OTHER_WORDS.get(name, {})} for name, words in own.items()}


def render(
    scene: Scene, seed: int, *, frames: int = 33, height: int = 128, width: int = 128, taken: slice = slice(None)
) -> np.ndarray:
    """The video of `scene`: uint8 RGB `[frames, height, width, 3]`, the same for the same arguments.

    Of its frames only those that `taken` takes. The place and the speed (pixels a frame, within SPEEDS) come from
    `seed`; the whole shape stays in the picture.

    Raises:
        ValueError: no frames, or a picture too small for the way that the shape goes.
    """
    if frames < 1:
        raise ValueError(f"frames must be at least 1, got {frames}")
    x, y = (values[taken] for values in _path(scene, seed, frames, height, width))
    rows = np.arange(height, dtype=np.float32)[None, :, None] + 0.5
    columns = np.arange(width, dtype=np.float32)[None, None, :] + 0.5
    distance = signed_distance(scene.shape, columns - x[:, None, None], rows - y[:, None, None], SIZES[scene.size])
    # One pixel of ramp across the edge: the share of the pixel that the shape covers.
    cover = np.clip(0.5 - distance, 0.0, 1.0)[..., None]
    ground = np.array(BACKGROUNDS[scene.background], np.float32)
    colour = np.array(COLOURS[scene.colour], np.float32)
    return np.rint(ground + (colour - ground) * cover).astype(np.uint8)


def signed_distance(shape: str, x: np.ndarray, y: np.ndarray, size: float) -> np.ndarray:
    """Distance in pixels to the shape's edge, negative inside; `x` and `y` (down) are relative to its centre.

    Exact along the sides, a little too small beyond the corners of polygons.
    """
    corner = np.float32(_CORNER * size)
    distance: np.ndarray
    if shape == "circle":
        distance = np.hypot(x, y) - np.float32(size)
    elif shape == "square":
        distance = np.maximum(np.abs(x), np.abs(y)) - np.float32(_SQUARE * size)
    elif shape == "triangle":
        # Three sides at half the corner's distance: one below, two leaning.
        leaning = np.float32(np.sqrt(0.75)) * np.abs(x) - np.float32(0.5) * y
        distance = np.maximum(y, leaning) - np.float32(0.5) * corner
    else:
        distance = _star_distance(x, y, corner)
    return distance


def _star_distance(x: np.ndarray, y: np.ndarray, corner: np.float32) -> np.ndarray:
    # The star has ten equal half-sides: fold the plane into one, between a tip (angle 0) and a waist (pi / 5).
    sector = 2 * np.pi / 5
    angle = np.arctan2(x, -y)
    angle = np.abs(angle - sector * np.rint(angle / sector))
    radius = np.hypot(x, y)
    waist_x, waist_y = _STAR_WAIST * np.cos(np.pi / 5), _STAR_WAIST * np.sin(np.pi / 5)
    normal = np.array([waist_y, 1.0 - waist_x]) / np.hypot(waist_y, 1.0 - waist_x)
    along, across = radius * np.cos(angle), radius * np.sin(angle)
    distance: np.ndarray = (along - corner) * np.float32(normal[0]) + across * np.float32(normal[1])
    return distance.astype(np.float32)


def _path(scene: Scene, seed: int, frames: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """The centre's x and y in pixels, a value a frame."""
    rng = np.random.default_rng([seed, 0])
    # Drawn in this order for every scene, so that a seed means the same speed and place for all of them.
    speed = rng.uniform(*SPEEDS)
    place = rng.uniform(size=2)
    reach = _CORNER * SIZES[scene.size] + _MARGIN
    centres = []
    for share, length, direction in zip(place, (width, height), MOTIONS[scene.motion], strict=True):
        way = direction * speed * (frames - 1)
        low, high = reach + max(0.0, -way), length - reach - max(0.0, way)
        if high < low:
            raise ValueError(
                f"a picture of {width} x {height} is too small for {frames} frames of a {scene.size} shape: "
                f"it needs {np.ceil(2 * reach + abs(way)):.0f} pixels"
            )
        start = low + share * (high - low)
        centres.append((start + direction * speed * np.arange(frames)).astype(np.float32))
    return centres[0], centres[1]
