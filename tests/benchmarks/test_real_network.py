"""A short form of benchmarks/real_network: a random network, two generated photographs, a few steps."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.ops import box_iou

import maskloss
from benchmarks.real_network.features import VERSION, Cache, make_cache, open_cache
from benchmarks.real_network.mask_losses import (
    VARIANTS,
    RunFile,
    Setting,
    compare,
    evaluate,
    match_greedily,
    positives_iou,
    predict,
    published_branch,
    read_variants,
    table,
    train_branch,
)
from benchmarks.real_network.network import read_network
from benchmarks.real_network.weak_labels import objects_of, points_in_view, random_points
from maskloss.data.coco import read_coco
from maskloss.data.dataset import CocoDataset
from maskloss.losses.mask_weak import sample_at_points
from maskloss.masks.points import points_in_boxes
from maskloss.training.loss_config import make_loss

NETWORK = """
import torch
from torch import nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign

CATEGORY_IDS = [3, 7, 9]


class Backbone(nn.Module):
    out_channels = 8

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 9, 8, 4)

    def forward(self, x):
        return {"0": self.conv(x).relu()}


def build():
    torch.manual_seed(0)
    up = nn.ConvTranspose2d(4, 4, 4, 2, 1, groups=4)
    with torch.no_grad():
        up.weight.copy_(torch.outer(torch.tensor([1.0, 3, 3, 1]), torch.tensor([1.0, 3, 3, 1])) / 16)
        up.bias.zero_()
    return MaskRCNN(
        Backbone(),
        num_classes=None,
        min_size=48,
        max_size=96,
        rpn_anchor_generator=AnchorGenerator(((16, 32),), ((1.0,),)),
        rpn_pre_nms_top_n_test=60,
        rpn_post_nms_top_n_test=20,
        box_roi_pool=MultiScaleRoIAlign(["0"], 3, 0),
        box_head=nn.Sequential(nn.Flatten(), nn.Linear(72, 8), nn.ReLU()),
        box_predictor=FastRCNNPredictor(8, 4),
        box_score_thresh=0.0,
        box_detections_per_img=10,
        mask_roi_pool=MultiScaleRoIAlign(["0"], 3, 0),
        mask_head=nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()),
        mask_predictor=nn.Sequential(nn.ConvTranspose2d(8, 8, 2, 2), nn.ReLU(), nn.Conv2d(8, 4, 1), up),
    ).eval()
