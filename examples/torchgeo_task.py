"""Train torchgeo's instance segmentation task with another loss: the line that differs is marked.

python examples/torchgeo_task.py --images tiles --annotations train.json --steps 1000

Images must have one size, because this task of torchgeo stacks them and does not resize them.
"""

from __future__ import annotations

import argparse
from typing import Any

import lightning
import torch
from torch.utils.data import DataLoader
from torchgeo.trainers import InstanceSegmentationTask

import maskloss
from maskloss.data.coco import read_coco
from maskloss.data.dataset import CocoDataset


class Task(InstanceSegmentationTask):  # type: ignore[misc]
    """torchgeo's task with mask targets in their exact position."""

    def configure_models(self) -> None:
        """Build torchgeo's model and convert it."""
        super().configure_models()
        maskloss.convert(self.model, "aligned")  # the difference


def collate(samples: list[Any]) -> dict[str, Any]:
    """Collate samples as torchgeo's task takes them."""
    images, targets = zip(*samples, strict=True)
    return {
        "image": torch.stack(images),
        "bbox_xyxy": [target["boxes"] for target in targets],
        "label": [target["labels"] for target in targets],
        "mask": [target["masks"].bitmaps() for target in targets],
    }


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--images", required=True)
parser.add_argument("--annotations", required=True)
parser.add_argument("--steps", type=int, default=1000)
arguments = parser.parse_args()

data = read_coco(arguments.images, arguments.annotations)
task = Task(num_classes=len(data.categories) + 1)
loader = DataLoader(CocoDataset(data), batch_size=2, shuffle=True, collate_fn=collate)
trainer = lightning.Trainer(max_steps=arguments.steps, gradient_clip_val=10.0)
trainer.fit(task, loader)
print({name: round(value.item(), 3) for name, value in trainer.callback_metrics.items()})
