"""Files that are there whole or not at all, and folders that are known to be writable before the work begins."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import re
import secrets
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from xattn_video_pipelines.common.errors import UserError
from xattn_video_pipelines.common.terminal import say

# A claim is refused only after this long: who removes a dead claim holds it for a moment.
_CLAIM_SECONDS = 0.2
# Files of earlier versions have no token; of those, only the kinds that this project writes are known to be its own.
_PARTIAL = re.compile(r"\..+\.(?:[0-9a-f]{16}\.partial(?:\.[^.]*)?|partial\.(?:mp4|mkv|jsonl?|csv|html|png))")
# Links are a way out of a folder, so the program follows none of its own files. Windows lacks these flags.
_OWN = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)


@contextlib.contextmanager
def whole_files(*paths: Path) -> Iterator[tuple[Path, ...]]:
    """Temporary names beside `paths` to write to; all are renamed at the end, and none if anything fails before.

    A temporary name keeps its suffix, from which many writers take the format. Its file is new, empty and of this
    process alone: several processes may write the same path at once, and the last to end wins.

    Raises:
        UserError: a file cannot be written or renamed.
    """
    for folder in {path.parent for path in paths}:
        _remove_dead_partials_once(folder)
    with contextlib.ExitStack() as stack:
        try:
            partial = tuple(stack.enter_context(_partial_file(path)) for path in paths)
            yield partial
            for name in partial:
                force_to_disk(name)
            for name, path in zip(partial, paths, strict=True):
                os.replace(name, path)
        except OSError as error:
            raise UserError(f"{' and '.join(map(str, paths))}: cannot write: {error.strerror or error}") from error


@contextlib.contextmanager
def _partial_file(path: Path) -> Iterator[Path]:
    """A new empty file to write `path` to. Its lock says that its writer lives. Raises OSError."""
    while True:
        name = path.with_name(f".{path.stem}.{secrets.token_hex(8)}.partial{path.suffix}")
        descriptor = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | _OWN, 0o666)
        try:
            # Windows does not rename an open file, and its locks would keep the writer out.
            if os.name == "nt" or (_lock(descriptor, path.parent, wait=False) and _is_named(descriptor, name)):
                break
        except BaseException:
            os.close(descriptor)
            raise
        # Another process took the file for a dead one before it was locked.
        os.close(descriptor)
    try:
        if os.name == "nt":
            os.close(descriptor)
        yield name
    finally:
        with contextlib.suppress(OSError):
            name.unlink(missing_ok=True)
        if os.name != "nt":
            os.close(descriptor)


def remove_dead_partials(folder: Path) -> None:
    """Remove the temporary files that killed processes left in `folder`.

    They are known by their names. Links, files of other users, and files that a living process is writing stay.
    """
    with contextlib.suppress(OSError):
        names = [name for name in os.listdir(folder) if _PARTIAL.fullmatch(name)]
        for name in names:
            _remove_if_dead(folder / name)


@functools.cache
def _remove_dead_partials_once(folder: Path) -> None:
    """Only before the first file in a folder: a listing for each of 10,000 videos would take longer and longer."""
    remove_dead_partials(folder)


def _remove_if_dead(path: Path) -> None:
    with contextlib.suppress(OSError):
        descriptor = open_own(path, os.O_RDWR)
        try:
            own = not hasattr(os, "geteuid") or os.fstat(descriptor).st_uid == os.geteuid()
            if os.name != "nt" and own and _lock(descriptor, path.parent, wait=False) and _is_named(descriptor, path):
                path.unlink()
        finally:
            os.close(descriptor)
        if os.name == "nt":
            # A file that is open cannot be removed there, so what can be removed is dead.
            path.unlink()


def open_own(path: Path, flags: int, mode: int = 0o644) -> int:
    """The descriptor of a file that the program itself writes, in a folder that may be somebody else's.

    Raises:
        OSError: it cannot be opened, is a link, or is a folder, a device or a pipe.
    """
    descriptor = os.open(path, flags | _OWN | getattr(os, "O_BINARY", 0), mode)
    try:
        kind = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(kind):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(kind):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


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
def claimed(name: Path, *, wait: bool = False) -> Iterator[bool]:
    """While it is open, no other process of this machine can claim `name`; a killed process gives its claim back.

    Gives whether it had to wait, so that what another process has just made can be looked at first.

    Args:
        name: what is claimed; the lock file is beside it.
        wait: until another process gives its claim back; a line on stderr says so. Otherwise it is refused.

    Raises:
        UserError: another process has claimed it, or the lock file cannot be written.
    """
    lock = name.with_name(f".{name.name}.lock")
    waited = False
    with contextlib.ExitStack() as stack:
        try:
            try:
                stack.enter_context(_locked(lock, wait=_CLAIM_SECONDS))
            except BlockingIOError:
                if not wait:
                    raise
                say(f"{name}: another process is making it; this one waits for it", sys.stderr)
                stack.enter_context(_locked(lock))
                waited = True
        except BlockingIOError:
            raise UserError(f"{name}: another process is making it") from None
        except OSError as error:
            raise UserError(f"{lock}: cannot write: {reason_of(error)}") from None
        try:
            yield waited
        finally:
            # Removed while the lock is held: a process that opened it meanwhile then sees that it is gone.
            # Windows cannot remove an open file, and leaves an empty one.
            with contextlib.suppress(PermissionError):
                lock.unlink(missing_ok=True)


def remove_dead_claim(name: Path) -> None:
    """Remove what a killed process left of its claim on `name`; a living process keeps its own."""
    lock = name.with_name(f".{name.name}.lock")
    if lock.exists():
        with contextlib.suppress(OSError), _locked(lock, wait=0):
            lock.unlink(missing_ok=True)


@contextlib.contextmanager
def alone_with(path: Path) -> Iterator[None]:
    """While it is open, no other process of this machine is in it for the same file; waits for one that is.

    It creates the file if there is none. The file may be replaced inside.

    Raises:
        OSError: the file cannot be opened for writing, or is a link.
    """
    if os.name == "nt":
        # Windows would refuse to read or replace a file that is locked.
        yield
        return
    with _locked(path):
        yield


@contextlib.contextmanager
def _locked(path: Path, *, wait: float | None = None) -> Iterator[None]:
    """Hold the lock of the file that has this name now, after at most `wait` seconds (None: as long as it takes).

    Raises:
        BlockingIOError: another process holds it.
        OSError: the file cannot be opened.
    """
    until = None if wait is None else time.monotonic() + wait
    while True:
        descriptor = open_own(path, os.O_RDWR | os.O_CREAT)
        try:
            taken = _lock(descriptor, path.parent, wait=until is None)
            # The file may have been removed or replaced before the lock was there; then the lock protects nothing.
            if taken and _is_named(descriptor, path):
                yield
                return
        finally:
            os.close(descriptor)
        if not taken and until is not None:
            if time.monotonic() >= until:
                raise BlockingIOError
            time.sleep(0.01)


def _lock(descriptor: int, folder: Path, *, wait: bool) -> bool:
    """Whether the lock of an open file is held now; True too on a file system that has none, which is noted."""
    from filelock import lock_descriptor

    try:
        return lock_descriptor(descriptor, blocking=wait, poll_interval=0.01)
    except OSError as error:
        _note_no_locks(str(folder), error.strerror or str(error))
        return True


def _is_named(descriptor: int, path: Path) -> bool:
    """Whether the open file is the one that has this name now."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False


