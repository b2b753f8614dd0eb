"""Queries, keys and values that the demo model computed while it made a video: real structure for tests and timing.

`python -m xattn_video_pipelines.demo.training.capture` made the file that the demo's data has; its
metadata says how.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from xattn_video_pipelines.common.demo_data import DEMO_QKV

if TYPE_CHECKING:
    from torch import Tensor

_PARTS = ("query", "key", "value")
_NAME = re.compile(rf"(layer(\d+)\.head(\d+)\.step(\d+))\.({'|'.join(_PARTS)})")


@dataclass(frozen=True, eq=False)
class DemoTensors:
    """One head of one layer at one denoising step, all counted from 0.

    Attributes:
        name: such as `layer1.head1.step09`.
        query, key, value: bfloat16 `[1, 1, tokens, head_dim]`, as attention takes them (norms and rotary embedding
            applied, not scaled); tokens in raster order over `grid`.
        grid: frames, rows and columns of tokens.
    """

    name: str
    layer: int
    head: int
    step: int
    query: Tensor
    key: Tensor
    value: Tensor
    grid: tuple[int, int, int]


def load_demo_qkv(path: str | Path | None = None) -> list[DemoTensors]:
    """Everything in a file that `xattn_video_pipelines.demo.training.capture` wrote, by layer, head and step.

    Args:
        path: the file; None is the one that comes with this package.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is not one of these, or a part of it is missing; the message names file and tensor.
    """
    from safetensors import SafetensorError, safe_open

    path = DEMO_QKV if path is None else Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file; make one with: "
            f"python -m xattn_video_pipelines.demo.training.capture --model demo --out {path}"
        )
    parts: dict[str, dict[str, Tensor]] = {}
    indices: dict[str, tuple[int, int, int]] = {}
    try:
        with safe_open(path, framework="pt") as file:
            grid = _grid(path, (file.metadata() or {}).get("grid"))
            # a SafeTensors file is no dictionary
            for name in file.keys():  # noqa: SIM118
                match = _NAME.fullmatch(name)
                if match is None:
                    raise ValueError(f"{path}: a tensor's name must be like layer1.head1.step09.query, got {name!r}")
                entry, layer, head, step, part = match.groups()
                indices[entry] = int(layer), int(head), int(step)
                parts.setdefault(entry, {})[part] = file.get_tensor(name)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file: {error}") from None
    if not parts:
        raise ValueError(f"{path}: no tensors in it")
    for entry, tensors in parts.items():
        _check(f"{path}: {entry}", tensors, grid)
    return [
        DemoTensors(entry, *indices[entry], parts[entry]["query"], parts[entry]["key"], parts[entry]["value"], grid)
        for entry in sorted(parts, key=indices.__getitem__)
    ]


def _grid(path: Path, text: str | None) -> tuple[int, int, int]:
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)", text or "")
    if match is None:
        raise ValueError(f"{path}: the metadata's grid must be like 17x16x16, got {text!r}")
    frames, rows, columns = map(int, match.groups())
    return frames, rows, columns


def _check(where: str, tensors: dict[str, Tensor], grid: tuple[int, int, int]) -> None:
    missing = [part for part in _PARTS if part not in tensors]
    if missing:
        raise ValueError(f"{where}: has no {' and no '.join(missing)}")
    frames, rows, columns = grid
    tokens = frames * rows * columns
    for part in _PARTS:
        tensor = tensors[part]
        if tensor.ndim != 4 or tensor.shape[:3] != (1, 1, tokens) or tensor.shape != tensors["query"].shape:
            raise ValueError(
                f"{where}: {part} must be [1, 1, {tokens}, head_dim] like the query, got {list(tensor.shape)}"
            )
        if not tensor.is_floating_point():
            raise ValueError(f"{where}: {part} must be floating point, got {tensor.dtype}")
