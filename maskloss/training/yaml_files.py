"""A strict reader of users' YAML files, which rejects mistakes that PyYAML silently accepts."""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from maskloss.errors import InputError, one_line
from maskloss.files import read_bytes

#: A config has a few hundred values. Nested aliases multiply: a kilobyte can expand to a billion values.
_MOST_VALUES = 100_000
_DEEPEST = 30


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, but duplicate keys are an error, and 1e-4 is a number, as in YAML 1.2."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        # Keys from a merge, <<, may be overridden, so only the mapping's own keys are compared.
        own = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        keys = [self.construct_object(key, deep=True) for key in own]  # type: ignore[no-untyped-call]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} occurs {keys.count(key)} times", node.start_mark
                )
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+"), list("-+.0123456789")
)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping with strings as keys.

    Raises:
        InputError: the file cannot be read, is not valid YAML or not such a mapping, has a duplicate key, is nested too
            deeply, or expands to too many values.
    """
    try:
        loader = _Loader(read_bytes(path).decode("utf-8-sig"))
        node = loader.get_single_node()
        if node is not None and _count_values(node, {}, 0) > _MOST_VALUES:
            raise InputError(f"{path}: cannot be a config: it expands to more than {_MOST_VALUES:,} values")
        content = None if node is None else loader.construct_document(node)
    except RecursionError as error:
        raise InputError(
            f"{path}: cannot be a config: it is nested too deeply, or contains itself"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, OverflowError, TypeError) as error:
        raise InputError(f"{path}: is not valid YAML: {one_line(error)}") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        found = "nothing" if content is None else f"a {type(content).__name__}"
        raise InputError(f"{path}: expected a mapping with strings as keys, got {found}")
    return content


def _count_values(node: yaml.Node, known: dict[int, int], depth: int) -> int:
    """Return the number of values that a node expands to, with every alias resolved."""
    if depth > _DEEPEST:
        raise RecursionError
    if id(node) not in known:
        children: list[Any] = []
        if isinstance(node, yaml.MappingNode):
            children = [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            children = node.value
        known[id(node)] = 1 + sum(_count_values(child, known, depth + 1) for child in children)
    return known[id(node)]
