"""Finding an image by the name that an annotation tool wrote for it."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from urllib.parse import unquote

#: Files of subfolders that are looked through for a name, at most.
_MOST_FILES = 1_000_000


class ImageFolder:
    """The files of a folder, each subfolder listed once, however many names are asked for.

    Args:
        path: of the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._listed: dict[str, frozenset[str]] = {}

    def has(self, name: str) -> bool:
        """Whether a name, relative to the folder, is that of a file."""
        try:
            folder, base = os.path.split(os.path.normpath(name))
            # A file system may know a file by other spellings than it lists.
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
        """Find a file by another spelling of its whole name: backslashes, URL encoding, composed letters."""
        for spelling in _spellings(name):
            if stays_inside(spelling) and self.has(spelling):
                return spelling
        return None

    def elsewhere(self, name: str) -> str | None:
        """Find the one file that a name can mean without leading folders of it, or in another letter case."""
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
        """Find the folder, one level up or down, from which a name leads to a file."""
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
                name if relative == "." else f"{relative}/{name}".replace(os.sep, "/") for name in names
            ]
            if len(found) > _MOST_FILES:
                break
        return found

    @cached_property
    def _by_lower_case(self) -> dict[str, list[str]]:
        return _grouped((name.casefold(), name) for name in self._files)

    @cached_property
    def _by_stem(self) -> dict[str, list[str]]:
        return _grouped((os.path.splitext(name)[0], name) for name in self._files)

    def other_extension(self, name: str) -> str | None:
        """Find a file that has a name but for its extension, which may hold the same picture or its mask."""
        return next(iter(self._by_stem.get(os.path.splitext(name)[0], [])), None)


def stays_inside(name: str) -> bool:
    """Whether a name stays in its folder, by the name alone: links inside the folder are the user's own affair."""
    normal = os.path.normpath(name)
    return not (os.path.isabs(normal) or normal == ".." or normal.startswith(".." + os.sep))


def is_absolute(name: str) -> bool:
    """Whether a name is a whole path or an address: of this system, of Windows, or of the web."""
    return os.path.isabs(name) or bool(re.match(r"[A-Za-z]:[\\/]|\\\\|[A-Za-z][A-Za-z0-9+.-]+://", name))


def _spellings(name: str) -> Iterator[str]:
    """Spell a name as other systems do, from the nearest to the furthest."""
    slashes = name.replace("\\", "/")
    # Label Studio's address of a local file has its name behind ?d=.
    local = re.sub(r"^.*[?&]d=", "", slashes)
    seen = {name}
    for text in (slashes, unquote(name), unquote(slashes), local, unquote(local), local.partition("?")[0]):
        for spelling in (text, unicodedata.normalize("NFC", text), unicodedata.normalize("NFD", text)):
            if spelling and spelling not in seen:
                seen.add(spelling)
                yield spelling


def _grouped(pairs: Iterator[tuple[str, str]]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for key, value in pairs:
        groups.setdefault(key, []).append(value)
    return groups
