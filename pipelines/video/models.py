"""Which model: the table of known names, any local folder, any Hub id; sizes, defaults and divisibility rules.

`settle` is the way in: it makes one `Recipe` of what is asked for and of what the model is. Nothing here loads
weights. A model's small JSON files (model_index.json and two configs) are all that is read.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Required, TypedDict

from xattn_video_pipelines.common.demo_data import DEMO_WEIGHTS
from xattn_video_pipelines.common.errors import UserError, one_line
from xattn_video_pipelines.common.files import read_input
from xattn_video_pipelines.common.schema import Range, complaint, parse_json
from xattn_video_pipelines.common.settings import option_name
from xattn_video_pipelines.video.adaptation import Adaptation, read_loras

if TYPE_CHECKING:
    from xattn_video import XAttnConfig
    from xattn_video_pipelines.video.prompts import Prompt
    from xattn_video_pipelines.video.settings import GenerateSettings


@dataclass(frozen=True)
class Geometry:
    """How a model cuts a video into tokens: its VAE's strides and its transformer's patch, (time, height, width).

    `multiple` is what the pipeline itself asks of height and width on top of that.
    """

    vae_time: int
    vae_space: int
    patch: tuple[int, int, int]
    multiple: int = 1

    @property
    def height_multiple(self) -> int:
        return math.lcm(self.vae_space * self.patch[1], self.multiple)

    @property
    def width_multiple(self) -> int:
        return math.lcm(self.vae_space * self.patch[2], self.multiple)

    def tokens(self, height: int, width: int, num_frames: int) -> int:
        """Video tokens in one forward pass of the transformer."""
        latent_frames = (num_frames - 1) // self.vae_time + 1
        time, rows, columns = self.patch
        return -(-latent_frames // time) * (height // (self.vae_space * rows)) * (width // (self.vae_space * columns))

    def check(self, height: int, width: int, num_frames: int) -> None:
        """Raise UserError where a size does not fit, with the nearest that does."""
        for name, value, multiple in (
            ("--height", height, self.height_multiple),
            ("--width", width, self.width_multiple),
        ):
            if value % multiple:
                nearest = max(multiple, (value + multiple // 2) // multiple * multiple)
                raise UserError(
                    f"{name} must be a multiple of {multiple} for this model, got {value}; nearest: {nearest}"
                )
        if (num_frames - 1) % self.vae_time:
            nearest = (num_frames - 1 + self.vae_time // 2) // self.vae_time * self.vae_time + 1
            rule = f"a multiple of {self.vae_time}, plus 1,"
            raise UserError(f"--num-frames must be {rule} for this model, got {num_frames}; nearest: {nearest}")


@dataclass(frozen=True)
class AttentionSize:
    """The video self-attention of a model: how many layers run in a forward, their heads and the size of a head.

    `feed_forward` is the inner size of the feed-forward part of a layer.
    """

    layers: int
    heads: int
    head_dim: int
    feed_forward: int


@dataclass(frozen=True)
class Defaults:
    """What a run uses where the command line does not say. None: the pipeline's own default (or it has none)."""

    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    fps: int = 16
    steps: int | None = None
    guidance_scale: float | None = None
    # For the low-noise transformer of two-transformer models; used only with the default guidance_scale.
    guidance_scale_2: float | None = None
    # None keeps the shift in the checkpoint's scheduler.
    flow_shift: float | None = None


