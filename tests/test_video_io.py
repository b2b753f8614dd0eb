"""Video files: what is written is what is read, nothing half-written stays, and errors say what is wrong."""

from __future__ import annotations

import gc
import os
import subprocess
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import psutil
import pytest
import torch

from xattn_video_pipelines.common.errors import UserError
from xattn_video_pipelines.video.io import (
    VideoError,
    VideoInfo,
    frame_times,
    iter_frames,
    lossless_path,
    read_video,
    video_info,
    write_video,
)


def noise(frames: int = 5, height: int = 144, width: int = 200, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def gradient(frames: int = 6, height: int = 64, width: int = 96) -> np.ndarray:
    """Smooth colours that move: what H.264 is good at."""
    t, y, x = np.meshgrid(np.arange(frames), np.arange(height), np.arange(width), indexing="ij")
    return np.stack([40 + 2 * x, 30 + 2 * y + t, 120 + 5 * t + 0 * x], axis=-1).astype(np.uint8)


@pytest.fixture
def lossless(tmp_path: Path) -> Path:
    path = tmp_path / "clip.mkv"
    write_video(path, noise(), 16, lossless=True)
    return path


def children() -> set[int]:
    """Ids of this process's children that run ffmpeg or ended and were not reaped.

    Another test of this process may have left a helper of Python's multiprocessing.
    """
    return {child.pid for child in psutil.Process().children() if "multiprocessing" not in " ".join(words_of(child))}


def words_of(process: psutil.Process) -> list[str]:
    """The words that a process was started with; none for one that ended."""
    try:
        return process.cmdline()
    except psutil.ZombieProcess:
        return []


@pytest.mark.parametrize(("height", "width"), [(144, 200), (33, 47), (1, 1)])
def test_lossless_copy_equals_the_frames_written(tmp_path: Path, height: int, width: int) -> None:
    frames = noise(5, height, width)
    assert write_video(tmp_path / "a.mkv", frames, 16, lossless=True) == VideoInfo(5, height, width)
    decoded = read_video(tmp_path / "a.mkv")
    assert decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded, frames)


def test_lossless_copy_covers_every_colour_channel_value(tmp_path: Path) -> None:
    ramp = np.arange(256, dtype=np.uint8)
    frame = np.stack([ramp[:, None] + 0 * ramp, ramp + 0 * ramp[:, None], np.roll(ramp, 7)[:, None] ^ ramp], -1)
    write_video(tmp_path / "a.mkv", frame[None], 24, lossless=True)
    np.testing.assert_array_equal(read_video(tmp_path / "a.mkv"), frame[None])


def test_mp4_keeps_size_count_rate_and_colours(tmp_path: Path) -> None:
    frames = gradient()
    path = tmp_path / "a.mp4"
    assert write_video(path, frames, 16) == VideoInfo(6, 64, 96)
    decoded = read_video(path)
    assert decoded.shape == frames.shape
    error = np.abs(decoded.astype(int) - frames)
    assert error.mean() < 2
    # A wrong YUV matrix on either side shifts whole channels.
    assert np.abs((decoded.astype(int) - frames).mean(axis=(0, 1, 2))).max() < 1
    metadata = next(imageio_ffmpeg.read_frames(path))
    assert metadata["fps"] == 16
    assert metadata["codec"] == "h264"
    assert metadata["pix_fmt"].startswith("yuv420p")
    assert "bt709" in metadata["pix_fmt"]


