"""Errors about the targets of a training batch, and the names of images in them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

Target = dict[str, Any]


class TargetValueError(ValueError, AssertionError):
    """Wrong value of an input for which stock torchvision raises AssertionError; a subclass of that, too.

    Example:
        >>> issubclass(TargetValueError, ValueError), issubclass(TargetValueError, AssertionError)
        (True, True)
    """


class TargetTypeError(TypeError, AssertionError):
    """Wrong type of an input for which stock torchvision raises AssertionError; a subclass of that, too.

    Example:
        >>> issubclass(TargetTypeError, TypeError), issubclass(TargetTypeError, AssertionError)
        (True, True)
    """


@dataclass(frozen=True)
class ImageName:
    """The name of an image in messages. Its text is made on demand, because an image_id on a GPU has to be copied."""

    index: int
    target: Target

    def __str__(self) -> str:
        return image_name(self.index, self.target)


def image_name(index: int, target: Target) -> str:
    """Return the name of an image in error messages: its index in the batch, and its image_id if it has one.

    Example:
        >>> image_name(1, {"image_id": 41})
        'image 1 of the batch (image_id 41)'
    """
    image_id = target.get("image_id")
    if isinstance(image_id, Tensor) and image_id.numel() == 1:
        image_id = int(image_id)
    known = isinstance(image_id, int) or (isinstance(image_id, str) and len(image_id) <= 80)
    return f"image {index} of the batch" + (f" (image_id {image_id})" if known else "")
