"""The command line where users run it: closed streams, full disks, missing packages, home folders, `python -OO`."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest


def in_a_shell(tmp_path: Path, command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command line in a shell, with M standing for maskloss."""
    maskloss_command = f"{shlex.quote(sys.executable)} -m maskloss"
    return subprocess.run(
        ["bash", "-c", re.sub(r"\bM\b", maskloss_command, command)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), **environment},
    )


@pytest.mark.slow
@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&-"])
def test_a_closed_stream_does_not_matter(tmp_path: Path, closed: str) -> None:
    done = in_a_shell(tmp_path, f"M shapes --output out --images 2 {closed}")
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "out/images").iterdir())) == 2
    done = in_a_shell(tmp_path, f"M shapes --output out --images 2 {closed}")
    assert done.returncode == 2
    # The error goes nowhere rather than to the other stream.
    assert done.stdout == ""
    assert ("not an empty folder" in done.stderr) is ("2>" not in closed)


@pytest.mark.slow
def test_an_output_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    done = in_a_shell(
        tmp_path,
        "M shapes --output out --images 2 && M check --images out/images "
        "--annotations out/annotations.json > /dev/full",
    )
    assert "internal error" not in done.stderr
    assert "No space left" in done.stderr or "the disk is full" in done.stderr
    assert done.returncode != 0


@pytest.mark.slow
def test_commands_run_without_docstrings_and_assertions(tmp_path: Path) -> None:
    done = in_a_shell(tmp_path, "M shapes --output out --images 2", PYTHONOPTIMIZE="2")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("package", ["jsonargparse", "yaml", "accelerate"])
def test_a_missing_package_is_named_with_the_command_that_installs_it(tmp_path: Path, package: str) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Blocker:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.partition('.')[0] == {package!r}:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Blocker())\n"
    )
    paths = f"{tmp_path}:{Path(__file__).parents[1]}"
    command = "M evaluate --checkpoint m --images . --annotations a.json --output out"
    done = in_a_shell(tmp_path, command, PYTHONPATH=paths)
    expected = f"maskloss: error: the command line needs {package}: pip install 'maskloss[train]'\n"
    assert (done.returncode, done.stderr) == (2, expected)


@pytest.mark.slow
def test_a_path_may_begin_with_the_home_folder(tmp_path: Path) -> None:
    # Shells do not replace it after "=", and nobody does in YAML files.
    home = tmp_path / "home"
    home.mkdir()
    done = in_a_shell(tmp_path, "M shapes --output=~/out --images=2", HOME=str(home))
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home"]
    assert (home / "out/annotations.json").exists()
    done = in_a_shell(
        tmp_path, "M check --images='~/out/images' --annotations='~/out/annotations.json'", HOME=str(home)
    )
    assert "0 errors" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("world_size", ["2", "abc"])
def test_incomplete_variables_of_torchrun_are_named(tmp_path: Path, world_size: str) -> None:
    data = "--train-images d/images --train-annotations d/annotations.json"
    train = f"M train {data} {data.replace('train', 'val')} --output run --model resnet18 --device cpu --min-size 64"
    done = in_a_shell(
        tmp_path, f"M shapes --output d --images 2 --size 64 && WORLD_SIZE={world_size} {train} --max-size 64"
    )
    assert done.returncode == 2
    assert "WORLD_SIZE is set, but the processes cannot be connected: " in done.stderr
    assert len(done.stderr.splitlines()) == 1
