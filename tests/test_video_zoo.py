"""Videos as phones, recorders, broadcasts and editors write them: what `qa` sees of each, and what `compare` does.

`qa` samples with `sample_video`; it answers about damage that leaves enough frames, with a warning. `compare` reads
with `iter_frames`, which refuses a file about which ffmpeg logs an error.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import imageio_ffmpeg
import numpy as np
import pytest

from tests.cli_tools import run_command
from tests.language_families import save_video_model
from xattn_video_pipelines.cli import main
from xattn_video_pipelines.qa.frames import SampledVideo, sample_video
from xattn_video_pipelines.video.io import VideoError, frame_times, iter_frames, read_video
from xattn_video_pipelines.video.manifest import append_record

# Left half red, right half blue: what is upright, square and in its place shows it.
HALVES = "color=red:s=32x48:r=8:d=2[l];color=blue:s=32x48:r=8:d=2[r];[l][r]hstack"
# Upper half red, lower half blue, and as large as HALVES after a quarter turn.
STACKED = "color=red:s=48x32:r=8:d=2[l];color=blue:s=48x32:r=8:d=2[r];[l][r]vstack"
H264 = ("-c:v", "libx264", "-preset", "ultrafast", "-pix_fmt", "yuv420p")
X264_GOPS = "keyint=16:min-keyint=16:scenecut=0:bframes=3"


def ffmpeg(*words: object, source: str | None = HALVES, check: bool = True) -> None:
    """Run ffmpeg quietly; with `source`, a filter graph is its first input."""
    given = [] if source is None else ["-f", "lavfi", "-i", source]
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "quiet", "-y", "-threads", "1", *given, *map(str, words)]
    subprocess.run(command, check=check, stdin=subprocess.DEVNULL)


def moving(seconds: float, rate: int = 16) -> str:
    return f"testsrc2=s=64x48:r={rate}:d={seconds}"


def halves(video: SampledVideo, red: tuple[slice, slice], blue: tuple[slice, slice]) -> bool:
    """Whether one part of each frame is red and another one blue."""
    colours = (video.frames[:, *where].mean(axis=(0, 1, 2)) for where in (red, blue))
    wanted = (254, 0, 0), (0, 0, 254)
    return all(np.abs(colour - want).max() < 30 for colour, want in zip(colours, wanted, strict=True))


LEFT, RIGHT = (slice(None), slice(0, 24)), (slice(None), slice(-24, None))


# --- how each is made ------------------------------------------------------------------------------------------


def open_gop_cut(folder: Path) -> Path:
    ffmpeg(*H264[:3], "medium", "-x264-params", f"open-gop=1:{X264_GOPS}", folder / "whole.mp4", source=moving(4))
    ffmpeg("-ss", "1.0", "-i", folder / "whole.mp4", "-c", "copy", folder / "cut.mp4", source=None)
    return folder / "cut.mp4"


def transport_stream_cut_at_the_start(folder: Path) -> Path:
    """A recording of a broadcast begins anywhere: here with frames that refer to ones before them."""
    ffmpeg(*H264, "-x264-params", X264_GOPS, "-muxrate", "400k", folder / "whole.ts", source=moving(4))
    data = (folder / "whole.ts").read_bytes()
    (folder / "cut.ts").write_bytes(data[188 * (len(data) // 188 // 8) :])
    return folder / "cut.ts"


def cover_first(folder: Path, *marks: str, name: str = "covered.mp4", cover: str = "color=lime:s=96x96:d=0.04") -> Path:
    ffmpeg(*H264, folder / "halves.mp4")
    ffmpeg(*H264, "-frames:v", 1, folder / "cover.mp4", source=cover)
    both = ("-i", folder / "cover.mp4", "-i", folder / "halves.mp4", "-map", "0:v", "-map", "1:v", "-c", "copy")
    ffmpeg(*both, *marks, folder / name, source=None)
    return folder / name


def encoded(name: str, *words: object, source: str = HALVES) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        ffmpeg(*words, folder / name, source=source)
        return folder / name

    return make


def rotated(folder: Path) -> Path:
    """As of a phone that was held upright: the pixels lie, and a matrix says how they are to be turned."""
    ffmpeg(*H264, folder / "lying.mp4", source=STACKED.replace("vstack", "vstack,transpose=dir=clock"))
    ffmpeg("-display_rotation", "90", "-i", folder / "lying.mp4", "-c", "copy", folder / "turned.mp4", source=None)
    return folder / "turned.mp4"


def rotated_with_tall_pixels(folder: Path) -> Path:
    ffmpeg(*H264, "-vf", "setsar=1/2", folder / "lying.mp4")
    ffmpeg("-display_rotation", "90", "-i", folder / "lying.mp4", "-c", "copy", folder / "turned.mp4", source=None)
    return folder / "turned.mp4"


def edit_list(folder: Path) -> Path:
    """Cut between two key frames without encoding: the frames before the cut are there and are not to be shown."""
    ffmpeg(*H264, "-x264-params", X264_GOPS, folder / "whole.mp4", source=moving(3))
    ffmpeg("-ss", "1.5", "-i", folder / "whole.mp4", "-c", "copy", folder / "edited.mp4", source=None)
    return folder / "edited.mp4"


def piped_webm(folder: Path) -> Path:
    """A browser's recorder cannot go back to write how long its file became."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "quiet", "-f", "lavfi", "-i", HALVES, "-c:v", "libvpx"]
    done = subprocess.run([*command, "-f", "webm", "pipe:1"], check=True, stdin=subprocess.DEVNULL, capture_output=True)
    (folder / "recorded.webm").write_bytes(done.stdout)
    return folder / "recorded.webm"


