"""RCNNTransform compared with torchvision's GeneralizedRCNNTransform."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision.models.detection.transform import GeneralizedRCNNTransform

import maskloss
from benchmarks.pretended_device import counted, pretended_device, sent
from maskloss import EncodedMasks
from maskloss.detection.transform import RCNNTransform
from maskloss.masks.paste import paste_masks, unaligned_offset

from .small_models import batch, tiny_mask_rcnn, training_pass

SETTINGS: dict[str, Any] = {
    "min_size": 40,
    "max_size": 70,
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.2, 0.3, 0.4],
}


def make(kind: type[GeneralizedRCNNTransform], *, training: bool = False, **changes: Any) -> Any:
    return kind(**{**SETTINGS, **changes}).train(training)


def scene(height: int, width: int, seed: int = 0, count: int = 3) -> tuple[Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    low = torch.rand((count, 2), generator=generator) * torch.tensor([width, height]) / 2
    size = torch.rand((count, 2), generator=generator) * torch.tensor([width, height]) / 2
    return torch.rand((3, height, width), generator=generator), {
        "boxes": torch.cat([low, low + size], dim=1),
        "labels": torch.arange(1, count + 1),
        "masks": (torch.rand((count, height, width), generator=generator) > 0.5).to(torch.uint8),
        "keypoints": torch.rand((count, 4, 3), generator=generator) * height,
    }


@settings(max_examples=40)
@given(
    height=st.integers(2, 97), width=st.integers(2, 97), min_size=st.integers(8, 60), seed=st.integers(0, 9)
)
def test_masks_of_any_size_are_resized_as_torchvision_resizes_them(height, width, min_size, seed):
    image, target = scene(height, width, seed)
    stock = make(GeneralizedRCNNTransform, min_size=min_size)
    expected_images, [expected] = stock([image], [target])
    images, [resized] = make(RCNNTransform, min_size=min_size)([image], [target])
    assert torch.equal(images.tensors, expected_images.tensors)
    assert resized.keys() == expected.keys()
    for field in expected:
        assert resized[field].dtype == expected[field].dtype, field
        assert torch.equal(resized[field], expected[field]), field


def test_bool_masks_stay_bool_and_show_torchvisions_pixels():
    image, target = scene(31, 47)
    target["masks"] = target["masks"].bool()
    _, [expected] = make(GeneralizedRCNNTransform)([image], [target])
    _, [resized] = make(RCNNTransform)([image], [target])
    assert resized["masks"].dtype == torch.bool
    assert torch.equal(resized["masks"], expected["masks"].bool())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_gpu_gets_mean_and_ratios_once_and_computes_torchvisions_values(dtype):
    image, target = scene(31, 47)
    image = image.to(dtype)
    expected_images, [expected] = make(GeneralizedRCNNTransform)([image], [target])
    transform = make(RCNNTransform)
    with pretended_device():
        there = {key: sent(value) for key, value in target.items()}
        for waits in (2, 0):
            with counted() as counts:
                images, [resized] = transform([sent(image, waits=False)], [there])
            assert counts.waits.total() == waits
    assert torch.equal(images.tensors.values, expected_images.tensors)
    for field in ("boxes", "keypoints"):
        assert torch.equal(resized[field].values, expected[field])


def test_masks_of_a_gpu_are_pasted_with_one_synchronization_and_torchvisions_values():
    detection = {
        "boxes": torch.tensor([[3.0, 4.0, 20.0, 31.0], [-2.0, 5.0, 39.0, 44.0], [7.2, 3.1, 9.9, 8.8]]),
        "masks": torch.rand(3, 1, 7, 7, generator=torch.Generator().manual_seed(0)),
        "keypoints": torch.rand(3, 4, 3) * 40,
    }
    expected = make(GeneralizedRCNNTransform).postprocess([dict(detection)], [(40, 50)], [(31, 47)])
    with pretended_device():
        there = {key: sent(value) for key, value in detection.items()}
        with counted() as counts:
            (found,) = make(RCNNTransform).postprocess([there], [(40, 50)], [(31, 47)])
    assert counts.waits.total() == 1
    for field, values in expected[0].items():
        assert torch.equal(found[field].values, values), field


def test_constants_made_in_inference_mode_are_used_in_training():
    transform = make(RCNNTransform)
    with torch.inference_mode():
        transform._mean_and_std(torch.rand(3, 4, 4))
    image = torch.rand(3, 4, 4, requires_grad=True)
    mean, std = transform._mean_and_std(image)
    ((image - mean) / std).sum().backward()
    torch.testing.assert_close(image.grad, (1 / std).expand(3, 4, 4))


def test_masks_that_have_the_right_size_are_not_copied():
    image, target = scene(40, 50)
    _, [resized] = make(RCNNTransform)([image], [target])
    assert resized["masks"].data_ptr() == target["masks"].data_ptr()


def test_random_training_sizes_equal_torchvisions():
    image, target = scene(31, 47)
    sizes = set()
    for seed in range(8):
        torch.manual_seed(seed)
        expected_images, [expected] = make(GeneralizedRCNNTransform, training=True, min_size=(20, 33, 41))(
            [image], [target]
        )
        torch.manual_seed(seed)
        images, [resized] = make(RCNNTransform, training=True, min_size=(20, 33, 41))([image], [target])
        assert images.image_sizes == expected_images.image_sizes
        assert torch.equal(resized["masks"], expected["masks"])
        sizes.add(images.image_sizes[0])
    # Otherwise all seeds selected the same size, and the test would not cover random sizes.
    assert len(sizes) == 3


@pytest.mark.parametrize("changes", [{"sync_free": (52, 36)}, {"training": True, "_skip_resize": True}])
def test_torchvisions_other_size_options_work(changes):
    image, target = scene(31, 47)
    _, [expected] = make(GeneralizedRCNNTransform, **changes)([image], [target])
    images, [resized] = make(RCNNTransform, **changes)([image], [target])
    assert resized["masks"].shape[1:] == images.image_sizes[0]
    assert torch.equal(resized["masks"], expected["masks"])
    assert torch.equal(resized["boxes"], expected["boxes"])


def test_without_a_target_only_the_image_is_resized():
    image, _ = scene(31, 47)
    images, targets = make(RCNNTransform)([image])
    expected, _ = make(GeneralizedRCNNTransform)([image])
    assert targets is None
    assert torch.equal(images.tensors, expected.tensors)


def test_a_target_without_masks_gets_none():
    image, target = scene(31, 47)
    del target["masks"]
    _, [resized] = make(RCNNTransform)([image], [target])
    assert "masks" not in resized


def test_encoded_masks_are_scaled_with_the_image():
    image, target = scene(20, 30, count=1)
    target["masks"] = EncodedMasks([[[3.0, 4.0, 12.0, 4.0, 12.0, 10.0]]], 20, 30)
    images, [resized] = make(RCNNTransform)([image], [target])
    # 20 x 30 to a short side of 40: everything is twice as large.
    assert images.image_sizes == [(40, 60)]
    assert resized["masks"].shape == (1, 40, 60)
    [polygon] = resized["masks"].polygons(0)
    assert polygon.tolist() == [[6.0, 8.0], [24.0, 8.0], [24.0, 20.0]]


def test_bfloat16_boxes_are_scaled_in_float32():
    image, target = scene(31, 47)
    rounded = target["boxes"].bfloat16()
    _, [expected] = make(GeneralizedRCNNTransform)([image], [{**target, "boxes": rounded.float()}])
    _, [resized] = make(RCNNTransform)([image], [{**target, "boxes": rounded}])
    assert resized["boxes"].dtype == torch.float32
    assert torch.equal(resized["boxes"], expected["boxes"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.int64])
def test_boxes_of_other_dtypes_are_scaled_as_torchvision_scales_them(dtype):
    image, target = scene(31, 47)
    target["boxes"] = target["boxes"].to(dtype)
    _, [expected] = make(GeneralizedRCNNTransform)([image], [target])
    _, [resized] = make(RCNNTransform)([image], [target])
    assert resized["boxes"].dtype == expected["boxes"].dtype
    assert torch.equal(resized["boxes"], expected["boxes"])


@pytest.mark.parametrize("mixed", [False, True])
def test_float16_boxes_train_with_torchvisions_numbers(mixed):
    images, targets = batch()
    for target in targets[: 1 if mixed else 2]:
        target["boxes"] = (target["boxes"] + 0.3).half()
    losses = []
    for model in (tiny_mask_rcnn(), maskloss.convert(tiny_mask_rcnn())):
        model.transform.min_size = (101,)  # so that the boxes are scaled
        losses.append(training_pass(model, images, targets)[0])
    for key, value in losses[0].items():
        torch.testing.assert_close(losses[1][key], value, rtol=1e-5, atol=1e-7)
    training_pass(maskloss.convert(tiny_mask_rcnn(), sync_free=True), images, targets)


@pytest.mark.parametrize("shape", [(0,), (0, 31, 47), (0, 1, 1), (0, 9, 9), (0, 1, 31, 47)])
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8])
def test_empty_masks_get_the_new_size(shape, dtype):
    image, target = scene(31, 47, count=0)
    target["masks"] = torch.zeros(shape, dtype=dtype)
    images, [resized] = make(RCNNTransform)([image], [target])
    assert resized["masks"].shape == (0, *images.image_sizes[0])
    assert resized["masks"].dtype == dtype


@pytest.mark.parametrize("size", [(31, 47), (200, 90), (32, 40)], ids=["enlarged", "reduced", "kept"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_masks_may_have_any_dtype(dtype, size):
    # A FasterRCNN does not need masks, so they are not even checked; torchvision accepts any dtype.
    image, target = scene(*size)
    _, [expected] = make(GeneralizedRCNNTransform)([image], [{**target, "masks": target["masks"].to(dtype)}])
    _, [resized] = make(RCNNTransform)([image], [{**target, "masks": target["masks"].to(dtype)}])
    assert torch.equal(resized["masks"], expected["masks"].to(resized["masks"].dtype))


@pytest.mark.parametrize("call", ["forward", "resize"])
def test_the_callers_target_is_not_modified(call):
    image, target = scene(31, 47)
    before = copy.deepcopy(target)
    transform = make(RCNNTransform)
    if call == "forward":
        transform([image], [target])
    else:
        transform.resize(image, target)
    assert target.keys() == before.keys()
    assert all(torch.equal(target[field], before[field]) for field in before)


# Pasting. One detection in a network input of 40 x 60, of an image of 20 x 30.

RESIZED, ORIGINAL = (40, 60), (20, 30)


def detection(probability: float = 1.0) -> list[dict[str, Tensor]]:
    return [
        {
            "boxes": torch.tensor([[4.0, 6.0, 12.0, 16.0]]),
            "labels": torch.tensor([1]),
            "scores": torch.tensor([0.9]),
            "masks": torch.full((1, 1, 28, 28), probability),
            "keypoints": torch.tensor([[[8.0, 10.0, 1.0]]]),
        }
    ]


def pasted(paste: str | None, aligned: bool = False) -> dict[str, Tensor]:
    transform = make(RCNNTransform)
    transform.paste, transform.aligned_masks = paste, aligned
    [result] = transform.postprocess(detection(), [RESIZED], [ORIGINAL])
    return result


def test_the_default_paste_equals_torchvisions():
    [expected] = make(GeneralizedRCNNTransform).postprocess(detection(), [RESIZED], [ORIGINAL])
    [result] = make(RCNNTransform).postprocess(detection(), [RESIZED], [ORIGINAL])
    assert result.keys() == expected.keys()
    assert all(torch.equal(result[field], expected[field]) for field in expected)


def test_matched_paste_of_aligned_targets_fills_the_pixels_whose_centers_are_in_the_box():
    # Halved, the box is (2, 3, 6, 8). A mask of ones fills exactly columns 2 to 5 and rows 3 to 7.
    expected = torch.zeros((1, 1, *ORIGINAL))
    expected[:, :, 3:8, 2:6] = 1
    torch.testing.assert_close(pasted("matched", aligned=True)["masks"], expected, rtol=0, atol=1e-6)


def test_matched_paste_of_unaligned_targets_undoes_their_offset():
    # Doubling needs no rounding, so masks keep torchvision's offset: half a pixel of the resized image, a quarter of
    # the original. Pixel 2 is sampled at 2.25, closer to the edge than the center of the first cell.
    transform = make(RCNNTransform)
    transform.paste = "matched"
    scores = torch.rand(1, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    [result] = transform.postprocess([{**detection()[0], "masks": scores}], [RESIZED], [ORIGINAL])
    boxes = torch.tensor([[2.0, 3.0, 6.0, 8.0]])
    expected = paste_masks(scores[0], boxes, ORIGINAL, offset=(0.25, 0.25), output="float")
    assert torch.equal(result["masks"][0], expected)
    assert not torch.equal(expected, paste_masks(scores[0], boxes, ORIGINAL, output="float"))


@pytest.mark.parametrize(
    ("image_size", "expected"),
    [
        # Shorter sides resized to 40: from 40; from 20, doubled; from 50, by 4 / 5; from 37, without a common factor.
        ((40, 60), (0.5, 0.5)),
        ((20, 30), (0.25, 0.25)),
        ((50, 50), (0.125, 0.125)),
        ((37, 55), (0.5 / 40, 0.5 / 59)),
    ],
)
def test_the_offset_of_unaligned_masks_shrinks_when_images_are_resized(image_size, expected):
    transform = make(RCNNTransform)
    images, _ = transform([torch.zeros(3, *image_size)])
    assert transform.mask_offset(image_size) == pytest.approx(expected)
    assert transform.mask_offset(image_size) == unaligned_offset(image_size, images.image_sizes[0])
    transform.aligned_masks = True
    assert transform.mask_offset(image_size) == (0, 0)


def mean_position(masks: Tensor) -> Tensor:
    """Center of mass of each mask, (G, 2) as (y, x)."""
    weights = masks.double() / masks.double().sum(dim=(1, 2), keepdim=True)
    y = (weights.sum(2) * (torch.arange(masks.shape[1]) + 0.5)).sum(1)
    x = (weights.sum(1) * (torch.arange(masks.shape[2]) + 0.5)).sum(1)
    return torch.stack([y, x], dim=1)


def squares(height: int, width: int, count: int = 60) -> Tensor:
    """Squares of 8 px anywhere, (G, H, W) uint8."""
    generator = torch.Generator().manual_seed(1)
    masks = torch.zeros(count, height, width, dtype=torch.uint8)
    for mask in masks:
        y, x = (int(torch.randint(length - 8, (1,), generator=generator)) for length in (height, width))
        mask[y : y + 8, x : x + 8] = 1
    return masks


@pytest.mark.parametrize(("height", "width"), [(31, 47), (50, 60), (20, 30), (40, 60)])
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("kind", ["bitmaps", "encoded"])
def test_resized_masks_have_the_position_that_targets_and_paste_assume(height, width, aligned, kind):
    # The mask's position after resizing, minus the half pixel of unaligned targets, is where the paste expects it.
    masks = squares(height, width)
    transform = make(RCNNTransform)
    transform.aligned_masks = aligned
    given = masks if kind == "bitmaps" else encoded_squares(masks)
    image, target = scene(height, width, count=len(masks))
    images, [resized] = transform([image], [{**target, "masks": given}])
    new_height, new_width = images.image_sizes[0]
    scale = torch.tensor([new_height / height, new_width / width], dtype=torch.float64)
    if kind == "bitmaps":
        found = mean_position(resized["masks"]) / scale
    else:
        found = (
            torch.stack(
                [
                    torch.from_numpy(resized["masks"].polygons(i)[0].mean(0)[::-1].copy())
                    for i in range(len(masks))
                ]
            )
            / scale
        )
    if not aligned:
        found = found - 0.5 / scale
    moved = (mean_position(masks) - found).mean(dim=0)
    expected = torch.tensor(transform.mask_offset((height, width)), dtype=torch.float64)
    # Rounding to pixels moves each square by up to half a pixel, but their mean by far less.
    torch.testing.assert_close(moved, expected, rtol=0, atol=0.08 if kind == "bitmaps" else 1e-9)


def encoded_squares(masks: Tensor) -> EncodedMasks:
    polygons = []
    for mask in masks:
        y, x = mask.nonzero().unbind(1)
        x1, y1, x2, y2 = int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1
        polygons.append([[x1, y1, x2, y1, x2, y2, x1, y2]])
    return EncodedMasks(polygons, *masks.shape[1:])


def test_paste_none_leaves_the_probabilities():
    result = pasted(None)
    assert torch.equal(result["masks"], torch.ones((1, 1, 28, 28)))


@pytest.mark.parametrize("paste", ["torchvision", "matched", None])
def test_boxes_and_keypoints_are_scaled_to_the_original_size(paste):
    result = pasted(paste)
    assert result["boxes"].tolist() == [[2.0, 3.0, 6.0, 8.0]]
    assert result["keypoints"].tolist() == [[[4.0, 5.0, 1.0]]]


@pytest.mark.parametrize(
    ("paste", "size"), [("torchvision", ORIGINAL), ("matched", ORIGINAL), (None, (28, 28))]
)
def test_an_image_without_detections_has_no_masks(paste, size):
    transform = make(RCNNTransform)
    transform.paste = paste
    nothing = [{field: value[:0] for field, value in detection()[0].items()}]
    [result] = transform.postprocess(nothing, [RESIZED], [ORIGINAL])
    assert result["masks"].shape == (0, 1, *size)


@pytest.mark.parametrize("paste", ["torchvision", "matched", None])
def test_detections_without_masks_get_none(paste):
    transform = make(RCNNTransform)
    transform.paste = paste
    boxes_alone = [{"boxes": detection()[0]["boxes"]}]
    [result] = transform.postprocess(boxes_alone, [RESIZED], [ORIGINAL])
    assert result.keys() == {"boxes"}


@pytest.mark.parametrize("paste", ["torchvision", "matched", None])
def test_nothing_is_pasted_in_training(paste):
    transform = make(RCNNTransform, training=True)
    transform.paste = paste
    assert transform.postprocess([], [RESIZED], [ORIGINAL]) == []


@given(
    height=st.integers(1, 3000),
    width=st.integers(1, 3000),
    min_sizes=st.lists(st.integers(1, 1500), min_size=1, max_size=3),
    longest=st.integers(1, 2000),
    fixed=st.none() | st.tuples(st.integers(1, 100), st.integers(1, 100)),
)
def test_the_mask_offset_follows_from_the_size_to_which_torchvision_resizes(
    height: int, width: int, min_sizes: list[int], longest: int, fixed: tuple[int, int] | None
) -> None:
    transform = RCNNTransform(min_sizes, longest, [0.5], [0.5], fixed_size=fixed).eval()
    # One channel without memory of its own: torchvision resizes it by its own code.
    image = torch.zeros(1, 1, 1).expand(1, height, width)
    try:
        resized, _ = GeneralizedRCNNTransform.resize(transform, image, None)
    except RuntimeError:  # a side of 0 px
        return
    expected = unaligned_offset((height, width), (resized.shape[-2], resized.shape[-1]))
    assert transform.mask_offset((height, width)) == expected


@pytest.mark.parametrize("paste", ["torchvision", "matched", None])
@pytest.mark.parametrize("modes", list(itertools.product((True, False), repeat=4)))
def test_parts_in_different_modes_return_what_torchvisions_do(modes, paste):
    images, targets = batch()

    def output(model: nn.Module) -> object:
        for part, mode in zip((model, model.transform, model.rpn, model.roi_heads), modes, strict=True):
            part.train(mode)
        torch.manual_seed(0)
        return model(images, targets)

    expected, found = output(tiny_mask_rcnn()), output(maskloss.convert(tiny_mask_rcnn(), paste=paste))
    assert type(found) is type(expected)
    assert len(found) == len(expected)
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-7)


def test_constants_given_as_tensors_are_kept_once():
    images, _ = batch()
    transform = maskloss.convert(tiny_mask_rcnn()).transform
    transform.image_mean, transform.image_std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.2, 0.3])
    with pretended_device():
        there = sent(images[0])
        for _ in range(3):
            normalized = transform.normalize(there)
    assert len(transform._constants) == 1
    own = GeneralizedRCNNTransform(8, 8, [0.4, 0.5, 0.6], [0.2, 0.2, 0.3]).normalize(images[0])
    torch.testing.assert_close(normalized.values, own)
