"""What is wrong or odd in an annotation file, by kind: each is told once, with its count and three examples."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

#: Examples that a line has, unless all are asked for.
_EXAMPLES = 3
_SECTIONS = ("file", "category", "image", "annotation")


@dataclass(frozen=True)
class Kind:
    """A kind of fault or oddity.

    Attributes:
        name: in the list of repairs.
        section: which entries have it: "file", "category", "image" or "annotation". Causes come before
            consequences, so findings are told in this order.
        error: refused, where a warning is read.
        summary: of several, behind their number: "images without their file".
        way_out: what to do about it.
    """

    name: str
    section: str
    error: bool
    summary: str = ""
    way_out: str = ""


@dataclass(frozen=True)
class Problem:
    """A line about all findings of one kind.

    Attributes:
        text: with the count, three examples and the way out.
        error: refused, where a warning is read.
        head: the text up to the examples.
        tail: the way out.
        examples: every one of them.
        kind: the name of the kind.
    """

    text: str
    error: bool = True
    head: str = ""
    tail: str = ""
    examples: tuple[str, ...] = ()
    kind: str = ""

    def __str__(self) -> str:
        return f"{'error' if self.error else 'warning'}: {self.text}"

    def shortened(self, most: int) -> str:
        """The text with one example, cut so that it has `most` characters at most where that is possible."""
        if not self.examples:
            return self.text
        example = self.examples[0]
        room = max(most - len(self.head) - len(self.tail) - 8, 40)
        if len(example) > room:
            example = f"{example[: room - 3]}..."
        return _line(self.head, [example], len(self.examples), self.tail)


@dataclass(frozen=True)
class Finding:
    """One entry of a kind.

    Attributes:
        position: of the entry in its list of the file, or -1.
        name: "annotation 7", "annotation number 3" where it has no id.
        detail: what is wrong with it.
        value: for the repair, what it is to be replaced by.
    """

    position: int
    name: str
    detail: str
    value: Any = None


@dataclass
class Findings:
    """Findings by kind, in the order in which the kinds came up."""

    by_kind: dict[Kind, list[Finding]] = field(default_factory=dict)

    def add(self, kind: Kind, position: int, name: str, detail: str, value: Any = None) -> None:
        """Note an entry of a kind."""
        self.by_kind.setdefault(kind, []).append(Finding(position, name, detail, value))

    def of(self, kind: Kind) -> list[Finding]:
        """Return the findings of a kind."""
        return self.by_kind.get(kind, [])

    @property
    def any_error(self) -> bool:
        """Whether there is anything that is refused."""
        return any(kind.error for kind in self.by_kind)

    def problems(self, prefix: str) -> list[Problem]:
        """Make a line of each kind, errors before warnings, causes before consequences."""
        # Stable: within a section as they came up.
        kinds = sorted(self.by_kind, key=lambda kind: (not kind.error, _SECTIONS.index(kind.section)))
        return [_problem(kind, self.by_kind[kind], prefix) for kind in kinds]


def shown(value: Any, most: int = 80) -> str:
    """Represent a value of the file, shortened: it may be of any size."""
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python prints
        text = "a number of thousands of digits"
    return text if len(text) <= most else f"{text[: most // 2]}...{text[-(most // 4) :]}"


def _problem(kind: Kind, findings: list[Finding], prefix: str) -> Problem:
    examples = tuple(f"{f.name}: {f.detail}" if f.name else f.detail for f in findings)
    head = f"{prefix}: " if len(findings) == 1 else f"{prefix}: {len(findings)} {kind.summary}"
    tail = f"; {kind.way_out}" if kind.way_out else ""
    text = _line(head, list(examples[:_EXAMPLES]), len(findings), tail)
    return Problem(text, kind.error, head, tail, examples, kind.name)


def _line(head: str, examples: list[str], count: int, tail: str) -> str:
    if count == 1:
        return head + examples[0] + tail
    more = ["..."] if count > len(examples) else []
    return f"{head}: {'; '.join(examples + more)}{tail}"
