"""maskloss/ablation/tuning.py: options that are chosen for each variant on a held-out part of its training set."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from maskloss.ablation.plan import read_plan
from maskloss.ablation.running import Outcome
from maskloss.ablation.sweep import ablate
from maskloss.ablation.tuning import Trial, choose, with_chosen, write_parts
from maskloss.errors import InputError, RunError
from tests.ablation.small_sweeps import VARIANTS, sweep_file

#: Runs of whole models, some of them in processes of their own.
pytestmark = pytest.mark.slow

GRID = {"learning_rate": [1e-5, 1e-3], "weight_decay": [0.0]}


def tuned_file(folder: Path, data: Path, variants: dict[str, Any], **changes: Any) -> Path:
    path = sweep_file(folder, data, variants, [0, 1])
    content = {**yaml.safe_load(path.read_text()), "tune": GRID, "tune_fraction": 0.5, **changes}
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def tuned(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """Run a sweep in which one variant fails whatever is tried; return its YAML file, its folder and its error."""
    folder = tmp_path_factory.mktemp("tuned")
    file = tuned_file(folder, data, {name: VARIANTS[name] for name in ("bce", "fails")})
    with pytest.raises(RunError) as caught:
        ablate(file, folder / "out")
    return file, folder / "out", str(caught.value)


def test_the_parts_are_the_training_set_and_only_its_annotations(tuned, data):
    whole = json.loads((data / "train/annotations.json").read_text())
    parts = [
        json.loads((tuned[1] / f"tuning/bce/{name}.json").read_text()) for name in ("trained", "held_out")
    ]
    for key in ("images", "annotations"):
        ids = [{entry["id"] for entry in part[key]} for part in parts]
        assert ids[0] | ids[1] == {entry["id"] for entry in whole[key]}
        assert not ids[0] & ids[1]
    assert all(part["images"] and part["categories"] == whole["categories"] for part in parts)
    assert not list((tuned[1] / "tuning").rglob("*.png"))


def test_trials_are_trained_and_judged_on_the_parts(tuned, data):
    for number, rate in enumerate(GRID["learning_rate"]):
        folder = tuned[1] / f"runs/bce/tuning-{number}"
        config = yaml.safe_load((folder / "config.yaml").read_text())
        assert config["learning_rate"] == rate
        assert config["seed"] == 0
        assert config["train_annotations"].endswith("tuning/bce/trained.json")
        assert config["val_annotations"].endswith("tuning/bce/held_out.json")
        assert config["train_images"] == config["val_images"] == str(data / "train/images")


def test_results_and_table_say_what_was_tried_and_chosen(tuned):
    results = json.loads((tuned[1] / "results.json").read_text())
    tuning = results["variants"]["bce"]["tuning"]
    assert [trial["values"]["learning_rate"] for trial in tuning["trials"]] == GRID["learning_rate"]
    aps = [
        json.loads((tuned[1] / f"runs/bce/tuning-{n}/metrics.json").read_text())["segm"]["AP"] for n in (0, 1)
    ]
    assert [trial["AP"] for trial in tuning["trials"]] == aps
    chosen = GRID["learning_rate"][aps.index(max(aps))]
    assert tuning["chosen"] == {"learning_rate": chosen, "weight_decay": 0.0}
    for seed in (0, 1):
        config = yaml.safe_load((tuned[1] / f"runs/bce/seed-{seed}/config.yaml").read_text())
        assert (config["learning_rate"], config["weight_decay"]) == (chosen, 0.0)
        assert config["train_annotations"].endswith("train/annotations.json")
    table = (tuned[1] / "table.md").read_text()
    assert f"| learning_rate {chosen:g}, weight_decay 0.0 | 2 |" in table
    assert "tuned over learning_rate 1e-05, 0.001; weight_decay 0.0: one run for each combination" in table
    page = (tuned[1] / "report.html").read_text()
    assert page.count("<td>chosen</td>") == 1


def test_a_variant_whose_trials_all_fail_is_reported(tuned):
    _, folder, error = tuned
    assert "2 of 4 runs failed" in error
    assert "none of the 2 runs that tune it succeeded" in error
    results = json.loads((folder / "results.json").read_text())
    assert results["variants"]["fails"]["tuning"]["chosen"] is None
    assert "in training only" in results["variants"]["fails"]["runs"][0]["failure"]
    assert not (folder / "runs/fails/seed-0").exists()


def test_a_completed_sweep_runs_nothing_again(data, tmp_path, capsys):
    file = tuned_file(tmp_path, data, {"bce": {}}, seeds=[0], tune={"learning_rate": [1e-4]})
    page = ablate(file, tmp_path / "out")
    models = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("model.safetensors")}
    assert len(models) == 2
    capsys.readouterr()
    assert ablate(file, tmp_path / "out") == page
    said = capsys.readouterr().out
    assert "tuning: 1 variants x 1 combinations: 1 runs, 1 of them already complete" in said
    assert {path: path.stat().st_mtime_ns for path in models} == models


def trials(data: Path, folder: Path) -> tuple[Trial, ...]:
    plan = read_plan(tuned_file(folder, data, {"bce": {}}), folder / "out")
    assert plan.tuning is not None
    return plan.tuning.trials


def outcome(ap: float | None, *, box_ap: float = 0.5) -> Outcome:
    return Outcome(metrics={"segm": {"AP": ap}, "bbox": {"AP": box_ap}})


@pytest.mark.parametrize(
    ("outcomes", "best"),
    [
        ([outcome(0.1), outcome(0.2)], 1),
        ([outcome(0.2), outcome(0.2)], 0),
        ([Outcome(failure="diverged"), outcome(0.0)], 1),
        ([outcome(None, box_ap=0.1), outcome(None, box_ap=0.3)], 1),
    ],
)
def test_the_trial_with_the_best_ap_is_chosen(data, tmp_path, outcomes, best):
    both = trials(data, tmp_path)
    assert choose(list(zip(both, outcomes, strict=True))).chosen is both[best]


def test_chosen_values_are_set_and_nothing_else(data, tmp_path):
    plan = read_plan(tuned_file(tmp_path, data, {"bce": {}}), tmp_path / "out")
    assert plan.tuning is not None
    run = with_chosen(plan.runs[1], plan.tuning.trials[1])
    assert run == replace(
        plan.runs[1], config=replace(plan.runs[1].config, learning_rate=1e-3, weight_decay=0.0)
    )


@pytest.mark.parametrize(
    ("length", "tune", "epochs"),
    [({}, {"epochs": [1, 3]}, [1, 3]), ({"epochs": 2}, {"batch_size": [2, 3]}, [2, 2])],
)
def test_the_chosen_trial_gives_the_run_its_length(data, tmp_path, length, tune, epochs):
    path = tuned_file(tmp_path, data, {"bce": {}}, tune=tune)
    content = yaml.safe_load(path.read_text())
    del content["base"]["max_steps"]
    content["base"] |= length
    path.write_text(yaml.safe_dump(content))
    num_images = len(json.loads((data / "train/annotations.json").read_text())["images"])
    plan = read_plan(path, tmp_path / "out")
    assert plan.tuning is not None
    for trial, count in zip(plan.tuning.trials, epochs, strict=True):
        run = with_chosen(plan.runs[0], trial).config
        assert run.epochs is None
        assert run.max_steps == trial.config.max_steps == count * math.ceil(num_images / run.batch_size)


def test_a_loss_can_be_tuned_in_parts(data, tmp_path):
    weights = [{"weights": {"mask": value}} for value in (0.5, 2.0)]
    file = tuned_file(tmp_path, data, {"dice": VARIANTS["dice"]}, tune={"loss": weights})
    plan = read_plan(file, tmp_path / "out")
    assert plan.tuning is not None
    for trial, value in zip(plan.tuning.trials, (0.5, 2.0), strict=True):
        assert trial.config.loss["mask"] == "maskloss.losses.MaskDiceLoss"
        assert trial.config.loss["weights"] == {"mask": value}
        assert with_chosen(plan.runs[0], trial).config.loss == trial.config.loss


def test_the_parts_keep_every_categorys_share(data, tmp_path):
    trial = trials(data, tmp_path)[0]
    write_parts(trial, 0.5)
    parts = [
        json.loads(Path(path).read_text())
        for path in (trial.config.train_annotations, trial.config.val_annotations)
    ]
    counts = [len(part["images"]) for part in parts]
    assert abs(counts[0] - counts[1]) <= 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tune": [1, 2]}, "tune: expected a mapping from options to lists of values"),
        ({"tune": {"learning_rate": 0.1}}, "tune: expected a mapping"),
        ({"tune": {"learning_rate": []}}, "tune: expected a mapping"),
        ({"tune": {"learningrate": [0.1]}}, "tune: unknown option learningrate"),
        ({"tune": {"output": ["a"]}}, "tune: output is set by the sweep"),
        ({"tune": {"val_images": ["a"]}}, "tune: val_images cannot be tuned"),
        (
            {"tune": {"learning_rate": [0.1, -1.0]}},
            "variant bce, learning_rate -1.0: .*learning-rate must be",
        ),
        ({"tune": {"learning_rate": ["fast"]}}, "variant bce, learning_rate fast"),
        ({"tune": {"seed": [1]}}, "tune: seed is set by the sweep"),
        ({"tune": {"max_steps": list(range(1, 102))}}, "more than 100 combinations"),
        ({"tune_fraction": 0}, "tune_fraction must be above 0 and below 1, got 0"),
        ({"tune_fraction": 1.0}, "tune_fraction must be above 0 and below 1"),
        ({"tune_fraction": "half"}, "tune_fraction must be"),
        ({"tune_fraction": 0.01}, "tune_fraction 0.01 leaves no objects to choose by"),
        ({"tune": {}}, "tune_fraction has no effect without tune"),
        (
            {"variants": {"bce": {"learning_rate": 0.1}}},
            "variant bce: sets learning_rate, which tune chooses",
        ),
    ],
)
def test_invalid_tuning_is_refused_before_anything_runs(data, tmp_path, changes, message):
    file = tuned_file(tmp_path, data, **{"variants": {"bce": {}}, **changes})
    with pytest.raises(InputError, match=message):
        ablate(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()
