"""Effect of the paste on the AP of a published network on photographs.

    python -m benchmarks.real_network.paste --network maskrcnn2go.py --images photos --annotations instances.json

`--network` is a Python file with `build()`, which returns a torchvision Mask R-CNN, and `CATEGORY_IDS`, the category id
of each label from 1 on. The masks are pasted in four ways, and everything else is the same. The script also counts the
images on which the converted network's boxes, scores or labels are not bit-equal to the original network's.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.transforms.v2.functional import pil_to_tensor, to_dtype
from tqdm import tqdm

import maskloss
from benchmarks.measuring import write_results
from benchmarks.real_network.network import read_network
from maskloss.data.coco import read_coco
from maskloss.data.images import read_image
from maskloss.masks.results import image_results
from maskloss.training.metrics import average_precision

Results = list[dict[str, Any]]


def by_torchvision(detection: dict[str, Tensor], results: Results, size: tuple[int, int]) -> Results:
    """Return results with their masks replaced by those of torchvision's paste."""
    pasted = paste_masks_in_image(detection["masks"], detection["boxes"], size)[:, 0] > 0.5
    rles = [coco_mask.encode(np.asfortranarray(mask.numpy().astype(np.uint8))) for mask in pasted]
    return [
        {**result, "segmentation": {"size": list(size), "counts": rle["counts"].decode()}}
        for result, rle in zip(results, rles, strict=True)
    ]


def main() -> None:
    """Measure each paste, and print and write the metrics."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("network", "images", "annotations"):
        parser.add_argument(f"--{name}", required=True)
    arguments = parser.parse_args()
    network = read_network(arguments.network)
    stock = network.build()
    model = maskloss.convert(network.build(), paste=None)
    data = read_coco(arguments.images, arguments.annotations)
    found: dict[str, Results] = {
        name: [] for name in ("torchvision's", "aligned", "matched", "half a pixel off")
    }
    different = 0
    for record in tqdm(data.images):
        image = to_dtype(pil_to_tensor(read_image(data.image_path(record))), torch.float32, scale=True)
        size = (record.height, record.width)
        with torch.inference_mode():
            (detection,) = model([image])
            (expected,) = stock([image])
        different += not all(
            torch.equal(detection[key], expected[key]) for key in ("boxes", "scores", "labels")
        )
        for name, offset in (
            ("aligned", (0.0, 0.0)),
            ("matched", maskloss.mask_offset(model, size)),
            ("half a pixel off", (0.5, 0.5)),
        ):
            found[name] += image_results(
                detection, record.id, size, offset=offset, category_ids=network.CATEGORY_IDS
            )
        plain = image_results(detection, record.id, size, category_ids=network.CATEGORY_IDS)
        found["torchvision's"] += by_torchvision(detection, plain, size)
    rows = []
    for name, results in found.items():
        metrics = average_precision(data, results)
        rows.append({"paste": name, "box AP": metrics["bbox"]["AP"], **metrics["segm"]})
        values = {key: value for key, value in rows[-1].items() if key != "paste"}
        print(f"{name:18s} " + "  ".join(f"{key} {100 * value:.2f}" for key, value in values.items()))
    print(
        f"{len(data.images)} images; boxes, scores or labels differ from the original network's in {different}"
    )
    write_results("real_network", "cpu", {"images": len(data.images), "different": different, "pastes": rows})


if __name__ == "__main__":
    main()
