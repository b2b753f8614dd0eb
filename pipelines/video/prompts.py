"""Prompts as texts or in files, `.txt` (one a line) and `.jsonl` (one JSON object a line), to a checked list."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from xattn_video_pipelines.common.errors import UserError, one_line
from xattn_video_pipelines.common.files import read_input
from xattn_video_pipelines.common.schema import parse_json

MAX_ID_LENGTH = 100
MAX_SEED = 2**63 - 1
_ID = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
_KEYS = ("prompt", "id", "seed", "negative_prompt", "image")

T = TypeVar("T")


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    `id` is safe as a file name on every system. `seed` and `negative_prompt` are None where nothing says them; `image`
    is an existing file (image-to-video) or None. `line` is that of its file, from 1; of texts it counts them.
    """

    id: str
    text: str
    seed: int | None = None
    negative_prompt: str | None = None
    image: Path | None = None
    line: int = 0

    @property
    def identity(self) -> dict[str, Any]:
        """What a manifest says of the prompt. An image is known by its bytes, because its path can change.

        Raises `UserError` for an image that cannot be read.
        """
        return {
            "prompt": self.text,
            "negative_prompt": self.negative_prompt,
            "image": None if self.image is None else self.image.name,
            "image_sha256": None if self.image is None else _image_digest(self.image),
        }


@dataclass(frozen=True)
class PromptFile:
    """The prompts of one file in its order, and the JSON keys that were found but have no meaning here."""

    path: Path
    prompts: tuple[Prompt, ...]
    ignored_keys: tuple[str, ...] = field(default=())


def read_prompts(path: str | Path) -> PromptFile:
    """Read and check a prompt file.

    In a `.txt` file each line is a prompt; blank lines and lines that start with `#` are skipped. In a `.jsonl`
    file each line is an object with `prompt` and, if wanted, `id`, `seed`, `negative_prompt` and `image` (a path
    relative to the prompt file). A prompt without an id gets its position among the prompts: `0001`, `0002`...

    Raises:
        UserError: the file is missing, empty, not UTF-8, has another suffix, a broken line or an id twice; the
            message names the file and the line.
    """
    path = Path(path)
    if path.suffix not in (".txt", ".jsonl"):
        raise UserError(f"{path}: a prompt file ends in .txt (one a line) or .jsonl (one JSON object a line)")
    lines = _read_lines(path)
    ignored: set[str] = set()
    prompts: list[Prompt] = []
    seen: dict[str, int] = {}
    for number, line in lines:
        position = f"{len(prompts) + 1:04d}"
        if path.suffix == ".txt":
            prompt = Prompt(id=position, text=line, line=number)
        else:
            record = _parse_record(path, number, line)
            ignored |= set(record) - set(_KEYS)
            prompt = _prompt_of(path, number, record, position)
        # Case is folded because two such files would be one on macOS and Windows.
        first = seen.setdefault(prompt.id.lower(), number)
        if first != number:
            raise UserError(f"{path}:{number}: id {prompt.id!r} is already that of line {first}; ids must be unique")
        prompts.append(prompt)
    if not prompts:
        raise UserError(f"{path}: no prompts in it; write one a line")
    return PromptFile(path, tuple(prompts), tuple(sorted(ignored)))


def prompts_of_texts(texts: Sequence[str]) -> tuple[Prompt, ...]:
    """A prompt for each text, with the first 8 digits of the text's SHA-256 as its id: `prompt-1a2b3c4d`.

    So the same text has the same id in every run, and another text in the same folder another one.

    Raises:
        UserError: a text is empty, is no UTF-8, or is there twice.
    """
    prompts: dict[str, Prompt] = {}
    for place, text in enumerate(texts, start=1):
        if not text.strip():
            raise UserError(f"prompt {place} is empty")
        try:
            digest = hashlib.sha256(text.encode("utf-8")).hexdigest()
        except UnicodeEncodeError:
            raise UserError(f"prompt {place} is not UTF-8: {_short(text)}") from None
        prompt = Prompt(f"prompt-{digest[:8]}", text, line=place)
        if prompts.setdefault(prompt.id, prompt) is not prompt:
            raise UserError(f"prompt {place} is the same as prompt {prompts[prompt.id].line}: {_short(text)}")
    return tuple(prompts.values())


