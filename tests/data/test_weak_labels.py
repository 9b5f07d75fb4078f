"""Weights and labeled points of annotations, from the file to the target."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.transforms import v2

from maskloss.cli import main
from maskloss.data.check import check_data
from maskloss.data.coco import read_coco
from maskloss.data.dataset import CocoDataset
from maskloss.data.repair import repair
from maskloss.errors import InputError
from tests.data.coco_files import write_coco

POINTS = [[2.5, 1.5], [7.0, 4.0], [3.0, 2.0]]


def write(folder: Path, *changes: dict[str, Any]) -> tuple[Path, Path]:
    """Write the small data set with some fields of its annotations changed, in their order."""

    def change(document: dict[str, Any]) -> None:
        for annotation, fields in zip(document["annotations"], changes, strict=False):
            annotation.update(fields)

    return write_coco(folder, change)


class LeftPart(v2.Transform):
    """Crop the left columns of an image."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def transform(self, part: Any, params: dict[str, Any]) -> Any:
        return v2.functional.crop(part, 0, 0, 5, self.width)


def points_only(**fields: Any) -> dict[str, Any]:
    return {"segmentation": [], "point_coords": POINTS, "point_labels": [1, 0, 1], **fields}


def test_weights_and_points_reach_the_target(tmp_path: Path) -> None:
    images, annotations = write(
        tmp_path,
        {"weight": 0.25, "point_coords": POINTS, "point_labels": [1, 0, -1]},
        {"point_coords": POINTS[:1], "point_labels": [1.0]},
        {"weight": 7},
    )
    data = read_coco(images, annotations)
    assert (data.num_objects, data.num_masks, data.num_points, data.num_weights) == (2, 2, 2, 1)
    dataset = CocoDataset(data)
    _, target = dataset[0]
    assert torch.equal(target["weights"], torch.tensor([0.25, 1.0]))
    expected = torch.tensor([[[2.5, 1.5, 1], [7, 4, 0], [3, 2, -1]], [[2.5, 1.5, 1], [0, 0, -1], [0, 0, -1]]])
    assert torch.equal(target["points"], expected)
    # Every image has them, with the same number of points.
    _, empty = dataset[1]
    assert empty["weights"].shape == (0,)
    assert empty["points"].shape == (0, 3, 3)


def test_weights_are_said_because_they_may_be_kilograms(tmp_path: Path) -> None:
    data = read_coco(*write(tmp_path, {"weight": 0.25}, {"weight": 5.5}, {"weight": 7}))
    # The third annotation is a crowd.
    assert [line.partition(": ")[2] for line in data.warnings if "crowd" not in line] == [
        "2 of 2 objects have weights other than 1, from 0.25 to 5.5: the field `weight` multiplies an object's losses; "
        "rename it if it means something else"
    ]
    data = read_coco(*write(tmp_path, {"weight": 1}, {"weight": 2}))
    assert any("1 of 2 objects has a weight other than 1, from 2 to 2" in line for line in data.warnings)
    data = read_coco(*write(tmp_path, {"weight": 1}))
    assert not any("`weight`" in line for line in data.warnings)


@pytest.mark.parametrize("missing", [None, float("nan")])
def test_a_weight_that_is_missing_is_1(tmp_path: Path, missing: float | None) -> None:
    images, annotations = write(tmp_path, {"weight": 0.5}, {"weight": missing})
    _, target = CocoDataset(read_coco(images, annotations))[0]
    assert torch.equal(target["weights"], torch.tensor([0.5, 1.0]))


def test_files_without_them_have_no_such_keys(tmp_path: Path) -> None:
    images, annotations = write(tmp_path)
    _, target = CocoDataset(read_coco(images, annotations))[0]
    assert not {"weights", "points"} & set(target)


def test_an_object_with_points_and_no_mask_is_no_object_with_a_box_alone(tmp_path: Path) -> None:
    images, annotations = write(tmp_path, points_only())
    data = read_coco(images, annotations)
    assert not [line for line in data.warnings if "no mask" in line]
    _, target = CocoDataset(data)[0]
    assert torch.equal(target["has_mask"], torch.tensor([False, True]))
    assert (target["points"][0, :, 2] == torch.tensor([1, 0, 1])).all()


