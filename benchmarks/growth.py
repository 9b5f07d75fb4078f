"""How the time of each phase grows with objects, classes, pixels and images.

    python benchmarks/growth.py [--repeats 5] [--only "RPN matching, objects" ...]

For each phase of the converted model, the time is measured at growing sizes, and a line is fitted to the logarithms.
Its slope is the exponent: with 1, twice the size takes twice the time. Takes three minutes on two CPU cores. Prints a
table, and writes results/growth.json.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from measuring import seconds, write_results
from scenes import HEIGHT, WIDTH, proposals, scene, scene_boxes
from torch import Tensor
from torchvision.models.detection import maskrcnn_resnet50_fpn
from torchvision.models.detection._utils import Matcher
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou

from maskloss import EncodedMasks, convert, mask_targets
from maskloss.detection.mask_predictor import ClassSelectedMaskPredictor
from maskloss.detection.matching import match
from maskloss.detection.model_inputs import ModelInputs
from maskloss.detection.target_checks import check_inputs
from maskloss.masks.paste import paste_masks

Work = Callable[[], Any]


class Growth(NamedTuple):
    """A phase, and what grows.

    Attributes:
        sizes: the sizes, such as numbers of objects.
        prepare: returns the work of a size.
    """

    sizes: Sequence[int]
    prepare: Callable[[int], Work]


def anchors(side: int) -> Tensor:
    """Make the anchors of torchvision's default RPN for a square image, (A, 4)."""
    make = AnchorGenerator(((32,), (64,), (128,), (256,), (512,)), ((0.5, 1.0, 2.0),) * 5)
    maps = [torch.zeros(1, 1, -(-side // stride), -(-side // stride)) for stride in (4, 8, 16, 32, 64)]
    found: Tensor = make(ImageList(torch.zeros(1, 3, side, side), [(side, side)]), maps)[0]
    return found


def boxes_in(side: int, objects: int) -> Tensor:
    """Make random boxes in a square image, (G, 4), with the sizes of `scene_boxes`."""
    scale = torch.tensor([side / WIDTH, side / HEIGHT]).repeat(2)
    return scene_boxes(objects) * scale


def rpn_matching(objects: int, side: int) -> Work:
    """Match the anchors of an image to its objects."""
    matcher = Matcher(0.7, 0.3, allow_low_quality_matches=True)
    gt_boxes, candidates = boxes_in(side, objects), anchors(side)
    return lambda: match(gt_boxes, candidates, matcher, box_iou)


def detections(num_classes: int, rois: int) -> Work:
    """Turn the outputs of the box branch into detections, of which a hundred scores pass the threshold."""
    torch.manual_seed(0)
    model = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=num_classes)
    heads: Any = convert(model).eval().roi_heads
    logits, deltas = torch.randn(rois, num_classes), torch.randn(rois, 4 * num_classes)
    heads.score_thresh = float(logits.softmax(1)[:, 1:].flatten().topk(100).values[-1])
    near = proposals(scene_boxes(100), rois)[0]
    return lambda: heads.postprocess_detections(logits, deltas, [near], [(HEIGHT, WIDTH)])


def last_layer(num_classes: int, positives: int) -> Work:
    """Compute the logits of each RoI's own class, forward and backward."""
    torch.manual_seed(0)
    layer = ClassSelectedMaskPredictor(256, 256, num_classes)
    hidden = torch.rand(positives, 256, 14, 14, requires_grad=True)
    labels = torch.randint(1, num_classes, (positives,))
    return lambda: layer(hidden, labels).sum().backward()


def targets(kind: str, objects: int, rois: int) -> Work:
    """Make mask targets of positive RoIs."""
    masks, polygons, boxes = scene(objects)
    near, matched = proposals(boxes, rois)
    given = masks.bool() if kind == "bitmaps" else EncodedMasks(polygons, HEIGHT, WIDTH)
    return lambda: mask_targets(given, near, matched, 28)


def paste(detected: int, side: int) -> Work:
    """Paste masks of detections to RLEs."""
    probs = torch.rand(detected, 28, 28, generator=torch.Generator().manual_seed(0))
    boxes = boxes_in(side, 400)[:detected]
    return lambda: paste_masks(probs, boxes, (side, side), output="rle")


def checks(objects: int) -> Work:
    """Check an image's targets, with bitmaps."""
    masks, _, boxes = scene(objects)
    target = {"boxes": boxes, "labels": torch.ones(objects, dtype=torch.int64), "masks": masks}
    image = torch.rand(3, HEIGHT, WIDTH)
    expected = ModelInputs(num_classes=2, has_masks=True, unit_range=True)
    return lambda: check_inputs([image], [target], expected)


def training_step(batch: int, side: int, objects: int = 5) -> Work:
    """Take a training step of a ResNet-50 Mask R-CNN, forward and backward."""
    torch.manual_seed(0)
    model = convert(maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, min_size=side)).train()
    boxes = boxes_in(side, objects)
    masks = torch.zeros(objects, side, side, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.round().int().tolist(), strict=True):
        mask[y1 : max(y2, y1 + 1), x1 : max(x2, x1 + 1)] = 1
    target = {"boxes": boxes, "labels": torch.arange(1, objects + 1), "masks": masks}
    images = [torch.rand(3, side, side) for _ in range(batch)]
    return lambda: sum(model(images, [target] * batch).values()).backward()


PHASES = {
    "RPN matching, objects": Growth((125, 250, 500, 1000, 2000), lambda n: rpn_matching(n, 800)),
    "RPN matching, px of an image with 500 objects": Growth(
        (400**2, 800**2, 1600**2), lambda n: rpn_matching(500, math.isqrt(n))
    ),
    "detections, classes": Growth((91, 1204, 5000, 10000), lambda n: detections(n, 500)),
    "detections, RoIs": Growth((250, 500, 1000, 2000), lambda n: detections(91, n)),
    "mask head's last layer, classes": Growth((91, 1204, 5000, 10000), lambda n: last_layer(n, 64)),
    "mask head's last layer, RoIs": Growth((32, 64, 128, 256), lambda n: last_layer(91, n)),
    "targets of bitmaps, RoIs": Growth((64, 128, 256, 512), lambda n: targets("bitmaps", 100, n)),
    "targets of bitmaps, objects": Growth((50, 100, 200, 400), lambda n: targets("bitmaps", n, 128)),
    "targets of polygons, RoIs": Growth((64, 128, 256, 512), lambda n: targets("polygons", 100, n)),
    "targets of polygons, objects": Growth((50, 100, 200, 400), lambda n: targets("polygons", n, 128)),
    "paste to RLE, detections": Growth((50, 100, 200, 400), lambda n: paste(n, 800)),
    "paste to RLE, px of an image": Growth(
        (400**2, 800**2, 1600**2, 3200**2), lambda n: paste(100, math.isqrt(n))
    ),
    "checks of targets, objects": Growth((25, 50, 100, 200), checks),
    "training step, images": Growth((1, 2, 4), lambda n: training_step(n, 128)),
    "training step, px of an image": Growth(
        (128**2, 256**2, 512**2), lambda n: training_step(1, math.isqrt(n))
    ),
}


def exponent(sizes: Sequence[int], times: Sequence[float]) -> float:
    """Return the slope of the line through the logarithms."""
    slope, _ = np.polyfit(np.log(sizes), np.log(times), 1)
    return float(slope)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=list(PHASES), default=list(PHASES))
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    print(f"{'phase, what grows':<48} {'sizes':>18} {'milliseconds':>22} {'exponent':>9}")
    for name in arguments.only:
        growth = PHASES[name]
        times = []
        for size in growth.sizes:
            work = growth.prepare(size)
            work()
            times.append(statistics.median(seconds(work) for _ in range(arguments.repeats)))
            del work
        slope = exponent(growth.sizes, times)
        shown = " to ".join(f"{1e3 * value:.1f}" for value in (times[0], times[-1]))
        print(
            f"{name:<48} {f'{growth.sizes[0]} to {growth.sizes[-1]}':>18} {shown:>22} {slope:>9.2f}",
            flush=True,
        )
        results[name] = {"sizes": list(growth.sizes), "seconds": times, "exponent": slope}
    write_results("growth", "cpu", results)


if __name__ == "__main__":
    main()