def completed(prompts: Sequence[Prompt], image: Path | None, negative_prompt: str | None) -> list[Prompt]:
    """The prompts, with this image and this negative prompt where they have none of their own.

    Raises:
        UserError: the image is no file.
    """
    if image is not None and not image.is_file():
        raise UserError(f"--image {image}: no such file")
    return [
        replace(
            prompt,
            image=prompt.image or image,
            negative_prompt=negative_prompt if prompt.negative_prompt is None else prompt.negative_prompt,
        )
        for prompt in prompts
    ]


def choose(prompts: Sequence[Prompt], sample: int | None, limit: int | None) -> list[Prompt]:
    """The prompts that a run is for: `sample` of them, evenly spaced, and of those the first `limit`. None: all."""
    chosen = list(prompts) if sample is None else evenly_spaced(prompts, sample)
    return chosen[:limit]


def evenly_spaced(items: Sequence[T], count: int) -> list[T]:
    """`count` of the items, evenly spaced from the first to the last (all, if there are no more than `count`)."""
    if count >= len(items):
        return list(items)
    if count == 1:
        return [items[0]]
    last = len(items) - 1
    # Integer rounding of i * last / (count - 1): strictly increasing because count <= last.
    return [items[(2 * i * last + count - 1) // (2 * (count - 1))] for i in range(count)]


@cache
def _image_digest(path: Path) -> str:
    """The SHA-256 of an image file. Its header is read too, which is quick: a file that is no image is found early."""
    from PIL import Image

    try:
        with Image.open(path):
            return hashlib.sha256(path.read_bytes()).hexdigest()
    except (OSError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: cannot be read as an image: {one_line(error)}") from None


def _read_lines(path: Path) -> list[tuple[int, str]]:
    try:
        data = read_input(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such prompt file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot read the prompt file: {error.strerror}") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: not UTF-8 (byte 0x{data[error.start]:02x}); save the file as UTF-8") from None
    numbered = ((number, line.strip()) for number, line in enumerate(re.split(r"\r\n|\n|\r", text), start=1))
    comment = "#" if path.suffix == ".txt" else None
    return [(number, line) for number, line in numbered if line and not (comment and line.startswith(comment))]


def _parse_record(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        record = parse_json(line)
    except ValueError as error:
        raise UserError(f"{path}:{number}: not a JSON object: {error}") from None
    if not isinstance(record, dict):
        raise UserError(f'{path}:{number}: each line must be a JSON object such as {{"prompt": "..."}}')
    return record


def _prompt_of(path: Path, number: int, record: dict[str, Any], position: str) -> Prompt:
    where = f"{path}:{number}"
    text = _text(where, record, "prompt")
    if text is None or not text.strip():
        raise UserError(f"{where}: needs a `prompt` that is not empty")
    seed = record.get("seed")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= MAX_SEED):
        raise UserError(f"{where}: `seed` must be an integer from 0 to 2**63 - 1, got {_short(seed)}")
    image = _text(where, record, "image")
    if image is not None:
        image_path = path.parent / image
        if not image_path.is_file():
            raise UserError(f"{where}: no such image: {_short(str(image_path))}")
    return Prompt(
        id=_id(where, record.get("id"), position),
        text=text,
        seed=seed,
        negative_prompt=_text(where, record, "negative_prompt"),
        image=image_path if image is not None else None,
        line=number,
    )


def _text(where: str, record: dict[str, Any], key: str) -> str | None:
    value = record.get(key)
    if value is None:
        return None
    if not isinstance(value, str):
        raise UserError(f"{where}: `{key}` must be a string, got {_short(value)}")
    try:
        # JSON can spell half of a surrogate pair, which no tokenizer and no file name takes.
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"{where}: `{key}` holds half of a surrogate pair") from None
    return value


def _id(where: str, value: object, position: str) -> str:
    if value is None:
        return position
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not _ID.fullmatch(value) or len(value) > MAX_ID_LENGTH:
        raise UserError(
            f"{where}: `id` must be 1 to {MAX_ID_LENGTH} letters, digits, '.', '_' or '-' and not start with a dot, "
            f"got {_short(value)}"
        )
    return value


def _short(value: object) -> str:
    text = json.dumps(value) if not isinstance(value, str) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
