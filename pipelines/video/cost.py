"""What a run will cost, before anything is loaded: work, time, memory, disk, download, and whether sparsity pays.

    work of a forward = 4 N^2 h L (attention) + 2 N L (4 h^2 + 2 h F [+ 2 h^2 with cross-attention]) (linear layers)

N are tokens, L layers, h the width (heads times their size), F the inner size of the feed-forward part; in FLOP. The
text's own rows, the text encoder and the VAE are not in it. All figures are estimates of that kind.
"""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xattn_video_pipelines.common import jsonl
from xattn_video_pipelines.common.tables import duration, size
from xattn_video_pipelines.video.adaptation import BITS
from xattn_video_pipelines.video.all_dense import foreseen

if TYPE_CHECKING:
    import torch

    from xattn_video import XAttnConfig
    from xattn_video_pipelines.video.models import Model, Recipe
    from xattn_video_pipelines.video.plan import Plan

_UMT5, _WAN_VAE = 5_680_910_336, 126_892_531
_WAN_14B = 14_288_491_584
# Parameters of the parts of the known models, counted by building diffusers' and transformers' classes, without
# weights, from the configurations that the models' repositories publish.
_PARAMETERS = {
    "wan2.1-1.3b": {"transformer": 1_418_996_800, "text_encoder": _UMT5, "vae": _WAN_VAE},
    "wan2.1-14b": {"transformer": _WAN_14B, "text_encoder": _UMT5, "vae": _WAN_VAE},
    "wan2.2-a14b": {"transformer": _WAN_14B, "transformer_2": _WAN_14B, "text_encoder": _UMT5, "vae": _WAN_VAE},
    "wan2.2-5b": {"transformer": 4_999_787_712, "text_encoder": _UMT5, "vae": 704_688_668},
    "hunyuan-video": {
        "transformer": 12_821_012_544, "text_encoder": 7_505_186_816, "text_encoder_2": 123_060_480,
        "vae": 246_478_803,
    },
    "hunyuan-video-1.5": {"transformer": 8_326_608_160, "text_encoder": 7_070_619_136, "vae": 1_260_634_115},
}  # fmt: skip
_VALUE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_ROW_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
# A copy of weights in another dtype, and the files of a pipeline beside weights.
_VARIANT = re.compile(r"\.(fp16|bf16|fp32|ema)\b")
_SMALL = (".json", ".txt", ".model")
_BENCH = "efficiency.jsonl"
# A call with less than this share of the tokens of a row is slower than the row says: what a call costs comes on top.
_LEAST_OF_ROW = 0.25
# More than CPUs reach in attention as a rule, so a time that it gives is a lower bound.
_FAST_CPU = 1e12
# Taken for the sparse steps where no video is finished: nobody knows the density of a video beforehand, and that of the
# bench's generated inputs is theirs.
_USUAL_DENSITY = 0.5
# A video that takes longer is not worth starting.
_HOPELESS = 24 * 3600.0
# A gain below this is lost in the noise of timing.
_WORTH_IT = 1.05


@dataclass(frozen=True)
class Cost:
    """What is known about a run before it starts; None where it is not.

    Attributes:
        attention_share: of the work of a denoising step.
        forwards: of the transformer in a step; 2 with guidance.
        flop_per_video: with dense attention.
        dense_seconds, sparse_seconds: of one video.
        seconds: of all videos that are to be made.
        source: where the times come from.
        density: of the sparse steps, that the times are for.
        break_even: the density below which sparse attention is faster than dense.
        most_speedup: end to end, if attention took no time in the steps that may be sparse.
        weights_bytes, memory_bytes: that the weights take, and that the device has.
        download_bytes: that are not in the local cache yet; 0 for a folder.
        disk_bytes, free_bytes: that the videos take at most, and that the folder has.
    """

    attention_share: float | None
    forwards: int
    flop_per_video: float | None
    dense_seconds: float | None
    sparse_seconds: float | None
    seconds: float | None
    source: str | None
    density: float | None
    break_even: float
    most_speedup: float | None
    weights_bytes: int | None
    memory_bytes: int | None
    download_bytes: int | None
    disk_bytes: int
    free_bytes: int
    warnings: tuple[str, ...]

    def document(self) -> dict[str, Any]:
        """It as JSON-ready values."""
        return asdict(self) | {"warnings": list(self.warnings)}


