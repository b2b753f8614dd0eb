"""Load a pipeline once, switch its attention, make one video: the part of `generate` that needs weights."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xattn_video.extras import require
from xattn_video_pipelines.common.errors import UserError, one_line
from xattn_video_pipelines.video.models import Model, import_diffusers, offline_message, pipeline_class
from xattn_video_pipelines.video.prompts import Prompt

if TYPE_CHECKING:
    import numpy as np
    import torch
    from PIL.Image import Image

    from xattn_video import XAttnConfig


@dataclass(frozen=True)
class Settings:
    """One run's resolved settings: pixels, frames, frames a second, denoising steps."""

    height: int
    width: int
    num_frames: int
    fps: int
    steps: int
    guidance_scale: float | None
    guidance_scale_2: float | None
    flow_shift: float | None


def resolve_device(name: str) -> torch.device:
    """`auto` is CUDA (or ROCm), then XPU, then MPS, then the CPU.

    Raises:
        UserError: no such device, or it is not there.
    """
    import torch

    available: dict[str, Callable[[], bool]] = {
        "cuda": torch.cuda.is_available,
        "xpu": torch.xpu.is_available,
        "mps": torch.backends.mps.is_available,
        "cpu": lambda: True,
    }
    if name == "auto":
        return torch.device(next(kind for kind, there in available.items() if there()))
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device must be auto, {', '.join(available)} or such as cuda:1, got {name!r}") from None
    if device.type not in available or not available[device.type]():
        raise UserError(f"--device {name}: torch {torch.__version__} sees no such device here; see: xattn-video doctor")
    if device.index is not None and device.type == "cuda" and device.index >= torch.cuda.device_count():
        raise UserError(f"--device {name}: there are {torch.cuda.device_count()} CUDA devices")
    return device


def resolve_dtype(name: str, device: torch.device) -> str:
    """`auto` is bfloat16 on a GPU that has it, float16 on another one, float32 on a CPU."""
    import torch

    if name != "auto":
        return name
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    return {"xpu": "bfloat16", "mps": "float16"}.get(device.type, "float32")


def load_pipeline(
    model: Model, settings: Settings, *, device: torch.device, dtype: str, offload: str, compile_blocks: bool
) -> Any:
    """The model's pipeline on its device, with its scheduler's shift and guidance set.

    Raises:
        UserError: the weights are neither here nor reachable, the folder is broken, or an option does not go
            with this model or device.
    """
    import torch
    from safetensors import SafetensorError

    dtypes: dict[str, torch.dtype] = {"default": getattr(torch, dtype)}
    if dtype != "float32":
        dtypes |= {part: getattr(torch, name) for part, name in model.dtypes.items()}
    diffusers = import_diffusers()
    # Before the minutes that loading and the first video take, and not when that video is written.
    require("generate", "imageio_ffmpeg")
    # diffusers renamed the argument in 0.40.
    major, minor = (int(number) for number in diffusers.__version__.split(".")[:2])
    argument = "dtype" if (major, minor) >= (0, 40) else "torch_dtype"
    try:
        pipe = pipeline_class(model).from_pretrained(model.source, **{argument: dtypes})
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(_load_message(model, error)) from None
    _set_flow_shift(pipe, settings.flow_shift)
    if settings.guidance_scale is not None and "guidance_scale" not in _parameters(pipe):
        # HunyuanVideo 1.5 takes guidance from a component and not from the call.
        pipe.guider = pipe.guider.new(guidance_scale=settings.guidance_scale)
    if model.vae_tiling:
        pipe.vae.enable_tiling()
    if compile_blocks:
        _compile(pipe, model)
    if offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    else:
        pipe.to(device)
    return pipe