def with_longer_sound(folder: Path) -> Path:
    ffmpeg("-f", "lavfi", "-i", "sine=d=9", "-map", "0:v", "-map", "1:a", *H264, "-c:a", "aac", folder / "sound.mp4")
    return folder / "sound.mp4"


def size_that_changes(folder: Path) -> Path:
    """As in a broadcast from one programme to the next, and in a call when the network gets worse."""
    for size in ("64x48", "128x96"):
        ffmpeg(*H264, "-bf", 0, folder / f"{size}.h264", source=f"testsrc2=s={size}:r=8:d=1")
    small, large = ((folder / f"{size}.h264").read_bytes() for size in ("64x48", "128x96"))
    (folder / "joined.h264").write_bytes(3 * (small + large))
    ffmpeg("-r", 8, "-i", folder / "joined.h264", "-c", "copy", folder / "changes.ts", source=None)
    return folder / "changes.ts"


def marked_cover(folder: Path) -> Path:
    ffmpeg(*H264, folder / "halves.mp4")
    ffmpeg("-frames:v", 1, folder / "cover.png", source="color=lime:s=96x96")
    both = ("-i", folder / "cover.png", "-i", folder / "halves.mp4", "-map", "0:v", "-map", "1:v", "-c", "copy")
    ffmpeg(*both, "-disposition:v:0", "attached_pic", folder / "covered.mp4", source=None)
    return folder / "covered.mp4"


class Animal(NamedTuple):
    """A video of the zoo: how many of its frames qa sees at 8 a second, how large, and whether with a warning.

    `read` is how many frames `compare` reads; None where it refuses the file.
    """

    make: Callable[[Path], Path]
    seen: int
    size: tuple[int, int]
    warned: bool = False
    read: int | None = 16
    where: tuple[tuple[slice, slice], tuple[slice, slice]] | None = (LEFT, RIGHT)


