"""Inputs on which stock torchvision trains have the same losses here; inputs on which it trains wrongly raise.

The reference is a stock model with the same weights and the same random numbers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.ops import box_convert

import maskloss

from .small_models import batch, tiny_faster_rcnn, tiny_mask_rcnn, training_pass

Target = dict[str, Any]


def changed(name: str, make: Callable[[Any], Any]) -> Callable[[Target], None]:
    def change(target: Target) -> None:
        target[name] = make(target[name])

    return change


def both(*changes: Callable[[Target], None]) -> Callable[[Target], None]:
    def change(target: Target) -> None:
        for one in changes:
            one(target)

    return change


def over_the_border(target: Target) -> None:
    target["boxes"][0] = torch.tensor([-7.5, -3.0, 30.0, 40.0])
    target["boxes"][1] = torch.tensor([25.0, 20.0, 95.0, 90.0])


STOCK_TRAINS_ON: dict[str, Callable[[Target], None]] = {
    **{
        f"masks {dtype}": changed("masks", lambda v, dtype=dtype: v.to(dtype))
        for dtype in (torch.bool, torch.int8, torch.int16, torch.int32, torch.int64)
    },
    **{
        f"masks {dtype}": changed("masks", lambda v, dtype=dtype: v.to(dtype))
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    },
    "masks as tv_tensors": changed("masks", tv_tensors.Mask),
    **{
        f"boxes {dtype}": changed("boxes", lambda v, dtype=dtype: v.to(dtype))
        for dtype in (torch.int16, torch.int32, torch.int64, torch.float64, torch.float16)
    },
    "boxes as tv_tensors": changed(
        "boxes", lambda v: tv_tensors.BoundingBoxes(v, format="XYXY", canvas_size=(64, 80))
    ),
    "boxes over the border": over_the_border,
    "more fields": lambda target: target.update(area=torch.ones(2), iscrowd=torch.zeros(2), note="x"),
    "masks that are not contiguous": changed(
        "masks", lambda v: v.transpose(1, 2).contiguous().transpose(1, 2)
    ),
}


@pytest.mark.filterwarnings("ignore:image 0 of the batch")
@pytest.mark.parametrize("case", STOCK_TRAINS_ON)
def test_inputs_that_stock_trains_on_have_the_same_losses_and_gradients(case):
    images, targets = batch()
    STOCK_TRAINS_ON[case](targets[0])
    expected, gradients = training_pass(tiny_mask_rcnn(), images, targets)
    losses, own_gradients = training_pass(maskloss.convert(tiny_mask_rcnn()), images, targets)
    for key, value in expected.items():
        assert losses[key].item() == pytest.approx(value.item(), rel=1e-6), key
    for name, gradient in gradients.items():
        assert (own_gradients[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_a_batch_in_one_tensor_trains():
    images, targets = batch(1)
    expected, _ = training_pass(tiny_mask_rcnn(), torch.stack(images), targets)
    losses, _ = training_pass(maskloss.convert(tiny_mask_rcnn()), torch.stack(images), targets)
    assert losses["loss_mask"].item() == pytest.approx(expected["loss_mask"].item(), rel=1e-6)


@pytest.mark.parametrize("shape", [(0,), (0, 4), (0, 5), (0, 1, 4), (0, 0)])
def test_boxes_of_no_object_may_have_any_shape(shape):
    images, targets = batch()
    empty = {"boxes": torch.zeros((0, 4)), "labels": torch.zeros(0, dtype=torch.int64)}
    masks = torch.zeros((0, *images[0].shape[1:]), dtype=torch.uint8)
    expected, _ = training_pass(tiny_mask_rcnn(), images, [{**empty, "masks": masks}, targets[1]])
    odd = {"boxes": torch.zeros(shape), "labels": torch.tensor([]), "masks": torch.tensor([])}
    losses, _ = training_pass(maskloss.convert(tiny_mask_rcnn()), images, [odd, targets[1]])
    for key, value in expected.items():
        assert losses[key].item() == pytest.approx(value.item(), rel=1e-6), key


def test_boxes_over_the_border_warn_once_and_name_the_image():
    images, targets = batch()
    over_the_border(targets[1])
    model = maskloss.convert(tiny_mask_rcnn()).train()
    with pytest.warns(
        UserWarning, match=r"image 1 of the batch \(image_id 41\), boxes: boxes reach outside.*72 x 72"
    ):
        model(images, targets)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(images, targets)


# Images.


BAD_IMAGES: dict[str, tuple[Callable[[Tensor], Any], type[Exception], str]] = {
    "in 0..255": (
        lambda v: v * 255,
        ValueError,
        r"the pixels are not approximately in \[0, 1\].*divide.*by 255",
    ),
    "in 0..255, half": (
        lambda v: (v * 255).half(),
        ValueError,
        r"the pixels are not approximately in \[0, 1\]",
    ),
    "normalized before": (lambda v: (v - 0.45) / 0.225, ValueError, "do not normalize images"),
    "with an outlier": (
        lambda v: v.index_fill(1, torch.tensor([3]), 5.5),
        ValueError,
        r"image_mean and image_std, .* already \(they are from .* to 5\.5\)$",
    ),
    "with NaN": (
        lambda v: v.masked_fill(v > 0.99, torch.nan),
        ValueError,
        "the pixels are not approximately in",
    ),
    "uint8": (
        lambda v: (v * 255).byte(),
        TypeError,
        r"expected a float tensor in \[0, 1\], got torch\.uint8",
    ),
    "one channel": (lambda v: v[:1], ValueError, r"expected \(3, H, W\), got shape \(1, .*gray.*expand"),
    "four channels": (lambda v: torch.cat([v, v[:1]]), ValueError, r"got shape \(4, .*alpha.*image\[:3\]"),
    "HWC": (lambda v: v.permute(1, 2, 0), ValueError, r"\(H, W, 3\), use image\.permute\(2, 0, 1\)"),
    "two axes": (lambda v: v[0], ValueError, r"expected a tensor \(3, H, W\), got shape"),
    "a batch of one": (lambda v: v[None], ValueError, r"expected a tensor \(3, H, W\), got shape"),
    "no pixel": (lambda v: v[:, :0], ValueError, r"expected a tensor \(3, H, W\), got shape"),
    "PIL": (lambda v: Image.new("RGB", (80, 64)), TypeError, r"expected a float tensor .* got PIL\.Image"),
    "numpy": (lambda v: v.numpy(), TypeError, r"expected a float tensor .* got numpy\.ndarray"),
    "a line": (lambda v: v[:, :1].repeat(1, 1, 30), ValueError, r"1 x 2160 px.*a shorter side of 0 px"),
}


@pytest.mark.parametrize("case", BAD_IMAGES)
def test_images_that_would_train_wrongly_raise(case):
    make, error, message = BAD_IMAGES[case]
    images, targets = batch()
    model = maskloss.convert(tiny_mask_rcnn()).train()
    with pytest.raises(error, match=rf"^image 1 of the batch \(image_id 41\): .*{message}"):
        model([images[0], make(images[1])], targets)


def test_pixels_slightly_outside_the_range_pass():
    images, targets = batch()
    noisy = [
        image + 0.2 * torch.randn(image.shape, generator=torch.Generator().manual_seed(0)) for image in images
    ]
    training_pass(maskloss.convert(tiny_mask_rcnn()), noisy, targets)


def test_a_model_without_normalization_accepts_any_pixels():
    # Users who normalize by themselves set mean 0 and standard deviation 1.
    model = tiny_mask_rcnn()
    model.transform.image_mean, model.transform.image_std = [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]
    images, targets = batch()
    training_pass(maskloss.convert(model), [(image - 0.45) / 0.2 for image in images], targets)


def test_a_transform_with_a_normalization_of_its_own_accepts_any_pixels():
    images, targets = batch()
    images = [
        torch.cat([image, image[:1]]) * 1000 for image in images
    ]  # four channels, of another instrument
    losses = []
    for model in (tiny_mask_rcnn(), maskloss.convert(tiny_mask_rcnn())):
        model.transform.normalize = lambda image: image[:3] / 1000
        losses.append(training_pass(model, images, targets)[0])
    assert losses[1]["loss_mask"].item() == pytest.approx(losses[0]["loss_mask"].item(), rel=1e-6)


def test_a_transform_with_a_resizing_of_its_own_accepts_any_size():
    # torchvision's resizing would leave a shorter side of 0 px.
    image = torch.rand(3, 1, 2160)
    target = {
        "boxes": torch.tensor([[3.0, 0.0, 30.0, 1.0]]),
        "labels": torch.tensor([1]),
        "masks": torch.ones(1, 1, 2160),
    }
    model = maskloss.convert(tiny_mask_rcnn()).train()
    with pytest.raises(ValueError, match="a shorter side of 0 px"):
        model([image], [target])

    def resize(image: Tensor, target: Any = None) -> Any:
        ones = torch.ones(1, 64, 64, dtype=torch.uint8)
        return torch.rand(3, 64, 64), {
            **target,
            "boxes": torch.tensor([[3.0, 3.0, 30.0, 30.0]]),
            "masks": ones,
        }

    model.transform.resize = resize
    model([image], [target])


def test_a_model_for_images_in_0_to_255_accepts_them():
    # Caffe's weights: a mean of 103 to 123 and a standard deviation of 1.
    model = tiny_mask_rcnn()
    model.transform.image_mean, model.transform.image_std = [103.5, 116.3, 123.7], [57.4, 57.1, 58.4]
    images, targets = batch()
    training_pass(maskloss.convert(model), [image * 255 for image in images], targets)


def test_bounding_boxes_in_another_format_raise():
    images, targets = batch()
    boxes = tv_tensors.BoundingBoxes(
        box_convert(targets[1]["boxes"], "xyxy", "xywh"), format="XYWH", canvas_size=(72, 72)
    )
    targets[1]["boxes"] = boxes
    model = maskloss.convert(tiny_faster_rcnn()).train()
    with pytest.raises(
        ValueError,
        match=r"boxes: BoundingBoxes have the format XYWH, but the model needs XYXY; .*ConvertBound",
    ):
        model(images, targets)


# Types of errors.


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda images, targets: targets[0].update(boxes=[[0, 0, 1, 1]]), TypeError),
        (lambda images, targets: targets[0].update(boxes=torch.zeros(2, 5)), ValueError),
        (lambda images, targets: targets[0]["boxes"][0].fill_(3), ValueError),
    ],
    ids=["a list", "another shape", "no area"],
)
def test_errors_are_assertion_errors_where_torchvision_raises_one(change, error):
    images, targets = batch()
    change(images, targets)
    with pytest.raises(AssertionError):
        tiny_mask_rcnn().train()(images, targets)
    model = maskloss.convert(tiny_mask_rcnn()).train()
    with pytest.raises(error) as raised:
        model(images, targets)
    assert isinstance(raised.value, AssertionError)


@pytest.mark.parametrize(
    "targets",
    [{"boxes": torch.zeros(0, 4)}, "ab", [1, 2], iter([])],
    ids=["a dict", "a string", "numbers", "an iterator"],
)
def test_targets_that_are_not_a_list_of_dicts_raise(targets):
    images, _ = batch()
    model = maskloss.convert(tiny_mask_rcnn()).train()
    with pytest.raises(TypeError, match="dict"):
        model(images, targets)


def test_one_image_that_is_no_list_raises():
    images, targets = batch()
    model = maskloss.convert(tiny_mask_rcnn())
    for call in (model.train(), lambda *args: maskloss.losses_and_detections(model, *args)):
        with pytest.raises(ValueError, match=r"^images: expected a list .* \(3, 64, 80\); pass \[image\]"):
            call(images[0], targets[:1])


def test_missing_targets_raise_an_assertion_error_too():
    images, _ = batch()
    for model in (tiny_mask_rcnn(), maskloss.convert(tiny_mask_rcnn())):
        with pytest.raises(AssertionError):
            model.train()(images)


def test_inference_accepts_the_inputs_that_stock_accepts():
    # Gray images are broadcast, and there are no targets to validate.
    gray = [torch.rand(1, 64, 80, generator=torch.Generator().manual_seed(0))]
    model: nn.Module = tiny_mask_rcnn().eval()
    with torch.no_grad():
        expected = model(gray)
        found = maskloss.convert(model)(gray)
    assert torch.equal(found[0]["boxes"], expected[0]["boxes"])
