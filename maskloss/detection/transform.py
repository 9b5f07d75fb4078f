"""Drop-in replacement for torchvision's input transform, with cheaper mask resizing and a choice of pasting."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor
from torchvision.models.detection import transform as torchvision_transform
from torchvision.models.detection.transform import GeneralizedRCNNTransform, resize_boxes, resize_keypoints

from maskloss.masks.encoded import EncodedMasks
from maskloss.masks.paste import paste_masks, unaligned_offset

Paste = Literal["torchvision", "matched", "aligned"] | None


class RCNNTransform(GeneralizedRCNNTransform):
    """torchvision's `GeneralizedRCNNTransform` without float copies of the masks, and without synchronizing.

    Masks are resized in their own dtype; `EncodedMasks` are not rasterized. torchvision copies the mean, the standard
    deviation and four ratios to the device for each image, and synchronizes each time. Here the first two are copied
    once, and ratios remain numbers.

    Attributes:
        paste: "torchvision" pastes as torchvision does; "matched" samples at pixel centers and undoes the offset of the
            loss's mask targets; "aligned" samples at pixel centers and undoes no offset; None returns the probabilities
            (D, 1, M, M).
        aligned_masks: `MaskTargets.aligned` of the loss; if True, mask targets have no offset.
        boxes_on_host: keep the boxes of training targets on the host, so that torchvision's check of each image's
            boxes, after this transform, does not synchronize.
        padded_sizes: sizes (H, W) in px to which batches are padded in training, the first one that is large enough; a
            batch that fits none is padded to its largest image.
        keeps_images: add the resized image (3, H, W), RGB in [0, 1], to its target as "resized_image", for a mask term
            that needs it.

    Example:
        >>> transform = RCNNTransform(800, 1333, image_mean=[0.5] * 3, image_std=[0.5] * 3)
        >>> transform.mask_offset((800, 800))
        (0.5, 0.5)
    """

    paste: Paste = "torchvision"
    aligned_masks: bool = False
    boxes_on_host: bool = False
    padded_sizes: tuple[tuple[int, int], ...] = ()
    keeps_images: bool = False

    #: Mean and standard deviation, (3, 1, 1) each, by device, dtype and their values.
    _constants: dict[Any, tuple[Tensor, Tensor]] | None = None

    def __repr__(self) -> str:
        """Return torchvision's text with one more line for the paste."""
        lines = super().__repr__().splitlines()
        return "\n".join([*lines[:-1], f"    Paste(paste={self.paste!r})", lines[-1]])

    def resize(
        self, image: Tensor, target: dict[str, Any] | None = None
    ) -> tuple[Tensor, dict[str, Any] | None]:
        """Resize one image (3, H, W) and its target as torchvision does, but masks exactly if targets are aligned."""
        if target is None and torch.compiler.is_exporting():
            return self._resize_in_export(image), None
        if target is None:
            return super().resize(image, None)
        target = dict(target)
        masks = target.pop("masks", None)
        if target["boxes"].dtype == torch.bfloat16:
            # torchvision's RoI heads refuse bfloat16. At 1000 px, its values are 4 px apart: compute in float32.
            target["boxes"] = target["boxes"].float()
        if self.training and self.boxes_on_host:
            target["boxes"] = target["boxes"].cpu()
        boxes, keypoints = target.pop("boxes"), target.pop("keypoints", None)
        if keypoints is not None and keypoints.numel() == 0:
            keypoints = keypoints.reshape(0, 0, 3)
        own_size = (image.shape[-2], image.shape[-1])
        # torchvision needs boxes. Those of the target are resized below.
        image, _ = super().resize(image, {"boxes": torch.empty(0, 4)})
        size = (image.shape[-2], image.shape[-1])
        target["boxes"] = _resize_boxes(boxes, own_size, size)
        if keypoints is not None:
            target["keypoints"] = _resize_points(keypoints, own_size, size)
        if "ignore_boxes" in target:
            target["ignore_boxes"] = _resize_boxes(target["ignore_boxes"].float(), own_size, size)
        if "points" in target:
            target["points"] = _resize_points(target["points"].float(), own_size, size)
        if self.keeps_images:
            mean, std = self._mean_and_std(image)
            target["resized_image"] = image * std + mean
        if masks is not None:
            target["masks"] = _resize_masks(masks, *size, aligned=self.aligned_masks)
        return image, target

    def normalize(self, image: Tensor) -> Tensor:
        """Subtract the mean from an image (3, H, W) and divide by the standard deviation, as torchvision does."""
        if image.device.type == "cpu" or not image.is_floating_point():
            normalized: Tensor = super().normalize(image)
            return normalized
        mean, std = self._mean_and_std(image)
        return (image - mean) / std

    def _mean_and_std(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean and the standard deviation, (3, 1, 1) each, in the image's dtype and on its device."""
        if self._constants is None:
            self._constants = {}
        # Numbers, because equal tensors are different keys.
        values = (tuple(map(float, of_channels)) for of_channels in (self.image_mean, self.image_std))
        key = (image.device, image.dtype, *values)
        if key not in self._constants:
            # Constants made in inference mode could not be used in training.
            with torch.inference_mode(False):
                mean, std = (
                    torch.tensor(values, dtype=image.dtype, device=image.device)[:, None, None]
                    for values in key[2:]
                )
            self._constants[key] = mean, std
        return self._constants[key]

    def _resize_in_export(self, image: Tensor) -> Tensor:
        """Resize an image of unknown size as torchvision does, which would fix the side that limits its scale."""
        height, width = image.shape[-2:]
        shorter, longer = torch.sym_min(height, width), torch.sym_max(height, width)
        scale = torch.sym_min(self.min_size[-1] / shorter, self.max_size / longer)
        size = [torch.sym_int(side * scale) for side in (height, width)]
        return F.interpolate(image[None], size=size, mode="bilinear", align_corners=False)[0]

    def batch_images(self, images: list[Tensor], size_divisible: int = 32) -> Tensor:
        """Pad the images to one size and stack them, as torchvision does; `torch.export` traces one image."""
        if not torch.compiler.is_exporting():
            if self.training and self.padded_sizes:
                images = self._padded(images)
            batch: Tensor = super().batch_images(images, size_divisible)
            return batch
        # torchvision computes the size with floats, which would fix it in the exported graph.
        (image,) = images
        height, width = image.shape[-2:]
        return F.pad(image, (0, -width % size_divisible, 0, -height % size_divisible))[None]

    def _padded(self, images: list[Tensor]) -> list[Tensor]:
        """Pad the first image to the first of `padded_sizes` that holds all images, which is then the batch's size."""
        needed = [max(image.shape[axis] for image in images) for axis in (-2, -1)]
        for height, width in self.padded_sizes:
            if needed[0] <= height and needed[1] <= width:
                first, *others = images
                padding = (0, width - first.shape[-1], 0, height - first.shape[-2])
                return [F.pad(first, padding), *others]
        return images

    def mask_offset(self, image_size: tuple[int, int]) -> tuple[float, float]:
        """Return the sub-pixel offset of masks predicted by a network trained with this transform.

        Args:
            image_size: (H, W) of an image, in px, as passed to the model for inference.

        Returns:
            (dy, dx) in px of the image, for `paste_masks`: how far masks are shifted up and left. Zeros if targets are
            aligned.
        """
        if self.aligned_masks:
            return 0.0, 0.0
        return unaligned_offset(image_size, self._size_in_evaluation(*image_size))

    def _size_in_evaluation(self, height: int, width: int) -> tuple[int, int]:
        """Return the (H, W) to which `resize` brings an image of this size in evaluation, in px."""
        if self.fixed_size is not None:
            return self.fixed_size[1], self.fixed_size[0]
        return resized_size(height, width, self.min_size[-1], self.max_size)

    def postprocess(
        self,
        result: list[dict[str, Tensor]],
        image_shapes: list[tuple[int, int]],
        original_image_sizes: list[tuple[int, int]],
    ) -> list[dict[str, Tensor]]:
        """Scale detections to the original image sizes, and paste their masks."""
        if self.training or (self.paste == "torchvision" and torchvision._is_tracing()):
            return super().postprocess(result, image_shapes, original_image_sizes)
        if self.paste is not None and torchvision._is_tracing():
            raise RuntimeError(
                f"torch.jit.trace and torch.onnx.export(dynamo=False) cannot record paste={self.paste!r}, which "
                'depends on the boxes; convert the model with paste=None or "torchvision", or use maskloss export'
            )
        # As in torchvision, there are none if the RoI heads are in training mode, whatever the mode of the transform.
        for detection, size, original_size in zip(result, image_shapes, original_image_sizes, strict=False):
            boxes = _resize_boxes(detection["boxes"], size, original_size)
            detection["boxes"] = boxes
            if "keypoints" in detection:
                detection["keypoints"] = _resize_points(detection["keypoints"], size, original_size)
            if "masks" in detection and self.paste == "torchvision":
                # torchvision reads each box several times, so with boxes on a GPU it would synchronize each time.
                detection["masks"] = torchvision_transform.paste_masks_in_image(
                    detection["masks"], boxes.cpu(), original_size
                )
            elif "masks" in detection and self.paste is not None:
                undone = self.paste == "matched" and not self.aligned_masks
                offset = unaligned_offset(original_size, size) if undone else (0.0, 0.0)
                pasted = paste_masks(
                    detection["masks"][:, 0], boxes, original_size, offset=offset, output="float"
                )
                detection["masks"] = pasted[:, None]
        return result


def resized_size(height: int, width: int, min_size: int, max_size: int) -> tuple[int, int]:
    """Return the (H, W) in px to which torchvision resizes an image.

    Args:
        height: height of the image, in px.
        width: width of the image, in px.
        min_size: shorter side after resizing, in px.
        max_size: maximum longer side after resizing, in px.

    Example:
        >>> resized_size(480, 640, min_size=800, max_size=1333)
        (800, 1066)
    """
    scale = min(min_size / min(height, width), max_size / max(height, width))
    # Floored, as by `interpolate`.
    return int(height * scale), int(width * scale)


def is_resized_to_nothing(height: int, width: int, min_size: int, max_size: int) -> bool:
    """Return whether torchvision's resizing would reduce an image's shorter side to 0 px.

    Args:
        height: height of the image, in px.
        width: width of the image, in px.
        min_size: shorter side after resizing, in px.
        max_size: maximum longer side after resizing, in px.

    Example:
        >>> is_resized_to_nothing(1, 2160, min_size=800, max_size=1333)
        True
    """
    return min(resized_size(height, width, min_size, max_size)) < 1


def _ratios(old: tuple[int, int], new: tuple[int, int]) -> tuple[float, float]:
    """Return new / old, computed in float32 as in torchvision, of heights and widths."""
    after, before = (torch.tensor(size, dtype=torch.float32, device="cpu") for size in (new, old))
    height, width = (after / before).tolist()
    return height, width


def _resize_boxes(boxes: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Scale boxes (G, 4) by the ratio of two sizes (H, W); equal to torchvision's `resize_boxes`."""
    if torch.compiler.is_exporting() or torchvision._is_tracing():  # there, sizes are no numbers
        return resize_boxes(boxes, old, new)
    height, width = _ratios(old, new)
    x1, y1, x2, y2 = boxes.unbind(1)
    return torch.stack((x1 * width, y1 * height, x2 * width, y2 * height), dim=1)


def _resize_points(points: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Scale points (G, K, 3), x, y and another value, by the ratio of two sizes (H, W)."""
    if torch.compiler.is_exporting() or torchvision._is_tracing():
        return resize_keypoints(points, old, new)
    height, width = _ratios(old, new)
    resized = points.clone()
    resized[..., 0] *= width
    resized[..., 1] *= height
    return resized


def _resize_masks(
    masks: Tensor | EncodedMasks, height: int, width: int, *, aligned: bool
) -> Tensor | EncodedMasks:
    """Resize masks (G, H, W) by nearest neighbor, in their own dtype.

    Unaligned targets use torchvision's mode "nearest". It shifts masks right and down, which undoes most of these
    targets' offset (`unaligned_offset`). Aligned targets need masks without a shift, so they use "nearest-exact", which
    samples at pixel centers.
    """
    if isinstance(masks, EncodedMasks):
        resized = masks.resize(height, width)
        if aligned:
            return resized
        # Shift polygons by the average shift of pixels under "nearest".
        own = masks.shape[1:]
        y, x = unaligned_offset((own[0], own[1]), (height, width))
        return resized.translate(0.5 - y * height / own[0], 0.5 - x * width / own[1])
    # torchvision converts all masks to uint8, also those that the model does not use, which may hold any values.
    dtype = torch.bool if masks.dtype == torch.bool else torch.uint8
    if len(masks) == 0:
        # Without objects, users may pass masks of any shape.
        return masks.new_zeros((0, height, width), dtype=dtype)
    if masks.shape[1:] == (height, width):
        return masks.to(dtype)
    if masks.dtype == torch.bool:
        # interpolate does not support bool, but bool and uint8 have the same bytes.
        pixels = masks.view(torch.uint8)
    else:
        # Floats are converted after resizing, which reads few of the pixels if it reduces the masks.
        pixels = masks if masks.dtype in (torch.float32, torch.float64) else masks.to(torch.uint8)
    mode = "nearest-exact" if aligned else "nearest"
    return F.interpolate(pixels[:, None], size=(height, width), mode=mode)[:, 0].to(torch.uint8).view(dtype)
