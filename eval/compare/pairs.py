"""Which dense video goes with which sparse one, read from two folders' manifests."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from xattn_video_eval.compare.settings import FLOOR
from xattn_video_pipelines.common.errors import UserError
from xattn_video_pipelines.common.files import check_stays
from xattn_video_pipelines.video import (
    MANIFEST,
    Key,
    Record,
    check_exists,
    finished_videos,
    lossless_copy,
    video_file,
    video_name,
)

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
    dense_dir: Path, sparse_dir: Path, *, keys: Collection[Key] | None = None, allow_unmatched: bool = False
) -> tuple[list[Pair], dict[str, list[str]]]:
    """The pairs in the dense manifest's order, and the names of the videos that only one side has.

    Args:
        keys: the (id, seed) of the videos that are wanted; None takes all.
        allow_unmatched: leave videos without a partner out, instead of raising.

    Raises:
        UserError: a folder, manifest or file is missing or empty, a video has no partner, or a pair differs in
            prompt or settings.
    """
    dense, sparse = (
        {key: record for key, record in finished_videos(folder).items() if keys is None or key in keys}
        for folder in (dense_dir, sparse_dir)
    )
    only_dense = [video_name(key) for key in dense if key not in sparse]
    only_sparse = [video_name(key) for key in sparse if key not in dense]
    shared = [key for key in dense if key in sparse]
    if not shared:
        raise UserError(f"{dense_dir} and {sparse_dir} have no video (id, seed) in common")
    if (only_dense or only_sparse) and not allow_unmatched:
        sides = ((only_dense, dense_dir), (only_sparse, sparse_dir))
        missing = "; ".join(f"only in {folder}: {_listed(names)}" for names, folder in sides if names)
        raise UserError(f"videos without a partner: {missing} (--allow-unmatched compares the rest)")
    pairs = [_pair(key, dense_dir, dense[key], sparse_dir, sparse[key]) for key in shared]
    return pairs, {"dense_only": only_dense, "sparse_only": only_sparse}


def find_sides(run: Path) -> tuple[Path, list[Path]]:
    """The dense folder of a run and its sparse ones, as their manifests say, each list in the order of the names.

    Args:
        run: what `generate` or `sweep` was given as --out.

    Raises:
        UserError: no such folder, or it has no dense folder, more than one, or no sparse one; a manifest is damaged.
    """
    if not run.is_dir():
        raise UserError(f"{run}: no such folder")
    folders = sorted(path for path in run.iterdir() if (path / MANIFEST).is_file())
    for folder in folders:
        check_stays(folder, run)
    kinds = {folder: _kinds(finished_videos(folder)) for folder in folders}
    dense = [folder for folder, found in kinds.items() if found == {"dense"}]
    sparse = [folder for folder, found in kinds.items() if found == {"sparse"}]
    if len(dense) != 1 or not sparse:
        there = ", ".join(f"{folder.name} ({' and '.join(sorted(found))})" for folder, found in kinds.items())
        raise UserError(
            f"{run}: needs one folder of dense videos and at least one of sparse videos, has "
            f"{shortened(there, 200) or 'none'}; name two folders, or make them: generate --attention both --out {run}"
        )
    return dense[0], sparse


def _kinds(records: Mapping[Key, Record]) -> set[str]:
    """What the videos of a folder are: dense, dense-alt or sparse."""
    return {_kind(record) for record in records.values()}


def _kind(record: Record) -> str:
    attention = record.get("attention")
    if attention in ("dense", FLOOR):
        return str(attention)
    # Folders of other programs say what sparse attention had, and not that it was there.
    return "sparse" if attention is not None or record.get("config") is not None else "dense"


def check_sides(dense_dir: Path, sparse_dir: Path) -> None:
    """Say what nobody wants to measure: a folder against itself, or sparse videos as the reference of dense ones.

    Raises:
        UserError: both are one folder, or the two are swapped; a folder or manifest is missing or damaged.
    """
    if dense_dir.resolve() == sparse_dir.resolve():
        raise UserError(f"{dense_dir}: is given as both sides, and a folder is always equal to itself")
    if (_kinds(finished_videos(dense_dir)), _kinds(finished_videos(sparse_dir))) == ({"sparse"}, {"dense"}):
        raise UserError(
            f"the sides are swapped: {dense_dir} has sparse videos and {sparse_dir} dense ones; dense comes first: "
            f"xattn-video compare {sparse_dir} {dense_dir}"
        )


def shortened(text: str, length: int = 40) -> str:
    """`text`, cut to `length` characters."""
    return text if len(text) <= length else text[: length - 3] + "..."


def _pair(key: Key, dense_dir: Path, dense: Record, sparse_dir: Path, sparse: Record) -> Pair:
    # Weights that are gone, or were not noted, tell nothing.
    weighed = dense.get("weights") is not None and sparse.get("weights") is not None
    for field in (*_SAME_FIELDS, *(("weights",) if weighed else ())):
        if field in dense and field in sparse and dense[field] != sparse[field]:
            raise UserError(
                f"{video_name(key)}: the two sides differ in {field}: {shortened(repr(dense[field]))} in {dense_dir}, "
                f"{shortened(repr(sparse[field]))} in {sparse_dir}"
            )
    sides = ((dense_dir, dense), (sparse_dir, sparse))
    copies = [lossless_copy(folder, record) for folder, record in sides]
    source = "mp4" if None in copies else "lossless"
    dense_file, sparse_file = (
        copy if copy and source == "lossless" else video_file(folder, record)
        for copy, (folder, record) in zip(copies, sides, strict=True)
    )
    check_exists(dense_file)
    check_exists(sparse_file)
    return Pair(key, dense, sparse, dense_file, sparse_file, source, one_sided=copies.count(None) == 1)


def _listed(names: Sequence[str]) -> str:
    rest = len(names) - _NAMED_AT_MOST
    return ", ".join(names[:_NAMED_AT_MOST]) + (f" and {rest} more" if rest > 0 else "")
