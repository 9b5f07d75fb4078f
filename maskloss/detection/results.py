"""Convert the detections of a model with `paste=None` to COCO results, and compute their paste offset."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from maskloss.detection.compatibility import full_name
from maskloss.detection.transform import RCNNTransform
from maskloss.masks.results import image_results


def mask_offset(model: nn.Module, image_size: tuple[int, int]) -> tuple[float, float]:
    """Return how far a converted model's masks are shifted up and left, for `paste_masks(offset=...)`.

    The offset depends on the mask targets of the loss and on the resizing of the image. torchvision's targets are off
    by half a pixel of the resized image, most of which torchvision's mask resizing undoes; see
    `masks.paste.unaligned_offset`. The offset is correct for networks trained with the loss that the model was
    converted with. Weights trained on aligned targets, such as Detectron2's and mmdetection's, need no offset: convert
    them with the loss "aligned", or paste without an offset.

    Args:
        model: a converted model.
        image_size: (H, W) of the image, in px, as passed to the model.

    Returns:
        (dy, dx) in px of the image; zeros for a loss with aligned targets.

    Raises:
        TypeError: the model has not been converted, or its transform is not torchvision's.

    Example:
        >>> import torchvision, maskloss
        >>> model = torchvision.models.detection.maskrcnn_resnet50_fpn(weights=None, weights_backbone=None)
        >>> mask_offset(maskloss.convert(model, "torchvision", paste=None), (400, 400))
        (0.25, 0.25)
    """
    return _transform_of(model, "mask_offset").mask_offset(image_size)


def coco_results(
    model: nn.Module,
    detections: Sequence[Mapping[str, Tensor]],
    image_sizes: Sequence[tuple[int, int]],
    image_ids: Sequence[int],
    category_ids: Sequence[int] | None = None,
) -> list[dict[str, Any]]:
    """Convert a model's detections to COCO results with RLE masks, without making full-image masks.

    Args:
        model: model converted with `paste=None`.
        detections: the model's output for N images.
        image_sizes: N sizes (H, W) of the images as passed to the model, in px.
        image_ids: N ids of the images in the results.
        category_ids: label i + 1 becomes category `category_ids[i]`; by default labels are the category ids.

    Returns:
        Dicts with image_id, category_id, bbox (x, y, width, height in px), score and segmentation, and with mask_score
        if the mask branch scores its masks. pycocotools' `loadRes` and JSON accept them.

    Raises:
        TypeError: the model has not been converted, or its transform is not torchvision's.
        ValueError: the numbers of detections, sizes and ids differ; masks have already been pasted; or a label has no
            category.

    Example:
        >>> import torch, torchvision, maskloss
        >>> build = torchvision.models.detection.maskrcnn_resnet50_fpn
        >>> model = build(weights=None, weights_backbone=None, min_size=128)
        >>> model = maskloss.convert(model, paste=None).eval()
        >>> image = torch.rand(3, 64, 80)
        >>> results = coco_results(model, model([image]), [(64, 80)], image_ids=[1])
    """
    if not len(detections) == len(image_sizes) == len(image_ids):
        raise ValueError(
            f"got {len(detections)} detections, {len(image_sizes)} image_sizes and {len(image_ids)} image_ids, "
            "but these numbers must be equal"
        )
    transform = _transform_of(model, "coco_results")
    results: list[dict[str, Any]] = []
    for detection, size, image_id in zip(detections, image_sizes, image_ids, strict=True):
        size = (int(size[0]), int(size[1]))
        offset = transform.mask_offset(size)
        results += image_results(detection, image_id, size, offset=offset, category_ids=category_ids)
    return results


def _transform_of(model: nn.Module, function: str) -> RCNNTransform:
    transform = getattr(model, "transform", None)
    if not isinstance(transform, RCNNTransform):
        raise TypeError(
            f"{function} takes a model from maskloss.convert with torchvision's own transform, not {full_name(model)}"
            + ("" if transform is None else f" whose transform is {full_name(transform)}")
        )
    return transform
