"""Train on one or several devices with accelerate: the line that differs from plain torchvision is marked.

accelerate launch examples/accelerate_loop.py --images photos --annotations train.json --steps 1000
"""

from __future__ import annotations

import argparse

import torch
from accelerate import Accelerator
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

accelerator = Accelerator()
data = read_coco(arguments.images, arguments.annotations)
weights = None if arguments.weights == "none" else "DEFAULT"
model = maskrcnn_resnet50_fpn(weights=None, weights_backbone=weights, num_classes=len(data.categories) + 1)
# Divide by counts of all processes, so that the losses are those of one process with the whole batch.
maskloss.convert(model, maskloss.MaskRCNNLoss(synchronized=accelerator.num_processes > 1))  # the difference

parameters = [p for p in (*model.parameters(), *maskloss.loss_parameters(model)) if p.requires_grad]
optimizer = torch.optim.SGD(parameters, lr=0.0025, momentum=0.9, weight_decay=1e-4)
# Masks stay polygons, which accelerate need not split, copy or pad.
loader = DataLoader(CocoDataset(data), batch_size=2, shuffle=True, collate_fn=collate)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
model.train()

step = 0
while step < arguments.steps:
    for images, targets in loader:
        losses = model(images, targets)
        accelerator.backward(sum(losses.values()))
        accelerator.clip_grad_norm_(parameters, 10.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        accelerator.print(step, {name: round(value.item(), 3) for name, value in losses.items()})
        if step == arguments.steps:
            break
