"""Tests of whole sweeps with runs of one or two steps: results, failures and resuming."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from filelock import FileLock

from maskloss.ablation.plan import read_plan
from maskloss.ablation.sweep import ablate
from maskloss.cli import main
from maskloss.errors import InputError
from maskloss.training.loop import train
from tests.ablation.small_sweeps import VARIANTS, sweep_file
from tests.training.small_runs import interrupted_after

#: Runs of whole models, some of them in processes of their own.
pytestmark = pytest.mark.slow


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


def test_sweep_resumes_with_the_outstanding_runs(swept, data, tmp_path, capsys):
    # Other tests read the sweep, and this one adds to it.
    output = tmp_path / "out"
    shutil.copytree(swept[1], output)
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


def test_variants_may_differ_in_their_mask_layers(data, tmp_path):
    variants = {"stock": {}, "fine": {"mask_size": 56}, "scored": {"mask_branch": "mask_iou"}}
    variants["points"] = {"mask_branch": "point_rend"}
    ablate(sweep_file(tmp_path, data, variants, [0]), tmp_path / "out")
    results = json.loads((tmp_path / "out/results.json").read_text())
    keys = {name: set(variant["runs"][0]["metrics"]["loss"]) for name, variant in results["variants"].items()}
    assert keys["stock"] == keys["fine"]
    assert keys["scored"] - keys["stock"] == {"loss_mask_iou"}
    assert keys["points"] - keys["stock"] == {"loss_mask_point"}
