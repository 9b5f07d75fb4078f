"""The extensions of docs/extending.md: files, tests and commands are run as they stand on the page."""

from __future__ import annotations

import csv
import glob
import importlib
import json
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from maskloss import cli
from maskloss.training.metrics import METRICS
from tests.training.small_runs import narrow_models

pytestmark = pytest.mark.slow

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"


class Section(NamedTuple):
    """What a section of the page tells its reader to write and to type."""

    files: dict[str, str]
    scripts: list[str]
    commands: list[str]


def read_page() -> dict[str, Section]:
    sections: dict[str, Section] = {}
    for part in re.split(r"^#+ ", PAGE.read_text("utf-8"), flags=re.MULTILINE)[1:]:
        section = sections[part.splitlines()[0]] = Section({}, [], [])
        for name, language, code in re.findall(
            r"(?:`([\w.]+)`:\n\n)?```(\w+)\n(.*?)```", part, flags=re.DOTALL
        ):
            if name:
                section.files[name] = code
            elif language == "sh":
                section.commands.extend(code.replace("\\\n", " ").splitlines())
            elif language == "python":
                section.scripts.append(code)
    return sections


SECTIONS = read_page()
INTRODUCTION, *EXTENSIONS = SECTIONS


def run_commands(commands: list[str]) -> None:
    for command in commands:
        program, *arguments = shlex.split(command)
        assert program == "maskloss"
        cli.main([path for word in arguments for path in (sorted(glob.glob(word)) or [word])])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with every file of the page, in which commands and imports work as for its reader."""
    folder = tmp_path_factory.mktemp("extending")
    modules, metrics, commands = set(sys.modules), dict(METRICS), dict(cli.COMMANDS)
    with pytest.MonkeyPatch.context() as patch, narrow_models():
        patch.chdir(folder)
        patch.syspath_prepend(folder)
        for section in SECTIONS.values():
            for name, content in section.files.items():
                (folder / name).write_text(content)
        run_commands(SECTIONS[INTRODUCTION].commands)
        yield folder
    for name in set(sys.modules) - modules:
        if "my_" in name:
            del sys.modules[name]
    for table, before in ((METRICS, metrics), (cli.COMMANDS, commands)):
        table.clear()
        table.update(before)


def test_the_page_has_an_extension_per_row_of_its_table() -> None:
    rows = re.findall(r"^\| \[(.+)\]\(#(.+)\) \|", PAGE.read_text("utf-8"), flags=re.MULTILINE)
    anchors = [name.lower().replace(" ", "-") for name in EXTENSIONS]
    assert [anchor for _, anchor in rows] == anchors
    assert len(anchors) == 9


@pytest.mark.parametrize("name", EXTENSIONS)
def test_an_extension_is_one_python_file_and_its_test(name: str) -> None:
    modules = sorted(file for file in SECTIONS[name].files if file.endswith(".py"))
    assert len(modules) == 2
    assert modules[1] == f"test_{modules[0]}"


@pytest.mark.parametrize("name", EXTENSIONS)
def test_an_extension_passes_its_test_and_runs(
    name: str, folder: Path, request: pytest.FixtureRequest
) -> None:
    section = SECTIONS[name]
    (test_file,) = (Path(file).stem for file in section.files if file.startswith("test_"))
    tests: dict[str, Callable[..., None]] = {
        key: value
        for key, value in vars(importlib.import_module(test_file)).items()
        if key.startswith("test_")
    }
    assert tests
    for test in tests.values():
        names = test.__code__.co_varnames[: test.__code__.co_argcount]
        test(*(request.getfixturevalue(argument) for argument in names))
    for script in section.scripts:
        exec(compile(script, str(PAGE), "exec"), {"__name__": "script"})
    run_commands(section.commands)
    for output in re.findall(r"--output (runs/\w+)", " ".join(section.commands)):
        assert list((folder / output).glob("*.json"))


def last_metrics(folder: Path) -> dict[str, Any]:
    metrics: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
    return metrics


def test_settings_from_yaml_reach_the_loss(folder: Path) -> None:
    for name, scale in (("half", 0.5), ("double", 2.0)):
        (folder / "scale.yaml").write_text(SECTIONS["A box loss with settings"].files["log_cosh.yaml"])
        text = (folder / "scale.yaml").read_text().replace("scale: 0.5", f"scale: {scale}")
        (folder / "scale.yaml").write_text(text)
        run_commands(
            [f"maskloss train --config run.yaml --config scale.yaml --max-steps 1 --output runs/{name}"]
        )
    half, double = (last_metrics(folder / f"runs/{name}")["loss"] for name in ("half", "double"))
    assert half["loss_box_reg"] > double["loss_box_reg"] > 0


def test_the_tracker_has_the_values_of_the_history(folder: Path) -> None:
    run_commands(["maskloss train --config run.yaml --trackers my_tracker.CsvTracker --output runs/csv"])
    with (folder / "runs/csv/values.csv").open(newline="") as file:
        losses = [float(value) for _, key, value in csv.reader(file) if key == "train/loss"]
    history = [json.loads(line) for line in (folder / "runs/csv/history.jsonl").read_text().splitlines()]
    assert losses == [line["loss"] for line in history]


def test_the_metric_is_wherever_the_others_are(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    importlib.import_module("my_metric")
    run_commands(["maskloss train --config run.yaml --output runs/metric"])
    assert set(last_metrics(folder / "runs/metric")["segm_any_class"]) >= {"AP", "AP50", "AR"}
    assert "mask of any class: AP" in capsys.readouterr().out
    (evaluation,) = (folder / "runs/metric/evaluations.jsonl").read_text().splitlines()
    assert "segm_any_class" in json.loads(evaluation)
    assert "mask of any class" in (folder / "runs/metric/report.html").read_text()