@dataclass(frozen=True)
class _Work:
    """FLOP of one forward."""

    attention: float
    linear: float

    @property
    def all(self) -> float:
        return self.attention + self.linear


@dataclass(frozen=True)
class _Times:
    """Seconds of a dense and of a sparse video, where they come from, and the density they are for."""

    dense: float | None = None
    sparse: float | None = None
    source: str | None = None
    density: float | None = None


def estimate(plan: Plan, *, ask_hub: bool = False) -> Cost:
    """The cost of the videos of a plan that are to be made. Of several sparse configurations, the first is looked at.

    Args:
        plan: what is to be made.
        ask_hub: whether to ask the Hub for the size of what is to be downloaded, which takes up to 3 seconds.
    """
    recipe, given = plan.recipe, plan.given
    config = _first_config(plan)
    work, forwards = _work(recipe), _forwards(recipe)
    steps = recipe.settings.steps
    flop = None if work is None else work.all * forwards * steps
    dtype, row = plan.dtype, None
    if work is not None:
        row = nearest_row(bench_rows(), plan.environment["device_name"], dtype, recipe)
    times = _measured(plan)
    if times.dense is None or (config is not None and times.sparse is None):
        # What was measured here is better, but it has to be there for all that is asked for.
        times = times if work is None or row is None else _from_bench(row, work, config, recipe)
    settings = recipe.settings
    share = None if work is None else work.attention / work.all
    sparse_share = 0.0 if config is None else _sparse_steps(config, recipe) / steps
    disk = settings.width * settings.height * settings.num_frames * 3 * len(plan.pending)
    cost = Cost(
        attention_share=share,
        forwards=forwards,
        flop_per_video=flop,
        dense_seconds=times.dense,
        sparse_seconds=None if config is None else times.sparse,
        seconds=_total(plan, times),
        source=times.source,
        density=times.density,
        break_even=1 - 1 / (2 * (config.stride if config else 8)) if row is None else _break_even(row),
        most_speedup=None if share is None or config is None else 1 / (1 - share * sparse_share),
        weights_bytes=weights_bytes(recipe.model, dtype, given.quantize),
        memory_bytes=_memory_bytes(plan.device),
        download_bytes=_download_bytes(recipe.model, ask_hub=ask_hub),
        disk_bytes=disk * (2 if given.lossless else 1),
        free_bytes=_free_bytes(given.out),
        warnings=(),
    )
    return _with_warnings(cost, plan)


def _first_config(plan: Plan) -> XAttnConfig | None:
    return next((job.config for job in plan.jobs if job.config is not None), None)


def lines_of(cost: Cost) -> list[str]:
    """The cost as `--dry-run` prints it."""
    lines = []
    if cost.attention_share is not None and cost.flop_per_video is not None:
        often = "1 forward" if cost.forwards == 1 else f"{cost.forwards} forwards"
        lines.append(
            f"work      {_rounded(cost.flop_per_video / 1e12)} TFLOP a video, {often} a step; attention is "
            f"{cost.attention_share:.0%} of it"
        )
    lines.append(f"time      {_time(cost)}")
    if cost.most_speedup is not None:
        where = "at any density" if cost.break_even == 1 else f"below a density of {cost.break_even:.2f}"
        lines.append(
            f"gain      at most {cost.most_speedup:.2f}x end to end; break-even: a sparse call is faster {where}"
        )
    has = "" if cost.memory_bytes is None else f"; the device has {size(cost.memory_bytes)}"
    weights = "unknown" if cost.weights_bytes is None else size(cost.weights_bytes)
    lines.append(f"weights   {weights}{has}")
    if cost.download_bytes != 0:
        lines.append(f"download  {'unknown' if cost.download_bytes is None else size(cost.download_bytes)}")
    lines.append(f"disk      at most {size(cost.disk_bytes)}; {size(cost.free_bytes)} are free")
    return lines


