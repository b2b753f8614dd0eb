"""What the programs for language and video-understanding models share: options, loading, and answers kept in a file."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xattn_video import XAttnConfig
from xattn_video_pipelines.common import jsonl
from xattn_video_pipelines.common.errors import UserError, one_line
from xattn_video_pipelines.demo.files import DEMO_WATCHER, HOW_TO_GET
from xattn_video_pipelines.video.models import offline_message, sampled_digest

ATTENTIONS = ("dense", "xattn", "both")
# The video-understanding model that this project trained and ships; the card in the folder says how.
DEMO = "demo"
VIDEO_MODEL = "AutoModelForImageTextToText"

Row = jsonl.Row
_COMPLAINT = "not an answer of this program; use another --out"


def add_attention_options(parser: Any, *, stride: int, default: str = "both", dense_last: int = 0) -> None:
    """`--attention` and the settings of sparse prefill, on a parser or a group of one."""
    parser.add_argument("--attention", choices=ATTENTIONS, default=default, help=f"default: {default}")
    parser.add_argument("--stride", type=int, default=stride, help=f"antidiagonal stride ({stride})")
    parser.add_argument("--threshold", type=float, default=0.9, help="share of the score mass to keep (0.9)")
    parser.add_argument("--block-size", type=int, default=128, help="tokens a block (128)")
    parser.add_argument("--min-tokens", type=int, default=1024, help="shorter prompts stay dense (1024)")
    parser.add_argument(
        "--dense-last",
        type=int,
        default=dense_last,
        metavar="N",
        help=f"the blocks of a prompt's last N tokens stay dense: a question's; 0 as in the paper ({dense_last})",
    )


def configurations(args: argparse.Namespace) -> dict[str, XAttnConfig | None]:
    """What `--attention` asks for, by the name that its answers have; None is dense.

    Raises:
        UserError: a setting is out of its range.
    """
    try:
        config = XAttnConfig(
            stride=args.stride,
            threshold=args.threshold,
            block_size=args.block_size,
            min_tokens=args.min_tokens,
            dense_last=args.dense_last,
            warmup_steps=0,
        )
    except (ValueError, TypeError) as error:
        raise UserError(str(error)) from None
    both = {"dense": None, config.label(): config}
    return {
        label: one for label, one in both.items() if args.attention in ("both", "dense" if one is None else "xattn")
    }


def add_machine_options(parser: Any) -> None:
    """`--device` and `--dtype`, for `load_model`."""
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1; default: auto")
    parser.add_argument("--dtype", default="auto", help="auto (the weights'), float32, bfloat16, float16")


def load_model(args: argparse.Namespace, model_class: str, processor_class: str) -> tuple[Any, Any]:
    """A model of transformers and its tokenizer or processor, by the names of the classes that load them.

    The name `demo` is the shipped model's, which answers questions about videos.

    Raises:
        UserError: neither here nor reachable, not such a model, damaged, or no such device or dtype.
    """
    import torch
    from safetensors import SafetensorError

    import xattn_video.integrations.transformers  # noqa: F401  (repairs torchvision)

    # isort: split
    import transformers

    source = args.model if args.model != DEMO else _demo_source(model_class)
    device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if args.dtype != "auto" and not isinstance(getattr(torch, args.dtype, None), torch.dtype):
        raise UserError(f"--dtype must be auto or a dtype such as bfloat16, got {args.dtype}")
    try:
        model = getattr(transformers, model_class).from_pretrained(source, dtype=args.dtype)
        processor = getattr(transformers, processor_class).from_pretrained(source)
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        if isinstance(error, OSError) and not Path(source).is_dir():
            raise UserError(offline_message(args.model, error)) from None
        reason = one_line(error, 200)
        raise UserError(f"--model {args.model}: cannot be loaded ({type(error).__name__}: {reason})") from None
    try:
        return model.to(device).eval(), processor
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {args.device}: {one_line(error, 200)}") from None


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
    path: Path, names: tuple[str, str], signature: Mapping[str, Any], weights: str | None = None
) -> dict[tuple[str, str], Row]:
    """The answers of earlier runs by the two fields that `names` gives; one that a kill cut short is cut off.

    Args:
        signature: fields that must have these values for an answer to be taken.
        weights: of `weights_of`; answers of other weights are left out, to be asked anew. None takes all.

    Raises:
        UserError: a line is no answer, or one with another signature.
    """
    jsonl.repair(path)
    rows = {}
    for place, row in jsonl.read(path, _COMPLAINT):
        try:
            if weights is None or row.get("weights") == weights:
                rows[row[names[0]], row[names[1]]] = row
            other = [name for name in signature if row[name] != signature[name]]
        except (KeyError, TypeError):
            raise UserError(f"{place}: {_COMPLAINT}") from None
        if other:
            raise UserError(f"{path}: has answers with {other[0]} {row[other[0]]}; use another --out")
    return rows
