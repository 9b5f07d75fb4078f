"""Part (c) of mask_fidelity.py: small networks trained on each kind of target, with masks pasted in each way."""

from __future__ import annotations

import contextlib
import io
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn
from torchvision.models.detection.roi_heads import paste_masks_in_image
from tqdm import tqdm

from maskloss import convert, paste_masks
from maskloss.data.coco import CocoData, read_coco
from maskloss.data.dataset import CocoDataset, collate
from maskloss.data.sampler import TrainingBatches, mixed_seed
from maskloss.data.shapes import write_shapes
from maskloss.detection.builders import ModelSettings, build_model

IMAGE_SIZE, TRAINING_IMAGES, UNSEEN_IMAGES = 128, 1024, 400
BATCH_SIZE, LEARNING_RATE, WARMUP_STEPS = 8, 5e-4, 20

#: Kinds of training targets, with the preset that makes them.
TARGETS = {"torchvision's targets": "torchvision", "aligned soft targets": "aligned"}
RESAMPLES = 400

Paste = Callable[[Tensor, Tensor, tuple[int, int]], list[dict[str, Any]]]


def torchvision_paste(probs: Tensor, boxes: Tensor, size: tuple[int, int]) -> list[dict[str, Any]]:
    """Paste masks (D, M, M) as torchvision does, with a threshold of 0.5, and encode them."""
    pasted = paste_masks_in_image(probs[:, None], boxes, size)[:, 0] > 0.5
    encoded: list[dict[str, Any]] = coco_mask.encode(
        np.asfortranarray(pasted.permute(1, 2, 0).byte().numpy())
    )
    return encoded


def aligned_paste(probs: Tensor, boxes: Tensor, size: tuple[int, int]) -> list[dict[str, Any]]:
    """Paste at pixel centers, for aligned targets, as Detectron2 does."""
    return paste_masks(probs, boxes, size, output="rle")


def unaligned_paste(probs: Tensor, boxes: Tensor, size: tuple[int, int]) -> list[dict[str, Any]]:
    """Paste at pixel centers, for torchvision's targets."""
    return paste_masks(probs, boxes, size, offset=(0.5, 0.5), output="rle")


PASTES: dict[str, Paste] = {
    "torchvision": torchvision_paste,
    "aligned": aligned_paste,
    "unaligned": unaligned_paste,
}


def trained_networks(folder: Path, seeds: Sequence[int], steps: int) -> dict[str, Any]:
    """Train the networks that are not in `folder` yet, evaluate all, and print and return the table."""
    training = _shapes(folder / f"train-{TRAINING_IMAGES}", TRAINING_IMAGES, seed=1000)
    unseen = _shapes(folder / f"val-{UNSEEN_IMAGES}", UNSEEN_IMAGES, seed=2000)
    truth = quietly(lambda: COCO(unseen.annotation_file))
    found: dict[tuple[str, str], list[COCOeval]] = {}
    for targets, preset in TARGETS.items():
        for seed in seeds:
            file = folder / f"{preset}-{steps}-{seed}.pt"
            detections = _raw_detections(_trained(training, preset, seed, steps, file), unseen)
            for name, paste in PASTES.items():
                found.setdefault((targets, name), []).append(_evaluated(truth, unseen, detections, paste))
    rows = {}
    for (targets, name), evaluations in found.items():
        stock = found[targets, "torchvision"]
        rows[f"{targets}, {name} paste"] = {
            **{key: [ap_of(e)[key] for e in evaluations] for key in ("AP", "AP75", "AP90")},
            **({} if name == "torchvision" else {"gain": _gain(evaluations, stock)}),
        }
    _print(rows)
    return {"seeds": list(seeds), "steps": steps, "unseen_images": UNSEEN_IMAGES, "rows": rows}


def _shapes(folder: Path, images: int, seed: int) -> CocoData:
    if not (folder / "annotations.json").exists():
        write_shapes(folder, images, size=IMAGE_SIZE, seed=seed)
    return read_coco(folder / "images", folder / "annotations.json")


def _trained(data: CocoData, preset: str, seed: int, steps: int, file: Path) -> nn.Module:
    """Train a small Mask R-CNN on dense masks, as users of torchvision do, or load it from `file`."""
    torch.manual_seed(seed)
    classes = len(data.categories) + 1
    model = build_model(
        ModelSettings("resnet18", num_classes=classes, min_size=(IMAGE_SIZE,), max_size=IMAGE_SIZE)
    )
    convert(model, preset, paste=None)
    if file.exists():
        model.load_state_dict(torch.load(file, weights_only=True))
        return model
    dataset = CocoDataset(data)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=1e-3)
    batches = TrainingBatches([0] * len(dataset), BATCH_SIZE, steps, seed=seed)
    for step, keys in enumerate(tqdm(batches, desc=file.stem, mininterval=30, leave=False), start=1):
        for group in optimizer.param_groups:
            decay = 0.5 * (1 + np.cos(np.pi * (step - 1) / steps))
            group["lr"] = LEARNING_RATE * min(1.0, step / WARMUP_STEPS) * decay
        batch = collate([dataset[key] for key in keys])
        assert isinstance(batch, tuple)
        images, targets = batch
        dense = [{**target, "masks": target["masks"].bitmaps()} for target in targets]
        torch.manual_seed(mixed_seed(seed, step))
        losses = model(images, dense)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
    torch.save(model.state_dict(), file)
    return model


