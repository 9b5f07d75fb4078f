"""Faults and oddities of an annotation file by kind: each kind is reported once, with its count and three examples."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

#: Number of examples in the text of a problem.
_EXAMPLES = 3
#: A frequent way out.
LEFT_OUT = "`maskloss repair` leaves them out"
_SECTIONS = ("file", "category", "image", "annotation")


@dataclass(frozen=True)
class Kind:
    """A kind of fault or oddity.

    Attributes:
        name: name in the list of repairs.
        section: entries that have the fault: "file", "category", "image" or "annotation". Findings are reported in this
            order, so that causes come before their consequences.
        error: whether it is an error, which is refused, or a warning.
        summary: description of several findings, which follows their number: "images without their file".
        way_out: how to resolve the fault.
    """

    name: str
    section: str
    error: bool
    summary: str = ""
    way_out: str = ""


@dataclass(frozen=True)
class Problem:
    """A message about all findings of one kind.

    Attributes:
        text: the message, with the count, up to three examples and the way out.
        error: whether it is an error, which is refused, or a warning.
        head: the text up to the examples.
        tail: the way out.
        examples: one example for each finding.
        kind: name of the kind.
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
        """Return the text with one example, which is shortened so that the text has at most `most` characters.

        At least 40 characters of the example are kept, even if the text is longer then.
        """
        if not self.examples:
            return self.text
        example = self.examples[0]
        room = max(most - len(self.head) - len(self.tail) - 8, 40)
        if len(example) > room:
            example = f"{example[: room - 3]}..."
        return _make_text(self.head, [example], len(self.examples), self.tail)


@dataclass(frozen=True)
class Finding:
    """One entry with a fault or oddity.

    Attributes:
        position: position of the entry in its list of the file, or -1.
        name: name of the entry: "annotation 7", or "annotation number 3" if it has no id.
        detail: description of the fault.
        value: information that the repair needs, such as the correct value.
    """

    position: int
    name: str
    detail: str
    value: Any = None


@dataclass
class Findings:
    """Findings by kind, with the kinds in the order in which they were first found."""

    by_kind: dict[Kind, list[Finding]] = field(default_factory=dict)

    def add(self, kind: Kind, position: int, name: str, detail: str, value: Any = None) -> None:
        """Add a finding of a kind."""
        self.by_kind.setdefault(kind, []).append(Finding(position, name, detail, value))

    def of(self, kind: Kind) -> list[Finding]:
        """Return the findings of a kind."""
        return self.by_kind.get(kind, [])

    @property
    def any_error(self) -> bool:
        """Whether any finding is an error."""
        return any(kind.error for kind in self.by_kind)

    def problems(self, prefix: str) -> list[Problem]:
        """Make a problem of each kind, errors before warnings, and causes before consequences."""
        # The sort is stable, so the kinds of a section stay in the order in which they were found.
        kinds = sorted(self.by_kind, key=lambda kind: (not kind.error, _SECTIONS.index(kind.section)))
        return [_make_problem(kind, self.by_kind[kind], prefix) for kind in kinds]


def shown(value: Any, most: int = 80) -> str:
    """Return the repr of a value, shortened to about `most` characters, since a file's values may be of any size."""
    try:
        text = repr(value)
    except ValueError:  # an integer with more digits than Python converts to text
        text = "a number of thousands of digits"
    except RecursionError:
        text = f"a {type(value).__name__} that is nested too deeply"
    return text if len(text) <= most else f"{text[: most // 2]}...{text[-(most // 4) :]}"


def printable(text: Any) -> str:
    """Return text with its control characters, such as newlines, escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def _make_problem(kind: Kind, findings: list[Finding], prefix: str) -> Problem:
    examples = tuple(f"{f.name}: {f.detail}" if f.name else f.detail for f in findings)
    head = f"{prefix}: " if len(findings) == 1 else f"{prefix}: {len(findings)} {kind.summary}"
    tail = f"; {kind.way_out}" if kind.way_out else ""
    text = _make_text(head, list(examples[:_EXAMPLES]), len(findings), tail)
    return Problem(text, kind.error, head, tail, examples, kind.name)


def _make_text(head: str, examples: list[str], count: int, tail: str) -> str:
    if count == 1:
        return head + examples[0] + tail
    more = ["..."] if count > len(examples) else []
    return f"{head}: {'; '.join(examples + more)}{tail}"
