"""xattention() and block_sparse_attention() as a user meets them: free oracles, causality, padding, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention

from xattn_video import XAttnConfig, block_sparse_attention, score_blocks, select_blocks, xattention
from xattn_video.ops import KeyMask, dense_attention

BACKENDS = ["reference", "cpu"]


def random_qkv(batch, heads, kv_heads, q_len, kv_len, head_dim, *, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    sizes = [(heads, q_len), (kv_heads, kv_len), (kv_heads, kv_len)]
    query, key, value = (torch.randn(batch, count, length, head_dim, generator=generator) for count, length in sizes)
    # Sharper than unit variance, so that a wrong set of keys shows.
    return (2 * query).to(dtype), key.to(dtype), value.to(dtype)


def run(query, key, value, backend, **arguments):
    settings = {"stride": 4, "block_size": 32, "min_tokens": 0, "backend": backend}
    return xattention(query, key, value, **{**settings, **arguments})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("q_len", "kv_len", "kv_start", "kv_lens"),
    [
        (256, 256, None, None),
        (201, 201, None, None),
        (77, 203, None, None),
        (201, 201, [0, 50], None),
        (201, 201, None, [201, 130]),
        (90, 203, [33, 64], [203, 171]),
    ],
)
def test_threshold_one_is_dense_attention(backend, causal, q_len, kv_len, kv_start, kv_lens):
    query, key, value = random_qkv(2, 4, 2, q_len, kv_len, 40)
    masking = {
        "causal": causal,
        "kv_start": None if kv_start is None else torch.tensor(kv_start),
        "kv_lens": None if kv_lens is None else torch.tensor(kv_lens),
    }
    output, stats = run(query, key, value, backend, threshold=1.0, return_stats=True, **masking)
    assert stats.density == 1.0
    assert stats.dense_reason is None
    torch.testing.assert_close(output, dense_attention(query, key, value, KeyMask(**masking)), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("minimum", [0, 1024])
@pytest.mark.parametrize("causal", [False, True])
def test_padding_may_hold_anything(causal, minimum):
    """A cache that was never written to: in sparse and in dense calls."""
    query, key, value = random_qkv(2, 2, 1, 64, 64, 16)
    bounds = {"kv_start": torch.tensor([0, 7]), "kv_lens": torch.tensor([50, 64])}
    settings = {"threshold": 1.0, "min_tokens": minimum, "causal": causal, **bounds}
    clean = run(query, key, value, "auto", **settings)
    for part in (key, value):
        part[0, :, 50:], part[1, :, :7] = torch.nan, torch.inf
    assert torch.equal(
        run(query, key, value, "auto", threshold=1.0, min_tokens=minimum, causal=causal, **bounds), clean
    )


def test_thresholds_of_heads_are_as_exact_as_one_for_all():
    """Ten equal blocks at 0.3 are three, however the number is given, and whatever torch's default type is."""
    tensor = torch.ones(1, 2, 320, 16)
    kept = {run(tensor, tensor, tensor, "cpu", threshold=t, return_stats=True)[1].density for t in (0.3, (0.3, 0.3))}
    assert kept == {0.3}
    torch.set_default_dtype(torch.bfloat16)
    try:
        stats = run(tensor, tensor, tensor, "cpu", threshold=(0.999, 0.2), return_stats=True)[1]
    finally:
        torch.set_default_dtype(torch.float32)
    assert stats.density == pytest.approx(0.6)


