"""The loss conventions of the libraries and of the paper, each a function that makes a `MaskRCNNLoss`.

A preset sets terms, normalizers, targets and weights. It never changes sampler, matcher, coder or NMS, so a
converted torchvision model with the preset "detectron2" is Detectron2's loss on torchvision's samples.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor

from maskloss.losses.boxes import BoxSmoothL1Loss
from maskloss.losses.classification import ActiveClassCrossEntropyLoss
from maskloss.losses.criterion import MaskRCNNLoss
from maskloss.losses.normalizers import per_full_batch, per_location, per_positive_coordinate
from maskloss.losses.regularization import MatterportL2Loss
from maskloss.losses.terms import LossWeights
from maskloss.masks.targets import MaskTargets


def torchvision() -> MaskRCNNLoss:
    """Return torchvision 0.29.2's: smooth L1 with β = 1/9 over all sampled, soft targets half a pixel off."""
    return MaskRCNNLoss()


def detectron2() -> MaskRCNNLoss:
    """Return Detectron2 02b5c4e's: L1 boxes, RPN over a constant 256 per image, aligned binary targets."""
    return MaskRCNNLoss(
        rpn_box=BoxSmoothL1Loss(beta=0.0),
        box=BoxSmoothL1Loss(beta=0.0),
        normalizers={"objectness": per_full_batch, "rpn_box": per_full_batch},
        mask_targets=MaskTargets(aligned=True, binary=True),
    )


def matterport(active_classes: Tensor | None = None) -> MaskRCNNLoss:
    """Return matterport/Mask_RCNN 0038eff's: boxes averaged over the positives' coordinates, an L2 term in the loss.

    Its RPN class term is a softmax over two logits; of (0, logit) that is the binary cross-entropy used here.

    Args:
        active_classes: (C,) bool, the classes that count (background included), or None for all.
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
    """Return that of Mask R-CNN, arXiv:1703.06870, and for the RPN of Faster R-CNN, arXiv:1506.01497, equation 1.

    There L_cls is divided by the mini-batch of 256 and λ = 10 times L_reg by the number of anchor locations.
    """
    return MaskRCNNLoss(
        rpn_box=BoxSmoothL1Loss(beta=1.0),
        box=BoxSmoothL1Loss(beta=1.0),
        normalizers={"objectness": per_full_batch, "rpn_box": per_location},
        weights=LossWeights(rpn_box=10.0),
        mask_targets=MaskTargets(aligned=True, binary=True),
    )


def aligned() -> MaskRCNNLoss:
    """Return torchvision's terms with soft targets that are not off, so that masks can be pasted sharper."""
    return MaskRCNNLoss(mask_targets=MaskTargets(aligned=True, binary=False))


#: The names of the presets.
PresetName = Literal["torchvision", "detectron2", "matterport", "paper", "aligned"]

PRESETS: dict[str, Callable[[], MaskRCNNLoss]] = {
    "torchvision": torchvision,
    "detectron2": detectron2,
    "matterport": matterport,
    "paper": paper,
    "aligned": aligned,
}


def make_preset(name: str, active_classes: Tensor | None = None) -> MaskRCNNLoss:
    """Make a preset by its name.

    Raises:
        ValueError: there is no such preset, or it takes no `active_classes`.
    """
    if not isinstance(name, str) or name not in PRESETS:
        raise ValueError(f"no preset is named {name!r}; there are {', '.join(PRESETS)}")
    if active_classes is None:
        return PRESETS[name]()
    if name != "matterport":
        raise ValueError(f"active_classes belongs to the preset 'matterport', not to {name!r}")
    return matterport(active_classes)
