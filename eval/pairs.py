"""Which dense video goes with which sparse one, read from two folders' manifests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipelines.errors import UserError
from pipelines.manifest import NAME as MANIFEST
from pipelines.manifest import Key, Record, read_manifest
from pipelines.video_io import lossless_path

# The two sides of a pair may differ in their attention only.
_SAME_FIELDS = (
    "model", "prompt", "negative_prompt", "image_sha256", "height", "width", "num_frames", "steps",
    "guidance_scale", "guidance_scale_2", "flow_shift", "dtype",
)  # fmt: skip
_NAMED_AT_MOST = 5


@dataclass(frozen=True)
class Pair:
    """The two videos of one (id, seed), and the two files that are compared, both of one kind.

    source: "lossless" (both sides have an FFV1 copy) or "mp4"; `one_sided` if only one side has a copy.
    """

    key: Key
    dense: Record
    sparse: Record
    dense_file: Path
    sparse_file: Path
    source: str
    one_sided: bool

    @property
    def name(self) -> str:
        return video_name(self.key)


def find_pairs(
    dense_dir: Path, sparse_dir: Path, *, allow_unmatched: bool = False
) -> tuple[list[Pair], dict[str, list[str]]]:
    """The pairs in the dense manifest's order, and the names of the videos that only one side has.

    Raises:
        UserError: a folder, manifest or file is missing or empty, a video has no partner, or a pair differs in
            prompt or settings.
    """
    dense, sparse = _read(dense_dir), _read(sparse_dir)
    only_dense = [video_name(key) for key in dense if key not in sparse]
    only_sparse = [video_name(key) for key in sparse if key not in dense]
    keys = [key for key in dense if key in sparse]
    if not keys:
        raise UserError(f"{dense_dir} and {sparse_dir} have no video (id, seed) in common")
    if (only_dense or only_sparse) and not allow_unmatched:
        sides = ((only_dense, dense_dir), (only_sparse, sparse_dir))
        missing = "; ".join(f"only in {folder}: {_listed(names)}" for names, folder in sides if names)
        raise UserError(f"videos without a partner: {missing} (--allow-unmatched compares the rest)")
    pairs = [_pair(key, dense_dir, dense[key], sparse_dir, sparse[key]) for key in keys]
    return pairs, {"dense_only": only_dense, "sparse_only": only_sparse}


def video_name(key: Key) -> str:
    """How a video is called in tables and messages: `<id>-s<seed>`."""
    return f"{key[0]}-s{key[1]}"


def shortened(text: str, length: int = 40) -> str:
    """`text`, cut to `length` characters."""
    return text if len(text) <= length else text[: length - 3] + "..."


def _read(folder: Path) -> dict[Key, Record]:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    if not (folder / MANIFEST).is_file():
        raise UserError(f"{folder}: no {MANIFEST} in it; give a folder that `xattn-video generate` wrote")
    records = read_manifest(folder)
    if not records:
        raise UserError(f"{folder / MANIFEST}: no finished video in it")
    return records


def _pair(key: Key, dense_dir: Path, dense: Record, sparse_dir: Path, sparse: Record) -> Pair:
    for field in _SAME_FIELDS:
        if field in dense and field in sparse and dense[field] != sparse[field]:
            raise UserError(
                f"{video_name(key)}: the two sides differ in {field}: {shortened(repr(dense[field]))} in {dense_dir}, "
                f"{shortened(repr(sparse[field]))} in {sparse_dir}"
            )
    sides = ((dense_dir, dense), (sparse_dir, sparse))
    copies = [_lossless_copy(folder, record) for folder, record in sides]
    source = "mp4" if None in copies else "lossless"
    dense_file, sparse_file = (
        copy if copy and source == "lossless" else _video_file(folder, record)
        for copy, (folder, record) in zip(copies, sides, strict=True)
    )
    for file in (dense_file, sparse_file):
        if not file.is_file():
            raise UserError(f"{file}: listed in the manifest, but missing; run generate again")
    return Pair(key, dense, sparse, dense_file, sparse_file, source, one_sided=copies.count(None) == 1)


def _video_file(folder: Path, record: Record) -> Path:
    file = record.get("file")
    if not isinstance(file, str):
        raise UserError(f"{folder / MANIFEST}: {video_name((record['id'], record['seed']))} names no file")
    return folder / file


def _lossless_copy(folder: Path, record: Record) -> Path | None:
    """The copy that the record names (`lossless_file`, None if made without one), if it is there."""
    name = record.get("lossless_file", lossless_path(_video_file(folder, record)).name)
    return folder / name if name and (folder / name).is_file() else None


def _listed(names: Sequence[str]) -> str:
    rest = len(names) - _NAMED_AT_MOST
    return ", ".join(names[:_NAMED_AT_MOST]) + (f" and {rest} more" if rest > 0 else "")
