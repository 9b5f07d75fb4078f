"""Augmentation by torchvision.transforms.v2, with masks that stay polygons and RLEs.

v2's transforms look at tensors only and dispatch on their type, so `EncodedMasks` goes through them inside a
tensor subclass with kernels of its own. Where there is no exact kernel, a sample is augmented in pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from maskloss.masks.encoded import EncodedMasks

Target = dict[str, Any]
Transforms = Callable[..., Any]


def augmentation(*, horizontal_flip: float, photometric_distortion: float) -> v2.Transform:
    """Augment as the reference recipes do; sizes are jittered by the model's own `min_size`.

    Args:
        horizontal_flip: probability in [0, 1].
        photometric_distortion: probability in [0, 1] of each change of brightness, contrast, saturation and hue.
    """
    return v2.Compose(
        [
            v2.RandomHorizontalFlip(horizontal_flip),
            *([v2.RandomPhotometricDistort(p=photometric_distortion)] if photometric_distortion else []),
        ]
    )


def augmented(transforms: Transforms, image: Tensor, target: Target, seed: int) -> tuple[Tensor, Target]:
    """Put one sample through transforms.

    Flips, resizing, jitter of the scale, crops, padding with nothing and changes of colour keep masks encoded
    and exact. For others, such as a rotation, and where objects are dropped on the way, masks become
    (G, H, W) uint8.

    Args:
        transforms: of torchvision.transforms.v2, called with the image and the target. A transform of one's own
            is to treat masks as v2's do, by the functions of `v2.functional`.
        image: (3, H, W) uint8.
        target: boxes (G, 4) xyxy in px, labels (G,), masks `EncodedMasks`, and whatever else.
        seed: of all that the transforms draw from torch's generator, which is left as it was.

    Returns:
        The image and a new target, without objects whose boxes were pushed out of the image.
    """
    masks = target["masks"]
    try:
        pixels, changed = _drawn(transforms, image, {**target, "masks": _Encoded.of(masks)}, seed)
        carrier = changed["masks"]
        if not isinstance(carrier, _Encoded) or len(carrier.masks) != len(changed["boxes"]):
            raise _NeedsPixels
        changed["masks"] = carrier.masks
    except _NeedsPixels:
        dense = tv_tensors.Mask(masks.bitmaps())
        pixels, changed = _drawn(transforms, image, {**target, "masks": dense}, seed)
        changed["masks"] = changed["masks"].as_subclass(Tensor)
    boxes = functional.clamp_bounding_boxes(changed["boxes"]).as_subclass(Tensor)
    kept = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
    if kept.all():
        return pixels, {**changed, "boxes": boxes}
    parts = {"boxes": boxes, "labels": changed["labels"], "masks": changed["masks"]}
    if "has_mask" in changed:
        parts["has_mask"] = changed["has_mask"]
    return pixels, {**changed, **{name: part[kept] for name, part in parts.items()}}


def _drawn(transforms: Transforms, image: Tensor, target: Target, seed: int) -> tuple[Tensor, Target]:
    size = (image.shape[-2], image.shape[-1])
    boxes = {
        key: tv_tensors.BoundingBoxes(target[key], format="XYXY", canvas_size=size)
        for key in ("boxes", "ignore_boxes")
        if key in target
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        changed_image, changed = transforms(tv_tensors.Image(image), {**target, **boxes})
    if "ignore_boxes" in changed:
        ignored = functional.clamp_bounding_boxes(changed["ignore_boxes"]).as_subclass(Tensor)
        changed["ignore_boxes"] = ignored[(ignored[:, 2:] > ignored[:, :2]).all(dim=1)]
    return changed_image.as_subclass(Tensor), dict(changed)


class _NeedsPixels(Exception):
    """A transform has no exact counterpart for encoded masks."""


class _Encoded(tv_tensors.TVTensor):
    """`EncodedMasks` in the clothes of a tensor."""

    masks: EncodedMasks

    @classmethod
    def of(cls, masks: EncodedMasks) -> _Encoded:
        carrier = torch.empty(0).as_subclass(cls)
        carrier.masks = masks
        return carrier


def _horizontal_flip(carrier: _Encoded) -> _Encoded:
    return _Encoded.of(carrier.masks.horizontal_flip())


def _resize(carrier: _Encoded, size: Any, max_size: Any = None, **_: Any) -> _Encoded:
    # torchvision's own rule for the new size, on a tensor without memory.
    blank = torch.empty(carrier.masks.shape[1:], device="meta")[None]
    height, width = functional.resize_mask(blank, size=size, max_size=max_size).shape[-2:]
    return _Encoded.of(carrier.masks.resize(height, width))


def _crop(carrier: _Encoded, top: int, left: int, height: int, width: int) -> _Encoded:
    try:
        return _Encoded.of(carrier.masks.crop(top, left, height, width))
    except ValueError:
        raise _NeedsPixels from None


def _resized_crop(
    carrier: _Encoded, top: int, left: int, height: int, width: int, size: Any, **_: Any
) -> _Encoded:
    return _resize(_crop(carrier, top, left, height, width), size)


def _pad(carrier: _Encoded, padding: Any, fill: Any = None, padding_mode: str = "constant") -> _Encoded:
    if padding_mode != "constant" or fill not in (None, 0):
        raise _NeedsPixels
    sides = [padding] if isinstance(padding, int) else list(padding)
    left, top, right, bottom = (sides * 4)[:4]  # of one, two (x and y) or four numbers
    _, height, width = carrier.masks.shape
    return _crop(carrier, -top, -left, top + height + bottom, left + width + right)


def _refuse(carrier: _Encoded, *_: Any, **__: Any) -> NoReturn:
    raise _NeedsPixels


def _register() -> None:
    exact = {
        "horizontal_flip": _horizontal_flip,
        "resize": _resize,
        "crop": _crop,
        "resized_crop": _resized_crop,
        "pad": _pad,
        "to_dtype": lambda carrier, *_, **__: carrier,
    }
    # v2 passes by a type that has no kernel; so whatever changes masks gets one, also what is yet to come.
    changing = [name.removesuffix("_mask") for name in dir(functional) if name.endswith("_mask")]
    for name in {*changing, *exact}:
        functional.register_kernel(getattr(functional, name), _Encoded)(exact.get(name, _refuse))


_register()
