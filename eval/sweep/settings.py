"""The settings of `xattn-video sweep`."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from xattn_video import XAttnConfig
from xattn_video_pipelines.common.errors import UserError
from xattn_video_pipelines.common.files import read_input
from xattn_video_pipelines.common.schema import parse_json
from xattn_video_pipelines.common.settings import Option, option_name, sparse_config
from xattn_video_pipelines.video import GenerateSettings, VideoPreset, VideoSettings, steps_or_share

# The option that gives an axis its values, by the setting of XAttnConfig that changes along it.
AXES = {
    "threshold": "thresholds", "stride": "strides", "warmup_steps": "warmup_steps", "residual": "residuals",
    "refresh_every": "refresh_every", "anchors": "anchors", "threshold_ramp": "threshold_ramps",
    "keep_masks": "keep_masks",
}  # fmt: skip
# What is swept where nothing is asked for.
_USUAL: dict[str, tuple[Any, ...]] = {
    "threshold": (0.5, 0.7, 0.8, 0.9, 0.95, 0.99), "stride": (4, 8, 16, 32), "warmup_steps": (0, 2, 5, 8),
}  # fmt: skip
_GROUP = "axes; base point: --preset, else threshold 0.9, stride 8, warm-up 5"
_POINTS = "further points"
_MEASURING = "measuring"


def _axis(setting: str, metavar: str = "N") -> Option:
    usual = " ".join(map(str, _USUAL.get(setting, ())))
    text = f"of XAttnConfig.{setting}" + (f"; without any axis or further point: {usual}" if usual else "")
    return Option(text, _GROUP, metavar=metavar)


@dataclass(frozen=True, kw_only=True)
class SweepSettings(VideoSettings):
    """`VideoSettings`, the values along each axis, further points, and what is measured.

    One axis at a time is gone through, around the base point; with `grid` every combination. An axis without values
    stays at the base point. Without any axis or further point thresholds, strides and warm-up steps are swept.
    """

    out: Annotated[Path, Option("folder of the videos and the tables", metavar="DIR")] = Path("sweep")
    thresholds: Annotated[tuple[float, ...], _axis("threshold")] = ()
    strides: Annotated[tuple[int, ...], _axis("stride")] = ()
    warmup_steps: Annotated[tuple[int, ...], _axis("warmup_steps")] = ()
    residuals: Annotated[tuple[Literal["off", "int4", "fp8", "full"], ...], _axis("residual", "KIND")] = ()
    refresh_every: Annotated[tuple[float, ...], _axis("refresh_every")] = ()
    anchors: Annotated[tuple[int, ...], _axis("anchors")] = ()
    threshold_ramps: Annotated[tuple[float, ...], _axis("threshold_ramp")] = ()
    keep_masks: Annotated[tuple[int, ...], _axis("keep_masks")] = ()
    grid: Annotated[bool, Option("every combination, not one axis at a time", _GROUP)] = False
    presets: Annotated[tuple[VideoPreset, ...], Option("whole presets", _POINTS, metavar="NAME")] = ()
    points: Annotated[
        Path | None,
        Option(
            'JSON with settings of XAttnConfig by name, as {"plain": {"threshold": 0.8}}; "preset" may be among them',
            _POINTS,
            metavar="FILE",
        ),
    ] = None
    lpips: Annotated[bool, Option("PSNR and SSIM only", _MEASURING)] = True
    floor: Annotated[bool, Option("leave the noise floor's videos out", _MEASURING)] = True
    plot: Annotated[bool, Option("no picture; without it matplotlib is not needed", _MEASURING)] = True

    @property
    def configs(self) -> list[XAttnConfig]:
        """`configs_at` the usual number of steps. Raises UserError as that."""
        return self.configs_at(None)

    def configs_at(self, steps: int | None) -> list[XAttnConfig]:
        """The configurations of the sweep, each once: the base point, then along each axis or the grid, then the named.

        The base point without a preset is that of `XAttnConfig`. Where its warm-up would cover all steps, it has a
        quarter of them.

        Args:
            steps: denoising steps of a video; None where they are not known.

        Raises:
            UserError: a value that `XAttnConfig` refuses, or the file of further points cannot be read.
        """
        axes: dict[str, tuple[Any, ...]] = {name: getattr(self, option) for name, option in AXES.items()}
        axes["refresh_every"] = tuple(steps_or_share(value) for value in self.refresh_every)
        axes = {name: values for name, values in axes.items() if values}
        if not axes and not self.presets and self.points is None:
            axes = _USUAL
        self._check_refreshed(axes)
        base = {}
        if self.preset is None and steps is not None and steps <= XAttnConfig.warmup_steps:
            base = {"warmup_steps": steps // 4}
        if self.grid:
            points = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
        else:
            points = [{}] + [{name: value} for name, values in axes.items() for value in values]
        return list(dict.fromkeys([*(self._config(self.preset, base | point) for point in points), *self.names]))

    @property
    def names(self) -> dict[XAttnConfig, str]:
        """The names of the points that have one: presets and those of the file. Raises UserError as `configs`."""
        presets = [name for name in (self.preset, *self.presets) if name is not None]
        found = [(self._config(name, {}), str(name)) for name in presets]
        for name, values in ({} if self.points is None else _read(self.points)).items():
            try:
                found.append((self._config(values.pop("preset", None), values), name))
            except UserError as error:
                raise UserError(f"--points {self.points}: {name}: {error}") from None
        names: dict[XAttnConfig, str] = {}
        for config, name in found:
            same = names.setdefault(config, name)
            if same != name:
                names[config] = f"{same}, {name}"
        return names

    def _config(self, preset: str | None, values: dict[str, Any]) -> XAttnConfig:
        given = {"block_size": self.block_size, "min_tokens": self.min_tokens}
        given = {name: value for name, value in given.items() if value is not None}
        return sparse_config(preset, **{**given, **values}).for_videos()

    def _check_refreshed(self, axes: dict[str, tuple[Any, ...]]) -> None:
        """Say what is missing where the axis of refreshes meets a point without a residual."""
        if "refresh_every" not in axes:
            return
        base = (self._config(self.preset, {}).residual,)
        if "off" in (axes.get("residual", base) if self.grid else base):
            raise UserError(
                f"{option_name('refresh_every')} needs a residual at the base point (with --grid at each point), got "
                "residual off; --preset balanced has one"
            )

    @property
    def of_videos(self) -> GenerateSettings:
        """What the videos are made with. Lossless copies are written too, because measures are taken from them."""
        shared = {field.name: getattr(self, field.name) for field in fields(VideoSettings)}
        return GenerateSettings(**shared, lossless=True)

    def check(self) -> None:
        super().check()
        _ = self.configs


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """Settings by name. Raises UserError."""
    try:
        document = parse_json(read_input(path))
    except UserError as error:
        raise UserError(f"--points {error}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"--points {path}: cannot be read: {error}") from None
    if not isinstance(document, dict) or not all(isinstance(values, dict) for values in document.values()):
        raise UserError(f"--points {path}: must hold an object of objects, settings of XAttnConfig by name")
    return document
