"""Mask geometry: convert masks between an image's pixels and the M x M grid of a RoI."""

from maskloss.masks.encoded import EncodedMasks
from maskloss.masks.paste import paste_masks
from maskloss.masks.targets import MaskTargets, mask_targets

__all__ = ["EncodedMasks", "MaskTargets", "mask_targets", "paste_masks"]
