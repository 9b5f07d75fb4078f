"""maskloss/report/errors.py: each kind of error, on objects and detections made for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from maskloss.data.coco import ImageRecord, read_coco
from maskloss.report.errors import KINDS, image_errors

SIDE = 100
Box = tuple[int, int, int, int]


def encoded(box: Box) -> dict[str, Any]:
    x, y, width, height = box
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[y : y + height, x : x + width] = 1
    rle = coco_mask.encode(np.asfortranarray(mask))
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def detection(category: int, box: Box, score: float = 0.9, *, masked: bool = True) -> dict[str, Any]:
    found = {"image_id": 1, "category_id": category, "bbox": list(box), "score": score}
    return {**found, "segmentation": encoded(box)} if masked else found


@pytest.fixture(params=[True, False], ids=["masks", "boxes"])
def record(request: pytest.FixtureRequest, tmp_path: Path) -> ImageRecord:
    """Return an image with objects of categories 1 and 2, and a crowd of category 1."""
    annotations = [
        {
            "id": number,
            "image_id": 1,
            "category_id": category,
            "bbox": list(box),
            "area": 400,
            "iscrowd": crowd,
        }
        for number, (category, box, crowd) in enumerate(
            [(1, (10, 10, 20, 20), 0), (2, (60, 10, 20, 20), 0), (1, (10, 60, 80, 30), 1)], start=1
        )
    ]
    for annotation in annotations:
        if request.param or annotation["iscrowd"]:
            annotation["segmentation"] = encoded(tuple(annotation["bbox"]))
    Image.new("RGB", (SIDE, SIDE)).save(tmp_path / "1.png")
    document = {
        "images": [{"id": 1, "file_name": "1.png", "width": SIDE, "height": SIDE}],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "one"}, {"id": 2, "name": "two"}],
    }
    (tmp_path / "annotations.json").write_text(json.dumps(document))
    return read_coco(tmp_path, tmp_path / "annotations.json").images[0]


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(
    ("detections", "expected"),
    [
        ([], {"missed": 2}),
        ([(1, (10, 10, 20, 20)), (2, (60, 10, 20, 20))], {"correct": 2}),
        # IoU 1/3 with an object of its class, which is not missed then.
        ([(1, (20, 10, 20, 20)), (2, (60, 10, 20, 20))], {"wrong place": 1, "correct": 1}),
        ([(2, (10, 10, 20, 20)), (2, (60, 10, 20, 20))], {"wrong class": 1, "correct": 1}),
        (
            [(2, (20, 10, 20, 20)), (2, (60, 10, 20, 20))],
            {"wrong class and place": 1, "correct": 1, "missed": 1},
        ),
        (
            [(1, (10, 10, 20, 20)), (1, (11, 10, 20, 20)), (2, (60, 10, 20, 20))],
            {"duplicate": 1, "correct": 2},
        ),
        ([(1, (10, 35, 10, 10))], {"background": 1, "missed": 2}),
        # In a crowd nothing is wrong.
        ([(1, (30, 65, 20, 20)), (2, (30, 65, 20, 20))], {"missed": 2}),
    ],
)
def test_each_kind(
    record: ImageRecord, detections: list[tuple[int, Box]], expected: dict[str, int], masked: bool
) -> None:
    found = image_errors(
        record, [detection(*one, score=0.9 - 0.1 * i, masked=masked) for i, one in enumerate(detections)]
    )
    assert {kind: count for kind, count in found.kinds.items() if count} == expected
    assert set(found.kinds) <= set(KINDS)
    assert found.count == sum(expected.values()) - expected.get("correct", 0)


def test_the_higher_score_finds_the_object(record: ImageRecord) -> None:
    # The better overlap has the lower score, and is the duplicate.
    found = image_errors(record, [detection(1, (10, 10, 20, 20), 0.5), detection(1, (12, 10, 20, 20), 0.6)])
    assert (found.kinds["correct"], found.kinds["duplicate"], found.kinds["missed"]) == (1, 1, 1)


def test_confusions_pair_categories(record: ImageRecord) -> None:
    found = image_errors(record, [detection(2, (10, 10, 20, 20)), detection(1, (10, 35, 10, 10), 0.8)])
    assert dict(found.confusions) == {(1, 2): 1, (None, 1): 1, (2, None): 1}


def test_masks_decide_where_both_have_them(record: ImageRecord) -> None:
    # The mask covers a quarter of the object; the box is the object's.
    found = {**detection(1, (10, 10, 20, 20)), "segmentation": encoded((10, 10, 10, 10))}
    kinds = image_errors(record, [found]).kinds
    has_masks = record.objects[0].has_mask
    assert kinds["wrong place" if has_masks else "correct"] == 1