UPPER, LOWER = (slice(0, 24), slice(None)), (slice(-24, None), slice(None))
AV1 = ("-c:v", "libaom-av1", "-cpu-used", "8", "-usage", "realtime", "-pix_fmt", "yuv420p")
ZOO = {
    "open GOP, cut": Animal(open_gop_cut, 24, (48, 64), warned=True, read=None, where=None),
    "MPEG-TS": Animal(encoded("a.ts", *H264), 16, (48, 64)),
    "MPEG-TS, cut at the start": Animal(
        transport_stream_cut_at_the_start, 24, (48, 64), warned=True, read=None, where=None
    ),
    "cover first, marked": Animal(marked_cover, 16, (48, 64)),
    "cover first, a default stream": Animal(cover_first, 16, (48, 64)),
    "cover first, alone the default": Animal(
        lambda to: cover_first(to, "-disposition:v:0", "default", "-disposition:v:1", "0", name="covered.mkv"),
        16,
        (48, 64),
    ),
    "small second angle that is the default": Animal(
        lambda to: cover_first(to, "-disposition:v:0", "0", cover="color=lime:s=96x96:r=8:d=2"), 16, (48, 64)
    ),
    "rotated": Animal(rotated, 16, (64, 48), where=(UPPER, LOWER)),
    "10 bit": Animal(encoded("a.mp4", *H264[:4], "-pix_fmt", "yuv420p10le"), 16, (48, 64)),
    "HEVC of 10 bit": Animal(
        encoded("a.mp4", "-c:v", "libx265", "-preset", "ultrafast", "-pix_fmt", "yuv420p10le", "-tag:v", "hvc1"),
        16,
        (48, 64),
    ),
    "AV1": Animal(encoded("a.mp4", *AV1), 16, (48, 64)),
    "VP9": Animal(encoded("a.webm", "-c:v", "libvpx-vp9", "-cpu-used", 8, "-deadline", "realtime"), 16, (48, 64)),
    "WebM without a duration": Animal(piped_webm, 16, (48, 64)),
    "GIF": Animal(encoded("a.gif"), 16, (48, 64)),
    "Motion JPEG": Animal(encoded("a.avi", "-c:v", "mjpeg", "-pix_fmt", "yuvj422p"), 16, (48, 64)),
    "MPEG-4 in AVI": Animal(encoded("a.avi", "-c:v", "mpeg4", "-bf", 2), 16, (48, 64)),
    "MPEG-2, interlaced": Animal(
        encoded("a.mpg", "-vf", "fps=25", "-c:v", "mpeg2video", "-flags", "+ildct+ilme", "-qscale:v", 3),
        16,
        (48, 64),
        read=50,
    ),
    "H.264, interlaced": Animal(encoded("a.mp4", *H264, "-x264-params", "tff=1"), 16, (48, 64)),
    "fragmented MP4": Animal(
        encoded("a.mp4", *H264, "-g", 4, "-movflags", "frag_keyframe+empty_moov+default_base_moof"), 16, (48, 64)
    ),
    "ProRes": Animal(encoded("a.mov", "-c:v", "prores"), 16, (48, 64)),
    "Flash": Animal(encoded("a.flv", *H264), 16, (48, 64)),
    "Windows Media": Animal(encoded("a.wmv", "-c:v", "wmv2", "-qscale:v", 2), 16, (48, 64)),
    "Ogg Theora": Animal(
        encoded("a.ogv", "-c:v", "libtheora", "-qscale:v", 10, source=moving(2, 8)), 16, (48, 64), where=None
    ),
    "a time code beside": Animal(encoded("a.mov", *H264, "-timecode", "00:00:01:00"), 16, (48, 64)),
    "a late start": Animal(encoded("a.mkv", *H264, "-output_ts_offset", 5), 16, (48, 64)),
    "rounded time stamps of 30 a second": Animal(encoded("a.mkv", *H264, "-vf", "fps=30"), 16, (48, 64), read=60),
    "not square pixels": Animal(encoded("a.mp4", *H264, "-vf", "scale=32:48,setsar=2"), 16, (48, 64)),
    "not square pixels, rotated": Animal(rotated_with_tall_pixels, 16, (64, 96), where=None),
    "odd sizes": Animal(encoded("a.mkv", *H264[:4], "-pix_fmt", "yuv444p", "-vf", "crop=63:47"), 16, (46, 62)),
    "grey": Animal(encoded("a.mkv", "-c:v", "ffv1", "-pix_fmt", "gray16le"), 16, (48, 64), where=None),
    "one frame": Animal(encoded("a.mp4", *H264, "-frames:v", 1), 2, (48, 64), read=1),
    "one picture": Animal(encoded("a.png", "-frames:v", 1), 2, (48, 64), read=1),
    "sound that lasts longer": Animal(with_longer_sound, 16, (48, 64)),
    "edit list": Animal(edit_list, 12, (48, 64), read=24, where=None),
    "size that changes": Animal(size_that_changes, 48, (48, 64), read=48, where=None),
}


