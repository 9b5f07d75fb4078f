"""Files that are whole or not there: written under a temporary name, then renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from maskloss.errors import InputError, RunError


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
    """Write a text file whole, in UTF-8; see `write_bytes`. Letters that have no encoding are escaped."""
    write_bytes(path, content.encode(errors="backslashreplace"))


def append_line(path: Path, line: str) -> None:
    """Append one line to a file, or nothing.

    Raises:
        RunError: the disk is full, or the folder does not allow it; the file is then as it was.
    """
    size = path.stat().st_size if path.exists() else 0
    try:
        with path.open("ab") as file:
            file.write(line.encode() + b"\n")
    except OSError as error:
        if path.exists():
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
    """Give a temporary name beside `path`, renamed to it at the end, or removed where the disk failed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        raise RunError(f"{path}: cannot be written: {error.strerror or error}") from error


def make_folder(path: Path) -> None:
    """Create a folder that can be written to, and its parents.

    Raises:
        InputError: it cannot be created or written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: the folder cannot be created: {error.strerror or error}") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise InputError(f"{path}: the folder cannot be written to")


def expect_unused(folder: Path) -> None:
    """Refuse a folder that is not new or empty.

    Raises:
        InputError: it holds something, or is a file.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: already holds something; name a new folder")


def read_bytes(path: Path) -> bytes:
    """Read a file.

    Raises:
        InputError: it is missing or cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error


def existing_folder(path: str | os.PathLike[str], what: str) -> Path:
    """Give the path of a folder that is there.

    Raises:
        InputError: it is not.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise InputError(f"{folder}: the folder of {what} does not exist")
    return folder
