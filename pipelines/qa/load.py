"""What the programs for language and video-understanding models share: loading, and answers kept in a file."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from xattn_video_pipelines.common import jsonl
from xattn_video_pipelines.common.demo_data import DEMO_WATCHER, HOW_TO_GET
from xattn_video_pipelines.common.environment import emulates_bfloat16
from xattn_video_pipelines.common.errors import UserError, one_line
from xattn_video_pipelines.qa.settings import DEMO
from xattn_video_pipelines.video import hub_message, offline_message, sampled_digest

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
            trusted, or no such device.
    """
    source = name if name != DEMO else _demo_source(model_class)
    # Before seconds of imports.
    where = reach(source)

    import torch
    from safetensors import SafetensorError

    import xattn_video.integrations.transformers  # noqa: F401  (repairs torchvision)

    # isort: split
    import transformers

    place = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        # Said outright: where it is left open, transformers asks on the terminal.
        trust = {"trust_remote_code": trust_remote_code}
        model = getattr(transformers, model_class).from_pretrained(source, dtype=dtype, **trust, **where)
        processor = getattr(transformers, processor_class).from_pretrained(source, **trust, **where)
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


@cache
def reach(source: str) -> dict[str, bool]:
    """How transformers is to look for a model: in the cache alone where the Hub cannot be reached.

    Without being told it would try for a minute and more, a file at a time, also where all files are here.

    Args:
        source: a local folder or a Hub id.

    Returns:
        Arguments of `from_pretrained`.

    Raises:
        UserError: it is no folder, and neither in the cache nor on the Hub.
    """
    if Path(source).is_dir():
        return {}
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError

    try:
        cached = isinstance(huggingface_hub.try_to_load_from_cache(source, "config.json"), str)
        huggingface_hub.HfApi().model_info(source, timeout=10)
    except HFValidationError:
        raise UserError(f"--model {source}: no such folder, and no Hub id (owner/name)") from None
    # Offline shows as one of several libraries' errors.
    except Exception as error:
        if cached:
            return {"local_files_only": True}
        raise UserError(hub_message(source, error)) from None
    return {}


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
