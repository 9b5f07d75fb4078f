"""The loss conventions of the libraries and of the paper: each preset is a function that returns a `MaskRCNNLoss`.

A preset sets terms, normalizers, mask targets and weights. It does not change sampler, matcher, box coder or NMS: a
converted torchvision model with the preset "detectron2" computes Detectron2's loss on torchvision's samples.
Shapes: see `maskloss.losses`.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from maskloss.losses.boxes import BoxSmoothL1Loss
from maskloss.losses.classification import ActiveClassCrossEntropyLoss
from maskloss.losses.criterion import MaskRCNNLoss
from maskloss.losses.mask_supervision import MaskBySupervision
from maskloss.losses.mask_weak import MaskBoxLoss
from maskloss.losses.normalizers import per_full_batch, per_location, per_positive_coordinate
from maskloss.losses.regularization import MatterportL2Loss
from maskloss.losses.terms import LossWeights
from maskloss.masks.targets import MaskTargets


def torchvision() -> MaskRCNNLoss:
    """Return the loss of torchvision 0.29.2.

    Boxes: smooth L1 with β = 1/9, divided by the number of samples. Mask targets: soft, shifted by half a pixel.
    """
    return MaskRCNNLoss()


def detectron2() -> MaskRCNNLoss:
    """Return the loss of Detectron2 02b5c4e.

    Boxes: L1. RPN: divided by a constant 256 per image. Mask targets: aligned and binary.
    """
    return MaskRCNNLoss(
        rpn_box=BoxSmoothL1Loss(beta=0.0),
        box=BoxSmoothL1Loss(beta=0.0),
        normalizers={"objectness": per_full_batch, "rpn_box": per_full_batch},
        mask_targets=MaskTargets(aligned=True, binary=True),
    )


def matterport(active_classes: Tensor | None = None) -> MaskRCNNLoss:
    """Return the loss of matterport/Mask_RCNN 0038eff.

    Boxes: smooth L1 with β = 1, averaged over the coordinates of the positives. Mask targets: binary, shifted by half a
    pixel. The loss has an L2 term. Matterport's RPN has a softmax over two logits; for the logits (0, x) it is
    equal to the binary cross-entropy of x, which is used here.

    Args:
        active_classes: (C,) bool, the classes that are annotated (including the background), or None for all.
    """
    return MaskRCNNLoss(
        rpn_box=BoxSmoothL1Loss(beta=1.0),
        box=BoxSmoothL1Loss(beta=1.0),
        classification=None if active_classes is None else ActiveClassCrossEntropyLoss(active_classes),
        normalizers={"rpn_box": per_positive_coordinate, "box": per_positive_coordinate},
        regularization=MatterportL2Loss(weight_decay=1e-4),
        mask_targets=MaskTargets(aligned=False, binary=True),
    )


def paper() -> MaskRCNNLoss:
    """Return the loss of Mask R-CNN, arXiv:1703.06870, with the RPN of Faster R-CNN, arXiv:1506.01497, equation 1.

    In the RPN, L_cls is divided by the mini-batch size of 256, and λ L_reg with λ = 10 by the number of anchor
    locations.
    """
    return MaskRCNNLoss(
        rpn_box=BoxSmoothL1Loss(beta=1.0),
        box=BoxSmoothL1Loss(beta=1.0),
        normalizers={"objectness": per_full_batch, "rpn_box": per_location},
        weights=LossWeights(rpn_box=10.0),
        mask_targets=MaskTargets(aligned=True, binary=True),
    )


def aligned() -> MaskRCNNLoss:
    """Return the loss of torchvision with soft mask targets that are not shifted, so that masks need no offset."""
    return MaskRCNNLoss(mask_targets=MaskTargets(aligned=True, binary=False))


def weak() -> MaskRCNNLoss:
    """Return torchvision's loss for weak labels: each object's mask is supervised by its mask, points or box.

    The targets are aligned and soft. The pairwise loss of boxes warms up in 1,000 steps.
    """
    return MaskRCNNLoss(
        mask=MaskBySupervision(boxes=MaskBoxLoss(warmup_steps=1000)),
        mask_targets=MaskTargets(aligned=True, binary=False),
    )


#: The presets by their names, which are those of `criterion.PresetName`.
PRESETS: dict[str, Callable[[], MaskRCNNLoss]] = {
    "torchvision": torchvision,
    "detectron2": detectron2,
    "matterport": matterport,
    "paper": paper,
    "aligned": aligned,
    "weak": weak,
}


def make_preset(name: str, active_classes: Tensor | None = None) -> MaskRCNNLoss:
    """Make the preset with the given name.

    Args:
        name: a key of `PRESETS`.
        active_classes: see `matterport`; None for all other presets.

    Raises:
        ValueError: no preset has this name, or it takes no `active_classes`.

    Example:
        >>> make_preset("paper").weights.rpn_box
        10.0
    """
    if not isinstance(name, str) or name not in PRESETS:
        raise ValueError(f"no preset is named {name!r}; available: {', '.join(PRESETS)}")
    if active_classes is None:
        return PRESETS[name]()
    if name != "matterport":
        raise ValueError(f"active_classes belongs to the preset 'matterport', not to {name!r}")
    return matterport(active_classes)


MaskRCNNLoss._make_preset = staticmethod(make_preset)
