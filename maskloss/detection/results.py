"""What becomes of a converted model's detections that are not pasted yet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from maskloss.detection.compatibility import full_name
from maskloss.detection.transform import RCNNTransform
from maskloss.masks.results import image_results


def mask_offset(model: nn.Module, image_size: tuple[int, int]) -> tuple[float, float]:
    """Return by how much a converted model's masks are too far up and to the left, for `paste_masks(offset=...)`.

    It follows from how the loss's mask targets are made and from how far the model resizes such an image: torchvision's
    targets are half a pixel of the resized image off, of which its way to resize masks takes most back; see
    `masks.paste.unaligned_offset`. So it is right for a network that was trained with the loss that the model was
    converted with. Weights that were learned from aligned targets, as Detectron2's and mmdetection's are, need none:
    convert them with the loss "aligned", or paste with no offset.

    Args:
        model: a converted model.
        image_size: (H, W) of the image, in px, as it is given to the model.

    Returns:
        (y, x) in px of the image; zeros for a loss with aligned targets.

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
    """Return a converted model's detections as COCO results with RLE masks, without making an image of any.

    Args:
        model: converted with `paste=None`.
        detections: of N images, as the model gives them.
        image_sizes: N sizes (H, W) of the images as they were given to the model, in px.
        image_ids: N ids for the results.
        category_ids: label i + 1 is category `category_ids[i]`; labels are the categories where not given.

    Returns:
        Dicts with image_id, category_id, bbox (x, y, width, height in px), score and segmentation, which pycocotools'
        `loadRes` takes and JSON writes; with mask_score too where the mask branch scores its masks.

    Raises:
        TypeError: the model has not been converted, or its transform is not torchvision's.
        ValueError: as many detections, sizes and ids are not given; masks have been pasted; a label has no category.

    Example:
        >>> import torch, torchvision, maskloss
        >>> model = torchvision.models.detection.maskrcnn_resnet50_fpn(weights=None, weights_backbone=None)
        >>> model = maskloss.convert(model, paste=None).eval()
        >>> image = torch.rand(3, 64, 80)
        >>> results = coco_results(model, model([image]), [(64, 80)], image_ids=[1])
    """
    if not len(detections) == len(image_sizes) == len(image_ids):
        raise ValueError(
            f"got {len(detections)} detections, {len(image_sizes)} image_sizes and {len(image_ids)} image_ids, "
            "which must be as many"
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
