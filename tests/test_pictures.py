"""Pictures for image-to-video, of every depth and mode that Pillow reads: shown right, or refused by name."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from xattn_video_pipelines.common.errors import UserError
from xattn_video_pipelines.video.pictures import load_picture

RED, BLUE = (255, 0, 0), (0, 0, 255)


def halves(mode: str = "RGB") -> Image.Image:
    """16 x 8 pixels, the left half red and the right one blue."""
    image = Image.new("RGB", (16, 8), RED)
    image.paste(BLUE, (8, 0, 16, 8))
    return image.convert(mode)


def shown(path: Path) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The colours of the left and of the right half."""
    picture = load_picture(path)
    assert picture.mode == "RGB"
    assert picture.size == (16, 8)
    left, right = picture.getpixel((3, 4)), picture.getpixel((12, 4))
    assert isinstance(left, tuple)
    assert isinstance(right, tuple)
    return left, right


def near(first: tuple[int, ...], second: tuple[int, ...], most: int = 3) -> bool:
    return max(abs(one - other) for one, other in zip(first, second, strict=True)) <= most


@pytest.mark.parametrize(
    ("name", "mode", "most"),
    [
        ("a.png", "RGB", 0),
        ("a.png", "P", 0),
        ("a.gif", "P", 0),
        ("a.bmp", "RGB", 0),
        ("a.webp", "RGB", 8),
        ("a.jpg", "RGB", 8),
        ("a.jpg", "CMYK", 8),
        ("a.tif", "CMYK", 0),
        ("a.tif", "YCbCr", 3),
        ("a.png", "RGBA", 0),
        ("a.tif", "RGBA", 0),
    ],
)
def test_colours_are_those_of_the_picture(tmp_path: Path, name: str, mode: str, most: int) -> None:
    halves(mode).save(tmp_path / name, quality=95)
    left, right = shown(tmp_path / name)
    assert near(left, RED, most)
    assert near(right, BLUE, most)


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.pgm"])
def test_grey_of_16_bits_is_scaled(tmp_path: Path, name: str) -> None:
    grey = np.zeros((8, 16), dtype=np.uint16)
    grey[:, :8], grey[:, 8:] = 25700, 65535
    Image.fromarray(grey).save(tmp_path / name)
    assert shown(tmp_path / name) == ((100, 100, 100), (255, 255, 255))


def test_float_grey_is_scaled_or_refused_with_its_values(tmp_path: Path) -> None:
    grey = np.zeros((8, 16), dtype=np.float32)
    grey[:, 8:] = 0.4
    Image.fromarray(grey).save(tmp_path / "a.tif")
    assert shown(tmp_path / "a.tif") == ((0, 0, 0), (102, 102, 102))
    for value, said in ((200, "got 0 to 200"), (-1, "got -1 to 0.4"), (float("nan"), "got nan to nan")):
        grey[0, 0] = value
        Image.fromarray(grey).save(tmp_path / "b.tif")
        with pytest.raises(UserError, match=rf"b\.tif: a float picture \(mode F\) .*{re.escape(said)}"):
            load_picture(tmp_path / "b.tif")


def see_through(mode: str) -> Image.Image:
    """Left opaque and black; right transparent, and green beneath."""
    image = Image.new("RGBA", (16, 8), (0, 0, 0, 255))
    image.paste((0, 255, 0, 0), (8, 0, 16, 8))
    return image.convert(mode)


@pytest.mark.parametrize(("name", "mode"), [("a.png", "RGBA"), ("a.png", "LA"), ("a.tif", "RGBA"), ("a.webp", "RGBA")])
def test_what_is_transparent_is_white(tmp_path: Path, name: str, mode: str) -> None:
    see_through(mode).save(tmp_path / name)
    assert shown(tmp_path / name) == ((0, 0, 0), (255, 255, 255))


def test_half_transparent_is_half_white(tmp_path: Path) -> None:
    Image.new("RGBA", (16, 8), (255, 0, 0, 128)).save(tmp_path / "a.png")
    left, _ = shown(tmp_path / "a.png")
    assert near(left, (255, 127, 127), 1)


def test_one_colour_that_is_transparent_is_white(tmp_path: Path) -> None:
    halves().save(tmp_path / "a.png", transparency=BLUE)
    assert shown(tmp_path / "a.png") == (RED, (255, 255, 255))
    palette = halves("P")
    palette.save(tmp_path / "b.png", transparency=palette.getpixel((12, 4)))
    assert shown(tmp_path / "b.png") == (RED, (255, 255, 255))


@pytest.mark.parametrize("mode", ["LAB", "I"])
def test_a_mode_that_cannot_be_shown_is_named(tmp_path: Path, mode: str) -> None:
    image = Image.new(mode, (16, 8))
    image.save(tmp_path / "a.tif")
    with pytest.raises(UserError, match=rf"a\.tif: pictures of the mode {mode} cannot be shown as RGB"):
        load_picture(tmp_path / "a.tif")


def test_a_photograph_is_turned_as_it_says(tmp_path: Path) -> None:
    image = Image.new("RGB", (40, 20))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "phone.jpg", exif=exif)
    assert load_picture(tmp_path / "phone.jpg").size == (20, 40)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif", "a.webp", "a.gif", "a.bmp"])
def test_a_picture_that_is_cut_off_is_damaged(tmp_path: Path, name: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / name)
    data = (tmp_path / name).read_bytes()
    for share in (0.1, 0.5, 0.9):
        (tmp_path / name).write_bytes(data[: int(share * len(data))])
        with pytest.raises(UserError, match=rf"{re.escape(name)}: damaged image: "):
            load_picture(tmp_path / name)


def test_a_picture_that_would_fill_the_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    halves().save(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"a\.png: damaged image: .*exceeds limit"):
        load_picture(tmp_path / "a.png")
