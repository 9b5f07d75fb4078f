"""A strict reader of users' YAML files, which rejects mistakes that PyYAML silently accepts."""

from __future__ import annotations

import difflib
import math
import re
from collections import Counter
from collections.abc import Collection, Hashable, Mapping
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
        # `repr`, because keys that cannot be hashed, such as lists, are refused with a message of their own below.
        for key, count in Counter(map(repr, keys)).items():
            if count > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key} occurs {count} times", node.start_mark
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


def read_options(path: Path, names: Collection[str]) -> dict[str, Any]:
    """Read a YAML file of options, whose keys have underscores or hyphens.

    Args:
        path: the file.
        names: names of the options, with underscores.

    Returns:
        The options, with underscores in their names.

    Raises:
        InputError: see `read_yaml`; or a key is no option, or is given both ways.
    """
    return with_underscores(read_yaml(path), str(path), names)


def with_underscores(content: Mapping[str, Any], where: str, names: Collection[str]) -> dict[str, Any]:
    """Return options with underscores in their names, after checking the names.

    Args:
        content: the options, with underscores or hyphens in their names.
        where: what the message of an error starts with.
        names: names of the options, with underscores.

    Raises:
        InputError: a key is no option, or is given both ways.

    Example:
        >>> with_underscores({"max-steps": 3}, "c.yaml", ["max_steps"])
        {'max_steps': 3}
    """
    options: dict[str, Any] = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in names:
            similar = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {similar[0]}?" if similar else "`maskloss train --help` lists the options"
            raise InputError(f"{where}: unknown option {one_line(key, 80)}; {hint}")
        if name in options:
            raise InputError(f"{where}: the option {name} is given twice, with underscores and with hyphens")
        options[name] = value
    return options


def dump_yaml(content: Mapping[str, Any]) -> str:
    """Return a mapping as YAML in one line."""
    return yaml.safe_dump(dict(content), default_flow_style=True, width=math.inf, allow_unicode=True).strip()


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
