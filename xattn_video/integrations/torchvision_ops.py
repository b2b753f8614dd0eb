"""Repair a torchvision whose compiled operators do not fit the installed torch.

A CUDA build of torchvision beside a CPU build of torch fails to import with `operator torchvision::nms does not
exist`, and takes transformers and diffusers down with it. Neither needs those operators to make a video, so
declaring their schemas is enough. The operators themselves stay unusable.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging

import torch

logger = logging.getLogger(__name__)

# the operators that torchvision registers shape functions for while it is imported
_SCHEMAS = {
    "torchvision::nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "torchvision::qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}


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
        return None

    for name, schema in _SCHEMAS.items():
        torch.library.define(name, schema)
    importlib.import_module("torchvision")
    message = (
        "torchvision was built for another torch (its operators are missing); declared them so that it imports. "
        "Install the torchvision that matches this torch to silence this"
    )
    logger.warning(message)
    return message
