"""Training pass of the RoI heads, from proposals to gradients, compared with torchvision.

    python benchmarks/roi_path.py [--device cpu|cuda] [--classes 91 1204] [--repeats 3]

Takes about five minutes on two CPU cores. The input is a batch of two images of 800 x 1333 px with 20 objects each,
random FPN features, and proposals around the objects, so that 128 of 512 sampled RoIs per image are positive. A pass
is matching, sampling, pooling, box and mask branch, targets, losses and the backward pass to the features and
parameters. Checks that both sides compute the same losses. Prints median ratios, and the peak memory of one pass in a
separate process. Writes results/roi_path.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from measuring import Spread, alternating, peak_bytes, speedup, write_results
from scenes import HEIGHT, WIDTH, fpn_features, proposals, scene
from torch import Tensor, nn
from torchvision.models.detection import maskrcnn_resnet50_fpn

from maskloss import convert

BATCH, OBJECTS, PROPOSALS = 2, 20, 1000


def heads(num_classes: int, converted: bool, device: torch.device) -> nn.Module:
    """Build the RoI heads, with the same weights on both sides."""
    torch.manual_seed(0)
    model = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=num_classes)
    if converted:
        convert(model)
    roi_heads: nn.Module = model.roi_heads.to(device).train()
    return roi_heads


def batch(device: torch.device) -> tuple[dict[str, Tensor], list[Tensor], list[tuple[int, int]], list[Any]]:
    """Make the inputs of the heads: features, proposals, image sizes and targets."""
    torch.manual_seed(1)
    features = fpn_features(BATCH, device)
    masks, _, boxes = scene(OBJECTS)
    near, _ = proposals(boxes, PROPOSALS)
    target = {
        "boxes": boxes.to(device),
        "labels": torch.arange(1, OBJECTS + 1, device=device),
        "masks": masks.to(device),
    }
    return features, [near.to(device)] * BATCH, [(HEIGHT, WIDTH)] * BATCH, [target] * BATCH


def passes(num_classes: int, converted: bool, device: torch.device) -> Callable[[], dict[str, float]]:
    """Return a function that runs one forward and backward pass and returns the losses."""
    roi_heads = heads(num_classes, converted, device)
    features, near, sizes, targets = batch(device)
    for feature in features.values():
        feature.requires_grad_()

    def run() -> dict[str, float]:
        for tensor in (*features.values(), *roi_heads.parameters()):
            tensor.grad = None
        torch.manual_seed(2)
        _, losses = roi_heads(features, near, sizes, targets)
        sum(losses.values()).backward()
        return {name: float(value.detach()) for name, value in losses.items()}

    return run


def peak_of(side: str, num_classes: int, device: str) -> int:
    """Measure the peak additional memory of one pass in bytes, on a CPU in a separate process."""
    if device == "cuda":
        return peak_bytes(passes(num_classes, side == "ours", torch.device(device)), device)
    command = [sys.executable, __file__, "--peak", side, "--classes", str(num_classes)]
    return int(json.loads(subprocess.check_output(command, text=True).splitlines()[-1]))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--classes", type=int, nargs="+", default=[91, 1204])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peak", choices=["torchvision", "ours"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if arguments.peak:
        print(peak_bytes(passes(arguments.classes[0], arguments.peak == "ours", device)))
        return
    results: dict[str, Any] = {}
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads")
    print(f"{'classes':>8} {'torchvision':>12} {'ours':>9}  times faster       memory of one pass")
    for num_classes in arguments.classes:
        functions = {
            "torchvision": passes(num_classes, False, device),
            "ours": passes(num_classes, True, device),
        }
        expected, found = functions["torchvision"](), functions["ours"]()
        assert all(abs(found[key] - value) <= 1e-5 * abs(value) for key, value in expected.items()), found
        times = alternating(functions, arguments.repeats, device)
        ratio = speedup(times["torchvision"], times["ours"])
        del functions
        memory = {side: peak_of(side, num_classes, arguments.device) for side in times}
        medians = {side: Spread.of(values).median for side, values in times.items()}
        print(
            f"{num_classes:>8} {medians['torchvision']:>10.2f} s {medians['ours']:>7.2f} s  "
            f"{ratio.median:.2f}x ({ratio.low:.2f}-{ratio.high:.2f})   "
            f"{memory['torchvision'] / 2**20:.0f} and {memory['ours'] / 2**20:.0f} MiB, "
            f"{memory['ours'] / memory['torchvision']:.2f}x"
        )
        results[str(num_classes)] = {"seconds": medians, "times_faster": ratio, "bytes": memory}
    write_results("roi_path", device, results)


if __name__ == "__main__":
    main()
