"""Drop-in parts for torchvision's detection models. Only this package imports the code of those models."""

from maskloss.detection.conversion import convert, losses_and_detections
from maskloss.detection.mask_predictor import ClassSelectedMaskPredictor
from maskloss.detection.roi_heads import RoIHeads
from maskloss.detection.rpn import RegionProposalNetwork
from maskloss.detection.transform import RCNNTransform

__all__ = [
    "ClassSelectedMaskPredictor",
    "RCNNTransform",
    "RegionProposalNetwork",
    "RoIHeads",
    "convert",
    "losses_and_detections",
]
