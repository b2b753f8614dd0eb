"""`xattn-video doctor`: what is installed, what can run here, and why something cannot.

It looks at files, in less than a second. With `--full` it also imports the packages and asks torch for its devices.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import re
from importlib import metadata
from json import dumps
from pathlib import Path
from typing import Annotated, Any

from xattn_video.extras import missing
from xattn_video_pipelines.common.demo_data import DEMO_WEIGHTS, HOW_TO_GET
from xattn_video_pipelines.common.environment import cpu_name, torch_version, versions
from xattn_video_pipelines.common.errors import one_line
from xattn_video_pipelines.common.settings import Json, Option

EXAMPLE = """\
example:
  xattn-video doctor
  xattn-video doctor --full --json
"""

# As pyproject.toml says; make test-lowest runs the tests with it.
OLDEST_DIFFUSERS = "0.38"

_PACKAGES = (
    "xattn-video", "torch", "triton", "diffusers", "transformers", "accelerate", "torchvision", "lpips", "ftfy",
    "imageio-ffmpeg", "scikit-image", "matplotlib",
)  # fmt: skip
# Name to import -> status without it, and what does not work then.
_SMALL = {
    "cyclopts": ("broken", "no command but this one runs"),
    "rich": ("broken", "no command but this one runs"),
    "numpy": ("broken", "no video is written"),
    "tqdm": ("broken", "no video is written"),
    "skimage": ("note", "compare and judge do not run"),
    "PIL": ("note", "compare makes no contact sheets"),
    "matplotlib": ("note", "no charts are drawn"),
}
_ALEXNET = "alexnet-owt-7be5be79.pth"
# Where NVIDIA's driver lists its GPUs on Linux: a folder each, with a file `information`.
_NVIDIA_GPUS = Path("/proc/driver/nvidia/gpus")

# status: "ok"; "repaired" and "note" do not stop anything; "broken" stops generation.
Check = dict[str, str]


def command(
    *,
    full: Annotated[bool, Option("also import the packages, and ask torch for its devices; takes seconds")] = False,
    json: Json = False,
) -> int:
    """Print the report; returns 0 if nothing is found that keeps videos from being generated here, else 1."""
    report = examine(full)
    print(dumps(report) if json else format_report(report))
    return 0 if report["ok"] else 1


def examine(full: bool = True) -> dict[str, Any]:
    """The report: versions, devices with their backends, and checks with the command that helps.

    Without torch there are no devices to report, and packages that need torch are not imported.

    Args:
        full: import the packages, and ask torch for its devices and what runs there. Otherwise a package that is
            installed counts as one that works, and what a device can run is not told.
    """
    found = versions(_PACKAGES)
    if found["torch"]:
        checks = [check_torchvision(full), check_diffusers(full), check_transformers(full), check_lpips()]
    else:
        checks = [_check("torch", "broken", "not installed, and everything needs it: pip install torch")]
    checks += [check_ftfy(full), check_ffmpeg(), *check_small_packages(), check_demo_data()]
    return {
        "ok": all(check["status"] != "broken" for check in checks),
        "full": full,
        "system": f"{platform.system()} {platform.machine()}",
        "versions": found,
        "devices": (devices() if full else devices_seen()) if found["torch"] else [],
        "checks": checks,
    }


def devices() -> list[dict[str, Any]]:
    """Each kind of device: whether torch sees one, what `auto` uses there, and each backend's reason not to run."""
    import torch

    cuda = [
        (f"cuda:{index}", f"{own.name}, {_gib(own.total_memory)}")
        for index, own in enumerate(map(torch.cuda.get_device_properties, range(torch.cuda.device_count())))
    ]
    found = [("cpu", f"{cpu_name()}, {torch.get_num_threads()} threads"), *cuda]
    if torch.xpu.is_available():
        found.append(("xpu", torch.xpu.get_device_name()))
    if torch.backends.mps.is_available():
        found.append(("mps", f"Apple {platform.machine()}"))
    report = [_device(name, description) for name, description in found]
    if not cuda:
        why = "has CUDA or ROCm, but sees no GPU or driver" if _built_for_gpu() else "is built without CUDA or ROCm"
        report.append({"device": "cuda", "name": None, "reason": f"torch {torch.__version__} {why}"})
    return report


def devices_seen() -> list[dict[str, Any]]:
    """As `devices`, as far as files tell: what torch was built for, and NVIDIA's GPUs where Linux lists them.

    What `auto` takes there, and why not another backend, is not known.
    """
    build = torch_version()
    names = [
        line.partition(":")[2].strip()
        for file in sorted(_NVIDIA_GPUS.glob("*/information"))
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines()
        if line.startswith("Model:")
    ]
    found = [("cpu", f"{cpu_name()}, {os.cpu_count()} cores")]
    found += [(f"cuda:{index}", name) for index, name in enumerate(names)]
    report: list[dict[str, Any]] = [
        {"device": device, "name": name, "auto": None, "backends": {}} for device, name in found
    ]
    if build["cuda"] is None and build["hip"] is None:
        why = f"torch {build['__version__']} is built without CUDA or ROCm"
        report = [report[0], {"device": "cuda", "name": None, "reason": why}]
    elif not names:
        report.append({"device": "cuda", "name": None, "reason": "no GPU is listed; --full asks torch"})
    return report


def check_torchvision(full: bool = True) -> Check:
    """A torchvision built for another torch fails to import and takes diffusers down with it."""
    if full:
        from xattn_video.integrations import repair_torchvision

        message = repair_torchvision()
        if message:
            return _check("torchvision", "repaired", message)
    if not _installed("torchvision"):
        return _check("torchvision", "note", f"{missing('torchvision')}: LPIPS and video understanding do not run")
    return _check_import("torchvision", "torchvision", full)


