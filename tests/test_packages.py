"""What is installed: the names, the files, the size, and what stays in the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {
    "xattn_video": "xattn_video",
    "xattn_video_pipelines": "pipelines",
    "xattn_video_eval": "eval",
    "xattn_video_prompts": "prompts",
}
# Part of the checkout alone; the demo's data and what makes torchvision fit are distributions of their own.
NOT_INSTALLED = {
    "xattn_video_pipelines.demo.data",
    "xattn_video_pipelines.demo.torchvision_fit",
    "xattn_video_pipelines.demo.training",
    "xattn_video_eval.first_gpu",
    "xattn_video_eval.studies",
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's wheel, built from a copy, since a build writes beside its sources."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for folder in FOLDERS.values():
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__"))
    return built(tree)


def built(tree: Path) -> Path:
    code = "from setuptools import build_meta; print(build_meta.build_wheel('dist'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return tree / "dist" / done.stdout.split()[-1]


def test_nothing_is_importable_under_a_name_that_others_use(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.split("/")[0] for name in archive.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == set(FOLDERS)


def test_the_wheel_is_small_and_has_what_the_code_reads(wheel: Path) -> None:
    assert wheel.stat().st_size < 2_000_000
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        assert sum(item.file_size for item in archive.infolist()) < 2_000_000
    read = [
        "xattn_video/py.typed",
        *[f"xattn_video/ops/triton/configs/{table}.json" for table in ("default", "sm_90", "gfx")],
        *[f"xattn_video_eval/report/assets/{file}" for file in ("players.html", "script.js", "style.css")],
        *[f"xattn_video_eval/report/{file}.html.jinja" for file in ("page", "charts")],
        "xattn_video_eval/report/paper_tables.json",
        "xattn_video_prompts/demo.txt",
        "xattn_video_prompts/shapes-held-out.jsonl",
    ]
    assert not set(read) - names
    assert not [name for name in names if name.replace("/", ".").startswith(tuple(NOT_INSTALLED))]


def test_every_folder_of_code_is_installed_or_left_out_on_purpose() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    found = {
        ".".join((package, *path.parent.relative_to(ROOT / folder).parts))
        for package, folder in FOLDERS.items()
        for path in (ROOT / folder).rglob("*.py")
    }
    assert found == set(listed) | NOT_INSTALLED


WHERE_THE_DATA_IS = """
from xattn_video_pipelines.common import demo_data
for place in (demo_data.DEMO_WEIGHTS / "model_index.json", demo_data.DEMO_WATCHER / "config.json", demo_data.DEMO_QKV):
    print(place.is_file(), place)
"""


def test_the_data_of_the_demo_is_found_beside_the_installed_code(wheel: Path, tmp_path: Path) -> None:
    """Both wheels unpacked into one folder are what pip makes of them; no checkout is near."""
    site, work = tmp_path / "site", tmp_path / "work"
    work.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(site)!r})\n{WHERE_THE_DATA_IS}"]

    def places() -> list[list[str]]:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return [line.split(maxsplit=1) for line in done.stdout.splitlines()]

    assert [there for there, _ in places()] == ["False"] * 3
    shutil.copytree(ROOT / "pipelines" / "demo" / "data", tmp_path / "data")
    with zipfile.ZipFile(built(tmp_path / "data")) as archive:
        archive.extractall(site)
    for there, place in places():
        assert there == "True"
        assert place.startswith(str(site / "xattn_video_demo_data"))
