"""maskloss: the losses, targets and heads of Mask R-CNN for torchvision's models.

>>> import torchvision, maskloss
>>> model = torchvision.models.detection.maskrcnn_resnet50_fpn(weights=None, weights_backbone=None)
>>> model = maskloss.convert(model)  # the same keys, the same numbers, every part swappable
>>> loss = maskloss.MaskRCNNLoss.preset("aligned")
>>> model = maskloss.convert(model, loss, paste="matched")  # masks where the objects are
"""

# ruff: noqa: E402
from maskloss.errors import exit_on_interrupt

exit_on_interrupt()  # before torch is imported, which takes seconds

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
