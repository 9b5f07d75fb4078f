"""Losses of one pixel of a mask."""

from curves import pixel, plot_curves

from maskloss import losses

plot_curves(
    "logit of a pixel inside the object",
    -6,
    6,
    {
        "cross-entropy": pixel(losses.MaskBCELoss()),
        "weighted, α = 3": pixel(losses.MaskWeightedBCELoss(positive_weight=3, negative_weight=1)),
        "focal, α = 0.25, γ = 2": pixel(losses.MaskFocalLoss()),
        "focal, α = None, γ = 2": pixel(losses.MaskFocalLoss(alpha=None)),
    },
)
