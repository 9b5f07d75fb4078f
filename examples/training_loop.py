"""A training loop of your own with maskloss's loss: the line that differs from plain torchvision is marked.

python examples/training_loop.py --images photos --annotations train.json --steps 1000
"""

from __future__ import annotations

import argparse

import torch
from torch.utils.data import DataLoader
from torchvision.models.detection import maskrcnn_resnet50_fpn

import maskloss
from maskloss.data.coco import read_coco
from maskloss.data.dataset import CocoDataset, collate

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--images", required=True)
parser.add_argument("--annotations", required=True)
parser.add_argument("--steps", type=int, default=1000)
parser.add_argument("--weights", default="DEFAULT", help="DEFAULT (ImageNet weights of the backbone) or none")
arguments = parser.parse_args()

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
data = read_coco(arguments.images, arguments.annotations)
backbone_weights = None if arguments.weights == "none" else "DEFAULT"
model = maskrcnn_resnet50_fpn(
    weights=None, weights_backbone=backbone_weights, num_classes=len(data.categories) + 1
)
loss = maskloss.MaskRCNNLoss(
    mask=maskloss.losses.WeightedSum([maskloss.losses.MaskBCELoss(), maskloss.losses.MaskDiceLoss()])
)
maskloss.convert(model, loss)  # the only difference
model.to(device).train()

parameters = [p for p in (*model.parameters(), *maskloss.loss_parameters(model)) if p.requires_grad]
optimizer = torch.optim.SGD(parameters, lr=0.0025, momentum=0.9, weight_decay=1e-4)
loader = DataLoader(CocoDataset(data), batch_size=2, shuffle=True, collate_fn=collate)

step = 0
while step < arguments.steps:
    for images, targets in loader:
        images = [image.to(device) for image in images]
        losses = model(images, targets)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 10.0)
        optimizer.step()
        step += 1
        print(step, {name: round(value.item(), 3) for name, value in losses.items()})
        if step == arguments.steps:
            break

# Losses and detections of the same pass, in evaluation mode.
with torch.no_grad():
    losses, detections = maskloss.losses_and_detections(model, images, targets)
print("evaluation", {name: round(value.item(), 3) for name, value in losses.items()})
