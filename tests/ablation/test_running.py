"""Tests of `maskloss.ablation.running`: runs in processes of their own or on Ray, and the outcomes that they write."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from maskloss.ablation import running
from maskloss.ablation.plan import Run, read_plan
from maskloss.ablation.running import Outcome, execute, outcome_of
from maskloss.ablation.sweep import ablate
from maskloss.errors import InputError, RunError
from maskloss.training.config import TrainConfig
from maskloss.training.loop import train
from tests.ablation.small_sweeps import VARIANTS, sweep_file
from tests.training.small_runs import interrupted_after, small_config

#: Runs of whole models, some of them in processes of their own.
pytestmark = pytest.mark.slow


def test_every_run_writes_its_own_folder(swept):
    _, output, _ = swept
    for variant in ("bce", "dice"):
        run = output / "runs" / variant / "seed-0"
        for name in (
            "model.safetensors",
            "metrics.json",
            "history.jsonl",
            "report.html",
            "config.yaml",
            "results.json",
        ):
            assert (run / name).is_file(), name
        assert yaml.safe_load((run / "config.yaml").read_text())["seed"] == 0
        assert not (run / "checkpoints").exists()
    assert "sometimes_fails" in (output / "runs/fails/seed-0/log.txt").read_text()


@pytest.mark.parametrize("change", [{"batch_size": 2}, {"max_steps": 3}])
def test_run_of_another_config_is_neither_reused_nor_overwritten(swept, data, tmp_path, change):
    _, output, _ = swept
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    file = sweep_file(tmp_path, data, {"dice": VARIANTS["dice"], "bce": change}, [1, 0])
    (field,) = change
    with pytest.raises(
        InputError, match=rf"bce/seed-\d: contains a run with another {field}; give another --output"
    ):
        ablate(file, output)
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before


def test_interrupted_run_of_another_config_is_refused(data, tmp_path):
    file = sweep_file(tmp_path, data, {"bce": {}}, [0])
    (run,) = read_plan(file, tmp_path / "out").runs
    with interrupted_after(1):
        train(run.config)
    file = sweep_file(tmp_path, data, {"bce": {"learning_rate": 0.5}}, [0])
    with pytest.raises(InputError, match="bce/seed-0: contains a run with another learning_rate"):
        ablate(file, tmp_path / "out")
    assert (tmp_path / "out/runs/bce/seed-0/checkpoints").exists()


def test_failed_run_may_be_repeated_with_another_loss(data, tmp_path):
    steps = {"max_steps": 1}
    file = sweep_file(tmp_path, data, {"mine": {**VARIANTS["fails"], **steps}}, [0])
    with pytest.raises(RunError, match="in training only"):
        ablate(file, tmp_path / "out")
    # Pretend that it failed after a checkpoint.
    stale = tmp_path / "out/runs/mine/seed-0/checkpoints"
    stale.mkdir(exist_ok=True)
    (stale / "step-00000001.pt").write_bytes(b"of another loss")
    ablate(sweep_file(tmp_path, data, {"mine": {**VARIANTS["dice"], **steps}}, [0]), tmp_path / "out")
    results = json.loads((tmp_path / "out/results.json").read_text())["variants"]
    assert results["mine"]["runs"][0]["failure"] is None


def test_run_with_a_missing_result_file_has_no_outcome(swept, data, tmp_path):
    _, output, _ = swept
    file = sweep_file(tmp_path, data, {"bce": {}}, [0])
    (run,) = read_plan(file, output).runs
    assert outcome_of(run) is not None
    for name, content in (("history.jsonl", ""), ("metrics.json", "{}"), ("outcome.json", "[]")):
        path = output / "runs/bce/seed-0" / name
        kept = path.read_text()
        path.write_text(content)
        assert outcome_of(run) is None
        path.write_text(kept)


LOSS_THAT_TELLS_ITS_PROCESS = """
import os
from pathlib import Path

