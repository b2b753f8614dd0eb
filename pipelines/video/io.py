"""Write and read video files: H.264 mp4 for watching, FFV1 mkv in RGB for measuring.

Both directions run the ffmpeg binary that imageio-ffmpeg ships, one process a file, over pipes. imageio's own
writer is not used: it neither reports ffmpeg's exit code nor keeps its message, so a full disk or a bad size
would pass for success.

A frame is a uint8 array `[height, width, 3]` in RGB, a video `[frames, height, width, 3]`.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import tempfile
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from xattn_video_pipelines.common.errors import UserError, one_line
from xattn_video_pipelines.common.files import whole_files

if TYPE_CHECKING:
    import torch

    Frames = np.ndarray | torch.Tensor

# Near-transparent quality: the mp4 is for eyes, but it is also what compare falls back to.
_H264 = ["-c:v", "libx264", "-preset", "medium", "-crf", "16", "-pix_fmt", "yuv420p"]
# Say which matrix made the YUV: untagged files are read as BT.601 by ffmpeg and as BT.709 by most players.
_BT709 = ["-vf", "scale=out_color_matrix=bt709:out_range=tv:flags=accurate_rnd+full_chroma_int+bicubic"]
_BT709 += ["-colorspace", "bt709", "-color_primaries", "bt709", "-color_trc", "bt709", "-color_range", "tv"]
# bgr0 is FFV1's 8-bit RGB: no colour conversion, so no rounding. Every frame stands alone and has a checksum.
_FFV1 = ["-c:v", "ffv1", "-level", "3", "-g", "1", "-slicecrc", "1", "-pix_fmt", "bgr0"]
# What is transparent is white, as most viewers show it. Without this, the colours that lie beneath would show.
_OVER_WHITE = (
    "split[seen][under];[under]lutrgb=r=maxval:g=maxval:b=maxval:a=maxval[white];[white][seen]overlay=format=auto"
)
# Where damage is let pass, ffmpeg fails if more than this share of the packets cannot be decoded.
_MOST_DECODE_ERRORS = 0.25
# What a frame lasts where the file does not say it and there is no other frame to judge by.
_UNKNOWN_SECONDS = 0.04

_STREAM = re.compile(r"\s*Stream #0:(\d+)(?:\[[^]]*\])?(?:\([^)]*\))?: (\w+): (.*)")
_PIXELS = re.compile(r"(?<!\w)([1-9]\d*)x([1-9]\d*)")
_CLOCK = r"(\d+):(\d\d):(\d\d(?:\.\d+)?)"
# Pixel formats with an alpha plane or channel, and palettes, whose entries may be transparent.
_ALPHA = re.compile(r"(?<!\w)(?:rgba|bgra|argb|abgr|yuva|gbrap|ya8|ya16|pal8|ayuv|vuya)\w*")

_MAX_MESSAGE = 300


class VideoError(UserError):
    """A video file or its frames cannot be used; the message is one line and names the file."""


@dataclass(frozen=True)
class FrameTimes:
    """When the frames of a video are shown.

    `starts` are in seconds from the first frame and rise; `seconds` is where the last frame ends. `complaint` is what
    ffmpeg said of damage, on one line, or None.
    """

    starts: tuple[float, ...]
    seconds: float
    complaint: str | None

    @property
    def rate(self) -> float:
        """Frames a second; where they follow each other unevenly, those of the parts where they are closest."""
        mean = len(self.starts) / self.seconds
        if len(self.starts) < 2:
            return mean
        # A tenth of the gaps may be shorter: time stamps are rounded, and recorders stumble.
        closest = 1 / float(np.quantile(np.diff(self.starts), 0.1))
        return closest if closest > 1.5 * mean else mean


@dataclass(frozen=True)
class _Stream:
    """A video stream as ffmpeg lists it.

    `seconds` is when the file says that it ends, None where it does not; with `shared`, that is said of all streams.
    """

    index: int
    picture: bool
    default: bool
    pixels: int
    alpha: bool
    seconds: float | None
    shared: bool


@dataclass(frozen=True)
class VideoInfo:
    """What decoding a whole file gave: `frames` (a count), `height` and `width` in pixels."""

    frames: int
    height: int
    width: int


def lossless_path(mp4_path: str | os.PathLike[str]) -> Path:
    """The path of the lossless copy beside a video: the same name with the suffix `.mkv`."""
    return Path(mp4_path).with_suffix(".mkv")


def write_video(path: str | os.PathLike[str], frames: Frames, fps: float, *, lossless: bool = False) -> VideoInfo:
    """Write `frames` to `path`, whole or not at all.

    The file is written under the temporary name of `files.whole_files` and renamed at the end, so a file under
    `path` is always a finished one. After a kill the partial file stays until the next run that writes there.

    Args:
        path: ends in `.mp4`, or in `.mkv` with `lossless`. The folder must exist.
        frames: `[T, H, W, 3]` RGB, numpy or torch on any device: uint8, or floats in [0, 1], which are
            rounded to the nearest of 256 levels.
        fps: frames a second, above 0.
        lossless: write FFV1 in RGB, whose decoded frames equal the written ones exactly, instead of H.264.
            H.264 halves the colour resolution, so it takes even heights and widths only; nothing is ever
            padded or resized.

    Returns:
        The frame count and size written.

    Raises:
        VideoError: wrong suffix, shape, dtype, range or fps, no frames, odd sizes for H.264, ffmpeg failed.
        UserError: the finished file cannot be renamed.
    """
    path = Path(path)
    suffix = ".mkv" if lossless else ".mp4"
    if path.suffix != suffix:
        kind = "a lossless copy" if lossless else "an H.264 video"
        raise VideoError(f"{path}: the name of {kind} must end in {suffix}")
    info = _check_frames(path, frames, lossless=lossless)
    if not 0 < fps < float("inf"):
        raise VideoError(f"{path}: fps must be a positive number, got {fps}")
    if not path.parent.is_dir():
        raise VideoError(f"{path}: cannot write the video: No such file or directory")

    rate = str(Fraction(fps).limit_denominator(100_000))
    command = [_ffmpeg(), "-hide_banner", "-nostdin", "-v", "error", "-y"]
    command += ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{info.width}x{info.height}", "-r", rate]
    command += ["-i", "pipe:0", "-an", *(_FFV1 if lossless else _H264 + _BT709)]
    with whole_files(path) as (partial,), tempfile.TemporaryFile() as log:
        # "file:" keeps ffmpeg from reading a colon in a name as a protocol.
        output = f"file:{partial}"
        process = subprocess.Popen([*command, output], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=log)
        with _ended(process):
            assert process.stdin is not None
            # ffmpeg stopping early shows as a broken pipe; its own message says why.
            with contextlib.suppress(BrokenPipeError):
                for index in range(info.frames):
                    process.stdin.write(_to_uint8(path, frames[index], index).tobytes())
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            code = process.wait()
        if code != 0:
            reason = _first_message(log, path, partial) or f"ffmpeg exit code {code}"
            raise VideoError(f"{path}: cannot write the video: {reason}")
    return info


def iter_frames(
    path: str | os.PathLike[str], *, filters: str | None = None, strict: bool = True
) -> Generator[np.ndarray, None, None]:
    """Decode `path` frame by frame: uint8 RGB arrays `[H, W, 3]`, each its own memory.

    Any format that ffmpeg reads will do. Frames are upright, and what is transparent in them is white. Of several video
    streams, cover pictures and streams of one frame come last; of the others the default one is read, else the largest.
    Where frames change their size, they are scaled to that of the first. Leaving the iteration early stops ffmpeg.

    Args:
        path: of the file.
        filters: an ffmpeg filter chain that the frames go through, such as `fps=1`.
        strict: any error that ffmpeg logs is damage, so the end of the iteration means that the whole file decoded
            without one. Otherwise, an error is let pass if ffmpeg itself goes on; `frame_times` tells of it.

    Raises:
        VideoError: the file is missing or empty, cannot be decoded, is damaged or cut off (raised where the
            damage is met, after the frames before it), or holds no frame.
    """
    path = _existing(path)
    stream = _video_stream(path)
    chain = ",".join(part for part in (_OVER_WHITE if stream.alpha else "", filters or "") if part)
    command = [_ffmpeg(), "-hide_banner", "-nostdin", "-v", "error"]
    # Filters that start again at a change of size would forget which time it is.
    command += ["-xerror"] if strict else ["-max_error_rate", str(_MOST_DECODE_ERRORS), "-reinit_filter", "0"]
    # PPM frames carry their own size; passthrough keeps ffmpeg from repeating or dropping any.
    command += ["-i", f"file:{path}", "-map", f"0:{stream.index}", "-fps_mode", "passthrough"]
    command += [*(["-vf", chain] if chain else []), "-sws_flags", "accurate_rnd+full_chroma_int+bicubic"]
    # More than 8 bits a channel would become PPM of 16.
    command += ["-pix_fmt", "rgb24", "-f", "image2pipe", "-c:v", "ppm", "pipe:1"]
    count = 0
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log)
        with _ended(process):
            assert process.stdout is not None
            while (frame := _read_ppm(path, process.stdout)) is not None:
                count += 1
                yield frame
            code = process.wait()
        message = _first_message(log, path)
    # Some damage (a cut-off mkv) is only logged: at log level "error" any line may mean lost picture data.
    if code != 0 or (message and strict):
        after = f" after {count} frames" if count else ""
        raise VideoError(f"{path}: damaged or not a video{after}: {message or f'ffmpeg exit code {code}'}")
    if count == 0:
        raise VideoError(f"{path}: the video has no frames")


def read_video(path: str | os.PathLike[str]) -> np.ndarray:
    """Decode the whole of `path`: uint8 RGB `[T, H, W, 3]`. Raises VideoError as `iter_frames` does."""
    return np.stack(list(iter_frames(path)))


def video_info(path: str | os.PathLike[str]) -> VideoInfo:
    """Frame count and size of `path`, by decoding it all (metadata can be wrong, or a file be cut off).

    Raises VideoError as `iter_frames` does.
    """
    count, shape = 0, (0, 0, 3)
    for frame in iter_frames(path):
        count, shape = count + 1, frame.shape
    return VideoInfo(frames=count, height=shape[0], width=shape[1])


def frame_times(path: str | os.PathLike[str]) -> FrameTimes:
    """When each frame is shown that `iter_frames` gives with `strict=False`, by decoding the whole file.

    Errors that ffmpeg logs are told in `complaint`, as long as ffmpeg goes on and the frames are enough.

    Raises:
        VideoError: the file is missing, empty or no video, holds no frame, more than a quarter of it cannot be
            decoded, or it ends before the time that it promises.
    """
    path = _existing(path)
    stream = _video_stream(path)
    with tempfile.TemporaryFile() as log, tempfile.TemporaryDirectory() as folder:
        progress = Path(folder) / "progress"
        command = [_ffmpeg(), "-hide_banner", "-nostdin", "-v", "error"]
        command += ["-max_error_rate", str(_MOST_DECODE_ERRORS), "-reinit_filter", "0", "-i", f"file:{path}"]
        command += [
            "-map",
            f"0:{stream.index}",
            "-fps_mode",
            "passthrough",
            "-nostats",
            "-progress",
            f"file:{progress}",
        ]
        command += ["-stats_enc_pre", "pipe:1", "-stats_enc_pre_fmt", "{t}", "-f", "null", "-"]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log)
        message = _first_message(log, path)
        if done.returncode != 0:
            raise VideoError(f"{path}: damaged or not a video: {message or f'ffmpeg exit code {done.returncode}'}")
        # Blocks of "name=value" lines; the last block tells the whole.
        told = dict(line.split("=", 1) for line in progress.read_text().splitlines() if "=" in line)
    times = np.array(done.stdout.split(), dtype=np.float64)
    if times.size == 0:
        raise VideoError(f"{path}: the video has no frames")
    end = int(told["out_time_us"]) / 1e6 if told.get("out_time_us", "N/A") != "N/A" else 0.0
    # Some files give two frames one time, or a time before the last one's: such a frame is never shown.
    starts = np.unique(times[np.isfinite(times)]) if np.isfinite(times).any() else np.zeros(1)
    usual = float(np.median(np.diff(starts))) if starts.size > 1 else _UNKNOWN_SECONDS
    end = end if end > starts[-1] else float(starts[-1]) + usual
    if message and stream.seconds is not None:
        # Times in lists of streams are rounded. Sound may go on when the pictures have ended.
        early = usual / 2 + 0.02 + (0.1 * stream.seconds if stream.shared else 0)
        if end < stream.seconds - early:
            raise VideoError(
                f"{path}: damaged or not a video: ends after {end:.2f} of {stream.seconds:.2f} seconds: {message}"
            )
    return FrameTimes(tuple((starts - starts[0]).tolist()), end - float(starts[0]), message or None)


def _video_stream(path: Path) -> _Stream:
    """The stream of a file that is its video, as `iter_frames` says.

    Raises:
        VideoError: ffmpeg cannot open the file, or it has no video stream.
    """
    done = subprocess.run(
        [_ffmpeg(), "-hide_banner", "-nostdin", "-i", f"file:{path}"], stdin=subprocess.DEVNULL, capture_output=True
    )
    streams = _listed(done.stderr.decode(errors="replace"))
    if not streams:
        raise VideoError(f"{path}: damaged or not a video: {_why_not_opened(path)}")
    moving = [stream for stream in streams if not stream.picture] or streams
    if len(moving) > 1:
        # A picture that is not marked as one: a stream of one frame.
        moving = [stream for stream in moving if _has_frames(path, stream)] or moving
    return max(moving, key=lambda stream: (stream.default, stream.pixels, -stream.index))


def _listed(text: str) -> list[_Stream]:
    """The video streams that ffmpeg lists for a file, in order."""
    found: dict[int, _Stream] = {}
    whole: float | None = None
    kinds = 0
    for line in text.splitlines():
        if match := re.match(rf"  Duration: {_CLOCK}", line):
            whole = _in_seconds(*match.groups())
        elif match := _STREAM.match(line):
            kinds += 1
            last = None
            if match[2] == "Video":
                last, told = int(match[1]), match[3]
                size = _PIXELS.search(told)
                picture = "(attached pic)" in told or "(timed thumbnails)" in told
                found[last] = _Stream(
                    last, picture, "(default)" in told, int(size[1]) * int(size[2]) if size else 0,
                    _ALPHA.search(told) is not None, whole, True,
                )  # fmt: skip
        elif kinds and last is not None and (match := re.match(rf"\s+DURATION\s*: {_CLOCK}", line)):
            found[last] = replace(found[last], seconds=_in_seconds(*match.groups()), shared=False)
    if kinds == 1:
        return [replace(stream, shared=False) for stream in found.values()]
    return list(found.values())


def _in_seconds(hours: str, minutes: str, seconds: str) -> float:
    return 3600 * int(hours) + 60 * int(minutes) + float(seconds)


def _has_frames(path: Path, stream: _Stream) -> bool:
    """Whether a stream has more than one packet, of which each is a frame."""
    command = [_ffmpeg(), "-hide_banner", "-nostdin", "-v", "quiet", "-i", f"file:{path}", "-map", f"0:{stream.index}"]
    # A line for each packet.
    command += ["-c", "copy", "-frames:v", "2", "-f", "framecrc", "pipe:1"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    return sum(not line.startswith(b"#") for line in done.stdout.splitlines()) > 1


def _why_not_opened(path: Path) -> str:
    command = [
        _ffmpeg(),
        "-hide_banner",
        "-nostdin",
        "-v",
        "error",
        "-i",
        f"file:{path}",
        "-map",
        "0:v",
        "-f",
        "null",
        "-",
    ]
    with tempfile.TemporaryFile() as log:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log)
        return _first_message(log, path) or f"ffmpeg exit code {done.returncode}"


def _existing(path: str | os.PathLike[str]) -> Path:
    """The path of a file that is there and not empty; else VideoError."""
    path = Path(path)
    if not path.is_file():
        raise VideoError(f"{path}: no such video file")
    if path.stat().st_size == 0:
        raise VideoError(f"{path}: the video file is empty (0 bytes)")
    return path


def _ffmpeg() -> str:
    import imageio_ffmpeg

    try:
        program: str = imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError as error:
        raise VideoError(f"no ffmpeg here (imageio-ffmpeg): {one_line(error)}") from error
    return program


def _check_frames(path: Path, frames: Any, *, lossless: bool) -> VideoInfo:
    shape = tuple(frames.shape)
    if len(shape) != 4 or shape[3] != 3:
        raise VideoError(f"{path}: frames must have the shape [T, H, W, 3], got {list(shape)}")
    count, height, width, _ = (int(size) for size in shape)
    if count == 0:
        raise VideoError(f"{path}: no frames to write")
    if height == 0 or width == 0:
        raise VideoError(f"{path}: frames must have pixels, got {width} x {height}")
    if not lossless and (height % 2 or width % 2):
        raise VideoError(
            f"{path}: H.264 takes even widths and heights, got {width} x {height}; use an even size, or lossless=True"
        )
    return VideoInfo(frames=count, height=height, width=width)


def _to_uint8(path: Path, frame: Any, index: int) -> np.ndarray:
    """One frame as uint8; floats are checked and rounded here, so no second copy of the video is made."""
    if not isinstance(frame, np.ndarray):
        frame = frame.detach().cpu()
        # numpy has no bfloat16; float32 holds every half-precision value exactly.
        frame = (frame.float() if frame.is_floating_point() else frame).numpy()
    pixels: np.ndarray = frame
    if pixels.dtype == np.uint8:
        return pixels
    if not np.issubdtype(pixels.dtype, np.floating):
        raise VideoError(f"{path}: frames must be uint8 or floats in [0, 1], got {pixels.dtype}")
    low, high = float(pixels.min()), float(pixels.max())
    # Written so that a NaN fails too.
    if not (low >= 0.0 and high <= 1.0):
        raise VideoError(f"{path}: float frames must lie in [0, 1], frame {index} has {low:g} to {high:g}")
    rounded: np.ndarray = np.rint(pixels.astype(np.float32) * 255.0)
    return rounded.astype(np.uint8)


def _read_ppm(path: Path, stream: IO[bytes]) -> np.ndarray | None:
    """The next PPM image as `[H, W, 3]`, or None at the end of the stream, also inside of an image.

    Raises VideoError for anything else: waiting for ffmpeg with more to read would take for ever.
    """
    magic, size, depth = stream.readline(), stream.readline(), stream.readline()
    if not depth:
        return None
    if magic != b"P6\n" or depth != b"255\n":
        raise VideoError(f"{path}: ffmpeg gave frames of another kind: {(magic + size + depth)[:40]!r}")
    width, height = (int(number) for number in size.split())
    data = stream.read(width * height * 3)
    if len(data) < width * height * 3:
        return None
    return np.frombuffer(bytearray(data), dtype=np.uint8).reshape(height, width, 3)


@contextlib.contextmanager
def _ended(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """However the block ends, the process has ended and is reaped, and its pipes are closed."""
    try:
        yield
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                # Closing flushes; what is left in a pipe that nobody reads any more is of no use.
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


def _first_message(log: IO[bytes], *paths: Path) -> str:
    """ffmpeg's first complaint on one line, without its component addresses and without file names."""
    log.seek(0)
    for line in log.read().decode(errors="replace").splitlines():
        text = re.sub(r"\[[^\]]* @ 0x[0-9a-f]+\]\s*", "", line).strip()
        for path in paths:
            text = text.replace(f"file:{path}", "").strip(" :")
        if text:
            return text[:_MAX_MESSAGE]
    return ""
