"""Point and box supervision against numbers that Detectron2's and BoxInst's own functions computed.

Every `*.npz` of a folder is one scene: the folder that the environment variable MASKLOSS_GOLDEN_POINTS names, else
`../shared/golden_points`, else (in a clone without it) the copy under `tests/data/golden_points`.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from maskloss.detection.point_rend import fine_features, most_uncertain_cells
from maskloss.losses import mask_point_loss, mask_projection_loss
from maskloss.losses.mask_weak import color_similarity, pairwise_disagreement, sample_at_points
from maskloss.masks.point_targets import bitmaps_at_points
from maskloss.masks.points import points_in_boxes


def golden_folder() -> Path:
    named = os.environ.get("MASKLOSS_GOLDEN_POINTS")
    if named:
        return Path(named)
    beside_the_repository = Path(__file__).resolve().parents[1].parent / "shared" / "golden_points"
    if beside_the_repository.is_dir():
        return beside_the_repository
    return Path(__file__).parent / "data" / "golden_points"


GOLDEN_FILES = sorted(golden_folder().glob("*.npz"))


def test_the_folder_of_golden_vectors_has_a_file():
    # Without this a wrong folder would leave every test below without a parameter, that is, skipped.
    assert GOLDEN_FILES, f"{golden_folder()} has no *.npz"


@pytest.fixture(params=GOLDEN_FILES, ids=lambda path: path.stem)
def scene(request: pytest.FixtureRequest) -> dict[str, Tensor]:
    with np.load(request.param) as arrays:
        return {name: torch.from_numpy(np.asarray(arrays[name])) for name in arrays}


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.detach(), expected, rtol=1e-5, atol=1e-6)


def assert_gradient(loss: Tensor, of: Tensor, expected: Tensor) -> None:
    (gradient,) = torch.autograd.grad(loss, of)
    assert (gradient - expected).norm() <= 1e-5 * expected.norm()


def test_points_in_boxes(scene):
    coords, labels = points_in_boxes(scene["point_coords_px"], scene["point_labels"], scene["boxes"])
    assert torch.equal(labels, scene["d2_point_labels_in_box"])
    inside = labels >= 0
    assert 0 < inside.sum() < inside.numel()
    assert_close(coords[inside], scene["d2_point_coords_in_box"][inside])


def test_point_logits_loss_and_gradient(scene):
    coords, labels = points_in_boxes(scene["point_coords_px"], scene["point_labels"], scene["boxes"])
    logits = scene["point_mask_logits"].requires_grad_()
    assert_close(sample_at_points(logits[:, None], coords)[:, 0], scene["d2_point_logits"])
    loss = mask_point_loss(logits, coords, labels).mean()
    assert_close(loss, scene["d2_point_loss"])
    assert_gradient(loss, logits, scene["d2_point_loss_grad"])


def test_bitmaps_at_points(scene):
    sampled = sample_at_points(scene["coarse_logits"], scene["grid_points"])
    assert_close(sampled, scene["d2_coarse_at_points"])


def test_bitmap_labels_of_points(scene):
    low, sides = scene["boxes"][:, None, :2], (scene["boxes"][:, 2:] - scene["boxes"][:, :2])[:, None]
    in_px = low + scene["grid_points"] * sides
    found = bitmaps_at_points(scene["masks"], in_px, torch.arange(len(in_px)))
    torch.testing.assert_close(found, scene["d2_bitmap_point_labels"], rtol=1e-5, atol=1e-4)


def test_fine_features(scene):
    maps = {"0": scene["fine_features_stride4"], "1": scene["fine_features_stride8"]}
    size = (int(scene["height"]), int(scene["width"]))
    found = fine_features(maps, ["0", "1"], [scene["boxes"]], scene["grid_points"], [size])
    assert_close(found, scene["d2_fine_features"])


def test_uncertain_cells(scene):
    indices, coords = most_uncertain_cells(scene["coarse_logits"], scene["d2_uncertain_indices"].shape[1])
    assert torch.equal(indices.sort(dim=1).values, scene["d2_uncertain_indices"].sort(dim=1).values)
    order, expected = indices.argsort(dim=1), scene["d2_uncertain_indices"].argsort(dim=1)
    assert_close(
        coords.gather(1, order[..., None].expand(-1, -1, 2)),
        scene["d2_uncertain_coords"].gather(1, expected[..., None].expand(-1, -1, 2)),
    )


def test_projection_loss_and_gradient(scene):
    logits = scene["weak_mask_logits"][:, 0].requires_grad_()
    values = mask_projection_loss(logits, scene["box_grids"][:, 0])
    assert_close(values, scene["boxinst_projection_per_object"])
    assert_close(values.mean(), scene["boxinst_projection_mean"])
    assert_gradient(values.mean(), logits, scene["boxinst_projection_grad"][:, 0])


def test_pairwise_disagreement_and_gradient(scene):
    logits = scene["weak_mask_logits"][:, 0].requires_grad_()
    disagreement = pairwise_disagreement(logits, dilation=2)
    assert_close(disagreement, scene["boxinst_pairwise_size3_dilation2"])
    in_box = (disagreement * scene["box_grids"]).sum()
    assert_gradient(in_box, logits, scene["boxinst_pairwise_grad_of_sum_in_box"][:, 0])


def test_color_similarity(scene):
    assert_close(color_similarity(scene["lab_image"], dilation=2), scene["boxinst_color_similarity"])
