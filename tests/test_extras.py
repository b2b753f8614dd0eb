"""What is said where an optional package is missing, or where it has changed."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

import xattn_video
from xattn_video import extras

ROOT = Path(__file__).resolve().parent.parent
OWN = {"xattn_video", "xattn_video_pipelines", "xattn_video_eval"}
# Tools that are run where the user has them; each user of one says itself how to install it.
FOREIGN = {"cache_dit", "flashinfer", "lm_eval", "lmms_eval", "vbench"}


def in_a_fresh_python(code: str, without: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run code where the packages `without` cannot be imported, as if they were not installed."""
    hidden = f"import sys; sys.modules.update(dict.fromkeys({without!r}))\n"
    return subprocess.run([sys.executable, "-c", hidden + code], cwd=ROOT, capture_output=True, text=True, timeout=1000)


def third_party_imports() -> set[str]:
    names: set[str] = set()
    for folder in ("xattn_video", "pipelines", "eval"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    names.update(alias.name.split(".")[0] for alias in node.names)
                elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
                    names.add(node.module.split(".")[0])
    return names - set(sys.stdlib_module_names) - OWN


def normal(requirement: str) -> str:
    """The name in a requirement: `scikit-image` of `scikit_image>=0.24`."""
    return re.split(r"[\s<>=!~;\[]", requirement)[0].lower().replace("_", "-")


def test_every_import_is_of_the_core_or_of_an_extra_that_pyproject_has() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    core = {normal(requirement) for requirement in project["dependencies"]}
    assert core == {"torch", "triton"}
    assert third_party_imports() - core - FOREIGN <= set(extras.PACKAGES)
    for name, extra in extras.PACKAGES.values():
        assert name in map(normal, project["optional-dependencies"][extra]), (name, extra)


def test_all_has_every_extra_for_users_but_fa4() -> None:
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    (everything,) = extra["all"]
    listed = set(everything.removeprefix("xattn-video[").removesuffix("]").split(","))
    assert listed == set(extra) - {"all", "fa4", "lint", "test"}


@pytest.mark.parametrize(
    ("code", "package", "error"),
    [
        ("from xattn_video import XAttnProcessor", "diffusers", "XAttnProcessor needs diffusers"),
        ("import xattn_video.integrations.diffusers", "diffusers", "XAttnProcessor needs diffusers"),
        (
            "import xattn_video.integrations.transformers",
            "transformers",
            "xattn_video.integrations.transformers needs transformers",
        ),
    ],
)
def test_an_integration_without_its_library_says_what_to_install(code: str, package: str, error: str) -> None:
    done = in_a_fresh_python(code, without=(package,))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        f"xattn_video.extras.MissingPackage: {error}: {package} is not installed; {extras.install_command(package)}"
    )


def test_the_command_to_install_an_extra_fits_how_the_project_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras.metadata, "distribution", lambda name: name)
    assert extras.missing("skimage") == "scikit-image is not installed; pip install 'xattn-video[eval]'"

    def absent(name: str) -> None:
        raise extras.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(extras.metadata, "distribution", absent)
    assert extras.missing("skimage") == (
        "scikit-image is not installed; in the checkout of xattn-video: pip install '.[eval]'"
    )


CHANGED_DISPATCH = """
from xattn_video.integrations.torchvision_ops import repair_torchvision

repair_torchvision()
from diffusers.models import attention_dispatch

for name in ("AttentionBackendName", "_AttentionBackendRegistry.register", "dispatch_attention_fn"):
    holder = attention_dispatch
    *parts, last = name.split(".")
    for part in parts:
        holder = getattr(holder, part)
    value = vars(holder)[last]
    delattr(holder, last)
    try:
        from xattn_video import XAttnProcessor
    except ImportError as error:
        print(type(error).__name__, error)
    setattr(holder, last, value)
from xattn_video import XAttnProcessor
"""


def test_a_diffusers_whose_dispatch_has_changed_is_named() -> None:
    done = in_a_fresh_python(CHANGED_DISPATCH)
    assert done.returncode == 0, done.stderr
    version = metadata.version("diffusers")
    assert done.stdout.splitlines() == [
        f"UnsupportedDiffusers XAttnProcessor cannot attach to diffusers {version}: its attention dispatch has no "
        f"{name}; diffusers 0.38 to 0.42 are known to work: pip install 'diffusers>=0.38,<0.43'"
        for name in ("AttentionBackendName.NATIVE", "_AttentionBackendRegistry.register", "dispatch_attention_fn")
    ]


def test_every_public_name_is_there() -> None:
    for name in xattn_video.__all__:
        assert getattr(xattn_video, name) is not None
        assert name in dir(xattn_video)
    with pytest.raises(AttributeError, match="has no attribute 'sparse'"):
        _ = xattn_video.sparse  # type: ignore[attr-defined]


COMMAND = "from xattn_video_pipelines.cli import main\nsys.exit(main({arguments!r}))"


@pytest.mark.parametrize(
    ("arguments", "absent", "error"),
    [
        (["doctor", "--help"], "cyclopts", "the command line needs it: cyclopts is not installed; {cli}"),
        (["compare", "dense", "sparse"], "numpy", "numpy is not installed; {cli}"),
        (["bench", "--plot", "charts"], "matplotlib", "--plot needs matplotlib; install it with: {plot}"),
    ],
)
def test_a_command_without_its_package_says_so_in_one_line(arguments: list[str], absent: str, error: str) -> None:
    done = in_a_fresh_python(COMMAND.format(arguments=arguments), without=(absent,))
    commands = {extra: extras.install_command(extra) for extra in ("cli", "eval", "plot")}
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"xattn-video: error: {error.format(**commands)}\n")


def test_the_version_needs_nothing_but_the_core() -> None:
    done = in_a_fresh_python(COMMAND.format(arguments=["--version"]), without=("cyclopts", "rich", "torch"))
    assert (done.returncode, done.stdout) == (0, f"xattn-video {xattn_video.__version__}\n"), done.stderr