@dataclass(frozen=True)
class Model:
    """A model to run: `source` is what diffusers' `from_pretrained` takes (Hub id or folder).

    `dtypes` are components that keep their own dtype in a half-precision run, by name.
    """

    name: str
    source: str
    pipeline: str
    geometry: Geometry | None
    defaults: Defaults
    dtypes: dict[str, str] = field(default_factory=dict)
    vae_tiling: bool = False
    has_second_transformer: bool = False
    attention: AttentionSize | None = None

    @property
    def identity(self) -> str:
        """What a manifest calls the model: its source, but the shipped one's name, as its folder differs by machine."""
        return self.name if self.source == str(DEMO_WEIGHTS) else self.source

    @property
    def is_folder(self) -> bool:
        """Whether the source is a folder here, and not a Hub id."""
        return Path(self.source).is_dir()

    @property
    def has_joint_text(self) -> bool:
        """Whether text stands in one sequence with the video, and not in a cross-attention beside it."""
        return self.pipeline.startswith("Hunyuan")

    @property
    def weights(self) -> str | None:
        """What tells the weights of a local folder from others under its name; None for a Hub id, or where none are."""
        return sampled_digest(Path(self.source)) if self.is_folder else None

    @cached_property
    def pipeline_class(self) -> Any:
        """The diffusers class of the pipeline.

        Raises:
            UserError: the installed diffusers has no such class.
        """
        diffusers = import_diffusers()
        # A custom class is named by a list in model_index.json and would be code from the repository: never run.
        found = getattr(diffusers, self.pipeline, None)
        if not isinstance(found, type) or not issubclass(found, diffusers.DiffusionPipeline):
            raise UserError(
                f"--model {self.name}: its pipeline {self.pipeline!r} is not in diffusers {diffusers.__version__} "
                "(code that comes with a model is not run)"
            )
        return found

    @cached_property
    def parameters(self) -> dict[str, inspect.Parameter]:
        """The parameters of the pipeline's `__call__` by name. Raises UserError as `pipeline_class`."""
        return dict(inspect.signature(self.pipeline_class.__call__).parameters)


@dataclass(frozen=True)
class ResolvedSettings:
    """One run's resolved settings: pixels, frames, frames a second, denoising steps."""

    height: int
    width: int
    num_frames: int
    fps: int
    steps: int
    guidance_scale: float | None
    guidance_scale_2: float | None
    flow_shift: float | None


@dataclass(frozen=True)
class Recipe:
    """What all videos of a run have in common, settled once.

    `tokens` are video tokens in a forward pass, None where the model's geometry is not known. `identity` is what a
    manifest says of it: what decides, with the prompt and the attention, what a video looks like.
    """

    model: Model
    settings: ResolvedSettings
    tokens: int | None
    identity: dict[str, Any]
    adaptation: Adaptation

    def residual_bytes(self, config: XAttnConfig, dtype: str) -> int | None:
        """Bytes that the residuals of `config` take for one forward of a step; None where the sizes are not known.

        Guidance as two forwards takes it twice.
        """
        size = self.model.attention
        if config.residual == "off" or size is None or self.tokens is None:
            return None
        from xattn_video.ops import packed_bytes

        shape = (size.layers, size.heads, self.tokens, size.head_dim)
        value_bytes = 4 if dtype == "float32" else 2
        return packed_bytes(shape, value_bytes, config.residual) * (2 if config.extrapolate else 1)


# Diffusers' documentation asks for Wan's VAE in float32, and for HunyuanVideo in float16 around a bfloat16 transformer.
_WAN_DTYPES = {"vae": "float32"}
_HUNYUAN_DTYPES = {"vae": "float16", "text_encoder": "float16", "text_encoder_2": "float16"}
_WAN_2_1 = Geometry(vae_time=4, vae_space=8, patch=(1, 2, 2), multiple=16)

# Sizes, steps, guidance and shifts are those that the models' own repositories and diffusers' documentation give.
KNOWN_MODELS = {
    model.name: model
    for model in (
        Model(
            "wan2.1-1.3b",
            "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
            "WanPipeline",
            _WAN_2_1,
            Defaults(480, 832, 81, fps=16, steps=50, guidance_scale=5.0, flow_shift=3.0),
            _WAN_DTYPES,
            attention=AttentionSize(30, 12, 128, 8960),
        ),
        Model(
            "wan2.1-14b",
            "Wan-AI/Wan2.1-T2V-14B-Diffusers",
            "WanPipeline",
            _WAN_2_1,
            Defaults(720, 1280, 81, fps=16, steps=50, guidance_scale=5.0, flow_shift=5.0),
            _WAN_DTYPES,
            attention=AttentionSize(40, 40, 128, 13824),
        ),
        Model(
            "wan2.2-a14b",
            "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
            "WanPipeline",
            _WAN_2_1,
            Defaults(720, 1280, 81, fps=16, steps=40, guidance_scale=4.0, guidance_scale_2=3.0, flow_shift=12.0),
            _WAN_DTYPES,
            has_second_transformer=True,
            attention=AttentionSize(40, 40, 128, 13824),
        ),
        Model(
            "wan2.2-5b",
            "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
            "WanPipeline",
            Geometry(vae_time=4, vae_space=16, patch=(1, 2, 2), multiple=16),
            Defaults(704, 1280, 121, fps=24, steps=50, guidance_scale=5.0, flow_shift=5.0),
            _WAN_DTYPES,
            attention=AttentionSize(30, 24, 128, 14336),
        ),
        Model(
            "hunyuan-video",
            "hunyuanvideo-community/HunyuanVideo",
            "HunyuanVideoPipeline",
            Geometry(vae_time=4, vae_space=8, patch=(1, 2, 2), multiple=16),
            Defaults(720, 1280, 129, fps=24, steps=50, guidance_scale=6.0),
            _HUNYUAN_DTYPES,
            vae_tiling=True,
            attention=AttentionSize(60, 24, 128, 12288),
        ),
        Model(
            "hunyuan-video-1.5",
            "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_t2v",
            "HunyuanVideo15Pipeline",
            Geometry(vae_time=4, vae_space=16, patch=(1, 1, 1), multiple=16),
            Defaults(480, 848, 121, fps=24, steps=50, guidance_scale=6.0),
            vae_tiling=True,
            attention=AttentionSize(54, 16, 128, 8192),
        ),
        Model(
            "demo",
            str(DEMO_WEIGHTS),
            "WanPipeline",
            Geometry(vae_time=2, vae_space=4, patch=(1, 2, 2), multiple=16),
            Defaults(128, 128, 33, fps=8, steps=20, guidance_scale=1.0),
            _WAN_DTYPES,
            attention=AttentionSize(4, 4, 64, 1024),
        ),
    )
}

