"""maskloss/data/tv_tensors.py: masks, points and regions move as torchvision moves their pixels and boxes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from maskloss.data.augmentation import augmented
from maskloss.data.tv_tensors import Bitmaps, Encoded, NeedsPixels, Points, Regions, plain
from maskloss.masks.encoded import EncodedMasks
from tests.data.scenes import (
    HEIGHT,
    LARGE_SCALE_JITTER,
    WIDTH,
    extents,
    full_target,
    overlap,
    scene,
    squares,
    two_squares,
)

RESIZING = {"resize", "random resize", "shorter side", "scale jitter", "resized crop", "large-scale jitter"}
EXACT = {
    "flip": v2.RandomHorizontalFlip(1.0),
    "resize": v2.Resize((150, 120)),
    "shorter side": v2.RandomShortestSize([70, 110], max_size=140),
    "scale jitter": v2.ScaleJitter((120, 120), (0.5, 1.5)),
    "vertical flip": v2.RandomVerticalFlip(1.0),
    "both flips": v2.Compose([v2.RandomVerticalFlip(1.0), v2.RandomHorizontalFlip(1.0)]),
    "center crop": v2.CenterCrop((60, 70)),
    "center crop of an odd size": v2.CenterCrop((61, 71)),
    "center crop that pads": v2.CenterCrop((111, 90)),
    "random resize": v2.RandomResize(80, 150),
    "crop": v2.RandomCrop((64, 80)),
    "crop with padding": v2.RandomCrop((110, 110), pad_if_needed=True),
    "zoom out": v2.RandomZoomOut(p=1.0, side_range=(1.2, 2.0)),
    "pad": v2.Pad([3, 5, 7, 11]),
    "pad x and y": v2.Pad([3, 5]),
    "IoU crop": v2.RandomIoUCrop(min_scale=0.6, trials=20),
    "resized crop": v2.RandomResizedCrop((90, 70), scale=(0.5, 1.0)),
    "large-scale jitter": LARGE_SCALE_JITTER,
    "in floats": v2.Compose([v2.RandomHorizontalFlip(1.0), v2.ToDtype(torch.float32, scale=True)]),
}


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("seed", range(5))
def test_masks_stay_encoded_and_move_as_their_pixels_do(name: str, seed: int) -> None:
    image, target = scene()
    dense = {**target, "masks": tv_tensors.Mask(target["masks"].bitmaps())}
    dense["boxes"] = tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=(HEIGHT, WIDTH))
    torch.manual_seed(seed)
    expected_image, expected = EXACT[name](tv_tensors.Image(image), dense)
    result, moved = augmented(EXACT[name], image, target, seed)
    assert torch.equal(result, expected_image)
    kept = [label - 1 for label in moved["labels"].tolist()]
    assert torch.equal(moved["boxes"], expected["boxes"][kept].as_subclass(Tensor))
    assert isinstance(moved["masks"], EncodedMasks)
    assert moved["masks"].shape == (len(kept), *result.shape[-2:])
    pixels = expected["masks"][kept].bool()
    # Objects have sides of 20 to 50 px. Resizing shifts their edges by up to 1 px; other transforms differ only at
    # slanted edges.
    large = pixels.sum(dim=(1, 2)) >= 400
    ious = overlap(moved["masks"].bitmaps().bool(), pixels)[large]
    assert (ious > (0.8 if name in RESIZING else 0.96)).all()


class CutAndGrow(v2.Transform):
    """Crop, and then pad to the original size: what was cropped must not come back."""

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return functional.pad(functional.crop(inpt, 0, 0, HEIGHT, 40), [0, 0, WIDTH - 40, 0])


IN_PIXELS = {
    "rotation": v2.RandomRotation((20, 20)),
    "affine": v2.RandomAffine(10, translate=(0.1, 0.1)),
    "perspective": v2.RandomPerspective(p=1.0),
    "elastic": v2.ElasticTransform(),
    "crop, then pad": CutAndGrow(),
    "dropped objects": v2.Compose(
        [v2.RandomRotation((20, 20)), v2.RandomCrop((30, 30)), v2.SanitizeBoundingBoxes()]
    ),
    "flip, then rotation": v2.Compose([v2.RandomHorizontalFlip(1.0), v2.RandomRotation((20, 20))]),
}


@pytest.mark.parametrize("name", IN_PIXELS)
def test_transforms_without_an_exact_kernel_move_bitmaps_with_the_same_random_numbers(name: str) -> None:
    image, target = scene()
    dense = {**target, "masks": tv_tensors.Mask(target["masks"].bitmaps())}
    dense["boxes"] = tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=(HEIGHT, WIDTH))
    torch.manual_seed(3)
    expected_image, expected = IN_PIXELS[name](tv_tensors.Image(image), dense)
    result, moved = augmented(IN_PIXELS[name], image, target, 3)
    assert torch.equal(result, expected_image)
    kept = [expected["labels"].tolist().index(label) for label in moved["labels"].tolist()]
    assert torch.equal(moved["masks"], expected["masks"][kept])
    assert type(moved["masks"]) is Tensor


def test_flips_move_points_keypoints_and_regions_as_boxes() -> None:
    image = scene()[0]
    _, moved = augmented(v2.RandomHorizontalFlip(1.0), image, full_target(), 0)
    assert moved["points"][0].tolist() == [[WIDTH - 80, 30, 1], [WIDTH - 99, 90, 0]]
    assert moved["keypoints"][1].tolist() == [[WIDTH - 20, 30, 2], [WIDTH - 12, 38, 0]]
    assert moved["ignore_boxes"][1].tolist() == [WIDTH - 40, 0, WIDTH, 10]
    _, moved = augmented(v2.RandomVerticalFlip(1.0), image, full_target(), 0)
    assert moved["points"][0].tolist() == [[80, HEIGHT - 30, 1], [99, HEIGHT - 90, 0]]
    assert moved["masks"].bitmaps()[0].nonzero().amin(0).tolist() == [HEIGHT - 40, 70]


def test_resizing_scales_points() -> None:
    _, moved = augmented(v2.Resize((2 * HEIGHT, 3 * WIDTH)), scene()[0], full_target(), 0)
    assert moved["points"][0].tolist() == [[240, 60, 1], [297, 180, 0]]
    assert moved["keypoints"].shape == (2, 2, 3)


def test_a_rotation_moves_points() -> None:
    # A rotation by 180 degrees about the center maps each point (x, y) to (W - x, H - y).
    _, moved = augmented(v2.RandomRotation((180, 180)), scene()[0], full_target(), 0)
    expected = torch.tensor([[WIDTH - 80.0, HEIGHT - 30.0], [WIDTH - 99.0, HEIGHT - 90.0]])
    assert torch.allclose(moved["points"][0, :, :2], expected, atol=1.0)
    assert moved["masks"].shape == (2, HEIGHT, WIDTH)


FILLED = {
    "rotation": v2.RandomRotation((20, 20), fill=127),
    "rotation in three colors": v2.RandomRotation((20, 20), fill=[9, 8, 7]),
    "fill per type": v2.RandomRotation((20, 20), fill={tv_tensors.Image: 127, tv_tensors.Mask: 255}),
    "affine": v2.RandomAffine((20, 20), fill=127),
    "perspective": v2.RandomPerspective(1.0, p=1.0, fill=127),
    "elastic": v2.ElasticTransform(fill=127),
    "crop with padding": v2.RandomCrop((120, 120), padding=20, fill=127),
    "pad": v2.Pad(10, fill=127),
    "pad in three colors": v2.Pad(10, fill=(1, 2, 3)),
    "zoom out": v2.RandomZoomOut(fill=(123, 116, 103), p=1.0),
    "by position": v2.Lambda(lambda sample: functional.pad(sample, [10], 127), tv_tensors.TVTensor),
}


@pytest.mark.parametrize("name", FILLED)
@pytest.mark.parametrize("dense", [False, True])
def test_masks_are_filled_with_0_whatever_the_image_is_filled_with(name: str, dense: bool) -> None:
    image, target = two_squares()
    if dense:
        target["masks"] = target["masks"].bitmaps()
    pixels, moved = augmented(FILLED[name], image, target, 0)
    masks = moved["masks"] if isinstance(moved["masks"], Tensor) else moved["masks"].bitmaps()
    assert set(masks.unique().tolist()) == {0, 1}
    assert not torch.equal(pixels[:, :1, :1], image[:, :1, :1])  # The image was filled.
    # Two squares of 400 px², which may have moved and lost pixels; a filled mask would have more.
    assert (masks.sum(dim=(1, 2)) <= 500).all()
    assert masks.shape == (len(moved["boxes"]), *pixels.shape[-2:])


@pytest.mark.parametrize("name", ["pad in three colors", "zoom out", "pad", "crop with padding"])
def test_padding_keeps_masks_encoded_whatever_the_fill(name: str) -> None:
    _, moved = augmented(FILLED[name], *two_squares(), 0)
    assert isinstance(moved["masks"], EncodedMasks)
    assert moved["masks"].bitmaps().sum(dim=(1, 2)).tolist() == [400, 400]
    assert torch.equal(extents(moved["masks"].bitmaps()), moved["boxes"])


def test_every_function_of_v2_that_changes_masks_or_boxes_has_our_kernels() -> None:
    from torchvision.transforms.v2.functional._utils import _KERNEL_REGISTRY

    for function, kernels in _KERNEL_REGISTRY.items():
        if tv_tensors.Mask in kernels and function is not functional.get_size:
            assert {Encoded, Bitmaps} <= set(kernels), function
        if tv_tensors.BoundingBoxes in kernels and function not in (functional.get_size, functional.to_dtype):
            assert {Regions, Points} <= set(kernels), function


# Single tensors.


def encoded(count: int = 2) -> Encoded:
    masks = squares((10, 10), (60, 60), (10, 60))
    return Encoded.of(masks, torch.arange(count))


def test_encoded_masks_have_the_shape_of_their_bitmaps_without_their_memory() -> None:
    masks = encoded()
    assert masks.shape == (2, 100, 100)
    assert len(masks) == 2
    assert (masks.ndim, masks.numel(), masks.dtype) == (3, 20_000, torch.uint8)
    assert plain(masks).untyped_storage().nbytes() == 1
    assert type(plain(masks)) is Tensor


@pytest.mark.parametrize(
    "read",
    [
        lambda masks: masks.sum(),
        lambda masks: masks + 1,
        lambda masks: masks[0],
        lambda masks: masks[:, :50],
        lambda masks: masks.float(),
        lambda masks: masks.to(torch.bool),
        lambda masks: masks.clone(),
        lambda masks: masks.tolist(),
        lambda masks: torch.stack([masks, masks]),
    ],
)
def test_reading_the_pixels_of_encoded_masks_raises(read: Any) -> None:
    with pytest.raises(NeedsPixels):
        read(encoded())


INDICES = [
    slice(1, None),
    [1],
    torch.tensor([1]),
    torch.tensor([False, True]),
    (torch.tensor([False, True]), slice(None)),
]


@pytest.mark.parametrize("index", INDICES, ids=str)
def test_selected_rows_keep_their_type_and_their_objects(index: Any) -> None:
    selected = encoded()[index]
    assert isinstance(selected, Encoded)
    assert selected.rows.tolist() == [1]
    assert selected.shape == (1, 100, 100)
    bitmaps = Bitmaps.of(torch.arange(8).reshape(2, 2, 2), torch.tensor([4, 7]))[index]
    assert isinstance(bitmaps, Bitmaps)
    assert bitmaps.rows.tolist() == [7]
    assert plain(bitmaps).tolist() == [[[4, 5], [6, 7]]]
    points = Points.of(torch.tensor([[[1.0, 2, 1]], [[3.0, 4, 0]]]), (9, 9))[index]
    assert isinstance(points, Points)
    assert points.canvas_size == (9, 9)
    assert plain(points).tolist() == [[[3, 4, 0]]]
    regions = Regions.of(torch.tensor([[1.0, 2, 3, 4], [5.0, 6, 7, 8]]), (9, 9))[index]
    assert isinstance(regions, Regions)
    assert plain(regions).tolist() == [[5, 6, 7, 8]]


def test_a_conversion_to_a_plain_tensor_keeps_the_type() -> None:
    points = Points.of(torch.zeros(1, 2), (9, 9))
    assert points.as_subclass(Tensor) is points
    assert v2.ToPureTensor()(points) is points


# Points and regions by hand, in an image of 9 x 20 px (height x width).


@pytest.mark.parametrize(
    ("function", "x", "y", "size"),
    [
        (functional.horizontal_flip, 17, 2, (9, 20)),
        (functional.vertical_flip, 3, 7, (9, 20)),
        (lambda p: functional.crop(p, 1, 2, 5, 6), 1, 1, (5, 6)),
        # Points outside the image stay outside.
        (lambda p: functional.crop(p, 4, 5, 5, 6), -2, -2, (5, 6)),
        (lambda p: functional.pad(p, [1, 2, 3, 4]), 4, 4, (15, 24)),
        (lambda p: functional.resize(p, [18, 60]), 9, 4, (18, 60)),
    ],
)
def test_points_move_and_keep_their_other_values(function: Any, x: float, y: float, size: Any) -> None:
    moved = function(Points.of(torch.tensor([[[3.0, 2.0, -1.0, 7.0]]], dtype=torch.float64), (9, 20)))
    assert isinstance(moved, Points)
    assert moved.canvas_size == size
    assert moved.dtype == torch.float64
    assert plain(moved).tolist() == [[[x, y, -1, 7]]]


def test_regions_move_as_boxes_and_no_transform_takes_them_for_the_objects() -> None:
    regions = Regions.of(torch.tensor([[3.0, 2.0, 7.0, 5.0]]), (9, 20))
    assert not isinstance(regions, tv_tensors.BoundingBoxes)
    flipped = functional.horizontal_flip(regions)
    assert isinstance(flipped, Regions)
    assert plain(flipped).tolist() == [[13, 2, 17, 5]]
    cropped = functional.crop(regions, 3, 4, 5, 10)
    assert cropped.canvas_size == (5, 10)
    assert plain(cropped).tolist() == [[0, 0, 3, 2]]


# Kernels of encoded masks.


@pytest.mark.parametrize(
    "function",
    [
        functional.horizontal_flip,
        functional.vertical_flip,
        lambda masks: functional.crop(masks, 5, 8, 40, 50),
        lambda masks: functional.center_crop(masks, 61),
        lambda masks: functional.center_crop(masks, [30]),
        lambda masks: functional.center_crop(masks, [121, 77]),
        lambda masks: functional.pad(masks, 3),
        lambda masks: functional.pad(masks, [3]),
        lambda masks: functional.pad(masks, [1, 2]),
        lambda masks: functional.pad(masks, [1, 2, 3, 4], fill=9),
        lambda masks: functional.resize(masks, [200, 300]),
        lambda masks: functional.resize(masks, [200]),
        lambda masks: functional.resized_crop(masks, 10, 20, 50, 50, [100, 100]),
    ],
)
def test_kernels_of_encoded_masks_equal_torchvisions_of_bitmaps(function: Any) -> None:
    masks = encoded(3)
    moved = function(masks)
    assert isinstance(moved, Encoded)
    bitmaps = function(tv_tensors.Mask(masks.masks.bitmaps()))
    # torchvision pads with 9 if asked to, which is no object. Edges at whole pixels stay at whole pixels.
    assert torch.equal(moved.masks.bitmaps() == 1, bitmaps.as_subclass(Tensor) == 1)
    assert moved.shape == bitmaps.shape


@pytest.mark.parametrize(
    "function",
    [
        lambda masks: functional.rotate(masks, 20),
        lambda masks: functional.pad(masks, 3, padding_mode="reflect"),
        lambda masks: functional.pad(functional.crop(masks, 0, 0, 40, 40), 5),
    ],
)
def test_kernels_that_are_not_exact_raise(function: Any) -> None:
    with pytest.raises(NeedsPixels):
        function(encoded())


@pytest.mark.parametrize(
    "function",
    [
        lambda m: functional.rotate(m, 45, fill=7),
        lambda m: functional.pad(m, [1], 7),
        lambda m: functional.pad(m, 1),
    ],
)
def test_bitmaps_are_filled_with_0_and_keep_their_rows(function: Any) -> None:
    bitmaps = Bitmaps.of(torch.ones(2, 9, 9, dtype=torch.uint8), torch.tensor([5, 3]))
    moved = function(bitmaps)
    assert isinstance(moved, Bitmaps)
    assert moved.rows.tolist() == [5, 3]
    assert plain(moved)[:, 0, 0].tolist() == [0, 0]
    assert plain(moved).unique().tolist() == [0, 1]


def test_a_conversion_of_dtypes_leaves_masks_unchanged() -> None:
    masks, bitmaps = encoded(), Bitmaps.of(torch.ones(1, 2, 2), torch.tensor([0]))
    for kind in (masks, bitmaps):
        assert functional.to_dtype(kind, torch.float32, scale=True) is kind
