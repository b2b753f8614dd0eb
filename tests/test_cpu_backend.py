"""The CPU backend against the float64 reference: scores, attention, padding, threads, compilation."""

from __future__ import annotations

import ctypes
import itertools
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from xattn_video import XAttnConfig, block_sparse_attention, score_blocks, xattention
from xattn_video.ops import reference
from xattn_video.ops.block_lists import mask_to_lists
from xattn_video.ops.cpu import backend as cpu
from xattn_video.ops.cpu import workers
from xattn_video.ops.key_mask import KeyMask
from xattn_video.testing.synthetic import causal_text_like_qkv, video_like_qkv

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture
def two_threads():
    """The tests run with one thread; the threads of the backend need two."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def relative_error(output: Tensor, truth: Tensor) -> float:
    return ((output.double() - truth.double()).norm() / truth.double().norm()).item()


def random_call(seed: int) -> tuple[list[Tensor], dict[str, Any]]:
    """One of many combinations of odd lengths, heads, layouts, ranges of valid keys and causality."""
    generator = torch.Generator().manual_seed(seed)

    def below(limit: int, least: int = 0) -> int:
        return int(torch.randint(least, limit, (), generator=generator))

    batch, kv_heads, group, head_dim = below(3, 1), below(3, 1), below(4, 1), (8, 24, 40, 65)[below(4)]
    kv_len = below(150, 1)
    causal = bool(below(2))
    q_len = below(kv_len + 1, 1) if causal and below(3) else below(150, 1)
    dtype = (torch.float32, torch.float64)[below(2)]
    # Model code hands over [B, S, H, D] transposed, so no tensor here is contiguous.
    query = torch.randn(batch, q_len, kv_heads * group, head_dim, generator=generator, dtype=dtype).transpose(1, 2)
    key, value = (
        torch.randn(batch, kv_len, kv_heads, head_dim, generator=generator, dtype=dtype).transpose(1, 2)
        for _ in range(2)
    )
    kv_lens = torch.randint(0, kv_len + 1, (batch,), generator=generator, dtype=torch.int32) if below(2) else None
    kv_start = torch.randint(0, kv_len, (batch,), generator=generator, dtype=torch.int32) // 2 if below(2) else None
    settings = {
        "block_size": (16, 32)[below(2)],
        "causal": causal,
        "scale": 0.3,
        "kv_start": kv_start,
        "kv_lens": kv_lens,
    }
    return [query, 2 * key, value], settings


def poisoned(tokens: Tensor, settings: dict[str, Any]) -> Tensor:
    """NaN wherever a key is not valid."""
    tokens = tokens.clone()
    for item in range(tokens.shape[0]):
        start = 0 if settings["kv_start"] is None else int(settings["kv_start"][item])
        stop = tokens.shape[2] if settings["kv_lens"] is None else int(settings["kv_lens"][item])
        tokens[item, :, :start] = torch.nan
        tokens[item, :, stop:] = torch.nan
    return tokens


@pytest.mark.parametrize("seeds", [range(part, part + 20) for part in range(0, 100, 20)])
def test_scores_are_the_references(seeds: range) -> None:
    for seed in seeds:
        (query, key, _), settings = random_call(seed)
        stride = (4, 8, 16)[seed % 3]
        scores = cpu.antidiagonal_scores(query, poisoned(key, settings), stride=stride, **settings)
        truth = reference.antidiagonal_scores(query.double(), key.double(), stride=stride, **settings)
        assert scores.dtype == query.dtype, seed
        torch.testing.assert_close(scores.double(), truth, atol=2e-5, rtol=1e-5, msg=f"seed {seed}")


@pytest.mark.parametrize("seeds", [range(part, part + 20) for part in range(0, 100, 20)])
def test_attention_and_log_sum_exp_are_the_references(seeds: range) -> None:
    for seed in seeds:
        (query, key, value), settings = random_call(seed)
        shape = reference.antidiagonal_scores(query, key, stride=4, **settings).shape
        block_mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5
        mask = KeyMask(settings["causal"], settings["kv_start"], settings["kv_lens"])
        sizes = (query.shape[0], query.shape[2], key.shape[2])
        block_mask &= mask.valid_blocks(*sizes, block_size=settings["block_size"], device=query.device)
        exact = [part.double() for part in (query, key, value)]
        truth, truth_lse = reference.block_sparse_forward(*exact, block_mask, **settings)
        # NaN in padding must reach neither output.
        key, value = poisoned(key, settings), poisoned(value, settings)
        output, lse = cpu.block_sparse_forward(query, key, value, *mask_to_lists(block_mask), **settings)
        assert output.is_contiguous()
        torch.testing.assert_close(output.double(), truth, atol=1e-5, rtol=1e-5, msg=f"seed {seed}")
        torch.testing.assert_close(lse.double(), truth_lse, atol=1e-5, rtol=1e-5, msg=f"seed {seed}")


@pytest.mark.parametrize("onednn_is_faster", [False, True])
def test_fused_attention_and_two_products_are_the_references(
    onednn_is_faster: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which of them a CPU takes depends on its vectors; both are tested on every CPU."""
    from xattn_video.ops.cpu import tensors

    if onednn_is_faster and not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(tensors, "_onednn_is_faster", lambda: onednn_is_faster)
    test_scores_are_the_references(range(30))
    test_attention_and_log_sum_exp_are_the_references(range(60))
    for dtype in DTYPES:
        test_error_is_at_most_that_of_eager_attention_and_rounding(dtype, "video")