def _raw_detections(model: nn.Module, data: CocoData) -> list[dict[str, Tensor]]:
    model.eval()
    dataset = CocoDataset(data)
    detections = []
    with torch.no_grad():
        for index in range(len(dataset)):
            batch = collate([dataset[index]])
            assert isinstance(batch, tuple)
            detections += model(batch[0])
    return detections


def _evaluated(truth: COCO, data: CocoData, detections: list[dict[str, Tensor]], paste: Paste) -> COCOeval:
    results = []
    for record, detection in zip(data.images, detections, strict=True):
        size = (record.height, record.width)
        for label, score, rle in zip(
            detection["labels"].tolist(),
            detection["scores"].tolist(),
            paste(detection["masks"][:, 0], detection["boxes"], size),
            strict=True,
        ):
            category = data.categories[label - 1].id
            results.append(
                {"image_id": record.id, "category_id": category, "score": score, "segmentation": rle}
            )
    evaluation = COCOeval(truth, quietly(lambda: truth.loadRes(results)), "segm")
    evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
    evaluation.params.maxDets = [100]
    quietly(evaluation.evaluate)
    quietly(evaluation.accumulate)
    return evaluation


def ap_of(evaluation: COCOeval, area: int = 0) -> dict[str, float]:
    """Return AP over IoU 0.50 to 0.95, AP75 and AP90 in percent; `area` is the index of the size class."""
    precision = evaluation.eval["precision"][:, :, :, area, -1]  # (thresholds, recalls, classes)
    thresholds = evaluation.params.iouThrs
    # Classes without an object of this size have -1.
    ap = {"AP": 100 * float(precision[precision >= 0].mean())}
    for percent in (75, 90):
        at = precision[np.isclose(thresholds, percent / 100)]
        ap[f"AP{percent}"] = 100 * float(at[at >= 0].mean())
    return ap


def _gain(evaluations: list[COCOeval], stock: list[COCOeval]) -> dict[str, Any]:
    """Compute the AP gain over torchvision's paste of the same outputs, by seed and by bootstrap over images."""
    generator = np.random.default_rng(0)
    images = len(stock[0].params.imgIds)
    resampled = []
    for _ in tqdm(range(RESAMPLES), desc="bootstrap", mininterval=5, leave=False):
        drawn = generator.integers(images, size=images)
        gains = [
            _resampled_ap(ours, drawn) - _resampled_ap(theirs, drawn)
            for ours, theirs in zip(evaluations, stock, strict=True)
        ]
        resampled.append(statistics.mean(gains))
    per_seed = [
        ap_of(ours)["AP"] - ap_of(theirs)["AP"] for ours, theirs in zip(evaluations, stock, strict=True)
    ]
    return {"per_seed": per_seed, "interval": [float(v) for v in np.percentile(resampled, [2.5, 97.5])]}


def _resampled_ap(evaluation: COCOeval, drawn: Any) -> float:
    """Compute the AP on images that were sampled with replacement."""
    classes, images = len(evaluation.params.catIds), len(evaluation.params.imgIds)
    kept = evaluation.evalImgs, evaluation.eval
    evaluation.evalImgs = [kept[0][k * images + i] for k in range(classes) for i in drawn]
    quietly(evaluation.accumulate)
    ap = ap_of(evaluation)["AP"]
    evaluation.evalImgs, evaluation.eval = kept
    return ap


def _print(rows: dict[str, Any]) -> None:
    print(
        f"\n{'trained on, pasted by':<44} {'AP':>13} {'AP75':>13} {'AP90':>13}  AP over torchvision's paste"
    )
    for name, row in rows.items():
        cells = [
            f"{statistics.mean(row[key]):>6.2f} ±{statistics.stdev(row[key]) if len(row[key]) > 1 else 0:>5.2f}"
            for key in ("AP", "AP75", "AP90")
        ]
        gain = row.get("gain")
        text = ""
        if gain:
            low, high = gain["interval"]
            per_seed = ", ".join(f"{value:+.2f}" for value in gain["per_seed"])
            text = f"{statistics.mean(gain['per_seed']):+.2f} [{low:+.2f}, {high:+.2f}]; by seed {per_seed}"
        print(f"{name:<44} {'  '.join(cells)}  {text}")


def quietly(function: Callable[[], Any]) -> Any:
    """Call a function without the output that pycocotools prints."""
    with contextlib.redirect_stdout(io.StringIO()):
        return function()
