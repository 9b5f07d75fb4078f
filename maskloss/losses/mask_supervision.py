"""A mask term in which each object is supervised by the best label that it has: its mask, labeled points or its box.

Shapes: see `maskloss.losses`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from maskloss.losses.mask_pixels import MaskBCELoss
from maskloss.losses.mask_weak import MaskPointLoss
from maskloss.losses.term_checks import (
    check_arguments,
    check_callable,
    check_term,
    check_unreduced,
    register_parts,
)
from maskloss.losses.terms import MaskLabels, MaskTerm, Supervision

#: A loss of mask logits (P, M, M), point coordinates (P, K, 2) and point labels (P, K), such as `MaskPointLoss`.
PointTerm = Callable[[Tensor, Tensor, Tensor], Tensor]
#: A loss of mask logits (P, M, M) and box grids (P, M, M), such as `MaskProjectionLoss`; or, with `uses_image = True`,
#: of mask logits, image crops (P, 3, M, M) and box grids, such as `MaskBoxLoss`.
BoxMaskTerm = Callable[..., Tensor]

_MASK_LOSS, _POINT_LOSS = MaskBCELoss(), MaskPointLoss()


class MaskBySupervision(nn.Module):
    """A mask term that computes, for each positive, the loss for the best label that its object has.

    A mask is better than points, and points are better than a box. All values are divided by the number of positives in
    the term, so that the scale of the loss does not depend on the mix of labels in a batch.

    Args:
        mask: the term for objects with a mask, (mask_logits (P, M, M), mask_targets (P, M, M)) -> (P,) or (P, M, M).
        points: the term for objects with labeled points, (mask_logits (P, M, M), point_coords (P, K, 2),
            point_labels (P, K)) -> (P,).
        boxes: the term for objects with a box only, (mask_logits (P, M, M), gt_box_grids (P, M, M)) -> (P,); a term
            with the attribute `uses_image = True`, such as `MaskBoxLoss`, takes image_crops (P, 3, M, M) as an
            additional second argument.

    If a term is None, the labels for it are ignored: objects that have them are supervised by their next best label, or
    excluded if they have no other.

    Raises:
        TypeError: a term is a class or not callable, or takes other arguments.
        ValueError: all terms are None, or a term reduces its values to one number.

    Example:
        >>> from maskloss import MaskRCNNLoss
        >>> from maskloss.losses import MaskBoxLoss
        >>> loss = MaskRCNNLoss(mask=MaskBySupervision(boxes=MaskBoxLoss(warmup_steps=1000)))
        >>> sorted(kind.name for kind in loss.mask_supervision)
        ['BOX', 'MASK', 'POINTS']
    """

    uses_mask_labels = True

    def __init__(
        self,
        mask: MaskTerm | None = _MASK_LOSS,
        points: PointTerm | None = _POINT_LOSS,
        boxes: BoxMaskTerm | None = None,
    ) -> None:
        super().__init__()
        self.mask, self.points, self.boxes = mask, points, boxes
        terms = {"mask": mask, "points": points, "boxes": boxes}
        if all(term is None for term in terms.values()):
            raise ValueError("MaskBySupervision needs a term for masks, points or boxes")
        if mask is not None:
            check_term("mask", mask)
            if any(getattr(mask, name, False) for name in ("all_classes", "uses_image", "uses_mask_labels")):
                raise TypeError("mask: the term must take (mask_logits, mask_targets) and nothing else")
        for name in ("points", "boxes"):
            if terms[name] is not None:
                check_callable(name, terms[name])
                check_arguments(name, terms[name], _arguments(name, terms[name]))
                check_unreduced(name, terms[name])
        register_parts(self, [term for term in terms.values() if term is not None])
        self.uses_image = bool(getattr(boxes, "uses_image", False))
        self.supervision = frozenset(
            kind
            for kind, term in (
                (Supervision.MASK, mask),
                (Supervision.POINTS, points),
                (Supervision.BOX, boxes),
            )
            if term is not None
        )

    def forward(self, mask_logits: Tensor, labels: MaskLabels) -> Tensor:
        """Compute the loss of each positive.

        Args:
            mask_logits: (P, M, M), pre-sigmoid, the channel of the positive's own class.
            labels: the labels of the positives' objects; `labels.rows` may contain only the kinds in `supervision`.

        Returns:
            (P,).
        """
        values, rows = [], []
        for kind, own in labels.rows.items():
            logits = mask_logits[own]
            if kind is Supervision.MASK and self.mask is not None:
                loss = self.mask(logits, labels.mask_targets[own])
                loss = loss.mean(dim=(1, 2)) if loss.dim() == 3 else loss
            elif kind is Supervision.POINTS and self.points is not None:
                loss = self.points(logits, labels.point_coords[own], labels.point_labels[own])
            elif kind is Supervision.BOX and self.boxes is not None:
                crops = (
                    [labels.image_crops[own]] if self.uses_image and labels.image_crops is not None else []
                )
                loss = self.boxes(logits, *crops, labels.gt_box_grids[own])
            else:
                raise ValueError(f"there is no term for objects whose best label is {kind.name.lower()}")
            values.append(loss)
            rows.append(own)
        losses = torch.cat(values)
        return losses.new_zeros(len(mask_logits)).index_copy(0, torch.cat(rows), losses)


def _arguments(name: str, term: Any) -> tuple[str, ...]:
    """Return the names of the arguments that `MaskBySupervision` calls its term for points or for boxes with."""
    if name == "points":
        return ("mask_logits", "point_coords", "point_labels")
    images = ("image_crops",) if getattr(term, "uses_image", False) else ()
    return ("mask_logits", *images, "gt_box_grids")
