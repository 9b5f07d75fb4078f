"""Time of the mask head's last layer at 2, 91 and 1204 classes, compared with torchvision.

    python benchmarks/mask_tail.py [--device cpu|cuda] [--rois 64] [--repeats 15]

Takes about a minute on two CPU cores. Both sides get the same 64 RoIs of 256 x 28 x 28, the features after the
transposed convolution, and run forward and backward for a loss on the channel of each RoI's own class: torchvision
by its 1 x 1 convolution to all classes and a gather, ours by one dot product per RoI. Both sides alternate in one
process, so that other load affects both. Prints the median ratio with its quartiles, and the growth of our time from
2 to 1204 classes. Checks that both sides compute the same numbers, and writes results/mask_tail.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from measuring import Spread, alternating, speedup, without_tf32, write_results
from torch import Tensor
from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor

from maskloss.detection.mask_predictor import ClassSelectedMaskPredictor
from maskloss.losses import mask_bce_loss, select_class_masks

CHANNELS, SIDE = 256, 28
CLASS_COUNTS = (2, 91, 1204)


def tails(
    num_classes: int, rois: int, device: torch.device
) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """Return the forward and backward pass of torchvision and of ours; each returns the gradient of the features."""
    torch.manual_seed(0)
    ours = ClassSelectedMaskPredictor(CHANNELS, CHANNELS, num_classes).to(device)
    # Skip the transposed convolution, which both sides share; identities keep `forward` unchanged.
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

    functions: dict[str, Callable[[], Tensor]] = {}
    for count in CLASS_COUNTS:
        stock, ours = tails(count, arguments.rois, device)
        with without_tf32():
            torch.testing.assert_close(
                ours(), stock(), rtol=5e-4, atol=1e-8
            )  # fused multiply-adds differ on a GPU
        functions |= {f"torchvision, {count}": stock, f"ours, {count}": ours}
    times = alternating(functions, arguments.repeats, device)

    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads, {arguments.rois} RoIs")
    print(f"{'classes':>8} {'torchvision':>12} {'ours':>9} {'ratio':>7}  quartiles")
    results: dict[str, Any] = {}
    for count in CLASS_COUNTS:
        stock_times, our_times = times[f"torchvision, {count}"], times[f"ours, {count}"]
        ratio = speedup(stock_times, our_times)
        print(
            f"{count:>8} {1e3 * Spread.of(stock_times).median:>9.1f} ms {1e3 * Spread.of(our_times).median:>6.1f} ms "
            f"{ratio.median:>6.1f}x  {ratio.low:.1f} to {ratio.high:.1f}"
        )
        results[f"{count} classes, times faster"] = ratio
    growth = speedup(times[f"ours, {CLASS_COUNTS[-1]}"], times[f"ours, {CLASS_COUNTS[0]}"])
    print(f"ours, {CLASS_COUNTS[-1]} classes against {CLASS_COUNTS[0]}: {growth.median:.2f}x the time")
    write_results("mask_tail", device, {**results, "time at the most classes over the least": growth})


if __name__ == "__main__":
    main()
