"""Losses, targets and heads of Mask R-CNN for torchvision's models.

>>> import torchvision, maskloss
>>> model = torchvision.models.detection.maskrcnn_resnet50_fpn(weights=None, weights_backbone=None)
>>> model = maskloss.convert(model)  # the same keys, the same numbers, every part swappable
>>> loss = maskloss.MaskRCNNLoss.preset("aligned")
>>> model = maskloss.convert(model, loss, paste="matched")  # masks sampled at pixel centers
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from maskloss.errors import exit_on_interrupt

if TYPE_CHECKING:
    from maskloss import losses as losses
    from maskloss.detection.conversion import convert, loss_parameters, losses_and_detections
    from maskloss.detection.results import coco_results, mask_offset
    from maskloss.losses.boxes import BoxRegression
    from maskloss.losses.criterion import MaskRCNNLoss
    from maskloss.losses.terms import LossWeights
    from maskloss.masks.encoded import EncodedMasks
    from maskloss.masks.paste import paste_masks
    from maskloss.masks.targets import MaskTargets, mask_targets

__all__ = [
    "BoxRegression",
    "EncodedMasks",
    "LossWeights",
    "MaskRCNNLoss",
    "MaskTargets",
    "coco_results",
    "convert",
    "loss_parameters",
    "losses_and_detections",
    "mask_offset",
    "mask_targets",
    "paste_masks",
]
__version__ = "0.1.0"

#: Public names by module. They are imported on first access, because importing torch takes seconds and
#: `maskloss --help` does not need it.
_MODULES = {
    "detection.conversion": ("convert", "loss_parameters", "losses_and_detections"),
    "detection.results": ("coco_results", "mask_offset"),
    "losses.boxes": ("BoxRegression",),
    "losses.criterion": ("MaskRCNNLoss",),
    "losses.terms": ("LossWeights",),
    "masks.encoded": ("EncodedMasks",),
    "masks.paste": ("paste_masks",),
    "masks.targets": ("MaskTargets", "mask_targets"),
}

exit_on_interrupt()


def __getattr__(name: str) -> Any:
    if name == "losses":
        return importlib.import_module("maskloss.losses")
    for module, names in _MODULES.items():
        if name in names:
            value = getattr(importlib.import_module(f"maskloss.{module}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module 'maskloss' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "losses"})