def eager(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Attention by three operations in the inputs' dtype."""
    logits = (query @ key.transpose(-1, -2)) * query.shape[3] ** -0.5
    return torch.softmax(logits.masked_fill(~mask, -torch.inf), dim=-1) @ value


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inputs", ["random", "video", "text"])
def test_error_is_at_most_that_of_eager_attention_and_rounding(dtype: torch.dtype, inputs: str) -> None:
    causal = inputs == "text"
    if inputs == "random":
        generator = torch.Generator().manual_seed(0)
        query, key, value = (torch.randn(1, 3, 700, 48, generator=generator).to(dtype) for _ in range(3))
    elif inputs == "video":
        query, key, value = video_like_qkv(1, 3, 4, 12, 14, 48, dtype=dtype, text_tokens=28)
    else:
        query, key, value = causal_text_like_qkv(1, 3, 700, 48, dtype=dtype)
    exact = [part.double() for part in (query, key, value)]
    scores = score_blocks(exact[0], exact[1], block_size=64, causal=causal, backend="reference")
    settings: dict[str, Any] = {"block_size": 64, "causal": causal}
    block_mask = scores > 0.3
    block_mask |= torch.eye(block_mask.shape[-1], dtype=torch.bool)
    truth = block_sparse_attention(*exact, block_mask, backend="reference", **settings)
    output = block_sparse_attention(query, key, value, block_mask, backend="cpu", **settings)

    mask = block_mask.repeat_interleave(64, 2).repeat_interleave(64, 3)[:, :, :700, :700]
    mask = mask.tril() if causal else mask
    allowed = relative_error(eager(query, key, value, mask), truth) + 2 * torch.finfo(dtype).eps
    assert output.dtype == dtype
    assert relative_error(output, truth) <= allowed


def test_scores_of_bfloat16_accumulate_in_float32() -> None:
    query, key, _ = video_like_qkv(1, 3, 4, 16, 16, 64, dtype=torch.bfloat16)
    truth = score_blocks(query.double(), key.double(), backend="reference")
    scores = score_blocks(query, key, backend="cpu")
    # A product that rounds to bfloat16 is off by a hundred times that.
    assert relative_error(scores, truth) < 1e-5


@pytest.mark.parametrize(("causal", "q_len"), [(False, 1100), (False, 300), (True, 1100)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threshold_one_is_dense_attention(causal: bool, q_len: int, dtype: torch.dtype) -> None:
    query, key, value = causal_text_like_qkv(2, 4, 1100, 40, dtype=dtype, kv_heads=2)
    query = query[:, :, :q_len]
    output = xattention(query, key, value, threshold=1.0, causal=causal, backend="cpu", min_tokens=0)
    dense = scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=True)
    # Both sum in another order, and both round their result.
    assert relative_error(output, dense) < max(2e-6, 4 * torch.finfo(dtype).eps)


def test_same_result_on_threads_and_with_batches_apart(two_threads: None) -> None:
    query, key, value = video_like_qkv(2, 4, 4, 16, 20, 64, kv_heads=2, text_tokens=9)
    bounds = {"kv_lens": torch.tensor([1289, 1100]), "kv_start": torch.tensor([0, 77])}
    config = XAttnConfig(backend="cpu")
    output = xattention(query, key, value, config, **bounds)
    torch.set_num_threads(1)
    for item in range(2):
        apart = {name: bound[item : item + 1] for name, bound in bounds.items()}
        parts = [part[item : item + 1] for part in (query, key, value)]
        torch.testing.assert_close(output[item : item + 1], xattention(*parts, config, **apart), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_grad_modes_of_the_caller_hold_on_the_threads(two_threads: None, mode: Any) -> None:
    query, key, value = (part.requires_grad_() for part in video_like_qkv(1, 2, 2, 16, 32, 32))
    with mode():
        output = xattention(query, key, value, backend="cpu")
        output.mul_(2)
    assert not output.requires_grad
    assert torch.isfinite(output).all()


def test_no_other_thread_loses_its_threads(two_threads: None) -> None:
    query, key, value = video_like_qkv(1, 2, 2, 16, 32, 32)
    xattention(query, key, value, backend="cpu")
    seen = []
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert [torch.get_num_threads(), *seen] == [2, 2]


def test_operations_inside_a_task_are_serial_and_an_error_arrives(two_threads: None) -> None:
    if workers._openmp_set_num_threads() is None:
        pytest.skip("this torch has no OpenMP whose threads could be set")
    seen: dict[int, tuple[int, int]] = {}
    together = threading.Barrier(2, timeout=1000)

    def look(task: int, scratch: workers.Scratch) -> None:
        if task < 2:
            together.wait()
        seen[task] = (threading.get_ident(), torch.get_num_threads())

    workers.for_each(look, range(10))
    assert sorted(seen) == list(range(10))
    assert seen[0][0] != seen[1][0]
    assert {threads for _, threads in seen.values()} == {1}

    def fail(task: int, scratch: workers.Scratch) -> None:
        raise KeyError(task)

    with pytest.raises(KeyError):
        workers.for_each(fail, range(4))


def test_mkl_is_serial_inside_a_task(two_threads: None) -> None:
    """MKL counts its threads itself: a product in a task would otherwise take those of the other tasks."""
    try:
        threads_of_mkl = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")).MKL_Get_Max_Threads
    except (AttributeError, OSError):
        pytest.skip("this torch has no MKL inside")
    seen: list[int] = []
    workers.for_each(lambda task, scratch: seen.append(threads_of_mkl()), range(4))
    assert (threads_of_mkl(), seen) == (2, [1] * 4)


@pytest.mark.parametrize("backend", ["cpu", "flex"])
@pytest.mark.parametrize("causal", [False, True])
def test_compiles_into_one_graph(causal: bool, backend: str) -> None:
    query, key, value = causal_text_like_qkv(1, 2, 1200, 32)
    kv_lens = torch.tensor([1180], dtype=torch.int32)
    config = XAttnConfig(backend=backend, min_tokens=0)

    def call(query: Tensor, key: Tensor, value: Tensor, kv_lens: Tensor) -> Tensor:
        output = xattention(query, key, value, config, causal=causal, kv_lens=kv_lens)
        assert isinstance(output, Tensor)
        return output + 1

    compiled = torch.compile(call, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(query, key, value, kv_lens), call(query, key, value, kv_lens))


def test_operators_and_their_fakes_agree() -> None:
    query, key, value = (part[:, :, :200] for part in video_like_qkv(1, 4, 2, 16, 16, 24, kv_heads=2))
    block_mask = torch.rand(1, 4, 4, 4) < 0.7
    kv_lens = torch.tensor([150], dtype=torch.int32)
    tests = ("test_schema", "test_faketensor")
    settings = {"causal": True, "block_size": 64, "scale": 0.2}
    scored = (query, key, None, kv_lens), {"stride": 8, **settings}
    torch.library.opcheck(cpu.antidiagonal_scores, *scored, test_utils=tests)
    valid = KeyMask(True, None, kv_lens).valid_blocks(1, 200, 200, block_size=64, device=query.device)
    lists = mask_to_lists(block_mask & valid)
    attended = (query, key, value, *lists, None, kv_lens), settings
    torch.library.opcheck(cpu.block_sparse_forward, *attended, test_utils=tests)


@pytest.mark.parametrize("causal", [False, True])
def test_memory_slabs_do_not_change_the_result(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from xattn_video.ops.cpu import scores as cpu_scores
    from xattn_video.ops.cpu import tensors

    query, key, value = video_like_qkv(1, 6, 2, 16, 20, 16, kv_heads=3)
    config = XAttnConfig(backend="cpu", min_tokens=0, block_size=64)
    expected = xattention(query, key, value, config, causal=causal)
    # One head at a time, three of the ten rows of blocks, and the shortest strips.
    monkeypatch.setattr(tensors, "_COPY_BYTES", 1)
    monkeypatch.setattr(cpu, "_SELECT_ELEMENTS", 3 * 6 * 10)
    monkeypatch.setattr(cpu_scores, "_STRIP_ELEMENTS", 1)
    monkeypatch.setattr(cpu_scores, "_MIN_STRIP_ROWS", 1)
    torch.testing.assert_close(xattention(query, key, value, config, causal=causal), expected)


@pytest.fixture
def short_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of one key block and pieces of two, as far as the rows of a strip allow: what long calls meet."""
    from xattn_video.ops.cpu import attend
    from xattn_video.ops.cpu import scores as cpu_scores

    monkeypatch.setattr(cpu_scores, "_MIN_STRIP_ROWS", 16)
    monkeypatch.setattr(cpu_scores, "_STRIP_ELEMENTS", 1)
    monkeypatch.setattr(cpu_scores, "_TILE_ELEMENTS", 1)
    monkeypatch.setattr(attend, "_PIECE_ELEMENTS", 1)


def test_scores_in_tiles_are_the_references(short_pieces: None) -> None:
    for seed in range(60):
        test_scores_are_the_references(range(seed, seed + 1))


def test_attention_in_pieces_is_the_references(short_pieces: None) -> None:
    for seed in range(60):
        test_attention_and_log_sum_exp_are_the_references(range(seed, seed + 1))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("causal", [False, True])
def test_in_pieces_too_nan_shows_where_it_is_seen(bad: float, causal: bool, short_pieces: None) -> None:
    query, key, value = causal_text_like_qkv(1, 2, 300, 24)
    key[:, 1, 130] = bad
    settings: dict[str, Any] = {"block_size": 32, "causal": causal}
    scores, truth = (score_blocks(query, key, stride=8, backend=name, **settings) for name in ("cpu", "reference"))
    # What is said of a block that no query of the row sees does not matter.
    valid = KeyMask(causal).valid_blocks(1, 300, 300, block_size=32, device=key.device)
    assert torch.equal(scores.isnan() & valid, truth.isnan() & valid)
    mask = torch.ones(1, 2, 10, 10, dtype=torch.bool)
    output, exact = (
        block_sparse_attention(query, key, value, mask, backend=name, **settings) for name in ("cpu", "reference")
    )
    assert torch.equal(output.isnan(), exact.isnan())
    assert exact.isnan().any()
    assert not exact[:, 0].isnan().any()


@pytest.mark.parametrize("layout", ["whole", "odd", "bfloat16", "transposed"])
def test_keys_in_every_form_give_the_references_scores(layout: str) -> None:
    """Keys that fill their groups, lie densely and have the right type are used without a copy."""
    query, key, _ = causal_text_like_qkv(2, 4, 512, 24, kv_heads=2)
    if layout == "odd":
        query, key = query[:, :, :509], key[:, :, :509]
    if layout == "bfloat16":
        query, key = query.bfloat16(), key.bfloat16()
    if layout == "transposed":
        query, key = (part.transpose(1, 2).contiguous().transpose(1, 2) for part in (query, key))
    before = key.clone()
    truth = score_blocks(query.double(), key.double(), block_size=64, backend="reference")
    torch.testing.assert_close(
        score_blocks(query, key, block_size=64, backend="cpu").double(), truth, atol=2e-5, rtol=1e-5
    )
    assert torch.equal(key, before)


def test_plain_products_are_those_of_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    from xattn_video.ops.cpu import tensors

    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    generator = torch.Generator().manual_seed(0)
    for rows, columns, inner in itertools.product((1, 33), (5, 128), (1, 40)):
        left = torch.randn(rows, inner, generator=generator)
        right = torch.randn(columns, inner, generator=generator)
        monkeypatch.setattr(tensors, "_onednn_is_faster", lambda: False)
        plain = tensors.product(left, right)
        monkeypatch.setattr(tensors, "_onednn_is_faster", lambda: True)
        torch.testing.assert_close(tensors.product(left, right), plain)
        torch.testing.assert_close(tensors.product(left, right.t().contiguous().t()), plain)
