"""What a Triton kernel is held to, on any device: the interpreter's tests and the GPU's share these checks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from tests.residual_checks import check_stored, exact_residual
from xattn_video import xattention
from xattn_video.ops import reference, residual
from xattn_video.ops.block_lists import mask_to_lists
from xattn_video.ops.key_mask import KeyMask, num_blocks
from xattn_video.ops.triton import attention as attention_kernel
from xattn_video.ops.triton import attention_forward as attention_operator
from xattn_video.ops.triton import block_lists as lists_kernel
from xattn_video.ops.triton import residual as residual_kernel
from xattn_video.ops.triton import scores as scores_kernel
from xattn_video.ops.triton import selection as selection_kernel
from xattn_video.ops.triton.descriptors import has_copy_engine
from xattn_video.ops.triton.launch import launch_config, positive_scale, unit_inner_stride


@dataclasses.dataclass(frozen=True)
class Problem:
    """One attention call. `layout` is how query, key and value lie in memory; padding is filled with NaN.

    content: "random"; "video", see `video_like`; or "huge", whose values are all near 3e37 and of one sign, so that
    float32 cannot hold the sum of a dozen of them.
    """

    heads: tuple[int, int] = (2, 2)
    lengths: tuple[int, int] = (128, 128)
    head_dim: int = 32
    dtype: torch.dtype = torch.float32
    batch: int = 1
    stride: int = 8
    block_size: int = 32
    causal: bool = False
    kv_start: tuple[int, ...] | None = None
    kv_lens: tuple[int, ...] | None = None
    layout: str = "bhsd"
    content: str = "random"
    scale: float | None = None
    seed: int = 0

    @property
    def factor(self) -> float:
        return self.head_dim**-0.5 if self.scale is None else self.scale

    def __str__(self) -> str:
        changed = [
            f"{field.name}={str(value).removeprefix('torch.')}"
            for field in dataclasses.fields(self)
            if (value := getattr(self, field.name)) != field.default
        ]
        return " ".join(changed).replace(", ", ",") or "plain"

    def tensors(self, device: str) -> tuple[Tensor, Tensor, Tensor]:
        """Query [B, Hq, Sq, D], key and value [B, Hkv, Sk, D]."""
        generator = torch.Generator().manual_seed(sum(self.lengths) + self.head_dim + self.seed)
        make = video_like if self.content == "video" else _random
        query = make(generator, self.batch, self.heads[0], self.lengths[0], self.head_dim)
        key = make(generator, self.batch, self.heads[1], self.lengths[1], self.head_dim)
        value = _random(generator, self.batch, self.heads[1], self.lengths[1], self.head_dim)
        if self.content == "video":
            # every run of tokens has a content of its own: a lost block cannot hide behind another or average out
            runs = _random(generator, self.batch, self.heads[1], self.lengths[1] // 40 + 1, self.head_dim)
            value = runs.repeat_interleave(40, dim=2)[:, :, : self.lengths[1]] + 0.3 * value
        if self.content == "huge":
            value = 3e37 * (1 + 0.1 * value)
        padding = ~self.valid_keys()
        key.masked_fill_(padding[:, None, :, None], torch.nan)
        value.masked_fill_(padding[:, None, :, None], torch.nan)
        query, key, value = (self._lay_out(tensor.to(device, self.dtype)) for tensor in (query, key, value))
        return query, key, value

    def _lay_out(self, tensor: Tensor) -> Tensor:
        if self.layout == "bshd":
            tensor = tensor.transpose(1, 2).contiguous().transpose(1, 2)
        elif self.layout == "bhds":
            tensor = tensor.transpose(2, 3).contiguous().transpose(2, 3)
        elif self.layout == "slice":
            tensor = torch.cat([tensor, tensor, tensor], dim=-1)[..., self.head_dim : 2 * self.head_dim]
        return tensor

    def bound(self, name: str, device: str) -> Tensor | None:
        values = getattr(self, name)
        return None if values is None else torch.tensor(values, dtype=torch.int32, device=device)

    def options(self, device: str) -> dict[str, Any]:
        """The keyword arguments that both stages share."""
        return {
            "block_size": self.block_size,
            "causal": self.causal,
            "scale": self.factor,
            "kv_start": self.bound("kv_start", device),
            "kv_lens": self.bound("kv_lens", device),
        }

    def unwritten_scores(self, device: str) -> Tensor:
        """NaN [B, Hq, Nq, Nk]."""
        blocks = (num_blocks(length, self.block_size) for length in self.lengths)
        return torch.full((self.batch, self.heads[0], *blocks), torch.nan, device=device)

    def valid_keys(self) -> Tensor:
        """Bool [B, Sk]."""
        position = torch.arange(self.lengths[1])
        start = torch.tensor(self.kv_start or [0] * self.batch)[:, None]
        stop = torch.tensor(self.kv_lens or [self.lengths[1]] * self.batch)[:, None]
        return (position >= start) & (position < stop)

    def visible(self) -> Tensor:
        """Which keys each query sees, bool [B, Sq, Sk]."""
        visible = self.valid_keys()[:, None, :].expand(-1, self.lengths[0], -1)
        if self.causal:
            stop = torch.tensor(self.kv_lens or [self.lengths[1]] * self.batch)[:, None, None]
            last = torch.arange(self.lengths[0])[:, None] + stop - self.lengths[0]
            visible = visible & (torch.arange(self.lengths[1]) <= last)
        return visible

    def valid_and_forced_blocks(self, device: str) -> tuple[Tensor, Tensor]:
        """Which blocks hold a visible pair, and which of them every selection keeps, bool [B, 1, Nq, Nk]."""
        mask = KeyMask(self.causal, self.bound("kv_start", device), self.bound("kv_lens", device))
        sizes = (self.batch, *self.lengths)
        return mask.valid_and_forced_blocks(*sizes, block_size=self.block_size, device=torch.device(device))

    def block_mask(self, device: str, density: float = 0.5) -> Tensor:
        """A random block mask; blocks without a visible pair may be set too, and one row is empty."""
        shape = (self.batch, self.heads[0], *(num_blocks(length, self.block_size) for length in self.lengths))
        mask = torch.rand(shape, generator=torch.Generator().manual_seed(self.seed + 1)) < density
        mask[0, 0, -1] = False
        return mask.to(device)


def _random(generator: torch.Generator, batch: int, heads: int, length: int, head_dim: int) -> Tensor:
    return torch.randn(batch, heads, length, head_dim, generator=generator)


def video_like(generator: torch.Generator, batch: int, heads: int, length: int, head_dim: int) -> Tensor:
    """Tokens of a short video: objects that cover runs of tokens, return in later frames and attract themselves.

    Objects are shared by query and key, so most of a query's mass lies in the few blocks that show its object.
    """
    objects = 3.0 * torch.randn(8, head_dim, generator=torch.Generator().manual_seed(3)).sign()
    shown = (torch.arange(length) // 40 * 5 % 8).expand(batch, heads, length)
    return objects[shown] * (2.0 / head_dim**0.25) + 0.3 * _random(generator, batch, heads, length, head_dim)


def relative_errors(got: Tensor, wanted: Tensor) -> Tensor:
    """Norm of the difference over the norm of the wanted tensor, [B, H]."""
    difference = (got.double() - wanted.double()).flatten(2).norm(dim=-1)
    return difference / wanted.double().flatten(2).norm(dim=-1).clamp(min=1e-30)


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """Norm of the difference over the norm of the wanted tensor."""
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


def _allowed(eager: Tensor, wanted: Tensor, dtype: torch.dtype) -> float:
    """The relative error that plain tensor code has too, and rounding.

    In float32 on a GPU 1e-5 at least: a library may split its sums, and is then more accurate than one sum in order
    (up to 2.4e-6 for these problems). A product in TF32 is off by 3e-4, a wrong block by more than 0.1.
    """
    floor = 1e-5 if dtype == torch.float32 and eager.is_cuda else 0.0
    return max(relative_error(eager, wanted) + 2 * torch.finfo(dtype).eps, floor)


def eager_attention(problem: Problem, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Attention as a model without fused kernels computes it: matmuls in the input dtype, softmax in float32."""
    repeats = problem.heads[0] // problem.heads[1]
    padding = ~problem.valid_keys()[:, None, :, None].to(query.device)
    keys = key.masked_fill(padding, 0).repeat_interleave(repeats, dim=1)
    values = value.masked_fill(padding, 0).repeat_interleave(repeats, dim=1)
    kept = mask.repeat_interleave(problem.block_size, 2).repeat_interleave(problem.block_size, 3)
    kept = kept[:, :, : problem.lengths[0], : problem.lengths[1]] & problem.visible()[:, None].to(query.device)
    logits = (query @ keys.transpose(-1, -2) * problem.factor).masked_fill(~kept, -torch.inf)
    probs = torch.softmax(logits.float(), dim=-1).nan_to_num(0.0).to(query.dtype)
    return probs @ values


