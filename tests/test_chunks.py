"""Calls in chunks of query blocks: the result of the whole call, within a bound of memory."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from xattn_video import CallStats, XAttnConfig, xattention
from xattn_video.ops import sparse
from xattn_video.ops.backends import SORT_BYTES, resolve
from xattn_video.ops.cpu import backend as cpu
from xattn_video.ops.sparse import rows_per_chunk

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parent.parent
MIB = 1 << 20
# what Triton's stages hold for each pair of blocks and each head: scores and lists
LIST_BYTES = 8
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SETTINGS: dict[str, Any] = {"stride": 4, "block_size": 32, "min_tokens": 0, "return_stats": True}


def random_qkv(q_len: int, kv_len: int, batch: int = 2) -> list[Tensor]:
    """Queries in diffusers' layout; four heads share two key heads."""
    generator = torch.Generator().manual_seed(0)
    query = 2 * torch.randn(batch, q_len, 4, 16, generator=generator).transpose(1, 2)
    return [query, *(torch.randn(batch, 2, kv_len, 16, generator=generator) for _ in range(2))]


def bounds(**values: list[int]) -> dict[str, Tensor]:
    return {name: torch.tensor(value, dtype=torch.int32) for name, value in values.items()}


@pytest.fixture
def chunked(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Tensor, CallStats]]:
    """`xattention` with so many query blocks a chunk, which only far longer calls would have."""

    def call(rows: int, *tensors: Tensor, **arguments: Any) -> tuple[Tensor, CallStats]:
        with monkeypatch.context() as patch:
            patch.setattr(sparse, "rows_per_chunk", lambda *sizes, **settings: rows)
            result = xattention(*tensors, **{**SETTINGS, **arguments})
        assert isinstance(result, tuple)
        return result

    return call


# --- how many query blocks -----------------------------------------------------------------------------------


def rows(batch: int, heads: int, tokens: int, pair_bytes: int, max_mib: int = 256, head_dim: int = 128) -> int:
    query = torch.empty(batch, heads, tokens, head_dim, dtype=torch.bfloat16, device="meta")
    return rows_per_chunk(query, tokens, block_size=128, pair_bytes=pair_bytes, max_bytes=max_mib * MIB)


