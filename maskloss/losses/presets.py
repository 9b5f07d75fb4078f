"""The loss conventions of the libraries and of the paper, as arguments of `MaskRCNNLoss`.

A preset sets terms, normalisers, targets and weights. It never changes sampler, matcher, coder or NMS, so a
converted torchvision model with the preset "detectron2" is Detectron2's loss on torchvision's samples.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor

from maskloss.losses.boxes import BoxSmoothL1Loss
from maskloss.losses.classification import ActiveClassCrossEntropyLoss
from maskloss.losses.regularization import L2RegularizationLoss
from maskloss.losses.weighting import LossWeights, per_full_batch, per_location, per_positive_coordinate
from maskloss.masks.targets import MaskTargets


def torchvision() -> dict[str, Any]:
    """Torchvision 0.29.2: smooth L1 with β = 1/9 over all sampled, soft targets half a pixel off."""
    return {}


def detectron2() -> dict[str, Any]:
    """Detectron2 02b5c4e: L1 boxes, RPN over a constant 256 per image, aligned binary targets."""
    return {
        "rpn_box": BoxSmoothL1Loss(beta=0.0),
        "box": BoxSmoothL1Loss(beta=0.0),
        "normalizers": {"objectness": per_full_batch, "rpn_box": per_full_batch},
        "mask_targets": MaskTargets(aligned=True, binary=True),
    }


def matterport(active_classes: Tensor | None = None) -> dict[str, Any]:
    """matterport/Mask_RCNN 0038eff: boxes averaged over the positives' coordinates, an L2 term in the loss.

    Its RPN class term is a softmax over two logits; of (0, logit) that is the binary cross-entropy used here.
    """
    settings: dict[str, Any] = {
        "rpn_box": BoxSmoothL1Loss(beta=1.0),
        "box": BoxSmoothL1Loss(beta=1.0),
        "normalizers": {"rpn_box": per_positive_coordinate, "box": per_positive_coordinate},
        "regularization": L2RegularizationLoss(weight_decay=1e-4),
        "mask_targets": MaskTargets(aligned=False, binary=True),
    }
    if active_classes is not None:
        settings["classification"] = ActiveClassCrossEntropyLoss(active_classes)
    return settings


def paper() -> dict[str, Any]:
    """Mask R-CNN, arXiv:1703.06870, and for the RPN Faster R-CNN, arXiv:1506.01497, equation 1.

    There L_cls is divided by the mini-batch of 256 and λ = 10 times L_reg by the number of anchor locations.
    """
    return {
        "rpn_box": BoxSmoothL1Loss(beta=1.0),
        "box": BoxSmoothL1Loss(beta=1.0),
        "normalizers": {"objectness": per_full_batch, "rpn_box": per_location},
        "weights": LossWeights(rpn_box=10.0),
        "mask_targets": MaskTargets(aligned=True, binary=True),
    }


def aligned() -> dict[str, Any]:
    """Torchvision's terms with soft targets that sit where the mask is, so masks can be pasted sharper."""
    return {"mask_targets": MaskTargets(aligned=True, binary=False)}


#: The names of the presets.
PresetName = Literal["torchvision", "detectron2", "matterport", "paper", "aligned"]

PRESETS: dict[str, Callable[[], dict[str, Any]]] = {
    "torchvision": torchvision,
    "detectron2": detectron2,
    "matterport": matterport,
    "paper": paper,
    "aligned": aligned,
}
