"""What moves with an image under torchvision.transforms.v2: encoded masks, bitmaps, points, and regions.

v2 looks at tensors only and dispatches on their type, so each of these is a tensor subclass with kernels of its own.
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
_T = TypeVar("_T", bound="_Companion")
_C = TypeVar("_C", bound="_OnCanvas")


class NeedsPixels(Exception):
    """A transform has no exact counterpart for encoded masks, or reads their pixels."""


def plain(tensor: Tensor) -> Tensor:
    """Return a tensor without its subclass."""
    return Tensor.as_subclass(tensor, Tensor)


class _Companion(tv_tensors.TVTensor):
    """A tensor that keeps its type where v2 makes a plain tensor of it or selects rows of it."""

    def _select(self: _T, index: Any) -> _T:
        """Return the rows that an index of the first dimension selects."""
        raise NotImplementedError

    def _moved(self: _T, function: Callable[..., Any], *arguments: Any, **options: Any) -> _T:
        """Return what a function of v2 makes of it."""
        raise NotImplementedError

    def as_subclass(self, cls: type[Any]) -> Any:
        """Return itself: it may be taken for nothing else."""
        return self

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__ and isinstance(args[0], _Companion):
            index = _row_index(args[1])
            if index is not None:
                return args[0]._select(index)
        return super().__torch_function__(func, types, args, kwargs)


def _row_index(index: Any) -> Any:
    """Return the index of the first dimension where an index selects whole rows by it, else None."""
    first, *rest = index if isinstance(index, tuple) else (index,)
    if any(not isinstance(other, slice) or other != slice(None) for other in rest):
        return None
    if isinstance(first, Tensor):
        return first if first.ndim == 1 else None
    return first if isinstance(first, slice | list) else None


class _OnCanvas(_Companion):
    """Coordinates in px of an image of a size (H, W)."""

    canvas_size: Size

    @classmethod
    def of(cls: type[_C], coordinates: Tensor, canvas_size: Size) -> _C:
        """Wrap coordinates in px of an image of a size (H, W)."""
        carrier = plain(coordinates).as_subclass(cls)
        carrier.canvas_size = canvas_size
        return carrier

    def _select(self: _C, index: Any) -> _C:
        return self.of(plain(self)[index], self.canvas_size)


class Regions(_OnCanvas):
    """Boxes (I, 4) xyxy in px that no transform takes for the objects' own.

    v2 has transforms that look for the one tensor of boxes, such as a crop by IoU or the removal of degenerate boxes.
    """

    def _moved(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Regions:
        boxes = tv_tensors.BoundingBoxes(plain(self), format="XYXY", canvas_size=self.canvas_size)
        boxes = function(boxes, *arguments, **options)
        return Regions.of(boxes, boxes.canvas_size)


class Points(_OnCanvas):
    """Points (..., 2 or more) whose first two values are x and y in px, edges not centers: W - x in a mirror."""

    def _moved(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Points:
        points = plain(self)
        # Boxes without an extent, not clamped, so that a point beyond the border stays beyond it.
        boxes = tv_tensors.BoundingBoxes(
            points[..., :2].reshape(-1, 2).repeat(1, 2),
            format="XYXY",
            canvas_size=self.canvas_size,
            clamping_mode=None,
        )
        boxes = function(boxes, *arguments, **options)
        xy = plain(boxes)[:, :2].reshape(*points.shape[:-1], 2)
        return Points.of(torch.cat([xy.to(points.dtype), points[..., 2:]], dim=-1), boxes.canvas_size)


class Bitmaps(_Companion, tv_tensors.Mask):
    """Masks (G, H, W) that are filled with 0 whatever the image is filled with.

    Attributes:
        rows: (G,) int64, the number of each object among those at the beginning.
    """

    rows: Tensor

    @classmethod
    def of(cls, bitmaps: Tensor, rows: Tensor) -> Bitmaps:
        """Wrap the masks of the objects of these numbers."""
        carrier = plain(bitmaps).as_subclass(cls)
        carrier.rows = rows
        return carrier

    def _select(self, index: Any) -> Bitmaps:
        return Bitmaps.of(plain(self)[index], self.rows[index])

    def _moved(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Bitmaps:
        mask = tv_tensors.Mask(plain(self))
        call = inspect.signature(function).bind(mask, *arguments, **options)
        if "fill" in call.arguments:
            call.arguments["fill"] = 0
        return Bitmaps.of(function(*call.args, **call.kwargs), self.rows)


#: What may be asked of encoded masks as a tensor; anything else reads pixels, or makes another tensor of them.
_METADATA = ("__get__", "__len__", "__hash__", "size", "dim", "ndimension", "numel", "is_floating_point")


class Encoded(_Companion, tv_tensors.Mask):
    """`EncodedMasks` in the clothes of a tensor of bitmaps (G, H, W), without its pixels.

    Attributes:
        masks: of all objects that there were at the beginning.
        rows: (G,) int64, the numbers of those that are left.
    """

    masks: EncodedMasks
    rows: Tensor

    @classmethod
    def of(cls, masks: EncodedMasks, rows: Tensor) -> Encoded:
        """Wrap all objects' masks and the numbers of those that are left."""
        blank = torch.zeros((), dtype=torch.uint8).expand(len(rows), masks.height, masks.width)
        carrier = blank.as_subclass(cls)
        carrier.masks, carrier.rows = masks, rows
        return carrier

    def _select(self, index: Any) -> Encoded:
        return Encoded.of(self.masks, self.rows[index])

    def with_masks(self, masks: EncodedMasks) -> Encoded:
        """Return other masks of the same objects."""
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


