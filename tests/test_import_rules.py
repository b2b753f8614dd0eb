"""Who may import whom, and what importing the library loads."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Importable name -> folder.
PACKAGES = {"xattn_video": "xattn_video", "xattn_video_pipelines": "pipelines", "xattn_video_eval": "eval"}
MODULES = sorted(path for folder in PACKAGES.values() for path in (ROOT / folder).rglob("*.py"))


def imported(tree: ast.AST) -> Iterator[str]:
    """The top-level packages that code imports, as a statement or by a literal name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module.split(".")[0]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if function in ("import_module", "__import__", "find_spec"):
                yield str(node.args[0].value).split(".")[0]


def relative_name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_there_are_modules_to_check() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in MODULES} == set(PACKAGES.values())


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import xattn_video_eval.compare.metrics.psnr_ssim as m", {"xattn_video_eval"}),
        ("def f():\n    from xattn_video_pipelines.cli import main", {"xattn_video_pipelines"}),
        ("from . import eval", set()),
        (
            "import importlib\nimportlib.import_module('xattn_video_eval.compare.command')",
            {"importlib", "xattn_video_eval"},
        ),
        ("eval('1 + 1')", set()),
    ],
)
def test_imports_are_found(code: str, expected: set[str]) -> None:
    assert set(imported(ast.parse(code))) == expected


@pytest.mark.parametrize("path", MODULES, ids=relative_name)
def test_imports_follow_the_arrows(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    forbidden = {
        "xattn_video": {"xattn_video_pipelines", "xattn_video_eval"},
        "pipelines": {"xattn_video_eval"},
        "eval": set(),
    }[package] | {"pipelines", "eval"}
    if relative_name(path) == "pipelines/cli.py":
        # The command line loads eval's programs, but only the one that is asked for: inside a function.
        tree.body = [node for node in tree.body if not isinstance(node, ast.FunctionDef)]
    assert not forbidden & set(imported(tree))


def loaded_by(statement: str) -> set[str]:
    """The top-level modules in a fresh interpreter after `statement`."""
    code = f"{statement}\nimport sys\nprint(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=1000)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_importing_the_library_loads_no_torch() -> None:
    loaded = loaded_by("from xattn_video import XAttnConfig, __version__; XAttnConfig(stride=8)")
    assert "xattn_video" in loaded
    assert "torch" not in loaded


def test_the_functions_of_the_library_load_no_framework() -> None:
    loaded = loaded_by("from xattn_video import block_sparse_attention, score_blocks, select_blocks, xattention")
    assert "torch" in loaded
    assert not loaded & {
        "diffusers",
        "transformers",
        "lpips",
        "torchvision",
        "triton",
        "xattn_video_pipelines",
        "xattn_video_eval",
    }


def test_importing_compare_loads_no_network() -> None:
    assert not loaded_by("import xattn_video_eval.compare.command") & {
        "torch",
        "lpips",
        "torchvision",
        "diffusers",
        "transformers",
    }
