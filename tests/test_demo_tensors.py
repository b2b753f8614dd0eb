"""Capturing the demo model's attention inputs: the real ones, without a trace in the model, and read back checked."""

from __future__ import annotations

import hashlib
import json
import shlex
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from xattn_video_eval.bench.demo_tensors import load_demo_qkv
from xattn_video_pipelines.common.errors import UserError
from xattn_video_pipelines.demo import text, world
from xattn_video_pipelines.demo.training import capture, vae
from xattn_video_pipelines.demo.training.capture import Entry, check_entries, default_entries
from xattn_video_pipelines.demo.training.latents import ClipSize
from xattn_video_pipelines.demo.training.train import assemble, save_pipeline
from xattn_video_pipelines.video.models import import_diffusers

LAYERS, HEADS, HEAD_DIM, STEPS = 3, 2, 12, 4
SIZE, GRID = ClipSize(5, 80), (3, 10, 10)
ENTRIES = [Entry(2, 0, 1), Entry(0, 1, 2), Entry(2, 1, 1), Entry(1, 1, 0)]
SAMPLING = {"prompt": "a red circle moving left on a white background", "seed": 3, "steps": STEPS}


@pytest.fixture(scope="module")
def pipeline() -> Any:
    torch.manual_seed(0)
    transformer = import_diffusers().WanTransformer3DModel(
        num_attention_heads=HEADS, attention_head_dim=HEAD_DIM, num_layers=LAYERS, ffn_dim=16,
        in_channels=4, out_channels=4, text_dim=text.TEXT_DIM, freq_dim=16,
    )  # fmt: skip
    for block in transformer.blocks:
        # Random weights attend to everything alike, and then any query would do.
        torch.nn.init.constant_(block.attn1.norm_q.weight, 4.0)
    pipe = assemble(vae.build_vae().eval(), transformer.eval())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def folder(pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "shapes"
    save_pipeline(pipeline, path)
    return path


class Watch:
    """What each self-attention got and gave before its output projection, seen from outside."""

    def __init__(self, transformer: Any) -> None:
        self.inputs: list[tuple[Any, ...]] = []
        self.outputs: list[torch.Tensor] = []
        self.handles = []
        for block in transformer.blocks:
            attention = block.attn1
            self.handles.append(attention.register_forward_pre_hook(lambda _, args: self.inputs.append(args)))
            self.handles.append(
                attention.to_out[0].register_forward_pre_hook(lambda _, args: self.outputs.append(args[0]))
            )

    def at(self, entry: Entry) -> tuple[tuple[Any, ...], torch.Tensor]:
        call = entry.step * LAYERS + entry.layer
        return self.inputs[call], self.outputs[call].unflatten(2, (HEADS, HEAD_DIM))[:, :, entry.head]

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def rotated(states: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """`[batch, tokens, heads, dim]` turned as complex numbers."""
    turn = torch.complex(rotary[0][..., 0::2].double(), rotary[1][..., 1::2].double())
    pairs = torch.view_as_complex(states.double().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turn).flatten(-2).float()


def test_what_is_captured_is_what_the_attention_computed_with(pipeline: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(*_: Any, **__: Any) -> None:
        raise AssertionError("the video is not needed")

    monkeypatch.setattr(pipeline.vae, "decode", decode)
    transformer = pipeline.transformer
    watch = Watch(transformer)
    processors = dict(transformer.attn_processors)
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in transformer.modules()]
    tensors = capture.capture(pipeline, ENTRIES, **SAMPLING, size=SIZE)
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in transformer.modules()] == hooks
    watch.remove()
    assert transformer.attn_processors == processors
    # three of the four steps: it stops after the last that is needed
    assert len(watch.outputs) == 3 * LAYERS

    assert list(tensors) == [f"{entry.name}.{part}" for entry in ENTRIES for part in ("query", "key", "value")]
    for entry in ENTRIES:
        query, key, value = (tensors[f"{entry.name}.{part}"] for part in ("query", "key", "value"))
        assert query.shape == key.shape == value.shape == (1, 1, SIZE.tokens, HEAD_DIM)
        assert query.dtype == key.dtype == value.dtype == torch.bfloat16
        (states, *_, rotary), output = watch.at(entry)
        attention = transformer.blocks[entry.layer].attn1
        with torch.no_grad():
            projected = {
                "query": attention.norm_q(attention.to_q(states)),
                "key": attention.norm_k(attention.to_k(states)),
                "value": attention.to_v(states),
            }
        for part, expected in projected.items():
            heads = expected.unflatten(2, (HEADS, HEAD_DIM))
            heads = heads if part == "value" else rotated(heads, rotary)
            # half a unit in the last of bfloat16's eight bits
            torch.testing.assert_close(
                tensors[f"{entry.name}.{part}"][0, 0].float(), heads[0, :, entry.head], rtol=2**-8, atol=1e-5
            )
        weights = torch.softmax(query.float() @ key.float().transpose(-1, -2) * HEAD_DIM**-0.5, dim=-1)
        # far from attending to everything alike
        assert weights.max(-1).values.median() > 10 / SIZE.tokens
        error = (weights @ value.float())[:, 0] - output
        assert error.norm() < 0.02 * output.norm()


def test_the_video_is_the_same_with_and_without_capture(pipeline: Any) -> None:
    def video() -> np.ndarray:
        generator = torch.Generator().manual_seed(0)
        return pipeline(
            SAMPLING["prompt"], height=80, width=80, num_frames=5, num_inference_steps=3, guidance_scale=1.0,
            generator=generator, output_type="np",
        ).frames  # fmt: skip

    plain = video()
    with capture.recording(pipeline.transformer, [Entry(0, 0, 0), Entry(1, 1, 2)]) as recorder:
        recorded = video()
    assert not recorder.missing
    assert recorded.shape == (1, 5, 80, 80, 3)
    np.testing.assert_array_equal(recorded, plain)
    # nor does stopping half-way leave anything behind
    capture.capture(pipeline, [Entry(0, 0, 0)], **SAMPLING, size=SIZE)
    np.testing.assert_array_equal(video(), plain)


def test_hooks_go_when_sampling_fails(pipeline: Any) -> None:
    with pytest.raises(ValueError, match="divisible"):
        capture.capture(pipeline, ENTRIES, **SAMPLING, size=ClipSize(5, 81))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in pipeline.transformer.modules())


