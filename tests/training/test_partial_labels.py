"""Training from files whose objects have a box only, or are crowds, from the command line to evaluate."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from maskloss.cli import main
from maskloss.errors import InputError
from maskloss.training.checkpoints import checkpoint_files, load_checkpoint
from maskloss.training.loop import train

from .small_runs import TERMS, interrupted_after, narrow_models, small_config, write_data


@pytest.fixture(scope="module", autouse=True)
def narrow() -> Iterator[None]:
    with narrow_models():
        yield


def changed_data(folder: Path, change: Callable[[dict[str, Any], int], None]) -> Path:
    """Shapes whose annotations are changed, each by its place in the file."""
    write_data(folder)
    for part in ("train", "val"):
        path = folder / part / "annotations.json"
        document = json.loads(path.read_text())
        for place, annotation in enumerate(document["annotations"]):
            change(annotation, place)
        path.write_text(json.dumps(document))
    return folder


def without_mask(annotation: dict[str, Any], _: int = 0) -> None:
    del annotation["segmentation"]


def every_second_without_mask(annotation: dict[str, Any], place: int) -> None:
    if place % 2:
        del annotation["segmentation"]


def every_third_a_crowd(annotation: dict[str, Any], place: int) -> None:
    annotation["iscrowd"] = int(place % 3 == 0)


def history(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]


def mask_parameters(run: Path) -> dict[str, torch.Tensor]:
    state = load_checkpoint(checkpoint_files(run / "checkpoints")[-1])["model"]
    return {key: value for key, value in state.items() if "mask" in key}


def evaluated(data: Path, run: Path, output: Path) -> dict[str, Any]:
    main(
        ["evaluate", "--checkpoint", str(run), "--images", str(data / "val/images"), "--annotations",
         str(data / "val/annotations.json"), "--output", str(output), "--device", "cpu"]
    )  # fmt: skip
    metrics: dict[str, Any] = json.loads((output / "metrics.json").read_text())
    return metrics


@pytest.mark.parametrize("loss", ["torchvision", "detectron2", "matterport", "paper", "aligned"])
def test_half_of_the_objects_without_a_mask_train_every_term(loss: str, tmp_path: Path) -> None:
    data = changed_data(tmp_path / "data", every_second_without_mask)
    run = tmp_path / "run"
    train(small_config(data, run, loss=loss, horizontal_flip=1.0))
    for line in history(run):
        assert all(math.isfinite(line[key]) and line[key] > 0 for key in TERMS)
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["segm"]["AP"] is not None
    assert evaluated(data, run, tmp_path / "again") == metrics


def test_boxes_alone_train_no_mask(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = changed_data(tmp_path / "data", without_mask)
    runs = {}
    for steps in (1, 3):
        # Without decay, which would shrink the mask branch without any gradient.
        runs[steps] = tmp_path / f"run{steps}"
        train(small_config(data, runs[steps], max_steps=steps, schedule="constant", weight_decay=0.0))
    assert "none of the" in caplog.text
    for line in history(runs[3]):
        assert line["loss_mask"] == 0
        assert line["loss_box_reg"] > 0
    before, after = (mask_parameters(runs[steps]) for steps in (1, 3))
    assert all(torch.equal(before[key], after[key]) for key in before)
    metrics = json.loads((runs[3] / "metrics.json").read_text())
    assert metrics["segm"]["AP"] is None
    assert metrics["bbox"]["AP"] is not None
    assert metrics["loss"]["loss_mask"] == 0


def test_crowds_train_as_background_or_as_nothing(tmp_path: Path) -> None:
    data = changed_data(tmp_path / "data", every_third_a_crowd)
    metrics = {}
    for crowds in ("leave_out", "ignore"):
        run = tmp_path / crowds
        train(small_config(data, run, crowds=crowds, max_steps=1, horizontal_flip=0.0))
        metrics[crowds] = json.loads((run / "metrics.json").read_text())
        # `evaluate` computes the run's own losses, of the same objects.
        assert evaluated(data, run, tmp_path / f"{crowds} again") == metrics[crowds]
    first = {crowds: history(tmp_path / crowds)[0] for crowds in metrics}
    # The same weights, draws and images: what lies in a crowd is one anchor or RoI more or less.
    assert first["leave_out"]["loss_objectness"] != first["ignore"]["loss_objectness"]


def test_ignored_crowds_are_as_if_nothing_had_been_sampled_there(tmp_path: Path) -> None:
    """A crowd over the whole image leaves positives alone, so no anchor is background."""

    def over_the_image(annotation: dict[str, Any], place: int) -> None:
        if place == 0:
            annotation |= {
                "iscrowd": 1,
                "bbox": [0, 0, 64, 64],
                "segmentation": [[0, 0, 64, 0, 64, 64, 0, 64]],
            }

    data = changed_data(tmp_path / "data", over_the_image)
    document = json.loads((data / "train/annotations.json").read_text())
    first = document["annotations"][0]["image_id"]
    document["images"] = [image for image in document["images"] if image["id"] == first]
    document["annotations"] = [a for a in document["annotations"] if a["image_id"] == first]
    assert len(document["annotations"]) > 1
    (data / "train/annotations.json").write_text(json.dumps(document))
    values = {}
    for crowds in ("leave_out", "ignore"):
        config = small_config(data, tmp_path / crowds, crowds=crowds, max_steps=1, batch_size=1)
        train(config)
        values[crowds] = history(tmp_path / crowds)[0]
    # Fresh logits are near 0, so each anchor's objectness costs log 2, whichever are sampled. Classes: with background
    # left out, all RoIs are of objects.
    assert values["ignore"]["loss_objectness"] == pytest.approx(math.log(2), abs=0.05)
    assert values["ignore"]["loss_classifier"] != values["leave_out"]["loss_classifier"]


# More objects than COCO's 100.


def many_squares(folder: Path, count: int) -> Path:
    """Write two images with `count` squares of 4 px each, in a grid of 6 px."""
    for part in ("train", "val"):
        write_data(folder) if not folder.exists() else None
        path = folder / part / "annotations.json"
        document = json.loads(path.read_text())
        document["images"] = document["images"][:2]
        document["annotations"] = [
            {
                "id": 1000 * image["id"] + place,
                "image_id": image["id"],
                "category_id": document["categories"][0]["id"],
                "bbox": [6 * (place % 10), 6 * (place // 10), 4, 4],
                "area": 16,
                "iscrowd": 0,
            }
            for image in document["images"]
            for place in range(count)
        ]
        path.write_text(json.dumps(document))
    return folder


def test_max_detections_reaches_training_evaluation_and_prediction(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = many_squares(tmp_path / "data", 30)
    run = tmp_path / "run"
    train(small_config(data, run, max_detections=25, max_steps=1))
    assert "2 images of" in caplog.text
    assert "--max-detections 30 allows for all of them" in caplog.text
    metrics = json.loads((run / "metrics.json").read_text())
    # The file remembers.
    assert evaluated(data, run, tmp_path / "again") == metrics

    def counts(*options: str) -> list[int]:
        output = tmp_path / f"evaluated {options}"
        main(
            ["evaluate", "--checkpoint", str(run), "--images", str(data / "val/images"), "--annotations",
             str(data / "val/annotations.json"), "--output", str(output), "--device", "cpu", *options]
        )  # fmt: skip
        results = json.loads((output / "results.json").read_text())
        images = {result["image_id"] for result in results}
        return [sum(result["image_id"] == image for result in results) for image in sorted(images)]

    # An untrained network finds all kinds of things with a score above 0.05.
    assert counts() == [25, 25]
    assert counts("--max-detections", "7") == [7, 7]
    assert all(count > 25 for count in counts("--max-detections", "300"))
    images = [str(path) for path in sorted((data / "val/images").iterdir())]
    output = tmp_path / "predicted"
    main(
        ["predict", "--checkpoint", str(run), "--output", str(output), "--score-threshold", "0", "--max-detections",
         "12", *images]
    )  # fmt: skip
    assert len(json.loads((output / "results.json").read_text())) == 12 * len(images)


@pytest.mark.parametrize("value", ["0", "-3", "1000000"])
def test_an_invalid_limit_is_refused(value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_data(tmp_path / "data")
    train(small_config(data, tmp_path / "run", max_steps=1))
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        main(
            ["evaluate", "--checkpoint", str(tmp_path / "run"), "--images", str(data / "val/images"), "--annotations",
             str(data / "val/annotations.json"), "--output", str(tmp_path / "o"), "--max-detections", value]
        )  # fmt: skip
    assert exit_.value.code == 2
    assert "--max-detections must be" in capsys.readouterr().err


# Weak labels: masks, points, boxes and weights in one file.


def weak_labels(annotation: dict[str, Any], place: int) -> None:
    """Every third object keeps its mask, every third has points, and the others a box; every second counts half."""
    x, y, width, height = annotation["bbox"]
    if place % 3 == 1:
        annotation["point_coords"] = [[x + width / 2, y + height / 2], [x, y], [x + width, y + height]]
        annotation["point_labels"] = [1, 0, 0]
    if place % 3:
        del annotation["segmentation"]
    if place % 2:
        annotation["weight"] = 0.5


def test_weak_labels_train_from_file_to_evaluation_and_resume(tmp_path: Path) -> None:
    data = changed_data(tmp_path / "data", weak_labels)
    settings: dict[str, Any] = {"loss": "weak", "checkpoint_every": 1, "horizontal_flip": 0.5}
    train(small_config(data, tmp_path / "whole", max_steps=4, **settings))
    lines = history(tmp_path / "whole")
    assert all(math.isfinite(line[key]) and line[key] > 0 for line in lines for key in TERMS)
    metrics = json.loads((tmp_path / "whole/metrics.json").read_text())
    assert metrics["segm"]["AP"] is not None
    assert evaluated(data, tmp_path / "whole", tmp_path / "again") == metrics
    # The warm-up of the pairwise loss is part of a checkpoint.
    with interrupted_after(2):
        train(small_config(data, tmp_path / "run", max_steps=4, **settings))
    state = load_checkpoint(checkpoint_files(tmp_path / "run/checkpoints")[-1])["loss"]
    assert [int(value) for key, value in state.items() if key.endswith("steps")] == [2]
    train(small_config(data, tmp_path / "run", max_steps=4, resume=True, **settings))
    resumed = history(tmp_path / "run")
    for line in (*lines, *resumed):
        del line["seconds"]
    assert resumed == lines


def test_weights_reach_the_losses_of_training_and_evaluation(tmp_path: Path) -> None:
    values = {}
    for weight in (1.0, 3.0):

        def weighted(annotation: dict[str, Any], _: int, weight: float = weight) -> None:
            annotation["weight"] = weight

        data = changed_data(tmp_path / f"data {weight}", weighted)
        run = tmp_path / f"run {weight}"
        train(small_config(data, run, max_steps=1))
        values[weight] = history(run)[0]
    # The divisors stay, so the terms of positives alone are three times as large.
    for key in ("loss_rpn_box_reg", "loss_box_reg", "loss_mask"):
        assert values[3.0][key] == pytest.approx(3 * values[1.0][key], rel=1e-5)


MASK_LOSS = {"mask": "maskloss.losses.MaskDiceLoss"}
POINTS_ONLY = {"mask": "maskloss.losses.MaskBySupervision"}


@pytest.mark.parametrize("loss", [MASK_LOSS, POINTS_ONLY], ids=["masks", "points"])
def test_a_mask_loss_without_any_label_for_it_is_refused(loss: dict[str, Any], tmp_path: Path) -> None:
    data = changed_data(tmp_path / "data", without_mask)
    with pytest.raises(
        InputError, match="no object has labels for --loss mask; use MaskBySupervision with"
    ) as e:
        train(small_config(data, tmp_path / "run", loss=loss))
    for name in ("MaskPointLoss", "MaskProjectionLoss", "MaskBoxLoss", "annotations.json"):
        assert name in str(e.value)
    assert not (tmp_path / "run").exists()
    # With boxes for labels, or without the term, the same set trains.
    for number, other in enumerate(("weak", {**loss, "weights": {"mask": 0.0}})):
        train(small_config(data, tmp_path / f"run{number}", loss=other, max_steps=1))
    assert history(tmp_path / "run0")[0]["loss_mask"] > 0
    assert history(tmp_path / "run1")[0]["loss_mask"] == 0
