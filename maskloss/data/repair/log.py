"""The list of changes that a repair makes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from maskloss.data.findings import Kind, shown
from maskloss.data.reading.entries import is_absent
from maskloss.data.repair.sections import LIST_KEYS, entries, id_key


@dataclass(frozen=True)
class Repair:
    """One change that was made for one kind of fault, and the entries that it was made to.

    Attributes:
        kind: name of the kind of fault.
        section: "file", "category", "image" or "annotation".
        change: description of the change.
        entries: (name, fault) of each changed entry.
    """

    kind: str
    section: str
    change: str
    entries: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        count = len(self.entries)
        number = f"{count} {self.section if count == 1 else LIST_KEYS.get(self.section, f'{self.section}s')}"
        examples = "; ".join(f"{name}: {what}" if name else what for name, what in self.entries[:3])
        return f"{number}: {self.change} ({examples}{'; ...' if count > 3 else ''})"


@dataclass
class Log:
    """The changes made so far, grouped by kind and change, in the order in which they were made."""

    entries_by_change: dict[tuple[str, str, str], dict[Any, tuple[str, str]]] = field(default_factory=dict)
    #: Number of changes in the current round.
    count: int = 0
    #: By the identity of an entry whose id is missing or not unique: the entry, and its name by position. Entries that
    #: are left out stay alive here, so that no other entry gets their identity.
    positions: dict[int, tuple[Any, str]] = field(default_factory=dict)

    def name_by_position(self, document: dict[str, Any]) -> None:
        """Name the entries by their position in the file if their id is missing or not unique."""
        for section in LIST_KEYS:
            counts = Counter(id_key(item.get("id")) for _, item in entries(document, section))
            for position, item in entries(document, section):
                given = item.get("id")
                if is_absent(given):
                    self.positions[id(item)] = item, f"{section} number {position}"
                elif counts[id_key(given)] > 1:
                    self.positions[id(item)] = item, f"{section} number {position} (id {shown(given)})"

    def add(self, kind: Kind, change: str, name: str, what: str, item: Any = None) -> None:
        """Add a change of an entry, once for each entry and change."""
        self.count += 1
        changed = self.entries_by_change.setdefault((kind.name, kind.section, change), {})
        name = self.positions[id(item)][1] if id(item) in self.positions else name
        # Unique ids and names by position tell the objects apart; other entries have no id and are changed only once.
        changed.setdefault(name if isinstance(item, dict) else len(changed), (name, what))

    def repairs(self) -> list[Repair]:
        """Return the changes in the order in which each was first made."""
        return [Repair(*key, tuple(changed.values())) for key, changed in self.entries_by_change.items()]
