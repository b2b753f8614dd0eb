"""The sparse call: score, select and attend, for long calls a few query blocks at a time.

In such chunks what a call holds beside its inputs and its output stays under a bound.

Scores, lists and masks have an entry for every pair of a query block and a key block, so they grow with the square of
the length. The rows of query blocks are independent of each other: a few at a time give the same result.

What a backend needs beside them grows with the length itself and is not counted here:

* Triton: the scratch of the scoring kernel, 4.5 bytes for each key block, row of a strip and multiprocessor. With 128
  rows and 132 multiprocessors that is 71 MB at 119,056 tokens and 620 MB at 1,048,576. It is free again before the
  lists are made: as long as it is below half of the default bound (up to 226,000 tokens) it adds nothing to the peak.
* CPU: copies in float32 of one head's keys and values, unless they are float32, contiguous and whole blocks; and
  buffers of about 10 to 25 MB for each thread, whatever the length.
* `reference`, and `flex` on a CPU: every logit of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config import XAttnConfig
from . import reference
from .backends import SORT_BYTES, Backend
from .call_blocks import call_blocks, exact_type
from .key_mask import KeyMask, num_blocks

# Bytes for each pair of blocks and each batch item: which are valid and which are forced.
_MASK_BYTES = 2


class Call(NamedTuple):
    """The arguments of an attention call, checked, or of a range of its query tokens with the keys that they may see.

    Attributes:
        query: `[B, Hq, n, D]`.
        key, value: `[B, Hkv, m, D]`.
        mask: which of those m keys each query sees.
        scale: factor on the products.
        threshold: a number or a tensor, 0-d or `[Hq]`.
        dense_tokens: token range of the whole joint sequence that stays exact, or None.
        frame_tokens: tokens of one latent frame, or None where they are no grid of whole frames.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: KeyMask
    scale: float
    threshold: float | Tensor
    dense_tokens: tuple[int, int] | None
    frame_tokens: int | None = None

    def cut(self, begin: int, end: int) -> Call | None:
        """The query tokens `[begin, end)` as a call, or None where they can see no key.

        In a causal call the last query sees the last valid key. So that this holds for the part too, its keys end as
        many tokens earlier as its queries do.
        """
        later = self.query.shape[2] - end
        query = self.query[:, :, begin:end]
        if not self.mask.causal or later == 0:
            return self._replace(query=query)
        keys = self.key.shape[2] - later
        if keys <= 0:
            return None
        key, value = self.key[:, :, :keys], self.value[:, :, :keys]
        return self._replace(query=query, key=key, value=value, mask=self.mask.without_last(later, keys))


class Part(NamedTuple):
    """A call, or the query blocks of one that are done at once.

    Attributes:
        tokens: the queries as a range of the whole call's.
        call: them, with the keys that they may see; None where they can see no key.
        scored: them and a few more, which their scores come from.
        valid, forced: the blocks that may and must be kept, bool `[B, 1, n, Nk]`.
    """

    tokens: slice
    call: Call | None
    scored: Call | None
    valid: Tensor
    forced: Tensor


class Outcome(NamedTuple):
    """What attention over chosen blocks gave. All of it stays on the device.

    Attributes:
        output: `[B, Hq, Sq, D]`.
        kept: counts that sum to the number of kept blocks.
        valid: the number of valid blocks of one head over the batch, int64 0-d.
    """

    output: Tensor
    kept: Tensor
    valid: Tensor


def attend_sparse(backend: Backend, call: Call, config: XAttnConfig) -> Outcome:
    """Score, select and attend."""

    def attend(part: Part) -> tuple[Tensor, Tensor]:
        lists = choose(backend, part, config)
        output, _ = attend_lists(backend, part, config, lists)
        return output, lists[1]

    return in_parts(backend, call, config, attend)


def in_parts(
    backend: Backend,
    call: Call,
    config: XAttnConfig,
    attend: Callable[[Part], tuple[Tensor, Tensor]],
    *,
    more_pair_bytes: int = 0,
) -> Outcome:
    """Do a call whole, or a few query blocks at a time where it is long.

    Args:
        attend: gives a part's output and the counts of its kept blocks. It is not asked for parts that see no key.
        more_pair_bytes: what it holds for each pair of blocks and each head beside what the stages do.
    """
    query, kv_len = call.query, call.key.shape[2]
    pair_bytes = backend.pair_bytes if config.selection == "threshold" else SORT_BYTES
    rows = rows_per_chunk(
        query,
        kv_len,
        block_size=config.block_size,
        pair_bytes=pair_bytes + more_pair_bytes,
        max_bytes=config.max_extra_mib << 20,
    )
    blocks = num_blocks(query.shape[2], config.block_size)
    if rows < blocks:
        sizes = query.shape[0], query.shape[2], kv_len
        valid = call.mask.count_valid_blocks(*sizes, block_size=config.block_size, device=query.device)
        output = torch.empty_like(query)
        total = torch.zeros((), dtype=torch.int64, device=query.device)
        for part in parts_of(call, config, rows, range(0, blocks, rows)):
            if part.call is None:
                output[:, :, part.tokens] = 0
                continue
            output[:, :, part.tokens], kept = attend(part)
            total = total + kept.sum()
        return Outcome(output, total, valid)
    known = call_blocks(query, kv_len, call.mask, **_rules(call, config))
    whole = Part(slice(0, query.shape[2]), call, call, known.valid, known.forced)
    return Outcome(*attend(whole), known.total)


