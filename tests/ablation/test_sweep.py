"""Tests of whole sweeps with runs of one or two steps: results, failures and resuming."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from filelock import FileLock

from maskloss.ablation.plan import read_plan
from maskloss.ablation.running import outcome_of
from maskloss.ablation.sweep import ablate
from maskloss.cli import main
from maskloss.errors import InputError, RunError
from maskloss.training.loop import train
from tests.training.small_runs import interrupted_after, write_data

STEPS = 2


def sometimes_fails(mask_logits: torch.Tensor, mask_targets: torch.Tensor) -> torch.Tensor:
    """Raise in training, but not in the probe, whose grid is 7 x 7."""
    if mask_logits.shape[-1] > 7:
        raise KeyError("in training only")
    return (mask_logits.sigmoid() - mask_targets).abs()


def kills_its_process(mask_logits: torch.Tensor, mask_targets: torch.Tensor) -> torch.Tensor:
    if mask_logits.shape[-1] > 7:
        os._exit(7)
    return (mask_logits.sigmoid() - mask_targets).abs()


def sweep_file(folder: Path, data: Path, variants: dict[str, Any], seeds: list[int]) -> Path:
    content = {
        "base": {
            "train_images": str(data / "train/images"),
            "train_annotations": str(data / "train/annotations.json"),
            "val_images": str(data / "train/images"),
            "val_annotations": str(data / "train/annotations.json"),
            "model": "resnet18",
            "max_steps": STEPS,
            "batch_size": 1,
            "min_size": 64,
            "max_size": 64,
            "warmup_steps": 1,
            "log_every": 1,
            "checkpoint_every": 1,
            "workers": 0,
            "device": "cpu",
        },
        "variants": variants,
        "seeds": seeds,
    }
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


VARIANTS = {
    "bce": {},
    "dice": {"loss": {"mask": "maskloss.losses.MaskDiceLoss"}},
    "fails": {"loss": {"mask": f"{__name__}.sometimes_fails"}},
    "dies": {"loss": {"mask": f"{__name__}.kills_its_process"}},
}


@pytest.fixture(scope="module")
def swept(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """Run a sweep in which two runs fail; return its YAML file, its folder and its error."""
    folder = tmp_path_factory.mktemp("sweep")
    file = sweep_file(folder, data, VARIANTS, [0])
    with pytest.raises(RunError) as caught:
        ablate(file, folder / "out")
    return file, folder / "out", str(caught.value)


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


def test_run_that_fails_or_dies_is_reported_and_does_not_stop_the_others(swept):
    _, output, error = swept
    assert "2 of 4 runs failed; the first is fails with seed 0: KeyError: 'in training only'" in error
    results = json.loads((output / "results.json").read_text())["variants"]
    assert results["fails"]["runs"][0]["failure"] == "KeyError: 'in training only'"
    assert results["dies"]["runs"][0]["failure"] == "its process exited with code 7"
    assert results["dice"]["runs"][0]["failure"] is None
    page = (output / "report.html").read_text()
    assert "KeyError: &#39;in training only&#39;" in page
    assert "exited with code 7" in page


def test_results_contain_the_metrics_and_costs_of_the_runs(swept):
    _, output, _ = swept
    results = json.loads((output / "results.json").read_text())
    assert results["baseline"] == "bce"
    for variant in ("bce", "dice"):
        run = results["variants"][variant]["runs"][0]
        folder = output / "runs" / variant / "seed-0"
        assert run["metrics"] == json.loads((folder / "metrics.json").read_text())
        first, second = map(json.loads, (folder / "history.jsonl").read_text().splitlines())
        assert run["seconds_per_step"] == pytest.approx(second["seconds"] - first["seconds"])
        assert 2**28 < run["peak_bytes"] < 2**36
        assert second["seconds"] < run["seconds"] < 1000
        assert results["variants"][variant]["summary"]["mask AP"]["mean"] == run["metrics"]["segm"]["AP"]
    assert results["variants"]["dice"]["changes"] == VARIANTS["dice"]
    table = (output / "table.md").read_text().splitlines()
    assert table[0].startswith("| variant | runs | box AP | mask AP | boundary AP | mask AP75 |")
    assert [line.split(" | ")[:2] for line in table[2:6]] == [
        ["| bce", "1"],
        ["| dice", "1"],
        ["| fails", "0 of 1, 1 failed"],
        ["| dies", "0 of 1, 1 failed"],
    ]
    assert "cannot tell: fewer than two common seeds" in table[3]
    assert "nothing to compare" in table[4]
    assert table[-1] == "Failed: dies, seed 0: its process exited with code 7"


def test_the_page_loads_nothing_from_elsewhere(swept):
    page = (swept[1] / "report.html").read_text()
    assert "<svg" in page
    addresses = re.findall(r"(?:src|href|url\()=?[\"'(]?([^\"')>\s]+)", page)
    assert all(address.startswith(("data:", "#")) for address in addresses), addresses
    assert "<script" not in page
    assert "dice" in page


def test_sweep_resumes_with_the_outstanding_runs(swept, data, tmp_path, capsys):
    _, output, _ = swept
    done = output / "runs/bce/seed-0/model.safetensors"
    before = done.stat().st_mtime_ns
    file = sweep_file(tmp_path, data, {"bce": {}, "dice": VARIANTS["dice"]}, [0, 1])
    # Interrupt seed 1 of bce during its run.
    interrupted = next(run for run in read_plan(file, output).runs if (run.variant, run.seed) == ("bce", 1))
    with interrupted_after(1):
        train(interrupted.config)
    main(["ablate", "--config", str(file), "--output", str(output)])
    shown = capsys.readouterr().out
    assert "2 variants x 2 seeds: 4 runs, 2 of them already complete" in shown
    assert "[3/4] bce, seed 1: box AP" in shown
    assert "[4/4] dice, seed 1: " in shown
    assert "[1/4]" not in shown
    assert "left" in shown
    assert "| variant |" in shown
    assert done.stat().st_mtime_ns == before
    # The interrupted run has the same result as an uninterrupted one.
    uninterrupted = tmp_path / "alone"
    train(
        type(interrupted.config)(
            **{**vars(interrupted.config), "output": str(uninterrupted), "resume": False}
        )
    )
    assert (uninterrupted / "metrics.json").read_text() == (
        output / "runs/bce/seed-1/metrics.json"
    ).read_text()
    results = json.loads((output / "results.json").read_text())["variants"]
    assert [run["seed"] for run in results["dice"]["runs"]] == [0, 1]
    assert results["dice"]["summary"]["box AP"]["difference"]["verdict"] in ("cannot tell", "better", "worse")


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


def test_second_sweep_in_a_folder_is_refused(data, tmp_path):
    file = sweep_file(tmp_path, data, {"bce": {}}, [0])
    (tmp_path / "out").mkdir()
    with (
        FileLock(tmp_path / "out/.lock"),
        pytest.raises(InputError, match="out: another sweep is running in it"),
    ):
        ablate(file, tmp_path / "out")
    assert not (tmp_path / "out/runs").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": "cuda"}, "variant mine: --device cuda: torch finds no CUDA device"),
        ({"mixed_precision": "fp16"}, "variant mine: --mixed-precision fp16 needs a GPU"),
    ],
)
def test_variant_that_this_machine_cannot_train_is_refused_before_the_first_run(
    data, tmp_path, monkeypatch, changes, message
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    file = sweep_file(tmp_path, data, {"bce": {}, "mine": changes}, [0])
    with pytest.raises(InputError, match=message):
        ablate(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_folder_of_a_training_run_is_refused(data, tmp_path):
    (tmp_path / "config.yaml").write_text("max_steps: 3\n")
    with pytest.raises(InputError, match="contains a run of maskloss train"):
        ablate(sweep_file(tmp_path, data, {"bce": {}}, [0]), tmp_path)


def test_invalid_sweep_exits_with_one_line_and_code_2(data, tmp_path, capsys):
    file = sweep_file(tmp_path, data, {"bce": {"lerning_rate": 1}}, [0])
    with pytest.raises(SystemExit) as caught:
        main(["ablate", "--config", str(file), "--output", str(tmp_path / "out")])
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "variant bce: unknown option lerning_rate" in line
    assert not (tmp_path / "out").exists()


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


# Ray


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
