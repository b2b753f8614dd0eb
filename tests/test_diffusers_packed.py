"""XAttnProcessor on MiniMax-H3, whose text, references, sound and video are one packed sequence; and on classes that
nobody has listed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tiny.common import seeded
from xattn_video import XAttnConfig, XAttnProcessor
from xattn_video.integrations.diffusers.models import MODELS

# after tests.tiny, which repairs a torchvision that does not fit this torch
import diffusers  # isort: skip

MiniMaxH3 = getattr(diffusers, "MiniMaxH3Transformer3DModel", None)
needs_h3 = pytest.mark.skipif(MiniMaxH3 is None, reason="this diffusers has no MiniMax-H3")

VIDEO, TEXT, AUDIO = 0, 1, 2
SETTINGS: dict[str, Any] = {"stride": 4, "block_size": 16, "threshold": 0.5, "warmup_steps": 0, "min_tokens": 64}
# In the order of diffusers' own pipeline: text, references, sound, generated video. None at the edge of a block.
LAYOUT = [("text", 21), ("reference", 50), ("audio", 19), ("video", 234)]


def tiny(layers: int = 1) -> Any:
    with seeded(0):
        model = MiniMaxH3(
            num_attention_heads=2, attention_head_dim=32, hidden_size=64, num_layers=layers, num_refiner_layers=1,
            ffn_dim=64, in_channels=4, audio_in_channels=6, patch_size=(1, 1, 1), text_dim=12, freq_dim=16,
            time_embed_hidden_dim=32, time_embed_dim=16, rope_freq_dim=4,
        )  # fmt: skip
        for parameter in model.parameters():
            # so that attention is not flat
            parameter.data.mul_(3.0)
    return model.eval()


def inputs(layout: list[tuple[str, int]] = LAYOUT, seed: int = 0) -> dict[str, Tensor]:
    """A call as the pipeline makes it: references have a timestep of their own, text has that of the video."""
    noise = torch.Generator().manual_seed(seed)
    kinds = [kind for kind, count in layout for _ in range(count)]
    tags = torch.tensor([{"text": TEXT, "audio": AUDIO}.get(kind, VIDEO) for kind in kinds])
    times = torch.tensor([{"reference": 1, "audio": 2}.get(kind, 0) for kind in kinds])
    rows = {tag: (tags == tag).nonzero().flatten() for tag in (VIDEO, TEXT, AUDIO)}

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=noise)

    return {
        "hidden_states": normal(1, len(rows[VIDEO]), 4),
        "audio_hidden_states": normal(1, len(rows[AUDIO]), 6),
        "encoder_hidden_states": normal(1, len(rows[TEXT]), 12),
        "timestep": torch.tensor([0.3, 0.97, 0.4]),
        "timestep_indices": times,
        "token_tags": tags,
        "position_ids": torch.rand(len(kinds), 3, generator=noise) * 20,
        "video_indices": rows[VIDEO],
        "audio_indices": rows[AUDIO],
        "text_indices": rows[TEXT],
    }


def block_output(model: Any, given: dict[str, Tensor]) -> Tensor:
    """What the last block gives, `[S, hidden]`: every row of the sequence, of which the model returns only some."""
    seen: list[Tensor] = []
    handle = model.transformer_blocks[-1].register_forward_hook(lambda module, args, output: seen.append(output[0]))
    with torch.no_grad():
        model(**given)
    handle.remove()
    return seen[0]


@needs_h3
def test_text_references_and_sound_are_exact_and_the_video_is_sparse() -> None:
    model, given = tiny(), inputs()
    stock = block_output(model, given)
    dense, sparse = XAttnProcessor(**{**SETTINGS, "threshold": 1.0}), XAttnProcessor(**SETTINGS)
    model.set_attn_processor(dense)
    every_block = block_output(model, given)
    model.set_attn_processor(sparse)
    output = block_output(model, given)
    torch.testing.assert_close(every_block, stock, rtol=0, atol=1e-4 * float(stock.abs().max()))
    exact = sum(count for kind, count in LAYOUT if kind != "video")
    assert torch.equal(output[:exact], every_block[:exact])
    assert not torch.equal(output[exact:], every_block[exact:])
    assert dense.stats.summary()["density"] == 1
    assert 0.3 < sparse.stats.summary()["density"] < 0.95
    # The refiner of the text is not among the layers.
    assert set(sparse.stats.summary()["density_by_layer"]) == {"transformer.transformer_blocks.0.attn"}


@needs_h3
def test_every_query_sees_text_references_and_sound(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    model = tiny()
    model.set_attn_processor(XAttnProcessor(XAttnConfig(**SETTINGS), on_call=lambda layer, call: calls.append(call)))
    block_output(model, inputs())
    assert [call.dense_tokens for call in calls] == [(0, 21 + 50 + 19)]


@needs_h3
@pytest.mark.parametrize(
    ("layout", "exact"),
    [
        # Without sound a reference touches the video, and its timestep tells it.
        ([("text", 20), ("reference", 30), ("video", 200)], (0, 50)),
        ([("text", 20), ("video", 30), ("audio", 5), ("video", 200)], (0, 55)),
        ([("video", 200), ("audio", 30), ("text", 20)], (200, 250)),
    ],
)
def test_other_layouts(layout: list[tuple[str, int]], exact: tuple[int, int]) -> None:
    calls: list[Any] = []
    model = tiny()
    model.set_attn_processor(XAttnProcessor(XAttnConfig(**SETTINGS), on_call=lambda layer, call: calls.append(call)))
    block_output(model, inputs(layout))
    assert [call.dense_tokens for call in calls] == [exact]


@needs_h3
@pytest.mark.parametrize("layout", [[("text", 20), ("video", 200), ("audio", 30)], [("text", 200), ("audio", 30)]])
def test_a_video_between_other_rows_stays_dense_with_its_reason(layout: list[tuple[str, int]]) -> None:
    model, given = tiny(), inputs(layout)
    stock = block_output(model, given)
    processor = XAttnProcessor(**SETTINGS)
    model.set_attn_processor(processor)
    assert torch.equal(block_output(model, given), stock)
    assert processor.stats.summary()["dense_calls"] == {"packed_rows": 1}


@needs_h3
def test_steps_are_those_of_the_video_and_each_generation_has_its_rows() -> None:
    """Timesteps rise in this model, while those of references stay: the largest one is the same in every step."""
    model = tiny()
    processor = XAttnProcessor(**{**SETTINGS, "warmup_steps": 2})
    model.set_attn_processor(processor)
    for layout in (LAYOUT, [("text", 33), ("audio", 10), ("video", 210)]):
        processor.stats.reset()
        processor.start_generation()
        given = inputs(layout)
        for time in (0.0, 0.2, 0.4, 0.6, 0.8):
            given["timestep"] = torch.tensor([time, 0.97, 0.99])
            block_output(model, given)
        summary = processor.stats.summary()
        assert (summary["dense_calls"], summary["sparse_calls"]) == ({"warmup": 2}, 3)


@needs_h3
def test_a_residual_makes_the_refreshes_exact() -> None:
    model, given = tiny(layers=2), inputs()
    stock = block_output(model, given)
    processor = XAttnProcessor(**{**SETTINGS, "warmup_steps": 1}, residual="full", refresh=(1,))
    model.set_attn_processor(processor)
    outputs = []
    for step in range(3):
        # another step, but with the first one's numbers: nothing has changed that the model sees
        processor.step(step)
        outputs.append(block_output(model, given))
    largest = float(stock.abs().max())
    for output in outputs:
        torch.testing.assert_close(output, stock, rtol=0, atol=1e-4 * largest)
    assert processor.stats.summary()["dense_calls"] == {"refresh": 4}


# ---- classes that are not listed


def unlisted(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.delitem(MODELS, name)


def kandinsky_6() -> Any:
    return diffusers.Kandinsky6Transformer3DModel(
        in_visual_dim=4, out_visual_dim=4, in_text_dim=8, in_text_dim2=8, time_dim=16, model_dim=32, ff_dim=32,
        num_text_blocks=1, num_visual_blocks=1, axes_dims=(4, 6, 6), in_audio_dim=4, out_audio_dim=4, model_dim_a=32,
        time_dim_a=16, ff_dim_a=32, axes_dims_a=(16,),
    )  # fmt: skip


def motif_video() -> Any:
    return diffusers.MotifVideoTransformer3DModel(
        in_channels=9, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1, num_single_layers=1,
        text_embed_dim=8, rope_axes_dim=(4, 6, 6),
    )  # fmt: skip


def flux_3() -> Any:
    return diffusers.Flux3Transformer2DModel(
        in_channels=8, cond_in_channels=8, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=8, timestep_channels=16, axes_dims_rope=(4, 4, 4, 4),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("make", "name", "why"),
    [
        (kandinsky_6, "Kandinsky6Transformer3DModel", "sound"),
        (motif_video, "MotifVideoTransformer3DModel", "text"),
        (flux_3, "Flux3Transformer2DModel", "text"),
    ],
)
def test_a_class_whose_rows_are_not_known_is_refused_by_name(make: Any, name: str, why: str) -> None:
    if not hasattr(diffusers, name):
        pytest.skip(f"this diffusers has no {name}")
    model = make()
    before = dict(model.attn_processors)
    with pytest.raises(ValueError, match=rf"{name} is not known to XAttnProcessor.*{why}"):
        model.set_attn_processor(XAttnProcessor())
    assert all(model.attn_processors[path] is processor for path, processor in before.items())


@needs_h3
def test_an_unlisted_packed_class_is_refused_too(monkeypatch: pytest.MonkeyPatch) -> None:
    unlisted(monkeypatch, "MiniMaxH3Transformer3DModel")
    with pytest.raises(ValueError, match=r"MiniMaxH3Transformer3DModel is not known.*audio_hidden_states"):
        tiny().set_attn_processor(XAttnProcessor())
