"""maskloss/training/metrics.py: AP of boxes, masks and boundaries, as pycocotools computes it."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from maskloss.data.coco import CocoData, read_coco
from maskloss.errors import RunError
from maskloss.training.metrics import (
    METRICS,
    average_precision,
    precision_recall_curves,
    score_thresholds,
    write_metrics,
)
from tests.training.rectangles import SIZE, rectangle, write_rectangles
from tests.training.small_runs import STATISTICS, largest_file


def random_results(path: Path, seed: int = 0) -> list[dict[str, Any]]:
    """Every annotation found once or twice, more or less moved, some as another category; and false alarms."""
    rng = np.random.default_rng(seed)
    document = json.loads(path.read_text())
    images = {image["id"]: image for image in document["images"]}
    categories = [category["id"] for category in document["categories"]]
    results = []
    for annotation in document["annotations"]:
        image = images[annotation["image_id"]]
        for _ in range(int(rng.integers(1, 3))):
            x, y, width, height = (
                np.asarray(annotation["bbox"]) + rng.normal(0, 0.08, 4) * annotation["bbox"][2]
            )
            category = annotation["category_id"] if rng.random() < 0.85 else int(rng.choice(categories))
            results.append(result(image, category, (x, y, width, height), float(rng.random())))
    for image in document["images"]:
        box = (*rng.uniform(0, 60, 2), *rng.uniform(3, 60, 2))
        results.append(result(image, int(rng.choice(categories)), box, float(rng.random())))
    return results


def result(image: dict[str, Any], category: int, box: Any, score: float) -> dict[str, Any]:
    """A detection whose box and mask differ a little, as a network's do."""
    size = (image["height"], image["width"])
    x, y, width, height = (float(value) for value in box)
    x, y = min(max(x, 0.0), size[1] - 2.0), min(max(y, 0.0), size[0] - 2.0)
    width, height = min(max(width, 1.5), size[1] - x), min(max(height, 1.5), size[0] - y)
    return {
        "image_id": image["id"],
        "category_id": category,
        "bbox": [x, y, width, height],
        "score": score,
        "segmentation": rectangle(int(x), int(y), int(np.ceil(width)), int(np.ceil(height)), size),
    }


