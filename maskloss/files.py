"""Files that are whole or not there: written under a temporary name, then renamed."""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from maskloss.errors import InputError, RunError

#: Not made from the final name, which may already be as long as the file system allows. Versions before 0.2 did so.
_TEMPORARY = re.compile(r"\.maskloss-(\d+)-[0-9a-f]{8}\.tmp|\..+\.(\d+)\.tmp", re.DOTALL)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole, or leave what was there.

    Raises:
        RunError: the disk is full, or the folder does not allow it.
    """
    with _put_in_place(path) as temporary, temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def write_text(path: Path, content: str) -> None:
    """Write a text file whole, in UTF-8; see `write_bytes`.

    What UTF-8 cannot hold, such as a file name in another encoding, is escaped.
    """
    write_bytes(path, content.encode(errors="backslashreplace"))


def append_line(path: Path, line: str) -> None:
    """Append one line to a file, or nothing.

    Raises:
        RunError: the disk is full, or the folder does not allow it; the file is then as it was.
    """
    size: int | None = None
    try:
        size = path.stat().st_size if path.exists() else 0
        with path.open("ab") as file:
            file.write(line.encode(errors="backslashreplace") + b"\n")
    except OSError as error:
        if size is not None:
            with suppress(OSError):
                os.truncate(path, size)
        raise RunError(f"{path}: cannot be written: {error.strerror or error}") from error


def copy_file(source: Path, destination: Path) -> None:
    """Copy a file under a temporary name, then rename it.

    Raises:
        RunError: the disk is full, or the folder does not allow it.
    """
    with _put_in_place(destination) as temporary:
        shutil.copyfile(source, temporary)


@contextmanager
def _put_in_place(path: Path) -> Iterator[Path]:
    """Give a temporary name beside `path`, renamed to it at the end, or removed if writing fails."""
    temporary = path.with_name(f".maskloss-{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if not isinstance(error, OSError):
            raise
        raise RunError(f"{path}: cannot be written: {error.strerror or error}") from error


def remove_leftovers(*folders: Path) -> None:
    """Remove the temporary files that killed processes left in these folders; those of running ones stay."""
    for folder in folders:
        with suppress(OSError):
            for path in list(folder.iterdir()):
                found = _TEMPORARY.fullmatch(path.name)
                if found and not _is_running(int(found[1] or found[2])):
                    with suppress(OSError):
                        path.unlink()


def _is_running(process: int) -> bool:
    # At the start of a command this process has written nothing yet: the file is of an earlier one of the same
    # number, which containers hand out again and again.
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        pass
    return True


@contextmanager
def locked(
    folder: Path, busy: str = "another process is writing into it; wait for its end, or name another --output"
) -> Iterator[None]:
    """Keep every other process from writing into a folder, and remove what a killed one left there half written.

    The operating system releases the lock when the process ends, however it ends.

    Raises:
        InputError: another process has the lock, or the folder cannot be written to.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(folder / ".lock", timeout=0, thread_local=False)
    try:
        lock.acquire()
    except Timeout as error:
        raise InputError(f"{folder}: {busy}") from error
    except OSError as error:
        raise InputError(f"{folder}: the folder cannot be written to: {error.strerror or error}") from error
    _held.append(lock)
    try:
        remove_leftovers(folder)
        yield
    finally:
        _held.remove(lock)
        # While it is still held: nobody waits for it, and who comes next makes a file of his own.
        (folder / ".lock").unlink(missing_ok=True)
        lock.release()


_held: list[Any] = []


def _drop_inherited_locks() -> None:
    """Close what a forked process has of its parent's locks, or its data workers would hold them after its death."""
    while _held:
        context = _held.pop()._context
        descriptor, context.lock_file_fd = context.lock_file_fd, None
        with suppress(OSError, TypeError):
            os.close(descriptor)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_drop_inherited_locks)


def make_folder(path: Path) -> None:
    """Create a folder that can be written to, and its parents.

    Raises:
        InputError: it cannot be created or written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: the folder cannot be created: {reason_of(error)}") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise InputError(f"{path}: the folder cannot be written to")


def expect_unused(folder: Path) -> None:
    """Refuse a folder that is not new or empty.

    Raises:
        InputError: it holds something, or is a file.
    """
    remove_leftovers(folder, folder / "images")
    try:
        used = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: cannot be read: {reason_of(error)}") from error
    if used:
        raise InputError(f"{folder}: already holds something; name a new folder")


def read_bytes(path: Path) -> bytes:
    """Read a file.

    Raises:
        InputError: it is missing or cannot be read.
    """
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {reason_of(error)}") from error


def existing_folder(path: str | os.PathLike[str], what: str) -> Path:
    """Give the path of a folder that is there.

    Raises:
        InputError: it is not.
    """
    folder = Path(path)
    try:
        exists = folder.is_dir()
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: the folder of {what} cannot be read: {reason_of(error)}") from error
    if not exists:
        raise InputError(f"{folder}: the folder of {what} does not exist")
    return folder


def reason_of(error: Exception) -> str:
    """Return why a path could not be read or written."""
    # A ValueError is of a path that cannot be one, with a null byte in it.
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
