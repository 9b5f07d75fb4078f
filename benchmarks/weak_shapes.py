"""Train a small network from scratch on synthetic shapes with weak labels, and compare it with full supervision.

    python benchmarks/weak_shapes.py --output runs/weak_shapes --seeds 0 1 2

Each case changes the annotations of the same training images. The validation set keeps its masks. Finished runs are
not repeated.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from measuring import write_results
from PIL import Image
from pycocotools import mask as coco_mask

from maskloss.ablation.analysis import summarized
from maskloss.data.shapes import write_shapes
from maskloss.training.config import TrainConfig
from maskloss.training.loop import train

SIZE, TRAINING_IMAGES, VALIDATION_IMAGES = 96, 384, 96
POINTS, KEPT, REPLACED = 10, 0.2, 0.3
WARM_UP = {"class_path": "maskloss.losses.MaskBoxLoss", "init_args": {"warmup_steps": 50}}
PROJECTION = {"class_path": "maskloss.losses.MaskProjectionLoss"}

Annotations = list[dict[str, Any]]


def bitmap_of(segmentation: Any) -> Any:
    """Return a mask as (H, W) uint8."""
    if isinstance(segmentation, dict) and isinstance(segmentation["counts"], str):
        return coco_mask.decode(segmentation)
    rles = coco_mask.frPyObjects(segmentation, SIZE, SIZE)
    return coco_mask.decode(coco_mask.merge(rles) if isinstance(rles, list) else rles)


def add_points(annotation: dict[str, Any], draw: random.Random) -> None:
    """Replace a mask by `POINTS` labeled points, distributed uniformly in the box."""
    bitmap = bitmap_of(annotation.pop("segmentation"))
    x, y, width, height = annotation["bbox"]
    points = [[x + draw.random() * width, y + draw.random() * height] for _ in range(POINTS)]
    pixels = np.clip(np.array(points).astype(int), 0, SIZE - 1)
    annotation["point_coords"] = points
    annotation["point_labels"] = bitmap[pixels[:, 1], pixels[:, 0]].tolist()


def remove_mask(annotation: dict[str, Any], _: random.Random) -> None:
    """Keep only the box."""
    del annotation["segmentation"]


def weaken(
    annotations: Annotations, draw: random.Random, change: Callable[[Any, random.Random], None], share: float
) -> None:
    """Apply a change to a random fraction of the annotations."""
    for annotation in draw.sample(annotations, round(share * len(annotations))):
        change(annotation, draw)


def replace_masks(annotations: Annotations, draw: random.Random, *, weight: float) -> None:
    """Replace the masks of some objects by another object's, moved and scaled to their boxes."""
    wrong = draw.sample(annotations, round(REPLACED * len(annotations)))
    shapes = [(Image.fromarray(bitmap_of(a["segmentation"])), a["bbox"]) for a in wrong]
    for annotation, (shape, (x, y, width, height)) in zip(wrong, shapes[1:] + shapes[:1], strict=True):
        left, top, right, bottom = (round(v) for v in corners(annotation["bbox"]))
        size = (max(right - left, 1), max(bottom - top, 1))
        moved = shape.resize(size, Image.Resampling.NEAREST, box=(x, y, x + width, y + height))
        canvas = Image.new("L", (SIZE, SIZE))
        canvas.paste(moved, (left, top))
        rle = coco_mask.encode(np.asfortranarray(np.asarray(canvas)))
        annotation["segmentation"] = {"size": [SIZE, SIZE], "counts": rle["counts"].decode()}
        annotation["weight"] = weight


def corners(box: list[float]) -> tuple[float, float, float, float]:
    """Return x1, y1, x2, y2 of a box x, y, width, height."""
    x, y, width, height = box
    return x, y, x + width, y + height


def with_boxes(term: dict[str, Any]) -> dict[str, Any]:
    """Return the config of a loss that supervises objects without a mask or points by their boxes."""
    mask = {"class_path": "maskloss.losses.MaskBySupervision", "init_args": {"boxes": term}}
    return {"preset": "weak", "mask": mask}