"""


def write_photographs(folder: Path) -> Path:
    """Write two pictures of bright triangles and squares on noise, with annotations."""
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for index, (width, height) in enumerate(((72, 60), (50, 80)), start=1):
        pixels = rng.integers(0, 80, (height, width, 3), dtype=np.uint8)
        for x, y, side, category in ((5, 6, 24, 3), (22, 33, 20, 9)):
            polygon = [x, y, x + side, y, x + side, y + side, *([x, y + side] if category == 3 else [])]
            rows, columns = np.mgrid[:side, :side]
            inside = (columns >= rows) | (category == 3)
            pixels[y : y + side, x : x + side][inside] += np.uint8(60 * index)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index,
                    "category_id": category,
                    "bbox": [x, y, side, side],
                    "area": float(inside.sum()),
                    "iscrowd": 0,
                    "segmentation": [polygon],
                }
            )
        Image.fromarray(pixels).save(folder / f"{index}.png")
        images.append({"id": index, "width": width, "height": height, "file_name": f"{index}.png"})
    categories = [{"id": 3, "name": "square"}, {"id": 9, "name": "triangle"}]
    path = folder / "annotations.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    folder = tmp_path_factory.mktemp("real_network")
    (folder / "network.py").write_text(NETWORK)
    network = read_network(folder / "network.py")
    data = read_coco(folder, write_photographs(folder))
    content = make_cache(network.build, network.CATEGORY_IDS, data, data, positives=8, dtype="float32")
    torch.save(content, folder / "cache.pt")
    return open_cache(folder / "cache.pt", network, data, data)


def test_positives_overlap_their_objects_and_have_the_networks_labels(cache):
    train = cache.train
    assert 4 <= len(train.boxes) <= 16
    assert set(train.image_index.tolist()) == {0, 1}
    assert set(train.labels.tolist()) == {1, 3}  # 7, the category of label 2, is not in the file
    assert (box_iou(train.boxes, train.object_boxes).diagonal() >= 0.5).all()


@pytest.mark.parametrize("size", [12, 14])
@pytest.mark.parametrize("preset", ["aligned", "torchvision", "detectron2"])
def test_cached_targets_are_mask_targets_of_the_converted_networks_own_images(cache, preset, size):
    loss = maskloss.MaskRCNNLoss.preset(preset)
    settings = {"aligned": loss.mask_targets.aligned, "binary": loss.mask_targets.binary}
    transform = maskloss.convert(copy.deepcopy(cache.network), loss).transform
    expected = []
    for index in range(2):
        image, target = CocoDataset(cache.train_data)[index]
        _, (resized,) = transform([image], [target])
        rows = cache.train.rows_of(index)
        boxes, matched_idxs = cache.train.boxes[rows], cache.train.matched_idxs[rows]
        expected.append(maskloss.mask_targets(resized["masks"], boxes, matched_idxs, size, **settings))
        torch.testing.assert_close(resized["boxes"][matched_idxs], cache.train.object_boxes[rows])
    targets = cache.mask_targets(size, loss.mask_targets)
    torch.testing.assert_close(targets, torch.cat(expected))
    assert cache.mask_targets(size, loss.mask_targets) is targets


def test_crops_show_the_image_where_the_targets_are(cache):
    train = cache.train
    rows = torch.arange(len(train.boxes))
    crops = train.crops(rows, 12)
    assert crops.shape == (len(rows), 3, 12, 12)
    assert 0 <= crops.min() < crops.max() <= 1
    # Objects are brighter than the noise around them.
    targets = cache.mask_targets(12, maskloss.MaskTargets())
    brightness = crops.mean(dim=1)
    for image in range(2):
        of_image = train.rows_of(image)
        inside = targets[of_image] > 0.9
        assert brightness[of_image][inside].mean() > brightness[of_image][~inside].mean() + 0.05


@pytest.fixture(scope="module")
def views(cache: Cache, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """Return a cache of the same images at two sizes, without and with a flip."""
    folder = tmp_path_factory.mktemp("views")
    (folder / "network.py").write_text(NETWORK)
    network = read_network(folder / "network.py")
    content = make_cache(
        network.build,
        network.CATEGORY_IDS,
        cache.train_data,
        cache.val_data,
        positives=8,
        shorter_sides=[48, 64],
        flips=True,
        dtype="float32",
    )
    torch.save(content, folder / "cache.pt")
    return open_cache(folder / "cache.pt", network, cache.train_data, cache.val_data)


def test_views_are_sizes_of_the_training_images_and_their_mirror_images(cache, views):
    train = views.train
    assert train.flipped.tolist() == [False, False, True, True] * 2
    assert train.network_sizes.min(dim=1).values.tolist() == [48] * 4 + [64] * 4
    torch.testing.assert_close(train.features[: len(cache.train.boxes)], cache.train.features)
    torch.testing.assert_close(views.val.boxes, cache.val.boxes)
    for image in range(4):
        view = image // 2 * 4 + image % 2
        torch.testing.assert_close(train.pixels[view + 2], train.pixels[view].flip(-1), rtol=0, atol=1)
        assert views.train_record(view + 2).id == cache.train_data.images[image % 2].id
    assert views.train_images().unique().tolist() == [0, 1]


def test_targets_of_all_views_lie_on_the_bright_objects(views):
    targets = views.mask_targets(12, maskloss.MaskTargets())
    crops = views.train.crops(torch.arange(len(targets)), 12).mean(dim=1)
    for image in range(8):
        rows = views.train.rows_of(image)
        inside = targets[rows] > 0.9
        assert crops[rows][inside].mean() > crops[rows][~inside].mean() + 0.05, image


def test_points_move_with_the_views(views):
    train, points = views.train, random_points(views, torch.Generator().manual_seed(0))
    rows = torch.arange(len(train.boxes))
    moved = points_in_view(views, points[objects_of(views)], rows)
    coords, labels = points_in_boxes(moved, points[objects_of(views), :, 2], train.boxes)
    targets = views.mask_targets(48, maskloss.MaskTargets())
    at_points = sample_at_points(targets[:, None], coords)[:, 0]
    seen = labels >= 0
    assert seen.sum() > len(rows)
    # A point's label is that of its pixel, so points within a pixel of the boundary may differ.
    assert ((at_points - labels).abs() < 0.5)[seen].float().mean() > 0.9


def test_the_published_branch_gives_the_converted_networks_masks(cache):
    loss = maskloss.MaskRCNNLoss.preset("aligned")
    model = maskloss.convert(copy.deepcopy(cache.network), loss, paste=None)
    probs = predict(published_branch(cache), loss, cache.val.features, cache.val.labels)
    for index in range(2):
        image, _ = CocoDataset(cache.val_data)[index]
        with torch.no_grad():
            (detection,) = model([image])
        rows = cache.val.rows_of(index)
        assert len(rows) > 1
        torch.testing.assert_close(detection["boxes"], cache.val.boxes_in_image(index, rows))
        torch.testing.assert_close(detection["masks"][:, 0], probs[rows])


@pytest.mark.parametrize("variant", list(read_variants(VARIANTS)))
def test_training_lowers_every_loss(cache, variant):
    loss = make_loss(read_variants(VARIANTS)[variant])
    losses: list[float] = []
    branch = train_branch(
        cache, loss, seed=0, steps=20, learning_rate=0.01, warm_up=5, losses=losses, batch_size=8
    )
    assert sum(losses[-3:]) < 0.97 * sum(losses[:3])
    assert not branch.training
    assert not branch.predictor[3].weight.requires_grad  # the interpolation is no weight to learn
    assert torch.equal(branch.predictor[3].weight, cache.network.roi_heads.mask_predictor[3].weight)
    rows = torch.arange(len(cache.train.boxes))
    assert 0 <= positives_iou(cache, branch, loss, rows) <= 1


def test_an_easy_mask_is_learned(cache):
    loss = maskloss.MaskRCNNLoss.preset("aligned")
    branch = train_branch(cache, loss, seed=0, steps=100, learning_rate=0.01, batch_size=8)
    rows = torch.arange(len(cache.train.boxes))
    assert positives_iou(cache, branch, loss, rows) > 0.75
    assert evaluate(cache, branch, loss).keys() >= {"AP", "APs", "APm", "APl", "boundary AP", "IoU"}


def test_equal_seeds_give_equal_branches_at_another_size_too(cache):
    loss = maskloss.MaskRCNNLoss.preset("aligned")
    first, second = (
        train_branch(cache, loss, seed=3, steps=2, learning_rate=0.01, size=14, batch_size=4)
        for _ in range(2)
    )
    assert first(cache.val.features[:2], cache.val.labels[:2]).shape == (2, 1, 14, 14)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_supervision_changes_the_batch_that_the_loss_gets(cache):
    seen = []

    def whole_boxes(cache, rows, batch):
        seen.append((rows, batch))
        return replace(batch, mask_targets=torch.ones_like(batch.mask_targets))

    loss = maskloss.MaskRCNNLoss.preset("aligned")
    rows = cache.train.rows_of(1)
    branch = train_branch(
        cache, loss, seed=0, steps=60, learning_rate=0.01, supervision=whole_boxes, rows=rows, batch_size=4
    )
    assert predict(branch, loss, cache.train.features, cache.train.labels).mean() > 0.8
    assert len(seen) == 60
    chosen, batch = seen[0]
    assert set(chosen.tolist()) <= set(rows.tolist())
    assert torch.equal(batch.labels, cache.train.labels[chosen])
    assert torch.equal(batch.mask_targets, cache.mask_targets(12, maskloss.MaskTargets())[chosen])


def test_runs_that_are_in_the_file_are_not_repeated(cache, tmp_path, capsys):
    variants = {name: read_variants(VARIANTS)[name] for name in ("bce", "dice")}

    def run() -> dict:
        setting = Setting(steps=3, batch_size=4)
        return compare(cache, RunFile(tmp_path / "runs.jsonl"), variants, [0, 1], [0.01, 0.001], setting)

    found = run()
    lines = (tmp_path / "runs.jsonl").read_text().splitlines()
    assert len(lines) == 2 * 2 + 2 * 2
    # A line that was not finished is forgotten.
    (tmp_path / "runs.jsonl").write_text("\n".join(lines) + '\n{"kind": "ru')
    assert run() == found
    assert (tmp_path / "runs.jsonl").read_text().splitlines() == lines
    (tmp_path / "runs.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    again = run()["dice"][1]
    assert {**again, "seconds": 0} == {**found["dice"][1], "seconds": 0}
    rows = table(found, "bce").splitlines()
    assert len(rows) == 4
    assert all(row.count("|") == rows[0].count("|") for row in rows)
    assert "±" in rows[3]


def test_a_cache_of_other_images_is_refused(cache, tmp_path):
    data = cache.train_data
    content = {"version": VERSION, "train": {"image_ids": torch.tensor([1, 5])}}
    torch.save(content, tmp_path / "cache.pt")
    with pytest.raises(ValueError, match="train images"):
        open_cache(tmp_path / "cache.pt", None, data, data)


def test_detections_are_matched_once_by_falling_score():
    objects = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [50, 50, 60, 60]])
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 10], [0, 0, 10, 10], [50, 50, 60, 60]])
    matched = match_greedily(boxes, torch.tensor([1, 1, 1, 2]), objects, torch.tensor([1, 1, 1]))
    assert matched.tolist() == [0, 1, -1, -1]
