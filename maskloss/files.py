"""Atomic file writes (under a temporary name, then renamed), folder locks, and checks of paths."""

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

#: The names of `temporary_path`.
_TEMPORARY = re.compile(r"\.maskloss-(\d+)-[0-9a-f]{8}\.tmp")


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file completely, or leave the previous one unchanged.

    Raises:
        RunError: the disk is full, or the folder is not writable.
    """
    with _replacing(path) as temporary, temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def write_text(path: Path, content: str) -> None:
    """Write a UTF-8 text file completely, or leave the previous one unchanged, as `write_bytes` does.

    Characters that UTF-8 cannot encode, as in a file name of another encoding, are escaped.
    """
    write_bytes(path, content.encode(errors="backslashreplace"))


def append_line(path: Path, line: str) -> None:
    """Append one complete line to a file, or leave the file unchanged.

    Raises:
        RunError: the disk is full, or the folder is not writable.
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
    """Copy a file to a temporary name, then rename it.

    Raises:
        RunError: the disk is full, or the folder is not writable.
    """
    with _replacing(destination) as temporary:
        shutil.copyfile(source, temporary)


def temporary_path(folder: Path) -> Path:
    """Return a new path in a folder that `remove_leftovers` recognizes if the process is killed.

    It does not contain the final name, which may already be as long as the file system allows.
    """
    return folder / f".maskloss-{os.getpid()}-{secrets.token_hex(4)}.tmp"


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` on success, or remove it if writing fails."""
    temporary = temporary_path(path.parent)
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
    """Remove temporary files that killed processes left in these folders; keep those of running processes."""
    for folder in folders:
        with suppress(OSError):
            for path in list(folder.iterdir()):
                found = _TEMPORARY.fullmatch(path.name)
                if found and not _is_running(int(found[1])):
                    with suppress(OSError):
                        path.unlink()


def _is_running(process: int) -> bool:
    # This process has not written anything yet when a command starts, so the file belongs to an earlier process with
    # the same id. Containers reuse process ids all the time.
    if process == os.getpid():
        return False
    import psutil  # os.kill(process, 0) would end the process on Windows

    try:
        return bool(psutil.pid_exists(process))
    except OverflowError:
        return False


@contextmanager
def locked(
    folder: Path,
    busy: str = "another process is writing into it; wait until it ends, or name another --output",
) -> Iterator[None]:
    """Lock a folder against writes by other processes, and remove temporary files that killed processes left in it.

    The operating system releases the lock when the process ends, however it ends.

    Raises:
        InputError: another process holds the lock, or the folder is not writable.
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
        # Remove the file while the lock is still held: no process waits for it, and the next one creates its own file.
        # Windows does not remove a file that is open; there, the empty file stays.
        with suppress(OSError):
            (folder / ".lock").unlink()
        lock.release()


_held: list[Any] = []


def _drop_inherited_locks() -> None:
    """Close the locks that a forked process inherited; otherwise data workers would hold them after the parent dies."""
    while _held:
        context = _held.pop()._context
        descriptor, context.lock_file_fd = context.lock_file_fd, None
        with suppress(OSError, TypeError):
            os.close(descriptor)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_drop_inherited_locks)


def with_home(path: Any) -> Any:
    """Return a path with a leading ~ replaced by the home folder; other values are returned unchanged.

    Shells replace it in `--output ~/runs`, but most of them not in `--output=~/runs`, and nobody does in YAML files.
    """
    is_in_home = isinstance(path, str) and (path == "~" or path.startswith("~/"))
    return os.path.expanduser(path) if is_in_home else path


def make_folder(path: Path) -> None:
    """Create a writable folder and its parents.

    Raises:
        InputError: the folder cannot be created, or is not writable.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: the folder cannot be created: {reason_of(error)}") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise InputError(f"{path}: the folder cannot be written to")


def check_unused(folder: Path) -> None:
    """Check that a folder does not exist yet or is empty.

    Raises:
        InputError: the folder is not empty, is a file, or cannot be read.
    """
    remove_leftovers(folder, folder / "images")
    try:
        used = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: cannot be read: {reason_of(error)}") from error
    if used:
        raise InputError(f"{folder}: is not an empty folder; name a new one")


def read_bytes(path: Path) -> bytes:
    """Read a file.

    Raises:
        InputError: the file is missing or cannot be read.
    """
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:
        url = re.match(r"https?:/", str(path))
        way_out = "; it looks like a URL: download the file, and give its path" if url else ""
        raise InputError(f"{path}: cannot be read: {reason_of(error)}{way_out}") from error


def existing_folder(path: str | os.PathLike[str], what: str) -> Path:
    """Return the path of a folder after checking that it exists.

    Args:
        path: path of the folder.
        what: what the folder contains, for the message.

    Raises:
        InputError: the folder does not exist or cannot be read.
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
    """Return the reason why a path could not be read or written."""
    # An invalid path, such as one with a null byte, raises ValueError.
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