# Kernels of v2's functions. Each moves encoded masks as torchvision's kernel of the same name moves their pixels.


def _horizontal_flip(carrier: Encoded) -> Encoded:
    return carrier.with_masks(carrier.masks.horizontal_flip())


def _vertical_flip(carrier: Encoded) -> Encoded:
    return carrier.with_masks(carrier.masks.vertical_flip())


def _center_crop(carrier: Encoded, output_size: Any) -> Encoded:
    """Crop the center as torchvision does: what is smaller than the crop is padded first."""
    sizes = [output_size] if isinstance(output_size, int) else list(output_size)
    height, width = (sizes * 2)[:2]
    _, own_height, own_width = carrier.masks.shape
    missing = max(height - own_height, 0), max(width - own_width, 0)
    padding = [missing[1] // 2, missing[0] // 2, (missing[1] + 1) // 2, (missing[0] + 1) // 2]
    padded = _pad(carrier, padding) if any(padding) else carrier
    _, own_height, own_width = padded.masks.shape
    top, left = round((own_height - height) / 2.0), round((own_width - width) / 2.0)
    return _crop(padded, top, left, height, width)


def _resize(carrier: Encoded, size: Any, max_size: Any = None, **_: Any) -> Encoded:
    # torchvision's own rule for the new size, on a tensor without memory.
    blank = torch.empty(carrier.masks.shape[1:], device="meta")[None]
    height, width = functional.resize_mask(blank, size=size, max_size=max_size).shape[-2:]
    return carrier.with_masks(carrier.masks.resize(height, width))


def _crop(carrier: Encoded, top: int, left: int, height: int, width: int) -> Encoded:
    try:
        return carrier.with_masks(carrier.masks.crop(top, left, height, width))
    except ValueError:
        raise NeedsPixels from None


def _resized_crop(
    carrier: Encoded, top: int, left: int, height: int, width: int, size: Any, **_: Any
) -> Encoded:
    return _resize(_crop(carrier, top, left, height, width), size)


def _pad(carrier: Encoded, padding: Any, fill: Any = None, padding_mode: str = "constant") -> Encoded:
    """Pad with nothing, whatever the image is filled with."""
    if padding_mode != "constant":
        raise NeedsPixels
    sides = [padding] if isinstance(padding, int) else list(padding)
    left, top, right, bottom = (sides * 4)[:4]  # of one, two (x and y) or four numbers
    _, height, width = carrier.masks.shape
    return _crop(carrier, -top, -left, top + height + bottom, left + width + right)


def _refuse(carrier: Encoded, *_: Any, **__: Any) -> NoReturn:
    raise NeedsPixels


def _mover(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda carrier, *arguments, **options: carrier._moved(function, *arguments, **options)


def _unchanged(carrier: Any, *_: Any, **__: Any) -> Any:
    return carrier


def _functions(kind: str) -> dict[str, Any]:
    """Return v2's functions that have a kernel for a kind of tensor, by name."""
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
    # v2 passes by a type that has no kernel, so whatever changes masks gets one, also what is yet to come.
    for name, function in _functions("_mask").items():
        if name != "get_size":
            functional.register_kernel(function, Encoded)(exact.get(name, _refuse))
            functional.register_kernel(function, Bitmaps)(_mover(function))
    for kind in (Encoded, Bitmaps):
        functional.register_kernel(functional.to_dtype, kind)(_unchanged)
    for name, function in _functions("_bounding_boxes").items():
        if name not in ("clamp", "get_size"):
            for kind in (Regions, Points):
                functional.register_kernel(function, kind)(_mover(function))


_register()
