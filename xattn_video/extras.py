"""The optional packages: which extra of this project brings each one, and the command that installs it.

The core needs torch and, on Linux, triton. Every other package comes with an extra. Where one is missing, the error
is one line that ends with a command that works.
"""

from __future__ import annotations

import importlib.util
from importlib import metadata

# Name to import -> (name to install, the extra that brings it).
PACKAGES = {
    "diffusers": ("diffusers", "diffusers"),
    "accelerate": ("accelerate", "diffusers"),
    "ftfy": ("ftfy", "diffusers"),
    "huggingface_hub": ("huggingface-hub", "diffusers"),
    "sentencepiece": ("sentencepiece", "diffusers"),
    "transformers": ("transformers", "transformers"),
    "safetensors": ("safetensors", "transformers"),
    "tokenizers": ("tokenizers", "transformers"),
    "cyclopts": ("cyclopts", "cli"),
    "filelock": ("filelock", "cli"),
    "imageio_ffmpeg": ("imageio-ffmpeg", "cli"),
    "numpy": ("numpy", "cli"),
    "rich": ("rich", "cli"),
    "tqdm": ("tqdm", "cli"),
    "PIL": ("pillow", "eval"),
    "jinja2": ("jinja2", "eval"),
    "lpips": ("lpips", "eval"),
    "markupsafe": ("markupsafe", "eval"),
    "skimage": ("scikit-image", "eval"),
    "torchvision": ("torchvision", "eval"),
    "imageio": ("imageio", "demo"),
    "matplotlib": ("matplotlib", "plot"),
    "pytest": ("pytest", "test"),
    "flash_attn": ("flash-attn-4", "fa4"),
}


class MissingPackage(ModuleNotFoundError):
    """An optional package is not installed; the message is one line that says how to install it."""


def missing(package: str) -> str:
    """One line for a missing package: `matplotlib is not installed; pip install 'xattn-video[plot]'`.

    Args:
        package: the name to import, one of `PACKAGES`.
    """
    name, extra = PACKAGES[package]
    return f"{name} is not installed; {install_command(extra)}"


def explain(error: ModuleNotFoundError) -> str | None:
    """One line for an import that failed because a package of the core or of an extra is missing, else None."""
    if isinstance(error, MissingPackage):
        return str(error)
    if error.name in PACKAGES:
        return missing(error.name)
    return f"{error.name} is not installed; pip install {error.name}" if error.name in ("torch", "triton") else None


def install_command(extra: str) -> str:
    """The command that installs an extra beside this project.

    pip takes the project that is installed already and adds what the extra names. A checkout that is used without
    being installed has to be installed first, or pip would look for the name in a registry.
    """
    try:
        metadata.distribution("xattn-video")
    except metadata.PackageNotFoundError:
        return f"in the checkout of xattn-video: pip install '.[{extra}]'"
    return f"pip install 'xattn-video[{extra}]'"


def require(user: str, *packages: str) -> None:
    """Check that optional packages are installed, before work that needs them begins.

    Args:
        user: what needs them, as the message is to name it.
        packages: names to import, each one of `PACKAGES`.

    Raises:
        MissingPackage: one of them is not installed.
    """
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise MissingPackage(f"{user} needs {PACKAGES[package][0]}: {missing(package)}", name=package)