@pytest.mark.parametrize(
    ("batch", "heads", "tokens"), [(1, 24, 119_056), (1, 40, 75_600), (2, 12, 32_760), (1, 1, 600_000)]
)
def test_calls_of_known_models_are_not_cut_on_a_gpu(batch: int, heads: int, tokens: int) -> None:
    assert rows(batch, heads, tokens, LIST_BYTES) == -(-tokens // 128)


def test_chunks_stay_under_the_bound_and_are_as_few_and_as_equal_as_can_be() -> None:
    for batch, heads, tokens, pair_bytes, mib in itertools.product(
        (1, 2), (1, 32), (4096, 119_056, 1 << 20), (LIST_BYTES, SORT_BYTES), (16, 256)
    ):
        blocks = -(-tokens // 128)
        got = rows(batch, heads, tokens, pair_bytes, mib)
        row = batch * blocks * (heads * pair_bytes + 2)
        assert (got == blocks) == (row * blocks <= mib * MIB)
        if got < blocks:
            row += batch * heads * 128 * (128 * 2 + 4)
            assert got == 1 or got * row <= mib * MIB
            chunks = -(-blocks // got)
            # one chunk fewer would be too large, and the last one lacks less than a row of each
            assert chunks == 2 or -(-blocks // (chunks - 1)) * row > mib * MIB
            assert chunks * got - blocks < chunks


def test_a_row_that_is_larger_than_the_bound_is_a_chunk() -> None:
    assert rows(8, 64, 1 << 20, SORT_BYTES, max_mib=1) == 1


# --- the same result -----------------------------------------------------------------------------------------

LENGTHS = [(256, 256), (250, 250), (250, 279), (251, 173), (161, 320)]
RULES: list[dict[str, Any]] = [
    {"threshold": 0.6},
    {"threshold": (0.3, 0.6, 0.9, 1.0)},
    {"selection": "top_k", "top_k": 2},
    {"selection": "top_ratio", "top_ratio": 0.3},
    {"threshold": 0.4, "dense_tokens": (90, 101)},
    {"threshold": 0.4, "dense_tokens": (225, 250)},
]


def check_chunks(
    chunked: Callable[..., tuple[Tensor, CallStats]], tensors: list[Tensor], rows: int, **arguments: Any
) -> None:
    whole, whole_stats = chunked(1000, *tensors, **arguments)
    output, stats = chunked(rows, *tensors, **arguments)
    sizes = f"{tensors[0].shape[2]} queries, {tensors[1].shape[2]} keys, {rows} rows, {arguments}"
    torch.testing.assert_close(output, whole, rtol=1e-6, atol=2e-6, msg=sizes)
    counts, whole_counts = ([int(count) for count in part[:2]] for part in (stats, whole_stats))
    assert counts == whole_counts, sizes
    assert stats.dense_reason is None
    assert output.stride() == tensors[0].stride()


@pytest.mark.parametrize(
    ("rule", "causal"),
    [*itertools.product(RULES, (False, True)), ({"threshold": 0.4, "dense_last": 70}, True)],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else str(value),
)
def test_chunks_give_the_result_of_the_whole_call(
    rule: dict[str, Any], causal: bool, chunked: Callable[..., tuple[Tensor, CallStats]]
) -> None:
    for q_len, kv_len in LENGTHS:
        if "dense_tokens" in rule and q_len != kv_len:
            continue
        for rows, valid in enumerate(
            ({}, bounds(kv_lens=[kv_len, kv_len - 43]), bounds(kv_start=[150, 3], kv_lens=[kv_len, kv_len - 22])), 1
        ):
            check_chunks(chunked, random_qkv(q_len, kv_len), rows, backend="cpu", causal=causal, **rule, **valid)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_group_that_the_last_query_of_a_chunk_cuts_is_scored_whole(
    backend: str, chunked: Callable[..., tuple[Tensor, CallStats]]
) -> None:
    """With one group a block, its score decides about the row."""
    arguments: dict[str, Any] = {"backend": backend, "stride": 32, "causal": True, "threshold": 0.5}
    for kv_len, valid in ((279, {}), (282, bounds(kv_lens=[282, 251]))):
        for rows in (1, 3):
            check_chunks(chunked, random_qkv(250, kv_len), rows, **arguments, **valid)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend", ["reference", "flex"])
def test_chunks_of_other_backends(backend: str, causal: bool, chunked: Callable[..., tuple[Tensor, CallStats]]) -> None:
    for valid in ({}, bounds(kv_start=[0, 141], kv_lens=[279, 250])):
        check_chunks(chunked, random_qkv(250, 279), 2, backend=backend, causal=causal, threshold=0.6, **valid)


@pytest.mark.parametrize("causal", [False, True])
def test_a_chunk_of_the_cpu_path_is_equal_to_the_last_bit(
    causal: bool, chunked: Callable[..., tuple[Tensor, CallStats]]
) -> None:
    """Also what is NaN. The rows of its products do not depend on how many there are."""
    query, key, value = random_qkv(1100, 1100)
    key[0, 1, 700], value[1, 0, 30] = torch.nan, torch.nan
    settings: dict[str, Any] = {"backend": "cpu", "causal": causal, "threshold": 0.6}
    whole, stats = chunked(1000, query, key, value, **settings)
    output, own_stats = chunked(5, query, key, value, **settings)
    assert whole[0].isnan().any()
    assert whole[1].isnan().any()
    torch.testing.assert_close(output, whole, rtol=0, atol=0, equal_nan=True)
    assert int(own_stats.kept) == int(stats.kept)


def test_rows_before_the_first_key_are_zero(chunked: Callable[..., tuple[Tensor, CallStats]]) -> None:
    """Causal with more queries than keys: whole chunks see nothing."""
    query, key, value = random_qkv(300, 100)
    output, stats = chunked(2, query, key, value, causal=True, threshold=1.0)
    whole, whole_stats = chunked(1000, query, key, value, causal=True, threshold=1.0)
    assert not output[:, :, :200].any()
    assert output[:, :, 200:].all(-1).all()
    torch.testing.assert_close(output, whole)
    assert int(stats.valid) == int(whole_stats.valid) == int(stats.kept)


@pytest.mark.skipif(not INTERPRETED, reason="its tests run in a process of their own, below")
@pytest.mark.parametrize(
    ("kv_len", "arguments"),
    [
        (90, {}),
        (101, {"causal": True}),
        (101, {"causal": True, **bounds(kv_start=[37], kv_lens=[95])}),
    ],
    ids=["all", "causal", "bounds"],
)
def test_triton_kernels_in_chunks(
    kv_len: int, arguments: dict[str, Any], chunked: Callable[..., tuple[Tensor, CallStats]]
) -> None:
    check_chunks(chunked, random_qkv(90, kv_len, batch=1), 2, backend="triton", threshold=0.6, **arguments)


@pytest.mark.skipif(INTERPRETED, reason="runs the test before it")
def test_triton_kernels_in_chunks_in_the_interpreter(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="Triton is for Linux only")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "pytest", __file__, "-k", "test_triton_kernels_in_chunks", "-q"]
    command += ["-p", "no:cacheprovider"]
    finished = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "3 passed" in finished.stdout, finished.stdout


# --- where it is called --------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
def test_chunks_compile_into_one_graph(causal: bool) -> None:
    tensors = random_qkv(1690, 1690)
    config = XAttnConfig(stride=4, block_size=16, min_tokens=0, threshold=0.6, backend="cpu", max_extra_mib=1)
    query = tensors[0]
    assert rows_per_chunk(query, 1690, block_size=16, pair_bytes=16, max_bytes=MIB) < 106

    def call(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        output, stats = xattention(query, key, value, config, causal=causal, return_stats=True)
        return output + 1, stats.kept

    compiled = torch.compile(call, backend="eager", fullgraph=True)
    for got, wanted in zip(compiled(*tensors), call(*tensors), strict=True):
        torch.testing.assert_close(got, wanted)


def test_no_count_is_read_by_the_host(chunked: Callable[..., tuple[Tensor, CallStats]]) -> None:
    """A fake tensor has no value to read."""
    with FakeTensorMode() as mode:
        tensors = [mode.from_tensor(part) for part in random_qkv(300, 300)]
        output, stats = chunked(2, *tensors, causal=True, backend="cpu")
    assert output.shape == tensors[0].shape
    assert stats.kept.shape == stats.valid.shape == ()


# --- memory --------------------------------------------------------------------------------------------------


class LiveBytes(TorchDispatchMode):
    """The most bytes that operators have made and that were alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for part in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(part, Tensor):
                self._add(part.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        place, size = storage._cdata, storage.nbytes()
        if place not in self._seen:
            self._seen.add(place)
            self.now += size
            self.most = max(self.now, self.most)
            weakref.finalize(storage, self._drop, place, size)

    def _drop(self, place: int, size: int) -> None:
        self._seen.discard(place)
        self.now -= size


def extra_bytes(max_extra_mib: int, causal: bool, rule: dict[str, Any], tensors: list[Tensor]) -> int:
    settings: dict[str, Any] = {"stride": 4, "block_size": 16, "min_tokens": 0, "backend": "cpu", **rule}
    with LiveBytes() as live:
        for part in tensors:
            part.view_as(part)
        inputs = live.now
        output = xattention(*tensors, causal=causal, max_extra_mib=max_extra_mib, **settings)
    assert isinstance(output, Tensor)
    return live.most - inputs


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rule", [{"threshold": 0.6}, {"selection": "top_k", "top_k": 3}], ids=["threshold", "top_k"])
def test_what_a_call_holds_stays_under_the_bound(
    causal: bool, rule: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What operators take inside, such as a sort, is not seen here."""
    # The 3 MB for the rows that are sorted together would hide the difference.
    monkeypatch.setattr(cpu, "_SELECT_ELEMENTS", 1 << 12)
    tensors = random_qkv(4800, 4800)
    bounded, whole = (extra_bytes(mib, causal, rule, tensors) for mib in (1, 256))
    # In chunks the output is there from the beginning, else only after the largest of the rest is gone.
    bounded -= tensors[0].nbytes
    assert bounded <= MIB < whole
    pair_bytes = SORT_BYTES if "top_k" in rule else resolve("cpu", CPU, torch.float32).pair_bytes
    assert whole <= 300 * 300 * 2 * (4 * pair_bytes + 2)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_million_tokens_by_a_million() -> None:
    """The matrices of the whole call would take 3 GiB."""
    command = [sys.executable, "-m", "tests.long_call_child", "64", "128", "128"]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert finished.returncode == 0, finished.stderr
    print(finished.stdout)
    result = json.loads(finished.stdout)
    assert result["extra_mib"] < XAttnConfig().max_extra_mib
    assert 0 < result["density"] < 0.2
    assert max(result["errors"]) < 1e-5