def told(mask_logits, mask_targets):
    if mask_logits.shape[-1] > 7:  # in training, not when it is probed
        Path(__file__).with_name("process").write_text(str(os.getpid()))
    return (mask_logits.sigmoid() - mask_targets).abs()
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="asks /proc which processes there are")
def test_run_stops_when_its_sweep_is_killed(data, tmp_path):
    (tmp_path / "telling.py").write_text(LOSS_THAT_TELLS_ITS_PROCESS)
    file = sweep_file(tmp_path, data, {"bce": {"max_steps": 10_000, "loss": {"mask": "telling.told"}}}, [0])
    sweep = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "maskloss",
            "ablate",
            "--config",
            str(file),
            "--output",
            str(tmp_path / "out"),
        ],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert eventually((tmp_path / "process").exists)
        run = int((tmp_path / "process").read_text())
        assert run != sweep.pid
        assert is_running(run)
    finally:
        sweep.kill()
        sweep.wait()
    ended = eventually(lambda: not is_running(run))
    if not ended:
        os.kill(run, signal.SIGKILL)
    assert ended


def eventually(holds: Callable[[], bool], seconds: float = 120) -> bool:
    until = time.monotonic() + seconds
    while not holds() and time.monotonic() < until:
        time.sleep(0.1)
    return holds()


def is_running(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_sweep_on_a_local_ray_cluster(data, tmp_path, monkeypatch):
    pytest.importorskip("ray", reason="ray is not installed")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    file = sweep_file(tmp_path, data, {"bce": {}, "fails": VARIANTS["fails"]}, [0])
    with pytest.raises(RunError, match="1 of 2 runs failed; the first is fails with seed 0: KeyError"):
        ablate(file, tmp_path / "out", engine="ray")
    results = json.loads((tmp_path / "out/results.json").read_text())["variants"]
    assert results["bce"]["runs"][0]["failure"] is None
    assert (tmp_path / "out/runs/bce/seed-0/report.html").is_file()


def test_more_resources_than_ray_has_are_refused(data, tmp_path, monkeypatch):
    pytest.importorskip("ray", reason="ray is not installed")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    file = sweep_file(tmp_path, data, {"bce": {}}, [0])
    file.write_text(file.read_text() + "gpus: 9\n")
    with pytest.raises(InputError, match="a run requests 9 GPUs, but Ray has 0"):
        ablate(file, tmp_path / "out", engine="ray")


# Outcomes of runs that were made up.


HISTORY = [{"step": 1, "seconds": 10.0}, {"step": 3, "seconds": 14.0}, {"step": 4, "seconds": 15.0}]


def made_up_run(folder: Path, **fields: Any) -> Run:
    """Write the files of a complete run, whose outcome.json has other fields; give None to omit a file."""
    run = Run("a", 0, small_config(folder, folder / "run", seed=0))
    run.config.output_folder.mkdir()
    outcome = {"failure": None, "peak_bytes": 7, "seconds": 20.0, "config": asdict(run.config), **fields}
    files = {
        "history.jsonl": "".join(json.dumps(line) + "\n" for line in HISTORY),
        "metrics.json": json.dumps({"bbox": {"AP": 0.5}}),
        "outcome.json": json.dumps(outcome),
    }
    for name, content in files.items():
        (run.config.output_folder / name).write_text(content)
    return run


def test_the_outcome_has_the_median_time_per_step(tmp_path):
    # Two steps in 4 s and one step in 1 s: 2 s and 1 s per step.
    assert outcome_of(made_up_run(tmp_path)) == Outcome(
        failure=None,
        metrics={"bbox": {"AP": 0.5}},
        history=HISTORY,
        seconds_per_step=1.5,
        peak_bytes=7,
        seconds=20.0,
    )


def test_failed_run_has_no_outcome_even_if_its_config_differs(tmp_path):
    assert outcome_of(made_up_run(tmp_path, failure="of me", config={"learning_rate": 7})) is None


def test_run_that_has_not_started_has_no_outcome(tmp_path):
    assert outcome_of(Run("a", 0, small_config(tmp_path, tmp_path / "nowhere"))) is None


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("outcome.json", "{"),
        ("outcome.json", "[" * 100_000),
        ("outcome.json", "{}"),
        ("history.jsonl", "{"),
        ("metrics.json", '{"bbox": {}}'),
        ("metrics.json", "[]"),
    ],
)
def test_run_with_a_damaged_file_has_no_outcome(tmp_path, name, content):
    run = made_up_run(tmp_path)
    (run.config.output_folder / name).write_text(content)
    assert outcome_of(run) is None


def test_run_with_another_number_of_steps_is_another_run(tmp_path):
    # `maskloss train --resume` may go on to more steps.
    config = asdict(small_config(tmp_path, tmp_path / "run", seed=0))
    run = made_up_run(tmp_path, config={**config, "max_steps": 1 + config["max_steps"]})
    with pytest.raises(
        InputError, match=r"run: contains a run with another max_steps; give another --output, or delete it"
    ):
        outcome_of(run)


