"""The Lovász hinge beside cross-entropy, over how certain each cell is."""

from curves import plot_curves, whole_mask

from maskloss import losses

plot_curves(
    "signed logit of every cell, right if > 0",
    -6,
    6,
    {"Lovász hinge": whole_mask(losses.MaskLovaszLoss()), "cross-entropy": whole_mask(losses.MaskBCELoss())},
)