def cases() -> dict[str, tuple[Callable[[Annotations, random.Random], None], Any]]:
    """Return the cases by name: the change to the training annotations, and the loss."""
    few = 1 - KEPT
    plain = {"preset": "weak", "mask": "maskloss.losses.MaskBySupervision"}
    both = with_boxes(WARM_UP)
    return {
        "all masks": (lambda a, d: None, plain),
        "10 points each": (lambda a, d: weaken(a, d, add_points, 1), plain),
        "20 % masks": (lambda a, d: weaken(a, d, remove_mask, few), plain),
        "20 % masks, others boxes": (lambda a, d: weaken(a, d, remove_mask, few), both),
        "20 % masks, others points": (lambda a, d: weaken(a, d, add_points, few), plain),
        "boxes: projection": (lambda a, d: weaken(a, d, remove_mask, 1), with_boxes(PROJECTION)),
        "boxes: projection + pairwise": (lambda a, d: weaken(a, d, remove_mask, 1), both),
        "30 % masks wrong": (lambda a, d: replace_masks(a, d, weight=1.0), plain),
        "30 % masks wrong, weights 0": (lambda a, d: replace_masks(a, d, weight=0.0), plain),
    }


def run(folder: Path, data: Path, name: str, seed: int, steps: int) -> dict[str, Any]:
    """Train and evaluate one case."""
    change, loss = cases()[name]
    output = folder / f"seed{seed}" / name.replace(" ", "_").replace("%", "percent").replace(":", "")
    metrics = output / "metrics.json"
    if not metrics.exists():
        document = json.loads((data / "train/annotations.json").read_text())
        change(document["annotations"], random.Random(seed))
        annotations = folder / f"seed{seed}" / f"{output.name}.json"
        annotations.parent.mkdir(parents=True, exist_ok=True)
        annotations.write_text(json.dumps(document))
        train(
            TrainConfig(
                train_images=str(data / "train/images"),
                train_annotations=str(annotations),
                val_images=str(data / "val/images"),
                val_annotations=str(data / "val/annotations.json"),
                output=str(output),
                model="resnet18",
                loss=loss,
                max_steps=steps,
                batch_size=4,
                optimizer="adamw",
                learning_rate=5e-4,
                weight_decay=1e-3,
                warmup_steps=20,
                schedule="cosine",
                min_size=SIZE,
                max_size=SIZE,
                seed=seed,
                workers=0,
                device="cpu",
                checkpoint_every=10**6,
                resume=True,
            )
        )
    found: dict[str, Any] = json.loads(metrics.read_text())
    return found


def main() -> None:
    """Run the cases, and print and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("runs/weak_shapes"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--names", nargs="+", choices=list(cases()), default=list(cases()))
    arguments = parser.parse_args()
    data = arguments.output / "data"
    for name, count, seed in (("train", TRAINING_IMAGES, 0), ("val", VALIDATION_IMAGES, 1)):
        if not (data / name / "annotations.json").exists():
            write_shapes(data / name, count, size=SIZE, seed=seed)
    found: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in arguments.names}
    for seed in arguments.seeds:
        for name in arguments.names:
            found[name][seed] = run(arguments.output, data, name, seed, arguments.steps)
            segm = found[name][seed]["segm"]
            print(
                f"{name}, seed {seed}: box AP {found[name][seed]['bbox']['AP']:.3f}, mask AP {segm['AP']:.3f}"
            )
    rows = []
    for kind in ("segm", "boundary", "bbox"):
        values = {name: {seed: m[kind]["AP"] for seed, m in runs.items()} for name, runs in found.items()}
        for name, summary in summarized(values, arguments.names[0]).items():
            change = summary.difference
            rows.append(
                {
                    "metric": f"{kind} AP",
                    "case": name,
                    "mean": 100 * summary.mean,
                    "difference": None if change is None else 100 * change.mean,
                    "half width": None if change is None else 100 * change.half_width,
                }
            )
    print(json.dumps(rows, indent=1))
    write_results("weak_shapes", "cpu", {"seeds": arguments.seeds, "steps": arguments.steps, "rows": rows})


if __name__ == "__main__":
    main()
