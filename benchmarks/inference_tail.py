"""Inference from features to COCO results, compared with torchvision: box and mask branch, detections, paste, RLE.

    python benchmarks/inference_tail.py [--device cpu|cuda] [--classes 91] [--repeats 7]

Takes about a minute on two CPU cores. The input is one image of 800 x 1333 px without resizing, random FPN features,
1000 proposals around 100 objects, and a score threshold that 1000 candidates pass; the output is 100 detections.
torchvision's masks are pasted, compared with 0.5 and encoded by pycocotools; ours are encoded from the probabilities.
Both sides alternate in one process. Checks that both find the same boxes, and writes results/inference_tail.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from measuring import Spread, alternating, peak_bytes, speedup, without_tf32, write_results
from pycocotools import mask as coco_mask
from scenes import HEIGHT, WIDTH, fpn_features, proposals, scene_boxes
from torch import Tensor, nn
from torchvision.models.detection import maskrcnn_resnet50_fpn

from maskloss import convert
from maskloss.masks.paste import paste_masks

DETECTIONS, CANDIDATES, PROPOSALS = 100, 1000, 1000
SIZE = (HEIGHT, WIDTH)


def models(num_classes: int, device: torch.device) -> tuple[nn.Module, nn.Module]:
    """Build the stock model and the converted one, with the same weights."""
    torch.manual_seed(0)
    stock = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=num_classes)
    # An untrained network scores all classes alike; spread the scores.
    nn.init.normal_(stock.roi_heads.box_predictor.cls_score.weight, std=1.0)
    ours = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=num_classes)
    ours.load_state_dict(stock.state_dict())
    return stock.to(device).eval(), convert(ours.to(device), paste=None).eval()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--classes", type=int, default=91)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    torch.set_grad_enabled(False)
    stock, ours = models(arguments.classes, device)
    torch.manual_seed(1)
    features = fpn_features(1, device)
    near = [proposals(scene_boxes(DETECTIONS), PROPOSALS)[0].to(device)]
    heads = stock.roi_heads
    logits, _ = heads.box_predictor(heads.box_head(heads.box_roi_pool(features, near, [SIZE])))
    threshold = float(logits.softmax(-1)[:, 1:].flatten().topk(CANDIDATES).values[-1])
    for model in (stock, ours):
        model.roi_heads.score_thresh = threshold

    def detections(model: nn.Module) -> dict[str, Tensor]:
        found, _ = model.roi_heads(features, near, [SIZE])
        (detection,) = model.transform.postprocess(found, [SIZE], [SIZE])
        return detection

    def torchvisions() -> list[dict[str, Any]]:
        pasted = (detections(stock)["masks"][:, 0] > 0.5).permute(1, 2, 0).cpu().numpy()
        encoded: list[dict[str, Any]] = coco_mask.encode(np.asfortranarray(pasted.view(np.uint8)))
        return encoded

    def matched() -> Any:
        detection = detections(ours)
        offset = ours.transform.mask_offset(SIZE)
        return paste_masks(detection["masks"][:, 0], detection["boxes"], SIZE, offset=offset, output="rle")

    with without_tf32():
        boxes = [detections(model)["boxes"] for model in (stock, ours)]
        tolerance = 0 if device.type == "cpu" else 5e-4
        torch.testing.assert_close(*boxes, rtol=tolerance, atol=tolerance)
    assert len(torchvisions()) == len(matched()) == DETECTIONS
    functions: dict[str, Callable[[], Any]] = {"torchvision": torchvisions, "ours": matched}
    times = alternating(functions, arguments.repeats, device)
    ratio = speedup(times["torchvision"], times["ours"])
    memory = {name: peak_bytes(function) for name, function in functions.items()}
    medians = {name: Spread.of(values).median for name, values in times.items()}
    print(
        f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads, {arguments.classes} classes"
    )
    print(
        f"torchvision {1e3 * medians['torchvision']:.0f} ms, ours {1e3 * medians['ours']:.0f} ms: "
        f"{ratio.median:.2f}x ({ratio.low:.2f}-{ratio.high:.2f}); "
        f"{memory['torchvision'] / 2**20:.0f} and {memory['ours'] / 2**20:.0f} MiB of the host"
    )
    write_results("inference_tail", device, {"seconds": medians, "times_faster": ratio, "host_bytes": memory})


if __name__ == "__main__":
    main()