# Of a file of weights, so many places of so many bytes tell it from another one.
_SAMPLES, _SAMPLE_BYTES = 64, 1024
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# Model parts whose config tells the geometry; the first that a pipeline has is read.
_TRANSFORMERS = ("transformer", "transformer_2")


def find_model(name: str) -> Model:
    """A known name, a folder that `save_pretrained` wrote, or a Hub id.

    Raises:
        UserError: none of these, or the model's description can neither be found in the cache nor downloaded.
    """
    known = KNOWN_MODELS.get(name.lower())
    if known is not None:
        if Path(known.source).is_absolute() and not Path(known.source).is_dir():
            raise UserError(f"--model {name}: its weights are missing from this installation ({known.source})")
        return known
    try:
        folder = Path(name).expanduser()
    except RuntimeError:
        raise UserError(f"--model {name}: no such user") from None
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise UserError(f"--model {name}: the folder has no model_index.json, so it is no diffusers pipeline")
        return _describe(name, str(folder.resolve()), lambda path: _read_json(folder / path))
    # A leading dot or slash means a path; `owner/name` could be either, and is taken for a Hub id.
    if not _HUB_ID.fullmatch(name):
        what = "no such folder" if "/" in name or "\\" in name else "unknown model"
        raise UserError(
            f"--model {name}: {what}; known names are {', '.join(KNOWN_MODELS)}, "
            "else give a local folder or a Hub id (owner/name)"
        )
    return _describe(name, name, lambda path: _hub_json(name, path))


