"""Losses of one RoI's class logits."""

import torch
from curves import class_logit, plot_curves

from maskloss import losses

COUNTS = torch.tensor([1.0, 10.0, 1000.0, 1000.0])  # class 1, the RoI's, is rare

plot_curves(
    "logit of the RoI's class, others 0",
    -6,
    6,
    {
        "cross-entropy": class_logit(torch.nn.CrossEntropyLoss(reduction="none")),
        "focal, γ = 2": class_logit(losses.ClassFocalLoss()),
        "sigmoids": class_logit(losses.ClassSigmoidLoss()),
        "seesaw, a rare class": class_logit(lambda z, y: losses.seesaw_loss(z, y, class_counts=COUNTS)),
    },
)
