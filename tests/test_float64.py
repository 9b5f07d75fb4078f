"""Apple's MPS devices have no float64: nothing may become float64 before it is on the host."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import maskloss
from maskloss import EncodedMasks
from maskloss.detection.box_format import box_format_hint
from maskloss.losses import inverse_frequency_weights
from tests.detection.small_models import batch, tiny_mask_rcnn


class WithoutFloat64(torch.Tensor):
    """A tensor on a simulated device without float64, until it is copied to the host."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        asked = [*args[1:], *kwargs.values()]
        if func is torch.Tensor.double or any(value is torch.float64 for value in asked):
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        if func is torch.Tensor.cpu or any(
            isinstance(value, str | torch.device) and str(value) == "cpu" for value in asked
        ):
            return args[0].as_subclass(torch.Tensor)
        return super().__torch_function__(func, types, args, kwargs)


def there(values: Any) -> Any:
    """Put tensors, also those in lists, tuples and dicts, on the simulated device."""
    if isinstance(values, dict):
        return {key: there(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return type(values)(there(value) for value in values)
    return values.as_subclass(WithoutFloat64) if isinstance(values, Tensor) else values


BOXES = torch.tensor([[5.0, 5.0, 40.0, 30.0], [7.5, 2.0, 9.0, 30.5]])
MASKS = torch.zeros(2, 40, 50, dtype=torch.bool)
MASKS[0, 5:30, 5:40] = True
MASKS[1, 3:9, 7:20] = True
POLYGONS = EncodedMasks([[[5, 5, 40, 5, 40, 30, 5, 30]], [[7, 3, 20, 3, 20, 9, 7, 9]]], 40, 50)
GRIDS = torch.rand(2, 7, 7, generator=torch.Generator().manual_seed(0))


def test_the_simulated_device_has_no_float64() -> None:
    for convert in (Tensor.double, lambda tensor: tensor.to(torch.float64)):
        with pytest.raises(TypeError, match="float64"):
            convert(there(BOXES))


@pytest.mark.parametrize("output", ["bool", "float", "rle"])
def test_pasted_masks(output: Any) -> None:
    expected = maskloss.paste_masks(GRIDS, BOXES, (40, 50), output=output)
    found = maskloss.paste_masks(there(GRIDS), there(BOXES), (40, 50), output=output)
    assert found == expected if output == "rle" else torch.equal(found, expected)


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("masks", [MASKS, MASKS.to(torch.uint8), POLYGONS], ids=["bool", "uint8", "polygons"])
def test_mask_targets(masks: Any, aligned: bool, binary: bool) -> None:
    matched_idxs = torch.tensor([0, 1])
    expected = maskloss.mask_targets(masks, BOXES, matched_idxs, 7, aligned=aligned, binary=binary)
    found = maskloss.mask_targets(
        there(masks), there(BOXES), there(matched_idxs), 7, aligned=aligned, binary=binary
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_class_weights() -> None:
    target = {"masks": MASKS, "labels": torch.tensor([1, 2])}
    image = torch.zeros(3, 40, 50)
    expected = inverse_frequency_weights([(image, target)], num_classes=3)
    torch.testing.assert_close(inverse_frequency_weights([there((image, target))], num_classes=3), expected)
    classes = MASKS.any(dim=0).long()
    expected = inverse_frequency_weights([classes], num_classes=2)
    torch.testing.assert_close(inverse_frequency_weights([there(classes)], num_classes=2), expected)


def test_the_hint_about_box_formats() -> None:
    boxes = torch.tensor([[5.0, 5.0, 35.0, 25.0], [7.0, 3.0, 13.0, 6.0]])
    target = {"boxes": boxes, "masks": MASKS}
    hint = box_format_hint(torch.zeros(3, 40, 50), target)
    assert hint is not None
    assert box_format_hint(torch.zeros(3, 40, 50), there(target)) == hint


def test_results() -> None:
    detection = {
        "boxes": BOXES,
        "labels": torch.tensor([1, 2]),
        "scores": torch.tensor([0.5, 0.7]),
        "masks": GRIDS[:, None],
    }
    model = maskloss.convert(tiny_mask_rcnn(), paste=None)
    expected = maskloss.coco_results(model, [detection], [(40, 50)], [1])
    assert maskloss.coco_results(model, [there(detection)], [(40, 50)], [1]) == expected


def test_losses_of_a_converted_model() -> None:
    images, targets = batch()
    model = maskloss.convert(tiny_mask_rcnn())
    torch.manual_seed(0)
    expected = model(images, targets)
    torch.manual_seed(0)
    found = model(images, there(targets))
    for key, value in expected.items():
        torch.testing.assert_close(found[key].as_subclass(Tensor), value, rtol=0, atol=0)
