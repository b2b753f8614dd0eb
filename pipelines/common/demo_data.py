"""Where the data of the demo lies: its weights, its captured tensors and the prompt files of the project.

Here and not with the demo, because `generate`, `qa`, `bench` and `doctor` need the data and not the demo's program.
"""

from __future__ import annotations

from pathlib import Path

from xattn_video_pipelines.common.errors import UserError

_PACKAGE = Path(__file__).resolve().parents[1]


def _demo_data() -> Path:
    """The folder beside the demo's code in a checkout, else the package that xattn-video-demo-data installs."""
    checkout = _PACKAGE / "demo" / "data"
    return checkout if checkout.is_dir() else _PACKAGE.parent / "xattn_video_demo_data"


DEMO_DATA = _demo_data()
# The models that this project trained and ships; the model card in each folder says how.
DEMO_WEIGHTS = DEMO_DATA / "weights"
DEMO_WATCHER = DEMO_DATA / "watcher_weights"
# Frames per second that the watcher was trained to be shown.
WATCHER_FPS = 2.0
# Query, key and value that `demo.training.capture` took from the demo's transformer.
DEMO_QKV = DEMO_DATA / "demo_qkv.safetensors"
# What to tell a user in whose installation one of them is missing.
HOW_TO_GET = "run from a checkout, or install its folder pipelines/demo/data: pip install ./pipelines/demo/data"


def shipped_prompts(name: str) -> Path:
    """A prompt file of this project: in `prompts/` of a checkout, in `xattn_video_prompts` of an installed package.

    Raises:
        UserError: it is in neither.
    """
    for folder in ("xattn_video_prompts", "prompts"):
        path = _PACKAGE.parent / folder / name
        if path.is_file():
            return path
    raise UserError(f"the prompt file {name} is missing from this installation; give one with --prompts")
