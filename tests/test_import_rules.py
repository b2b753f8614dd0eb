"""Who may import whom, and what importing the library loads."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatchcase
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


def dotted_name(path: Path) -> str:
    """The name under which a file of the three packages is imported."""
    folder, *rest = path.relative_to(ROOT).with_suffix("").parts
    (package,) = (package for package, own in PACKAGES.items() if own == folder)
    return ".".join((package, *rest)).removesuffix(".__init__")


# A room is a folder in a package, with all that is below it. A module directly in a package, such as
# `xattn_video.config` or `xattn_video_pipelines.cli`, is in no room, and everybody may import it.
NAMES = {dotted_name(path) for path in MODULES}
FOLDERS = {dotted_name(path) for path in MODULES if path.name == "__init__.py"}
# Rooms whose modules are imported one by one -> by which modules (a pattern of their names), and why.
OPEN = {
    "xattn_video_pipelines.common": [
        ("*", "a shelf of small tools, each module a front of its own"),
    ],
    "xattn_video.ops": [
        ("xattn_video_eval.bench.*", "times the stages and kernels one by one"),
        ("xattn_video_eval.first_gpu.*", "checks and times the kernels one by one"),
        ("xattn_video_eval.studies.*", "compares the method with others, stage by stage, and reads compiled kernels"),
        ("xattn_video_eval.tune.*", "launches the kernels with configurations of its own"),
        ("xattn_video", "in the front of ops, xattention is the module of the function"),
    ],
    "xattn_video.integrations": [
        ("xattn_video_pipelines.demo.torchvision_fit.*", "a distribution of its own, which torch calls and is small"),
    ],
}


def room_of(module: str) -> str | None:
    """The room that a module is in, by the first two parts of its name; None for one that is in no room."""
    room = ".".join(module.split(".")[:2])
    return room if room in FOLDERS - set(PACKAGES) else None


def past_fronts(tree: ast.AST, importer: str, folder: str) -> Iterator[tuple[str, str]]:
    """The imports of modules of another room that do not go through a front: what to say of each, and that room.

    Args:
        importer: the name of the module whose code `tree` is.
        folder: the package that its relative imports start from.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            base = folder.rsplit(".", node.level - 1)[0] if node.level else ""
            origin = ".".join(part for part in (base, node.module) if part)
            # `from room import module` takes the module, not a name of the front.
            targets = {f"{origin}.{alias.name}" for alias in node.names} & NAMES | {origin}
        elif isinstance(node, ast.Import):
            targets = {alias.name for alias in node.names}
        else:
            continue
        for target in sorted(targets):
            room = room_of(target)
            if room is not None and target not in FOLDERS and room != room_of(importer):
                yield f"line {node.lineno} imports {target}, past the front of {room}", room


def imports_past_fronts(path: Path) -> list[tuple[str, str]]:
    name = dotted_name(path)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return list(past_fronts(tree, name, name if name in FOLDERS else name.rpartition(".")[0]))


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


@pytest.mark.parametrize(
    ("importer", "code", "passed"),
    [
        ("xattn_video_eval.report.data", "from xattn_video_pipelines.video import Key", []),
        ("xattn_video_eval.report.data", "from xattn_video_pipelines.video.manifest import Key", ["video.manifest"]),
        ("xattn_video_eval.report.data", "from xattn_video_pipelines.video import manifest", ["video.manifest"]),
        ("xattn_video_eval.report.data", "import xattn_video_pipelines.video.manifest", ["video.manifest"]),
        ("xattn_video_pipelines.video.plan", "from xattn_video_pipelines.video.manifest import Key", []),
        ("xattn_video_pipelines.video.plan", "from ..qa.load import load_model", ["qa.load"]),
        ("xattn_video_eval.bench.first_token", "from xattn_video_eval.benchmarks.needle import make_item", []),
        ("xattn_video_pipelines.demo.training.train", "from xattn_video_pipelines.demo.text import encode", []),
        ("xattn_video_eval.report.page", "from xattn_video.ops.reference import select", ["ops.reference"]),
        ("xattn_video_eval.report.page", "from xattn_video.ops import reference", ["ops.reference"]),
        ("xattn_video_eval.report.page", "from xattn_video.config import BACKENDS", []),
    ],
)
def test_what_goes_past_a_front(importer: str, code: str, passed: list[str]) -> None:
    assert importer in NAMES
    found = list(past_fronts(ast.parse(code), importer, importer.rpartition(".")[0]))
    assert [line.split(",")[0].split(".", 1)[1] for line, _ in found] == passed