# Execution, without training.


def configured(folder: Path, **changes: Any) -> TrainConfig:
    return small_config(folder, folder / "run", **changes)


@pytest.fixture
def raising(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """Replace training by raising an error."""

    def replace(error: BaseException) -> None:
        def fail(config: TrainConfig) -> None:
            raise error

        monkeypatch.setattr(running, "_train", fail)

    return replace


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "failure"),
    [
        (InputError("a.json: is odd"), "a.json: is odd"),
        (RunError("disk full"), "disk full"),
        (caused(RunError("the mask term failed"), KeyError("k")), "KeyError: 'k'"),
        (caused(RunError("cannot be written"), OSError("no space")), "cannot be written"),
        (caused(InputError("bad weights"), ValueError("v")), "bad weights"),
        (ZeroDivisionError("by zero"), "ZeroDivisionError: by zero"),
        (SystemExit(3), "SystemExit: 3"),
    ],
)
def test_failure_of_a_run_is_its_outcome_and_in_its_log(tmp_path, raising, capsys, error, failure):
    raising(error)
    execute(asdict(configured(tmp_path)))
    folder = tmp_path / "run"
    outcome = json.loads((folder / "outcome.json").read_text())
    assert outcome["failure"] == failure
    assert outcome["config"] == asdict(configured(tmp_path))
    assert outcome["peak_bytes"] > 2**20
    assert 0 <= outcome["seconds"] < 100
    log = (folder / "log.txt").read_text()
    assert log.endswith(f"failed: {failure}\n")
    assert ("Traceback" in log) == (
        error.__cause__ is not None or not isinstance(error, InputError | RunError)
    )
    assert capsys.readouterr() == ("", "")


def test_ctrl_c_is_no_outcome(tmp_path, raising):
    raising(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        execute(asdict(configured(tmp_path)))
    assert not (tmp_path / "run/outcome.json").exists()


@pytest.mark.parametrize("other", [{}, {"learning_rate": 0.5}])
def test_only_a_failed_run_of_other_options_is_deleted_before_the_next(tmp_path, raising, other):
    raising(RunError("first"))
    execute(asdict(configured(tmp_path)))
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump(asdict(configured(tmp_path))))
    (tmp_path / "run/checkpoints").mkdir()
    raising(RunError("second"))
    execute(asdict(configured(tmp_path, **other)))
    assert (tmp_path / "run/checkpoints").exists() == (not other)
    assert json.loads((tmp_path / "run/outcome.json").read_text())["failure"] == "second"


def test_additional_folders_are_searched_for_modules_once(tmp_path, raising, monkeypatch):
    raising(RunError(""))
    monkeypatch.setattr(sys, "path", list(sys.path))
    execute(asdict(configured(tmp_path)), [str(tmp_path), sys.path[0]])
    execute(asdict(configured(tmp_path)), [str(tmp_path)])
    assert sys.path.count(str(tmp_path)) == 1
    assert sys.path[-1] == str(tmp_path)


def test_several_jobs_run_at_the_same_time_with_the_same_results(data, tmp_path):
    file = sweep_file(tmp_path, data, {"bce": {}, "dice": VARIANTS["dice"]}, [0, 1])
    ablate(file, tmp_path / "one")
    ablate(file, tmp_path / "two", jobs=2)
    found = {}
    for name in ("one", "two"):
        runs = sorted((tmp_path / name / "runs").glob("*/*"))
        assert len(runs) == 4
        found[name] = [json.loads((run / "metrics.json").read_text())["segm"] for run in runs]
        spans = sorted(
            ((run / "config.yaml").stat().st_mtime_ns, (run / "outcome.json").stat().st_mtime_ns)
            for run in runs
        )
        overlap = any(after[0] < before[1] for before, after in itertools.pairwise(spans))
        assert overlap == (name == "two")
    assert found["one"] == found["two"]


@pytest.mark.parametrize(("jobs", "engine"), [(0, "local"), (2, "ray")])
def test_a_wrong_number_of_jobs_is_refused(jobs, engine, data, tmp_path):
    with pytest.raises(InputError, match="--jobs must be at least 1, and 1 with --engine ray"):
        ablate(sweep_file(tmp_path, data, {"bce": {}}, [0]), tmp_path / "out", jobs=jobs, engine=engine)
    assert not (tmp_path / "out").exists()