@pytest.mark.parametrize("name", ZOO)
def test_what_is_seen_of_each(tmp_path: Path, name: str) -> None:
    animal = ZOO[name]
    path = animal.make(tmp_path)
    video = sample_video(path, fps=8, max_frames=100, max_pixels=10**6)
    assert abs(len(video.frames) - animal.seen) <= 1
    assert video.frames.shape[1:3] == animal.size
    assert (video.complaint is not None) is animal.warned
    if animal.where is not None:
        assert halves(video, *animal.where)
    if animal.read is None:
        with pytest.raises(VideoError, match=re.escape(f"{path}: damaged or not a video")):
            sum(1 for _ in iter_frames(path))
    else:
        assert sum(1 for _ in iter_frames(path)) == animal.read


@pytest.mark.parametrize("fps", [5, 4])
def test_a_frame_is_seen_as_long_as_it_is_shown(tmp_path: Path, fps: int) -> None:
    """Ten frames a second for two seconds, and a last one after 60: as of a recording of a screen that stands still."""
    late = "setpts='if(eq(N,20),60/TB,PTS)'"
    ffmpeg(
        *H264,
        "-vf",
        late,
        "-frames:v",
        21,
        "-fps_mode",
        "vfr",
        tmp_path / "a.mp4",
        source="testsrc2=s=64x48:r=10:d=2.1",
    )
    shown = read_video(tmp_path / "a.mp4").astype(int)
    video = sample_video(tmp_path / "a.mp4", fps=fps, max_frames=768, max_pixels=10**6)
    assert video.fps == fps
    assert 60 * fps <= len(video.frames) <= 60 * fps + 2
    for index, frame in enumerate(video.frames):
        # Frame 19 is shown from 1.9 to 60 seconds.
        expected = 20 if index >= 60 * fps else min(10 * index // fps, 19)
        assert np.abs(shown - frame).mean(axis=(1, 2, 3)).argmin() == expected


def test_times_are_those_of_the_file(tmp_path: Path) -> None:
    late = "setpts='if(lt(N,4),N/10,if(lt(N,6),10+N/5,20))/TB'"
    ffmpeg(
        *H264, "-vf", late, "-frames:v", 7, "-fps_mode", "vfr", tmp_path / "a.mp4", source="testsrc2=s=64x48:r=10:d=0.7"
    )
    times = frame_times(tmp_path / "a.mp4")
    assert times.starts == pytest.approx([0, 0.1, 0.2, 0.3, 10.8, 11, 20], abs=1e-3)
    assert times.seconds > 20
    assert times.rate == pytest.approx(10, rel=0.01)
    ffmpeg(*H264, tmp_path / "b.mp4")
    assert frame_times(tmp_path / "b.mp4").rate == pytest.approx(8, rel=1e-3)


def test_no_frame_is_seen_twice_where_time_stamps_are_rounded(tmp_path: Path) -> None:
    """Matroska counts milliseconds, so 30 frames a second are 33 or 34 of them apart."""
    ffmpeg(*H264, tmp_path / "a.mkv", source=moving(2, 30))
    video = sample_video(tmp_path / "a.mkv", fps=1000, max_frames=1000, max_pixels=10**6)
    assert video.fps == pytest.approx(30, rel=1e-2)
    assert abs(len(video.frames) - 60) <= 1


def test_no_more_frames_are_seen_than_the_video_lasts(tmp_path: Path) -> None:
    """Theora stores no frame that repeats the last one, and ffmpeg guesses how long the last one of all is shown."""
    ffmpeg("-c:v", "libtheora", tmp_path / "a.ogv")
    video = sample_video(tmp_path / "a.ogv", fps=8, max_frames=100, max_pixels=10**6)
    assert len(video.frames) / video.fps == pytest.approx(video.seconds, rel=0.01)


def test_a_change_of_size_moves_no_times(tmp_path: Path) -> None:
    """Six parts of a second, 1.5 frames of each: rounded part by part they would be 12."""
    video = sample_video(size_that_changes(tmp_path), fps=1.5, max_frames=100, max_pixels=10**6)
    assert len(video.frames) == 9


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a.mov", ("-c:v", "qtrle")),
        ("a.mkv", ("-c:v", "ffv1", "-pix_fmt", "bgra")),
        ("a.png", ("-f", "apng")),
        ("a.gif", ("-vf", "split[a][b];[a]palettegen[p];[b][p]paletteuse")),
    ],
)
def test_what_is_transparent_is_white(tmp_path: Path, name: str, words: tuple[str, ...]) -> None:
    ffmpeg(*words, tmp_path / name, source=HALVES + ",format=rgba,colorkey=blue:0.3")
    sampled = sample_video(tmp_path / name, fps=8, max_frames=9, max_pixels=10**6)
    for frames in (read_video(tmp_path / name), sampled.frames):
        left, right = frames[:, *LEFT].mean(axis=(0, 1, 2)), frames[:, *RIGHT].mean(axis=(0, 1, 2))
        assert np.abs(left - (254, 0, 0)).max() < 30
        assert right.min() > 250


