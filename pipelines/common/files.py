"""Files that are there whole or not at all, and folders that are known to be writable before the work begins."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from xattn_video_pipelines.common.errors import UserError


@contextlib.contextmanager
def whole_files(*paths: Path) -> Iterator[tuple[Path, ...]]:
    """Temporary names beside `paths` to write to; all are renamed at the end, and none if anything fails before.

    A temporary name keeps its suffix, from which many writers take the format.

    Raises:
        UserError: a file cannot be written or renamed.
    """
    partial = tuple(map(partial_name, paths))
    try:
        yield partial
        for name in partial:
            force_to_disk(name)
        for name, path in zip(partial, paths, strict=True):
            os.replace(name, path)
    except OSError as error:
        raise UserError(f"{' and '.join(map(str, paths))}: cannot write: {error.strerror or error}") from error
    finally:
        for name in partial:
            with contextlib.suppress(OSError):
                name.unlink(missing_ok=True)


def partial_name(path: Path) -> Path:
    """Where `path` is written until it is whole; a killed process leaves it behind."""
    return path.with_name(f".{path.stem}.partial{path.suffix}")


def remove_partial(path: Path) -> None:
    """Remove what a killed process left of writing `path`, if there is anything. Raises OSError."""
    partial_name(path).unlink(missing_ok=True)


def force_to_disk(path: Path) -> None:
    """Wait until what was written is on the disk, so that no name ever stands for less. Raises OSError."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_texts(texts: Mapping[Path, str]) -> None:
    """Write text files in UTF-8, all of them or none. Raises UserError as `whole_files`."""
    with whole_files(*texts) as partial:
        for name, text in zip(partial, texts.values(), strict=True):
            # a name of a file may hold bytes that are no text
            name.write_text(text, encoding="utf-8", errors="backslashreplace")


@contextlib.contextmanager
def claimed(name: Path) -> Iterator[None]:
    """While it is open, no other process of this machine can claim `name`; a killed process gives its claim back.

    Raises:
        UserError: another process has claimed it, or the lock file cannot be written.
    """
    lock = name.with_name(f".{name.name}.lock")
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(_locked(lock, wait=False))
        except BlockingIOError:
            raise UserError(f"{name}: another process is making it") from None
        except OSError as error:
            raise UserError(f"{lock}: cannot write: {error.strerror or error}") from None
        try:
            yield
        finally:
            # Removed while the lock is held: a process that opened it meanwhile then sees that it is gone.
            # Windows cannot remove an open file, and leaves an empty one.
            with contextlib.suppress(PermissionError):
                lock.unlink(missing_ok=True)


def remove_dead_claim(name: Path) -> None:
    """Remove what a killed process left of its claim on `name`; a living process keeps its own."""
    if name.with_name(f".{name.name}.lock").exists():
        with contextlib.suppress(UserError), claimed(name):
            pass


@contextlib.contextmanager
def alone_with(path: Path) -> Iterator[None]:
    """While it is open, no other process of this machine is in it for the same file; waits for one that is.

    It creates the file if there is none. The file may be replaced inside.

    Raises:
        OSError: the file cannot be opened for writing.
    """
    if os.name == "nt":
        # Windows would refuse to read or replace a file that is locked.
        yield
        return
    with _locked(path, wait=True):
        yield


@contextlib.contextmanager
def _locked(path: Path, *, wait: bool) -> Iterator[None]:
    """Hold the lock of the file that has this name now. Raises BlockingIOError where it is taken, or OSError."""
    from filelock import lock_descriptor

    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                taken = not lock_descriptor(descriptor, blocking=wait, poll_interval=0.01)
            except OSError as error:
                _note_no_locks(str(path.parent), error.strerror or str(error))
                taken = False
            if taken:
                raise BlockingIOError
            # The file may have been removed or replaced before the lock was there; then the lock protects nothing.
            if os.path.exists(path) and os.path.samestat(os.fstat(descriptor), os.stat(path)):
                yield
                return
        finally:
            os.close(descriptor)


@functools.cache
def _note_no_locks(folder: str, reason: str) -> None:
    print(f"{folder}: no locks on this file system ({reason}): run one process at a time there", file=sys.stderr)


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A name beside `folder` to write to; it replaces `folder` at the end, and not if anything fails before."""
    partial, old = (folder.with_name(f".{folder.name}.{part}") for part in ("partial", "old"))
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        yield partial
        if folder.exists():
            os.replace(folder, old)
        os.replace(partial, folder)
    finally:
        for leftover in (partial, old):
            shutil.rmtree(leftover, ignore_errors=True)


def edit_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file; None removes one."""
    values = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    kept = {name: value for name, value in values.items() if name not in changes or value is not None}
    write_texts({path: json.dumps(kept, indent=2) + "\n"})


def make_writable(folder: Path) -> None:
    """Make a folder, and say before hours of work, not after them, if nothing can be written there.

    Raises:
        UserError: it cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{folder}: cannot write here: {error.strerror}") from None
