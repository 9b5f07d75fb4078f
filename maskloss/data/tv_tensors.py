"""Tensor subclasses of encoded masks, bitmaps, points and regions for torchvision.transforms.v2.

v2 transforms only tensors and dispatches on their type, so each class is a tensor subclass with its own kernels.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional

from maskloss.masks.encoded import EncodedMasks

Size = tuple[int, int]
_T = TypeVar("_T", bound="_Wrapper")
_C = TypeVar("_C", bound="_Coordinates")


class NeedsPixels(Exception):
    """Raised when a transform has no exact kernel for encoded masks, or reads their pixels."""


def plain(tensor: Tensor) -> Tensor:
    """Return a tensor as a plain `Tensor`, without its subclass."""
    return Tensor.as_subclass(tensor, Tensor)


class _Wrapper(tv_tensors.TVTensor):
    """A tensor that keeps its type when v2 converts it to a plain tensor or selects rows of it."""

    def _select(self: _T, index: Any) -> _T:
        """Return the rows that an index of the first dimension selects."""
        raise NotImplementedError

    def _apply(self: _T, function: Callable[..., Any], *arguments: Any, **options: Any) -> _T:
        """Return the result of a v2 function for this tensor."""
        raise NotImplementedError

    def as_subclass(self, cls: type[Any]) -> Any:
        """Return the tensor itself, so that no conversion changes its type."""
        return self

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__ and isinstance(args[0], _Wrapper):
            index = _row_index(args[1])
            if index is not None:
                return args[0]._select(index)
        return super().__torch_function__(func, types, args, kwargs)


def _row_index(index: Any) -> Any:
    """Return an index's part for the first dimension if it selects whole rows, else None."""
    first, *rest = index if isinstance(index, tuple) else (index,)
    if any(not isinstance(other, slice) or other != slice(None) for other in rest):
        return None
    if isinstance(first, Tensor):
        return first if first.ndim == 1 else None
    return first if isinstance(first, slice | list) else None


class _Coordinates(_Wrapper):
    """Coordinates in px in an image of size (H, W)."""

    canvas_size: Size

    @classmethod
    def of(cls: type[_C], coordinates: Tensor, canvas_size: Size) -> _C:
        """Wrap coordinates in px in an image of size (H, W)."""
        wrapped = plain(coordinates).as_subclass(cls)
        wrapped.canvas_size = canvas_size
        return wrapped

    def _select(self: _C, index: Any) -> _C:
        return self.of(plain(self)[index], self.canvas_size)