def test_a_video_that_ends_too_early_is_refused(tmp_path: Path) -> None:
    """A download that broke off: the file still says how long it was to be."""
    ffmpeg("-f", "lavfi", "-i", "sine=d=4", *H264, "-movflags", "+faststart", tmp_path / "whole.mp4", source=moving(4))
    data = (tmp_path / "whole.mp4").read_bytes()
    (tmp_path / "half.mp4").write_bytes(data[: len(data) // 2])
    with pytest.raises(VideoError, match=r"half\.mp4: damaged or not a video: ends after [\d.]+ of 4\.\d+ seconds: "):
        sample_video(tmp_path / "half.mp4", fps=8, max_frames=100, max_pixels=10**6)


def test_a_video_of_which_much_cannot_be_decoded_is_refused(tmp_path: Path) -> None:
    ffmpeg("-c:v", "mjpeg", "-pix_fmt", "yuvj420p", tmp_path / "whole.mov", source=moving(2))
    data = bytearray((tmp_path / "whole.mov").read_bytes())
    starts = [match.start() for match in re.finditer(rb"\xff\xd8\xff", bytes(data))]
    assert len(starts) == 32
    for count, refused in ((2, False), (16, True)):
        for start, end in itertools.pairwise(starts[4 : 5 + count]):
            data[start:end] = bytes(end - start)
        path = tmp_path / f"{count}.mov"
        path.write_bytes(data)
        if refused:
            with pytest.raises(VideoError, match=rf"{path.name}: damaged or not a video: "):
                sample_video(path, fps=16, max_frames=100, max_pixels=10**6)
        else:
            assert sample_video(path, fps=16, max_frames=100, max_pixels=10**6).complaint is not None


def test_compare_refuses_a_video_about_which_qa_answers(tmp_path: Path, capfd: Any) -> None:
    path = open_gop_cut(tmp_path)
    for side, config in (("dense", None), ("sparse", {"stride": 8})):
        (tmp_path / side).mkdir()
        (tmp_path / side / "cat-s0.mp4").write_bytes(path.read_bytes())
        record = {"id": "cat", "seed": 0, "file": "cat-s0.mp4", "lossless_file": None, "prompt": "a cat"}
        record |= {"model": "tiny", "steps": 8, "device_name": "CPU", "seconds": 1.0, "mean_density": 1.0}
        append_record(tmp_path / side, {**record, "config": config})
    compared = ("compare", tmp_path / "dense", tmp_path / "sparse", "--no-lpips", "--out", tmp_path / "out")
    done = run_command(capfd, *compared)
    assert done.code == 2
    assert "cat-s0.mp4: damaged or not a video" in done.err.splitlines()[-1]


def test_qa_answers_about_a_damaged_video_with_one_warning(tmp_path: Path, capfd: Any) -> None:
    save_video_model(tmp_path / "model")
    path = open_gop_cut(tmp_path)
    items = [{"video": path.name, "question": f"w{number}"} for number in (5, 6)]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    asked = ["qa", "--model", tmp_path / "model", "--items", tmp_path / "items.jsonl", "--max-new-tokens", 1]
    assert main([*map(str, asked), "--attention", "dense", "--device", "cpu", "--out", str(tmp_path / "out")]) == 0
    warnings = [line for line in capfd.readouterr().err.splitlines() if "warning: " in line]
    assert len(warnings) == 1
    assert f"{path}: ffmpeg says of it: " in warnings[0]
    assert len((tmp_path / "out" / "answers.jsonl").read_text().splitlines()) == 2
