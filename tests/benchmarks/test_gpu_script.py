"""benchmarks/gpu.sh: a part that fails does not stop the others, and its test files are those with tests for a GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks/gpu.sh"
#: Stands for `python`: lists its arguments, and fails for one script.
PYTHON = """#!/usr/bin/env bash
echo "$@" >> "$CALLS"
case "$*" in *masks.py*) exit 3;; *roi_path*) sleep 60;; esac
"""


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin/python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls.txt"))
    monkeypatch.setenv("WHEELS", str(tmp_path / "wheels"))
    return tmp_path / "calls.txt"


def run(folder: Path, device: str) -> subprocess.CompletedProcess[str]:
    """Run a copy of the script, with limits of a second, in a folder with results."""
    (folder / "tree/benchmarks/results").mkdir(parents=True)
    (folder / "tree/benchmarks/results/mask_tail.json").write_text("{}")
    script = folder / "tree/benchmarks/gpu.sh"
    script.write_text(re.sub(r"part \d+", "part 1", SCRIPT.read_text()))
    return subprocess.run(["bash", str(script), device], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_every_part_runs_and_those_that_fail_are_listed(device: str, calls: Path, tmp_path: Path) -> None:
    done = run(tmp_path, device)
    assert done.returncode == 1
    failures = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
    assert [re.findall(r"(\w+)\.py.*exit code (\d+)", line)[0] for line in failures] == [
        ("masks", "3"), ("roi_path", "124"),
    ]  # fmt: skip
    scripts = re.findall(r"benchmarks/(\w+)\.py", calls.read_text())
    expected = ["mask_tail", "masks", "matching", "roi_path", "inference_tail", "profile_step", "table"]
    assert scripts == expected
    assert (tmp_path / "tree/benchmarks/results/mask_tail.json").exists()


def test_carried_wheels_are_installed_first(calls: Path, tmp_path: Path) -> None:
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels/a-1-py3-none-any.whl").touch()
    run(tmp_path, "cuda")
    assert calls.read_text().splitlines()[0].startswith("-m pip install --quiet --no-index --no-deps")


def test_the_test_files_are_those_with_tests_for_a_gpu() -> None:
    named = set(re.findall(r"tests/\S+\.py", SCRIPT.read_text()))
    marked = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "tests").rglob("test_*.py")
        if "pytest.mark.cuda" in path.read_text("utf-8") and path.name != "test_gpu_script.py"
    }
    assert named == marked


def test_every_script_takes_the_options_that_it_is_given() -> None:
    for name, options in re.findall(r"python benchmarks/(\w+)\.py([^\n]*)", SCRIPT.read_text()):
        source = (ROOT / f"benchmarks/{name}.py").read_text("utf-8")
        for option in re.findall(r"--([\w-]+)", options):
            assert f'"--{option}"' in source, (name, option)


#: Packages that a machine with torch, torchvision and the carried pycocotools and pytest may lack.
MISSING = (
    "accelerate", "faster_coco_eval", "filelock", "jinja2", "jsonargparse", "matplotlib", "psutil", "safetensors",
    "scipy", "tensorboard", "tqdm",
)  # fmt: skip
#: Hides them in every Python process that has this file on its path.
HIDING = """
from importlib.machinery import PathFinder

own = PathFinder.find_spec

def find_spec(finder, name, path=None, target=None):
    return None if name.partition(".")[0] in MISSING else own(name, path, target)

PathFinder.find_spec = classmethod(find_spec)
"""


@pytest.fixture
def without_packages(tmp_path: Path) -> dict[str, str]:
    """An environment in which the packages cannot be imported."""
    (tmp_path / "sitecustomize.py").write_text(f"MISSING = {MISSING!r}\n{HIDING}")
    return {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(re.findall(r"benchmarks/(\w+)\.py", SCRIPT.read_text()))))
def test_every_script_starts_without_the_packages_of_training(
    name: str, without_packages: dict[str, str]
) -> None:
    command = [sys.executable, f"benchmarks/{name}.py", "--help"]
    if name == "table":  # has no options
        command = command[:2]
    done = subprocess.run(command, cwd=ROOT, env=without_packages, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_the_tests_for_a_gpu_are_collected_without_the_packages_of_training(
    without_packages: dict[str, str],
) -> None:
    files = re.findall(r"tests/\S+\.py", SCRIPT.read_text())
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--collect-only",
        "-m",
        "cuda",
        "-p",
        "no:cacheprovider",
        *files,
    ]
    done = subprocess.run(command, cwd=ROOT, env=without_packages, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    for file in files:
        assert f"{file}::" in done.stdout
