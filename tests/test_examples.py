"""The scripts under examples/ run on tiny real models, and the Python blocks of README and docs do what they say."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.util
import inspect
import math
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from tests.cli_tools import save_tiny_wan
from tests.test_asking import SCENES, add
from tests.tiny.hunyuan_families import HUNYUAN_VIDEO, SIZE, VIDEO
from tests.tiny.hunyuan_families import prompts as hunyuan_prompts
from tests.tiny.wan_family import T2V, TOKENS, prompts, text_inputs
from xattn_video import XAttnConfig, XAttnProcessor, score_blocks
from xattn_video.testing.synthetic import video_like_qkv

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
# The sequences of the tiny models have a few hundred tokens.
TINY = {"block_size": 32, "min_tokens": 0, "warmup_steps": 2}


def example(name: str) -> ModuleType:
    """The module of one example, without running its main()."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_is_tested_here() -> None:
    tested = set(re.findall(r'example\("(\w+)"\)', Path(__file__).read_text(encoding="utf-8")))
    assert tested == {path.stem for path in EXAMPLES.glob("*.py")}


# ---- video models


def test_wan_runs_as_a_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = save_tiny_wan(tmp_path / "model"), tmp_path / "fox.mp4"
    # 9 latent frames of 8 x 15 patches: 1,080 tokens, above min_tokens
    command = ["--model", folder, "--size", 128, 240, 33, "--steps", 6, "--out", out]
    example("wan").main([str(word) for word in command])
    assert out.stat().st_size > 1000
    printed = capsys.readouterr().out
    # 5 of 6 steps are dense, in two layers and for both prompts of guidance.
    assert "dense calls {'warmup': 20}" in printed
    density = float(re.findall(r"density ([\d.]+)", printed)[0])
    assert 5 / 6 < density < 1


def test_wan_gives_the_processors_back() -> None:
    pipe, processor = T2V.build(0), XAttnProcessor(**TINY)
    before = dict(pipe.transformer.attn_processors)
    inputs = {**text_inputs((0,)), "num_inference_steps": 3, "output_type": "latent"}
    frames = example("wan").make_video(pipe, processor, **inputs)
    assert torch.isfinite(frames).all()
    assert processor.stats.summary()["sparse_calls"] > 0
    assert pipe.transformer.attn_processors == before


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_hunyuan_counts_its_layers(compiled: bool) -> None:
    hunyuan, pipe = example("hunyuan"), HUNYUAN_VIDEO.build(0)
    config = hunyuan.CONFIG.replace(**TINY, dense_layers=(0,))
    inputs = {**SIZE, **hunyuan_prompts((0,)), "num_inference_steps": 4, "output_type": "latent"}
    generator = torch.Generator("cpu").manual_seed(0)
    frames, summary = hunyuan.make_video(pipe, config, compile_blocks=compiled, generator=generator, **inputs)
    assert torch.isfinite(frames).all()
    # Layer 0 is dense in all four steps, layer 1 in the two of the warm-up.
    assert summary["dense_calls"] == {"warmup": 2, "dense_layer": 4}
    assert summary["sparse_calls"] == 2
    first, second = summary["density_by_layer"].values()
    assert second < first == 1
    assert config.block_size < VIDEO


def test_the_settings_of_hunyuan_are_the_papers_with_dense_layers() -> None:
    config = example("hunyuan").CONFIG
    assert config.replace(dense_layers=()) == XAttnConfig.preset("hunyuan-video")
    assert config.dense_layers == (0, 1)