def check_diffusers(full: bool = True) -> Check:
    """diffusers is importable, not too old, and lets `XAttnProcessor` attach."""
    if not _installed("diffusers"):
        return _check("diffusers", "broken", missing("diffusers"))
    version = metadata.version("diffusers")
    if _numbers(version) < _numbers(OLDEST_DIFFUSERS):
        wanted = f"diffusers>={OLDEST_DIFFUSERS}"
        return _check("diffusers", "broken", f"{version} is older than {OLDEST_DIFFUSERS}; pip install '{wanted}'")
    for module in ("diffusers.pipelines.wan.pipeline_wan", "xattn_video.integrations.diffusers"):
        check = _check_import("diffusers", module, full)
        if check["status"] == "broken":
            return check
    return _check("diffusers", "ok", f"{version}, not older than {OLDEST_DIFFUSERS}")


def check_transformers(full: bool = True) -> Check:
    """The text encoders of video models, and the models of `qa`."""
    if not _installed("transformers"):
        return _check("transformers", "broken", missing("transformers"))
    return _check_import("transformers", "transformers.models.umt5.modeling_umt5", full)


def check_ftfy(full: bool = True) -> Check:
    """Without ftfy diffusers cleans Wan's prompts differently, silently."""
    if not _installed("ftfy"):
        return _check("ftfy", "note", f"{missing('ftfy')}: Wan prompts are cleaned differently")
    return _check_import("ftfy", "ftfy", full)


def check_small_packages() -> list[Check]:
    """A line for each small package that is missing."""
    return [
        _check(name, status, f"{missing(name)}: {loss}")
        for name, (status, loss) in _SMALL.items()
        if not _installed(name)
    ]


def check_demo_data() -> Check:
    """The weights of the demo's models, which no wheel of the code holds."""
    if DEMO_WEIGHTS.is_dir():
        return _check("demo", "ok", f"its weights are in {DEMO_WEIGHTS}")
    return _check("demo", "note", f"its weights are missing: {HOW_TO_GET}")


def check_ffmpeg() -> Check:
    """The ffmpeg that imageio-ffmpeg brings, which writes and reads every video."""
    if not _installed("imageio_ffmpeg"):
        return _check("ffmpeg", "broken", missing("imageio_ffmpeg"))
    try:
        path = importlib.import_module("imageio_ffmpeg").get_ffmpeg_exe()
    except (ImportError, RuntimeError) as error:
        return _check("ffmpeg", "broken", f"{_line(error)}; pip install --force-reinstall imageio-ffmpeg")
    return _check("ffmpeg", "ok", Path(path).name)


def check_lpips() -> Check:
    """LPIPS is optional: compare says `unavailable` without it."""
    if not _installed("lpips"):
        return _check("lpips", "note", f"{missing('lpips')}: compare leaves LPIPS out")
    # Where torch.hub keeps its files.
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    home = Path(os.environ.get("TORCH_HOME", Path(cache) / "torch")).expanduser()
    if (home / "hub/checkpoints" / _ALEXNET).is_file():
        return _check("lpips", "ok", "AlexNet's weights are here")
    return _check(
        "lpips", "note", "AlexNet's weights (233 MB) are not here: compare downloads them, or leaves LPIPS out"
    )


def format_report(report: dict[str, Any]) -> str:
    """The report as text for a terminal."""
    lines = [f"system    {report['system']}", "versions"]
    lines += [f"  {name:16}{version or 'not installed'}" for name, version in report["versions"].items()]
    lines.append("devices")
    for device in report["devices"]:
        if device["name"] is None:
            lines.append(f"  {device['device']:8}none: {device['reason']}")
            continue
        auto = f"; auto runs {device['auto']}" if device["auto"] else ""
        lines.append(f"  {device['device']:8}{device['name']}{auto}")
        lines += [f"    {name:14}{reason or 'runs'}" for name, reason in device["backends"].items()]
    lines.append("checks")
    lines += [f"  {check['status'] + ' ':8}{check['name']}: {check['message']}" for check in report["checks"]]
    if not report["ok"]:
        lines.append("videos cannot be generated here: see broken above")
    elif report["full"]:
        lines.append("videos can be generated here")
    else:
        lines.append("nothing is missing for videos; whether it all works is what xattn-video doctor --full tries")
    return "\n".join(lines)


def _device(name: str, description: str) -> dict[str, Any]:
    import torch

    from xattn_video.config import BACKENDS
    from xattn_video.ops import auto_name, unavailable_reason

    device = torch.device(name)
    dtype = torch.float32 if device.type == "cpu" else torch.float16
    reasons = {backend: unavailable_reason(backend, device, dtype) for backend in BACKENDS if backend != "auto"}
    chosen = auto_name(device, dtype)
    auto = chosen or f"dense attention only (triton: {reasons['triton']})"
    return {"device": name, "name": description, "auto": auto, "backends": reasons}


def _check_import(name: str, module: str, full: bool) -> Check:
    try:
        if full:
            importlib.import_module(module)
    # Whatever an import raises (a missing library, an operator mismatch), the report is to say it and go on.
    except Exception as error:
        return _check(name, "broken", f"cannot be imported: {_line(error)}")
    return _check(name, "ok", versions([name])[name] or "importable")


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _check(name: str, status: str, message: str) -> Check:
    return {"name": name, "status": status, "message": message}


def _built_for_gpu() -> bool:
    import torch

    return torch.version.cuda is not None or torch.version.hip is not None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def _gib(size: int) -> str:
    return f"{size / 2**30:.0f} GiB"


def _line(error: BaseException) -> str:
    return one_line(f"{type(error).__name__}: {error}", 200)
