"""Names of images in errors about targets, and errors that torchvision's users catch as AssertionError."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from maskloss.detection.target_errors import ImageName, TargetTypeError, TargetValueError, image_name


@pytest.mark.parametrize(
    ("image_id", "name"),
    [
        (41, "image 2 of the batch (image_id 41)"),
        (torch.tensor([41]), "image 2 of the batch (image_id 41)"),
        (torch.tensor(41), "image 2 of the batch (image_id 41)"),
        ("000000000139.jpg", "image 2 of the batch (image_id 000000000139.jpg)"),
        # What would not fit into a message, or identifies no image.
        ("a" * 81, "image 2 of the batch"),
        (torch.tensor([4, 1]), "image 2 of the batch"),
        (None, "image 2 of the batch"),
        ({"id": 41}, "image 2 of the batch"),
    ],
)
def test_an_image_is_named_by_its_index_and_id(image_id: Any, name: str) -> None:
    target = {"image_id": image_id}
    assert image_name(2, target) == name
    assert str(ImageName(2, target)) == name


def test_an_image_without_an_id_is_named_by_its_index() -> None:
    assert image_name(0, {}) == "image 0 of the batch"


@pytest.mark.parametrize(("kind", "base"), [(TargetValueError, ValueError), (TargetTypeError, TypeError)])
def test_errors_are_caught_as_torchvisions_assertions_too(
    kind: type[Exception], base: type[Exception]
) -> None:
    for caught in (base, AssertionError):
        with pytest.raises(caught, match="a message"):
            raise kind("a message")
