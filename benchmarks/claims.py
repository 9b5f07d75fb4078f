"""Print claims of the README and the docs beside fresh measurements, where these take less than a minute.

    python benchmarks/claims.py [--only losses]

Each claim is a sentence of a page, which must be there word for word, and a function that measures it again. Timings
depend on the machine, so run it with nothing else beside it. Claims that take longer have their commands in
benchmarks/README.md and in the README of each folder.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import mask_tail
import masks
import torch
from measuring import alternating, speedup
from torchvision.models.detection import maskrcnn_resnet50_fpn

import maskloss
from maskloss.ablation.analysis import summarized

ROOT = Path(__file__).parents[1]


class Claim(NamedTuple):
    """A sentence of a page, and how to measure it again.

    Attributes:
        page: the page, relative to the repository.
        words: the part of the page that states it.
        measure: returns what is measured now, and whether the claim holds.
    """

    page: str
    words: str
    measure: Callable[[], tuple[str, bool]]


def losses_of_both() -> tuple[str, bool]:
    """Compare the losses of a converted R50-FPN with torchvision's on two noise images, five seeds."""
    torch.manual_seed(0)
    stock = maskrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=5, min_size=200, max_size=300
    )
    images = [torch.rand(3, 200, 280), torch.rand(3, 240, 200)]
    targets = []
    for image in images:
        corner = torch.rand(6, 2) * 100
        boxes = torch.cat([corner, corner + 20 + 60 * torch.rand(6, 2)], dim=1)
        bitmaps = torch.zeros(6, *image.shape[-2:], dtype=torch.uint8)
        for bitmap, (x0, y0, x1, y1) in zip(bitmaps, boxes.int().tolist(), strict=True):
            bitmap[y0 : y1 + 1, x0 : x1 + 1] = 1
        targets.append({"boxes": boxes, "labels": torch.randint(1, 5, (6,)), "masks": bitmaps})
    worst = 0.0
    found: list[dict[str, torch.Tensor]] = []
    for model in (stock, maskloss.convert(maskrcnn_copy(stock))):
        torch.manual_seed(1)
        found.append(model(images, targets))
    for key, value in found[0].items():
        worst = max(worst, float((abs(found[1][key] - value) / abs(value)).detach()))
    return f"largest relative difference of the five losses {worst:.1e}", worst <= 1e-6


def maskrcnn_copy(stock: Any) -> Any:
    """Return the same model with the same weights."""
    copy = maskrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=5, min_size=200, max_size=300
    )
    copy.load_state_dict(stock.state_dict())
    return copy


def last_layer() -> tuple[str, bool]:
    """Measure the mask head's last layer at 1204 classes."""
    stock, ours = mask_tail.tails(1204, 64, torch.device("cpu"))
    times = alternating({"stock": stock, "ours": ours}, 3, torch.device("cpu"))
    ratio = speedup(times["stock"], times["ours"]).median
    return f"{ratio:.0f}x faster", ratio >= 30


def targets() -> tuple[str, bool]:
    """Measure the mask targets of 128 RoIs on 100 objects."""
    found = masks.targets(3, torch.device("cpu"))
    ratios = {name: found[name]["times_faster"].median for name in ("bitmaps", "polygons", "RLEs")}
    text = ", ".join(f"{name} 1/{ratio:.1f}" for name, ratio in ratios.items())
    return text, min(ratios.values()) >= 5