def reason_of(error: OSError) -> str:
    """What the system says, where a link is refused in words that name it."""
    return "it is a symbolic link" if error.errno == errno.ELOOP else error.strerror or str(error)


@functools.cache
def _note_no_locks(folder: str, reason: str) -> None:
    say(f"{folder}: no locks on this file system ({reason}): run one process at a time there", sys.stderr)


def read_input(path: Path, most: int = 2**26) -> bytes:
    """The bytes of a file that a user names: a regular file, or a link to one, of at most `most` bytes.

    Raises:
        OSError: it cannot be read, or is a folder.
        UserError: it is a device or a pipe, or it is too large.
    """
    # Without this flag, opening a pipe waits for a writer.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    with os.fdopen(os.open(path, flags), "rb") as file:
        kind = os.fstat(file.fileno())
        if not stat.S_ISREG(kind.st_mode):
            raise UserError(f"{path}: must be a regular file, and not a device or a pipe")
        if kind.st_size > most:
            raise UserError(f"{path}: must have at most {most:,} bytes, got {kind.st_size:,}")
        return file.read(most)


def check_stays(path: Path, folder: Path) -> None:
    """Raise UserError for a link, in or below `folder`, that leads out of it: what it names is somebody else's."""
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        raise UserError(f"{path}: is a link that leads out of {folder}; put the file itself there")


def read_own(path: Path, most: int) -> bytes:
    """The first `most` bytes of a file of the program's own. Raises OSError as `open_own`."""
    with os.fdopen(open_own(path, os.O_RDONLY), "rb") as file:
        return file.read(most)


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A name beside `folder` to write to; it replaces `folder` at the end, and not if anything fails before."""
    partial, old = (folder.with_name(f".{folder.name}.{part}") for part in ("partial", "old"))
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    # Refuses a link, which `rmtree` leaves alone.
    partial.mkdir(parents=True)
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

    What killed processes left half written there is removed.

    Raises:
        UserError: it cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{folder}: cannot write here: {error.strerror}") from None
    remove_dead_partials(folder)