def test_own_loop_counts_the_steps_it_is_told() -> None:
    own_loop, pipe, processor = example("own_loop"), T2V.build(0), XAttnProcessor(**TINY)
    pipe.transformer.set_attn_processor(processor)
    inputs = prompts((0,))
    text, negative = inputs["prompt_embeds"], inputs["negative_prompt_embeds"]
    noise = torch.randn(1, 16, 5, 14, 18, generator=torch.Generator().manual_seed(0))
    assert TOKENS == 5 * 7 * 9
    latents = own_loop.denoise(pipe.transformer, processor, noise, text, negative, steps=5)
    summary = processor.stats.summary()
    # 2 warm-up steps of 2 forwards of 2 layers; 3 sparse ones
    assert summary["dense_calls"] == {"warmup": 8}
    assert summary["sparse_calls"] == 12
    # A second video warms up again.
    own_loop.denoise(pipe.transformer, processor, noise, text, negative, steps=5)
    assert processor.stats.summary()["dense_calls"] == {"warmup": 16}

    # Noise levels that all but stand still: only the loop's own count tells its steps.
    processor.stats.reset()
    own_loop.denoise(pipe.transformer, processor, noise, text, negative, steps=5, shift=1e9)
    assert processor.stats.summary()["dense_calls"] == {"warmup": 8}

    # The same loop at threshold 1 is dense attention, and without guidance it asks for one forward a step.
    exact = XAttnProcessor(**TINY, threshold=1.0)
    pipe.transformer.set_attn_processor(exact)
    every_block = own_loop.denoise(pipe.transformer, exact, noise, text, negative, steps=5)
    pipe.transformer.set_attn_processor(None)
    dense = own_loop.denoise(pipe.transformer, XAttnProcessor(), noise, text, negative, steps=5)
    assert torch.allclose(every_block, dense, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(latents, dense, rtol=1e-4, atol=1e-4)


def test_own_loop_moves_along_the_noise_levels() -> None:
    class StraightFlow(torch.nn.Module):
        """Moves noise to 1 on a straight line, so Euler steps of any number end exactly there."""

        def __init__(self, noise: torch.Tensor) -> None:
            super().__init__()
            self.noise = noise
            self.timesteps: list[float] = []

        def forward(self, latents: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> Any:
            self.timesteps.append(float(timestep[0]))
            level = float(timestep[0]) / 1000
            assert torch.allclose(latents, level * self.noise + 1 - level, atol=1e-6)
            return Transformer2DModelOutput(sample=self.noise - 1)

    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    noise, text = torch.randn(1, 2, 3, 4, 4), torch.zeros(1, 1, 1)
    flow, loop = StraightFlow(noise), example("own_loop")
    result = loop.denoise(flow, XAttnProcessor(), noise, text, text, steps=4, guidance_scale=1, shift=1)
    assert flow.timesteps == [1000, 750, 500, 250]
    assert torch.allclose(result, torch.ones_like(noise), atol=1e-6)


def test_own_loop_goes_from_a_prompt_to_frames(tmp_path: Path) -> None:
    from diffusers import WanPipeline

    pipe = WanPipeline.from_pretrained(save_tiny_wan(tmp_path / "model"))
    processor = XAttnProcessor(**{**TINY, "block_size": 16})
    make_video = example("own_loop").make_video
    video = make_video(pipe, processor, "a fox", steps=3, height=64, width=64, num_frames=9)
    assert np.asarray(video).shape == (9, 64, 64, 3)
    assert np.isfinite(video).all()
    assert processor.stats.summary()["sparse_calls"] == 4


def test_compare_measures_each_setting_against_dense(tmp_path: Path) -> None:
    from diffusers import WanPipeline

    pipe = WanPipeline.from_pretrained(save_tiny_wan(tmp_path / "model"))
    settings = {**TINY, "block_size": 16}
    configs = [XAttnConfig(**settings, threshold=threshold) for threshold in (0.5, 1.0)]
    inputs = {"prompt": "a fox", "height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 4}
    dense, half, whole = example("compare").compare(pipe, configs, **inputs)
    assert (dense.name, half.name, whole.name) == ("dense", configs[0].label(), configs[1].label())
    assert math.isinf(dense.psnr)
    assert dense.density == whole.density == 1
    assert half.density < 1
    # Every block kept is dense attention, up to rounding.
    assert whole.psnr > 90
    assert half.psnr < whole.psnr
    assert min(dense.seconds, half.seconds, whole.seconds) > 0


# ---- functions


def test_functions_are_the_stages_of_the_whole_call(capsys: pytest.CaptureFixture[str]) -> None:
    functions = example("functions")
    query, key, value = video_like_qkv(1, 3, 5, 9, 13, 32)
    output, selected = functions.attend_in_steps(query, key, value, threshold=1.0)
    assert selected.all()
    assert torch.allclose(output, scaled_dot_product_attention(query, key, value), atol=1e-5)
    output, selected = functions.attend_in_steps(query, key, value, threshold=0.5)
    scores = score_blocks(query, key)
    assert (((scores * selected).sum(-1) / scores.sum(-1)) >= 0.5 - 1e-6).all()

    functions.main()
    printed = capsys.readouterr().out
    densities = [float(one) for one in re.findall(r"threshold .* density ([\d.]+)", printed)]
    errors = [float(one) for one in re.findall(r"relative error ([\d.]+)", printed)]
    assert densities == sorted(densities)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == 0
    assert "dense because of: None" in printed


# ---- video understanding


def test_qwen2_vl_answers_from_a_video_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from xattn_video_pipelines.common.demo_data import DEMO_WATCHER
    from xattn_video_pipelines.demo import asking

    keys = [add(tmp_path / "dense", scene, str(number)) for number, scene in enumerate(SCENES)]
    asking.write_story(tmp_path / "dense", keys, tmp_path / "answers")
    story = tmp_path / "answers" / "story.mp4"
    question = "What colour was the second shape?"
    example("qwen2_vl").main([str(story), question, "--model", str(DEMO_WATCHER), "--fps", "2"])
    printed = capsys.readouterr().out
    assert re.search(r"^dense:  blue", printed, re.MULTILINE)


def test_qwen2_vl_is_sparse_between_two_dense_answers() -> None:
    from xattn_video.integrations.transformers import attention_stats
    from xattn_video_pipelines.common.demo_data import DEMO_WATCHER
    from xattn_video_pipelines.demo import world

    from transformers import AutoProcessor, Qwen2VLForConditionalGeneration  # isort: skip

    qwen2_vl = example("qwen2_vl")
    model = Qwen2VLForConditionalGeneration.from_pretrained(DEMO_WATCHER, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(DEMO_WATCHER)
    frames = world.render(SCENES[0], 0, frames=16)
    inputs = qwen2_vl.prepare(processor, frames, 2.0, "What colour is the shape?")
    settings = {"stride": 8, "block_size": 16, "min_tokens": 0}
    dense, same, density = qwen2_vl.answer_twice(model, processor, inputs, threshold=1.0, **settings)
    assert density == 1.0
    assert dense == same
    assert dense.startswith("red")
    _, _, density = qwen2_vl.answer_twice(model, processor, inputs, threshold=0.5, **settings)
    assert density < 1
    assert attention_stats(model) is None
    assert qwen2_vl.answer(model, processor, inputs) == dense


# ---- Python blocks of the documentation


def blocks() -> list[Any]:
    """Every fenced Python block of README and docs, named by its file and line."""
    found = []
    for file in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = file.read_text(encoding="utf-8")
        for match in re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            line = text[: match.start()].count("\n") + 2
            found.append(pytest.param(match[1], id=f"{file.name}:{line}"))
    return found


def test_there_are_blocks_to_run() -> None:
    assert {parameter.id.split(":")[0] for parameter in blocks()} >= {"README.md", "python.md"}


@pytest.mark.parametrize("code", blocks())
def test_blocks_run_or_name_what_is_there(code: str) -> None:
    compiled = compile(code, "block", "exec")
    if "from_pretrained" not in code:
        exec(compiled, {"__name__": "block"})
        return
    names: dict[str, Any] = {}
    tree = ast.parse(code)
    imports = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    # xattn_video first, as it works around a torchvision that was built for another torch.
    imports.sort(key=lambda node: "xattn_video" not in ast.unparse(node))
    for node in imports:
        exec(compile(ast.Module([node], []), "block", "exec"), names)
    checked = 0
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names:
            check_call(names[node.func.id], [keyword.arg for keyword in node.keywords if keyword.arg])
            checked += 1
    assert checked


def check_call(function: Any, keywords: list[str]) -> None:
    """Each keyword is one of the function's, or a setting where it takes settings."""
    parameters = inspect.signature(function).parameters
    known = {name for name, parameter in parameters.items() if parameter.kind is not parameter.VAR_KEYWORD}
    if len(known) < len(parameters):
        known |= {field.name for field in dataclasses.fields(XAttnConfig)}
    assert set(keywords) <= known, function


def test_unknown_keywords_are_found() -> None:
    check_call(XAttnProcessor, ["threshold"])
    with pytest.raises(AssertionError):
        check_call(XAttnProcessor, ["treshold"])


def test_imports_of_blocks_are_run() -> None:
    block = "from xattn_video import nothing_of_this_name\nnothing_of_this_name.from_pretrained('x')"
    with pytest.raises(ImportError):
        test_blocks_run_or_name_what_is_there(block)