@pytest.mark.parametrize("causal", [False, True])
def test_dense_attention_follows_the_masking_rules(causal):
    query, key, value = random_qkv(2, 2, 1, 50, 80, 16)
    start, stop = [10, 60], [80, 70]
    got = dense_attention(query, key, value, KeyMask(causal, torch.tensor(start), torch.tensor(stop)))
    for b in range(2):
        for i in range(50):
            end = min(stop[b], i + stop[b] - 50 + 1) if causal else stop[b]
            if end <= start[b]:
                assert not got[b, :, i].any()
                continue
            keys, values = key[b : b + 1, :, start[b] : end], value[b : b + 1, :, start[b] : end]
            want = scaled_dot_product_attention(query[b : b + 1, :, i : i + 1], keys, values, enable_gqa=True)
            torch.testing.assert_close(got[b, :, i], want[0, :, 0], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_block_mask_is_obeyed(backend):
    query, key, value = random_qkv(2, 3, 3, 100, 140, 24)
    mask = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(3)) < 0.4
    mask[0, 1, 2] = False
    output, lse = block_sparse_attention(query, key, value, mask, block_size=32, return_lse=True, backend=backend)
    tokens = mask.repeat_interleave(32, 2)[:, :, :100].repeat_interleave(32, 3)[..., :140]
    logits = (query @ key.transpose(-1, -2) / 24**0.5).masked_fill(~tokens, -torch.inf)
    torch.testing.assert_close(lse, logits.logsumexp(-1), atol=1e-5, rtol=1e-5)
    want = torch.softmax(logits, -1).nan_to_num() @ value
    torch.testing.assert_close(output, want, atol=2e-6, rtol=1e-5)
    assert not output[0, 1, 64:96].any()
    assert torch.isneginf(lse[0, 1, 64:96]).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_batch_items_and_heads_are_independent(backend):
    query, key, value = random_qkv(3, 4, 2, 190, 190, 32)
    lens = torch.tensor([190, 120, 64])
    together = run(query, key, value, backend, threshold=0.6, kv_lens=lens)
    for b in range(3):
        item = slice(b, b + 1)
        alone = run(query[item], key[item], value[item], backend, threshold=0.6, kv_lens=lens[item])
        torch.testing.assert_close(together[item], alone, atol=2e-6, rtol=1e-5)
    pair = run(query[:, 2:], key[:, 1:], value[:, 1:], backend, threshold=0.6, kv_lens=lens)
    torch.testing.assert_close(together[:, 2:], pair, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_takes_no_mass(backend):
    query, key, value = random_qkv(2, 2, 2, 160, 160, 32)
    start, stop = torch.tensor([0, 30]), torch.tensor([97, 160])
    before = run(query, key, value, backend, threshold=0.7, kv_start=start, kv_lens=stop)
    scores = score_blocks(query, key, stride=4, block_size=32, kv_start=start, kv_lens=stop, backend=backend)
    assert not scores[0, :, :, 4:].any()
    torch.testing.assert_close(scores.sum(-1), torch.full((2, 2, 5), 8.0))
    for b in range(2):
        padding = torch.ones(160, dtype=torch.bool)
        padding[start[b] : stop[b]] = False
        key[b, :, padding] = 100.0
        value[b, :, padding] = float("nan")
    after = run(query, key, value, backend, threshold=0.7, kv_start=start, kv_lens=stop)
    assert torch.equal(before, after)


@pytest.mark.parametrize("backend", BACKENDS)
def test_left_padding_equals_the_short_prompt(backend):
    """Causal, 40 padded tokens in front: the real tokens see what they would see alone, up to block edges."""
    query, key, value = random_qkv(1, 2, 2, 128 + 64, 128 + 64, 32)
    padded = run(query, key, value, backend, causal=True, threshold=0.8, kv_start=torch.tensor([64]))
    alone = run(query[:, :, 64:], key[:, :, 64:], value[:, :, 64:], backend, causal=True, threshold=0.8)
    assert not padded[:, :, :64].any()
    torch.testing.assert_close(padded[:, :, 64:], alone, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("q_len", "kv_len"), [(192, 192), (96, 203), (190, 190)])
def test_causality(backend, q_len, kv_len):
    query, key, value = random_qkv(1, 2, 2, q_len, kv_len, 32)
    changed = 120 + kv_len - q_len if q_len > 120 else kv_len - 30
    query_changed = changed - (kv_len - q_len)
    other_key, other_value = key.clone(), value.clone()
    other_key[:, :, changed] += 5
    other_value[:, :, changed] += 5

    exact, exact_other = (
        run(query, k, v, backend, causal=True, threshold=1.0) for k, v in ((key, value), (other_key, other_value))
    )
    torch.testing.assert_close(exact[:, :, :query_changed], exact_other[:, :, :query_changed])
    assert not torch.allclose(exact[:, :, query_changed:], exact_other[:, :, query_changed:])

    # With selection, only the query block that holds the changed token may differ before it.
    sparse, sparse_other = (
        run(query, k, v, backend, causal=True, threshold=0.6) for k, v in ((key, value), (other_key, other_value))
    )
    first_of_block = query_changed // 32 * 32
    torch.testing.assert_close(sparse[:, :, :first_of_block], sparse_other[:, :, :first_of_block])

    # For a fixed block mask no output depends on a later token.
    mask = select_blocks(
        score_blocks(query, key, stride=4, block_size=32, causal=True, backend=backend),
        threshold=0.6,
        causal=True,
        block_size=32,
        q_len=q_len,
        kv_len=kv_len,
    )
    fixed, fixed_other = (
        block_sparse_attention(query, k, v, mask, block_size=32, causal=True, backend=backend)
        for k, v in ((key, value), (other_key, other_value))
    )
    torch.testing.assert_close(fixed[:, :, :query_changed], fixed_other[:, :, :query_changed])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chunks", [(64, 64, 64), (50, 77, 65), (33, 159)])
def test_chunked_prefill_equals_one_prefill_at_threshold_one(backend, chunks):
    query, key, value = random_qkv(2, 4, 2, 192, 192, 32)
    whole = run(query, key, value, backend, causal=True, threshold=1.0)
    done = 0
    for chunk in chunks:
        stop = done + chunk
        part = run(query[:, :, done:stop], key[:, :, :stop], value[:, :, :stop], backend, causal=True, threshold=1.0)
        torch.testing.assert_close(part, whole[:, :, done:stop], atol=2e-6, rtol=1e-5)
        done = stop


@pytest.mark.parametrize("backend", BACKENDS)
def test_text_rows_are_exact(backend):
    query, key, value = random_qkv(1, 2, 2, 200, 200, 32)
    output, stats = run(query, key, value, backend, threshold=0.3, dense_tokens=(180, 200), return_stats=True)
    dense = scaled_dot_product_attention(query, key, value)
    assert stats.density < 0.9
    torch.testing.assert_close(output[:, :, 160:], dense[:, :, 160:], atol=2e-6, rtol=1e-5)
    assert not torch.allclose(output[:, :, :160], dense[:, :, :160], atol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_last_queries_of_a_prompt_are_exact_where_asked(backend):
    query, key, value = random_qkv(2, 4, 2, 200, 264, 32)
    settings = {"causal": True, "threshold": 0.3, "kv_start": torch.tensor([0, 40], dtype=torch.int32)}
    paper = run(query, key, value, backend, **settings)
    output = run(query, key, value, backend, dense_last=20, **settings)
    exact = run(query, key, value, backend, **{**settings, "threshold": 1.0})
    # The block of tokens 160 to 192 holds the first of the last 20.
    torch.testing.assert_close(output[:, :, 160:], exact[:, :, 160:], atol=2e-6, rtol=1e-5)
    assert torch.equal(output[:, :, :160], paper[:, :, :160])
    assert not torch.allclose(paper[:, :, 160:], exact[:, :, 160:], atol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_layout_of_diffusers_needs_no_copy(backend):
    query, key, value = random_qkv(2, 3, 3, 150, 150, 32)
    strided = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in (query, key, value)]
    assert not strided[0].is_contiguous()
    torch.testing.assert_close(
        run(*strided, backend, threshold=0.7), run(query, key, value, backend, threshold=0.7), atol=2e-6, rtol=1e-5
    )


def test_under_autocast_it_is_cast_as_pytorchs_attention_is():
    """Models with float32 weights give it float32 queries beside bfloat16 values."""
    query, key, value = random_qkv(1, 2, 2, 200, 200, 32)
    mixed = (query, key, value.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wanted = scaled_dot_product_attention(*mixed)
        exact = run(*mixed, "auto", threshold=1.0)
        output, stats = run(*mixed, "auto", threshold=0.7, return_stats=True)
    assert wanted.dtype == exact.dtype == output.dtype == torch.bfloat16
    assert (exact.float() - wanted.float()).norm() < 0.01 * wanted.float().norm()
    # the scores are not rounded on the way
    cast = [part.bfloat16() for part in mixed]
    plain, plain_stats = run(*cast, "auto", threshold=0.7, return_stats=True)
    assert torch.equal(output, plain)
    assert int(stats.kept) == int(plain_stats.kept) < int(stats.valid)
    assert run(*(part.double() for part in mixed), "reference", threshold=1.0).dtype == torch.float64


def test_float64_stays_float64():
    query, key, value = (tensor.double() for tensor in random_qkv(1, 2, 2, 100, 100, 32))
    output = run(query, key, value, "reference", threshold=1.0)
    assert output.dtype == torch.float64
    assert score_blocks(query, key, backend="reference").dtype == torch.float64
    torch.testing.assert_close(output, scaled_dot_product_attention(query, key, value), atol=1e-12, rtol=1e-12)


def test_scale_is_used_in_scores_and_attention():
    query, key, value = random_qkv(1, 2, 2, 128, 128, 32)
    got = run(query, key, value, "auto", threshold=0.7, scale=0.05)
    want = run(query * 0.05 * 32**0.5, key, value, "auto", threshold=0.7)
    torch.testing.assert_close(got, want, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("reason", "arguments", "grad"),
    [
        ("min_tokens", {"min_tokens": 300}, False),
        ("decode", {"causal": True, "block_size": 256, "stride": 4}, False),
        ("autograd", {}, True),
    ],
)
def test_dense_calls_name_their_reason(reason, arguments, grad):
    query, key, value = random_qkv(1, 2, 2, 200, 200, 32)
    query.requires_grad_(grad)
    output, stats = run(query, key, value, "auto", return_stats=True, threshold=0.3, **arguments)
    assert stats.dense_reason == reason
    assert stats.density == 1.0
    causal = arguments.get("causal", False)
    torch.testing.assert_close(output, dense_attention(query, key, value, KeyMask(causal)))
    if grad:
        output.sum().backward()
        assert query.grad is not None
        with torch.no_grad():
            assert run(query, key, value, "auto", return_stats=True)[1].dense_reason is None


def test_min_tokens_compares_the_key_length():
    query, key, value = random_qkv(1, 2, 2, 64, 300, 32)
    _, stats = run(query, key, value, "auto", min_tokens=300, return_stats=True)
    assert stats.dense_reason is None


def test_settings_come_from_the_config_and_overrides_win():
    query, key, value = random_qkv(1, 2, 2, 256, 256, 32)
    config = XAttnConfig(stride=4, block_size=32, threshold=0.9, min_tokens=0)
    _, loose = xattention(query, key, value, config, return_stats=True)
    _, tight = xattention(query, key, value, config, threshold=0.3, return_stats=True)
    _, tensor = xattention(query, key, value, config, threshold=torch.tensor([0.3, 0.3]), return_stats=True)
    _, per_head = xattention(query, key, value, config.replace(threshold=(0.3, 0.3)), return_stats=True)
    assert tight.density < loose.density < 1
    assert tight.kept == tensor.kept == per_head.kept


def cut(tensor):
    return tensor[..., :-1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"query": lambda t: t[0]}, "query must be"),
        ({"query": lambda t: t.long()}, "query must be a floating point tensor"),
        ({"query": lambda t: t[:, :, :0]}, "query must not be empty"),
        ({"query": lambda t: t[:1]}, "one batch size, got 1 and 2"),
        ({"query": lambda t: t[:, :3]}, "multiple of key heads, got 3 and 2"),
        ({"query": cut}, "one head_dim, got 31 and 32"),
        ({"query": lambda t: t.half()}, "one dtype"),
        ({"value": lambda t: t[:, :, :-1]}, "value must have key's shape"),
        ({"value": lambda t: t.half()}, "value must have key's dtype"),
    ],
)
def test_tensors_that_do_not_go_together_are_refused(change, words):
    tensors = dict(zip(("query", "key", "value"), random_qkv(2, 4, 2, 64, 64, 32), strict=True))
    for name, function in change.items():
        tensors[name] = function(tensors[name])
    with pytest.raises(ValueError, match=words):
        xattention(**tensors)


