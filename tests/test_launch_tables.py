"""Launch tables: which entry a launch gets, where tuned ones lie, and that a malformed one says what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from xattn_video.ops.triton import launch_tables

GPU = torch.device("cuda", 0)
SCORES = {"BLOCK_R": 64, "BLOCK_C": 64, "BLOCK_K": 32, "num_warps": 2, "num_stages": 5}
OWN = {"BLOCK_M": 32, "BLOCK_N": 16, "num_warps": 2, "num_stages": 5}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An empty folder for tuned tables, and a GPU of the class sm_80."""
    monkeypatch.setenv(launch_tables.FOLDER_VARIABLE, str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    launch_tables.forget_tables()
    launch_tables._gpu_class.cache_clear()
    yield tmp_path
    launch_tables.forget_tables()
    launch_tables._gpu_class.cache_clear()


def default_entry(kernel: str, bits: str, limit: str) -> Any:
    table = launch_tables.shipped_table("default")
    assert table is not None
    return table[kernel][bits][limit]


def test_without_other_tables_a_launch_gets_the_defaults(folder):
    for device in (None, GPU, torch.device("cpu"), torch.device("meta")):
        found = launch_tables.find_config("block_sparse", torch.bfloat16, 128, device)
        assert found is default_entry("block_sparse", "16-bit", "128")
    assert launch_tables.find_config("block_sparse", torch.float32, 40) is default_entry(
        "block_sparse", "32-bit", "128"
    )
    assert launch_tables.find_config("block_sparse", torch.float16, 129) is default_entry(
        "block_sparse", "16-bit", "256"
    )


def test_a_tuned_entry_comes_first_on_its_device_class_and_nowhere_else(folder):
    table = {"block_sparse": {"16-bit": {"128": OWN}}}
    launch_tables.write_table(folder / "sm_80.json", table, {"device": "a GPU"})
    assert launch_tables.find_config("block_sparse", torch.bfloat16, 128, GPU) == OWN
    assert json.loads((folder / "sm_80.json").read_text())["about"] == {"device": "a GPU"}
    # Each entry for itself: the others stay.
    for head_dim, limit in ((64, "64"), (100, "127"), (200, "256")):
        found = launch_tables.find_config("block_sparse", torch.bfloat16, head_dim, GPU)
        assert found == default_entry("block_sparse", "16-bit", limit)
    assert launch_tables.find_config("block_sparse", torch.float32, 128, GPU) == default_entry(
        "block_sparse", "32-bit", "128"
    )
    assert launch_tables.find_config("block_sparse", torch.bfloat16, 128) != OWN
    launch_tables._gpu_class.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 6))
        assert launch_tables.find_config("block_sparse", torch.bfloat16, 128, GPU) != OWN


def test_a_shipped_class_lies_between_the_defaults_and_the_users(folder, monkeypatch):
    shipped = {**OWN, "num_stages": 4}
    real = launch_tables.shipped_table
    monkeypatch.setattr(
        launch_tables,
        "shipped_table",
        lambda name: {"block_sparse": {"16-bit": {"64": shipped, "128": shipped}}} if name == "sm_80" else real(name),
    )
    monkeypatch.setattr(launch_tables, "forget_tables", launch_tables._merged_table.cache_clear)
    assert launch_tables.find_config("block_sparse", torch.bfloat16, 128, GPU) == shipped
    launch_tables.write_table(folder / "sm_80.json", {"block_sparse": {"16-bit": {"128": OWN}}}, {})
    assert launch_tables.find_config("block_sparse", torch.bfloat16, 128, GPU) == OWN
    assert launch_tables.find_config("block_sparse", torch.bfloat16, 64, GPU) == shipped


def shipped_entry(name: str, limit: str) -> Any:
    table = launch_tables.shipped_table(name)
    assert table is not None
    return table["block_sparse"]["16-bit"][limit]


def test_a_hopper_gpu_has_tiles_of_its_own(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    found = launch_tables.find_config("block_sparse", torch.bfloat16, 128, GPU)
    assert found == shipped_entry("sm_90", "128") != default_entry("block_sparse", "16-bit", "128")
    # what its table does not name is the default
    assert launch_tables.find_config("block_sparse", torch.bfloat16, 64, GPU) == default_entry(
        "block_sparse", "16-bit", "64"
    )


@pytest.mark.parametrize("name", ["gfx942:sramecc+:xnack-", "gfx1100"])
def test_an_amd_gpu_is_named_after_its_architecture_and_reads_the_table_of_all(folder, monkeypatch, name):
    monkeypatch.setattr(torch.version, "hip", "6.2")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(gcnArchName=name))
    assert launch_tables.device_class(GPU) == name.partition(":")[0]
    found = launch_tables.find_config("block_sparse", torch.bfloat16, 128, GPU)
    assert found == shipped_entry("gfx", "128") != default_entry("block_sparse", "16-bit", "128")