def pycocotools_metrics(path: Path, results: list[dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """COCO's own numbers, from the annotation file itself."""
    metrics = {}
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(path))
        for kind, left_out in (("bbox", "segmentation"), ("segm", "bbox")):
            found = [{k: v for k, v in one.items() if k != left_out} for one in copy.deepcopy(results)]
            coco_eval = COCOeval(truth, truth.loadRes(found), kind)
            coco_eval.evaluate()
            coco_eval.accumulate()
            coco_eval.summarize()
            metrics[kind] = {
                name: None if value == -1 else float(value)
                # pycocotools' AR is, at 8, that of 100 detections.
                for name, value in zip(STATISTICS, [*coco_eval.stats[:6], coco_eval.stats[8]], strict=True)
            }
    return metrics


def assert_same_metrics(actual: Any, expected: Any) -> None:
    for kind in ("bbox", "segm"):
        assert set(actual[kind]) == set(STATISTICS)
        for name in STATISTICS:
            assert actual[kind][name] == pytest.approx(expected[kind][name], abs=1e-9), (kind, name)


@pytest.mark.parametrize("crowds", [False, True])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ap_equals_that_of_pycocotools(tmp_path: Path, seed: int, crowds: bool) -> None:
    data = write_rectangles(tmp_path / "data", crowds=crowds)
    results = random_results(data.annotation_file, seed)
    expected = pycocotools_metrics(data.annotation_file, results)
    # Not a comparison of zeros.
    assert 0.05 < expected["bbox"]["AP"] < 0.95
    assert 0.05 < expected["segm"]["AP"] < 0.95
    assert_same_metrics(average_precision(data, results), expected)


@pytest.mark.slow
def test_ap_on_the_shared_sample_of_coco_equals_that_of_pycocotools(shared: Path) -> None:
    folder = shared / "coco_mini"
    data = read_coco(folder / "images", folder / "annotations_val2017.json")
    results = random_results(data.annotation_file)
    assert_same_metrics(average_precision(data, results), pycocotools_metrics(data.annotation_file, results))


def test_evaluating_leaves_the_results_as_they_were(tmp_path: Path) -> None:
    data = write_rectangles(tmp_path / "data")
    results = random_results(data.annotation_file)
    before = copy.deepcopy(results)
    average_precision(data, results)
    assert results == before


def perfect_results(data: CocoData) -> list[dict[str, Any]]:
    document = json.loads(data.annotation_file.read_text())
    return [
        {
            "image_id": annotation["image_id"],
            "category_id": annotation["category_id"],
            "bbox": annotation["bbox"],
            "score": 0.9,
            "segmentation": rectangle(*annotation["bbox"]),
        }
        for annotation in document["annotations"]
    ]


def test_perfect_detections_have_an_ap_of_1(tmp_path: Path) -> None:
    data = write_rectangles(tmp_path / "data", crowds=False)
    metrics = average_precision(data, perfect_results(data))
    for kind in ("bbox", "segm"):
        assert metrics[kind] == pytest.approx(dict.fromkeys(STATISTICS, 1.0))


@pytest.mark.parametrize(
    ("annotations_from", "images_from", "categories_from"),
    [(0, 1, 1), (2**63, 1, 1), (1, -5, 1), (1, 2**53, 1), (1, 1, 2**63), (0, 0, 0)],
)
def test_perfect_detections_have_an_ap_of_1_whatever_the_ids(
    tmp_path: Path, annotations_from: int, images_from: int, categories_from: int
) -> None:
    path = write_rectangles(tmp_path / "data", crowds=False).annotation_file
    document = json.loads(path.read_text())
    # By place: ids from 0 on are where an id would be taken for "none".
    images = {image["id"]: images_from + place for place, image in enumerate(document["images"])}
    categories = {c["id"]: categories_from + place for place, c in enumerate(document["categories"])}
    for entry in document["images"]:
        entry["id"] = images[entry["id"]]
    for entry in document["categories"]:
        entry["id"] = categories[entry["id"]]
    for place, annotation in enumerate(document["annotations"]):
        annotation |= {
            "id": annotations_from + place,
            "image_id": images[annotation["image_id"]],
            "category_id": categories[annotation["category_id"]],
        }
    path.write_text(json.dumps(document))
    data = read_coco(tmp_path / "data/images", path)
    metrics = average_precision(data, perfect_results(data))
    for kind in ("bbox", "segm"):
        assert metrics[kind] == pytest.approx(dict.fromkeys(STATISTICS, 1.0))


def test_no_detections_at_all_have_an_ap_of_0(tmp_path: Path) -> None:
    data = write_rectangles(tmp_path / "data", crowds=False)
    metrics = average_precision(data, [])
    for kind in ("bbox", "segm"):
        assert metrics[kind] == dict.fromkeys(STATISTICS, 0.0)


def test_a_size_class_without_objects_is_none(tmp_path: Path) -> None:
    # Sides of 6 to 20 px: all areas are below 32² px.
    data = write_rectangles(tmp_path / "data", sides=(6, 20), crowds=False)
    metrics = average_precision(data, perfect_results(data))
    for kind in ("bbox", "segm"):
        assert metrics[kind]["APs"] == pytest.approx(1.0)
        assert metrics[kind]["APm"] is None
        assert metrics[kind]["APl"] is None


def test_a_detection_in_a_crowd_is_no_false_alarm(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (SIZE, SIZE)).save(tmp_path / "images/1.png")
    common = {"image_id": 1, "category_id": 2, "area": 400}
    document = {
        "images": [{"id": 1, "file_name": "1.png", "width": SIZE, "height": SIZE}],
        "annotations": [
            {
                **common,
                "id": 1,
                "bbox": [0, 0, 20, 20],
                "iscrowd": 0,
                "segmentation": rectangle(0, 0, 20, 20),
            },
            {
                **common,
                "id": 2,
                "bbox": [50, 50, 90, 90],
                "iscrowd": 1,
                "segmentation": rectangle(50, 50, 90, 90),
            },
        ],
        "categories": [{"id": 2, "name": "2"}],
    }
    (tmp_path / "annotations.json").write_text(json.dumps(document))
    data = read_coco(tmp_path / "images", tmp_path / "annotations.json")
    image = document["images"][0]
    inside = [result(image, 2, (60, 60, 10, 10), 0.9), result(image, 2, (0, 0, 20, 20), 0.8)]
    outside = [result(image, 2, (30, 100, 10, 10), 0.9), result(image, 2, (0, 0, 20, 20), 0.8)]
    assert average_precision(data, inside)["segm"]["AP"] == pytest.approx(1.0)
    # A surer false alarm before the only hit halves the precision.
    assert average_precision(data, outside)["segm"]["AP"] == pytest.approx(0.5)


def test_an_object_without_a_mask_counts_for_boxes_and_is_ignored_for_masks(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (SIZE, SIZE)).save(tmp_path / "images/1.png")
    common = {"image_id": 1, "category_id": 2, "area": 400, "iscrowd": 0}
    document = {
        "images": [{"id": 1, "file_name": "1.png", "width": SIZE, "height": SIZE}],
        "annotations": [
            {**common, "id": 1, "bbox": [0, 0, 20, 20], "segmentation": rectangle(0, 0, 20, 20)},
            {**common, "id": 2, "bbox": [50, 50, 20, 20], "segmentation": []},
        ],
        "categories": [{"id": 2, "name": "2"}],
    }
    (tmp_path / "annotations.json").write_text(json.dumps(document))
    data = read_coco(tmp_path / "images", tmp_path / "annotations.json")
    image = document["images"][0]
    with_mask = [result(image, 2, (0, 0, 20, 20), 0.8)]
    both = [*with_mask, result(image, 2, (50, 50, 20, 20), 0.9)]
    # A surer detection of the second is right for boxes, and neither right nor wrong for masks.
    assert average_precision(data, both)["bbox"]["AP"] == pytest.approx(1.0)
    assert average_precision(data, both)["segm"]["AP"] == pytest.approx(1.0)
    # Without it half of the boxes are missed, 51 of 101 recall levels are reached, and no mask is missed.
    assert average_precision(data, with_mask)["bbox"]["AP"] == pytest.approx(51 / 101)
    assert average_precision(data, with_mask)["segm"]["AP"] == pytest.approx(1.0)


def write_grid(folder: Path, side: int) -> CocoData:
    """One image with side x side squares of one category."""
    (folder / "images").mkdir(parents=True)
    size = 10 * side
    Image.new("RGB", (size, size)).save(folder / "images/1.png")
    annotations = [
        {
            "id": place + 1,
            "image_id": 1,
            "category_id": 1,
            "bbox": [10 * (place % side), 10 * (place // side), 8, 8],
            "area": 64,
            "iscrowd": 0,
            "segmentation": [rectangle_polygon(10 * (place % side), 10 * (place // side))],
        }
        for place in range(side * side)
    ]
    document = {
        "images": [{"id": 1, "file_name": "1.png", "width": size, "height": size}],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "cell"}],
    }
    (folder / "annotations.json").write_text(json.dumps(document))
    return read_coco(folder / "images", folder / "annotations.json")


def rectangle_polygon(x: int, y: int) -> list[int]:
    return [x, y, x + 8, y, x + 8, y + 8, x, y + 8]


@pytest.mark.parametrize("most", [1, 5, 10, 50, 100, 300, 400])
def test_ap_of_more_or_fewer_than_100_detections_equals_that_of_pycocotools(
    tmp_path: Path, most: int
) -> None:
    data = write_grid(tmp_path, 18)  # 324 objects
    document = json.loads(data.annotation_file.read_text())
    results = [
        {"image_id": 1, "category_id": 1, "bbox": annotation["bbox"], "score": 1 - place / 1000}
        for place, annotation in enumerate(document["annotations"])
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(data.annotation_file))
        oracle = COCOeval(truth, truth.loadRes(copy.deepcopy(results)), "bbox")
        oracle.params.maxDets = [most]
        oracle.evaluate()
        oracle.accumulate()
    # IoU, recall, category, area "all", the one number of detections.
    expected = float(oracle.eval["precision"][:, :, 0, 0, 0].mean())
    assert average_precision(data, results, max_detections=most)["bbox"]["AP"] == pytest.approx(
        expected, abs=1e-9
    )
    # By hand: the share of the 101 recall levels that the first detections, all of them right, reach.
    reached = sum(level / 100 <= min(most, 324) / 324 + 1e-12 for level in range(101))
    assert expected == pytest.approx(reached / 101)


def boundary(mask: np.ndarray, distance: int) -> np.ndarray:
    """Return the pixels of a mask within a distance of its outside or of the image's border, by brute force."""
    padded = np.pad(mask.astype(bool), distance)
    height, width = mask.shape
    inside = np.ones(mask.shape, dtype=bool)
    for y in range(2 * distance + 1):
        for x in range(2 * distance + 1):
            inside &= padded[y : y + height, x : x + width]
    return mask.astype(bool) & ~inside


def iou(one: np.ndarray, other: np.ndarray) -> float:
    union = (one | other).sum()
    return float((one & other).sum() / union) if union else 0.0


class BoundaryEval(COCOeval):
    """pycocotools' evaluation, with Boundary IoU as the paper defines it, of masks that are decoded pixel by pixel."""

    def computeIoU(self, imgId: int, catId: int) -> Any:
        ious = super().computeIoU(imgId, catId)
        if len(ious) == 0:
            return ious
        truth = self._gts[imgId, catId]
        found = sorted(self._dts[imgId, catId], key=lambda one: -one["score"])[: self.params.maxDets[-1]]
        image = self.cocoGt.imgs[imgId]
        distance = max(1, round(0.02 * math.hypot(image["height"], image["width"])))
        for column, annotation in enumerate(truth):
            if annotation["iscrowd"]:
                continue  # a crowd's is the part of the detection that is in it, of whole masks
            own = boundary(self.cocoGt.annToMask(annotation), distance)
            for row, result in enumerate(found):
                ious[row, column] = min(
                    ious[row, column], iou(boundary(self.cocoDt.annToMask(result), distance), own)
                )
        return ious


@pytest.mark.parametrize("crowds", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_boundary_ap_is_that_of_eroded_masks(tmp_path: Path, seed: int, crowds: bool) -> None:
    data = write_rectangles(tmp_path / "data", crowds=crowds)
    results = [*random_results(data.annotation_file, seed), *perfect_results(data)[::2]]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(data.annotation_file))
        found = [
            {key: value for key, value in one.items() if key != "bbox"} for one in copy.deepcopy(results)
        ]
        oracle = BoundaryEval(truth, truth.loadRes(found), "segm")
        oracle.evaluate()
        oracle.accumulate()
        oracle.summarize()
    expected = [*oracle.stats[:6], oracle.stats[8]]
    metrics = average_precision(data, results)
    for name, value in zip(STATISTICS, expected, strict=True):
        assert metrics["boundary"][name] == pytest.approx(None if value == -1 else value, abs=1e-9), name
    assert 0.1 < metrics["boundary"]["AP"] < metrics["segm"]["AP"]


def test_recorded_detections_of_a_published_network_have_the_ap_that_pycocotools_gives(
    shared: Path, tmp_path: Path
) -> None:
    """MaskRCNN2Go's authors published 2,481 detections in 100 COCO images; only the sizes of these are needed."""
    folder = shared / "maskrcnn2go"
    document = json.loads((folder / "ground_truth_100.json").read_text())
    for image in document["images"]:
        Image.new("L", (image["width"], image["height"])).save(tmp_path / image["file_name"])
    boxes = json.loads((folder / "recorded_bbox.json").read_text())
    masks = [
        {
            "image_id": int(result["image_id"]),
            "category_id": int(result["category_id"]),
            "score": float(result["score"]),
            "segmentation": result["segmentation"],
        }
        for result in json.loads((folder / "recorded_segm.json").read_text())
    ]
    data = read_coco(tmp_path, folder / "ground_truth_100.json")
    metrics = average_precision(data, [*boxes, *masks])
    # By pycocotools, in percent: AP, AP50, AP75, small, medium, large.
    expected = {
        "bbox": (30.05, 46.48, 32.53, 7.69, 24.87, 54.01),
        "segm": (28.11, 43.75, 30.28, 5.29, 24.27, 50.17),
    }
    for kind, values in expected.items():
        assert [round(100 * metrics[kind][name], 2) for name in STATISTICS[:6]] == list(values)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(folder / "ground_truth_100.json"))
        for kind, results in (("bbox", boxes), ("segm", masks)):
            oracle = COCOeval(truth, truth.loadRes(copy.deepcopy(results)), kind)
            oracle.evaluate()
            oracle.accumulate()
            oracle.summarize()
            assert metrics[kind]["AP"] == pytest.approx(oracle.stats[0], abs=1e-9)
            assert metrics[kind]["AR"] == pytest.approx(oracle.stats[8], abs=1e-9)


def test_masks_are_ranked_by_their_own_score_and_boxes_by_that_of_the_class(tmp_path: Path) -> None:
    data = write_grid(tmp_path, 1)
    image = {"id": 1, "width": 10, "height": 10}
    right, wrong = result(image, 1, (0, 0, 8, 8), 0.5), result(image, 1, (5, 5, 4, 4), 0.9)
    results = [{**right, "mask_score": 0.9}, {**wrong, "mask_score": 0.1}]
    metrics = average_precision(data, results)
    # The surer false alarm before the only hit halves the precision.
    assert metrics["bbox"]["AP"] == pytest.approx(0.5)
    assert metrics["segm"]["AP"] == metrics["boundary"]["AP"] == pytest.approx(1.0)


def test_results_without_a_box_or_a_mask_count_for_the_other_alone(tmp_path: Path) -> None:
    data = write_grid(tmp_path, 1)
    found = result({"id": 1, "width": 10, "height": 10}, 1, (0, 0, 8, 8), 0.5)
    for removed, kept in (("segmentation", "bbox"), ("bbox", "segm")):
        metrics = average_precision(data, [{key: value for key, value in found.items() if key != removed}])
        assert {kind for kind in ("bbox", "segm") if metrics[kind]["AP"] == pytest.approx(1.0)} == {kept}
        assert {kind for kind in ("bbox", "segm") if metrics[kind]["AP"] == 0.0} == {"bbox", "segm"} - {kept}


def test_metrics_are_written_as_json_with_null_for_what_there_is_none_of(tmp_path: Path) -> None:
    write_metrics(tmp_path / "metrics.json", {"bbox": {"AP": 0.5, "APl": None}})
    assert (tmp_path / "metrics.json").read_text() == (
        '{\n  "bbox": {\n    "AP": 0.5,\n    "APl": null\n  }\n}\n'
    )


def test_metrics_that_cannot_be_written_leave_the_earlier_ones(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    path.write_text("earlier")
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_metrics(path, {"loss": {"loss": math.nan}})
    with largest_file(10), pytest.raises(RunError, match=r"metrics\.json: cannot be written"):
        write_metrics(path, {"loss": {"loss": 0.5}})
    assert path.read_text() == "earlier"
    assert list(tmp_path.iterdir()) == [path]


def test_the_values_of_the_categories_average_to_the_summary(tmp_path: Path) -> None:
    data = write_rectangles(tmp_path / "data")
    metrics = average_precision(data, random_results(data.annotation_file))
    assert [row["id"] for row in metrics["classes"]] == [category.id for category in data.categories]
    assert sum(row["objects"] for row in metrics["classes"]) == data.num_objects
    for kind in METRICS:
        for name in STATISTICS:
            known = [row[kind][name] for row in metrics["classes"] if row[kind][name] is not None]
            assert metrics[kind][name] == pytest.approx(sum(known) / len(known))


def best_f1(truth: list[int], scores: list[float], objects: int) -> tuple[float, float, float]:
    """Return precision, recall and score of the best F1, by trying every score."""
    best = (0.0, 0.0, 0.0, 0.0)
    for least in scores:
        kept = [hit for hit, score in zip(truth, scores, strict=True) if score >= least]
        precision, recall = sum(kept) / len(kept), sum(kept) / objects
        if sum(kept):
            best = max(best, (2 * precision * recall / (precision + recall), precision, recall, least))
    return best[1:]


def test_the_best_f1_of_a_category_is_that_of_trying_every_score(tmp_path: Path) -> None:
    """Twenty objects in a row; detections either equal an object or lie below all."""
    rng = random.Random(0)
    annotations = [
        {"id": i + 1, "image_id": 1, "category_id": 7, "bbox": [10 * i, 0, 8, 8], "area": 64, "iscrowd": 0}
        for i in range(20)
    ]
    document = {
        "images": [{"id": 1, "file_name": "1.png", "width": 200, "height": 100}],
        "annotations": annotations,
        "categories": [{"id": 7, "name": "seven"}, {"id": 8, "name": "eight"}],
    }
    Image.new("RGB", (200, 100)).save(tmp_path / "1.png")
    (tmp_path / "annotations.json").write_text(json.dumps(document))
    data = read_coco(tmp_path, tmp_path / "annotations.json")
    for _ in range(20):
        hits = [rng.random() < 0.7 for _ in range(20)]
        scores = sorted({round(rng.random(), 6) for _ in range(20)}, reverse=True)
        hits = hits[: len(scores)]
        results = [
            {"image_id": 1, "category_id": 7, "bbox": [10 * i, 0 if hit else 50, 8, 8], "score": score}
            for i, (hit, score) in enumerate(zip(hits, scores, strict=True))
        ]
        own, other = (row["bbox"] for row in average_precision(data, results)["classes"])
        precision, recall, threshold = best_f1([int(hit) for hit in hits], scores, 20)
        assert own["precision"] == pytest.approx(precision)
        assert own["recall"] == pytest.approx(recall, abs=0.01)
        assert own["score_threshold"] == pytest.approx(threshold)
        assert set(other.values()) == {None}
        metrics = average_precision(data, results)
        assert score_thresholds(metrics, results) == (own["score_threshold"], None)


def test_thresholds_of_scored_masks_are_those_of_the_class_scores() -> None:
    classes = [{"bbox": {"score_threshold": 0.25}, "segm": {"score_threshold": 0.75}}, {}]
    plain: list[dict[str, Any]] = [{"segmentation": {}}]
    assert score_thresholds({"classes": classes}, plain) == (0.75, None)
    assert score_thresholds({"classes": classes}, [{**plain[0], "mask_score": 0.5}]) == (0.25, None)
    assert score_thresholds({"classes": classes}, []) == (0.25, None)


def test_curves_have_the_precision_and_the_threshold_of_the_best_f1(tmp_path: Path) -> None:
    """The curves and the values of the categories come from the same detections, by separate evaluations."""
    data = write_rectangles(tmp_path / "data")
    results = random_results(data.annotation_file)
    curves = precision_recall_curves(data, results)
    metrics = average_precision(data, results)
    assert curves.names == tuple(category["name"] for category in metrics["classes"] if category["objects"])
    known = [category["segm"] for category in metrics["classes"] if category["objects"]]
    for precision, scores, values in zip(curves.precision, curves.scores, known, strict=True):
        f1 = 2 * precision * curves.recall / np.maximum(precision + curves.recall, 1e-9)
        best = int(f1.argmax())
        assert precision[best] == pytest.approx(values["precision"])
        assert scores[best] == pytest.approx(values["score_threshold"])
        assert precision.mean() == pytest.approx(values["AP50"])


def test_curves_of_boxes_alone(tmp_path: Path) -> None:
    data = write_rectangles(tmp_path / "data")
    results = [
        {key: value for key, value in result.items() if key != "segmentation"}
        for result in random_results(data.annotation_file)
    ]
    curves = precision_recall_curves(data, results)
    expected = [category["bbox"]["AP50"] for category in average_precision(data, results)["classes"]]
    assert curves.precision.mean(axis=1) == pytest.approx([value for value in expected if value is not None])


def test_no_detections_at_all_have_curves_of_0(tmp_path: Path) -> None:
    data = write_rectangles(tmp_path / "data")
    curves = precision_recall_curves(data, [])
    assert curves.names
    assert not curves.precision.any()
