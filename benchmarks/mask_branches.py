"""Time and memory of the mask branches of PointRend and Mask Scoring R-CNN beside torchvision's mask layers.

    python benchmarks/mask_branches.py

A whole converted Mask R-CNN with ResNet-50 and FPN, 91 classes, on a scene of 20 objects resized to 320 px: one
training step (forward and backward) of two images, and inference of one image with 50 detections, masks as
probabilities.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from measuring import Spread, alternating, peak_bytes, speedup, write_results
from scenes import HEIGHT, WIDTH, scene
from torch import Tensor, nn
from torchvision.models.detection import maskrcnn_resnet50_fpn

from maskloss import EncodedMasks, convert

OBJECTS, DETECTIONS, SIZE = 20, 50, 320
BRANCHES: dict[str, Any] = {"torchvision": None, "point_rend": "point_rend", "mask_iou": "mask_iou"}


def build(branch: Any, device: torch.device) -> nn.Module:
    """Build a converted model with a mask branch; all have the same weights otherwise."""
    torch.manual_seed(0)
    model = maskrcnn_resnet50_fpn(
        weights=None,
        weights_backbone=None,
        min_size=SIZE,
        max_size=2 * SIZE,
        box_score_thresh=0.0,
        box_detections_per_img=DETECTIONS,
    )
    return convert(model, "aligned", paste=None, mask_branch=branch).to(device)


def main() -> None:
    """Print and write time and memory of each branch."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    _, polygons, boxes = scene(OBJECTS)
    image = torch.rand(3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0)).to(device)
    labels = torch.arange(OBJECTS) % 90 + 1
    target = {
        "boxes": boxes.to(device),
        "labels": labels.to(device),
        "masks": EncodedMasks(polygons, HEIGHT, WIDTH),
    }
    models = {name: build(branch, device) for name, branch in BRANCHES.items()}

    def step(model: nn.Module) -> Tensor:
        model.train()
        model.zero_grad(set_to_none=True)
        torch.manual_seed(1)
        total: Tensor = sum(model([image, image], [target, target]).values())
        total.backward()
        return total

    def predict(model: nn.Module) -> Any:
        model.eval()
        with torch.inference_mode():
            (detection,) = model([image])
        assert len(detection["masks"]) == DETECTIONS
        return detection

    results: dict[str, Any] = {}
    tasks: dict[str, Callable[[nn.Module], Any]] = {"training step": step, "inference": predict}
    for task, run in tasks.items():
        functions = {name: (lambda model=model, run=run: run(model)) for name, model in models.items()}
        times = alternating(functions, arguments.repeats, device)
        for name, function in functions.items():
            ratio = speedup(times[name], times["torchvision"])
            peak = peak_bytes(function, device)
            results[f"{task}, {name}"] = {
                "seconds": Spread.of(times[name]),
                "times_torchvisions": ratio,
                "peak_bytes": peak,
            }
            print(
                f"{task}, {name}: {Spread.of(times[name]).median:.2f} s, {ratio.median:.2f} times torchvision's "
                f"({ratio.low:.2f} to {ratio.high:.2f}), peak {peak / 2**20:.0f} MiB"
            )
    write_results("mask_branches", device, results)


if __name__ == "__main__":
    main()
