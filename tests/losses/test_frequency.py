"""`maskloss.losses.frequency`."""

from __future__ import annotations

import numpy as np
import PIL.Image
import pytest
import torch

from maskloss import EncodedMasks
from maskloss.losses import inverse_frequency_weights


def class_maps(count: int) -> list[torch.Tensor]:
    """Maps of 4 x 4, of which map i has i % 3 + 1 pixels of class 1 and one of class 2."""
    maps = []
    for index in range(count):
        classes = torch.zeros(16, dtype=torch.int64)
        classes[: index % 3 + 1] = 1
        classes[-1] = 2
        maps.append(classes.view(4, 4))
    return maps


def test_weights_are_one_over_the_mean_pixel_count():
    weights = inverse_frequency_weights(class_maps(6), num_classes=3)
    # Class 1 has 1, 2, 3, 1, 2, 3 pixels, class 2 one each, and the background what is left.
    torch.testing.assert_close(weights, torch.tensor([1 / 13, 1 / 2, 1.0]))


def test_the_sample_has_the_given_size_and_no_image_twice():
    seen = []

    class Watched:
        def __len__(self) -> int:
            return 500

        def __getitem__(self, index: int) -> torch.Tensor:
            seen.append(index)
            return torch.tensor([[0, 1]])

    inverse_frequency_weights(Watched(), num_classes=2)
    assert len(seen) == len(set(seen)) == 100
    seen.clear()
    inverse_frequency_weights(Watched(), 50, num_classes=2, generator=torch.Generator().manual_seed(1))
    first = seen.copy()
    seen.clear()
    inverse_frequency_weights(Watched(), 50, num_classes=2, generator=torch.Generator().manual_seed(1))
    assert first == seen
    assert len(first) == 50


def test_a_sample_is_close_to_the_whole():
    generator = torch.Generator().manual_seed(0)
    maps = [
        (torch.rand(20, 20, generator=generator) < 0.1 * torch.rand(1, generator=generator)).long()
        for _ in range(400)
    ]
    whole = inverse_frequency_weights(maps, 400, num_classes=2)
    sample = inverse_frequency_weights(maps, 100, num_classes=2, generator=generator)
    torch.testing.assert_close(sample, whole, rtol=0.15, atol=0)


@pytest.mark.parametrize("encoded", [False, True])
def test_of_a_data_set_pixels_are_counted_by_label(encoded):
    masks = torch.zeros(2, 4, 5, dtype=torch.bool)
    masks[0, :2, :2] = True
    masks[1, 1:3, 1:3] = True  # one pixel of the other's
    squares = EncodedMasks([[[0.0, 0, 2, 0, 2, 2, 0, 2]], [[1.0, 1, 3, 1, 3, 3, 1, 3]]], 4, 5)
    target = {"labels": torch.tensor([1, 2]), "masks": squares if encoded else masks}
    weights = inverse_frequency_weights([("image", target)], num_classes=3)
    torch.testing.assert_close(weights, torch.tensor([1 / 13, 1 / 4, 1 / 4]))


def test_a_mask_with_the_label_0_is_background():
    masks = torch.zeros(2, 2, 3, dtype=torch.bool)
    masks[0, 0, :2], masks[1, 1, :] = True, True
    target = {"labels": torch.tensor([0, 1]), "masks": masks}
    # Of 6 pixels 3 are class 1, and the others are background, 2 of them by their label.
    weights = inverse_frequency_weights([(None, target)], num_classes=2)
    assert weights.tolist() == pytest.approx([1 / 3, 1 / 3])


@pytest.mark.parametrize("kind", ["array", "image"])
def test_class_maps_may_be_arrays_and_images(kind):
    arrays = [classes.numpy().astype("uint8") for classes in class_maps(6)]
    maps = arrays if kind == "array" else [PIL.Image.fromarray(array) for array in arrays]
    torch.testing.assert_close(
        inverse_frequency_weights(maps, num_classes=3),
        inverse_frequency_weights(class_maps(6), num_classes=3),
    )


def test_class_maps_of_floats_raise():
    with pytest.raises(TypeError, match=r"mask 0: a class map must hold integers, not torch\.float32"):
        inverse_frequency_weights([torch.tensor([[0.0, 0.9]])], num_classes=2)


@pytest.mark.parametrize(
    ("masks", "arguments", "message"),
    [
        ([], {"num_classes": 2}, "no masks"),
        (class_maps(3), {"num_classes": 2}, "mask .: classes 0 to 2"),
        (class_maps(3), {"num_classes": 4}, "class 3 has no pixel in the 3 masks sampled from 3"),
        (class_maps(3), {"num_classes": 3, "num_samples": 0}, "num_samples"),
        (
            [(None, {"labels": torch.tensor([3]), "masks": torch.ones(1, 2, 2)})],
            {"num_classes": 3},
            "item 0: labels 3 to 3",
        ),
    ],
)
def test_masks_that_cannot_be_counted_raise(masks, arguments, message):
    with pytest.raises(ValueError, match=message):
        inverse_frequency_weights(masks, **arguments)


@pytest.mark.parametrize(
    "given",
    [
        lambda array: array[:, ::-1],
        lambda array: np.rot90(array),
        lambda array: array.astype(np.uint16),
        lambda array: array.astype(np.uint32),
        lambda array: array.astype(">i4"),
        lambda array: torch.from_numpy(array).to(torch.uint16),
        lambda array: array.astype(bool),
        lambda array: np.broadcast_to(array, array.shape),
        lambda array: PIL.Image.fromarray(array),
        lambda array: torch.from_numpy(array),
    ],
    ids=[
        "flipped",
        "turned",
        "uint16",
        "uint32",
        "big-endian",
        "torch.uint16",
        "bool",
        "read-only",
        "PIL",
        "tensor",
    ],
)
def test_class_maps_of_any_kind_count_alike(given):
    # Of 6 pixels 2 are class 1 and 4 class 0, flipped or not.
    array = np.array([[0, 1, 0], [0, 0, 1]], dtype=np.uint8)
    weights = inverse_frequency_weights([given(array)], num_classes=2)
    assert weights.tolist() == pytest.approx([1 / 4, 1 / 2])


def test_masks_and_labels_of_a_target_may_be_arrays():
    target = {"masks": np.array([[[1, 1, 0], [0, 0, 0]]], np.uint16)[:, ::-1], "labels": np.array([1])}
    weights = inverse_frequency_weights([(None, target)], num_classes=2)
    assert weights.tolist() == pytest.approx([1 / 4, 1 / 2])


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint8, torch.bool, torch.float32, torch.int64])
def test_masks_of_a_target_may_be_of_any_dtype(dtype):
    masks = torch.tensor([[[1, 1, 0], [0, 0, 0]]]).to(dtype)
    weights = inverse_frequency_weights(
        [(None, {"masks": masks, "labels": torch.tensor([1])})], num_classes=2
    )
    assert weights.tolist() == pytest.approx([1 / 4, 1 / 2])


def test_arrays_of_objects_raise():
    with pytest.raises(TypeError, match="arrays of numbers, not ndarray of object"):
        inverse_frequency_weights([np.array([[0, 1]], dtype=object)], num_classes=2)
