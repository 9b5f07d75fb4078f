"""A short form of benchmarks/mask_heads: a random network, two generated photographs, a few steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.mask_heads.compare import (
    BRANCHES,
    JOINED,
    Trunk,
    evaluate,
    joined,
    run_trunk,
    together,
    train_branch,
    without_classes,
)
from benchmarks.mask_heads.fine_shapes import CLASSES, SIZE, write_set
from benchmarks.real_network.network import read_network
from maskloss.data.coco import read_coco

from .test_real_network import NETWORK, write_photographs


@pytest.fixture(scope="module", params=[(), ("backbone.conv",)])
def trunk(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trunk:
    folder = tmp_path_factory.mktemp("mask_heads")
    (folder / "network.py").write_text(NETWORK)
    network = read_network(folder / "network.py")
    data = read_coco(folder, write_photographs(folder))
    torch.manual_seed(0)
    return run_trunk(network.build(), network.CATEGORY_IDS, data, data, stages=request.param, flips=True)


@pytest.mark.parametrize("name", BRANCHES)
def test_a_branch_trains_and_is_evaluated(name: str, trunk: Trunk) -> None:
    losses: list[float] = []
    branch = train_branch(trunk, name, seed=0, steps=12, learning_rate=3e-3, batch_size=2, losses=losses)
    assert sum(losses[-3:]) < sum(losses[:3])
    metrics = evaluate(trunk, branch)
    assert 0 <= metrics["boundary AP"] <= metrics["AP50"] <= 1


def test_mask_iou_trains_the_same_masks_as_stock(trunk: Trunk) -> None:
    stock, scored = (
        train_branch(trunk, name, seed=1, steps=3, learning_rate=1e-3, batch_size=2)
        for name in ("stock", "mask_iou")
    )
    image = trunk.validation[0]
    features = joined([image.features], trunk.fine_levels)
    (masks,), _ = stock.predict(features, image.detections)
    (same,), scores = scored.predict(features, image.detections)
    # Clipping the gradient by the norm of all parameters makes the steps differ slightly.
    torch.testing.assert_close(masks, same, rtol=0, atol=1e-3)
    assert scores is not None


def test_without_classes_all_objects_train_one_channel(trunk: Trunk) -> None:
    agnostic = without_classes(trunk)
    assert {label for image in agnostic.training for label in image.positives.labels[0].tolist()} == {1}
    branch = train_branch(agnostic, "stock", seed=0, steps=2, learning_rate=1e-3, batch_size=2)
    assert evaluate(agnostic, branch)["AP"] is not None


def test_a_batch_pads_maps_and_keeps_all_positives(trunk: Trunk) -> None:
    images = trunk.training[:2]
    features = joined([image.features for image in images], trunk.fine_levels)
    sizes = [image.features["0"].shape[-2:] for image in images]
    height, width = (max(size[axis] for size in sizes) for axis in (0, 1))
    assert features["0"].shape == (2, 8, height, width)
    assert torch.equal(features["0"][1, :, : sizes[1][0], : sizes[1][1]], images[1].features["0"][0].float())
    if trunk.fine_levels == [JOINED]:
        assert features[JOINED].shape[1] == 16
    positives = together([image.positives for image in images])
    assert positives.counts.positives == sum(len(boxes) for boxes in positives.boxes)
    assert positives.counts.num_images == len(positives.boxes) == 2


def test_the_shapes_are_drawn_inside_their_boxes(tmp_path: Path) -> None:
    write_set(tmp_path, 6, seed=0)
    data = read_coco(tmp_path / "images", tmp_path / "annotations.json")
    assert [category.name for category in data.categories] == list(CLASSES)
    for image in data.images:
        bitmaps = image.object_masks().bitmaps()
        assert bitmaps.shape[1:] == (SIZE, SIZE)
        for bitmap, annotation in zip(bitmaps, image.objects, strict=True):
            rows, columns = torch.where(bitmap)
            extent = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert [float(value) for value in extent] == list(annotation.box)
