"""What is changed about a model's weights when they are loaded: LoRA files and quantisation."""

from __future__ import annotations

import hashlib
import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from xattn_video_pipelines.common.errors import UserError, one_line

if TYPE_CHECKING:
    import torch

    from xattn_video_pipelines.video.models import Model

# Names of diffusers.
Quantization = Literal["bitsandbytes_4bit", "bitsandbytes_8bit", "torchao", "quanto"]
# What brings each of them, and the bits of a quantised weight.
_PACKAGES = {
    "bitsandbytes_4bit": "bitsandbytes", "bitsandbytes_8bit": "bitsandbytes", "torchao": "torchao",
    "quanto": "optimum-quanto",
}  # fmt: skip
BITS = {"bitsandbytes_4bit": 4, "bitsandbytes_8bit": 8, "torchao": 8, "quanto": 8}
_PARTS = ("transformer", "transformer_2")
# The further arguments of `load_lora_weights` for each transformer of a pipeline.
_FIRST: dict[str, Any] = {}
_SECOND: dict[str, Any] = {"load_into_transformer_2": True}
_SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Lora:
    """A file of a LoRA and how much of it is added to the model's weights; 1 is as it was trained.

    `option` is the one that it was given with.
    """

    path: Path
    weight: float
    option: str

    @property
    def digest(self) -> str:
        """The first digits of the file's SHA-256, so few that a message shows the weight behind them too."""
        return _digest(self.path)[:16]


@dataclass(frozen=True)
class Adaptation:
    """The LoRAs that are added to a model, and how its transformers are quantised (None: not).

    Where there are `loras_2`, they are for the second transformer and `loras` for the first one. Otherwise `loras` are
    for all transformers.
    """

    loras: tuple[Lora, ...] = ()
    loras_2: tuple[Lora, ...] = ()
    quantize: str | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """What a manifest says of it. A LoRA is known by its bytes, because its name can change."""
        return {
            "lora": {lora.digest: lora.weight for lora in self.loras} or None,
            "lora_files": [lora.path.name for lora in self.loras] or None,
            "lora_2": {lora.digest: lora.weight for lora in self.loras_2} or None,
            "lora_2_files": [lora.path.name for lora in self.loras_2] or None,
            "quantize": self.quantize,
        }

    def check(self, model: Model) -> None:
        """Raise UserError for what can be known before the weights are loaded."""
        for loras in (self.loras, self.loras_2):
            if loras:
                option = loras[0].option
                _need(option, "peft")
                if not hasattr(model.pipeline_class, "load_lora_weights"):
                    raise UserError(f"{option}: {model.name} ({model.pipeline}) takes no LoRA")
            digests: dict[str, Path] = {}
            for lora in loras:
                _check_header(lora)
                same = digests.setdefault(lora.digest, lora.path)
                if same is not lora.path:
                    raise UserError(f"{lora.option} {lora.path}: is the same as {same}; give a LoRA once")
        if self.loras_2 and not model.has_second_transformer:
            raise UserError(f"--lora-2: {model.name} ({model.pipeline}) has no second transformer; give it as --lora")
        if self.quantize is not None:
            _need(f"--quantize {self.quantize}", _PACKAGES[self.quantize])

    def check_place(self, device: torch.device, offload: str) -> None:
        """Raise UserError where quantised weights cannot be on this device, or not so."""
        if self.quantize is None:
            return
        if self.quantize.startswith("bitsandbytes") and device.type == "cpu":
            raise UserError(f"--quantize {self.quantize} needs a GPU; torchao and quanto run on a CPU too")
        if offload == "sequential":
            raise UserError(f"--quantize {self.quantize} does not go with --offload sequential; --offload model does")

    def loading(self, dtype: str) -> dict[str, Any]:
        """The arguments of diffusers' `from_pretrained` that quantise the transformers; {} where nothing does."""
        if self.quantize is None:
            return {}
        from diffusers import PipelineQuantizationConfig

        config = _quantization(self.quantize, dtype)
        return {"quantization_config": PipelineQuantizationConfig(quant_mapping=dict.fromkeys(_PARTS, config))}

    def apply(self, pipe: Any) -> None:
        """Add the LoRAs to a loaded pipeline.

        Raises:
            UserError: a file is no LoRA, or none that fits this model.
        """
        has_second = getattr(pipe, "transformer_2", None) is not None
        places = [_FIRST, _SECOND] if has_second and not self.loras_2 else [_FIRST]
        added = [*((lora, places) for lora in self.loras), *((lora, [_SECOND]) for lora in self.loras_2)]
        names = [f"lora_{place}" for place in range(1, len(added) + 1)]
        for name, (lora, places) in zip(names, added, strict=True):
            try:
                for more in places:
                    pipe.load_lora_weights(
                        str(lora.path.parent),
                        weight_name=lora.path.name,
                        adapter_name=name,
                        use_safetensors=True,
                        **more,
                    )
            except (ValueError, KeyError, RuntimeError, OSError) as error:
                raise UserError(f"{lora.option} {lora.path}: does not fit this model: {one_line(error, 200)}") from None
            # diffusers only logs that it has found nothing for the model.
            if not any(name in found for found in pipe.get_list_adapters().values()):
                raise UserError(
                    f"{lora.option} {lora.path}: does not fit this model: no weights of its layers are in it"
                )
        if names:
            pipe.set_adapters(names, [lora.weight for lora, _ in added])


def read_loras(texts: Sequence[str], option: str) -> tuple[Lora, ...]:
    """The LoRAs that are asked for by an option, as FILE or FILE:WEIGHT.

    Raises:
        UserError: a file is missing or may be a pickle, or a weight is no finite number.
    """
    return tuple(_lora(text, option) for text in texts)


def _lora(text: str, option: str) -> Lora:
    path, weight = text, "1"
    if not text.endswith(_SUFFIX) and ":" in text:
        path, _, weight = text.rpartition(":")
    if not path.endswith(_SUFFIX):
        # Other formats hold code that runs when they are read.
        raise UserError(f"{option} must be a {_SUFFIX} file, with :WEIGHT behind it or without, got {text}")
    try:
        value = float(weight)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"{option} {path}: its weight must be a number, such as 0.8, got {weight!r}")
    if not Path(path).is_file():
        raise UserError(f"{option} {path}: no such file")
    return Lora(Path(path), value, option)


@cache
def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_header(lora: Lora) -> None:
    """Raise UserError for a file that is damaged or in another format, whatever its name says."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(lora.path, "pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise UserError(f"{lora.option} {lora.path}: cannot be read: {one_line(error)}") from None


def _need(option: str, package: str) -> None:
    """Raise UserError, with the command that installs it, for a package that is missing."""
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        raise UserError(f"{option} needs {package}, which is not installed; pip install {package}") from None


def _quantization(name: str, dtype: str) -> Any:
    """A configuration of diffusers. torchao and quanto keep weights in int8; all compute in the run's dtype."""
    import torch

    diffusers = importlib.import_module("diffusers")
    if name == "bitsandbytes_4bit":
        return diffusers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=getattr(torch, dtype)
        )
    if name == "bitsandbytes_8bit":
        return diffusers.BitsAndBytesConfig(load_in_8bit=True)
    if name == "quanto":
        return diffusers.QuantoConfig(weights_dtype="int8")
    int8 = importlib.import_module("torchao.quantization").Int8WeightOnlyConfig()
    return diffusers.TorchAoConfig(int8)
