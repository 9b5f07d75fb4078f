r"""Draw the masks of two branches beside the ground truth, where they differ most.

    python -m benchmarks.mask_heads.pictures --network shapes_network.py --images photos --train train.json \
        --val val.json --output masks.png

Trains both branches as `compare.py` does, and draws the objects whose masks' boundary IoU differs most.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torchvision.ops import box_iou

from benchmarks.mask_heads.compare import joined, run_trunk, train_branch
from benchmarks.real_network.network import read_network
from maskloss.data.coco import read_coco
from maskloss.data.images import read_image
from maskloss.masks.paste import paste_masks

SIDE, GAP = 220, 6
NAMES = ("stock", "point_rend")


def tinted(image: Image.Image, mask: Any, window: tuple[int, int, int, int]) -> Image.Image:
    """Draw a mask over an image, and cut out and enlarge a window."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32).copy()
    pixels[mask] = 0.45 * pixels[mask] + 0.55 * np.array([255, 90, 0], dtype=np.float32)
    part = Image.fromarray(pixels.round().astype(np.uint8)).crop(window)
    return part.resize((SIDE, SIDE), Image.Resampling.NEAREST)


def iou(one: Any, other: Any) -> float:
    """Return the IoU of two masks."""
    return float((one & other).sum() / max((one | other).sum(), 1))


def main() -> None:
    """Train, choose and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("network", "images", "train", "val", "output"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--val-images", type=Path, help="folder of the validation images, if it is another")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--rows", type=int, default=4)
    arguments = parser.parse_args()
    network = read_network(arguments.network)
    val_data = read_coco(arguments.val_images or arguments.images, arguments.val)
    trunk = run_trunk(
        network.build().eval(),
        list(network.CATEGORY_IDS),
        read_coco(arguments.images, arguments.train),
        val_data,
    )
    branches = {
        name: train_branch(trunk, name, seed=0, steps=arguments.steps, learning_rate=arguments.learning_rate)
        for name in NAMES
    }
    found: list[tuple[float, list[Image.Image]]] = []
    used_categories: dict[int, int] = {}
    for image, record in zip(trunk.validation, val_data.images, strict=True):
        if not len(record.objects) or not len(image.boxes):
            continue
        truth = record.object_masks().bitmaps().bool().numpy()
        boxes = torch.tensor([annotation.box for annotation in record.objects])
        best, which = box_iou(boxes, image.boxes).max(dim=1)
        features = joined([image.features], trunk.fine_levels)
        with torch.inference_mode():
            masks = {
                name: branch.predict(features, image.detections)[0][0] for name, branch in branches.items()
            }
        picture = read_image(val_data.image_path(record))
        for index, annotation in enumerate(record.objects):
            if best[index] < 0.8:
                continue
            row = int(which[index])
            pasted = {
                name: paste_masks(probs[row], image.boxes[row : row + 1], (record.height, record.width))[
                    0
                ].numpy()
                for name, probs in masks.items()
            }
            gain = iou(pasted["point_rend"], truth[index]) - iou(pasted["stock"], truth[index])
            x1, y1, x2, y2 = annotation.box
            side = 1.15 * max(x2 - x1, y2 - y1)
            left, top = round((x1 + x2 - side) / 2), round((y1 + y2 - side) / 2)
            window = (left, top, left + round(side), top + round(side))
            panels = [tinted(picture, mask, window) for mask in (truth[index], *pasted.values())]
            if used_categories.get(annotation.category_id, 0) < 12:
                used_categories[annotation.category_id] = used_categories.get(annotation.category_id, 0) + 1
                found.append((gain, panels))
    found.sort(key=lambda entry: -entry[0])
    columns = ("ground truth", *NAMES)
    sheet = Image.new(
        "RGB", (len(columns) * (SIDE + GAP) - GAP, 24 + arguments.rows * (SIDE + GAP) - GAP), "white"
    )
    canvas = ImageDraw.Draw(sheet)
    for column, name in enumerate(columns):
        canvas.text((column * (SIDE + GAP), 4), name, fill="black", font=ImageFont.load_default(14))
    for row, (_, panels) in enumerate(found[: arguments.rows]):
        for column, panel in enumerate(panels):
            sheet.paste(panel, (column * (SIDE + GAP), 24 + row * (SIDE + GAP)))
    sheet.save(arguments.output, optimize=True)
    print(arguments.output)


if __name__ == "__main__":
    main()
