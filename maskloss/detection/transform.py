"""torchvision's input transform, with masks resized in their own dtype, or not at all, and pasted our way."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection.transform import GeneralizedRCNNTransform, resize_boxes, resize_keypoints

from maskloss.masks.encoded import EncodedMasks
from maskloss.masks.paste import paste_masks

Paste = Literal["torchvision", "matched"] | None


class RCNNTransform(GeneralizedRCNNTransform):
    """`GeneralizedRCNNTransform` that never makes a float copy of the ground-truth masks.

    Attributes:
        paste: "torchvision" pastes as torchvision does; "matched" samples at pixel centres on the side of the
            half pixel that the targets trained; None leaves the probabilities (D, 1, M, M).
        aligned_masks: which side that is, `MaskTargets.aligned`.
    """

    paste: Paste = "torchvision"
    aligned_masks: bool = False

    def resize(
        self, image: Tensor, target: dict[str, Any] | None = None
    ) -> tuple[Tensor, dict[str, Any] | None]:
        """Resize one image, (3, H, W), and its target as torchvision does."""
        if target is None:
            return super().resize(image, None)
        target = dict(target)
        masks = target.pop("masks", None)
        if target["boxes"].dtype in (torch.bfloat16, torch.float16):
            # bfloat16 has 4 px between neighbours at 1000 px; the arithmetic from here on is float32's.
            target["boxes"] = target["boxes"].float()
        if "keypoints" in target and target["keypoints"].numel() == 0:
            target["keypoints"] = target["keypoints"].reshape(0, 0, 3)
        image, resized = super().resize(image, target)
        if masks is not None and resized is not None:
            resized["masks"] = _resize_masks(masks, *image.shape[-2:])
        return image, resized

    def postprocess(
        self,
        result: list[dict[str, Tensor]],
        image_shapes: list[tuple[int, int]],
        original_image_sizes: list[tuple[int, int]],
    ) -> list[dict[str, Tensor]]:
        """Bring detections back to the images' own size, and paste their masks there."""
        if self.training or self.paste == "torchvision":
            return super().postprocess(result, image_shapes, original_image_sizes)
        for detection, size, original_size in zip(result, image_shapes, original_image_sizes, strict=True):
            boxes = resize_boxes(detection["boxes"], size, original_size)
            detection["boxes"] = boxes
            if "keypoints" in detection:
                detection["keypoints"] = resize_keypoints(detection["keypoints"], size, original_size)
            if "masks" in detection and self.paste == "matched":
                pasted = paste_masks(
                    detection["masks"][:, 0], boxes, original_size, aligned=self.aligned_masks, output="float"
                )
                detection["masks"] = pasted[:, None]
        return result


def _resize_masks(masks: Tensor | EncodedMasks, height: int, width: int) -> Tensor | EncodedMasks:
    """Resize (G, H, W) masks by their nearest pixel, as torchvision does, in their own dtype."""
    if isinstance(masks, EncodedMasks):
        return masks.resize(height, width)
    if masks.dtype not in (torch.bool, torch.uint8):
        # Masks that nobody reads: of a model without a mask branch, or of no object. torchvision makes bytes
        # of all.
        masks = masks.to(torch.uint8)
    if len(masks) == 0:
        # Users write the masks of an image without objects in many shapes.
        return masks.new_zeros((0, height, width))
    if masks.shape[1:] == (height, width):
        return masks
    # interpolate has no kernel for bool, whose bytes are those of uint8.
    as_bytes = masks.view(torch.uint8) if masks.dtype == torch.bool else masks
    resized = F.interpolate(as_bytes[:, None], size=(height, width), mode="nearest")[:, 0]
    return resized.view(masks.dtype)
