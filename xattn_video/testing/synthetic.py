"""Queries, keys and values with the structure that attention has in video and text models.

Random tensors prove little about sparse attention: every block matters equally little. Here positions are coded as
rotary embeddings do it, so that a product depends on how far apart two tokens are; which distances count differs by
head. Values differ from place to place: a block that holds mass cannot be left out without changing the output.
Pure torch, reproducible from the seed on one kind of device; used by tests and benchmarks.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

# At locality 0 and 1: logit of a pair at one place, and the distances over which it falls off, as shares of the
# video's height and width and of its frames.
_PEAK_LOGIT = (1.0, 16.0)
_PLACE_REACH = (0.5, 0.15)
_FRAME_REACH = (1.0, 0.12)
# Logit of the fine texture: tokens in phase gain it, tokens in antiphase lose it.
_TEXTURE_LOGIT = 3.0
_TEXTURE_PERIOD = 4
_SINK_TOKENS = 64
# Dimensions that code the texture (two) and the sinks (two); the others code the place.
_OTHER_DIMS = 4


def video_like_qkv(  # noqa: PLR0913 - all but the sizes have defaults
    batch: int,
    heads: int,
    frames: int,
    height: int,
    width: int,
    head_dim: int,
    *,
    locality: float = 0.7,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    kv_heads: int | None = None,
    text_tokens: int = 0,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention inputs of a video transformer: tokens in raster order (frame, row, column), then text.

    Key heads take turns at three kinds: local (near in space and time), temporal (the same place in every frame,
    which drifts along the rows) and sink (local, and a patch that every query attends to). On top, every head has a
    fine texture along the rows whose phase changes from frame to frame: its mean effect on a block's mass is the
    same everywhere, and the antidiagonal of a tile averages it out, but the diagonal meets it in phase and takes it
    for mass. Values are a field that changes within a few tokens and frames, so what one block adds no other does.

    Args:
        batch, heads, head_dim: sizes; head_dim at least 8.
        frames, height, width: the latent video, in tokens.
        locality: 0 to 1; density at threshold 0.9 falls from about 0.88 over 0.2 (at 0.7) to 0.1 at 7,168 tokens.
        seed: of everything random; batch items and heads differ.
        dtype: of the result; the computation is float32.
        kv_heads: heads of key and value; None is heads.
        text_tokens: tokens after the video, without a place, that all queries attend to a little.
        device: where they are made. Each kind of device draws numbers of its own from a seed.

    Returns:
        query `[B, Hq, S, D]`, key and value `[B, Hkv, S, D]`, `S = frames * height * width + text_tokens`.

    Raises:
        ValueError: locality outside [0, 1], head_dim below 8, or heads no multiple of kv_heads.
    """
    kv_heads = _checked_heads(heads, kv_heads, head_dim, locality)
    device = torch.device(device)
    generator = torch.Generator(device).manual_seed(seed)
    grid = torch.cartesian_prod(
        *(torch.arange(size, dtype=torch.float32, device=device) for size in (frames, height, width))
    )
    space = _between(_PLACE_REACH, locality)
    near = max(1.0, frames * _between(_FRAME_REACH, locality))
    parts = []
    for _ in range(batch):
        for kv_head in range(kv_heads):
            kind = ("local", "temporal", "sink")[kv_head % 3]
            drift = 0.3 + torch.rand((), generator=generator, device=device)
            place = grid - grid[:, :1] * torch.tensor([0.0, 0.0, 1.0], device=device) * drift
            # A reach without end in time: the same place in every frame.
            in_time = math.inf if kind == "temporal" else near
            reach = torch.tensor([in_time, space * height, space * width], device=device)
            phase = 2 * math.pi * torch.rand(frames, generator=generator, device=device)[grid[:, 0].long()]
            sinks = torch.zeros(grid.shape[0], device=device)
            if kind == "sink":
                latest = max(1, grid.shape[0] - _SINK_TOKENS)
                begin = int(torch.randint(latest, (), generator=generator, device=device))
                sinks[begin : begin + _SINK_TOKENS] = 1.0
            code = _place_code(place, reach, head_dim - _OTHER_DIMS, generator)
            field = _place_values(place, torch.tensor([0.7, 2.0, 8.0], device=device), head_dim, generator)
            parts.append(
                _head(
                    _Look(code, phase, sinks, _between(_PEAK_LOGIT, locality)),
                    field,
                    heads // kv_heads,
                    text_tokens,
                    generator,
                )
            )
    return _stacked(parts, batch, dtype)