def test_attention_that_is_not_torchs_is_an_error(pipeline: Any) -> None:
    attention = pipeline.transformer.blocks[1].attn1
    processor = attention.processor
    attention.set_processor(lambda attn, states, *_: states)
    try:
        with pytest.raises(UserError, match=r"--entries 1:0:0: .*scaled_dot_product_attention"):
            capture.capture(pipeline, [Entry(0, 0, 0), Entry(1, 0, 0)], **SAMPLING, size=SIZE)
    finally:
        attention.set_processor(processor)


def test_the_command_writes_a_file_that_tells_where_it_came_from(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "made" / "qkv.safetensors"
    entries = ["1:1:0", "0:0:1"]
    assert capture.main(["--model", str(folder), "--out", str(out), "--steps", "2", "--entries", *entries]) == 0
    assert "2 entries of 1x1x4352x12 (1:1:0 0:0:1)" in capsys.readouterr().out
    assert [path.name for path in out.parent.iterdir()] == ["qkv.safetensors"]

    loaded = load_demo_qkv(out)
    assert [(item.name, item.layer, item.head, item.step) for item in loaded] == [
        ("layer0.head0.step01", 0, 0, 1),
        ("layer1.head1.step00", 1, 1, 0),
    ]
    assert all(item.query.shape == (1, 1, 4352, HEAD_DIM) for item in loaded)
    assert all(item.grid == (17, 16, 16) for item in loaded)
    assert not torch.equal(loaded[0].query, loaded[0].key)

    with safe_open(out, framework="pt") as file:
        metadata = file.metadata()
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    expected = {
        "prompt": capture.PROMPT, "seed": "0", "steps": "2", "guidance_scale": "1.0", "grid": "17x16x16",
        "entries": "1:1:0 0:0:1", "model": "shapes", "layers": "3", "heads": "2", "head_dim": "12",
        "transformer_sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "torch": torch.__version__.partition("+")[0], "diffusers": diffusers.__version__,
    }  # fmt: skip
    metadata["torch"] = metadata["torch"].partition("+")[0]
    assert {name: metadata[name] for name in expected} == expected
    assert str(tmp_path) not in str(metadata)
    assert str(folder.parent) not in str(metadata)
    arguments = shlex.split(metadata["command"])
    assert arguments[:5] == ["python", "-m", "xattn_video_pipelines.demo.training.capture", "--model", "shapes"]
    assert arguments[arguments.index("--prompt") + 1] == capture.PROMPT
    assert arguments[-2:] == entries


def test_the_default_prompt_is_a_scene_that_training_has_not_seen() -> None:
    scene = world.Scene("red", "circle", "left", "white", "large")
    assert world.is_held_out(scene)
    assert capture.PROMPT in {world.caption(scene, seed) for seed in range(100)}


def test_default_entries_cover_layers_heads_and_steps() -> None:
    assert default_entries(4, 4, 20) == [(0, 0, 9), (1, 1, 18), (2, 2, 5), (3, 3, 14)]
    for layers, heads, steps in ((6, 4, 20), (30, 12, 50), (4, 2, 9), (1, 1, 7), (2, 3, 30)):
        entries = default_entries(layers, heads, steps)
        assert len(set(entries)) == len(entries)
        check_entries(entries, layers, heads, steps)
        assert {entry.layer for entry in entries} >= {0, layers - 1}
        assert len({entry.head for entry in entries}) == min(heads, 4)
        # the five dense steps are over, and the last step is left out
        assert min(entry.step for entry in entries) == 5
        assert max(entry.step for entry in entries) == steps - 2
    with pytest.raises(UserError, match="--steps must be 7 or more, or --entries given, got 6"):
        default_entries(4, 4, 6)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([Entry(0, 0, 0), Entry(3, 0, 0)], "--entries 3:0:0: layer must be below 3, got 3"),
        ([Entry(0, 2, 0)], "--entries 0:2:0: head must be below 2, got 2"),
        ([Entry(0, 0, 4)], "--entries 0:0:4: step must be below 4, got 4"),
        ([Entry(1, 0, 1), Entry(0, 0, 0), Entry(1, 0, 1)], "--entries 1:0:1: given twice"),
    ],
)
def test_entries_that_the_model_does_not_have(entries: list[Entry], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_entries(entries, LAYERS, HEADS, STEPS)


def failure(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The last line that the command wrote to stderr, after it gave exit code 2."""
    try:
        code = capture.main(arguments)
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert err.count("capture: error: ") == 1
    line = err.splitlines()[-1]
    assert line.startswith("capture: error: ")
    return line


def test_a_layer_out_of_range_is_one_line_and_code_2(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "qkv.safetensors"
    line = failure(["--model", str(folder), "--out", str(out), "--entries", "0:0:5", "3:0:5"], capsys)
    assert line == "capture: error: --entries 3:0:5: layer must be below 3, got 3"
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "no/such/folder"], "--model no/such/folder: no such folder"),
        (["--model", "other"], "--model other: must be a WanPipeline, got CogVideoXPipeline"),
        (["--out", "qkv.bin"], "--out must end in .safetensors, got qkv.bin"),
        (["--out", "folder.safetensors"], "--out: folder.safetensors is a folder"),
        (["--out", "other/model_index.json/qkv.safetensors"], "other/model_index.json: cannot write here"),
        (["--steps", "0"], "--steps must be 1 or more, got 0"),
        (["--steps", "-3"], "--steps: must be a whole number, got '-3'"),
        (["--seed", str(2**63)], "--seed must be at most 2**63 - 1"),
        (["--entries", "1:x:0"], "--entries: must be layer:head:step such as 1:0:9, got '1:x:0'"),
        (["--entries", "1:-1:0"], "--entries: must be layer:head:step such as 1:0:9, got '1:-1:0'"),
    ],
)
def test_bad_input_is_one_line_and_code_2(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model_index.json").write_text(json.dumps({"_class_name": "CogVideoXPipeline"}))
    line = failure(["--model", "other", "--out", "qkv.safetensors", *arguments], capsys)
    assert message in line
    assert not (tmp_path / "qkv.safetensors").exists()


def tensors_of(entry: str, tokens: int = 12, head_dim: int = 8) -> dict[str, torch.Tensor]:
    return {f"{entry}.{part}": torch.randn(1, 1, tokens, head_dim).bfloat16() for part in ("query", "key", "value")}


def test_loading_gives_each_part_its_place_in_order(tmp_path: Path) -> None:
    tensors = {name: tensor for step in (10, 9, 100) for name, tensor in tensors_of(f"layer2.head0.step{step}").items()}
    save_file(tensors, tmp_path / "qkv.safetensors", {"grid": "3x2x2"})
    loaded = load_demo_qkv(tmp_path / "qkv.safetensors")
    assert [(item.layer, item.head, item.step, item.grid) for item in loaded] == [
        (2, 0, step, (3, 2, 2)) for step in (9, 10, 100)
    ]
    for item in loaded:
        for part in ("query", "key", "value"):
            assert torch.equal(getattr(item, part), tensors[f"{item.name}.{part}"])


def test_a_file_that_is_missing_says_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"none\.safetensors: no such file; make one with: python -m xattn_video_pipelines"
    ):
        load_demo_qkv(tmp_path / "none.safetensors")


NAME = "layer0.head0.step05"


@pytest.mark.parametrize(
    ("changes", "grid", "message"),
    [
        ({}, None, "grid must be like 17x16x16, got None"),
        ({}, "3x4", "grid must be like 17x16x16, got '3x4'"),
        ({}, "3x2x3", r"layer0.head0.step05: query must be \[1, 1, 18, head_dim\] like the query, got \[1, 1, 12, 8\]"),
        ({"layer0.step05.query": torch.zeros(1)}, "3x2x2", "name must be like .*, got 'layer0.step05.query'"),
        ({f"{NAME}.key": None}, "3x2x2", "layer0.head0.step05: has no key"),
        ({f"{NAME}.value": torch.zeros(1, 1, 12, 4)}, "3x2x2", r"value must be .*, got \[1, 1, 12, 4\]"),
        ({f"{NAME}.key": torch.zeros(1, 1, 12, 8, dtype=torch.int8)}, "3x2x2", "key must be floating point"),
        ({f"{NAME}.{part}": None for part in ("query", "key", "value")}, "3x2x2", "no tensors in it"),
    ],
)
def test_a_malformed_file_is_refused(changes: dict[str, Any], grid: str | None, message: str, tmp_path: Path) -> None:
    tensors = {name: value for name, value in {**tensors_of(NAME), **changes}.items() if value is not None}
    save_file(tensors, tmp_path / "qkv.safetensors", {"grid": grid} if grid else None)
    with pytest.raises(ValueError, match=message):
        load_demo_qkv(tmp_path / "qkv.safetensors")


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "qkv.safetensors").write_bytes(b"not tensors at all")
    with pytest.raises(ValueError, match=r"qkv\.safetensors: not a safetensors file"):
        load_demo_qkv(tmp_path / "qkv.safetensors")
