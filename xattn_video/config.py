"""XAttnConfig: every setting of one XAttention run, checked once, when it is made."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, TypeVar, Unpack

from .thresholds import HeadThresholds

SELECTIONS = ("threshold", "top_k", "top_ratio")
BACKENDS = ("auto", "reference", "cpu", "triton", "triton-hopper", "flex", "fa4")
RESIDUALS = ("off", "int4", "fp8", "full")
REFRESHES = ("growing", "fixed")

_INTEGERS = (
    "stride", "block_size", "warmup_steps", "last_steps", "min_tokens", "dense_last", "keep_masks", "max_extra_mib",
)  # fmt: skip

# From this threshold on a video gains nothing from anchors (docs/quality.md, "Residual memory").
_ANCHORED_BELOW = 0.9

# What the three presets of this package for videos have in common.
_REMEMBERING = {
    "threshold": 0.2, "warmup_steps": 4, "warmup": 0.25, "anchors": 1,
    "residual": "int4", "refresh": "growing", "extrapolate": True,
}  # fmt: skip

# The settings under which the paper reports each model family (its section 4.1), then this package's own for videos,
# from the fastest to the one that stays closest to dense attention. docs/quality.md has what they gave.
PRESETS: dict[str, dict[str, Any]] = {
    "hunyuan-video": {"stride": 8, "threshold": 0.9, "warmup_steps": 5},
    "wan": {"stride": 8, "threshold": 0.9, "warmup_steps": 5},
    "qwen2-vl": {"stride": 16, "threshold": 0.9, "warmup_steps": 0},
    "language": {"stride": 8, "threshold": 0.9, "warmup_steps": 0},
    "fast": {**_REMEMBERING, "refresh_every": 0.25},
    "balanced": {**_REMEMBERING, "refresh_every": 0.15},
    "faithful": {**_REMEMBERING, "refresh_every": 0.15, "threshold": 0.5},
}

# Names of models as `xattn-video generate --model` takes them -> the preset of their family.
MODEL_PRESETS = {
    "wan2.1-1.3b": "wan", "wan2.1-14b": "wan", "wan2.2-a14b": "wan", "wan2.2-5b": "wan", "demo": "wan",
    "hunyuan-video-1.5": "hunyuan-video",
}  # fmt: skip

# Settings that `repr` shows whether or not they are the defaults.
_ALWAYS_SHOWN = {"stride", "threshold", "warmup_steps"}

# Settings that only have a meaning with a residual.
_OF_RESIDUAL = {"refresh", "refresh_every", "extrapolate", "residual_mib"}


class Settings(TypedDict, total=False):
    """The settings of `XAttnConfig` as keyword arguments, so that editors complete them and type checkers see them."""

    stride: int
    block_size: int
    threshold: float | tuple[float, ...] | HeadThresholds | str | Path
    warmup_steps: int
    dense_layers: tuple[int | str, ...]
    min_tokens: int
    dense_last: int
    warmup: float | None
    last_steps: int
    anchors: int | None
    threshold_ramp: float
    keep_masks: int
    per_head: bool
    residual: str
    refresh: str | tuple[int, ...] | None
    refresh_every: int | float | None
    extrapolate: bool
    residual_mib: int | None
    selection: str
    top_k: int | None
    top_ratio: float | None
    backend: str
    max_extra_mib: int


Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class XAttnConfig:
    """Settings of XAttention.

    Args:
        stride: how coarsely blocks are scored: the side of the small tiles whose antidiagonals are summed, in tokens; a
            power of two that divides `block_size`. Larger is cheaper and less exact: scoring costs `1 / (2 * stride)`
            of dense attention.
        block_size: side of the blocks of the attention matrix that are kept or skipped, in tokens; a power of two.
        threshold: how much attention is kept: the share of a query block's score mass that the kept blocks must hold,
            in (0, 1]. Lower is faster and further from dense attention; 1 keeps every block. A tuple has one for each
            query head. A path names a file that `xattn-video calibrate` wrote, with thresholds for every layer and head
            of one model: it is read once, here, and the setting then is its `HeadThresholds`. Such thresholds go with
            the stride and the block size that they were measured with.
        warmup_steps: first denoising steps of a video that stay dense, counted from the first one that is run.
        warmup: the largest share of all steps that the warm-up may take, between 0 and 1; None sets no limit. For
            models of 4 to 8 steps 0.25 is a good choice; at least one step stays dense. It needs a pipeline, whose
            scheduler tells the number of steps, or `processor.start_generation(steps=...)`.
        last_steps: denoising steps at the end that stay dense; needs the number of steps, like `warmup`.
        dense_layers: layers that stay dense: indices in forward order, or fnmatch patterns on module paths.
        min_tokens: calls with fewer keys than this stay dense, since short ones gain nothing.
        dense_last: query tokens at the end of a causal call whose blocks keep every valid block: the question at
            the end of a long prompt. Its few rows are scored worst of all (one group of `stride` rows may hold
            all of it) and cost least. 0, as in the paper, treats them like all others. A prompt in chunks has as
            many ends, and padding on the right counts as tokens. Without effect on video models: not causal.
        anchors: key blocks kept on each side of a query block's own one, and as many latent frames before and after
            it the blocks at the same place; 0 leaves the choice to the scores. The own block is kept too. Frames are
            known for models whose tokens are a grid of whole frames (`frame_tokens` in `xattention`). None is 1 for
            video models whose threshold is one number below 0.9, and 0 for all else.
        threshold_ramp: how far the threshold falls over the sparse steps of a video: from `threshold` plus half of it
            to `threshold` minus half of it, within 0.01 to 0.999. It needs the number of steps, like `warmup`, and goes
            without a residual.
        keep_masks: sparse steps for which a choice of blocks is kept; 1 chooses in each step.
        per_head: choose a threshold for each layer and head in the last dense step of each video, around `threshold`
            and with the density that it alone would have there: higher ones for heads whose error weighs more. In that
            step attention takes a bit less than twice its time. A layer that does not run in it (of the second
            transformer of Wan 2.2, or one that a step cache skips) keeps `threshold`. It goes without a residual.
        residual: remember what the kept blocks miss, and add it to the output of sparse steps: `"off"`, or how it is
            stored: `"int4"` (half a byte per number), `"fp8"`, or `"full"` (as the model computes). What is missed is
            found in dense steps, the refreshes: the last step of the warm-up is the first one. The choice of blocks is
            then kept for the whole video. A refresh costs as much as dense attention. Video models only.
        refresh: which sparse steps refresh: `"growing"` (gaps of 1, 2, 3 and then always 4 steps, where `refresh_every`
            is 4; below 3 they stay the same), `"fixed"` (each layer every `refresh_every` steps, layer after layer), or
            the sparse steps themselves as numbers from 0. None is `"fixed"` where `refresh_every` is given, else
            `"growing"`.
        refresh_every: the largest gap between two refreshes: a number of steps, or below 1 a share of all steps. None
            is 0.2. Where the number of steps is not known, it is taken for 20. 1 makes every step dense.
        extrapolate: continue the change between the last two refreshes, by one such gap at most. It doubles the memory
            of the residual.
        residual_mib: bound in MiB on what residuals may take. None is what is left on the GPU. Layers whose residual
            does not fit choose blocks in each step instead, at a threshold of 0.9 at least; the statistics count them.
        selection: `"threshold"`, or for ablations `"top_k"` (needs `top_k`) or `"top_ratio"` (needs `top_ratio`).
        top_k: key blocks that are kept for each query block.
        top_ratio: share of the valid key blocks that is kept for each query block, in (0, 1].
        backend: `"auto"` (Triton on a GPU, the CPU path on a CPU), `"triton"`, `"cpu"`, `"flex"` (torch's
            FlexAttention attends, the device's own backend scores and selects), `"fa4"` (the package flash-attn-4
            attends on NVIDIA GPUs of compute capability 9.x and 10.x, Triton scores and selects), `"triton-hopper"`
            (`"triton"`, but always with the attention kernel for H100 and H200, whether or not it was measured to be
            faster; what that kernel cannot do raises) or `"reference"`.
        max_extra_mib: bound in MiB on what grows with the square of the length in one call: scores, lists and masks of
            blocks. A call that would take more is done in chunks of query blocks, which may round the last digit
            otherwise.

    Raises:
        ValueError: a setting is out of its range, or a file of thresholds is missing or broken; the message names it.
        TypeError: a setting has the wrong type.
    """

    stride: int = 8
    block_size: int = 128
    threshold: float | tuple[float, ...] | HeadThresholds | str | Path = 0.9
    warmup_steps: int = 5
    dense_layers: tuple[int | str, ...] = ()
    min_tokens: int = 1024
    dense_last: int = 0
    warmup: float | None = None
    last_steps: int = 0
    anchors: int | None = None
    threshold_ramp: float = 0.0
    keep_masks: int = 1
    per_head: bool = False
    residual: str = "off"
    refresh: str | tuple[int, ...] | None = None
    refresh_every: int | float | None = None
    extrapolate: bool = False
    residual_mib: int | None = None
    selection: str = "threshold"
    top_k: int | None = None
    top_ratio: float | None = None
    backend: str = "auto"
    max_extra_mib: int = 256

    def __post_init__(self) -> None:
        for name in _INTEGERS:
            _check_integer(name, getattr(self, name))
        check_geometry(self.stride, self.block_size)
        object.__setattr__(self, "threshold", _checked_threshold(self.threshold))
        if isinstance(self.threshold, HeadThresholds):
            for name in ("stride", "block_size"):
                own, measured = getattr(self, name), getattr(self.threshold, name)
                if own != measured:
                    raise ValueError(
                        f"{name} must be the one that the thresholds of {self.threshold.model} were measured with, "
                        f"{measured}, got {own}"
                    )
        if self.anchors is not None:
            _check_integer("anchors", self.anchors)
        for name in ("warmup_steps", "last_steps", "min_tokens", "dense_last", "anchors"):
            if (getattr(self, name) or 0) < 0:
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
        for name in ("max_extra_mib", "keep_masks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        _check_share("warmup", self.warmup)
        _check_ramp(self.threshold_ramp, self.selection)
        _check_per_head(self)
        object.__setattr__(self, "refresh", _checked_refresh(self.refresh))
        _check_residual(self)

    def __repr__(self) -> str:
        # all the others have their defaults, and would hide what was chosen
        chosen = [
            f"{field.name}={getattr(self, field.name)!r}"
            for field in dataclasses.fields(self)
            if field.name in _ALWAYS_SHOWN or getattr(self, field.name) != field.default
        ]
        return f"XAttnConfig({', '.join(chosen)})"

    def replace(self, **changes: Unpack[Settings]) -> XAttnConfig:
        """A copy with some settings changed, checked again."""
        return dataclasses.replace(self, **changes)

    def for_videos(self) -> XAttnConfig:
        """These settings as a video model has them: with a number in `anchors`, also where it was None."""
        if self.anchors is not None:
            return self
        return self.replace(anchors=usual_anchors(self.threshold) if self.selection == "threshold" else 0)

    def to_dict(self) -> dict[str, Any]:
        """All settings as JSON-ready values."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        if isinstance(self.threshold, HeadThresholds):
            values["threshold"] = self.threshold.to_dict()
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> XAttnConfig:
        """The inverse of `to_dict`, which reads no file. Raises `ValueError` for a name that is no setting."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = set(values) - known
        if unknown:
            named = ", ".join(name_nearest(unknown, known))
            raise ValueError(f"unknown settings {named}; known are {', '.join(sorted(known))}")
        threshold = values.get("threshold")
        if isinstance(threshold, Mapping):
            values = {**values, "threshold": HeadThresholds.from_dict(threshold)}
        return cls(**values)

    @classmethod
    def preset(cls, name: str, **changes: Unpack[Settings]) -> XAttnConfig:
        """Settings under a name, with some changed.

        Args:
            name: of the paper's settings for a model family (`hunyuan-video`, `wan`, `qwen2-vl`, `language`), also by
                the name of a model (`wan2.1-1.3b`, as `xattn-video generate --model` takes it); or `fast`, `balanced`
                or `faithful`: settings for video models with a residual.
            changes: settings that replace the preset's. `residual="off"` also leaves out the preset's settings of the
                residual, and a list of steps in `refresh` its `refresh_every`.

        Raises:
            ValueError: no such preset, or a change that is no setting or out of its range.
        """
        known = sorted({*PRESETS, *MODEL_PRESETS})
        if name not in known:
            raise ValueError(f"preset must be one of {', '.join(known)}, got {name_nearest([name], known)[0]}")
        dropped = _OF_RESIDUAL if changes.get("residual") == "off" else set()
        if isinstance(changes.get("refresh"), (tuple, list)):
            dropped = {*dropped, "refresh_every"}
        preset = PRESETS[MODEL_PRESETS.get(name, name)]
        values = {setting: value for setting, value in preset.items() if setting not in dropped}
        return cls.from_dict({**values, **changes})

    @property
    def call_threshold(self) -> float | tuple[float, ...]:
        """`threshold` of one attention call.

        Raises:
            ValueError: it is of a file, which has other values for every layer: see `layer_threshold`.
        """
        if isinstance(self.threshold, (float, tuple)):
            return self.threshold
        raise ValueError(
            "threshold must be a number or one value per head for a single attention call, got thresholds for every "
            "layer of a model; attach them to that model"
        )

    def layer_threshold(self, layer: str) -> float | tuple[float, ...]:
        """`threshold` of a model's layer by its name, which only matters where the thresholds are of a file.

        Raises:
            ValueError: the file has no such layer.
        """
        return self.threshold.of_layer(layer) if isinstance(self.threshold, HeadThresholds) else self.call_threshold

    def label(self) -> str:
        """A short name for folders and tables, such as `xattn-s8-t0.90-w5`.

        Settings that differ from the defaults are added, so that two configurations never share a name
        (thresholds that differ per head or layer by their mean and a digest). Anchors are those of `for_videos()`.
        """
        warmup = f"w{self.warmup_steps}"
        if self.warmup is not None:
            # with the most steps that the share may be, where they are not the usual ones
            warmup = f"w{_decimal(self.warmup)}" + ("" if self.warmup_steps == 5 else f"u{self.warmup_steps}")
        parts = [f"xattn-s{self.stride}", self._rule_label(), warmup]
        if self.block_size != 128:
            parts.append(f"b{self.block_size}")
        if self.min_tokens != 1024:
            parts.append(f"m{self.min_tokens}")
        if self.dense_last:
            parts.append(f"q{self.dense_last}")
        if self.last_steps:
            parts.append(f"l{self.last_steps}")
        if anchors := self.for_videos().anchors:
            parts.append(f"a{anchors}")
        if self.threshold_ramp:
            parts.append(f"f{_decimal(self.threshold_ramp)}")
        if self.keep_masks != 1:
            parts.append(f"n{self.keep_masks}")
        if self.per_head:
            parts.append("heads")
        if self.residual != "off":
            parts.append(self._residual_label())
        if self.dense_layers:
            parts.append(f"d{_digest(self.dense_layers)}")
        if self.backend != "auto":
            parts.append(self.backend)
        if self.max_extra_mib != 256:
            parts.append(f"x{self.max_extra_mib}")
        return "-".join(parts)

    def _residual_label(self) -> str:
        often = "" if self.refresh_every is None else str(self.refresh_every)
        if isinstance(self.refresh, tuple):
            often = _digest(self.refresh)
        elif self.refresh_rule == "growing":
            often = f"g{often}"
        most = "" if self.residual_mib is None else f"m{self.residual_mib}"
        return f"{self.residual}{often}{'e' if self.extrapolate else ''}{most}"

    @property
    def refresh_rule(self) -> str | tuple[int, ...]:
        """Which sparse steps refresh: `refresh`, or what its None stands for."""
        return self.refresh or ("growing" if self.refresh_every is None else "fixed")

    def _rule_label(self) -> str:
        if self.selection == "top_k":
            return f"k{self.top_k}"
        if self.selection == "top_ratio":
            return f"r{_decimal(self.top_ratio)}"
        if isinstance(self.threshold, HeadThresholds):
            return f"t{self.threshold.mean:.2f}f{self.threshold.digest}"
        if isinstance(self.threshold, tuple):
            mean = sum(self.threshold) / len(self.threshold)
            return f"t{mean:.2f}h{_digest(self.threshold)}"
        assert isinstance(self.threshold, float)
        return f"t{_decimal(self.threshold)}"


def usual_anchors(threshold: object) -> int:
    """`anchors` of a video model where none are given: 1 where the threshold is one number below 0.9, else 0."""
    return int(isinstance(threshold, float) and threshold < _ANCHORED_BELOW)


def name_nearest(unknown: Iterable[str], known: Iterable[str]) -> list[str]:
    """Names that are not known, each with the known one that is most like it: `treshold (did you mean threshold?)`."""
    known = list(known)
    found = [(name, difflib.get_close_matches(name, known, 1)) for name in sorted(unknown)]
    return [f"{name} (did you mean {nearest[0]}?)" if nearest else name for name, nearest in found]


def lists_settings(function: Function) -> Function:
    """Let the signature of a function that takes `**settings` name them, with the defaults of `XAttnConfig`."""
    signature = inspect.signature(function)
    own = [value for value in signature.parameters.values() if value.kind is not inspect.Parameter.VAR_KEYWORD]
    settings = [
        inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type)
        for field in dataclasses.fields(XAttnConfig)
    ]
    function.__signature__ = signature.replace(parameters=[*own, *settings])  # type: ignore[attr-defined]
    return function


def describe_settings() -> str:
    """The part of a docstring that says what each setting is for: that of `XAttnConfig`, under a heading of its own."""
    document = XAttnConfig.__doc__ or ""
    return "    Settings:\n" + document.partition("Args:\n")[2].partition("\n    Raises:")[0]


def _refusing_unknown(init: Callable[..., None]) -> Callable[..., None]:
    """`XAttnConfig.__init__`, which all ways to give settings end in, with an error that names the nearest setting."""
    known = [field.name for field in dataclasses.fields(XAttnConfig)]

    @functools.wraps(init)
    def checked(self: XAttnConfig, *args: Any, **settings: Any) -> None:
        unknown = [name for name in settings if name not in known]
        if unknown:
            named = ", ".join(name_nearest(unknown, known))
            raise TypeError(f"XAttnConfig has no setting {named}; it has {', '.join(known)}")
        init(self, *args, **settings)

    return checked


XAttnConfig.__init__ = _refusing_unknown(XAttnConfig.__init__)  # type: ignore[method-assign]


def not_percent(value: float) -> str:
    """The end of a message about a share that is more than 1: what was meant, if it looks like percent.

    >>> not_percent(90)
    '; 0.9, not 90?'
    """
    return f"; {value / 100:g}, not {value:g}?" if 10 <= value <= 100 else ""


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
        raise ValueError(f"top_ratio must be in (0, 1], got {top_ratio}{not_percent(top_ratio)}")


def _check_share(name: str, value: object) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number or None, got {value!r}")
    if not 0 < value < 1:
        raise ValueError(f"{name} must be between 0 and 1, a share of all steps, got {value}{not_percent(value)}")


def _check_ramp(value: object, selection: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"threshold_ramp must be a number, got {value!r}")
    if not -1 <= value <= 1:
        raise ValueError(f"threshold_ramp must be from -1 to 1, got {value}{not_percent(value)}")
    if value and selection != "threshold":
        raise ValueError(f"threshold_ramp goes with selection 'threshold', got {value} and selection {selection!r}")


def _check_per_head(config: XAttnConfig) -> None:
    if not isinstance(config.per_head, bool):
        raise TypeError(f"per_head must be True or False, got {config.per_head!r}")
    if not config.per_head:
        return
    if config.selection != "threshold" or not isinstance(config.threshold, float) or config.threshold == 1:
        raise ValueError(
            "per_head goes with one threshold below 1, which it shares out among the heads, got selection "
            f"{config.selection!r} and threshold {config.threshold!r}"
        )
    if config.residual != "off":
        raise ValueError(f"per_head goes without a residual, got residual {config.residual!r}")
    if not config.warmup_steps:
        raise ValueError("per_head needs a dense step to measure in, got warmup_steps 0")


def _checked_refresh(refresh: object) -> str | tuple[int, ...] | None:
    if refresh is None or (isinstance(refresh, str) and refresh in REFRESHES):
        return refresh
    if not isinstance(refresh, (tuple, list)):
        raise ValueError(f"refresh must be one of {', '.join(REFRESHES)} or a sequence of steps, got {refresh!r}")
    for step in refresh:
        _check_integer("refresh", step)
    steps = tuple(refresh)
    if not steps or steps[0] < 0 or any(left >= right for left, right in itertools.pairwise(steps)):
        raise ValueError(f"refresh must hold sparse steps in rising order from 0, got {steps}")
    return steps


def _check_residual(config: XAttnConfig) -> None:
    if config.residual not in RESIDUALS:
        raise ValueError(f"residual must be one of {', '.join(RESIDUALS)}, got {config.residual!r}")
    if not isinstance(config.extrapolate, bool):
        raise TypeError(f"extrapolate must be True or False, got {config.extrapolate!r}")
    if config.residual_mib is not None:
        _check_integer("residual_mib", config.residual_mib)
        if config.residual_mib < 1:
            raise ValueError(f"residual_mib must be 1 or more, got {config.residual_mib}")
    every = config.refresh_every
    if every is not None and not (isinstance(every, float) and 0 < every < 1):
        if isinstance(every, float):
            raise ValueError(f"refresh_every must be a number of steps from 1 or a share between 0 and 1, got {every}")
        _check_integer("refresh_every", every)
        if every < 1:
            raise ValueError(f"refresh_every must be a number of steps from 1 or a share between 0 and 1, got {every}")
    if config.refresh_every is not None and isinstance(config.refresh, tuple):
        raise ValueError(f"refresh_every goes without a list of steps in refresh, got {config.refresh_every}")
    if config.refresh == "fixed" and config.refresh_every is None:
        raise ValueError("refresh='fixed' needs refresh_every, the number of steps between two refreshes, got None")
    if config.residual == "off":
        for name, default in (
            ("refresh", None),
            ("refresh_every", None),
            ("extrapolate", False),
            ("residual_mib", None),
        ):
            if getattr(config, name) != default:
                raise ValueError(
                    f"{name} goes with a residual, got {name} {getattr(config, name)!r} and residual 'off'"
                )
    elif config.threshold_ramp:
        raise ValueError(
            "threshold_ramp goes without a residual, which chooses the blocks of a whole video at once, got "
            f"{config.threshold_ramp} and residual {config.residual!r}"
        )
    elif config.keep_masks != 1:
        raise ValueError(
            f"keep_masks goes without a residual, which keeps the blocks of a whole video, got {config.keep_masks} "
            f"and residual {config.residual!r}"
        )


def _check_integer(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")


def _checked_threshold(threshold: object) -> float | tuple[float, ...] | HeadThresholds:
    if isinstance(threshold, HeadThresholds):
        return threshold
    if isinstance(threshold, (str, Path)):
        # A number in quotes is a mistake that happens, and the name of no file.
        if _is_number(threshold):
            raise TypeError(f"threshold must be a number, a sequence of numbers or a file, got the text {threshold!r}")
        return HeadThresholds.load(threshold)
    values = tuple(threshold) if isinstance(threshold, (tuple, list)) else (threshold,)
    if not values:
        raise ValueError("threshold must hold at least one value, got an empty sequence")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"threshold must be a number or a sequence of numbers, got {value!r}")
        if not 0 < value <= 1:
            raise ValueError(f"threshold must be in (0, 1], got {value}{not_percent(value)}")
    numbers = tuple(float(value) for value in values)
    return numbers if isinstance(threshold, (tuple, list)) else numbers[0]


def _is_number(text: object) -> bool:
    try:
        float(str(text))
    except ValueError:
        return False
    return True


def _decimal(value: float | None) -> str:
    """Two decimals, more where two would not tell the value."""
    short = f"{value:.2f}"
    return short if float(short) == value else repr(value)


def _digest(values: tuple[object, ...]) -> str:
    import hashlib

    return hashlib.sha256(repr(values).encode()).hexdigest()[:6]