def too_many_detections() -> tuple[str, bool]:
    """Evaluate 300 perfect detections of 300 objects, with COCO's limit of 100."""
    import tempfile

    from PIL import Image

    from maskloss.data.coco import read_coco
    from maskloss.training.metrics import average_precision

    with tempfile.TemporaryDirectory() as folder:
        Image.new("RGB", (600, 600)).save(Path(folder, "a.png"))
        boxes = [[20.0 * (n % 20), 20.0 * (n // 20), 15.0, 15.0] for n in range(300)]
        annotations = [
            {"id": n + 1, "image_id": 1, "category_id": 1, "bbox": box, "area": 225, "iscrowd": 0}
            for n, box in enumerate(boxes)
        ]
        document = {
            "images": [{"id": 1, "file_name": "a.png", "width": 600, "height": 600}],
            "annotations": annotations,
            "categories": [{"id": 1, "name": "cell"}],
        }
        Path(folder, "a.json").write_text(json.dumps(document))
        data = read_coco(folder, Path(folder, "a.json"))
        results = [{"image_id": 1, "category_id": 1, "bbox": box, "score": 0.9} for box in boxes]
        precision = average_precision(data, results)["bbox"]["AP"]
    return f"AP {precision:.3f}", abs(precision - 0.34) < 0.005


def number_of_losses() -> tuple[str, bool]:
    """Count the loss modules of maskloss.losses."""
    names = [name for name in maskloss.losses.__all__ if name[0].isupper() and name.endswith("Loss")]
    return f"{len(names)} classes whose names end in Loss", len(names) > 30


def kinds_of_files() -> tuple[str, bool]:
    """Count the rows of the table of annotation tools."""
    text = (ROOT / "docs/annotation_tools.md").read_text("utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| -")]
    count = len(rows) - 1  # without the heading
    return f"{count} rows", count == 58


def gains_of_branches() -> tuple[str, bool]:
    """Compute the paired differences of the mask branches from the recorded runs."""
    found = {}
    for name in ("shapes", "photographs"):
        lines = (ROOT / f"benchmarks/mask_heads/results/{name}.jsonl").read_text().splitlines()
        runs = [run for run in map(json.loads, lines) if run["kind"] == "mask branch"]
        by_seed = {(run["variant"], run["seed"]): 100 * run["metrics"]["AP"] for run in runs}
        seeds = sorted({seed for variant, seed in by_seed if variant == "stock"})
        for branch in ("point_rend", "mask_iou"):
            found[name, branch] = statistics.mean(by_seed[branch, s] - by_seed["stock", s] for s in seeds)
    text = ", ".join(f"{branch} on {name} {value:+.2f}" for (name, branch), value in found.items())
    holds = (
        round(found["shapes", "point_rend"], 1) == 3.5
        and round(found["shapes", "mask_iou"], 1) == 0.8
        and round(found["photographs", "mask_iou"], 1) == 0.6
        and abs(found["photographs", "point_rend"]) < 0.5
    )
    return text, holds


def gains_of_losses() -> tuple[str, bool]:
    """Compute the paired differences of the mask losses on photographs from the recorded runs."""
    lines = (ROOT / "benchmarks/real_network/results/mask_losses.jsonl").read_text().splitlines()
    runs: dict[str, dict[int, float]] = {}
    for run in map(json.loads, lines):
        if run["kind"] == "run":
            runs.setdefault(run["variant"], {})[run["seed"]] = 100 * run["metrics"]["AP"]
    summaries = summarized(runs, "bce")
    found = {}
    for loss in ("lovasz", "bce_dice"):
        difference = summaries[loss].difference
        assert difference is not None
        found[loss] = (round(difference.mean, 1), round(difference.half_width, 1))
    text = ", ".join(f"{loss} {mean:+.1f} ± {half:.1f}" for loss, (mean, half) in found.items())
    return text, len(runs["bce"]) == 5 and found == {"lovasz": (1.2, 0.2), "bce_dice": (0.4, 0.2)}


def rare_classes() -> tuple[str, bool]:
    """Read the differences of the sweep of losses for rare classes."""
    results = json.loads((ROOT / "benchmarks/ablations/rare_classes/results.json").read_text())
    difference = results["variants"]["seesaw"]["summary"]["box AP"]["difference"]["mean"]
    return f"seesaw {100 * difference:+.1f} box AP", round(100 * difference, 1) == 1.9


CLAIMS = {
    "losses": Claim("README.md", "a converted model's losses with torchvision's to 1e-6", losses_of_both),
    "last layer": Claim("docs/how_it_works.md", "took 1/42 of the time on a CPU", last_layer),
    "targets": Claim("benchmarks/README.md", "bitmaps 1/11.4, polygons 1/30, RLEs 1/9.5", targets),
    "detections": Claim(
        "docs/own_data.md", "300 perfect detections in an image have an AP of 0.34", too_many_detections
    ),
    "number": Claim("README.md", "More than thirty losses", number_of_losses),
    "files": Claim("docs/own_data.md", "58 kinds of files of tools and public data sets", kinds_of_files),
    "branches": Claim("README.md", "They gain 3.5 and 0.8 mask AP on synthetic shapes", gains_of_branches),
    "mask losses": Claim(
        "docs/losses/mask_areas.md",
        "Lovász gained 1.2 ± 0.2 points of mask AP over BCE, and BCE + Dice 0.4 ± 0.2",
        gains_of_losses,
    ),
    "rare classes": Claim(
        "docs/losses/rare_classes.md", "Seesaw gained 1.9 ± 1.4 points of box AP", rare_classes
    ),
}


def stated(claim: Claim) -> bool:
    """Return whether the page has the claim's words, apart from its line breaks."""
    text = " ".join((ROOT / claim.page).read_text("utf-8").split())
    return claim.words in text


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(CLAIMS), default=list(CLAIMS))
    failed = 0
    for name in parser.parse_args().only:
        claim = CLAIMS[name]
        began = time.perf_counter()
        measured, holds = claim.measure()
        holds = holds and stated(claim)
        failed += not holds
        print(f"{'holds' if holds else 'FAILS'}  {claim.page}: {claim.words}")
        print(f"       now: {measured} ({time.perf_counter() - began:.0f} s)")
    if failed:
        raise SystemExit(f"{failed} claims do not hold")


if __name__ == "__main__":
    main()
