"""Ask Qwen2-VL about a video, with dense and with sparse prefill.

python examples/qwen2_vl.py cat.mp4 "What does the cat do?"
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import imageio.v3
import numpy as np
import torch

from xattn_video.integrations.transformers import stop_xattention, use_xattention

# After the line above: xattn_video works around a torchvision that was built for another torch.
from transformers import AutoProcessor, Qwen2VLForConditionalGeneration  # isort: skip


def prepare(processor: Any, frames: np.ndarray, fps: float, question: str) -> Any:
    """Inputs of the model: uint8 frames `[T, H, W, 3]`, taken at `fps` frames a second, then the question."""
    messages = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": question}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    count = len(frames)
    metadata = {
        "fps": fps,
        "total_num_frames": count,
        "frames_indices": list(range(count)),
        "duration": count / fps,
    }
    return processor(
        text=[text], videos=[frames], video_metadata=[metadata], do_sample_frames=False, return_tensors="pt"
    )


@torch.inference_mode()
def answer(model: Any, processor: Any, inputs: Any, *, max_new_tokens: int = 64) -> str:
    """The model's answer, without the prompt."""
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0].strip()


def answer_twice(model: Any, processor: Any, inputs: Any, **settings: Any) -> tuple[str, str, float | None]:
    """The answers with dense and with sparse prefill, and the density of the sparse calls (None without any).

    The model has its old attention afterwards.
    """
    dense = answer(model, processor, inputs)
    stats = use_xattention(model, **settings)
    try:
        sparse = answer(model, processor, inputs)
    finally:
        stop_xattention(model)
    return dense, sparse, stats.summary()["sparse_density"]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("video", type=Path)
    parser.add_argument("question")
    parser.add_argument("--model", default="Qwen/Qwen2-VL-7B-Instruct", help="Hub id or local folder")
    parser.add_argument("--fps", type=float, default=1.0, help="frames a second that the model sees")
    args = parser.parse_args(arguments)

    file_fps = imageio.v3.immeta(args.video)["fps"]
    every = max(1, round(file_fps / args.fps))
    frames = imageio.v3.imread(args.video)[::every]

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Qwen2VLForConditionalGeneration.from_pretrained(args.model, dtype="auto").to(device).eval()
    processor = AutoProcessor.from_pretrained(args.model)
    inputs = prepare(processor, frames, file_fps / every, args.question)
    inputs = inputs.to(device, model.dtype)
    print(f"{inputs['input_ids'].shape[1]} tokens")
    # The last 64 tokens hold the question, whose few rows a sparse choice of blocks serves worst.
    dense, sparse, density = answer_twice(model, processor, inputs, stride=16, threshold=0.9, dense_last=64)
    print(f"dense:  {dense}\nsparse: {sparse}\ndensity of the sparse calls: {density}")


if __name__ == "__main__":
    main()