def first_line(cost: Cost, tokens: int | None, videos: int) -> str:
    """The cost in one line, for the start of a run."""
    parts = [f"{videos} videos to make" if videos != 1 else "1 video to make"]
    if tokens is not None:
        parts.append(f"{tokens:,} tokens")
    if cost.attention_share is not None:
        parts.append(f"attention is {cost.attention_share:.0%} of the work")
    parts.append(f"time: {_time(cost)}")
    if cost.weights_bytes is not None:
        parts.append(f"weights: {size(cost.weights_bytes)}")
    return "; ".join(parts)


def _rounded(number: float) -> str:
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"


def _time(cost: Cost) -> str:
    if cost.source is None:
        return "unknown; run: xattn-video bench --record"
    kinds = (("dense", cost.dense_seconds), ("sparse", cost.sparse_seconds))
    told = ", ".join(f"{duration(seconds)} a {kind} video" for kind, seconds in kinds if seconds is not None)
    total = f", {duration(cost.seconds)} in all" if cost.seconds else ""
    return f"about {told}{total} ({cost.source})"


# --- work -----------------------------------------------------------------------------------------------------


def _work(recipe: Recipe) -> _Work | None:
    attention, tokens = recipe.model.attention, recipe.tokens
    if attention is None or tokens is None:
        return None
    width = attention.heads * attention.head_dim
    weights = 4 * width**2 + 2 * width * attention.feed_forward
    # The query and the output of cross-attention; its keys and values are of the few tokens of the text.
    weights += 0 if recipe.model.has_joint_text else 2 * width**2
    return _Work(attention=4.0 * tokens**2 * width * attention.layers, linear=2.0 * tokens * weights * attention.layers)


def _forwards(recipe: Recipe) -> int:
    """Forwards of the transformer in a step: two with guidance, but for models that take its scale as an input."""
    scale = recipe.settings.guidance_scale
    return 1 if scale is None or scale <= 1 or "true_cfg_scale" in recipe.model.parameters else 2


def _sparse_steps(config: XAttnConfig, recipe: Recipe) -> float:
    """Steps that are sparse, in part where only some layers find their residual again."""
    from xattn_video.integrations.diffusers import Schedule

    if foreseen(config, recipe) is not None:
        return 0.0
    schedule = Schedule(config, recipe.settings.steps)
    sparse = float(schedule.sparse_steps or 0)
    if config.residual == "off":
        return sparse
    layers = range(8)
    first = schedule.warmup
    refreshes = sum(
        schedule.last_refresh(step, layer) == step for step in range(first, first + int(sparse)) for layer in layers
    )
    return sparse - refreshes / len(layers)


# --- time -----------------------------------------------------------------------------------------------------


def bench_rows() -> list[dict[str, Any]]:
    """The rows that `xattn-video bench --record` has kept beside this package, the latest first; [] without any."""
    packages = Path(__file__).resolve().parents[2]
    for folder in ("eval", "xattn_video_eval"):
        path = packages / folder / "results" / _BENCH
        if path.is_file():
            _, rows = jsonl.Follower(path, from_start=True, complaint="not a row of xattn-video bench").news()
            return rows[::-1]
    return []


def nearest_row(rows: Iterable[dict[str, Any]], device_name: str, dtype: str, recipe: Recipe) -> dict[str, Any] | None:
    """The row of this device and dtype whose call is most like the model's: by the size of a head, then by tokens.

    None where there is none, or where all are of calls that are much longer.
    """
    attention, tokens = recipe.model.attention, recipe.tokens
    assert attention is not None
    assert tokens is not None
    alike = [
        row
        for row in rows
        if (row["device"], row["dtype"], row["causal"]) == (device_name, _ROW_DTYPES[dtype], False)
        and tokens >= _LEAST_OF_ROW * row["tokens"]
    ]
    return min(
        alike,
        key=lambda row: (row["head_dim"] != attention.head_dim, abs(math.log(row["tokens"] / tokens))),
        default=None,
    )


