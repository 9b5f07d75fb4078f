"""Convert the detections of a model with `paste=None` to COCO results, and compute their paste offset."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from maskloss.detection.compatibility import full_name, not_a_detector, not_converted
from maskloss.detection.transform import RCNNTransform
from maskloss.masks.checks import check_image_size
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
        ValueError: the size is not (H, W).

    Example:
        >>> import torchvision, maskloss
        >>> model = torchvision.models.detection.maskrcnn_resnet50_fpn(weights=None, weights_backbone=None)
        >>> mask_offset(maskloss.convert(model, "torchvision", paste=None), (400, 400))
        (0.25, 0.25)
    """
    transform = _transform_of(model, "mask_offset")
    check_image_size(image_size)
    return transform.mask_offset(image_size)


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
        image_ids: N ids of the images in the results, such as a target's image_id.
        category_ids: label i + 1 becomes category `category_ids[i]`; by default labels are the category ids.

    Returns:
        Dicts with image_id, category_id, bbox (x, y, width, height in px), score and segmentation, and with mask_score
        if the mask branch scores its masks. pycocotools' `loadRes` and JSON accept them.

    Raises:
        TypeError: the model has not been converted, or its transform is not torchvision's; or the detections of one
            image, or a mapping of category ids, are given instead of lists.
        ValueError: the numbers of detections, sizes and ids differ; a size is not (H, W); masks have already been
            pasted; a label has no category; or there are more categories than classes.

    Example:
        >>> import torch, torchvision, maskloss
        >>> build = torchvision.models.detection.maskrcnn_resnet50_fpn
        >>> model = build(weights=None, weights_backbone=None, min_size=128)
        >>> model = maskloss.convert(model, paste=None).eval()
        >>> image = torch.rand(3, 64, 80)
        >>> results = coco_results(model, model([image]), [(64, 80)], image_ids=[1])
    """
    if isinstance(detections, Mapping):
        raise TypeError(
            "detections, image_sizes and image_ids are lists with one entry per image, but detections is a dict"
        )
    if not len(detections) == len(image_sizes) == len(image_ids):
        raise ValueError(
            f"got {len(detections)} detections, {len(image_sizes)} image_sizes and {len(image_ids)} image_ids, "
            "but these numbers must be equal"
        )
    transform = _transform_of(model, "coco_results")
    _check_categories(model, category_ids)
    results: list[dict[str, Any]] = []
    for detection, size, image_id in zip(detections, image_sizes, image_ids, strict=True):
        check_image_size(size)
        size = (int(size[0]), int(size[1]))
        offset = transform.mask_offset(size)
        results += image_results(detection, image_id, size, offset=offset, category_ids=category_ids)
    return results


def _check_categories(model: Any, category_ids: Sequence[int] | None) -> None:
    """Raise ValueError if the ids include one of the background, which would shift all others by one."""
    predictor: Any = getattr(model.roi_heads, "box_predictor", None)
    if category_ids is None or type(predictor) is not FastRCNNPredictor:
        return
    num_classes = getattr(predictor.cls_score, "out_features", None)
    if num_classes is not None and len(category_ids) >= num_classes:
        raise ValueError(
            f"category_ids has {len(category_ids)} entries, but the model has {num_classes - 1} classes besides the "
            "background, which has no entry"
        )


def _transform_of(model: nn.Module, function: str) -> RCNNTransform:
    transform = getattr(model, "transform", None)
    if isinstance(transform, RCNNTransform):
        return transform
    needs = f"{function} takes a model from maskloss.convert"
    if not isinstance(model, GeneralizedRCNN):
        raise not_a_detector(needs, model)
    if hasattr(model, "conversion"):
        raise TypeError(
            f"{needs} with torchvision's own transform, but its transform is {full_name(transform)}"
        )
    raise not_converted(needs, model)
