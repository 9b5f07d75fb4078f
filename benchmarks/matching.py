"""Time and memory of matching anchors and objects, compared with torchvision.

    python benchmarks/matching.py [--device cpu|cuda] [--repeats 5]

Takes about a minute on two CPU cores. The input is the 268,569 anchors of an image of 800 x 1344 px on five levels, and
1 to 500 objects. Both sides alternate in one process. Checks that both return the same matches, and writes
results/matching.json.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import torch
from measuring import Spread, alternating, peak_bytes, speedup, write_results
from scenes import scene_boxes
from torch import Tensor
from torchvision.models.detection._utils import Matcher
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou

from maskloss.detection.matching import match

OBJECT_COUNTS = (1, 8, 30, 100, 500)
#: Number of objects to measure memory with.
MOST_OBJECTS = OBJECT_COUNTS[-1]


def anchors_of_an_image() -> Tensor:
    """Make the anchors (A, 4) of torchvision's default RPN for one image."""
    make = AnchorGenerator(((32,), (64,), (128,), (256,), (512,)), ((0.5, 1.0, 2.0),) * 5)
    maps = [torch.zeros(1, 1, -(-800 // stride), -(-1344 // stride)) for stride in (4, 8, 16, 32, 64)]
    anchors: Tensor = make(ImageList(torch.zeros(1, 3, 800, 1344), [(800, 1344)]), maps)[0]
    return anchors


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    anchors = anchors_of_an_image().to(device)
    matcher = Matcher(0.7, 0.3, allow_low_quality_matches=True)
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads, {len(anchors)} anchors")
    print(f"{'objects':>8} {'torchvision':>14} {'ours':>12}  times faster")
    results: dict[str, Any] = {}
    for count in OBJECT_COUNTS:
        boxes = scene_boxes(count).to(device)

        def stock(boxes: Tensor) -> Tensor:
            matches: Tensor = matcher(box_iou(boxes, anchors))
            return matches

        functions = {
            "torchvision": partial(stock, boxes),
            "ours": partial(match, boxes, anchors, matcher, box_iou),
        }
        # On a GPU, fused multiply-adds may move an IoU across a threshold.
        different = (functions["torchvision"]() != functions["ours"]()).double().mean()
        assert different <= (0 if device.type == "cpu" else 5e-4), different
        times = alternating(functions, arguments.repeats, device)
        ratio = speedup(times["torchvision"], times["ours"])
        medians = {side: 1e3 * Spread.of(values).median for side, values in times.items()}
        print(
            f"{count:>8} {medians['torchvision']:>11.1f} ms {medians['ours']:>9.1f} ms  "
            f"{ratio.median:.1f}x ({ratio.low:.1f}-{ratio.high:.1f})"
        )
        results[f"{count} objects"] = {"milliseconds": medians, "times_faster": ratio}
        if count == MOST_OBJECTS:
            memory = {side: peak_bytes(function, device) for side, function in functions.items()}
            results[f"{count} objects"]["bytes"] = memory
            print(
                f"peak extra memory with {count} objects: {memory['torchvision'] / 2**20:.0f} and "
                f"{memory['ours'] / 2**20:.0f} MiB, {memory['torchvision'] / memory['ours']:.0f}x less"
            )
    write_results("matching", device, results)


if __name__ == "__main__":
    main()
