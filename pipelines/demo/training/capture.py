"""Writes queries, keys and values of the demo model's video self-attention, taken while it makes a video.

They are what reaches the attention itself: projected, normalised and rotated. All heads of all layers and steps
would be half a gigabyte; each entry is one head of one layer at one denoising step.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from xattn_video import XAttnConfig
from xattn_video_pipelines.common.environment import versions
from xattn_video_pipelines.common.errors import UserError
from xattn_video_pipelines.common.files import make_writable, whole_files
from xattn_video_pipelines.common.program import Parser, run_program
from xattn_video_pipelines.demo.training.latents import ClipSize
from xattn_video_pipelines.demo.training.phases import FULL
from xattn_video_pipelines.video import MAX_SEED, ResolvedSettings, check_available, find_model, load_pipeline

if TYPE_CHECKING:
    from torch import Tensor

    from xattn_video_pipelines.video import Model

logger = logging.getLogger(__name__)

# A scene that training has not seen.
PROMPT = "a large red circle moving left on a white background"
STEPS = 20
GUIDANCE = 1.0

_ENTRIES = 4
_PARTS = ("query", "key", "value")


class Entry(NamedTuple):
    """One head of one layer's self-attention at one denoising step; all count from 0."""

    layer: int
    head: int
    step: int

    @property
    def name(self) -> str:
        """`layer1.head1.step09`, the tensors' names up to their last part."""
        return f"layer{self.layer}.head{self.head}.step{self.step:02d}"

    def __str__(self) -> str:
        return f"{self.layer}:{self.head}:{self.step}"


def default_entries(layers: int, heads: int, steps: int) -> list[Entry]:
    """Four entries over the depth of the model, over its heads, and from the first sparse step to the last but one.

    Raises:
        UserError: `steps` leaves no sparse step but the last.
    """
    first, last = XAttnConfig().warmup_steps, steps - 2
    if last < first:
        raise UserError(f"--steps must be {first + 2} or more, or --entries given, got {steps}")
    entries = []
    for number in range(_ENTRIES):
        # Not in the order of the layers: a deep layer is not always a late step.
        moment = (1, 3, 0, 2)[number]
        layer = round(number * (layers - 1) / (_ENTRIES - 1))
        entries.append(Entry(layer, number % heads, round(first + moment * (last - first) / (_ENTRIES - 1))))
    return list(dict.fromkeys(entries))


def check_entries(entries: Sequence[Entry], layers: int, heads: int, steps: int) -> None:
    """Raise UserError for an entry that the model or the sampling does not have, or that is given twice."""
    for number, entry in enumerate(entries):
        for what, value, count in zip(Entry._fields, entry, (layers, heads, steps), strict=True):
            if value >= count:
                raise UserError(f"--entries {entry}: {what} must be below {count}, got {value}")
        if entry in entries[:number]:
            raise UserError(f"--entries {entry}: given twice")