def test_the_folder_is_the_chosen_one_or_in_the_users_cache(monkeypatch):
    monkeypatch.setenv(launch_tables.FOLDER_VARIABLE, "chosen")
    assert launch_tables.user_folder() == Path("chosen")
    monkeypatch.delenv(launch_tables.FOLDER_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    assert launch_tables.user_folder() == Path("cache/xattn-video/launch_configs")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert launch_tables.user_folder() == Path.home() / ".cache/xattn-video/launch_configs"


def entry(**changes: Any) -> dict[str, Any]:
    return {"block_sparse": {"16-bit": {"128": {**OWN, **changes}}}}


def test_an_entry_may_ask_for_tensor_descriptors(folder):
    (folder / "sm_80.json").write_text(json.dumps(entry(TMA=1)))
    assert launch_tables.find_config("block_sparse", torch.bfloat16, 128, GPU) == {**OWN, "TMA": 1}


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ("{", "not JSON"),
        ([], "must be a JSON object"),
        ({"softmax": {}}, "kernel must be one of antidiagonal_scores, attention_hopper, block_sparse, got 'softmax'"),
        ({"block_sparse": []}, "block_sparse: must be a JSON object"),
        ({"block_sparse": {"8-bit": {}}}, "width must be one of 16-bit, 32-bit, got '8-bit'"),
        ({"block_sparse": {"16-bit": {"big": OWN}}}, "16-bit, big: head_dim must be a positive number"),
        ({"block_sparse": {"16-bit": {"128": 3}}}, "16-bit, 128: must be a JSON object, got 3"),
        ({"block_sparse": {"16-bit": {"128": {}}}}, "must have BLOCK_M, BLOCK_N, num_stages, num_warps, got nothing"),
        (entry(BLOCK_X=1), "must have BLOCK_M, BLOCK_N, num_stages, num_warps, got BLOCK_M, BLOCK_N, BLOCK_X"),
        (entry(TMA=0), "TMA must be a positive number, got 0"),
        (
            {"antidiagonal_scores": {"16-bit": {"128": {**SCORES, "TMA": 1}}}},
            "num_warps, got BLOCK_C, BLOCK_K, BLOCK_R, TMA",
        ),
        (entry(BLOCK_M=96), "128: BLOCK_M must be a power of two, got 96"),
        (entry(num_warps=3), "num_warps must be a power of two, got 3"),
        (entry(num_stages=0), "num_stages must be a positive number, got 0"),
        (entry(num_stages=2.0), "num_stages must be a positive number, got 2.0"),
        (entry(num_stages=True), "num_stages must be a positive number, got True"),
    ],
)
def test_a_malformed_table_is_an_error_that_names_file_and_entry(document, words, folder):
    path = folder / "sm_80.json"
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    with pytest.raises(ValueError, match=r"sm_80\.json") as raised:
        launch_tables.find_config("block_sparse", torch.bfloat16, 128, GPU)
    message = str(raised.value)
    assert message.startswith(f"{path}: ")
    assert words in message
    assert message.endswith("delete the file to have the package's own configurations")
    # Another class of device does not read it.
    launch_tables.find_config("block_sparse", torch.bfloat16, 128, torch.device("cpu"))


def test_a_malformed_table_is_never_written(folder):
    path = folder / "new" / "sm_80.json"
    with pytest.raises(ValueError, match="num_warps must be a power of two"):
        launch_tables.write_table(path, entry(num_warps=5), {})
    assert not path.parent.exists()
    launch_tables.write_table(path, entry(), {})
    assert launch_tables.read_table(path) == entry()
    assert [file.name for file in path.parent.iterdir()] == ["sm_80.json"]


def test_every_shipped_table_is_well_formed():
    shipped = Path(launch_tables.__file__).parent / "configs"
    names = [path.stem for path in shipped.glob("*.json")]
    assert "default" in names
    for name in names:
        assert launch_tables.shipped_table(name)


def test_the_launchers_ask_for_the_device_of_their_tensors(monkeypatch):
    pytest.importorskip("triton", reason="Triton is for Linux only")
    from xattn_video.ops.triton import attention, scores

    asked = []

    def launch_config(kernel: str, dtype: torch.dtype, head_dim: int, device: torch.device) -> Any:
        asked.append((kernel, dtype, head_dim, device.type))
        return launch_tables.find_config(kernel, dtype, head_dim)

    for module in (scores, attention):
        monkeypatch.setattr(module, "launch_config", launch_config)
    query = torch.empty(1, 2, 256, 64, dtype=torch.float16, device="meta")
    options = {"block_size": 128, "causal": False, "scale": 0.125, "kv_start": None, "kv_lens": None}
    blocks = torch.empty(1, 2, 2, 2, device="meta")
    scores.scores_arguments(query, query, blocks, stride=8, **options)
    attention.block_sparse_arguments(query, query, query, query, blocks, blocks, blocks, **options)
    assert asked == [("antidiagonal_scores", torch.float16, 64, "meta"), ("block_sparse", torch.float16, 64, "meta")]
