"""Repair a torchvision whose compiled operators do not fit the installed torch.

A CUDA build of torchvision beside a CPU build of torch fails to import with `operator torchvision::nms does not
exist`, and takes transformers and diffusers down with it. Neither needs those operators to make a video, so
declaring their schemas is enough. The operators themselves stay unusable.

Importing this package before diffusers repairs that. Where the order of imports shall not matter, torch itself can call
`declare_at_import` at the end of its own import: the small distribution `pipelines/demo/torchvision_fit` tells it to.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import re
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

# the operators that torchvision registers shape functions for while it is imported
_SCHEMAS = {
    "torchvision::nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "torchvision::qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}

# What was repaired before anybody could be told.
_untold: list[str] = []


def declare_at_import() -> None:
    """Declare the operators where a CUDA or ROCm build of torchvision is beside a CPU build of torch.

    It reads one small file and imports nothing of torchvision.
    """
    # an exception here would make torch impossible to import
    with contextlib.suppress(Exception):
        if torch.version.cuda is None and torch.version.hip is None and _is_gpu_build():
            _declare()
            _untold.append("declared at the import of torch")


def _is_gpu_build() -> bool:
    """Whether torchvision is installed as a build for GPUs, by its version: `0.28.0+cu130`."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return False
    text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    return re.search(r"^__version__ = ['\"][\w.]+\+(cu|rocm)\d", text, re.MULTILINE) is not None


def _declare() -> None:
    for name, schema in _SCHEMAS.items():
        torch.library.define(name, schema)


def repair_torchvision() -> str | None:
    """Import torchvision, declaring its missing operators where its build does not fit this torch.

    Returns:
        What was wrong and repaired, in one line, or None where nothing was: torchvision is healthy, absent, or
        broken in another way, which the library that needs it will then report.
    """
    if importlib.util.find_spec("torchvision") is None:
        return None
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if not any(f"operator {name} does not exist" in str(error) for name in _SCHEMAS):
            logger.warning("torchvision cannot be imported: %s", error)
            return None
    except (ImportError, OSError) as error:
        logger.warning("torchvision cannot be imported: %s", error)
        return None
    else:
        if not _untold:
            return None
        _untold.clear()
        return _tell()

    _declare()
    importlib.import_module("torchvision")
    return _tell()


def _tell() -> str:
    message = (
        "torchvision was built for another torch (its operators are missing); declared them so that it imports. "
        "Install the torchvision that matches this torch to silence this"
    )
    logger.warning(message)
    return message