def rows_per_chunk(query: Tensor, kv_len: int, *, block_size: int, pair_bytes: int, max_bytes: int) -> int:
    """Query blocks that one chunk of a call takes: all of them where the whole call stays under the bound.

    Args:
        query: `[B, Hq, Sq, D]`; only its sizes and its dtype are read.
        kv_len: key length Sk.
        block_size: tokens per block.
        pair_bytes: bytes that are held for each pair of blocks and each head.
        max_bytes: the bound.

    Returns:
        at least 1, even where one row is larger than the bound; chunks of a call are about equal.
    """
    batch, heads, q_len, head_dim = query.shape
    rows, columns = num_blocks(q_len, block_size), num_blocks(kv_len, block_size)
    row_bytes = batch * columns * (heads * pair_bytes + _MASK_BYTES)
    if rows * row_bytes <= max_bytes:
        return rows
    # A chunk's output is held until it is copied to its place, and so are its log-sum-exps.
    row_bytes += batch * heads * block_size * (head_dim * query.element_size() + 4)
    chunks = num_blocks(rows, max(max_bytes // row_bytes, 1))
    return num_blocks(rows, chunks)


def parts_of(call: Call, config: XAttnConfig, rows: int, starts: Iterable[int]) -> Iterator[Part]:
    """Spans of `rows` query blocks of a call, from each of these blocks on."""
    query, key, mask = call.query, call.key, call.mask
    batch, _, q_len, _ = query.shape
    kv_len, size = key.shape[2], config.block_size
    # The last group of keys that a query group sees may hold keys which are later than that group of queries. The
    # scores of the whole call take them in, so a chunk's last group must not be the last one that is scored.
    cut = mask.causal and (mask.kv_lens is not None or (kv_len - q_len) % config.stride)
    more = config.stride if cut else 0
    for first in starts:
        begin, end = first * size, min((first + rows) * size, q_len)
        part = call.cut(begin, end)
        scored = call.cut(begin, min(end + more, q_len)) if more else part
        valid, forced = mask.valid_and_forced_blocks(
            batch, q_len, kv_len, rows=(first, num_blocks(end, size)), device=query.device, **_rules(call, config)
        )
        columns = 0 if part is None else num_blocks(part.key.shape[2], size)
        yield Part(slice(begin, end), part, scored, valid[..., :columns], forced[..., :columns])


def choose(backend: Backend, part: Part, config: XAttnConfig) -> tuple[Tensor, Tensor]:
    """The lists of a part's kept blocks: indices int32 `[B, H, n, Nk]` and counts int32 `[B, H, n]`."""
    assert part.call is not None
    rule: dict[str, Any] = {"threshold": part.call.threshold, "top_k": config.top_k, "top_ratio": config.top_ratio}
    return select_lists(backend, score(backend, part, config), part.valid, part.forced, **rule)


def score(backend: Backend, part: Part, config: XAttnConfig) -> Tensor:
    """The scores of a part's blocks, float32 `[B, H, n, Nk]`."""
    scored, valid = part.scored, part.valid
    assert scored is not None
    scores = backend.antidiagonal_scores(
        scored.query,
        scored.key,
        stride=config.stride,
        block_size=config.block_size,
        scale=scored.scale,
        **scored.mask.keywords,
    )
    return scores if scored is part.call else scores[:, :, : valid.shape[2], : valid.shape[3]]


def attend_lists(
    backend: Backend, part: Part, config: XAttnConfig, lists: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Attention of a part over lists of blocks: output and natural log-sum-exp."""
    call = part.call
    assert call is not None
    return backend.block_sparse_forward(
        call.query,
        call.key,
        call.value,
        *lists,
        block_size=config.block_size,
        scale=call.scale,
        **call.mask.keywords,
    )


def _rules(call: Call, config: XAttnConfig) -> dict[str, Any]:
    """What makes blocks valid and forced beside the lengths: arguments of `KeyMask.valid_and_forced_blocks`."""
    return {
        "block_size": config.block_size,
        "dense_tokens": call.dense_tokens,
        "dense_last": config.dense_last,
        "anchors": config.anchors or 0,
        "frame_tokens": call.frame_tokens if config.anchors else None,
    }


def select_lists(
    backend: Backend,
    scores: Tensor,
    valid: Tensor,
    forced: Tensor,
    *,
    threshold: float | Tensor,
    top_k: int | None = None,
    top_ratio: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The kept blocks as lists: indices int32 `[B, H, Nq, Nk]` and counts int32 `[B, H, Nq]`.

    Valid and forced are bool `[B, 1, Nq, Nk]`. A threshold is the backend's; the rules of the ablations sort.
    """
    if top_k is not None:
        count = torch.tensor(top_k, device=scores.device)
    elif top_ratio is not None:
        # 0.3 of 50 blocks is 15 and 0.14 of them 7, whatever binary fractions say
        rows = valid.sum(-1, keepdim=True).to(exact_type(valid.device))
        count = (rows * top_ratio - 1e-9).ceil().clamp(min=1).to(torch.int64)
    else:
        return backend.select(scores, valid, forced, threshold=threshold)
    return backend.mask_to_lists(reference.select_top(scores, valid, forced, count=count))
