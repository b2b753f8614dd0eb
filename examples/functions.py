"""The method on plain tensors: score blocks, select blocks, attend over them. No model is needed.

python examples/functions.py
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from xattn_video import block_sparse_attention, score_blocks, select_blocks, xattention
from xattn_video.testing import video_like_qkv


def attend_in_steps(query: Tensor, key: Tensor, value: Tensor, *, threshold: float = 0.9) -> tuple[Tensor, Tensor]:
    """The three stages of `xattention`, one by one.

    Args:
        query, key, value: `[B, H, S, D]`, the layout of PyTorch's own attention.
        threshold: share of the score mass that the selected blocks hold, in (0, 1].

    Returns:
        output `[B, H, S, D]` and the selected blocks, bool `[B, H, S / 128, S / 128]` (rounded up).
    """
    scores = score_blocks(query, key, stride=8)
    tokens = query.shape[2]
    # The lengths say how full the last block is; without them all blocks are taken for full ones.
    selected = select_blocks(scores, threshold=threshold, q_len=tokens, kv_len=tokens)
    output = block_sparse_attention(query, key, value, selected)
    assert isinstance(output, Tensor)  # with return_lse=True it would be a pair
    return output, selected


def main() -> None:
    # A video of 12 x 16 x 16 tokens. Random tensors would prove little: in them every block matters equally little.
    query, key, value = video_like_qkv(1, 3, 12, 16, 16, 64)
    dense = scaled_dot_product_attention(query, key, value)
    for threshold in (0.5, 0.9, 0.99, 1.0):
        output, selected = attend_in_steps(query, key, value, threshold=threshold)
        error = (output - dense).norm() / dense.norm()
        print(f"threshold {threshold:4}  density {selected.float().mean():.3f}  relative error {error:.4f}")

    # The same in one call, which also says whether and why it went dense.
    output, stats = xattention(query, key, value, threshold=0.9, return_stats=True)
    print(f"xattention: density {stats.density:.3f}, dense because of: {stats.dense_reason}")

    # Language models: causal attention. `dense_last` keeps the end of a prompt, the question, exact.
    output, stats = xattention(query, key, value, causal=True, threshold=0.9, dense_last=64, return_stats=True)
    print(f"causal:     density {stats.density:.3f}")


if __name__ == "__main__":
    main()