class Regions(_Coordinates):
    """Boxes (I, 4) xyxy in px that no transform mistakes for the objects' boxes.

    Some v2 transforms expect a single tensor of boxes, such as the IoU crop and the removal of degenerate boxes.
    """

    def _apply(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Regions:
        boxes = tv_tensors.BoundingBoxes(plain(self), format="XYXY", canvas_size=self.canvas_size)
        boxes = function(boxes, *arguments, **options)
        return Regions.of(boxes, boxes.canvas_size)


class Points(_Coordinates):
    """Points (..., 2 or more) whose first two values are x and y in px.

    Coordinates are those of pixel edges, not centers: a horizontal flip maps x to W - x.
    """

    def _apply(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Points:
        points = plain(self)
        # Points move as boxes of zero size. These are not clamped, so that points outside the image stay outside.
        boxes = tv_tensors.BoundingBoxes(
            points[..., :2].reshape(-1, 2).repeat(1, 2),
            format="XYXY",
            canvas_size=self.canvas_size,
            clamping_mode=None,
        )
        boxes = function(boxes, *arguments, **options)
        xy = plain(boxes)[:, :2].reshape(*points.shape[:-1], 2)
        return Points.of(torch.cat([xy.to(points.dtype), points[..., 2:]], dim=-1), boxes.canvas_size)


class Bitmaps(_Wrapper, tv_tensors.Mask):
    """Masks (G, H, W) that are filled with 0, whatever the fill of the image.

    Attributes:
        rows: (G,) int64, index of each object before any transform.
    """

    rows: Tensor

    @classmethod
    def of(cls, bitmaps: Tensor, rows: Tensor) -> Bitmaps:
        """Wrap masks and the indices of their objects."""
        wrapped = plain(bitmaps).as_subclass(cls)
        wrapped.rows = rows
        return wrapped

    def _select(self, index: Any) -> Bitmaps:
        return Bitmaps.of(plain(self)[index], self.rows[index])

    def _apply(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Bitmaps:
        mask = tv_tensors.Mask(plain(self))
        call = inspect.signature(function).bind(mask, *arguments, **options)
        if "fill" in call.arguments:
            call.arguments["fill"] = 0
        return Bitmaps.of(function(*call.args, **call.kwargs), self.rows)


#: Tensor methods that `Encoded` allows. All others read pixels or make another tensor.
_METADATA = ("__get__", "__len__", "__hash__", "size", "dim", "ndimension", "numel", "is_floating_point")


class Encoded(_Wrapper, tv_tensors.Mask):
    """`EncodedMasks` as a tensor with the shape of their bitmaps (G, H, W), but without pixels.

    Attributes:
        masks: masks of all objects, including those that transforms dropped.
        rows: (G,) int64, indices of the remaining objects in `masks`.
    """

    masks: EncodedMasks
    rows: Tensor

    @classmethod
    def of(cls, masks: EncodedMasks, rows: Tensor) -> Encoded:
        """Wrap the masks of all objects and the indices of the remaining ones."""
        blank = torch.zeros((), dtype=torch.uint8).expand(len(rows), masks.height, masks.width)
        wrapped = blank.as_subclass(cls)
        wrapped.masks, wrapped.rows = masks, rows
        return wrapped

    def _select(self, index: Any) -> Encoded:
        return Encoded.of(self.masks, self.rows[index])

    def with_masks(self, masks: EncodedMasks) -> Encoded:
        """Wrap other masks of the same objects."""
        return Encoded.of(masks, self.rows)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__ and _row_index(args[1]) is not None:
            return super().__torch_function__(func, types, args, kwargs)
        if func.__name__ in _METADATA:
            value = super().__torch_function__(func, types, args, kwargs)
            if not isinstance(value, Tensor):
                return value
        raise NeedsPixels


# Kernels of v2's functions. Each transforms encoded masks as torchvision's kernel of the same name transforms bitmaps.


def _horizontal_flip(encoded: Encoded) -> Encoded:
    return encoded.with_masks(encoded.masks.horizontal_flip())


def _vertical_flip(encoded: Encoded) -> Encoded:
    return encoded.with_masks(encoded.masks.vertical_flip())


def _center_crop(encoded: Encoded, output_size: Any) -> Encoded:
    """Crop the center as torchvision does: masks smaller than the crop are padded first."""
    sizes = [output_size] if isinstance(output_size, int) else list(output_size)
    height, width = (sizes * 2)[:2]
    _, own_height, own_width = encoded.masks.shape
    missing = max(height - own_height, 0), max(width - own_width, 0)
    padding = [missing[1] // 2, missing[0] // 2, (missing[1] + 1) // 2, (missing[0] + 1) // 2]
    padded = _pad(encoded, padding) if any(padding) else encoded
    _, own_height, own_width = padded.masks.shape
    top, left = round((own_height - height) / 2.0), round((own_width - width) / 2.0)
    return _crop(padded, top, left, height, width)


def _resize(encoded: Encoded, size: Any, max_size: Any = None, **_: Any) -> Encoded:
    # Let torchvision compute the new size, on a meta tensor, which needs no memory.
    blank = torch.empty(encoded.masks.shape[1:], device="meta")[None]
    height, width = functional.resize_mask(blank, size=size, max_size=max_size).shape[-2:]
    return encoded.with_masks(encoded.masks.resize(height, width))


def _crop(encoded: Encoded, top: int, left: int, height: int, width: int) -> Encoded:
    try:
        return encoded.with_masks(encoded.masks.crop(top, left, height, width))
    except ValueError:
        raise NeedsPixels from None


def _resized_crop(
    encoded: Encoded, top: int, left: int, height: int, width: int, size: Any, **_: Any
) -> Encoded:
    return _resize(_crop(encoded, top, left, height, width), size)


def _pad(encoded: Encoded, padding: Any, fill: Any = None, padding_mode: str = "constant") -> Encoded:
    """Pad masks with zeros, whatever the fill of the image."""
    if padding_mode != "constant":
        raise NeedsPixels
    sides = [padding] if isinstance(padding, int) else list(padding)
    left, top, right, bottom = (sides * 4)[:4]  # `padding` is one number, two (x and y) or four
    _, height, width = encoded.masks.shape
    return _crop(encoded, -top, -left, top + height + bottom, left + width + right)


def _refuse(encoded: Encoded, *_: Any, **__: Any) -> NoReturn:
    raise NeedsPixels


def _make_kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda wrapped, *arguments, **options: wrapped._apply(function, *arguments, **options)


def _unchanged(wrapped: Any, *_: Any, **__: Any) -> Any:
    return wrapped


def _functions(kind: str) -> dict[str, Any]:
    """Return v2's functions that have a kernel for a kind of tensor, such as "_mask", by name."""
    names = [name.removesuffix(kind) for name in dir(functional) if name.endswith(kind)]
    return {name: getattr(functional, name) for name in names if hasattr(functional, name)}


def _register() -> None:
    exact: dict[str, Callable[..., Any]] = {
        "horizontal_flip": _horizontal_flip,
        "vertical_flip": _vertical_flip,
        "center_crop": _center_crop,
        "resize": _resize,
        "crop": _crop,
        "resized_crop": _resized_crop,
        "pad": _pad,
    }
    # v2 silently leaves types without a kernel unchanged. So register one for every function that changes masks,
    # including those that future versions of torchvision add.
    for name, function in _functions("_mask").items():
        if name != "get_size":
            functional.register_kernel(function, Encoded)(exact.get(name, _refuse))
            functional.register_kernel(function, Bitmaps)(_make_kernel(function))
    for kind in (Encoded, Bitmaps):
        functional.register_kernel(functional.to_dtype, kind)(_unchanged)
    for name, function in _functions("_bounding_boxes").items():
        if name not in ("clamp", "get_size"):
            for kind in (Regions, Points):
                functional.register_kernel(function, kind)(_make_kernel(function))


_register()