def test_weights_and_points_move_with_their_objects(tmp_path: Path) -> None:
    images, annotations = write(tmp_path, points_only(weight=0.5, bbox=[5, 1, 2, 2]), {"weight": 2.0})
    data = read_coco(images, annotations)
    _, flipped = CocoDataset(data, v2.RandomHorizontalFlip(1.0))[0]
    assert torch.equal(flipped["points"][0], torch.tensor([[5.5, 1.5, 1], [1, 4, 0], [5, 2, 1]]))
    assert torch.equal(flipped["weights"], torch.tensor([0.5, 2.0]))
    # The left half has the second object only.
    _, cropped = CocoDataset(data, LeftPart(4))[0]
    assert torch.equal(cropped["weights"], torch.tensor([2.0]))
    assert cropped["points"].shape == (1, 3, 3)


def test_points_outside_of_a_crop_lose_their_label(tmp_path: Path) -> None:
    images, annotations = write(tmp_path, points_only())
    _, target = CocoDataset(read_coco(images, annotations), LeftPart(6))[0]
    assert torch.equal(target["points"][0, :, 2], torch.tensor([1.0, -1, 1]))


BAD = {
    "negative weight": ({"weight": -0.5}, "annotation 101: weight must be a finite number >= 0, not -0.5"),
    "infinite weight": ({"weight": float("inf")}, "weight must be a finite number >= 0, not inf"),
    "text weight": ({"weight": "1"}, "weight must be a finite number >= 0, not '1'"),
    "no labels": ({"point_coords": POINTS}, "point_coords and point_labels must both be lists"),
    "no points": ({"point_labels": [1]}, "point_coords and point_labels must both be lists"),
    "lengths": (
        {"point_coords": POINTS, "point_labels": [1]},
        "there are 3 point_coords, but 1 point_labels",
    ),
    "label": (
        {"point_coords": POINTS, "point_labels": [1, 2, 0]},
        "point_labels: a label is 1 inside the object, 0 outside or -1 for none, not 2",
    ),
    "true": ({"point_coords": POINTS, "point_labels": [1, True, 0]}, "a label is 1 inside .*, not True"),
    "three numbers": (
        {"point_coords": [[1, 2, 3]], "point_labels": [1]},
        r"point_coords: a point is \[x, y\] in px, not \[1, 2, 3\]",
    ),
    "nan": ({"point_coords": [[1, float("nan")]], "point_labels": [1]}, r"not \[1, nan\]"),
    "outside": (
        {"point_coords": [[2, 2], [8.5, 2]], "point_labels": [1, 0]},
        r"point_coords: \[8.5, 2\] is outside the image of 8 x 5 \(width x height\) \(image 10, a.png\)",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_values_are_refused_and_repaired(name: str, tmp_path: Path) -> None:
    change, message = BAD[name]
    images, annotations = write(tmp_path, change)
    with pytest.raises(InputError, match=message):
        read_coco(images, annotations)
    repair(images, annotations, tmp_path / "repaired.json")
    assert not [problem for problem in check_data(images, tmp_path / "repaired.json")[1] if problem.error]
    data = read_coco(images, tmp_path / "repaired.json")
    points = data.records.points_of(0).tolist()
    expected = {
        "label": [[2.5, 1.5, 1], [3, 2, 0]],
        "true": [[2.5, 1.5, 1], [3, 2, 0]],
        "outside": [[2, 2, 1]],
    }
    assert points == expected.get(name, [])
    assert data.num_weights == 0


@pytest.mark.parametrize("estimate", ["predicted_iou", "stability_score"])
def test_the_prompts_of_segment_anything_are_no_points(tmp_path: Path, estimate: str) -> None:
    data = read_coco(
        *write(tmp_path, {"point_coords": [[2.5, 1.5]], estimate: 0.98, "crop_box": [0, 0, 8, 5]})
    )
    assert data.num_points == 0
    assert not any("point" in warning for warning in data.warnings)


def test_a_point_on_the_border_or_without_a_label_is_fine(tmp_path: Path) -> None:
    points = {"point_coords": [[0, 0], [8, 5], [-3, 99]], "point_labels": [0, 0, -1]}
    data = read_coco(*write(tmp_path, points))
    assert len(data.records.points_of(0)) == 3


def test_check_counts_each_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images, annotations = write(tmp_path, points_only(weight=0.5))
    main(["check", "--images", str(images), "--annotations", str(annotations)])
    text = "2 objects (1 with a mask, 1 with labeled points, 1 with a weight other than 1)"
    assert text in capsys.readouterr().out
