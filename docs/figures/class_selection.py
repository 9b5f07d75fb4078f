"""Gradients of the mask loss in the channels of one RoI's mask logits."""

import torch
from matplotlib import pyplot as plt

from maskloss import losses

torch.manual_seed(0)
logits = torch.randn(1, 5, 14, 14, requires_grad=True)
target = torch.zeros(1, 14, 14)
target[:, 3:11, 3:11] = 1
losses.mask_bce_loss(losses.select_class_masks(logits, torch.tensor([2])), target).sum().backward()

figure, axes = plt.subplots(1, 5, figsize=(8.4, 2.0), layout="constrained")
limit = logits.grad.abs().max()
for channel, (panel, gradient) in enumerate(zip(axes, logits.grad[0], strict=True)):
    panel.imshow(gradient, cmap="RdBu", vmin=-limit, vmax=limit)
    panel.set(title=f"channel {channel}", xticks=[], yticks=[])
    panel.grid(False)