@cache
def sampled_digest(folder: Path) -> str | None:
    """A SHA-256 over names and sizes of a folder's weights and some bytes all over them: training moves them all."""
    files = sorted(folder.rglob("*.safetensors"))
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.relative_to(folder).as_posix()} {size}\n".encode())
        with open(file, "rb") as data:
            for part in range(_SAMPLES):
                data.seek(part * size // _SAMPLES)
                digest.update(data.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:16] if files else None


def check_available(model: Model) -> None:
    """Say in one line that a Hub id's model is neither here nor reachable, before folders are made and it is loaded.

    Raises:
        UserError: its description is not in the local cache and cannot be downloaded.
    """
    _hub_json(model.source, "model_index.json")


def import_diffusers() -> Any:
    """The diffusers module, imported after xattn_video has repaired a torchvision that does not fit torch."""
    importlib.import_module("xattn_video.integrations.diffusers")
    return importlib.import_module("diffusers")


def settle(given: GenerateSettings) -> Recipe:
    """The model, and the settings with the model's defaults for what is not given.

    Raises:
        UserError: as `find_model`; a size does not fit the model; a LoRA or a quantisation cannot be used.
    """
    model = find_model(given.model)
    defaults = model.defaults if model.name in KNOWN_MODELS else _with_pipeline_defaults(model)
    named = ("height", "width", "num_frames", "fps", "steps", "guidance_scale", "flow_shift")
    own = {name: getattr(given, name) for name in named}
    values = {name: getattr(defaults, name) if value is None else value for name, value in own.items()}
    for name in ("height", "width", "num_frames", "steps"):
        if values[name] is None:
            raise UserError(f"{option_name(name)}: {model.name} ({model.pipeline}) has no default; give one")
    second = defaults.guidance_scale_2 if given.guidance_scale is None else None
    settings = ResolvedSettings(**values, guidance_scale_2=second)
    tokens = None
    if model.geometry is not None:
        model.geometry.check(settings.height, settings.width, settings.num_frames)
        tokens = model.geometry.tokens(settings.height, settings.width, settings.num_frames)
    loras = read_loras(given.lora, "--lora"), read_loras(given.lora_2, "--lora-2")
    adaptation = Adaptation(*loras, given.quantize)
    adaptation.check(model)
    weights = model.weights
    known = {"model": model.identity} | ({} if weights is None else {"weights": weights})
    return Recipe(model, settings, tokens, {**known, **vars(settings), **adaptation.identity}, adaptation)


def _with_pipeline_defaults(model: Model) -> Defaults:
    """The model's defaults, completed from the pipeline's own signature (for folders and Hub ids)."""
    given = {
        name: parameter.default
        for name, parameter in model.parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }
    return Defaults(
        height=given.get("height"),
        width=given.get("width"),
        num_frames=given.get("num_frames"),
        fps=round(given.get("frame_rate") or model.defaults.fps),
        steps=given.get("num_inference_steps"),
        guidance_scale=given.get("guidance_scale"),
    )


def check_served(model: Model, path: Path | None, prompts: Sequence[Prompt]) -> None:
    """Raise UserError where the model's pipeline cannot make videos from these prompts, of the file `path` if any.

    This asks the pipeline's class, and to import that takes seconds.
    """
    _check_call(model)
    _check_prompts(model, path, prompts)


def _check_call(model: Model) -> None:
    """Raise UserError for a pipeline that is not called with a prompt, a size and a number of steps."""
    needed = [
        name
        for name, parameter in model.parameters.items()
        if parameter.default is inspect.Parameter.empty
        and parameter.kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        and name not in ("self", "prompt", "image")
    ]
    served = ("prompt", "height", "width", "num_frames", "num_inference_steps")
    lacking = [name for name in served if name not in model.parameters]
    for names, what in ((needed, "needs"), (lacking, "takes no")):
        if names and "kwargs" not in model.parameters:
            raise UserError(
                f"--model {model.name}: {model.pipeline} {what} {', '.join(names)}, which generate cannot serve; "
                "attach an XAttnProcessor to it in Python"
            )


def _check_prompts(model: Model, path: Path | None, prompts: Sequence[Prompt]) -> None:
    """Raise UserError where a prompt gives what the model does not take, or lacks what it needs."""
    image = model.parameters.get("image")
    for prompt in prompts:
        where = f"prompt {prompt.line}" if path is None else f"{path}:{prompt.line}"
        if prompt.image is not None and image is None:
            raise UserError(
                f"{where}: has an image, but {model.name} ({model.pipeline}) makes videos from text alone; "
                "image-to-video needs a model such as Wan-AI/Wan2.1-I2V-14B-480P-Diffusers"
            )
        if prompt.image is None and image is not None and image.default is inspect.Parameter.empty:
            raise UserError(
                f"{where}: {model.name} ({model.pipeline}) needs an image; give one as --image, or as "
                "`image` in a .jsonl file"
            )
        if prompt.negative_prompt is not None and "negative_prompt" not in model.parameters:
            raise UserError(f"{where}: {model.name} ({model.pipeline}) takes no negative_prompt")


def _describe(name: str, source: str, read: Callable[[str], dict[str, Any] | None]) -> Model:
    index = read("model_index.json") or {}
    pipeline = index.get("_class_name")
    if not isinstance(pipeline, str):
        raise UserError(f"--model {name}: model_index.json names no diffusers pipeline, but {pipeline!r}")
    parts = [part for part in _TRANSFORMERS if isinstance(index.get(part), list) and any(index[part][:1])]
    transformer = read(f"{parts[0]}/config.json") if parts else None
    vae = read("vae/config.json") if "vae" in index else None
    family = pipeline.startswith("Wan"), pipeline.startswith("HunyuanVideo15"), pipeline.startswith("Hunyuan")
    return Model(
        name=name,
        source=source,
        pipeline=pipeline,
        # Helios works in sections of frames, which no rule here tells.
        geometry=None if pipeline.startswith("Helios") else _geometry(vae, transformer, 16 if any(family) else 1),
        defaults=Defaults(fps=24 if family[2] else 16),
        dtypes=_WAN_DTYPES if family[0] else _HUNYUAN_DTYPES if family[2] and not family[1] else {},
        vae_tiling=family[2],
        has_second_transformer=len(parts) == len(_TRANSFORMERS),
        attention=_attention_size(transformer),
    )


def _geometry(vae: dict[str, Any] | None, transformer: dict[str, Any] | None, multiple: int) -> Geometry | None:
    """The geometry that two configs tell, or None where they do not: then the pipeline itself judges the size."""
    if vae is None or transformer is None:
        return None
    vae, transformer = _completed(vae), _completed(transformer)
    time = vae.get("scale_factor_temporal", vae.get("temporal_compression_ratio"))
    space = vae.get("scale_factor_spatial", vae.get("spatial_compression_ratio"))
    patch = transformer.get("patch_size")
    if isinstance(patch, int):
        patch = [transformer.get("patch_size_t", 1), patch, patch]
    numbers = [time, space, *(patch if isinstance(patch, list) and len(patch) == 3 else [None])]
    whole = [number for number in numbers if isinstance(number, int) and number > 0]
    if len(whole) != 5:
        return None
    vae_time, vae_space, *sides = whole
    return Geometry(vae_time=vae_time, vae_space=vae_space, patch=(sides[0], sides[1], sides[2]), multiple=multiple)


_Size = Annotated[int, Range(1, 2**20)]


class _AttentionConfig(TypedDict, total=False):
    """The part of a transformer's config that tells the size of its attention."""

    num_layers: Required[_Size]
    num_attention_heads: Required[_Size]
    attention_head_dim: Required[_Size]
    num_single_layers: Annotated[int, Range(0, 2**20)] | None
    ffn_dim: _Size | None
    mlp_ratio: Annotated[float, Range(0, 1000)] | None


def _attention_size(transformer: dict[str, Any] | None) -> AttentionSize | None:
    """What a transformer's config says of its attention, or None."""
    if transformer is None:
        return None
    config = _completed(transformer)
    if complaint(config, _AttentionConfig) is not None:
        return None
    heads, head_dim = config["num_attention_heads"], config["attention_head_dim"]
    # Four times the width is what models have that do not say it.
    feed_forward = config.get("ffn_dim") or round((config.get("mlp_ratio") or 4) * heads * head_dim)
    return AttentionSize(config["num_layers"] + (config.get("num_single_layers") or 0), heads, head_dim, feed_forward)


def _completed(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration with the defaults of its class, which older checkpoints leave out of the file."""
    cls = getattr(import_diffusers(), str(config.get("_class_name")), None)
    parameters = inspect.signature(cls).parameters if isinstance(cls, type) else {}
    defaults = {
        name: parameter.default
        for name, parameter in parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }
    return defaults | config


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        value = parse_json(read_input(path))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {one_line(error)}") from None
    return value if isinstance(value, dict) else None


def _hub_json(repository: str, path: str) -> dict[str, Any] | None:
    import huggingface_hub
    from huggingface_hub import errors

    cached = huggingface_hub.try_to_load_from_cache(repository, path)
    if isinstance(cached, str):
        return _read_json(Path(cached))
    try:
        # A plain request first: downloads retry for half a minute where there is no network.
        huggingface_hub.HfApi().model_info(repository, timeout=10)
        return _read_json(Path(huggingface_hub.hf_hub_download(repository, path)))
    except Exception as error:
        if isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
            return None
        raise UserError(hub_message(repository, error)) from None


def hub_message(repository: str, error: Exception) -> str:
    """One line for what the Hub, or the way to it, says of a model that is not in the cache."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return f"--model {repository}: access must be asked for on the Hub; then log in: hf auth login"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"--model {repository}: no such model on the Hub, or private (log in: hf auth login)"
    # Offline shows as one of several libraries' errors, and every one means the same to the user.
    return offline_message(repository, error)


def offline_message(source: str, error: Exception) -> str:
    """One line for a model that is neither here nor reachable."""
    reason = one_line(error)
    reason = reason if len(reason) <= 120 else reason[:117] + "..."
    return f"--model {source}: not in the local cache, and the Hub cannot be reached ({type(error).__name__}: {reason})"
