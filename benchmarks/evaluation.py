"""Images per second of an evaluation beside torchvision's reference `evaluate`, from image files to AP.

    python benchmarks/evaluation.py --images DIR --annotations FILE [--network FILE] [--num-images N] [--rounds 3]
                                    [--threads 2] [--device cpu|cuda]

Both sides evaluate the same Mask R-CNN: torchvision's R50-FPN with its published weights, or that of a Python file
with `build()` and `CATEGORY_IDS`, as in `real_network/`. The plain side does what torchvision's reference script
does: it takes one image at a time, with its objects' masks as pixels, lets the model paste the detections, compares
each mask with 0.5, encodes it with pycocotools, and computes box and mask AP with pycocotools. Ours is
`maskloss.training.evaluation.evaluate`, with the model as `maskloss evaluate` builds it. It also computes boundary
AP. It is measured without and with the losses. The sides alternate. Prints medians and ratios, checks that box AP is
equal, and writes results/evaluation.json.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from loop import PlainDataset
from measuring import Spread, alternating, speedup, without_tf32, write_results
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.models.detection import maskrcnn_resnet50_fpn

import maskloss
from benchmarks.real_network.network import read_network
from maskloss.data.coco import CocoData, read_coco
from maskloss.detection.convolutions import fold_frozen_norms, use_channels_last
from maskloss.training.evaluation import evaluate
from maskloss.training.metrics import Metrics


def networks(file: Path | None, device: torch.device) -> tuple[nn.Module, nn.Module, list[int] | None]:
    """Return the stock network, the converted one, and the category of each label from 1 on, or None for its number."""
    if file is None:
        stock, other = (maskrcnn_resnet50_fpn(weights="DEFAULT") for _ in range(2))
        category_ids = None
    else:
        network = read_network(file)
        stock, other = network.build(), network.build()
        category_ids = list(network.CATEGORY_IDS)
    ours = maskloss.convert(use_channels_last(fold_frozen_norms(other)), paste=None)
    return stock.to(device).eval(), ours.to(device).eval(), category_ids


def write_inputs(arguments: argparse.Namespace, category_ids: list[int] | None, folder: Path) -> Path:
    """Write the annotations of the first images, with the network's categories in the order of its labels.

    Crowds and RLE masks are left out, so that the plain side needs no code for them.
    """
    document = json.loads(arguments.annotations.read_text())
    ids = category_ids or list(range(1, 91))
    names = {category["id"]: category["name"] for category in document["categories"]}
    objects = [
        one
        for one in document["annotations"]
        if not one.get("iscrowd") and isinstance(one["segmentation"], list) and min(one["bbox"][2:]) > 1
    ]
    with_objects = {one["image_id"] for one in objects}
    images = [image for image in document["images"] if image["id"] in with_objects][: arguments.num_images]
    chosen = {image["id"] for image in images}
    part = {
        "images": images,
        "annotations": [one for one in objects if one["image_id"] in chosen],
        "categories": [{"id": number, "name": names.get(number, f"unused {number}")} for number in ids],
    }
    path = folder / "annotations.json"
    path.write_text(json.dumps(part))
    return path


def plain_evaluation(
    model: nn.Module, images: Path, annotations: Path, category_ids: list[int], device: torch.device
) -> dict[str, float]:
    """Evaluate as torchvision's reference script does, and return the box and mask AP."""
    dataset = PlainDataset(images, annotations, flip=0.0)
    loader: DataLoader[Any] = DataLoader(dataset, batch_size=1, collate_fn=list)
    found = []
    with torch.inference_mode():
        for number, ((image, _),) in enumerate(loader):
            (detection,) = model([image.to(device)])
            detection = {key: value.cpu() for key, value in detection.items()}
            found += plain_results(detection, dataset.images[number]["id"], category_ids)
    metrics = {}
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(annotations)
        detections = truth.loadRes(found)
        for kind in ("bbox", "segm"):
            evaluator = COCOeval(truth, detections, kind)
            evaluator.evaluate()
            evaluator.accumulate()
            evaluator.summarize()
            metrics[kind] = float(evaluator.stats[0])
    return metrics


def plain_results(
    detection: dict[str, Tensor], image_id: int, category_ids: list[int]
) -> list[dict[str, Any]]:
    """Return COCO results of an image, with each mask compared with 0.5 and encoded by pycocotools."""
    results = []
    for box, label, score, probs in zip(
        detection["boxes"].tolist(),
        detection["labels"].tolist(),
        detection["scores"].tolist(),
        detection["masks"],
        strict=True,
    ):
        mask = np.asfortranarray((probs[0] > 0.5).numpy().astype(np.uint8))
        results.append(
            {
                "image_id": image_id,
                "category_id": category_ids[label - 1],
                "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]],
                "score": score,
                "segmentation": coco_mask.encode(mask),
            }
        )
    return results


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--annotations", type=Path, required=True)
    parser.add_argument("--network", type=Path, help="Python file of the network")
    parser.add_argument("--num-images", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    stock, ours, category_ids = networks(arguments.network, device)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        annotations = write_inputs(arguments, category_ids, Path(name))
        data: CocoData = read_coco(arguments.images, annotations)
        categories = [category.id for category in data.categories]

        def ours_with(losses: bool) -> Metrics:
            return evaluate(ours, data, batch_size=1, device=device, losses=losses).metrics

        sides: dict[str, Callable[[], Any]] = {
            "torchvision": lambda: plain_evaluation(stock, arguments.images, annotations, categories, device),
            "AP alone": lambda: ours_with(losses=False),
            "AP and losses": lambda: ours_with(losses=True),
        }

        def recorded(side: str) -> Callable[[], None]:
            return lambda: found.__setitem__(side, sides[side]())

        with without_tf32():
            times = alternating({side: recorded(side) for side in sides}, arguments.rounds, device)
    plain, metrics = found["torchvision"], found["AP alone"]
    print(
        f"{len(data.images)} images, {len(found)} sides; box AP {100 * plain['bbox']:.2f} and "
        f"{100 * metrics['bbox']['AP']:.2f}, mask AP {100 * plain['segm']:.2f} and {100 * metrics['segm']['AP']:.2f}"
    )
    if abs(plain["bbox"] - metrics["bbox"]["AP"]) > 1e-6:
        raise SystemExit("the two sides have different box AP")
    results: dict[str, Any] = {}
    for side, taken in times.items():
        results[side] = {"images_per_second": len(data.images) / Spread.of(taken).median}
        line = f"{side:<16} {results[side]['images_per_second']:>8.2f} images/s"
        if side != "torchvision":
            results[side]["times_faster"] = ratio = speedup(times["torchvision"], taken)
            line += f"  {ratio.median:.2f}x ({ratio.low:.2f} to {ratio.high:.2f})"
        print(line)
    write_results("evaluation", arguments.device, {f"{arguments.threads} threads": results})


if __name__ == "__main__":
    main()