@pytest.mark.parametrize("path", MODULES, ids=relative_name)
def test_rooms_import_each_other_through_their_fronts(path: Path) -> None:
    found = [
        line
        for line, room in imports_past_fronts(path)
        if not any(fnmatchcase(dotted_name(path), who) for who, _ in OPEN.get(room, ()))
    ]
    assert not found, f"{relative_name(path)}: {'; '.join(found)}"


@pytest.mark.parametrize(("room", "who"), [(room, who) for room, all_ in OPEN.items() for who, _ in all_])
def test_every_exception_is_needed(room: str, who: str) -> None:
    assert any(
        passed == room
        for path in MODULES
        if fnmatchcase(dotted_name(path), who)
        for _, passed in imports_past_fronts(path)
    )


FRONTS = sorted(FOLDERS - {"xattn_video_pipelines.demo.data"})
# The packages that a user's prompt completes names of.
SHOW_NO_MORE = {"xattn_video", "xattn_video.integrations.diffusers", "xattn_video.integrations.transformers"}


@pytest.mark.parametrize("front", FRONTS)
def test_a_front_has_what_it_offers(front: str) -> None:
    """Fronts that load their names late have a table for Python beside the imports for type checkers."""
    module = importlib.import_module(front)
    for name in getattr(module, "__all__", ()):
        assert getattr(module, name) is not None
    assert set(getattr(module, "__all__", ())) <= set(dir(module))
    if front in SHOW_NO_MORE:
        assert {name for name in dir(module) if not name.startswith("__")} == set(module.__all__) - {"__version__"}


@pytest.mark.parametrize("front", FRONTS)
def test_a_front_tells_type_checkers_and_python_the_same(front: str) -> None:
    (path,) = (path for path in MODULES if path.name == "__init__.py" and dotted_name(path) == front)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typed = [node for block in tree.body if isinstance(block, ast.If) for node in block.body]
    assert {alias.asname for node in typed if isinstance(node, ast.ImportFrom) for alias in node.names} == {
        name for block in tree.body if isinstance(block, ast.If) for name in lazy_names(block)
    }


def lazy_names(block: ast.If) -> Iterator[str]:
    for node in ast.walk(ast.Module(block.orelse, [])):
        if isinstance(node, ast.Dict):
            for names in node.values:
                yield from ast.literal_eval(names)


def loaded_by(statement: str) -> set[str]:
    """The top-level modules in a fresh interpreter after `statement`."""
    code = f"{statement}\nimport sys\nprint(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=1000)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_importing_the_library_loads_no_torch() -> None:
    loaded = loaded_by(
        "import xattn_video; assert {'XAttnProcessor', 'xattention'} <= set(dir(xattn_video))\n"
        "from xattn_video import XAttnConfig, __version__, supported; XAttnConfig(stride=8); repr(supported())"
    )
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


@pytest.mark.parametrize(
    "statement",
    [
        "from xattn_video_eval.bench import BenchSettings; BenchSettings()",
        "from xattn_video_eval.tune import TuneSettings",
        "from xattn_video_pipelines.demo import DemoSettings, judge_folders; DemoSettings()",
        "from xattn_video_pipelines.qa import QaSettings; QaSettings(model='demo', items='questions.jsonl')",
        "from xattn_video_pipelines.video import GenerateSettings, MANIFEST, read_manifest",
        "from xattn_video_pipelines import cli, doctor",
    ],
)
def test_a_light_name_of_a_front_loads_no_torch(statement: str) -> None:
    assert not loaded_by(statement) & {"torch", "diffusers", "transformers", "skimage"}


def test_importing_compare_loads_no_network() -> None:
    assert not loaded_by("import xattn_video_eval.compare.command") & {
        "torch",
        "lpips",
        "torchvision",
        "diffusers",
        "transformers",
    }
