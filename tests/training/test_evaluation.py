"""maskloss/training/evaluation.py: AP as pycocotools has it, and losses averaged over images."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn

from maskloss.data.coco import CocoData, read_coco
from maskloss.detection.transform import RCNNTransform
from maskloss.errors import InputError, RunError
from maskloss.training import evaluation
from maskloss.training.evaluation import batches_on, evaluate
from maskloss.training.metrics import average_precision
from tests.training.small_runs import STATISTICS

SIZE = 160


def rectangle(
    x: int, y: int, width: int, height: int, size: tuple[int, int] = (SIZE, SIZE)
) -> dict[str, Any]:
    mask = np.zeros(size, dtype=np.uint8, order="F")
    mask[y : y + height, x : x + width] = 1
    rle = coco_mask.encode(mask)
    return {"size": list(size), "counts": rle["counts"].decode()}


def write_rectangles(folder: Path, *, sides: tuple[int, int] = (6, 150), crowds: bool = True) -> CocoData:
    """Six images with up to six rectangles each, of all size classes, polygons, RLEs and crowds."""
    random = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number in range(1, 7):
        Image.new("RGB", (SIZE, SIZE)).save(folder / "images" / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "width": SIZE, "height": SIZE})
        for position in range(number):
            width, height = (int(v) for v in random.integers(*sides, 2))
            x, y = int(random.integers(0, SIZE - width)), int(random.integers(0, SIZE - height))
            crowd = crowds and position == 1
            polygon = [[x, y, x + width, y, x + width, y + height, x, y + height]]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": int(random.choice([2, 5, 9])),
                    "bbox": [x, y, width, height],
                    "area": width * height,
                    "iscrowd": int(crowd),
                    "segmentation": rectangle(x, y, width, height) if crowd or position % 2 else polygon,
                }
            )
    categories = [{"id": identity, "name": str(identity)} for identity in (2, 5, 9)]
    document = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations.json").write_text(json.dumps(document))
    return read_coco(folder / "images", folder / "annotations.json")


def random_results(path: Path, seed: int = 0) -> list[dict[str, Any]]:
    """Every annotation found once or twice, more or less moved, some as another category; and false alarms."""
    random = np.random.default_rng(seed)
    document = json.loads(path.read_text())
    images = {image["id"]: image for image in document["images"]}
    categories = [category["id"] for category in document["categories"]]
    results = []
    for annotation in document["annotations"]:
        image = images[annotation["image_id"]]
        for _ in range(int(random.integers(1, 3))):
            x, y, width, height = (
                np.asarray(annotation["bbox"]) + random.normal(0, 0.08, 4) * annotation["bbox"][2]
            )
            category = annotation["category_id"] if random.random() < 0.85 else int(random.choice(categories))
            results.append(result(image, category, (x, y, width, height), float(random.random())))
    for image in document["images"]:
        box = (*random.uniform(0, 60, 2), *random.uniform(3, 60, 2))
        results.append(result(image, int(random.choice(categories)), box, float(random.random())))
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


def bare_model() -> nn.Module:
    """As much of a model as evaluation asks for beside its losses and detections."""
    model = nn.Module()
    model.transform = RCNNTransform(32, 64, [0.5] * 3, [0.5] * 3)
    model.roi_heads = nn.Module()
    model.roi_heads.detections_per_img = 100
    return model


def test_losses_are_means_over_images_that_are_seen_one_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_rectangles(tmp_path / "data")
    seen: list[list[int]] = []

    def fake(model: nn.Module, images: list[Any], targets: list[dict[str, Any]]) -> Any:
        ids = [target["image_id"] for target in targets]
        seen.append(ids)
        nothing = {
            "boxes": torch.zeros(0, 4),
            "labels": torch.zeros(0, dtype=torch.int64),
            "scores": torch.zeros(0),
            "masks": torch.zeros(0, 1, 28, 28),
        }
        mean = torch.tensor(float(np.mean(ids)))
        return {"loss_a": mean, "loss_b": 10 * mean}, [nothing] * len(images)

    monkeypatch.setattr(evaluation, "losses_and_detections", fake)
    found = evaluate(bare_model(), data, batch_size=4, device=torch.device("cpu"))
    assert seen == [[1], [2], [3], [4], [5], [6]]
    # Images 1 to 6 have the mean 3.5; the mean of the batches' means would be (2.5 + 5.5) / 2 = 4.
    assert found.metrics["loss"] == pytest.approx({"loss_a": 3.5, "loss_b": 35.0, "loss": 38.5})
    assert found.results == []


def test_an_unreadable_image_is_raised_as_an_input_error(tmp_path: Path) -> None:
    data = write_rectangles(tmp_path / "data")
    (tmp_path / "data/images/1.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"1\.png: not a readable image"):
        evaluate(bare_model(), data, batch_size=2, device=torch.device("cpu"))


def test_a_dead_worker_is_a_run_error() -> None:
    class Loader:
        def __iter__(self) -> Loader:
            return self

        def __next__(self) -> None:
            raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

    with pytest.raises(RunError, match=r"a data-loader worker died: .*Killed.*use fewer --workers"):
        next(batches_on(Loader(), torch.device("cpu")))


def test_another_error_of_the_loader_is_not_called_a_dead_worker() -> None:
    def loader() -> Iterator[None]:
        raise RuntimeError("The size of tensor a (3) must match")
        yield

    with pytest.raises(RuntimeError, match="The size of tensor a"):
        next(batches_on(loader(), torch.device("cpu")))


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
    # By hand: so many of 101 recall levels are reached by the first detections, all right.
    reached = sum(level / 100 <= min(most, 324) / 324 + 1e-12 for level in range(101))
    assert expected == pytest.approx(reached / 101)


def boundary(mask: np.ndarray, distance: int) -> np.ndarray:
    """The pixels of a mask within so many of one that is not in it, or of the image's border, by brute force."""
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