def _from_bench(row: dict[str, Any], work: _Work, config: XAttnConfig | None, recipe: Recipe) -> _Times:
    """Times by a row of the bench; linear layers are taken to compute as fast as dense attention."""
    best = row["best_ms"]
    dense_ms = best[row["dense_kernel"]]
    rate = 4.0 * row["tokens"] ** 2 * row["heads"] * row["head_dim"] / (dense_ms / 1e3)
    forwards = _forwards(recipe)
    dense = work.all * forwards * recipe.settings.steps / rate
    source, rest = f"by this device's bench at {row['tokens']:,} tokens", "without text encoder and VAE"
    if config is None:
        return _Times(dense, None, f"{source}; {rest}")
    sparse_ms = best["score"] + best["select"] + best["attend"] * _USUAL_DENSITY / row["density"]
    saved = _sparse_steps(config, recipe) * work.attention * (1 - sparse_ms / dense_ms)
    source = f"{source}, with a density of {_USUAL_DENSITY}; {rest}"
    return _Times(dense, dense - forwards * saved / rate, source, _USUAL_DENSITY)


def _break_even(row: dict[str, Any]) -> float:
    """The density at which the row's sparse call takes as long as its dense one; scores and selection cost the same."""
    best = row["best_ms"]
    left = best[row["dense_kernel"]] - best["score"] - best["select"]
    return float(min(max(row["density"] * left / best["attend"], 0.0), 1.0))


def _measured(plan: Plan) -> _Times:
    """Times of the videos of this run that are finished."""
    device = plan.environment["device_name"]
    found = [job.found for job in plan.jobs if job.found is not None and job.found.get("device_name") == device]
    # Manifests of earlier versions do not tell all of it.
    found = [record for record in found if record.get("seconds") and record.get("mean_density") is not None]
    if not found:
        return _Times()
    dense, sparse = (
        _mean([record["seconds"] for record in found if (record.get("attention") == "xattn") == sparse])
        for sparse in (False, True)
    )
    density = _mean([record["mean_density"] for record in found if record.get("attention") == "xattn"])
    return _Times(dense, sparse, f"by {len(found)} finished videos of this run", density)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _total(plan: Plan, times: _Times) -> float | None:
    each = [times.dense if job.config is None else times.sparse for job in plan.pending]
    known = [seconds for seconds in each if seconds is not None]
    return sum(known) if len(known) == len(each) else None


# --- memory, disk, download -----------------------------------------------------------------------------------


def weights_bytes(model: Model, dtype: str, quantize: str | None) -> int | None:
    """Bytes of all weights of a model in this dtype, where its parameters are known; quantised ones have scales too."""
    parameters = _PARAMETERS.get(model.name) or (_counted(Path(model.source)) if model.is_folder else {})
    total = 0.0
    for part, number in parameters.items():
        own = dtype if dtype == "float32" else model.dtypes.get(part, dtype)
        bits = BITS[quantize] if quantize is not None and part.startswith("transformer") else 8 * _VALUE_BYTES[own]
        total += number * bits / 8
    return round(total) or None


