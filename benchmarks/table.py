"""Print the latest ratios of all benchmarks in one table.

    python benchmarks/table.py

Reads results/*.json; the docstring of each script explains its ratios.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from measuring import RESULTS


def ratios(content: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield the name and the spread of every ratio, at any depth."""
    if not isinstance(content, dict):
        return
    if content.keys() == {"median", "low", "high"}:
        yield ", ".join(path), content
    for key, value in content.items():
        # Absolute seconds have a spread too, and torchvision compared with itself is 1.
        if key not in ("seconds", "torchvision"):
            yield from ratios(value, path if key == "times_faster" else (*path, key))


def main() -> None:
    """Print the table."""
    print(f"{'times faster than torchvision (quartiles)':<72} commit, device, threads")
    for file in sorted(RESULTS.glob("*.json")):
        document = json.loads(file.read_text())
        where = document["environment"]
        print(f"{file.stem:<72} {where['commit'][:9]}, {where['device']}, {where['threads']}")
        for name, ratio in ratios(document["results"]):
            print(f"    {name:<52} {ratio['median']:>7.2f}x ({ratio['low']:.2f}-{ratio['high']:.2f})")


if __name__ == "__main__":
    main()
