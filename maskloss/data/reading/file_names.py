"""Finding the image file that a `file_name` written by an annotation tool refers to."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from urllib.parse import unquote

#: Most files of a folder and its subfolders that are searched for a name.
_MAX_FILES = 1_000_000


class ImageFolder:
    """The files of a folder; each subfolder is listed only once, however many names are looked up.

    Args:
        path: path of the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._listed: dict[str, frozenset[str]] = {}

    def has(self, name: str) -> bool:
        """Return whether a name, relative to the folder, is the name of a file."""
        try:
            if ".." in name.split("/"):
                # Every folder of the name has to exist, and ".." after a link leads out of the link's target.
                path = self.path / name
                return path.is_file() and path.resolve() == (self.path / os.path.normpath(name)).resolve()
            folder, base = os.path.split(os.path.normpath(name))
            # Some file systems also accept other spellings than the one that they list.
            return base in self._names(folder) or os.path.isfile(self.path / name)
        except (OSError, ValueError):
            return False

    def _names(self, folder: str) -> frozenset[str]:
        if folder not in self._listed:
            try:
                with os.scandir(self.path / folder) as entries:
                    names = frozenset(entry.name for entry in entries if entry.is_file())
            except OSError:
                names = frozenset()
            self._listed[folder] = names
        return self._listed[folder]

    def as_spelled(self, name: str) -> str | None:
        """Find a file by other spellings of its name: backslashes, URL encoding, composed letters, spaces around it."""
        for spelling in _spellings(name):
            if stays_inside(spelling) and self.has(spelling):
                return spelling
        return None

    def elsewhere(self, name: str) -> str | None:
        """Find the only file that matches a name without some of its leading folders, or in another letter case."""
        for spelling in (name, *_spellings(name)):
            parts = [part for part in re.split(r"[/\\]", spelling) if part not in ("", ".", "..")]
            for first in range(len(parts)):
                candidate = "/".join(parts[first:])
                if self.has(candidate):
                    return candidate
            for first in range(len(parts)):
                found = self._by_lower_case.get("/".join(parts[first:]).casefold(), [])
                if len(found) == 1:
                    return found[0]
        return None

    def other_folder(self, name: str) -> Path | None:
        """Find a folder, one level up or down, that a name is a file's path relative to."""
        try:
            folders = [self.path.parent, *sorted(p for p in self.path.iterdir() if p.is_dir())]
            for folder in folders:
                if (folder / name).is_file():
                    return folder
        except (OSError, ValueError):
            pass
        return None

    @cached_property
    def _files(self) -> list[str]:
        found: list[str] = []
        for folder, _, names in os.walk(self.path):
            relative = os.path.relpath(folder, self.path)
            found += [
                name if relative == "." else f"{relative}/{name}".replace(os.sep, "/")
                for name in names
                if os.path.isfile(os.path.join(folder, name))  # no broken link, socket or pipe
            ]
            if len(found) > _MAX_FILES:
                break
        return found

    @cached_property
    def _by_lower_case(self) -> dict[str, list[str]]:
        return _group((name.casefold(), name) for name in self._files)

    @cached_property
    def _by_stem(self) -> dict[str, list[str]]:
        return _group((os.path.splitext(name)[0], name) for name in self._files)

    def other_extension(self, name: str) -> str | None:
        """Find a file whose name differs only in the extension; it may be the same picture, or its mask."""
        return next(iter(self._by_stem.get(os.path.splitext(name)[0], [])), None)


def stays_inside(name: str) -> bool:
    """Return whether a relative name stays in its folder, judged by the name alone; symbolic links are not resolved."""
    normal = os.path.normpath(name)
    return not (os.path.isabs(normal) or normal == ".." or normal.startswith(".." + os.sep))


def is_absolute(name: str) -> bool:
    """Return whether a name is an absolute path of this system or of Windows, or a URL."""
    return os.path.isabs(name) or bool(re.match(r"[A-Za-z]:[\\/]|\\\\|[A-Za-z][A-Za-z0-9+.-]+://", name))


def _spellings(name: str) -> Iterator[str]:
    """Yield other spellings of a name, starting with the most similar ones."""
    seen = {name}
    # A script that read the names from the lines of a file may have left the ends of the lines.
    for base in (name, name.strip()):
        slashes = base.replace("\\", "/")
        # Label Studio's URL of a local file has the file's name after ?d=.
        local = re.sub(r"^.*[?&]d=", "", slashes)
        for text in (
            base,
            slashes,
            unquote(base),
            unquote(slashes),
            local,
            unquote(local),
            local.partition("?")[0],
        ):
            for spelling in (text, unicodedata.normalize("NFC", text), unicodedata.normalize("NFD", text)):
                if spelling and spelling not in seen:
                    seen.add(spelling)
                    yield spelling


def _group(pairs: Iterator[tuple[str, str]]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for key, value in pairs:
        groups.setdefault(key, []).append(value)
    return groups
