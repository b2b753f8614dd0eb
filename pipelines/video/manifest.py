"""manifest.jsonl: one line per finished video, so that a run can be killed at any moment and started again."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, Required, TypedDict

from xattn_video_pipelines.common import jsonl
from xattn_video_pipelines.common.errors import UserError
from xattn_video_pipelines.common.files import check_stays
from xattn_video_pipelines.common.schema import Count, Range, Seconds, Share
from xattn_video_pipelines.common.terminal import say
from xattn_video_pipelines.video.io import lossless_path
from xattn_video_pipelines.video.prompts import MAX_SEED

NAME = "manifest.jsonl"

Key = tuple[str, int]
Record = jsonl.Row


def _plain_name(value: str) -> str | None:
    """A rule of a schema: a foreign manifest must not name files elsewhere, on any system."""
    if value in ("", ".", "..") or any(sign in value for sign in "/\\:\0"):
        return "the plain name of a file in the manifest's folder"
    return None


def _one_line_name(value: str) -> str | None:
    """A rule of a schema: an id stands in tables and in names of files."""
    return None if value.isprintable() else "a text without control characters"


_File = Annotated[str, _plain_name]
_Number = float | None
_Text = str | None


class _Row(TypedDict, total=False):
    """A line of a manifest as this version and earlier ones wrote it; what an earlier one did not know is missing."""

    id: Required[Annotated[str, _one_line_name]]
    seed: Required[Annotated[int, Range(0, MAX_SEED)]]
    file: _File | None
    lossless_file: _File | None
    bytes: Count | None
    sha256: _Text
    lossless_bytes: Count | None
    lossless_sha256: _Text
    prompt: _Text
    negative_prompt: _Text
    image: _Text
    image_sha256: _Text
    model: _Text
    model_name: _Text
    weights: _Text
    attention: _Text
    config: dict[str, Any] | None
    height: Count | None
    width: Count | None
    num_frames: Count | None
    fps: _Number
    steps: Count | None
    guidance_scale: _Number
    guidance_scale_2: _Number
    flow_shift: _Number
    lora: dict[str, float] | None
    lora_files: list[str] | None
    lora_2: dict[str, float] | None
    lora_2_files: list[str] | None
    quantize: _Text
    dtype: _Text
    tokens: Count | None
    seconds: Seconds | None
    seconds_per_step: Seconds | None
    cpu_share: Share | None
    peak_memory_bytes: Count | None
    mean_density: Share | None
    density_by_step: list[Share] | None
    density_by_layer: dict[str, Share] | None
    density_by_layer_and_step: dict[str, list[Share | None]] | None
    sparse_calls: Count | None
    dense_reasons: dict[str, Count] | None
    residual_bytes: Count | None
    calls_without_residual: Count | None
    finished: _Text
    device: _Text
    device_name: _Text
    offload: _Text
    compile: bool | None
    versions: dict[str, _Text] | None
    commit: _Text


_COMPLAINT = "not a manifest line; correct or remove it, or use another --out"


def read_manifest(folder: Path) -> dict[Key, Record]:
    """The records of `folder`'s manifest by (id, seed); the later of two lines wins. Missing file: none.

    A last line that a kill cut short is left out; the next `append_record` removes it.

    Raises:
        UserError: another line is no record, or it names a file elsewhere; the message names file and line.
    """
    return Manifest(folder).records()


class Manifest:
    """The manifest of a folder, read once. Afterwards only the lines are read that this and other processes add."""

    def __init__(self, folder: Path) -> None:
        self._log = jsonl.Follower(folder / NAME, from_start=True, complaint=_COMPLAINT, schema=_Row)
        self._records: dict[Key, Record] = {}

    def records(self) -> dict[Key, Record]:
        """As of `read_manifest`, with what was added since the last call. It is the same dictionary at each call."""
        rewritten, rows = self._log.news()
        if rewritten:
            self._records.clear()
        for record in rows:
            self._records[record["id"], record["seed"]] = record
        return self._records


def finished_videos(folder: Path) -> dict[Key, Record]:
    """`read_manifest` of a folder that must hold videos.

    Raises:
        UserError: no such folder, no manifest in it, or none of its videos is finished.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    if not (folder / NAME).is_file():
        raise UserError(f"{folder}: no {NAME} in it; give a folder that `xattn-video generate` wrote")
    records = read_manifest(folder)
    if not records:
        raise UserError(f"{folder / NAME}: no finished video in it")
    return records


def video_name(key: Key) -> str:
    """How a video is called in tables and messages: `<id>-s<seed>`."""
    return f"{key[0]}-s{key[1]}"


def video_file(folder: Path, record: Record) -> Path:
    """The mp4 file of a record.

    Raises:
        UserError: the record names no file, or one that is a link out of the folder.
    """
    file = record.get("file")
    if file is None:
        raise UserError(f"{folder / NAME}: {video_name((record['id'], record['seed']))} names no file")
    path = folder / str(file)
    check_stays(path, folder)
    return path


def lossless_copy(folder: Path, record: Record) -> Path | None:
    """The copy that the record names (`lossless_file`, None if made without one), if it is there.

    Raises:
        UserError: it is a link out of the folder.
    """
    name = record.get("lossless_file", lossless_path(video_file(folder, record)).name)
    path = folder / str(name)
    if not name or not path.is_file():
        return None
    check_stays(path, folder)
    return path


