"""Convert detections to COCO results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torchvision.ops import box_convert

from maskloss.masks.paste import paste_masks


def image_results(
    detection: Mapping[str, Tensor],
    image_id: Any,
    image_size: tuple[int, int],
    *,
    offset: tuple[float, float] = (0.0, 0.0),
    category_ids: Sequence[int] | None = None,
) -> list[dict[str, Any]]:
    """Convert one image's detections to COCO results with RLE masks.

    Args:
        detection: boxes (D, 4) xyxy in px of the image, labels (D,), scores (D,); optionally masks (D, 1, M, M),
            probabilities on the grid of each box, and mask_scores (D,).
        image_id: id of the image in the results, an integer; also a tensor or an array with one.
        image_size: (H, W) of the image, in px.
        offset: (dy, dx), see `paste_masks`.
        category_ids: label i + 1 becomes category `category_ids[i]`; by default labels are the category ids.

    Returns:
        D dicts with image_id, category_id, bbox (x, y, width, height in px) and score; with segmentation if the
        detection has masks, and with mask_score if it has mask_scores.

    Raises:
        TypeError: the category ids are a mapping.
        ValueError: the masks are already pasted, or a label has no category.

    Example:
        >>> import torch
        >>> boxes, labels, scores = torch.tensor([[2.0, 1.0, 6.0, 9.0]]), torch.tensor([1]), torch.tensor([0.5])
        >>> image_results({"boxes": boxes, "labels": labels, "scores": scores}, 7, (10, 12), category_ids=[3])
        [{'image_id': 7, 'category_id': 3, 'bbox': [2.0, 1.0, 4.0, 8.0], 'score': 0.5}]
    """
    masks = detection.get("masks")
    if masks is not None and (masks.dim() != 4 or masks.shape[1] != 1 or masks.shape[2] != masks.shape[3]):
        raise ValueError(
            f"masks must be probabilities (D, 1, M, M), not {tuple(masks.shape)}; "
            "call maskloss.convert(model, paste=None)"
        )
    boxes = box_convert(detection["boxes"].detach().cpu().double(), "xyxy", "xywh")
    labels = detection["labels"].tolist()
    if isinstance(category_ids, Mapping):
        raise TypeError(
            "category_ids must be a list with the id of label 1, of label 2 and so on, not a mapping"
        )
    if category_ids is not None:
        beyond = [label for label in labels if not 1 <= label <= len(category_ids)]
        if beyond:
            raise ValueError(
                f"label {beyond[0]} has no category: category_ids has {len(category_ids)} entries"
            )
    results = [
        {
            "image_id": _plain(image_id),
            "category_id": label if category_ids is None else _plain(category_ids[label - 1]),
            "bbox": [round(value, 3) for value in box],
            "score": score,
        }
        for box, label, score in zip(boxes.tolist(), labels, detection["scores"].tolist(), strict=True)
    ]
    if masks is not None:
        rles = paste_masks(masks[:, 0], detection["boxes"], image_size, offset=offset, output="rle")
        for result, rle in zip(results, rles, strict=True):
            result["segmentation"] = rle
    if "mask_scores" in detection:
        for result, score in zip(results, detection["mask_scores"].tolist(), strict=True):
            result["mask_score"] = score
    return results


def _plain(number: Any) -> Any:
    """Return the number in a tensor or an array, which JSON cannot hold; other values unchanged."""
    return number.item() if hasattr(number, "item") else number
