"""The models whose attention can be sparse: what is known of each, in data that loads no other library."""

from __future__ import annotations

from dataclasses import dataclass

from .tables import Table


@dataclass(frozen=True)
class ModelSpec:
    """Where a model's video self-attention is, and what else its sequence holds.

    Attributes:
        models: the models of this class, as the documentation names them.
        self_attention: fnmatch patterns of module paths, in forward order.
        text: where the text sits: `"cross"` (in cross-attention, which stays dense), `"end"` (after the video in
            one joint sequence, given as `encoder_hidden_states`), `"packed"` (anywhere in one sequence, whose rows the
            model's arguments `token_tags` and `timestep_indices` name), or `"unknown"`.
        mask: the mask that self-attention gets: `"prefix"` (a bool key mask whose valid keys come first, by
            construction of the model), or `"any"` (looked at when one comes; most models pass none).
        frames: what tells the latent frames of a video whose tokens are whole frames one after the other: the axis of
            the latents that the model is called with, or the name of the argument that says how many; None for others.
        note: what is particular, for the documentation.
    """

    models: str
    self_attention: tuple[str, ...]
    text: str = "cross"
    mask: str = "any"
    note: str = ""
    frames: int | str | None = 2


_JOINT_MASK = "padding of the text is masked"

MODELS: dict[str, ModelSpec] = {
    "WanTransformer3DModel": ModelSpec(
        "Wan 2.1 T2V, I2V, V2V; Wan 2.2 A14B (two transformers), 5B (one timestep per token)",
        ("blocks.*.attn1",),
        note="image tokens of I2V are in cross-attention too",
    ),
    "WanVACETransformer3DModel": ModelSpec(
        "Wan-VACE", ("vace_blocks.*.attn1", "blocks.*.attn1"), note="control blocks run first and are sparse too"
    ),
    "WanAnimateTransformer3DModel": ModelSpec("Wan-Animate", ("blocks.*.attn1",), note="the face adapter stays dense"),
    "ChronoEditTransformer3DModel": ModelSpec(
        "ChronoEdit", ("blocks.*.attn1",), note="image tokens are in cross-attention too"
    ),
    "AnyFlowTransformer3DModel": ModelSpec(
        "AnyFlow", ("blocks.*.attn1",), note="each call has two timesteps: from and to", frames=1
    ),
    "SkyReelsV2Transformer3DModel": ModelSpec(
        "SkyReels-V2", ("blocks.*.attn1",), note="with `num_frame_per_block` > 1 a block-causal mask keeps it dense"
    ),
    "HeliosTransformer3DModel": ModelSpec(
        "Helios", ("blocks.*.attn1",), note="history frames come before the video", frames=None
    ),
    "LTXVideoTransformer3DModel": ModelSpec("LTX", ("transformer_blocks.*.attn1",), frames="num_frames"),
    "LTX2VideoTransformer3DModel": ModelSpec(
        "LTX-2",
        ("transformer_blocks.*.attn1",),
        note="audio self-attention and audio-video attention stay dense",
        frames="num_frames",
    ),
    "CosmosTransformer3DModel": ModelSpec("Cosmos 1, 2.5", ("transformer_blocks.*.attn1",)),
    "Kandinsky5Transformer3DModel": ModelSpec(
        "Kandinsky 5",
        ("visual_transformer_blocks.*.self_attention",),
        note="its own sparse (NABLA) variants stay as they are",
        frames=1,
    ),
    "HunyuanVideoTransformer3DModel": ModelSpec(
        "HunyuanVideo", ("transformer_blocks.*.attn", "single_transformer_blocks.*.attn"), "end", "prefix", _JOINT_MASK
    ),
    "HunyuanVideoFramepackTransformer3DModel": ModelSpec(
        "FramePack",
        ("transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
        "end",
        "prefix",
        "history frames come before the video; image tokens are the first of the text's",
        frames=None,
    ),
    "HunyuanVideo15Transformer3DModel": ModelSpec(
        "HunyuanVideo 1.5",
        ("transformer_blocks.*.attn",),
        "end",
        "prefix",
        "image, glyph and text tokens in one range; padding is masked",
    ),
    "MiniMaxH3Transformer3DModel": ModelSpec(
        "MiniMax-H3",
        ("transformer_blocks.*.attn",),
        "packed",
        note="references and sound are exact too; the refiner of the text stays dense",
        frames=None,
    ),
}

# Classes whose calls of the dispatch cannot be served, and why
REFUSED: dict[str, str] = {
    "AnyFlowFARTransformer3DModel": "it attends with FlexAttention's block masks alone",
    "Cosmos3OmniTransformer": "one processor attends causal text, and video over text and video",
    "WanAnimate2Transformer3DModel": "its video attends with FlexAttention's block masks alone",
}

# Models of transformers that the tests run, whose prefill can be sparse. Others like them can be, too.
LANGUAGE_MODELS = (
    "Qwen2-VL", "Qwen2.5-VL", "Qwen3-VL", "LLaVA-OneVision", "InternVL", "Llama", "Mistral", "Phi-3", "Qwen2.5",
    "Qwen3", "Gemma",
)  # fmt: skip

_TEXT = {
    "cross": "",
    "end": "text follows the video in one sequence and is exact",
    "packed": "text is in one sequence with the video and is exact",
}


def supported() -> Table:
    """The models whose attention can be sparse, and what is sparse in each. It loads neither torch nor diffusers.

    Returns:
        A table that a Python prompt prints and a notebook shows; its `rows` are tuples of the cells. Classes of
        diffusers that are not in it get a generic rule, and attaching raises where that does not fit.

    Example:
        >>> supported().header
        ('model', 'class', 'sparse', 'note')
        >>> [row[1:3] for row in supported().rows if row[0] == "LTX"]
        [('LTXVideoTransformer3DModel', 'transformer_blocks.*.attn1')]
    """
    rows = [
        (spec.models, name, ", ".join(spec.self_attention), "; ".join(filter(None, (_TEXT[spec.text], spec.note))))
        for name, spec in MODELS.items()
    ]
    rows.append((", ".join(LANGUAGE_MODELS), "decoder models of transformers", "prefill", "use_xattention(model)"))
    rows += [("refused", name, "none", why) for name, why in REFUSED.items()]
    return Table(("model", "class", "sparse", "note"), rows)