def eager_scores(problem: Problem, query: Tensor, key: Tensor) -> Tensor:
    """Block scores as plain tensor code computes them: one matmul in the input dtype, softmax in float32."""
    size = problem.stride
    keys = key.masked_fill(~problem.valid_keys()[:, None, :, None].to(key.device), 0)
    sees = problem.visible().any(-1)
    queries = query.masked_fill(~sees[:, None, :, None].to(query.device), 0)
    key_rows = _in_blocks(keys.transpose(2, 3), size).movedim(2, 4).flatten(3)
    query_rows = _in_blocks(queries.transpose(2, 3), size).flip(-1).movedim(2, 4).flatten(3)
    key_rows = key_rows.repeat_interleave(problem.heads[0] // problem.heads[1], dim=1)
    visible = _any_in(problem.valid_keys(), size)[:, None, :] & _any_in(sees, size)[:, :, None]
    if problem.causal:
        offset = torch.tensor(problem.kv_lens or [problem.lengths[1]] * problem.batch) - problem.lengths[0]
        last = torch.arange(visible.shape[1]) * size + size - 1 + offset[:, None]
        visible = visible & (torch.arange(visible.shape[2]) * size <= last[:, :, None])
    visible = visible[:, None].to(query.device)
    logits = query_rows @ key_rows.transpose(-1, -2) * (problem.factor / size)
    probs = torch.softmax(logits.masked_fill(~visible, -torch.inf).float(), dim=-1).nan_to_num(0.0)
    groups = problem.block_size // size
    columns = _in_blocks(probs, groups).sum(-1)
    return _in_blocks(columns.transpose(2, 3), groups).sum(-1).transpose(2, 3)


def check_scores(problem: Problem, device: str) -> None:
    """Scores against float64, every element written, and rows that sum to their number of real query groups."""
    query, key, _ = problem.tensors(device)
    scores = problem.unwritten_scores(device)
    scores_kernel.launch_antidiagonal_scores(query, key, scores, stride=problem.stride, **problem.options(device))
    _judge_scores(problem, query, key, scores)


def check_scratch(problem: Problem, device: str, config: dict[str, int], programs: int) -> None:
    """Fewer programs than strips: scratch is used again, none is read unwritten, and it does not grow with Sq."""
    query, key, _ = problem.tensors(device)
    scores = problem.unwritten_scores(device)
    options = {**problem.options(device), "stride": problem.stride, "config": config, "programs": programs}
    judged = query
    query, options["scale"] = positive_scale(query, options["scale"])
    grid, arguments = scores_kernel.scores_arguments(query, key, scores, **options)
    strips = num_blocks(problem.lengths[0], config["BLOCK_R"] * problem.stride) * problem.batch * problem.heads[0]
    assert grid == (programs,)
    assert strips > programs
    longer = torch.cat([query, query, query], dim=2)
    _, longer_arguments = scores_kernel.scores_arguments(longer, key, scores, **options)
    for name in ("sums_ptr", "maxima_ptr"):
        assert arguments[name].shape == longer_arguments[name].shape
        arguments[name].fill_(torch.nan)
    scores_kernel._antidiagonal_scores_kernel[grid](**arguments)
    _judge_scores(problem, judged, key, scores)


def _judge_scores(problem: Problem, query: Tensor, key: Tensor, scores: Tensor) -> None:
    assert not scores.isnan().any(), "elements were not written"
    options = problem.options(str(query.device))
    wanted = reference.antidiagonal_scores(query.double(), key.double(), stride=problem.stride, **options)
    allowed = _allowed(eager_scores(problem, query, key), wanted, torch.float32)
    assert relative_error(scores, wanted) <= allowed, (relative_error(scores, wanted), allowed)

    sees = problem.visible().any(-1)
    groups = _any_in(sees, problem.stride).float()
    wanted_sums = _in_blocks(groups, problem.block_size // problem.stride).sum(-1)
    torch.testing.assert_close(scores.sum(-1).cpu(), wanted_sums[:, None].expand(-1, problem.heads[0], -1))


def _in_blocks(flags: Tensor, size: int) -> Tensor:
    padded = torch.nn.functional.pad(flags, (0, -flags.shape[-1] % size))
    return padded.unflatten(-1, (-1, size))


def _any_in(flags: Tensor, size: int) -> Tensor:
    return _in_blocks(flags, size).any(-1)


def check_attention(
    problem: Problem, device: str, density: float = 0.5, config: Mapping[str, int] | None = None
) -> None:
    """Output and log-sum-exp against float64, every element written, rows without a key exactly 0 and -inf."""
    mask = problem.block_mask(device, density)
    check_launch(problem, device, mask, attention_kernel.launch_block_sparse, config)


def check_listed_attention(
    problem: Problem, device: str, launch: Callable[..., None], config: Mapping[str, int]
) -> Tensor:
    """The same for a kernel whose lists hold no block without a visible pair; returns the output."""
    return check_launch(problem, device, _visible_block_mask(problem, device), launch, config)


def _visible_block_mask(problem: Problem, device: str) -> Tensor:
    """The problem's block mask without the blocks that hold no visible pair."""
    valid, _ = problem.valid_and_forced_blocks(device)
    return problem.block_mask(device) & valid


def check_launch(
    problem: Problem, device: str, mask: Tensor, launch: Callable[..., None], config: Mapping[str, int] | None
) -> Tensor:
    """What a launcher of attention over lists of kept blocks makes of that block mask; returns the output."""
    query, key, value = problem.tensors(device)
    options = problem.options(device)
    indices, counts = mask_to_lists(mask)
    # entries past the count must never be read
    past = torch.arange(indices.shape[-1], device=device) >= counts[..., None]
    indices = indices.masked_fill(past, 2**30)
    output = torch.full(query.shape, torch.nan, dtype=query.dtype, device=device)
    lse = torch.full(query.shape[:3], torch.nan, device=device)
    launch(query, key, value, output, lse, indices, counts, config=config, **options)
    assert not output.isnan().any(), "output elements were not written"
    assert not lse.isnan().any(), "log-sum-exp elements were not written"

    wanted, wanted_lse = reference.block_sparse_forward(query.double(), key.double(), value.double(), mask, **options)
    allowed = _allowed(eager_attention(problem, query, key, value, mask), wanted, query.dtype)
    assert relative_error(output, wanted) <= allowed, (relative_error(output, wanted), allowed)

    blind = wanted_lse == -torch.inf
    assert blind.any(), "the problem has no query without a key"
    assert (lse[blind] == -torch.inf).all()
    assert (output[blind] == 0).all()
    torch.testing.assert_close(lse[~blind], wanted_lse[~blind].float(), rtol=1e-5, atol=1e-5)
    return output


def check_descriptors(problem: Problem, device: str) -> None:
    """The same through tensor descriptors, where the layout has them."""
    # two stages fit the smallest GPU that has them
    config = {**launch_config("block_sparse", problem.dtype, problem.head_dim), "TMA": 1, "num_stages": 2}
    query, key, value = map(unit_inner_stride, problem.tensors(device))
    lists = mask_to_lists(problem.block_mask(device))
    options = problem.options(device)
    _, arguments = attention_kernel.block_sparse_arguments(
        query, key, value, query, query, *lists, config=config, **options
    )
    aligned = problem.head_dim * query.element_size() % 16 == 0
    assert arguments["TMA"] == (aligned and has_copy_engine(query.device))
    assert not arguments["TMA"] or arguments["HEADS_INSIDE"] == (problem.layout == "bshd")
    check_attention(problem, device, config=config)


def check_public_functions(problem: Problem, device: str) -> None:
    """The public functions return what the launchers write, in the layout of the query."""
    query, key, value = problem.tensors(device)
    options = problem.options(device)
    scores = scores_kernel.antidiagonal_scores(query, key, stride=problem.stride, **options)
    wanted = reference.antidiagonal_scores(query, key, stride=problem.stride, **options)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, wanted, rtol=1e-4, atol=1e-4)
    mask = problem.block_mask(device)
    output, lse = attention_operator.block_sparse_forward(query, key, value, *mask_to_lists(mask), **options)
    wanted_output, wanted_lse = reference.block_sparse_forward(query, key, value, mask, **options)
    assert output.dtype == query.dtype
    assert lse.dtype == torch.float32
    if query.stride(-1) == 1 and query.stride() != query.contiguous().stride():
        order = sorted(range(4), key=query.stride)
        assert sorted(range(4), key=output.stride) == order, "the output is not in the layout of the query"
    torch.testing.assert_close(output, wanted_output, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(lse, wanted_lse, rtol=1e-4, atol=1e-4)


def check_whole_call(problem: Problem, device: str) -> None:
    """xattention() on the kernels, selection included, does what it does on the reference."""
    query, key, value = problem.tensors(device)
    settings: dict[str, Any] = {"stride": problem.stride, "threshold": 0.6, "min_tokens": 0, "return_stats": True}
    settings |= {name: value for name, value in problem.options(device).items() if name != "scale"}
    output, stats = xattention(query, key, value, backend="triton", **settings)
    wanted, wanted_stats = xattention(query, key, value, backend="reference", **settings)
    assert (int(stats.kept), int(stats.valid)) == (int(wanted_stats.kept), int(wanted_stats.valid))
    assert stats.density < 1
    torch.testing.assert_close(output, wanted, rtol=1e-4, atol=1e-4)


def check_wrong_block_shows(problem: Problem, device: str) -> None:
    """On video-like input the kernels keep a sparse set with a small error; losing its best block costs over 10 %."""
    query, key, value = problem.tensors(device)
    options = problem.options(device)
    scores = scores_kernel.antidiagonal_scores(query, key, stride=problem.stride, **options)
    everything = torch.ones_like(scores, dtype=torch.bool)
    none = torch.zeros_like(everything)
    kept = reference.select(scores, everything, none, threshold=0.97)
    assert kept.float().mean() < 0.5
    dense, _ = reference.block_sparse_forward(query.double(), key.double(), value.double(), everything, **options)
    sparse, _ = attention_operator.block_sparse_forward(query, key, value, *mask_to_lists(kept), **options)
    assert (relative_errors(sparse, dense) < 0.1).all(), relative_errors(sparse, dense)
    worst = torch.where(kept, scores, -1).argmax(-1, keepdim=True)
    fewer = mask_to_lists(kept.scatter(-1, worst, False))
    damaged, _ = attention_operator.block_sparse_forward(query, key, value, *fewer, **options)
    assert (relative_errors(damaged, dense) > 0.1).all(), relative_errors(damaged, dense)


def check_all_kept_is_sdpa(problem: Problem, device: str) -> None:
    """With every block kept the kernel is PyTorch's own attention."""
    query, key, value = problem.tensors(device)
    lists = mask_to_lists(torch.ones_like(problem.block_mask(device)))
    output, _ = attention_operator.block_sparse_forward(query, key, value, *lists, **problem.options(device))
    wanted = torch.nn.functional.scaled_dot_product_attention(
        query.double(), key.double(), value.double(), is_causal=problem.causal, enable_gqa=True
    )
    allowed = 4 * torch.finfo(query.dtype).eps
    assert (relative_errors(output, wanted) <= allowed).all(), relative_errors(output, wanted)


def check_same_twice(problem: Problem, device: str) -> None:
    """Two runs give the same bits."""
    query, key, value = problem.tensors(device)
    options = problem.options(device)
    # the operator takes no others, and chooses the kernel
    mask = _visible_block_mask(problem, device)
    for run in (
        lambda: (scores_kernel.antidiagonal_scores(query, key, stride=problem.stride, **options),),
        lambda: attention_operator.block_sparse_forward(query, key, value, *mask_to_lists(mask), **options),
    ):
        assert all(torch.equal(one, other) for one, other in zip(run(), run(), strict=True))


def check_selection(problem: Problem, device: str, kind: str) -> None:
    """The very set that sorting keeps: forced blocks first, ties by lower index, rows without mass or candidates."""
    valid, forced = problem.valid_and_forced_blocks(device)
    shape = (problem.batch, problem.heads[0], *valid.shape[2:])
    scores = torch.rand(shape, generator=torch.Generator().manual_seed(problem.seed + 2)).to(device)
    kinds = {"even": scores, "sharp": scores**20, "ties": (scores * 4).floor() / 4, "zero": scores * 0}
    # a row sums to the query groups of a block: the largest sum there is, and more at a block than at any other
    kinds |= {"large": scores * 128, "large and sharp": 128 * scores**20}
    # some rows without a number for their mass
    kinds["broken"] = scores.where(scores < 0.99, torch.nan).where(scores > 0.01, torch.inf)
    scores = kinds[kind]
    # a transposed layout: the kernel takes strides
    scores = scores.transpose(1, 2).contiguous().transpose(1, 2)
    per_head = torch.linspace(0.3, 1.0, problem.heads[0], device=device)
    for threshold in (0.05, 0.9, per_head):
        kept = reference.select(scores, valid, forced, threshold=threshold)
        # by either way
        indices, counts = mask_to_lists(kept)
        for made in (
            selection_kernel.select(scores, valid, forced, threshold=threshold),
            lists_kernel.mask_to_lists(kept.transpose(1, 2).contiguous().transpose(1, 2)),
        ):
            assert torch.equal(made[0], indices), threshold
            assert torch.equal(made[1], counts), threshold


def check_residual(problem: Problem, device: str) -> None:
    """Merge, packing and addition against float64, for every kind, on outputs like the problem's query."""
    output, other, changed = (
        dataclasses.replace(problem, seed=problem.seed + at).tensors(device)[0] for at in range(3)
    )
    generator = torch.Generator().manual_seed(problem.seed)
    lse, other_lse = (2 * torch.randn(output.shape[:3], generator=generator).to(device) for _ in range(2))
    # rows that see no key of one part, or none at all: such an output is 0
    lse[..., [0, 2]] = other_lse[..., [1, 2]] = -torch.inf
    for part in (output, changed):
        part[:, :, [0, 2]] = 0
    other[:, :, [1, 2]] = 0
    for kind in residual.RESIDUALS:
        parts = output, lse, other, other_lse
        dense, packed = residual_kernel.merge(*parts, kind)
        exact = exact_residual(*parts)
        judge_sum(dense, residual.merge(*parts, kind)[0], output.double() + exact)
        assert torch.equal(dense[:, :, 1], output[:, :, 1])
        assert torch.equal(dense[:, :, 0], other[:, :, 0])
        assert not dense[:, :, 2].any()
        check_stored(packed, kind, exact, problem.dtype)
        before = residual_kernel.merge(changed, lse, other, other_lse, kind)[1]
        for arguments in ((packed,), (packed, before, 0.75), (packed, before, torch.tensor(-1.5, device=device))):
            total = residual_kernel.add(output, *arguments)
            judge_sum(total, residual.add(output, *arguments), residual.add(output.double(), *arguments))
            assert torch.equal(total[:, :, 1:3], output[:, :, 1:3])


def judge_sum(got: Tensor, eager: Tensor, wanted: Tensor) -> None:
    """Off float64 by no more than plain torch is, and rounding; in the type and the layout of plain torch's result."""
    assert got.dtype == eager.dtype
    assert relative_error(got, wanted) <= _allowed(eager, wanted, got.dtype), relative_error(got, wanted)