def causal_text_like_qkv(  # noqa: PLR0913 - all but the sizes have defaults
    batch: int,
    heads: int,
    tokens: int,
    head_dim: int,
    *,
    locality: float = 0.7,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    kv_heads: int | None = None,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention inputs of a causal language model: vertical and slash patterns.

    Key heads take turns at slash (what stands a fixed distance back, another distance a head), vertical (a few short
    passages, the first tokens among them, that every later query attends to) and both. Texture and values are those
    of `video_like_qkv`, the texture's phase changing every 128 tokens.

    Args and errors: as `video_like_qkv`.

    Returns:
        query `[B, Hq, S, D]`, key and value `[B, Hkv, S, D]`.
    """
    kv_heads = _checked_heads(heads, kv_heads, head_dim, locality)
    device = torch.device(device)
    generator = torch.Generator(device).manual_seed(seed)
    place = torch.arange(tokens, dtype=torch.float32, device=device)[:, None]
    reach = torch.tensor([max(8.0, tokens * _between((0.25, 0.01), locality))], device=device)
    parts = []
    for _ in range(batch):
        for kv_head in range(kv_heads):
            kind = ("slash", "vertical", "both")[kv_head % 3]
            passage = torch.arange(tokens, device=device) // 128
            phase = 2 * math.pi * torch.rand(tokens // 128 + 1, generator=generator, device=device)[passage]
            sinks = torch.zeros(tokens, device=device)
            if kind != "slash":
                begins = torch.randint(tokens, (3,), generator=generator, device=device)
                begins[0] = 0
                for begin in begins.tolist():
                    sinks[begin : begin + _SINK_TOKENS] = 1.0
            distance = 0.0
            if kind != "vertical":
                distance = float(torch.randint(max(1, tokens // 4), (), generator=generator, device=device))
            frequency_seed = generator.get_state()
            code = _place_code(place, reach, head_dim - _OTHER_DIMS, generator)
            generator.set_state(frequency_seed)
            back = _place_code(place - distance, reach, head_dim - _OTHER_DIMS, generator)
            field = _place_values(place, torch.tensor([48.0], device=device), head_dim, generator)
            peak = _between(_PEAK_LOGIT, locality)
            parts.append(
                _head(_Look(code, phase, sinks, peak), field, heads // kv_heads, 0, generator, query_code=back)
            )
    return _stacked(parts, batch, dtype)


def _checked_heads(heads: int, kv_heads: int | None, head_dim: int, locality: float) -> int:
    if not 0 <= locality <= 1:
        raise ValueError(f"locality must be in [0, 1], got {locality}")
    if head_dim < 8:
        raise ValueError(f"head_dim must be 8 or more, got {head_dim}")
    kv_heads = heads if kv_heads is None else kv_heads
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"heads must be a multiple of kv_heads, got {heads} and {kv_heads}")
    return kv_heads


def _between(ends: tuple[float, float], share: float) -> float:
    return ends[0] + (ends[1] - ends[0]) * share


def _place_code(place: Tensor, reach: Tensor, dims: int, generator: torch.Generator) -> Tensor:
    """`[N, dims]` of unit norm; the product of two rows is about a bell over their distance in units of `reach`."""
    frequency = torch.randn(place.shape[1], dims // 2, generator=generator, device=place.device) / reach[:, None]
    angle = place @ frequency
    code = torch.cat([angle.cos(), angle.sin()], dim=1) / math.sqrt(dims // 2)
    return pad(code, (0, dims - code.shape[1]))


def _place_values(place: Tensor, lengths: Tensor, head_dim: int, generator: torch.Generator) -> Tensor:
    """`[N, D]`: waves about `lengths` long, and noise that belongs to the token."""
    made: dict[str, Any] = {"generator": generator, "device": place.device}
    angle = place @ (torch.randn(place.shape[1], head_dim, **made) / lengths[:, None])
    phase = 2 * math.pi * torch.rand(head_dim, **made)
    return (angle + phase).cos() * math.sqrt(2.0) + 0.5 * torch.randn(angle.shape, **made)


class _Look(NamedTuple):
    """What the tokens of one head match by.

    Attributes:
        code: of each token's place `[S, C]`.
        phase: of the texture, 0-d.
        sinks: 1 for tokens that every query looks at, else 0, `[S]`.
        peak: logit of two equal places.
    """

    code: Tensor
    phase: Tensor
    sinks: Tensor
    peak: float


def _head(
    look: _Look,
    field: Tensor,
    group: int,
    text_tokens: int,
    generator: torch.Generator,
    query_code: Tensor | None = None,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """The `group` queries, the key and the value of one key head."""
    code, phase, sinks, peak = look
    head_dim, device = field.shape[1], field.device
    angle = torch.arange(code.shape[0], device=device) * (2 * math.pi / _TEXTURE_PERIOD) + phase
    texture = torch.stack([angle.cos(), angle.sin()], dim=1) * math.sqrt(_TEXTURE_LOGIT)
    # A query and a sink have the logit of two equal places.
    sink_code = sinks[:, None] * math.sqrt(peak / 2)

    def assembled(place_code: Tensor, sink: Tensor) -> Tensor:
        tokens = torch.cat([place_code * math.sqrt(peak), texture, sink.expand(-1, 2)], dim=1)
        text = torch.randn(text_tokens, head_dim, generator=generator, device=device) * math.sqrt(peak / head_dim)
        tokens = torch.cat([tokens, text])
        noise = torch.randn(tokens.shape, generator=generator, device=device) * 0.05
        # The default scale of attention divides by sqrt(head_dim).
        return (tokens + noise) * math.pow(head_dim, 0.25)

    key = assembled(code, sink_code)
    ones = torch.full((code.shape[0], 1), math.sqrt(peak / 2), device=device)
    queries = [assembled(code if query_code is None else query_code, ones) for _ in range(group)]
    return queries, key, torch.cat([field, torch.randn(text_tokens, head_dim, generator=generator, device=device)])


def _stacked(
    parts: list[tuple[list[Tensor], Tensor, Tensor]], batch: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """`[B, H, S, D]` of the heads of all batch items, one after the other."""
    queries = [query for group, _, _ in parts for query in group]
    keys, values = [key for _, key, _ in parts], [value for _, _, value in parts]
    query, key, value = (torch.stack(heads).unflatten(0, (batch, -1)).to(dtype) for heads in (queries, keys, values))
    return query, key, value
