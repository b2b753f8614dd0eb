"""Where work runs: the device and dtype that are asked for, and what a measurement says about where it was made."""

from __future__ import annotations

import importlib.util
import platform
import runpy
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xattn_video_pipelines.common.errors import UserError

if TYPE_CHECKING:
    import torch


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
        raise UserError(
            f"--device {name}: torch {torch.__version__} sees no such device here; see: xattn-video doctor --full"
        )
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


def emulates_bfloat16(device: torch.device) -> bool:
    """Whether it is a CPU without products in bfloat16, which takes 6 to 10 times as long for them as in float32."""
    import torch

    return device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported()


def versions(packages: Sequence[str]) -> dict[str, str | None]:
    """The installed version of each package (None: not installed), and Python's."""
    return {"python": platform.python_version()} | {package: _version(package) for package in packages}


def device_name(device: Any) -> str:
    """What the device calls itself: `NVIDIA H100`, or the CPU's model and the threads torch uses."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "xpu":
        return torch.xpu.get_device_name(device)
    if device.type == "mps":
        return f"Apple {platform.machine()}"
    return f"{cpu_name()}, {torch.get_num_threads()} threads"


def cpu_name() -> str:
    """The CPU's model name where the system tells it, else its architecture."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        # Only Linux has this file.
        pass
    return platform.processor() or platform.machine()


def source_commit() -> str | None:
    """The commit of this project's checkout, with `-dirty` where tracked files were changed.

    None for an installed package: the git repository around it, if any, is another project's.
    """
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        commit = _git(root, "rev-parse", "HEAD")
        return commit + ("-dirty" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()


def own_version() -> str:
    """The version of this project. The file is read, not imported: importing `xattn_video` needs torch."""
    return str(_version_file("xattn_video")["__version__"])


def torch_version() -> dict[str, Any]:
    """What torch says of its build: `__version__` (2.13.0+cu130), `cuda` and `hip` (or None). Empty without torch.

    The metadata of some wheels leaves the build out. torch takes a second to import, so that its file is read.
    """
    if (torch := sys.modules.get("torch")) is not None:
        return {"__version__": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip}
    return _version_file("torch")


def _version_file(package: str) -> dict[str, Any]:
    """The names in a package's version.py; none if it is not installed."""
    spec = importlib.util.find_spec(package)
    return {} if spec is None or spec.origin is None else runpy.run_path(str(Path(spec.origin).with_name("version.py")))


def _version(package: str) -> str | None:
    if package == "xattn-video":
        return own_version()
    if package == "torch":
        return torch_version().get("__version__")
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
