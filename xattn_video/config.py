"""XAttnConfig: every setting of one XAttention run, checked once, when it is made."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SELECTIONS = ("threshold", "top_k", "top_ratio")
BACKENDS = ("auto", "reference", "cpu", "triton", "triton-hopper", "flex", "fa4")

# The settings under which the paper reports each model family (its section 4.1).
PRESETS: dict[str, dict[str, Any]] = {
    "hunyuan-video": {"stride": 8, "threshold": 0.9, "warmup_steps": 5},
    "wan": {"stride": 8, "threshold": 0.9, "warmup_steps": 5},
    "qwen2-vl": {"stride": 16, "threshold": 0.9, "warmup_steps": 0},
    "language": {"stride": 8, "threshold": 0.9, "warmup_steps": 0},
}


@dataclass(frozen=True)
class XAttnConfig:
    """Settings of XAttention.

    Args:
        stride: side `S` of the tiles whose antidiagonals are summed, in tokens; a power of two that divides
            `block_size`. Scoring costs `1 / (2 * stride)` of dense attention.
        block_size: side `P` of the blocks that are kept or skipped, in tokens; a power of two.
        threshold: share tau of a query block's score mass that the kept blocks must hold, in (0, 1]; a tuple
            gives one a query head. 1 keeps every valid block.
        warmup_steps: denoising steps, counted from the first one run, that stay dense.
        dense_layers: layers that stay dense: indices in forward order, or fnmatch patterns on module paths.
        min_tokens: key lengths below this stay dense.
        dense_last: query tokens at the end of a causal call whose blocks keep every valid block: the question at
            the end of a long prompt. Its few rows are scored worst of all (one group of `stride` rows may hold
            all of it) and cost least. 0, as in the paper, treats them like all others. A prompt in chunks has as
            many ends, and padding on the right counts as tokens. Without effect on video models: not causal.
        selection: `"threshold"`, or for ablations `"top_k"` (needs `top_k`) or `"top_ratio"` (needs `top_ratio`).
        top_k: key blocks kept a query block.
        top_ratio: share of the valid key blocks kept a query block, in (0, 1].
        backend: `"auto"` (Triton on a GPU, the CPU path on a CPU), `"triton"`, `"cpu"`, `"flex"` (torch's
            FlexAttention attends, the device's own backend scores and selects), `"fa4"` (the package flash-attn-4
            attends on NVIDIA GPUs of compute capability 9.x and 10.x, Triton scores and selects), `"triton-hopper"`
            (`"triton"`, but always with the attention kernel for H100 and H200, whether or not it was measured to be
            faster; what that kernel cannot do raises) or `"reference"`.
        max_extra_mib: bound in MiB on what grows with the square of the length in one call: scores, lists and masks of
            blocks. A call that would take more is done in chunks of query blocks, which may round the last digit
            otherwise. `chunks.py` says what a backend needs beside them.

    Raises:
        ValueError: a setting is out of its range; the message names it.
        TypeError: a setting has the wrong type.
    """

    stride: int = 8
    block_size: int = 128
    threshold: float | tuple[float, ...] = 0.9
    warmup_steps: int = 5
    dense_layers: tuple[int | str, ...] = ()
    min_tokens: int = 1024
    dense_last: int = 0
    selection: str = "threshold"
    top_k: int | None = None
    top_ratio: float | None = None
    backend: str = "auto"
    max_extra_mib: int = 256

    def __post_init__(self) -> None:
        for name in ("stride", "block_size", "warmup_steps", "min_tokens", "dense_last", "max_extra_mib"):
            _check_integer(name, getattr(self, name))
        check_geometry(self.stride, self.block_size)
        object.__setattr__(self, "threshold", _checked_threshold(self.threshold))
        for name in ("warmup_steps", "min_tokens", "dense_last"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        if isinstance(self.dense_layers, (str, int)):
            raise TypeError(f"dense_layers must be a sequence of indices or patterns, got {self.dense_layers!r}")
        object.__setattr__(self, "dense_layers", tuple(self.dense_layers))
        for layer in self.dense_layers:
            if isinstance(layer, bool) or not isinstance(layer, (int, str)):
                raise TypeError(f"dense_layers holds indices or patterns, got {layer!r}")
        check_selection(self.selection, self.top_k, self.top_ratio)
        if self.backend not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {self.backend!r}")
        if self.max_extra_mib < 1:
            raise ValueError(f"max_extra_mib must be 1 or more, got {self.max_extra_mib}")

    def replace(self, **changes: Any) -> XAttnConfig:
        """A copy with some settings changed, checked again."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """All settings as JSON-ready values."""
        values = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> XAttnConfig:
        """The inverse of `to_dict`. Raises `ValueError` for a name that is no setting."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"unknown settings {', '.join(unknown)}; known are {', '.join(sorted(known))}")
        return cls(**values)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> XAttnConfig:
        """The paper's settings for a model family (`hunyuan-video`, `wan`, `qwen2-vl`, `language`)."""
        if name not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(sorted(PRESETS))}, got {name!r}")
        return cls(**{**PRESETS[name], **changes})

    def label(self) -> str:
        """A short name for folders and tables, such as `xattn-s8-t0.90-w5`.

        Settings that differ from the defaults are added, so that two configurations never share a name
        (per-head thresholds by their mean and a digest).
        """
        parts = [f"xattn-s{self.stride}", self._rule_label(), f"w{self.warmup_steps}"]
        if self.block_size != 128:
            parts.append(f"b{self.block_size}")
        if self.min_tokens != 1024:
            parts.append(f"m{self.min_tokens}")
        if self.dense_last:
            parts.append(f"q{self.dense_last}")
        if self.dense_layers:
            parts.append(f"d{_digest(self.dense_layers)}")
        if self.backend != "auto":
            parts.append(self.backend)
        if self.max_extra_mib != 256:
            parts.append(f"x{self.max_extra_mib}")
        return "-".join(parts)

    def _rule_label(self) -> str:
        if self.selection == "top_k":
            return f"k{self.top_k}"
        if self.selection == "top_ratio":
            return f"r{_decimal(self.top_ratio)}"
        if isinstance(self.threshold, tuple):
            mean = sum(self.threshold) / len(self.threshold)
            return f"t{mean:.2f}h{_digest(self.threshold)}"
        return f"t{_decimal(self.threshold)}"


