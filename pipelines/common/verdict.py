"""What a comparison of dense and sparse videos says, in one line of words."""

from __future__ import annotations

# Speed-ups closer to 1 than this are no difference: the same video made twice differs as much.
_SAME = 0.03


def verdict(
    *,
    right: tuple[int, int] | None = None,
    dense_right: tuple[int, int] | None = None,
    psnr: float | None = None,
    density: float | None = None,
    attention: float | None = None,
    whole: float | None = None,
    doubt: str | None = None,
) -> str:
    """One line for people, made of what is known; what is None is left out.

    >>> verdict(right=(4, 4), dense_right=(4, 4), density=0.55, attention=1.9, whole=1.31)
    '4 of 4 as asked; 45 % of blocks skipped; attention 1.9x faster, whole video 1.3x faster'
    >>> verdict(density=0.9, whole=0.86)
    '10 % of blocks skipped; whole video slower than dense (0.86x)'
    >>> verdict(density=0.9, whole=0.86, doubt="this machine was busy")
    '10 % of blocks skipped; this machine was busy: timings are not reliable'

    Args:
        right, dense_right: sparse and dense videos that are as asked, of how many.
        psnr: of sparse against dense videos, in dB.
        density: share of the blocks that were computed, all calls counted.
        attention, whole: dense time by sparse time, of the self-attention layers and of the whole video.
        doubt: why the times say nothing, such as "this machine was busy". A slow-down is then left out.
    """
    parts = []
    if right is not None:
        dense = "" if dense_right in (None, right) else f" (dense: {dense_right[0]} of {dense_right[1]})"
        parts.append(f"{right[0]} of {right[1]} as asked{dense}")
    if psnr is not None:
        parts.append(f"PSNR {psnr:.1f} dB against dense")
    if density is not None:
        parts.append("no block skipped" if density == 1 else f"{100 * (1 - density):.0f} % of blocks skipped")
    known = [(name, ratio) for name, ratio in (("attention", attention), ("whole video", whole)) if ratio is not None]
    if doubt is None or all(ratio > 1 + _SAME for _, ratio in known):
        parts += [", ".join(f"{name} {_speed(ratio)}" for name, ratio in known)] if known else []
    if doubt is not None:
        parts.append(f"{doubt}: timings are not reliable")
    return "; ".join(parts)


def _speed(ratio: float) -> str:
    if ratio < 1 - _SAME:
        return f"slower than dense ({ratio:.2f}x)"
    if ratio <= 1 + _SAME:
        return "as fast as dense"
    # With one digit, 1.04 would be no gain.
    return f"{ratio:.2f}x faster" if ratio < 1.1 else f"{ratio:.1f}x faster"
