"""Which images and targets a model accepts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNPredictor

from maskloss.detection.transform import RCNNTransform


@dataclass(frozen=True)
class ModelInputs:
    """Properties of a model that determine which images and targets it accepts.

    Attributes:
        num_classes: C, background included; None if unknown.
        has_masks: whether targets need masks.
        has_keypoints: whether targets need keypoints.
        num_keypoints: K, number of keypoints per object; None if unknown.
        num_channels: number of image channels; None if unknown, or if one mean serves all channels.
        unit_range: whether the model normalizes pixels in [0, 1].
        min_size: shorter side in px to which images are resized, the smallest of several; None if unknown.
        max_size: maximum longer side in px to which images are resized; None if unknown.

    Example:
        >>> ModelInputs(num_classes=3, has_masks=True).unit_range
        False
    """

    num_classes: int | None = None
    has_masks: bool = False
    has_keypoints: bool = False
    num_keypoints: int | None = None
    num_channels: int | None = None
    unit_range: bool = False
    min_size: int | None = None
    max_size: int | None = None

    @classmethod
    def of_model(cls, model: GeneralizedRCNN) -> ModelInputs:
        """Return which images and targets a model accepts, as far as its parts are torchvision's own."""
        heads, transform = model.roi_heads, model.transform
        # In a custom predictor, a layer of that name may have another meaning.
        own_predictor = type(heads.box_predictor) is FastRCNNPredictor
        keypoints: Any = heads.keypoint_predictor
        own_keypoints = type(keypoints) is KeypointRCNNPredictor
        sizes: dict[str, Any] = {}
        if isinstance(transform, RCNNTransform):
            # Methods that have been patched on the instance may accept other images.
            constants = (transform.image_mean, transform.image_std)
            num_channels = max(map(len, constants))
            if "normalize" not in vars(transform):
                sizes = {
                    "num_channels": num_channels if num_channels > 1 else None,
                    "unit_range": all(0 < value < 1 for values in constants for value in values),
                }
            if (
                transform.fixed_size is None
                and not transform._skip_resize
                and "resize" not in vars(transform)
            ):
                sizes |= {"min_size": min(transform.min_size), "max_size": transform.max_size}
        return cls(
            num_classes=getattr(heads.box_predictor.cls_score, "out_features", None)
            if own_predictor
            else None,
            has_masks=heads.has_mask(),
            has_keypoints=heads.has_keypoint(),
            num_keypoints=getattr(keypoints.kps_score_lowres, "out_channels", None)
            if own_keypoints
            else None,
            **sizes,
        )
