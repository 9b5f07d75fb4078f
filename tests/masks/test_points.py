"""`maskloss.masks.points`: points of the image in the coordinates of boxes."""

from __future__ import annotations

import torch

from maskloss.masks.points import points_in_boxes


def test_points_in_boxes_by_hand():
    points = torch.tensor([[[15.0, 30.0], [10.0, 20.0], [30.0, 40.0], [9.9, 30.0], [20.0, 41.0]]])
    labels = torch.tensor([[1, 0, 1, 1, 0]])
    coords, inside = points_in_boxes(points, labels, torch.tensor([[10.0, 20.0, 30.0, 40.0]]))
    assert inside.tolist() == [[1, 0, 1, -1, -1]]
    torch.testing.assert_close(coords[0, :3], torch.tensor([[0.25, 0.5], [0.0, 0.0], [1.0, 1.0]]))


def test_each_box_has_its_own_points_and_a_missing_label_stays_missing() -> None:
    points = torch.tensor([[[3.0, 4.0]], [[3.0, 4.0]], [[3.0, 4.0]]])
    boxes = torch.tensor([[1.0, 0.0, 5.0, 8.0], [4.0, 0.0, 5.0, 8.0], [1.0, 0.0, 5.0, 8.0]])
    coords, labels = points_in_boxes(points, torch.tensor([[0], [0], [-1]]), boxes)
    assert labels.tolist() == [[0], [-1], [-1]]
    assert coords.tolist() == [[[0.5, 0.5]], [[-1.0, 0.5]], [[0.5, 0.5]]]


def test_a_box_without_area_contains_only_its_own_point() -> None:
    points = torch.tensor([[[3.0, 4.0], [3.0, 4.5]]])
    coords, labels = points_in_boxes(points, torch.tensor([[1, 1]]), torch.tensor([[3.0, 4.0, 3.0, 4.0]]))
    assert labels.tolist() == [[1, -1]]
    assert not coords.isnan().any()


def test_no_boxes_or_no_points_give_empty_results() -> None:
    for count, num_points in ((0, 3), (2, 0)):
        labels = torch.zeros(count, num_points, dtype=torch.int64)
        coords, found = points_in_boxes(torch.zeros(count, num_points, 2), labels, torch.zeros(count, 4))
        assert coords.shape == (count, num_points, 2)
        assert torch.equal(found, labels)
