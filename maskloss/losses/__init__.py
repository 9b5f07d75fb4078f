"""The losses of Mask R-CNN: pure functions on tensors, each with a thin Module beside it.

`criterion` puts them together as `MaskRCNNLoss`; `presets` has the conventions of the libraries.
"""

from maskloss.losses.boxes import (
    BoxGIoULoss,
    BoxRegression,
    BoxSmoothL1Loss,
    box_giou_loss,
    box_smooth_l1_loss,
)
from maskloss.losses.classification import ActiveClassCrossEntropyLoss, active_class_cross_entropy_loss
from maskloss.losses.criterion import MaskRCNNLoss
from maskloss.losses.masks import MaskBCELoss, mask_bce_loss, select_class_masks
from maskloss.losses.regularization import (
    L1RegularizationLoss,
    L2RegularizationLoss,
    l1_regularization_loss,
    l2_regularization_loss,
)
from maskloss.losses.weighting import (
    BatchCounts,
    LossWeights,
    per_full_batch,
    per_location,
    per_positive,
    per_positive_coordinate,
    per_sampled,
    per_weight_sum,
)

__all__ = [
    "ActiveClassCrossEntropyLoss",
    "BatchCounts",
    "BoxGIoULoss",
    "BoxRegression",
    "BoxSmoothL1Loss",
    "L1RegularizationLoss",
    "L2RegularizationLoss",
    "LossWeights",
    "MaskBCELoss",
    "MaskRCNNLoss",
    "active_class_cross_entropy_loss",
    "box_giou_loss",
    "box_smooth_l1_loss",
    "l1_regularization_loss",
    "l2_regularization_loss",
    "mask_bce_loss",
    "per_full_batch",
    "per_location",
    "per_positive",
    "per_positive_coordinate",
    "per_sampled",
    "per_weight_sum",
    "select_class_masks",
]
