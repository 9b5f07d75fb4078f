"""Detection models small enough to train a step in milliseconds, and batches for them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, KeypointRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign

from maskloss import MaskRCNNLoss

NUM_CLASSES = 4
NUM_KEYPOINTS = 5
CHANNELS = 6
CLASS_WEIGHTS = torch.tensor([0.5, 1.0, 2.0, 3.0])


class TinyBackbone(nn.Module):
    """One strided convolution and a BatchNorm, so that there are running statistics to test."""

    def __init__(self) -> None:
        super().__init__()
        self.out_channels = CHANNELS
        # A bias before a normalization has a gradient of 0, so tests would compare only rounding errors.
        self.conv = nn.Conv2d(3, CHANNELS, 8, stride=8, bias=False)
        self.norm = nn.BatchNorm2d(CHANNELS)

    def forward(self, images: Tensor) -> Tensor:
        return self.norm(self.conv(images)).relu()


class MyMaskRCNN(MaskRCNN):
    """A user's subclass."""


def _detector_parts() -> dict[str, object]:
    return {
        "rpn_anchor_generator": AnchorGenerator(sizes=((16, 32),), aspect_ratios=((1.0,),)),
        "box_roi_pool": MultiScaleRoIAlign(["0"], output_size=3, sampling_ratio=2),
        "box_head": TwoMLPHead(CHANNELS * 9, 16),
        "box_predictor": FastRCNNPredictor(16, NUM_CLASSES),
        "min_size": 64,
        "max_size": 128,
        "rpn_batch_size_per_image": 32,
        "box_batch_size_per_image": 16,
        "rpn_post_nms_top_n_train": 30,
        "rpn_post_nms_top_n_test": 20,
        # Untrained scores lie near 1 / NUM_CLASSES; without a threshold there are always detections.
        "box_score_thresh": 0.0,
        "box_detections_per_img": 10,
    }


def tiny_faster_rcnn(seed: int = 0) -> FasterRCNN:
    torch.manual_seed(seed)
    return _spread(FasterRCNN(TinyBackbone(), **_detector_parts()))


def tiny_mask_rcnn(seed: int = 0, kind: type[MaskRCNN] = MaskRCNN) -> MaskRCNN:
    torch.manual_seed(seed)
    return _spread(
        kind(
            TinyBackbone(),
            mask_roi_pool=MultiScaleRoIAlign(["0"], output_size=4, sampling_ratio=2),
            mask_head=MaskRCNNHeads(CHANNELS, (CHANNELS,), 1),
            mask_predictor=MaskRCNNPredictor(CHANNELS, CHANNELS, NUM_CLASSES),
            **_detector_parts(),
        )
    )


def tiny_keypoint_rcnn(seed: int = 0) -> KeypointRCNN:
    torch.manual_seed(seed)
    return _spread(
        KeypointRCNN(
            TinyBackbone(),
            keypoint_roi_pool=MultiScaleRoIAlign(["0"], output_size=4, sampling_ratio=2),
            keypoint_head=KeypointRCNNHeads(CHANNELS, (CHANNELS,)),
            keypoint_predictor=KeypointRCNNPredictor(CHANNELS, NUM_KEYPOINTS),
            **_detector_parts(),
        )
    )


def _spread(model: nn.Module) -> nn.Module:
    """Scale the last layers up: with the initial weights all scores are similar, which would hide a wrong order."""
    with torch.no_grad():
        model.roi_heads.box_predictor.cls_score.weight.mul_(10)
        model.rpn.head.cls_logits.weight.mul_(10)
    return model


def batch(num_images: int = 2, seed: int = 0) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Return random images of different sizes and targets with two objects each, for any of the models."""
    generator = torch.Generator().manual_seed(seed)
    images, targets = [], []
    for index in range(num_images):
        height, width = 64 + 8 * index, 80 - 8 * index
        images.append(torch.rand((3, height, width), generator=generator))
        boxes = torch.tensor([[4.0, 6.0, 30.0, 40.0], [25.0, 20.0, 60.0, 55.0]]) + index
        masks = torch.zeros((2, height, width), dtype=torch.uint8)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
            # A triangle instead of the whole box, so that the mask target is not constant.
            rows, columns = torch.arange(height)[:, None], torch.arange(width)
            mask[
                (rows >= y1) & (rows < y2) & (columns >= x1) & (columns < x2) & (rows - y1 > columns - x1)
            ] = 1
        corner, size = boxes[:, None, :2], boxes[:, None, 2:] - boxes[:, None, :2]
        places = corner + size * torch.rand((2, NUM_KEYPOINTS, 2), generator=generator)
        targets.append(
            {
                "boxes": boxes,
                "labels": torch.tensor([1 + index % (NUM_CLASSES - 1), NUM_CLASSES - 1]),
                "masks": masks,
                "keypoints": torch.cat([places, torch.ones(2, NUM_KEYPOINTS, 1)], dim=2),
                "image_id": torch.tensor(40 + index),
            }
        )
    return images, targets


def without_objects(images: list[Tensor]) -> list[dict[str, Tensor]]:
    """Return targets without objects."""
    return [
        {
            "boxes": torch.zeros((0, 4)),
            "labels": torch.zeros(0, dtype=torch.int64),
            "masks": torch.zeros((0, *image.shape[-2:]), dtype=torch.uint8),
            "keypoints": torch.zeros((0, NUM_KEYPOINTS, 3)),
        }
        for image in images
    ]


def training_pass(
    model: nn.Module, images: list[Tensor], targets: list[dict[str, Tensor]], seed: int = 1
) -> tuple[dict[str, Tensor], dict[str, Tensor | None]]:
    """Return the values of the losses in one seeded step, and each parameter's gradient."""
    model.train()
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    losses = model(images, targets)
    sum(losses.values()).backward()
    values = {key: value.detach() for key, value in losses.items()}
    return values, {name: parameter.grad for name, parameter in model.named_parameters()}


def class_weighted() -> MaskRCNNLoss:
    """Return a loss with a buffer."""
    return MaskRCNNLoss(classification=nn.CrossEntropyLoss(weight=CLASS_WEIGHTS.clone(), reduction="none"))
