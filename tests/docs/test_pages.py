"""README and the pages of docs/: code runs, commands parse, links lead somewhere, names and messages exist."""

from __future__ import annotations

import ast
import re
import shlex
from collections import Counter
from pathlib import Path

import pytest
import torch

import maskloss
from maskloss import cli
from maskloss.parser import make_parser, underscored
from tests.training.small_runs import narrow_models

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(
    path
    for path in (ROOT / "README.md", *DOCS.rglob("*.md"))
    # Those below `repository` are written by docs/conf.py. The others have tests of their own.
    if "repository" not in path.parts and path.name not in ("export.md", "extending.md", "other_formats.md")
)
MARKDOWN = [
    *PAGES,
    DOCS / "export.md",
    DOCS / "extending.md",
    DOCS / "other_formats.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
]
MARKDOWN += sorted((ROOT / "benchmarks").rglob("README.md"))


def page_id(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(path: Path, language: str) -> list[str]:
    found: list[str] = re.findall(rf"```{language}\n(.*?)```", path.read_text("utf-8"), flags=re.DOTALL)
    return found


def anchors(path: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", path.read_text("utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("path", [path for path in PAGES if blocks(path, "python")], ids=page_id)
def test_code_runs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.models import detection

    build = detection.maskrcnn_resnet50_fpn

    # The page's model at 64 px, and without the download of its weights.
    def small(**options: object) -> object:
        if options.get("weights") == "DEFAULT":
            options["weights"] = None
        return build(**{"weights_backbone": None, "min_size": 64, "max_size": 64, **options})

    monkeypatch.setattr(detection, "maskrcnn_resnet50_fpn", small)
    torch.manual_seed(0)
    target = {
        "boxes": torch.tensor([[8.0, 8.0, 40.0, 48.0]]),
        "labels": torch.tensor([1]),
        "masks": torch.ones(1, 64, 64, dtype=torch.uint8),
    }
    # What the first lines of the README leave to their reader.
    names: dict[str, object] = {"images": [torch.rand(3, 64, 64)], "targets": [target]}
    with narrow_models():
        for code in blocks(path, "python"):
            exec(compile(code, path.name, "exec"), names)


@pytest.mark.parametrize("path", [path for path in PAGES if blocks(path, "sh")], ids=page_id)
def test_commands_parse(path: Path) -> None:
    commands = "".join(blocks(path, "sh")).replace("\\\n", " ").splitlines()
    parsed = 0
    for command in commands:
        program, *arguments = shlex.split(command, comments=True) or [""]
        if program == "maskloss" and "--config" not in arguments:
            parser = make_parser(cli.COMMANDS, arguments[0])
            parser.parse_args([underscored(argument) for argument in arguments])
            parsed += 1
    assert parsed


@pytest.mark.parametrize("path", MARKDOWN, ids=page_id)
def test_links_lead_somewhere(path: Path) -> None:
    text = re.sub(r"```.*?```", "", path.read_text("utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target or target.startswith("mailto:"):
            continue
        name, _, anchor = target.partition("#")
        linked = (path.parent / name).resolve() if name else path
        assert linked.exists(), target
        if anchor:
            assert anchor in anchors(linked), target


def test_every_public_name_is_on_one_page() -> None:
    documented: Counter[object] = Counter()
    for path in DOCS.rglob("*.md"):
        for directives in blocks(path, r"\{eval-rst\}"):
            module = "maskloss"
            for line in directives.splitlines():
                if current := re.match(r"\.\. currentmodule:: (\S+)", line):
                    module = current[1]
                elif name := re.match(r"\.\. auto(?:function|class):: (\w+)", line):
                    documented[f"{module}.{name[1]}"] += 1
    shared = set(maskloss.__all__) & set(maskloss.losses.__all__)
    expected = {f"maskloss.{name}" for name in maskloss.__all__ if name not in shared}
    expected |= {
        f"maskloss.losses.{name}" for name in maskloss.losses.__all__ if name not in {*shared, "presets"}
    }
    for name in expected:
        assert documented[name] == 1, name
    for name in shared:
        assert documented[f"maskloss.{name}"] + documented[f"maskloss.losses.{name}"] == 1, name


def string_constants() -> str:
    """Return all string literals of the package, one per line, with those of one expression joined."""
    found = []
    for path in (ROOT / "maskloss").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append(
                    "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_the_messages_are_those_of_the_package() -> None:
    page = (DOCS / "troubleshooting.md").read_text("utf-8")
    messages = re.findall(r"^\| `([^`]+)` \|", page, flags=re.MULTILINE)
    assert len(messages) > 15
    constants = string_constants()
    for message in messages:
        assert message in constants, message


def test_the_figures_are_on_pages() -> None:
    used = {
        name
        for path in DOCS.rglob("*.md")
        for name in re.findall(r"plot:: figures/(\w+)", path.read_text("utf-8"))
    }
    assert used == {path.stem for path in (DOCS / "figures").glob("*.py")} - {"curves"}