def check_exists(file: Path) -> None:
    """Raise UserError for a file of the manifest that is gone."""
    if not file.is_file():
        raise UserError(f"{file}: listed in the manifest, but missing; run generate again")


def is_finished(path: Path, found: Record, identity: Record, *, lossless: bool) -> bool:
    """Whether the video is there in full size, with its lossless copy where one is asked for.

    A file that is empty or has another size than its record says is named on stderr.

    Args:
        path: of the mp4 file.
        found: the manifest's record of the video.
        identity: what the record would say of the video if it was made now.
        lossless: whether the copy is asked for.

    Raises:
        UserError: the video is there, but was made with other settings.
    """
    if not _is_whole(path, found.get("bytes")):
        return False
    changes = _changes(found, identity)
    if changes:
        raise UserError(
            f"{path} was made with other settings ({'; '.join(changes)}); "
            "use another --out, or --overwrite to make it again"
        )
    copy = found.get("lossless_file")
    return not lossless or bool(copy and _is_whole(path.parent / copy, found.get("lossless_bytes")))


def _is_whole(path: Path, size: int | None) -> bool:
    """Whether a file is there and has the size that the manifest tells; None is told by manifests of earlier versions.

    The digest is not compared: that would read all videos each time a run goes on.
    """
    if not path.is_file():
        return False
    there = path.stat().st_size
    if there == 0 or (size is not None and there != size):
        told = "" if size is None else f", and its manifest says {size:,}"
        say(f"{path}: has {there:,} bytes{told}; it is made again", sys.stderr)
        return False
    return True


def size_and_digest(path: Path, prefix: str = "") -> Record:
    """What a record says of a file that was just written: by its size, a run that goes on sees that it is not whole.

    The digest serves who reads the file as a whole anyway, such as `report`, and who has copied the folder.
    """
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {f"{prefix}bytes": path.stat().st_size, f"{prefix}sha256": digest}


def made_meanwhile(manifest: Manifest, path: Path, key: Key, found: Record | None, identity: Record) -> bool:
    """Whether another run has made this very video since this run read the manifest and found the record `found`.

    Args:
        manifest: of the video's folder; only what was added to it since then is read.
        path, key, identity: of the video.

    Raises:
        UserError: it has made another video under this name, which must not be written over.
    """
    record = manifest.records().get(key)
    if record is None or record == found:
        return False
    if _changes(record, identity):
        raise UserError(f"{path}: another run has made another video of this name; use another --out")
    return True


def density(summary: Record | None, steps: int) -> Record:
    """The fields of a record about density and dense calls.

    Args:
        summary: of `AttentionStats.summary`; None for a dense video, which keeps every block.
        steps: denoising steps of the video.
    """
    if summary is None:
        layers: Record = {"density_by_layer": {}, "density_by_layer_and_step": {}}
        none = {"sparse_calls": 0, "dense_reasons": {}, "residual_bytes": 0, "calls_without_residual": 0}
        return {"mean_density": 1.0, "density_by_step": [1.0] * steps, **layers, **none}
    steps_done = sorted(summary["density_by_step"])
    return {
        "mean_density": summary["density"],
        "density_by_step": [summary["density_by_step"][step] for step in steps_done],
        # Rounded: a line of the manifest holds up to a hundred layers. None: a layer without a call in a step.
        "density_by_layer": {layer: round(share, 4) for layer, share in summary["density_by_layer"].items()},
        "density_by_layer_and_step": {
            layer: [round(by_step[step], 3) if step in by_step else None for step in steps_done]
            for layer, by_step in summary["density_by_layer_and_step"].items()
        },
        "sparse_calls": summary["sparse_calls"],
        "dense_reasons": summary["dense_calls"],
        "residual_bytes": summary["residual_bytes"],
        "calls_without_residual": summary["calls_without_residual"],
    }


def append_record(folder: Path, record: Record) -> None:
    """Add one finished video. Raises UserError if the file cannot be written."""
    jsonl.append(folder / NAME, [record])


def remove_records(folder: Path, keys: Collection[Key]) -> None:
    """Take the given videos, which are to be made again, out of the manifest in one step.

    Raises:
        UserError: the file cannot be written.
    """
    if read_manifest(folder).keys() & set(keys):
        jsonl.keep(folder / NAME, lambda record: (record["id"], record["seed"]) not in keys)


def _changes(record: Record, identity: Record) -> list[str]:
    """What a record says otherwise than `identity`, field by field."""
    from xattn_video import XAttnConfig

    # Weights that are gone, or were not noted, tell nothing.
    weighed = identity.get("weights") is not None and record.get("weights") is not None
    # What was no setting then had its default.
    if record.get("config") is not None:
        record = {**record, "config": {**XAttnConfig().for_videos().to_dict(), **record["config"]}}
    # The name of an image or a LoRA tells nothing either: it is known by its bytes.
    left_out = {"image", "lora_files", "lora_2_files"} | (set() if weighed else {"weights"})
    return differences(record, identity, [name for name in identity if name not in left_out])


def differences(old: Record, new: Record, fields: Collection[str]) -> list[str]:
    """What an existing line says otherwise than this run would: `"steps 20, now 50"` per field."""
    # Through JSON, so that tuples and lists, 5 and 5.0 count as the same.
    new = json.loads(json.dumps(new))
    return [
        f"{name} {_show(old.get(name))}, now {_show(new.get(name))}"
        for name in fields
        if old.get(name) != new.get(name)
    ]


def _show(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
