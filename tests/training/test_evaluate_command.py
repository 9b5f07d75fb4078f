"""`maskloss evaluate`: a run's folder, its results, and losses named again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from maskloss.cli import main
from maskloss.training.loop import train
from tests.training.small_runs import small_config


def evaluated(shapes: Path, checkpoint: Path, output: Path, *options: Any) -> dict[str, Any]:
    arguments = ["evaluate", "--checkpoint", checkpoint, "--images", shapes / "val/images", "--device", "cpu",
                 "--annotations", shapes / "val/annotations.json", "--output", output, *options]  # fmt: skip
    main([str(argument) for argument in arguments])
    metrics: dict[str, Any] = json.loads((output / "metrics.json").read_text())
    return metrics


def metrics_of(run: Path) -> dict[str, Any]:
    metrics: dict[str, Any] = json.loads((run / "metrics.json").read_text())
    return metrics


def test_a_runs_folder_stands_for_its_model_and_the_results_are_written(
    finished: Path, shapes: Path, tmp_path: Path
) -> None:
    assert evaluated(shapes, finished, tmp_path / "out") == metrics_of(finished)
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert {result["image_id"] for result in results} == {1, 2}
    assert all(result["segmentation"]["size"] == [64, 64] for result in results)


def test_another_loss_changes_the_losses_and_no_detection(
    finished: Path, shapes: Path, tmp_path: Path
) -> None:
    # With aligned targets masks would be pasted elsewhere.
    evaluated(shapes, finished, tmp_path / "own")
    found = evaluated(shapes, finished, tmp_path / "other", "--loss", "aligned")
    assert found["loss"]["loss_mask"] != metrics_of(finished)["loss"]["loss_mask"]
    own, other = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("own", "other"))
    assert own == other


def test_a_mapping_is_named_on_the_command_line_as_json(shapes: Path, tmp_path: Path) -> None:
    loss = {"mask": {"class_path": "tests.training.small_runs.LearnedScale"}, "weights": {"box": 2.0}}
    train(small_config(shapes, tmp_path / "run", loss=loss))
    assert evaluated(shapes, tmp_path / "run", tmp_path / "without")["loss"] is None
    named = evaluated(shapes, tmp_path / "run", tmp_path / "with", "--loss", json.dumps(loss))
    assert named == metrics_of(tmp_path / "run")
