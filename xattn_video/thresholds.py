"""A threshold for every layer and head of one model: the file that `xattn-video calibrate` writes.

The paper calls this minimum threshold prediction (its section 2.2): thresholds are found once, offline, and a run only
reads them.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

FORMAT = 1
# 200 layers of 128 heads take less than 2 MiB.
_MAX_BYTES = 16 << 20
_LARGEST = sys.float_info.max


@dataclass(frozen=True)
class LayerThresholds:
    """The thresholds of one layer, and what they gave where they were measured.

    Attributes:
        name: the layer's module path; for diffusers the transformer's name in its pipeline comes first, such as
            `transformer.blocks.0.attn1`.
        threshold: share of the score mass for each query head, in (0, 1].
        density: selected / valid blocks of each head, in [0, 1].
        error: norm of (sparse - dense output) / norm of the dense output of each head, 0 or more.
    """

    name: str
    threshold: tuple[float, ...]
    density: tuple[float, ...]
    error: tuple[float, ...]


@dataclass(frozen=True)
class HeadThresholds:
    """Thresholds of all layers and heads of one model, for `XAttnConfig(threshold=...)`.

    Attributes:
        model: what the model was loaded as: a known name, a folder's name or a Hub id. It is only told, not checked.
        model_class: name of the model's class, such as `WanTransformer3DModel`.
        stride, block_size: the settings that the thresholds were measured with, and the only ones they are good for.
        budget: the mean error over all heads that was allowed.
        calibrated_on: the inputs, in words.
        versions: pairs of a package and its version.
        layers: one entry for each layer, in forward order.
    """

    model: str
    model_class: str
    stride: int
    block_size: int
    budget: float
    calibrated_on: str
    versions: tuple[tuple[str, str], ...]
    layers: tuple[LayerThresholds, ...]

    def __repr__(self) -> str:
        # the numbers of all layers would fill the screen
        return f"<HeadThresholds of {self.model}: {len(self.layers)} layers, mean {self.mean:.2f}>"

    @classmethod
    def load(cls, path: str | Path) -> HeadThresholds:
        """Read a file that `xattn-video calibrate` wrote, or one with the text of `to_json`.

        Raises:
            ValueError: there is no such file, or it is not one of these; the message names file, field, rule and value.
        """
        path = Path(path)
        if path.exists() and not path.is_file() and not path.is_dir():
            # Reading a pipe would wait for a writer.
            raise ValueError(f"threshold file {path}: must be a regular file, and not a device or a pipe")
        try:
            with open(path, "rb") as file:
                content = file.read(_MAX_BYTES + 1)
        except OSError as error:
            raise ValueError(f"threshold file {path}: {error.strerror or error}") from None
        if len(content) > _MAX_BYTES:
            raise ValueError(f"threshold file {path}: must be at most {_MAX_BYTES:,} bytes, and it is larger")
        try:
            values = json.loads(content.decode("utf-8"), parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"threshold file {path}: must be JSON, but: {error}") from None
        try:
            return cls.from_dict(values)
        except ValueError as error:
            raise ValueError(f"threshold file {path}: {error}") from None

    @classmethod
    def from_dict(cls, values: Any) -> HeadThresholds:
        """The inverse of `to_dict`.

        Raises:
            ValueError: a field is missing, unknown, or of a wrong type or range; the message names field, rule and
                value.
        """
        given = _fields_of("the document", values, {"format", *(field.name for field in fields(cls))})
        if given["format"] != FORMAT:
            raise ValueError(f"format must be {FORMAT}, got {_shown(given['format'])}")
        layers = given["layers"]
        if not isinstance(layers, list) or not layers:
            raise ValueError(f"layers must be a list of at least one layer, got {_shown(layers)}")
        read = tuple(_layer(f"layers[{index}]", layer) for index, layer in enumerate(layers))
        names = [layer.name for layer in read]
        twice = next((name for index, name in enumerate(names) if name in names[:index]), None)
        if twice is not None:
            raise ValueError(f"layers must have different names, got {twice!r} twice")
        return cls(
            model=_text("model", given["model"]),
            model_class=_text("model_class", given["model_class"]),
            stride=_positive_integer("stride", given["stride"]),
            block_size=_positive_integer("block_size", given["block_size"]),
            budget=_number("budget", given["budget"], 0, _LARGEST),
            calibrated_on=_text("calibrated_on", given["calibrated_on"]),
            versions=_versions(given["versions"]),
            layers=read,
        )

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON-ready values."""
        values = {"format": FORMAT, **asdict(self), "versions": dict(self.versions)}
        values["layers"] = [
            {name: list(value) if isinstance(value, tuple) else value for name, value in vars(layer).items()}
            for layer in self.layers
        ]
        return values

    def to_json(self) -> str:
        """The text of the file: one line for each layer, so that people can read it."""
        values = self.to_dict()
        layers = ",\n".join(f"    {json.dumps(layer)}" for layer in values.pop("layers"))
        head = json.dumps(values, indent=2, allow_nan=False).removesuffix("\n}")
        return f'{head},\n  "layers": [\n{layers}\n  ]\n}}\n'

    def of_layer(self, name: str) -> tuple[float, ...]:
        """The thresholds of the heads of one layer. Raises ValueError where the file has no such layer."""
        found = next((layer.threshold for layer in self.layers if layer.name == name), None)
        if found is None:
            raise ValueError(f"threshold has no values for the layer {name!r}; {self._told}")
        return found

    def check_model(self, model_class: str, heads: Mapping[str, int | None], part: str = "") -> None:
        """Refuse a model that these thresholds were not measured on.

        Args:
            model_class: name of the model's class.
            heads: number of query heads for each layer by its name here; None where it is not known.
            part: only layers whose name begins with this are the model's, such as `transformer.`.

        Raises:
            ValueError: class, layers or numbers of heads differ.
        """
        if model_class != self.model_class:
            raise ValueError(f"threshold must be of the model's class {model_class}, got {self._told}")
        own = {layer.name: len(layer.threshold) for layer in self.layers if layer.name.startswith(part)}
        if own.keys() != heads.keys():
            differ = sorted(own.keys() ^ heads.keys())
            raise ValueError(
                f"threshold must be of the layers of this {model_class}, which has {len(heads)}, got {len(own)}, "
                f"and {differ[0]} is only in one of them; {self._told}"
            )
        for name, number in heads.items():
            if number not in (None, own[name]):
                raise ValueError(
                    f"threshold of {name} must have one value for each of {number} heads, got {own[name]}; {self._told}"
                )

    @property
    def mean(self) -> float:
        """Mean threshold over all heads."""
        values = [value for layer in self.layers for value in layer.threshold]
        return sum(values) / len(values)

    @property
    def digest(self) -> str:
        """Twelve hexadecimal digits that tell these thresholds from others."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:12]

    @property
    def _told(self) -> str:
        return f"thresholds of the model {self.model} ({self.model_class}, {len(self.layers)} layers)"


def _layer(where: str, values: Any) -> LayerThresholds:
    given = _fields_of(where, values, {field.name for field in fields(LayerThresholds)})
    name = _text(f"{where}.name", given["name"])
    ranges = {"threshold": (0, 1), "density": (0, 1), "error": (0, _LARGEST)}
    read = {field: _numbers(f"{where}.{field}", given[field], *limits) for field, limits in ranges.items()}
    for field, numbers in read.items():
        if len(numbers) != len(read["threshold"]):
            raise ValueError(
                f"{where}.{field} must have as many values as {where}.threshold, {len(read['threshold'])}, "
                f"got {len(numbers)}"
            )
    zero = next((index for index, value in enumerate(read["threshold"]) if value == 0), None)
    if zero is not None:
        raise ValueError(f"{where}.threshold[{zero}] must be above 0, got 0")
    return LayerThresholds(name, **read)


def _fields_of(where: str, values: Any, names: set[str]) -> dict[str, Any]:
    if not isinstance(values, Mapping):
        raise ValueError(f"{where} must be an object with the fields {', '.join(sorted(names))}, got {_shown(values)}")
    for what, wrong in (("has no", names - values.keys()), ("has an unknown", set(values.keys()) - names)):
        if wrong:
            raise ValueError(f"{where} {what} field {_shown(min(wrong))}; its fields are {', '.join(sorted(names))}")
    return dict(values)


def _text(where: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{where} must be a text, got {_shown(value)}")
    return value


def _positive_integer(where: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{where} must be an integer of 1 or more, got {_shown(value)}")
    return value


def _number(where: str, value: Any, least: float, most: float) -> float:
    # A dict may hold NaN or inf, though a file may not; no comparison with them is true here.
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
        rule = f"from {least} to {most}" if most < _LARGEST else f"of {least} or more"
        raise ValueError(f"{where} must be a number {rule}, got {_shown(value)}")
    return float(value)


def _numbers(where: str, values: Any, least: float, most: float) -> tuple[float, ...]:
    if not isinstance(values, list) or not values:
        raise ValueError(f"{where} must be a list of at least one number, got {_shown(values)}")
    return tuple(_number(f"{where}[{index}]", value, least, most) for index, value in enumerate(values))


def _versions(value: Any) -> tuple[tuple[str, str], ...]:
    if not isinstance(value, Mapping):
        raise ValueError(f"versions must be an object of texts, got {_shown(value)}")
    return tuple((name, _text(f"versions.{name}", version)) for name, version in value.items())


def _shown(value: Any) -> str:
    """A value in an error: short, whatever a file holds."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"every number must be finite, got {name}")