def test_settings_that_cannot_be_are_refused():
    query, key, value = random_qkv(1, 2, 2, 64, 64, 32)
    with pytest.raises(TypeError, match=r"does not know: treshold \(did you mean threshold\?\)"):
        xattention(query, key, value, treshold=0.9)
    with pytest.raises(TypeError, match=r"causall \(did you mean causal\?\), is_causal \(here it is causal\)"):
        xattention(query, key, value, is_causal=True, causall=True)
    with pytest.raises(ValueError, match="stride must divide block_size"):
        score_blocks(query, key, stride=64, block_size=32)
    wide = torch.randn(1, 2, 64, 288)
    with pytest.raises(ValueError, match="head_dim must be 256 or less, got 288"):
        xattention(wide, wide, wide)
    with pytest.raises(ValueError, match="block_mask must have shape"):
        block_sparse_attention(query, key, value, torch.ones(1, 2, 3, 3, dtype=torch.bool), block_size=32)
    with pytest.raises(ValueError, match="block_mask must be bool"):
        block_sparse_attention(query, key, value, torch.ones(1, 2, 2, 2), block_size=32)


def test_a_named_backend_that_cannot_run_says_what_can(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    query, key, value = random_qkv(1, 2, 2, 64, 64, 32)
    with pytest.raises(ValueError, match=r"'triton' cannot run here: .*GPU.*usable: reference, cpu"):
        xattention(query, key, value, backend="triton", min_tokens=0)


@pytest.mark.parametrize("backend", ["cpu", "reference", "flex"])
def test_what_is_no_number_shows_where_dense_attention_shows_it(backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 512, 16, generator=generator) for _ in range(3))
    settings: dict[str, Any] = {"backend": backend, "min_tokens": 0, "block_size": 64, "threshold": 0.5}
    for bad in (torch.nan, torch.inf):
        bad_key = key.clone()
        bad_key[:, 1, 300] = bad
        output = xattention(query, bad_key, value, **settings)
        assert torch.equal(output.isnan(), dense_attention(query, bad_key, value).isnan())
        for selection in ({}, {"selection": "top_k", "top_k": 2}):
            _, stats = xattention(query, bad_key, value, return_stats=True, **settings, **selection)
            assert stats.density > 0.5
    bad_query = query.clone()
    bad_query[:, 1, 70] = torch.nan
    output, exact = xattention(bad_query, key, value, **settings), dense_attention(bad_query, key, value)
    assert torch.equal(output.isnan(), exact.isnan())
    neighbours = [row for row in range(64, 128) if row != 70]
    torch.testing.assert_close(output[:, 1, neighbours], exact[:, 1, neighbours])


