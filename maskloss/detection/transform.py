"""torchvision's input transform, with masks resized in their own dtype, or not at all, and pasted our way."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection.transform import GeneralizedRCNNTransform, resize_boxes, resize_keypoints

from maskloss.masks.encoded import EncodedMasks
from maskloss.masks.paste import paste_masks, unaligned_offset

Paste = Literal["torchvision", "matched", "aligned"] | None


class RCNNTransform(GeneralizedRCNNTransform):
    """`GeneralizedRCNNTransform` that never makes a float copy of the ground-truth masks.

    Attributes:
        paste: "torchvision" pastes as torchvision does; "matched" samples at pixel centers and undoes what the
            loss's targets are off by; "aligned" samples there and undoes nothing; None leaves the probabilities
            (D, 1, M, M).
        aligned_masks: whether they were off, `MaskTargets.aligned`.
        boxes_on_host: leave the boxes of training targets on the host, where torchvision's look at each image's
            boxes, after this transform, waits for nothing.
    """

    paste: Paste = "torchvision"
    aligned_masks: bool = False
    boxes_on_host: bool = False

    def __repr__(self) -> str:
        """Show torchvision's lines and the paste."""
        lines = super().__repr__().splitlines()
        return "\n".join([*lines[:-1], f"    Paste(paste={self.paste!r})", lines[-1]])

    def resize(
        self, image: Tensor, target: dict[str, Any] | None = None
    ) -> tuple[Tensor, dict[str, Any] | None]:
        """Resize one image, (3, H, W), and its target as torchvision does; for aligned targets masks better."""
        if target is None:
            return super().resize(image, None)
        target = dict(target)
        masks = target.pop("masks", None)
        if target["boxes"].dtype in (torch.bfloat16, torch.float16):
            # bfloat16 has 4 px between neighbours at 1000 px; the arithmetic from here on is float32's.
            target["boxes"] = target["boxes"].float()
        if self.training and self.boxes_on_host:
            target["boxes"] = target["boxes"].cpu()
        if "keypoints" in target and target["keypoints"].numel() == 0:
            target["keypoints"] = target["keypoints"].reshape(0, 0, 3)
        own_size = (image.shape[-2], image.shape[-1])
        image, resized = super().resize(image, target)
        if resized is not None and "ignore_boxes" in resized:
            size = (image.shape[-2], image.shape[-1])
            resized["ignore_boxes"] = resize_boxes(resized["ignore_boxes"].float(), own_size, size)
        if masks is not None and resized is not None:
            resized["masks"] = _resize_masks(masks, *image.shape[-2:], aligned=self.aligned_masks)
        return image, resized

    def mask_offset(self, image_size: tuple[int, int]) -> tuple[float, float]:
        """Return by how much a network that was trained behind this transform has its masks too far up and to the left.

        Args:
            image_size: (H, W) of an image, in px, as it comes in for inference.

        Returns:
            (y, x) in px of the image, for `paste_masks`; zeros with aligned targets.
        """
        if self.aligned_masks:
            return 0.0, 0.0
        # torchvision's own rule for the new size, on a tensor without memory; in training it would draw one.
        mode = self.training
        self.eval()
        resized, _ = super().resize(torch.empty((3, *image_size), device="meta"), None)
        self.train(mode)
        return unaligned_offset(image_size, (resized.shape[-2], resized.shape[-1]))

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
            if "masks" in detection and self.paste is not None:
                undone = self.paste == "matched" and not self.aligned_masks
                offset = unaligned_offset(original_size, size) if undone else (0.0, 0.0)
                pasted = paste_masks(
                    detection["masks"][:, 0], boxes, original_size, offset=offset, output="float"
                )
                detection["masks"] = pasted[:, None]
        return result


def _resize_masks(
    masks: Tensor | EncodedMasks, height: int, width: int, *, aligned: bool
) -> Tensor | EncodedMasks:
    """Resize (G, H, W) masks by their nearest pixel, in their own dtype.

    For unaligned targets it is torchvision's `nearest`, which moves a mask to the right and down, and so makes
    up for most of what these targets are off by (`unaligned_offset`). Aligned targets need each mask where it
    is, so a pixel takes the value at its centre.
    """
    if isinstance(masks, EncodedMasks):
        resized = masks.resize(height, width)
        if aligned:
            return resized
        # Polygons move as far as their pixels would on average.
        own = masks.shape[1:]
        y, x = unaligned_offset((own[0], own[1]), (height, width))
        return resized.translate(0.5 - y * height / own[0], 0.5 - x * width / own[1])
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
    mode = "nearest-exact" if aligned else "nearest"
    return F.interpolate(as_bytes[:, None], size=(height, width), mode=mode)[:, 0].view(masks.dtype)