def _counted(folder: Path) -> dict[str, int]:
    """The parameters of each part of a pipeline in a folder, from the heads of its files; none where one is damaged."""
    from safetensors import SafetensorError, safe_open

    counts: dict[str, int] = {}
    for file in folder.glob("*/*.safetensors"):
        try:
            with safe_open(file, "pt") as tensors:
                numbers = (math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
                counts[file.parent.name] = counts.get(file.parent.name, 0) + sum(numbers)
        except (SafetensorError, OSError):
            # Loading it will say what is wrong.
            return {}
    return counts


def _download_bytes(model: Model, *, ask_hub: bool) -> int | None:
    """Bytes of the model that are not here; None where the Hub is not asked or does not answer."""
    if model.is_folder:
        return 0
    if not ask_hub:
        return None
    import huggingface_hub

    try:
        siblings = huggingface_hub.HfApi().model_info(model.source, timeout=3, files_metadata=True).siblings or []
    except Exception:
        # Offline shows as one of several libraries' errors.
        return None
    cached = huggingface_hub.try_to_load_from_cache
    return sum(
        number
        for name, number in needed_files({file.rfilename: file.size or 0 for file in siblings}).items()
        if not isinstance(cached(model.source, name), str)
    )


def needed_files(sizes: dict[str, int]) -> dict[str, int]:
    """Those of a repository's files, by name with their sizes, that diffusers loads a pipeline from."""
    own = {name: number for name, number in sizes.items() if name.count("/") == 1 or name == "model_index.json"}
    weights = {name for name in own if name.endswith(".safetensors") and not _VARIANT.search(name)}
    return {name: number for name, number in own.items() if name in weights or name.endswith(_SMALL)}


def _memory_bytes(device: torch.device) -> int | None:
    """All memory of a device, where it can be told."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    if device.type != "cpu" or not hasattr(os, "sysconf"):
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _free_bytes(folder: Path) -> int:
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


# --- warnings -------------------------------------------------------------------------------------------------


def _with_warnings(cost: Cost, plan: Plan) -> Cost:
    told = []
    if plan.pending:
        told = [
            *_hopeless(cost, plan),
            *_too_large(cost, plan),
            *_without_gain(cost, plan),
            *_without_effect(cost, plan),
        ]
    return Cost(**{**vars(cost), "warnings": tuple(f"warning: {line}" for line in told)})


def _hopeless(cost: Cost, plan: Plan) -> list[str]:
    known = [seconds for seconds in (cost.dense_seconds, cost.sparse_seconds) if seconds is not None]
    if known:
        shortest, how = min(known), f"takes about {duration(min(known))} on this device"
    elif plan.device.type == "cpu" and cost.flop_per_video is not None:
        shortest = cost.flop_per_video / _FAST_CPU
        how = f"takes more than {duration(shortest)} even on a CPU with 1 TFLOP/s"
    else:
        return []
    if shortest < _HOPELESS:
        return []
    return [f"this is hopeless: a video {how}; use a GPU, a smaller model, a smaller size or fewer steps"]


def _too_large(cost: Cost, plan: Plan) -> list[str]:
    if cost.weights_bytes is None or cost.memory_bytes is None or plan.given.offload != "none":
        return []
    if cost.weights_bytes <= cost.memory_bytes:
        return []
    more = "" if plan.device.type == "cpu" else "--offload model, "
    return [
        f"the weights alone take {size(cost.weights_bytes)} of memory, and {plan.device} has "
        f"{size(cost.memory_bytes)}; try {more}--dtype bfloat16 or --quantize"
    ]


def _without_gain(cost: Cost, plan: Plan) -> list[str]:
    config = _first_config(plan)
    if config is not None and foreseen(config, plan.recipe) is not None:
        # `warn_of_all_dense` says it.
        return []
    if cost.most_speedup is not None and cost.most_speedup < _WORTH_IT:
        return [
            f"sparsity does not pay here: were attention free in the sparse steps, a video would be made "
            f"{cost.most_speedup:.2f}x as fast; it pays with more tokens or more sparse steps"
        ]
    if cost.dense_seconds is None or cost.sparse_seconds is None or cost.density is None:
        return []
    if cost.sparse_seconds * _WORTH_IT <= cost.dense_seconds:
        return []
    return [
        f"sparsity does not pay at this size and density: about {duration(cost.sparse_seconds)} a sparse video, "
        f"{duration(cost.dense_seconds)} a dense one ({cost.source}); break-even: a density of {cost.break_even:.2f}"
    ]


def _without_effect(cost: Cost, plan: Plan) -> list[str]:
    if cost.forwards > 1 or not any(job.prompt.negative_prompt for job in plan.pending):
        return []
    return ["the negative prompt has no effect: without guidance (--guidance-scale above 1) the model never reads it"]
