"""The losses of Mask R-CNN: pure functions on tensors, each with a thin Module beside it.

The losses of anchors are in `objectness`, those of classes in `classification` and `long_tail`, those of boxes in
`boxes`, those of masks in `mask_pixels`, `mask_overlap` (areas), `mask_classes` (channels of several classes) and
`mask_weak` (points and boxes as labels), and penalties on weights in `regularization`. `terms` defines the terms of the
loss, `criterion` combines them in `MaskRCNNLoss`, and `presets` has the conventions of each library.

Shapes in the docstrings of this package use these letters:
    N: images in the batch.
    A: anchors of one image.
    S: sampled anchors of all images.
    R: sampled RoIs of all images.
    P: positives: the sampled anchors or RoIs that are matched to an object.
    D: detections, in inference.
    V: visible keypoints of the positive RoIs.
    G: ground-truth objects of one image.
    C: classes, including the background, which is class 0.
    K: labeled points of one object.
    M: side of a mask's grid, or of a keypoint's heatmap, in cells.
    H, W: height and width in pixels.
"""

from maskloss.losses import presets
from maskloss.losses.boxes import (
    BoxBalancedL1Loss,
    BoxCIoULoss,
    BoxDIoULoss,
    BoxGIoULoss,
    BoxIoULoss,
    BoxRegression,
    BoxSmoothL1Loss,
    box_balanced_l1_loss,
    box_ciou_loss,
    box_diou_loss,
    box_giou_loss,
    box_iou_loss,
    box_smooth_l1_loss,
)
from maskloss.losses.classification import (
    ActiveClassCrossEntropyLoss,
    ClassFocalLoss,
    ClassSigmoidLoss,
    ClassWeightedCrossEntropyLoss,
    active_class_cross_entropy_loss,
    class_focal_loss,
    class_sigmoid_loss,
    class_weighted_cross_entropy_loss,
)
from maskloss.losses.combination import (
    WeightedSum,
)
from maskloss.losses.criterion import (
    MaskRCNNLoss,
)
from maskloss.losses.frequency import (
    inverse_frequency_weights,
)
from maskloss.losses.long_tail import (
    EqualizationLossV2,
    FederatedLoss,
    SeesawLoss,
    equalization_loss_v2,
    federated_loss,
    seesaw_loss,
)
from maskloss.losses.mask_classes import (
    ClassAgnosticMaskLoss,
    MaskSoftmaxLoss,
    mask_softmax_loss,
    select_class_masks,
)
from maskloss.losses.mask_overlap import (
    MaskBackgroundDiceLoss,
    MaskDiceLoss,
    MaskGeneralizedDiceLoss,
    MaskLovaszLoss,
    MaskTverskyLoss,
    MaskWeightedDiceLoss,
    mask_background_dice_loss,
    mask_dice_loss,
    mask_generalized_dice_loss,
    mask_lovasz_loss,
    mask_tversky_loss,
    mask_weighted_dice_loss,
)
from maskloss.losses.mask_pixels import (
    MaskBCELoss,
    MaskBoundaryBCELoss,
    MaskFocalLoss,
    MaskWeightedBCELoss,
    mask_bce_loss,
    mask_boundary_bce_loss,
    mask_focal_loss,
    mask_weighted_bce_loss,
)
from maskloss.losses.mask_supervision import (
    MaskBySupervision,
)
from maskloss.losses.mask_weak import (
    MaskBoxLoss,
    MaskPairwiseLoss,
    MaskPointLoss,
    MaskProjectionLoss,
    mask_box_loss,
    mask_pairwise_loss,
    mask_point_loss,
    mask_projection_loss,
)
from maskloss.losses.normalizers import (
    BatchCounts,
    per_full_batch,
    per_location,
    per_positive,
    per_positive_coordinate,
    per_sampled,
    per_weight_sum,
)
from maskloss.losses.objectness import (
    ObjectnessFocalLoss,
    QualityFocalLoss,
    objectness_focal_loss,
    quality_focal_loss,
)
from maskloss.losses.regularization import (
    L1RegularizationLoss,
    MatterportL2Loss,
    WeightDecayLoss,
    l1_regularization_loss,
    matterport_l2_loss,
    weight_decay_loss,
)
from maskloss.losses.terms import LossWeights, MaskLabels, Supervision

__all__ = [
    "ActiveClassCrossEntropyLoss",
    "BatchCounts",
    "BoxBalancedL1Loss",
    "BoxCIoULoss",
    "BoxDIoULoss",
    "BoxGIoULoss",
    "BoxIoULoss",
    "BoxRegression",
    "BoxSmoothL1Loss",
    "ClassAgnosticMaskLoss",
    "ClassFocalLoss",
    "ClassSigmoidLoss",
    "ClassWeightedCrossEntropyLoss",
    "EqualizationLossV2",
    "FederatedLoss",
    "L1RegularizationLoss",
    "LossWeights",
    "MaskBCELoss",
    "MaskBackgroundDiceLoss",
    "MaskBoundaryBCELoss",
    "MaskBoxLoss",
    "MaskBySupervision",
    "MaskDiceLoss",
    "MaskFocalLoss",
    "MaskGeneralizedDiceLoss",
    "MaskLabels",
    "MaskLovaszLoss",
    "MaskPairwiseLoss",
    "MaskPointLoss",
    "MaskProjectionLoss",
    "MaskRCNNLoss",
    "MaskSoftmaxLoss",
    "MaskTverskyLoss",
    "MaskWeightedBCELoss",
    "MaskWeightedDiceLoss",
    "MatterportL2Loss",
    "ObjectnessFocalLoss",
    "QualityFocalLoss",
    "SeesawLoss",
    "Supervision",
    "WeightDecayLoss",
    "WeightedSum",
    "active_class_cross_entropy_loss",
    "box_balanced_l1_loss",
    "box_ciou_loss",
    "box_diou_loss",
    "box_giou_loss",
    "box_iou_loss",
    "box_smooth_l1_loss",
    "class_focal_loss",
    "class_sigmoid_loss",
    "class_weighted_cross_entropy_loss",
    "equalization_loss_v2",
    "federated_loss",
    "inverse_frequency_weights",
    "l1_regularization_loss",
    "mask_background_dice_loss",
    "mask_bce_loss",
    "mask_boundary_bce_loss",
    "mask_box_loss",
    "mask_dice_loss",
    "mask_focal_loss",
    "mask_generalized_dice_loss",
    "mask_lovasz_loss",
    "mask_pairwise_loss",
    "mask_point_loss",
    "mask_projection_loss",
    "mask_softmax_loss",
    "mask_tversky_loss",
    "mask_weighted_bce_loss",
    "mask_weighted_dice_loss",
    "matterport_l2_loss",
    "objectness_focal_loss",
    "per_full_batch",
    "per_location",
    "per_positive",
    "per_positive_coordinate",
    "per_sampled",
    "per_weight_sum",
    "presets",
    "quality_focal_loss",
    "seesaw_loss",
    "select_class_masks",
    "weight_decay_loss",
]
