"""Train masks from any mix of masks, labeled points and boxes, in your own training loop.

    python examples/weak_labels.py --images photos --annotations train.json --steps 1000

The annotation file is in COCO format. Besides its bbox, an object may have a segmentation, or point_coords and
point_labels, and a weight.
"""

import argparse

import torch
import torchvision
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor

import maskloss
from maskloss.data.coco import read_coco
from maskloss.data.dataset import CocoDataset, collate


def main() -> None:
    """Fine-tune torchvision's Mask R-CNN, and print the losses."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", required=True)
    parser.add_argument("--annotations", required=True)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--weights", default="DEFAULT", help="DEFAULT (COCO weights) or none")
    arguments = parser.parse_args()

    data = read_coco(arguments.images, arguments.annotations)
    loader = torch.utils.data.DataLoader(CocoDataset(data), batch_size=2, shuffle=True, collate_fn=collate)
    weights = None if arguments.weights == "none" else arguments.weights
    model = torchvision.models.detection.maskrcnn_resnet50_fpn(weights=weights, weights_backbone=None)
    num_classes = len(data.categories) + 1  # the weights are for COCO's classes
    model.roi_heads.box_predictor = FastRCNNPredictor(1024, num_classes)
    model.roi_heads.mask_predictor = MaskRCNNPredictor(256, 256, num_classes)
    maskloss.convert(model, "weak")  # the only difference from training with masks
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.0025, momentum=0.9, weight_decay=1e-4)

    model.train()
    step = 0
    while step < arguments.steps:
        for images, targets in loader:
            losses = model(images, targets)
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
            step += 1
            print(step, {key: round(value.item(), 3) for key, value in losses.items()})
            if step == arguments.steps:
                break


if __name__ == "__main__":
    main()