def test_sizes_that_are_no_multiple_of_16_are_not_resized(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", noise(2, 50, 38), 8)
    assert video_info(tmp_path / "a.mp4") == VideoInfo(frames=2, height=50, width=38)


def test_fractional_frame_rate_is_kept(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", gradient(30), 24000 / 1001)
    assert next(imageio_ffmpeg.read_frames(tmp_path / "a.mp4"))["fps"] == pytest.approx(23.98)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_floats_round_to_the_nearest_level(tmp_path: Path, dtype: torch.dtype) -> None:
    frames = (torch.from_numpy(noise(2, 16, 16)).double() / 255).to(dtype)
    write_video(tmp_path / "a.mkv", frames, 8, lossless=True)
    expected = np.rint(frames.float().numpy() * 255.0)
    np.testing.assert_array_equal(read_video(tmp_path / "a.mkv"), expected)


def test_accepts_torch_uint8_and_non_contiguous_frames(tmp_path: Path) -> None:
    frames = torch.from_numpy(noise(3, 20, 30)).permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert not frames.is_contiguous()
    write_video(tmp_path / "a.mkv", frames, 8, lossless=True)
    np.testing.assert_array_equal(read_video(tmp_path / "a.mkv"), frames.numpy())
    flipped = frames.numpy()[::-1, :, ::-1]
    write_video(tmp_path / "b.mkv", flipped, 8, lossless=True)
    np.testing.assert_array_equal(read_video(tmp_path / "b.mkv"), flipped)


@pytest.mark.parametrize("name", ["a b.mkv", "c:lon.mkv", "100%d.mkv", "-dash.mkv", "ünï 🐈.mkv", "it's.mkv"])
def test_awkward_names(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_video(name, noise(2, 8, 8), 8, lossless=True)
    assert os.listdir(tmp_path) == [name]
    np.testing.assert_array_equal(read_video(name), noise(2, 8, 8))


def test_lossless_path_is_beside_the_video() -> None:
    assert lossless_path("out/cat.v2-s1.mp4") == Path("out/cat.v2-s1.mkv")


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (noise(0, 16, 16), "no frames"),
        (noise(2, 16, 17), "even widths and heights, got 17 x 16"),
        (noise(2, 17, 16), "even widths and heights, got 16 x 17"),
        (noise(2, 16, 16)[..., :2], r"\[T, H, W, 3\], got \[2, 16, 16, 2\]"),
        (noise(2, 16, 16)[0], r"\[T, H, W, 3\]"),
        (noise(2, 0, 16), "16 x 0"),
        (noise(2, 16, 16).astype(np.int32), "int32"),
        (noise(2, 16, 16).astype(np.float32), r"must lie in \[0, 1\], frame 0 has"),
        (np.stack([np.zeros((16, 16, 3)), np.full((16, 16, 3), np.nan)]), "frame 1 has nan"),
        (np.full((1, 16, 16, 3), -0.01), r"frame 0 has -0.01"),
    ],
)
def test_frames_that_cannot_be_written(tmp_path: Path, frames: np.ndarray, message: str) -> None:
    with pytest.raises(VideoError, match=message) as caught:
        write_video(tmp_path / "a.mp4", frames, 16)
    assert isinstance(caught.value, UserError)
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("fps", [0, -1, float("inf"), float("nan")])
def test_bad_frame_rates(tmp_path: Path, fps: float) -> None:
    with pytest.raises(VideoError, match="fps must be a positive number"):
        write_video(tmp_path / "a.mp4", noise(1, 16, 16), fps)


def test_suffix_says_the_kind(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match=r"must end in \.mp4"):
        write_video(tmp_path / "a.mkv", noise(1, 16, 16), 16)
    with pytest.raises(VideoError, match=r"must end in \.mkv"):
        write_video(tmp_path / "a.mp4", noise(1, 16, 16), 16, lossless=True)


def test_failed_write_keeps_the_old_file_and_says_why(tmp_path: Path) -> None:
    path = tmp_path / "a.mkv"
    write_video(path, noise(2, 16, 16), 16, lossless=True)
    before = path.read_bytes()
    # Enough frames that ffmpeg has begun its file when the bad one comes.
    bad = np.zeros((60, 144, 200, 3), np.float16)
    bad[-1] = 2.0
    with pytest.raises(VideoError, match="frame 59 has"):
        write_video(path, bad, 16, lossless=True)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.mkv"]
    with pytest.raises(VideoError, match=r"gone/a\.mp4: cannot write the video: .*No such file or directory"):
        write_video(tmp_path / "gone" / "a.mp4", noise(1, 16, 16), 16)
    assert not children()


def test_write_replaces_a_partial_file_left_by_a_kill(tmp_path: Path) -> None:
    (tmp_path / ".a.partial.mkv").write_bytes(b"cut off")
    write_video(tmp_path / "a.mkv", noise(2, 16, 16), 16, lossless=True)
    assert os.listdir(tmp_path) == ["a.mkv"]


def test_missing_empty_and_foreign_files(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match=r"nope\.mp4: no such video file"):
        read_video(tmp_path / "nope.mp4")
    (tmp_path / "empty.mp4").touch()
    with pytest.raises(VideoError, match=r"empty\.mp4: the video file is empty"):
        read_video(tmp_path / "empty.mp4")
    (tmp_path / "text.mp4").write_text("not a video\n" * 50)
    with pytest.raises(VideoError, match=r"text\.mp4: damaged or not a video") as caught:
        read_video(tmp_path / "text.mp4")
    assert "\n" not in str(caught.value)


def test_truncated_mp4(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    write_video(path, gradient(), 16)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(VideoError, match=r"a\.mp4: damaged or not a video: moov atom not found"):
        video_info(path)


@pytest.mark.parametrize("share", [0.25, 0.5, 0.99])
def test_truncated_lossless_copy_is_noticed_although_frames_decode(lossless: Path, share: float) -> None:
    data = lossless.read_bytes()
    lossless.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(VideoError, match=r"clip\.mkv: damaged or not a video"):
        video_info(lossless)


def test_flipped_bits_in_a_lossless_copy_are_noticed(lossless: Path) -> None:
    data = bytearray(lossless.read_bytes())
    data[len(data) // 2] ^= 0xFF
    lossless.write_bytes(data)
    with pytest.raises(VideoError, match="damaged or not a video"):
        read_video(lossless)


def test_a_file_with_sound_only_has_no_video(tmp_path: Path) -> None:
    path = tmp_path / "tone.wav"
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-f", "lavfi", "-i", "sine=d=0.1", str(path)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    with pytest.raises(VideoError, match=r"tone\.wav: damaged or not a video"):
        read_video(path)


def test_a_video_without_frames(tmp_path: Path) -> None:
    path = tmp_path / "none.mkv"
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "quiet", "-f", "lavfi", "-i", "testsrc=s=16x16:d=1"]
    command += ["-frames:v", "0", "-c:v", "ffv1", str(path)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    with pytest.raises(VideoError, match=r"none\.mkv: "):
        video_info(path)


@pytest.mark.parametrize(
    ("first", "marks"),
    [
        # a cover picture, a smaller stream before the default one, and a smaller one where none is the default
        (16, ("-disposition:v:0", "attached_pic")),
        (16, ("-disposition:v:0", "0", "-disposition:v:1", "default")),
        (16, ("-disposition:v:0", "0", "-disposition:v:1", "0")),
        # a larger stream that is not the default
        (64, ("-disposition:v:0", "0", "-disposition:v:1", "default")),
    ],
)
def test_of_several_streams_the_default_is_read_then_the_largest(tmp_path: Path, first: int, marks: tuple) -> None:
    write_video(tmp_path / "other.mkv", noise(1, first, first), 16, lossless=True)
    write_video(tmp_path / "real.mkv", noise(7, 32, 32), 16, lossless=True)
    command = [
        imageio_ffmpeg.get_ffmpeg_exe(),
        "-v",
        "error",
        "-i",
        tmp_path / "other.mkv",
        "-i",
        tmp_path / "real.mkv",
    ]
    command += ["-map", "0:v", "-map", "1:v", "-c", "copy", *marks, tmp_path / "both.mkv"]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    np.testing.assert_array_equal(read_video(tmp_path / "both.mkv"), noise(7, 32, 32))
    times = frame_times(tmp_path / "both.mkv")
    assert (len(times.starts), times.seconds) == (7, pytest.approx(7 / 16, abs=1e-3))
    assert times.complaint is None


def test_frames_stream_and_leaving_early_ends_ffmpeg(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mkv", noise(40), 16, lossless=True)
    frames = iter_frames(tmp_path / "a.mkv")
    first, second = next(frames), next(frames)
    assert len(children()) == 1
    np.testing.assert_array_equal(first, noise(40)[0])
    np.testing.assert_array_equal(second, noise(40)[1])
    # The caller owns each frame.
    first[:] = 0
    frames.close()
    assert not children()
    unfinished = iter_frames(tmp_path / "a.mkv")
    next(unfinished)
    del unfinished
    gc.collect()
    assert not children()


def test_ffmpeg_prints_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_video(tmp_path / "a.mp4", gradient(2), 16)
    read_video(tmp_path / "a.mp4")
    with pytest.raises(VideoError):
        write_video(tmp_path / "gone" / "a.mp4", gradient(2), 16)
    assert capfd.readouterr() == ("", "")