@pytest.mark.parametrize("backend", ["cpu", "flex"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("settings", [{}, {"causal": True}, {"causal": True, "kv_lens": [219]}, {"kv_lens": [219]}])
def test_a_bad_value_spoils_the_same_rows_on_every_backend(backend: str, bad: float, settings: dict[str, Any]) -> None:
    """Those of the query blocks that keep its block, and of the other blocks none."""
    query, key, value = random_qkv(1, 2, 1, 250, 250, 32)
    value[0, 0, 100, 3] = bad
    settings = {name: torch.tensor(number) if name == "kv_lens" else number for name, number in settings.items()}
    sparse: dict[str, Any] = {**settings, "min_tokens": 0, "block_size": 32, "threshold": 0.4}
    want = xattention(query, key, value, backend="reference", **sparse)
    output = xattention(query, key, value, backend=backend, **sparse)
    assert torch.equal(output.isfinite(), want.isfinite())
    spoiled = ~want.isfinite()
    assert spoiled[..., 3].any()
    assert not spoiled[..., 3].all()
    assert not spoiled[..., :3].any()
    assert not spoiled[..., 4:].any()
    fine = want.isfinite()
    torch.testing.assert_close(output[fine], want[fine])


@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_what_is_no_dense_tensor_is_refused_by_name(name: str) -> None:
    tensors = dict.fromkeys(("query", "key", "value"), torch.ones(1, 2, 64, 16))
    with pytest.raises(TypeError, match=f"{name} must be a torch.Tensor, got ndarray"):
        xattention(**{**tensors, name: tensors[name].numpy()})
    with pytest.raises(ValueError, match=f"{name} must be a dense tensor, got layout torch.sparse_coo"):
        xattention(**{**tensors, name: tensors[name].to_sparse()})


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -float("inf")])
def test_a_scale_that_is_not_finite_is_refused(scale: float) -> None:
    tensor = torch.ones(1, 2, 64, 16)
    for call in (xattention, lambda *tensors, **settings: score_blocks(*tensors[:2], **settings)):
        with pytest.raises(ValueError, match=f"scale must be finite, got {scale}"):
            call(tensor, tensor, tensor, scale=scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [-0.25, 0.0])