def check_geometry(stride: int, block_size: int) -> None:
    """Raise `ValueError` unless both are powers of two and stride divides block_size."""
    for name, value in (("stride", stride), ("block_size", block_size)):
        if value < 1 or value & (value - 1):
            raise ValueError(f"{name} must be a power of two, got {value}")
    if block_size % stride:
        raise ValueError(f"stride must divide block_size, got stride {stride} and block_size {block_size}")


def check_selection(selection: str, top_k: int | None, top_ratio: float | None) -> None:
    """Raise `ValueError` unless the rule is known and has the one number that it needs."""
    if selection not in SELECTIONS:
        raise ValueError(f"selection must be one of {', '.join(SELECTIONS)}, got {selection!r}")
    if (top_k is not None) != (selection == "top_k") or (top_ratio is not None) != (selection == "top_ratio"):
        raise ValueError(
            f"top_k and top_ratio go with the selection of their name, got selection {selection!r}, "
            f"top_k {top_k!r}, top_ratio {top_ratio!r}"
        )
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be 1 or more, got {top_k}")
    if top_ratio is not None and not 0 < top_ratio <= 1:
        raise ValueError(f"top_ratio must be in (0, 1], got {top_ratio}")


def _check_integer(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")


def _checked_threshold(threshold: object) -> float | tuple[float, ...]:
    values = tuple(threshold) if isinstance(threshold, (tuple, list)) else (threshold,)
    if not values:
        raise ValueError("threshold must hold at least one value, got an empty sequence")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"threshold must be a number or a sequence of numbers, got {value!r}")
        if not 0 < value <= 1:
            raise ValueError(f"threshold must be in (0, 1], got {value}")
    numbers = tuple(float(value) for value in values)
    return numbers if isinstance(threshold, (tuple, list)) else numbers[0]


def _decimal(value: float | None) -> str:
    """Two decimals, more where two would not tell the value."""
    short = f"{value:.2f}"
    return short if float(short) == value else repr(value)


def _digest(values: tuple[object, ...]) -> str:
    import hashlib

    return hashlib.sha256(repr(values).encode()).hexdigest()[:6]
