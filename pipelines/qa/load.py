"""What the programs for language and video-understanding models share: loading, and answers kept in a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from xattn_video_pipelines.common import jsonl
from xattn_video_pipelines.common.demo_data import DEMO_WATCHER, HOW_TO_GET
from xattn_video_pipelines.common.environment import emulates_bfloat16
from xattn_video_pipelines.common.errors import UserError, one_line
from xattn_video_pipelines.qa.settings import DEMO
from xattn_video_pipelines.video import offline_message, sampled_digest

VIDEO_MODEL = "AutoModelForImageTextToText"

Row = jsonl.Row
_COMPLAINT = "not an answer of this program; use another --out"


def load_model(
    name: str,
    model_class: str,
    processor_class: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """A model of transformers and its tokenizer or processor, by the names of the classes that load them.

    Args:
        name: Hub id or local folder; `demo` is this project's own model, which answers questions about videos.
        model_class, processor_class: names in transformers, such as `AutoModelForCausalLM` and `AutoTokenizer`.
        device: `auto` takes a GPU if there is one.
        dtype: a dtype of torch by its name; `auto` is that of the weights, and float32 for weights in bfloat16 on a
            CPU that only emulates it.
        trust_remote_code: run code that comes with the model. Otherwise it is never run, and nobody is asked.

    Raises:
        UserError: neither here nor reachable, not such a model, damaged, in need of code of its own that is not
            trusted, or no such device or dtype.
    """
    import torch
    from safetensors import SafetensorError

    import xattn_video.integrations.transformers  # noqa: F401  (repairs torchvision)

    # isort: split
    import transformers

    source = name if name != DEMO else _demo_source(model_class)
    place = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise UserError(f"--dtype must be auto or a dtype such as bfloat16, got {dtype}")
    try:
        # Said outright: where it is left open, transformers asks on the terminal.
        trust = {"trust_remote_code": trust_remote_code}
        model = getattr(transformers, model_class).from_pretrained(source, dtype=dtype, **trust)
        processor = getattr(transformers, processor_class).from_pretrained(source, **trust)
    except (
        OSError, ValueError, TypeError, KeyError, RuntimeError, ImportError, SafetensorError, UnpicklingError,
    ) as error:  # fmt: skip
        if isinstance(error, OSError) and not Path(source).is_dir():
            raise UserError(offline_message(name, error)) from None
        if not trust_remote_code and "trust_remote_code" in str(error):
            raise UserError(
                f"--model {name}: comes with code of its own, which is run by `qa --trust-remote-code` only"
            ) from None
        reason = one_line(error, 200)
        raise UserError(f"--model {name}: cannot be loaded ({type(error).__name__}: {reason})") from None
    try:
        if dtype == "auto" and model.dtype == torch.bfloat16 and emulates_bfloat16(torch.device(place)):
            model = model.float()
        return model.to(place).eval(), processor
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device}: {one_line(error, 200)}") from None


def weights_of(model: str) -> str | None:
    """What tells the weights of `--model` from others under its name; None for a Hub id, or where there are none."""
    source = DEMO_WATCHER if model == DEMO else Path(model)
    return sampled_digest(source) if source.is_dir() else None


def _demo_source(model_class: str) -> str:
    if model_class != VIDEO_MODEL:
        raise UserError("--model demo: it answers questions about videos; see xattn-video qa --help")
    if not DEMO_WATCHER.is_dir():
        raise UserError(f"--model demo: its weights are missing from this installation; {HOW_TO_GET}")
    return str(DEMO_WATCHER)


def read_answers(
    path: Path,
    names: tuple[str, str],
    signature: Mapping[str, Any],
    weights: str | None = None,
    schema: Any = dict[str, Any],
) -> dict[tuple[str, str], Row]:
    """The answers of earlier runs by the two fields that `names` gives; one that a kill cut short is cut off.

    Args:
        signature: fields that must have these values for an answer to be taken.
        weights: of `weights_of`; answers of other weights are left out, to be asked again. None takes all.
        schema: what an answer must hold, as of `schema.complaint`.

    Raises:
        UserError: a line is no answer, or one with another signature.
    """
    jsonl.repair(path)
    rows = {}
    for place, row in jsonl.read(path, _COMPLAINT, schema):
        try:
            if weights is None or row.get("weights") == weights:
                rows[row[names[0]], row[names[1]]] = row
            other = [name for name in signature if row[name] != signature[name]]
        except (KeyError, TypeError):
            raise UserError(f"{place}: {_COMPLAINT}") from None
        if other:
            raise UserError(f"{path}: has answers with {other[0]} {row[other[0]]}; use another --out")
    return rows