def test_dense_attention_takes_every_scale(scale: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 300, 16, generator=generator).to(dtype) for _ in range(3))
    for q_len in (300, 200):
        rows = query[:, :, :q_len]
        wanted = xattention(
            *(part.double() for part in (rows, key, value)), causal=True, scale=scale, min_tokens=0, threshold=1.0,
            backend="reference",
        )  # fmt: skip
        got = dense_attention(rows, key, value, KeyMask(causal=True), scale=scale)
        torch.testing.assert_close(got.double(), wanted, rtol=0, atol=1e-5 if dtype == torch.float32 else 3e-2)


@pytest.mark.parametrize("backend", ["cpu", "reference", "flex"])
def test_the_stages_keep_their_dtypes_under_autocast(backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 256, 16, generator=generator) for _ in range(3))
    mask = torch.ones(1, 1, 2, 2, dtype=torch.bool)

    def both() -> list[Tensor]:
        output, lse = block_sparse_attention(query, key, value, mask, backend=backend, return_lse=True)
        return [score_blocks(query, key, backend=backend), output, lse]

    plain = both()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = both()
    for one, other in zip(plain, under, strict=True):
        assert one.dtype == other.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_a_function_transform_or_a_fake_mode_leaves_nothing_behind() -> None:
    query = torch.randn(1, 2, 1024, 16)
    torch.func.functionalize(lambda part: xattention(part, part, part))(query)
    assert not torch._is_functional_tensor(xattention(query, query, query))
    longer = torch.randn(1, 2, 2048, 16)
    with FakeTensorMode(allow_non_fake_inputs=True):
        xattention(longer, longer, longer)
    output, stats = xattention(longer, longer, longer, return_stats=True)
    assert type(output) is Tensor
    assert 0 < stats.density <= 1


def test_settings_by_keyword_compile_into_one_graph() -> None:
    query = torch.randn(1, 2, 256, 16)
    compiled = torch.compile(xattention, backend="eager", fullgraph=True)
    settings: dict[str, Any] = {"min_tokens": 0, "stride": 4, "threshold": 0.7}
    assert torch.equal(compiled(query, query, query, **settings), xattention(query, query, query, **settings))
