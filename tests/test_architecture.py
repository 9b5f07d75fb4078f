"""The arrows between the packages, read from the imports; the tests' twins; and what `import maskloss` may load."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "maskloss"
TESTS = Path(__file__).resolve().parent

#: Which parts of maskloss each part may import, itself aside. `errors` and `files` are leaves that the
#: command line's side shares.
LEAVES = {"errors", "files", "screen"}
ARROWS = {
    "masks": set(),
    "losses": {"masks"},
    "detection": {"losses", "masks"},
    "data": {"masks"} | LEAVES,
    "report": {"data", "masks"} | LEAVES,
    "training": {"data", "detection", "losses", "masks"} | LEAVES,
    "ablation": {"data", "report", "training"} | LEAVES,
    "cli": {"ablation", "data", "detection", "losses", "masks", "parser", "report", "training"} | LEAVES,
    "parser": {"__init__", "errors", "option_errors", "training"},
    "__main__": {"cli"},
    "errors": set(),
    "files": {"errors"},
    "option_errors": set(),
    "screen": {"errors"},
    "__init__": {"detection", "errors", "losses", "masks"},
}
#: All that the tensor core may import from outside, besides the standard library.
CORE = {"torch", "torchvision.ops", "numpy", "pycocotools.mask"}


class Import(NamedTuple):
    """One imported module, or name of a module, of one file."""

    where: str
    name: str
    for_types_only: bool


def part_of(file: Path) -> str:
    relative = file.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def sources(part: str) -> list[Path]:
    return sorted(file for file in PACKAGE.rglob("*.py") if part_of(file) == part)


def imports_of(file: Path) -> Iterator[Import]:
    """Every import anywhere in the file, functions included, with `from a import b` given as a.b."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for_types_only = {
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for statement in block.body
        for node in ast.walk(statement)
    }
    package = ["maskloss", *file.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(tree):
        where = f"{file.relative_to(PACKAGE.parent)}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (Import(where, name, node in for_types_only) for name in names)


def home_of_public_names() -> dict[str, str]:
    """Where the names come from that `maskloss/__init__.py` offers: {"convert": "detection", ...}."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    return {
        alias.asname or alias.name: node.module.split(".")[1]
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("maskloss.")
        for alias in node.names
    }


def parts_imported(file: Path) -> Iterator[tuple[str, Import]]:
    public = home_of_public_names()
    for imported in imports_of(file):
        first, *rest = imported.name.split(".")
        if first != "maskloss":
            continue
        if rest and rest[0].startswith("__"):
            continue  # the version
        # `import maskloss` alone gives every public name, so it counts as the outermost of their homes.
        yield (public.get(rest[0], rest[0]) if rest else "detection"), imported


def within(name: str, modules: set[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def test_every_part_of_the_package_has_its_arrows():
    assert {part_of(file) for file in PACKAGE.rglob("*.py")} <= set(ARROWS)


@pytest.mark.parametrize("part", ARROWS)
def test_no_arrow_is_reversed(part):
    wrong = [
        f"{imported.where}: {part} must not import {imported.name}"
        for file in sources(part)
        for to, imported in parts_imported(file)
        if to != part and to not in ARROWS[part]
    ]
    assert wrong == []


def test_no_files_import_each_other_in_a_circle():
    """Of any length, imports inside of functions and for types alone included."""
    files = {file for file in PACKAGE.rglob("*.py") if file.stem != "__init__"}
    names = {".".join(["maskloss", *file.relative_to(PACKAGE).with_suffix("").parts]): file for file in files}
    imported = {
        name: {
            module
            for one in imports_of(file)
            for module in (one.name, one.name.rpartition(".")[0])
            if module in names
        }
        for name, file in names.items()
    }
    free: set[str] = set()
    while ready := {name for name, to in imported.items() if name not in free and to <= free}:
        free |= ready
    assert set(names) - free == set()


def test_the_arrows_themselves_have_no_circle():
    order: list[str] = []
    remaining = {part: set(to) for part, to in ARROWS.items()}
    while remaining:
        free = [part for part, to in remaining.items() if to <= set(order)]
        assert free, f"a circle among {sorted(remaining)}"
        order += free
        for part in free:
            del remaining[part]


def test_losses_take_nothing_of_masks_but_the_settings():
    taken = {
        imported.name for file in sources("losses") for to, imported in parts_imported(file) if to == "masks"
    }
    assert taken == {"maskloss.masks.targets.MaskTargets"}


@pytest.mark.parametrize("part", ["losses", "masks"])
def test_the_tensor_core_imports_torch_numpy_and_pycocotools_alone(part):
    files = sources(part)
    assert files
    wrong = [
        f"{imported.where}: {imported.name}"
        for file in files
        for imported in imports_of(file)
        if not imported.for_types_only
        and imported.name.split(".")[0] not in sys.stdlib_module_names | {"maskloss"}
        and not within(imported.name, CORE)
    ]
    assert wrong == []


def test_only_detection_touches_torchvisions_detection_code():
    namespace = "torchvision.models.detection"
    touching = set()
    for file in PACKAGE.rglob("*.py"):
        if any(within(imported.name, {namespace}) for imported in imports_of(file)):
            touching.add(part_of(file))
        # `import torchvision` reaches it by attributes, too.
        tree = ast.parse(file.read_text(encoding="utf-8"))
        if any(isinstance(node, ast.Attribute) and ast.unparse(node) == namespace for node in ast.walk(tree)):
            touching.add(part_of(file))
    assert touching == {"detection"}


def test_every_module_has_a_twin_with_its_tests():
    # The twin of maskloss/data/coco.py is tests/data/test_coco.py.
    modules = [file.relative_to(PACKAGE) for file in PACKAGE.rglob("*.py") if not file.stem.startswith("__")]
    assert modules
    twins = {module: TESTS / module.with_name(f"test_{module.name}") for module in modules}
    without = [
        f"{module}: no tests in {twin.relative_to(TESTS.parent)}"
        for module, twin in sorted(twins.items())
        if not (twin.is_file() and has_tests(twin))
    ]
    assert without == []


def has_tests(file: Path) -> bool:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return any(isinstance(node, ast.FunctionDef) and node.name.startswith("test_") for node in tree.body)


def test_importing_maskloss_loads_no_training_code_and_no_drawing():
    heavy = [
        "maskloss.training",
        "maskloss.data",
        "maskloss.report",
        "maskloss.cli",
        "matplotlib",
        "accelerate",
    ]
    script = f"import sys, maskloss; print([name for name in {heavy} if name in sys.modules])"
    run = subprocess.run(
        [sys.executable, "-c", script],
        cwd=PACKAGE.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == "[]"


def test_importing_maskloss_draws_no_random_number_and_changes_no_default():
    script = (
        "import torch, torchvision; state = torch.get_rng_state(); threads = torch.get_num_threads();"
        "import maskloss;"
        "assert torch.equal(torch.get_rng_state(), state);"
        "assert torch.get_num_threads() == threads;"
        "assert torch.get_default_dtype() == torch.float32;"
        "assert torch.is_grad_enabled()"
    )
    run = subprocess.run([sys.executable, "-c", script], cwd=PACKAGE.parent, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_no_module_needs_a_posix_system_to_be_imported():
    posix = {"fcntl", "grp", "pwd", "resource", "termios"}
    wrong = [
        str(file.relative_to(PACKAGE))
        for file in PACKAGE.rglob("*.py")
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(node, ast.Import) and {alias.name for alias in node.names} & posix
    ]
    assert wrong == []


def test_every_text_file_is_read_and_written_as_utf_8():
    """Other systems have encodings of their own. `maskloss.files.write_text` has UTF-8."""
    calls = [
        (f"{file.name}:{node.lineno}", node)
        for file in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in ("read_text", "write_text")
    ]
    wrong = [where for where, node in calls if "utf-8" not in ast.unparse(node)]
    assert wrong == []
