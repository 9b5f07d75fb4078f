"""Train with Lightning: the line that differs from plain torchvision is marked.

python examples/lightning_module.py --images photos --annotations train.json --steps 1000
"""

from __future__ import annotations

import argparse
from typing import Any

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.models.detection import maskrcnn_resnet50_fpn

import maskloss
from maskloss.data.coco import read_coco
from maskloss.data.dataset import CocoDataset, collate


class MaskRCNNModule(lightning.LightningModule):
    """A Mask R-CNN with BCE and Dice as its mask loss."""

    def __init__(self, num_classes: int, weights_backbone: str | None) -> None:
        super().__init__()
        self.model = maskrcnn_resnet50_fpn(
            weights=None, weights_backbone=weights_backbone, num_classes=num_classes
        )
        mask = maskloss.losses.WeightedSum([maskloss.losses.MaskBCELoss(), maskloss.losses.MaskDiceLoss()])
        maskloss.convert(self.model, maskloss.MaskRCNNLoss(mask=mask))  # the difference

    def training_step(self, batch: Any, batch_index: int) -> Tensor:
        """Compute and log the losses of a batch."""
        images, targets = batch
        losses = self.model(images, targets)
        self.log_dict(losses, prog_bar=True, batch_size=len(images))
        return torch.stack(list(losses.values())).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Optimize the parameters of the model and of the loss, if it has any."""
        parameters = [*self.model.parameters(), *maskloss.loss_parameters(self.model)]
        return torch.optim.SGD(parameters, lr=0.0025, momentum=0.9, weight_decay=1e-4)


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--images", required=True)
parser.add_argument("--annotations", required=True)
parser.add_argument("--steps", type=int, default=1000)
parser.add_argument("--weights", default="DEFAULT", help="DEFAULT (ImageNet weights of the backbone) or none")
arguments = parser.parse_args()

data = read_coco(arguments.images, arguments.annotations)
module = MaskRCNNModule(len(data.categories) + 1, None if arguments.weights == "none" else "DEFAULT")
loader = DataLoader(CocoDataset(data), batch_size=2, shuffle=True, collate_fn=collate)
trainer = lightning.Trainer(max_steps=arguments.steps, gradient_clip_val=10.0)
trainer.fit(module, loader)
print({name: round(value.item(), 3) for name, value in trainer.callback_metrics.items()})
