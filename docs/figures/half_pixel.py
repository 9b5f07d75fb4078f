"""Where torchvision's targets and paste sample a mask of one edge, beside aligned ones."""

import torch
from matplotlib import pyplot as plt

from maskloss import mask_targets, paste_masks

# The object ends at x = 10. The RoI is the whole image of 24 px, and the grid has one cell per pixel.
mask = torch.zeros(1, 24, 24, dtype=torch.bool)
mask[:, :, :10] = True
box, first = torch.tensor([[0.0, 0.0, 24.0, 24.0]]), torch.tensor([0])
aligned = mask_targets(mask, box, first, 24, aligned=True)
unaligned = mask_targets(mask, box, first, 24, aligned=False)

figure, (targets, pasted) = plt.subplots(1, 2, figsize=(8.4, 2.8), layout="constrained")
for target, label, style in ((aligned, "aligned", "-"), (unaligned, "torchvision", "--")):
    targets.stairs(target[0, 12], label=label, linestyle=style)
targets.axvline(10, color="black", linewidth=0.7)
targets.set(title="targets of an object that ends at x = 10", xlabel="x, px", xlim=(5, 15))
targets.legend(frameon=False)

for offset, label, style in ((0.5, "offset 0.5 px", "-"), (0.0, "no offset", "--")):
    row = paste_masks(unaligned, box, (24, 24), offset=(offset, offset), output="float")[0, 12]
    pasted.stairs(row, label=label, linestyle=style)
pasted.axvline(10, color="black", linewidth=0.7)
pasted.axhline(0.5, color="gray", linewidth=0.7)
pasted.set(title="torchvision's targets, pasted at pixel centers", xlabel="x, px", xlim=(5, 15))
pasted.legend(frameon=False)