def make_frames(pipe: Any, prompt: Prompt, seed: int, settings: Settings) -> np.ndarray:
    """One video: float32 frames `[T, H, W, 3]` in [0, 1].

    The noise comes from a CPU generator of this video's own, so it depends neither on other videos nor on the
    attention nor on the device.
    """
    import torch

    parameters = _parameters(pipe)
    arguments: dict[str, Any] = {
        "prompt": prompt.text,
        "height": settings.height,
        "width": settings.width,
        "num_frames": settings.num_frames,
        "num_inference_steps": settings.steps,
        "generator": torch.Generator("cpu").manual_seed(seed),
        "output_type": "np",
    }
    if "guidance_scale" in parameters and settings.guidance_scale is not None:
        arguments["guidance_scale"] = settings.guidance_scale
    if "frame_rate" in parameters:
        # LTX is told the speed of the video.
        arguments["frame_rate"] = settings.fps
    if settings.guidance_scale_2 is not None:
        arguments["guidance_scale_2"] = settings.guidance_scale_2
    if prompt.negative_prompt is not None:
        arguments["negative_prompt"] = prompt.negative_prompt
    if prompt.image is not None:
        arguments["image"] = _load_image(prompt.image)
    frames: np.ndarray = pipe(**arguments).frames[0]
    return frames


def check_prompts(model: Model, path: Path, prompts: list[Prompt], parameters: dict[str, inspect.Parameter]) -> None:
    """Raise UserError where a prompt gives what the model does not take, or lacks what it needs."""
    image = parameters.get("image")
    for prompt in prompts:
        where = f"{path}:{prompt.line}"
        if prompt.image is not None and image is None:
            raise UserError(
                f"{where}: has an image, but {model.name} ({model.pipeline}) makes videos from text alone; "
                "image-to-video needs a model such as Wan-AI/Wan2.1-I2V-14B-480P-Diffusers"
            )
        if prompt.image is not None:
            _open_image(prompt.image)
        if prompt.image is None and image is not None and image.default is inspect.Parameter.empty:
            raise UserError(f"{where}: {model.name} ({model.pipeline}) needs an `image`; give one in a .jsonl file")
        if prompt.negative_prompt is not None and "negative_prompt" not in parameters:
            raise UserError(f"{where}: {model.name} ({model.pipeline}) takes no negative_prompt")


def attach(pipe: Any, config: XAttnConfig | None) -> Any:
    """Switch the pipeline to sparse attention, or with None back to its own; gives the processor or None."""
    from xattn_video import XAttnProcessor

    processor = None if config is None else XAttnProcessor(config)
    try:
        pipe.set_attn_processor(processor)
    except ValueError as error:
        raise UserError(f"--attention xattn: {error}") from None
    return processor


def floor_attention(pipe: Any) -> AbstractContextManager[None]:
    """While it is open, the pipeline's transformers attend densely in another order of summation (`reversed_keys`)."""
    from xattn_video.integrations.diffusers import pipeline_transformers
    from xattn_video_pipelines.video.noise_floor import reversed_keys

    return reversed_keys(list(pipeline_transformers(pipe).values()))


def _parameters(pipe: Any) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(pipe.__call__).parameters)


def _load_image(path: Path) -> Image:
    from PIL import ImageOps

    try:
        # Upright: photographs of phones say beside their pixels how they are to be turned.
        image: Image = ImageOps.exif_transpose(_open_image(path))
        return image.convert("RGB")
    except OSError as error:
        raise UserError(f"{path}: damaged image: {one_line(error)}") from None


def _open_image(path: Path) -> Image:
    """The image with its header read, which is quick; its pixels are read when they are used."""
    from PIL.Image import open as open_image

    try:
        return open_image(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read as an image: {one_line(error)}") from None


def _set_flow_shift(pipe: Any, flow_shift: float | None) -> None:
    if flow_shift is None:
        return
    config = pipe.scheduler.config
    # UniPC and DPM call it flow_shift, flow-match Euler calls it shift.
    name = next((name for name in ("flow_shift", "shift") if name in config), None)
    if name is None:
        raise UserError(f"--flow-shift: the scheduler {type(pipe.scheduler).__name__} has no flow shift")
    pipe.scheduler = type(pipe.scheduler).from_config(config, **{name: flow_shift})


def _compile(pipe: Any, model: Model) -> None:
    parts = [part for part in pipe.components.values() if getattr(part, "_repeated_blocks", None)]
    if not parts:
        raise UserError(f"--compile: {model.name} has no part with repeated blocks to compile")
    for part in parts:
        part.compile_repeated_blocks(fullgraph=True)


def _load_message(model: Model, error: Exception) -> str:
    if not Path(model.source).is_dir():
        return offline_message(model.source, error)
    return f"--model {model.name}: the folder cannot be loaded: {one_line(error, 200)}"
