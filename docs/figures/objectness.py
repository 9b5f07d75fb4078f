"""Losses of one anchor's objectness."""

import torch
from curves import anchor_logit, plot_curves

from maskloss import losses

plot_curves(
    "logit of an anchor with an object",
    -6,
    6,
    {
        "cross-entropy": anchor_logit(torch.nn.BCEWithLogitsLoss(reduction="none")),
        "focal, α = 0.25, γ = 2": anchor_logit(losses.ObjectnessFocalLoss()),
        "focal, α = None, γ = 2": anchor_logit(losses.ObjectnessFocalLoss(alpha=None)),
        "quality focal, y = 0.7": anchor_logit(losses.QualityFocalLoss(), label=0.7),
    },
)
