"""Time of the mask head's last layer, ours beside torchvision's, at 2, 91 and 1204 classes.

    python benchmarks/mask_tail.py [--device cpu|cuda] [--rois 64] [--repeats 15]

About a minute on two CPU cores. Both sides get the same 64 RoIs of 256 x 28 x 28, the features after the
transposed convolution, and go forward and backward, to a loss on the channel of each RoI's own class:
torchvision by its 1 x 1 convolution to all classes and a gather, ours by one dot product per RoI. They
alternate within one process, so that whatever else the machine does meets both. Prints the median ratio with
its quartiles, and how our time grows from 2 to 1204 classes; checks that both give the same numbers.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor

from maskloss.detection.heads import ClassSelectedMaskPredictor
from maskloss.losses import mask_bce_loss, select_class_masks

CHANNELS, SIDE = 256, 28
CLASS_COUNTS = (2, 91, 1204)


def tails(
    num_classes: int, rois: int, device: torch.device
) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """Give one forward and backward pass of each side; each returns the features' gradient."""
    torch.manual_seed(0)
    ours = ClassSelectedMaskPredictor(CHANNELS, CHANNELS, num_classes).to(device)
    # What both share, the transposed convolution, is left out: identity keeps the code of forward as it is.
    ours.conv5_mask, ours.relu = torch.nn.Identity(), torch.nn.Identity()
    stock = MaskRCNNPredictor(CHANNELS, CHANNELS, num_classes).to(device)
    stock.conv5_mask, stock.relu = torch.nn.Identity(), torch.nn.Identity()
    stock.load_state_dict(ours.state_dict())
    features = torch.rand(rois, CHANNELS, SIDE, SIDE, device=device, requires_grad=True)
    labels = torch.randint(1, num_classes, (rois,), device=device)
    targets = torch.rand(rois, SIDE, SIDE, device=device)

    def run(predict: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def forward_and_backward() -> Tensor:
            features.grad = None
            for parameter in (*ours.parameters(), *stock.parameters()):
                parameter.grad = None
            mask_bce_loss(select_class_masks(predict(), labels), targets, reduction="mean").backward()
            assert features.grad is not None
            return features.grad

        return forward_and_backward

    return run(lambda: stock(features)), run(lambda: ours(features, labels))


def seconds(function: Callable[[], Tensor], device: torch.device) -> float:
    """Time one call, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rois", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)

    pairs = {count: tails(count, arguments.rois, device) for count in CLASS_COUNTS}
    times: dict[int, list[tuple[float, float]]] = {count: [] for count in CLASS_COUNTS}
    for stock, ours in pairs.values():
        torch.testing.assert_close(ours(), stock(), rtol=1e-4, atol=1e-9)
    for _ in range(arguments.repeats):
        for count, (stock, ours) in pairs.items():
            times[count].append((seconds(stock, device), seconds(ours, device)))

    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads, {arguments.rois} RoIs")
    print(f"{'classes':>8} {'torchvision':>12} {'ours':>9} {'ratio':>7}  quartiles")
    for count, measured in times.items():
        ratios = [stock / ours for stock, ours in measured]
        low, _, high = statistics.quantiles(ratios, n=4)
        stock_time, our_time = (statistics.median(column) for column in zip(*measured, strict=True))
        print(
            f"{count:>8} {1e3 * stock_time:>9.1f} ms {1e3 * our_time:>6.1f} ms "
            f"{statistics.median(ratios):>6.1f}x  {low:.1f} to {high:.1f}"
        )
    growth = [most[1] / least[1] for least, most in zip(times[2], times[1204], strict=True)]
    print(f"ours, 1204 classes against 2: {statistics.median(growth):.2f}x the time")


if __name__ == "__main__":
    main()
