"""One of two ranks of a Ulysses run on gloo; started by test_diffusers_attach.py.

python tests/context_parallel_child.py STORE_FILE RANK
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from xattn_video import XAttnProcessor

from diffusers import ContextParallelConfig, WanTransformer3DModel  # isort: skip

# each rank holds 175 of the 350 tokens: below min_tokens, which is about the whole
SETTINGS: dict[str, Any] = {"stride": 4, "block_size": 32, "min_tokens": 256, "warmup_steps": 1}
# the threshold and how far it falls, which makes a tensor of one threshold too
THRESHOLDS = ((0.5, 0.0), ((0.3, 0.5, 0.7, 0.9), 0.0), (0.5, 0.2))


def run(model: WanTransformer3DModel, threshold: Any, ramp: float) -> tuple[list[Tensor], dict[str, Any]]:
    processor = XAttnProcessor(threshold=threshold, threshold_ramp=ramp, **SETTINGS)
    model.set_attn_processor(processor)
    processor.start_generation(steps=2)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 16, 5, 14, 20, generator=generator)
    text = torch.randn(1, 6, 16, generator=generator)
    with torch.no_grad():
        outputs = [model(latents, torch.tensor([t]), text, return_dict=False)[0] for t in (900, 800)]
    return outputs, processor.stats.summary()


def check_not_finite(model: WanTransformer3DModel, rank: int) -> None:
    """NaN in a sparse call of one rank: both do the forward again, or they would wait for each other for ever."""

    def spoil(layer: str, call: Any) -> None:
        if rank == 0 and layer.endswith("blocks.1.attn1"):
            call.value.fill_(float("nan"))

    outputs = []
    for settings in ({"warmup_steps": 2}, {"warmup_steps": 1}):
        processor = XAttnProcessor(**{**SETTINGS, **settings}, on_call=spoil)
        model.set_attn_processor(processor)
        processor.start_generation(steps=2)
        generator = torch.Generator().manual_seed(0)
        latents = torch.randn(1, 16, 5, 14, 20, generator=generator)
        text = torch.randn(1, 6, 16, generator=generator)
        with torch.no_grad():
            outputs.append([model(latents, torch.tensor([t]), text, return_dict=False)[0] for t in (900, 800)])
    assert processor.stats.summary()["dense_calls"] == {"warmup": 2, "not_finite": 2}
    for dense, again in zip(*outputs, strict=True):
        assert torch.equal(dense, again)


def main() -> None:
    store, rank = sys.argv[1], int(sys.argv[2])
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        text_dim=16,
        freq_dim=32,
        ffn_dim=64,
        num_layers=2,
    ).eval()
    alone = {settings: run(model, *settings) for settings in THRESHOLDS}
    # diffusers counts accelerators to place its ranks, of which a CPU has none
    torch.accelerator.device_count = lambda: 1
    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
    for settings, (expected, own) in alone.items():
        outputs, summary = run(model, *settings)
        for output, single in zip(outputs, expected, strict=True):
            torch.testing.assert_close(output, single, rtol=0, atol=1e-5)
        assert summary["dense_calls"] == own["dense_calls"] == {"warmup": 2}
        # the two ranks' heads together have the density of all heads
        densities = [torch.zeros(1, dtype=torch.float64) for _ in range(2)]
        torch.distributed.all_gather(densities, torch.tensor([summary["sparse_density"]], dtype=torch.float64))
        assert abs(float(sum(densities)) / 2 - own["sparse_density"]) < 1e-9
    check_not_finite(model, rank)
    torch.distributed.barrier()
    # Everything was compared. Gloo's threads now and then abort a Python that shuts down in the usual way.
    os._exit(0)


if __name__ == "__main__":
    main()