class _Recorder(TorchFunctionMode):
    """Sees the calls of torch's attention function while it is active, and keeps copies of the wanted inputs."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        super().__init__()
        self.missing = set(entries)
        self.tensors: dict[str, Tensor] = {}
        self.step = 0
        # The layer whose self-attention runs now.
        self.layer: int | None = None

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is scaled_dot_product_attention and self.layer is not None:
            self._keep({**dict(zip(_PARTS, args, strict=False)), **kwargs})
        return function(*args, **kwargs)

    def _keep(self, arguments: dict[str, Tensor]) -> None:
        for entry in [entry for entry in self.missing if (entry.layer, entry.step) == (self.layer, self.step)]:
            for part in _PARTS:
                head = arguments[part].detach()[:, entry.head : entry.head + 1]
                self.tensors[f"{entry.name}.{part}"] = head.to("cpu", torch.bfloat16, copy=True).contiguous()
            self.missing.remove(entry)


@contextmanager
def recording(transformer: Any, entries: Sequence[Entry]) -> Iterator[_Recorder]:
    """While it is open, the n-th forward of a `WanTransformer3DModel` is step n, and the entries are recorded.

    Changes neither the transformer's processors nor what it computes. The recorder's `tensors` are bfloat16
    `[batch, 1, tokens, head_dim]` by name; `missing` are the entries that have not come yet.
    """
    recorder = _Recorder(entries)

    def begin(layer: int) -> Callable[..., None]:
        return lambda *_: setattr(recorder, "layer", layer)

    def end(*_: object) -> None:
        recorder.layer = None

    def next_step(*_: object) -> None:
        recorder.step += 1

    handles = [transformer.register_forward_hook(next_step)]
    for layer in sorted({entry.layer for entry in entries}):
        attention = transformer.blocks[layer].attn1
        handles += [attention.register_forward_pre_hook(begin(layer)), attention.register_forward_hook(end)]
    try:
        with recorder:
            yield recorder
    finally:
        for handle in handles:
            handle.remove()


def capture(
    pipeline: Any, entries: Sequence[Entry], *, prompt: str, seed: int, steps: int, size: ClipSize = FULL
) -> dict[str, Tensor]:
    """Let a `WanPipeline` make a video as far as the last entry's step, without guidance, and record the entries.

    Returns:
        `<entry.name>.query`, `.key` and `.value`, each bfloat16 `[1, 1, tokens, head_dim]` on the CPU.

    Raises:
        UserError: an entry did not come by: the model's attention is not torch's.
    """
    last = max(entry.step for entry in entries)

    def on_step_end(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        logger.info("step %d of %d", step + 1, last + 1)
        if step == last:
            # diffusers' documented way to stop: the steps that are left do nothing
            pipeline._interrupt = True
        return tensors

    with torch.no_grad(), recording(pipeline.transformer, entries) as recorder:
        pipeline(
            prompt,
            height=size.side,
            width=size.side,
            num_frames=size.frames,
            num_inference_steps=steps,
            guidance_scale=GUIDANCE,
            generator=torch.Generator().manual_seed(seed),
            output_type="latent",
            callback_on_step_end=on_step_end,
        )
    if recorder.missing:
        raise UserError(
            f"--entries {min(recorder.missing)}: this attention did not go through torch's "
            "scaled_dot_product_attention (is DIFFUSERS_ATTN_BACKEND set?)"
        )
    return {f"{entry.name}.{part}": recorder.tensors[f"{entry.name}.{part}"] for entry in entries for part in _PARTS}


def save(  # noqa: PLR0913 - a clip and where it came from
    path: Path,
    tensors: dict[str, Tensor],
    pipeline: Any,
    *,
    model: Model,
    prompt: str,
    seed: int,
    steps: int,
    entries: Sequence[Entry],
    size: ClipSize = FULL,
) -> None:
    """Write what `capture` gave, whole or not at all, with where it came from in the file's metadata.

    The metadata names the model by its last part only: a folder's path means nothing on another machine.
    """
    config = pipeline.transformer.config
    frames = (size.frames - 1) // pipeline.vae_scale_factor_temporal + 1
    side = size.side // pipeline.vae_scale_factor_spatial
    grid = (length // patch for length, patch in zip((frames, side, side), config.patch_size, strict=True))
    name = Path(model.name).name
    command = ["python", "-m", "xattn_video_pipelines.demo.training.capture", "--model", name, "--out", path.name]
    command += ["--steps", str(steps), "--seed", str(seed), "--prompt", prompt, "--entries", *map(str, entries)]
    metadata = {
        "prompt": prompt,
        "seed": str(seed),
        "steps": str(steps),
        "guidance_scale": str(GUIDANCE),
        "grid": "x".join(map(str, grid)),
        "entries": " ".join(map(str, entries)),
        "model": name,
        "transformer_sha256": _weights_hash(Path(model.source) / "transformer"),
        "layers": str(config.num_layers),
        "heads": str(config.num_attention_heads),
        "head_dim": str(config.attention_head_dim),
        "command": shlex.join(command),
    }
    metadata |= {package: str(version) for package, version in versions(["torch", "diffusers"]).items()}
    with whole_files(path) as (partial,):
        save_file(tensors, partial, metadata=metadata)


def _weights_hash(folder: Path) -> str:
    """Of the weights' file, or of all of them one after the other; empty for a model that is no folder."""
    files = sorted(folder.glob("*.safetensors"))
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest() if files else ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and write the file; 0, or 2 for bad input."""
    parser = Parser(
        prog="python -m xattn_video_pipelines.demo.training.capture",
        description=__doc__,
        epilog="example: python -m xattn_video_pipelines.demo.training.capture --model demo --out demo_qkv.safetensors",
    )
    parser.add_argument("--model", required=True, help="a Wan text-to-video model: a name or a local folder")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="the .safetensors file to write")
    parser.add_argument("--steps", type=_whole_number, default=STEPS, help="denoising steps (default: %(default)s)")
    parser.add_argument("--prompt", default=PROMPT, help="default: %(default)s")
    parser.add_argument("--seed", type=_whole_number, default=0, help="of the noise (default: %(default)s)")
    parser.add_argument(
        "--entries", type=_entry, nargs="+", metavar="LAYER:HEAD:STEP",
        help="what to record, counted from 0 (default: four, over layers, heads and steps)",
    )  # fmt: skip
    return run_program(parser, _run, arguments)


def _run(options: argparse.Namespace) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    _check_out(options.out)
    if options.steps < 1:
        raise UserError(f"--steps must be 1 or more, got {options.steps}")
    if options.seed > MAX_SEED:
        raise UserError(f"--seed must be at most 2**63 - 1, got {options.seed}")
    model = find_model(options.model)
    if model.pipeline != "WanPipeline":
        raise UserError(f"--model {options.model}: must be a WanPipeline, got {model.pipeline}")
    if model.geometry is not None:
        model.geometry.check(FULL.side, FULL.side, FULL.frames)
    if not model.is_folder:
        check_available(model)
    settings = ResolvedSettings(FULL.side, FULL.side, FULL.frames, 8, options.steps, GUIDANCE, None, None)
    pipeline = load_pipeline(
        model, settings, device=torch.device("cpu"), dtype="float32", offload="none", compile_blocks=False
    )
    pipeline.set_progress_bar_config(disable=True)
    config = pipeline.transformer.config
    sizes = config.num_layers, config.num_attention_heads, options.steps
    entries = options.entries or default_entries(*sizes)
    check_entries(entries, *sizes)
    sampling = {"prompt": options.prompt, "seed": options.seed, "steps": options.steps}
    tensors = capture(pipeline, entries, **sampling)
    save(options.out, tensors, pipeline, model=model, entries=entries, **sampling)
    shape = "x".join(map(str, next(iter(tensors.values())).shape))
    megabytes = options.out.stat().st_size / 1e6
    print(f"{options.out}: {len(entries)} entries of {shape} ({' '.join(map(str, entries))}), {megabytes:.1f} MB")
    return 0


def _check_out(path: Path) -> None:
    """Before a minute of sampling, not after it."""
    if path.suffix != ".safetensors":
        raise UserError(f"--out must end in .safetensors, got {path}")
    if path.is_dir():
        raise UserError(f"--out: {path} is a folder")
    make_writable(path.parent)


def _whole_number(text: str) -> int:
    if not re.fullmatch(r"[0-9]+", text):
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}")
    return int(text)


def _entry(text: str) -> Entry:
    if not re.fullmatch(r"[0-9]+:[0-9]+:[0-9]+", text):
        raise argparse.ArgumentTypeError(f"must be layer:head:step such as 1:0:9, got {text!r}")
    return Entry(*map(int, text.split(":")))


if __name__ == "__main__":
    raise SystemExit(main())
