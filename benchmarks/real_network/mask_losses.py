r"""Train the mask branch of a trained network from scratch with several mask losses, and compare the losses.

    python -m benchmarks.real_network.mask_losses --network maskrcnn2go.py --images photos --train train.json \
        --val val.json --cache cache.pt --results runs.jsonl --seeds 0 1 2 --steps 400 --learning-rates 1e-3 3e-3 1e-2

Uses the cache made by `features.py`. Writes one JSON line per run, and does not repeat runs that are already in the
file. Prints a Markdown table with paired differences to the baseline.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pycocotools import mask as coco_mask
from torch import Tensor, nn
from torchvision.ops import box_iou

import maskloss
from benchmarks.real_network.features import Cache, RoIs, add_arguments, open_cache
from benchmarks.real_network.network import read_network
from maskloss.ablation.analysis import summarized
from maskloss.data.coco import CocoData, ImageRecord, read_coco
from maskloss.losses import BatchCounts, select_class_masks
from maskloss.losses.terms import MaskBatch
from maskloss.masks.paste import unaligned_offset
from maskloss.masks.results import image_results
from maskloss.training.loss_config import LossConfig, changed_loss, make_loss
from maskloss.training.metrics import average_precision
from maskloss.training.yaml_files import read_yaml

VARIANTS = Path(__file__).with_name("variants.yaml")
#: Number of RoIs whose masks are predicted at once.
_ROIS_AT_ONCE = 256

Schedule = Literal["cosine", "constant"]
#: Function (cache, rows (P,), batch) that returns the batch for the loss of these positives. The batch that it receives
#: has only mask targets and labels.
Supervision = Callable[[Cache, Tensor, MaskBatch], MaskBatch]
Results = list[dict[str, Any]]


class MaskLayers(nn.Module):
    """A network's mask head and predictor, optionally with resized logits.

    Args:
        head: maps features (P, C, S, S) to hidden features.
        predictor: maps hidden features to the logits of all classes.
        size: side to which the logits are resized bilinearly; None keeps the predictor's side.
    """

    def __init__(self, head: nn.Module, predictor: nn.Module, size: int | None = None) -> None:
        super().__init__()
        self.head, self.predictor, self.size = head, predictor, size
        self.to(memory_format=torch.channels_last)  # twice as fast in depthwise convolutions on a CPU
        for layer in self.modules():
            if is_interpolation(layer):
                layer.requires_grad_(False)

    def forward(self, features: Tensor, channels: Tensor | None = None) -> Tensor:
        """Compute mask logits.

        Args:
            features: (P, C, S, S).
            channels: (P,) int64, the channel to compute for each RoI; None for all channels.

        Returns:
            (P, 1, M, M) logits of these channels, or (P, classes, M, M).
        """
        features = features.float().contiguous(memory_format=torch.channels_last)
        hidden = self.head(features)
        logits = self.predictor(hidden) if channels is None else self._own_channels(hidden, channels)
        if self.size is not None and logits.shape[-1] != self.size:
            logits = F.interpolate(logits, size=(self.size, self.size), mode="bilinear", align_corners=False)
        return logits

    def _own_channels(self, hidden: Tensor, channels: Tensor) -> Tensor:
        layers = list(self.predictor.children()) if isinstance(self.predictor, nn.Sequential) else []
        after = []
        while layers and is_interpolation(layers[-1]):
            after.append(layers.pop())
        if not layers or not isinstance(layers[-1], nn.Conv2d) or layers[-1].kernel_size != (1, 1):
            return select_class_masks(self.predictor(hidden), channels)[:, None]
        for layer in layers[:-1]:
            hidden = layer(hidden)
        classify = layers[-1]
        weight = classify.weight[channels].flatten(1)[:, None]  # (P, 1, hidden)
        bias = classify.bias[channels][:, None, None]
        logits = torch.baddbmm(bias, weight, hidden.flatten(2)).unflatten(2, hidden.shape[2:])
        for layer in reversed(after):
            logits = F.conv_transpose2d(logits, layer.weight[:1], layer.bias[:1], layer.stride, layer.padding)
        return logits


def is_interpolation(layer: nn.Module) -> bool:
    """Return whether a layer is a fixed upsampling, with one filter for all channels, which is not trained."""
    return (
        isinstance(layer, nn.ConvTranspose2d)
        and layer.groups == layer.in_channels == layer.out_channels
        and layer.output_padding == (0, 0)
        and layer.dilation == (1, 1)
        and layer.bias is not None
        and bool((layer.weight == layer.weight[:1]).all())
        and bool((layer.bias == layer.bias[:1]).all())
    )


def published_branch(cache: Cache, size: int | None = None) -> MaskLayers:
    """Return the network's own trained mask layers, in evaluation mode."""
    heads = copy.deepcopy(cache.network.roi_heads)
    return MaskLayers(heads.mask_head, heads.mask_predictor, size).eval()


def fresh_branch(cache: Cache, seed: int, size: int | None = None) -> MaskLayers:
    """Return the network's mask layers with random weights and biases of 0.

    Weights have He's initialization for ReLU (fan-in). Those of the last layer have a standard deviation of 0.001,
    as in Detectron, so that all probabilities start near 0.5.
    """
    branch = published_branch(cache, size)
    generator = torch.Generator().manual_seed(seed)
    layers = [
        layer
        for layer in branch.modules()
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear) and not is_interpolation(layer)
    ]
    for layer in layers:
        inputs = layer.weight[0].numel()
        if isinstance(layer, nn.ConvTranspose2d):
            # Number of products that are summed in one output cell.
            inputs = layer.weight[:, 0].numel() // math.prod(layer.stride)
        std = 0.001 if layer is layers[-1] else math.sqrt(2 / inputs)
        nn.init.normal_(layer.weight, std=std, generator=generator)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    return branch


def train_branch(
    cache: Cache,
    loss: maskloss.MaskRCNNLoss,
    *,
    seed: int,
    steps: int,
    learning_rate: float,
    supervision: Supervision | None = None,
    rows: Tensor | None = None,
    size: int | None = None,
    batch_size: int = 64,
    schedule: Schedule = "cosine",
    weight_decay: float = 0.01,
    warm_up: int = 0,
    losses: list[float] | None = None,
) -> MaskLayers:
    """Train a fresh mask branch on the cached positives with AdamW.

    Args:
        cache: the cache from `open_cache`.
        loss: the loss; only its mask term is used, with its weight, normalizer and mask target settings. Parameters of
            the loss are trained as well.
        seed: random seed of the weights and batches; with equal seeds they are the same for all losses.
        steps: number of training steps.
        learning_rate: maximum learning rate.
        supervision: function that changes the batch before it reaches the loss; by default, the batch has mask targets
            and labels.
        rows: (P,) int64, the positives to train on; all by default.
        size: side of mask logits and targets in cells; the predictor's own by default.
        batch_size: number of RoIs per step.
        schedule: "cosine" lowers the learning rate to 0, "constant" keeps it.
        weight_decay: weight decay of AdamW.
        warm_up: number of steps in which the learning rate rises linearly from near 0.
        losses: list to which each step's loss is appended.

    Returns:
        The trained branch, in evaluation mode.
    """
    branch = fresh_branch(cache, seed, size).train()
    loss.train()
    parameters = [p for p in (*branch.parameters(), *loss.parameters()) if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay)
    rows = torch.arange(len(cache.train.boxes)) if rows is None else rows
    batches = _batches(rows, batch_size, torch.Generator().manual_seed(seed))
    # Loss terms may use random numbers.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for step in range(steps):
            chosen = next(batches)
            labels = cache.mask_labels(cache.train.labels[chosen])
            logits = branch(cache.train.features[chosen], loss.mask_channels(labels))
            targets = cache.mask_targets(logits.shape[-1], loss.mask_targets)[chosen]
            batch = MaskBatch(logits, targets, labels, counts_of(cache, chosen))
            if supervision is not None:
                batch = supervision(cache, chosen, batch)
            value = sum(loss.mask_losses(batch).values())
            optimizer.zero_grad()
            value.backward()
            factor = min((step + 1) / max(warm_up, 1), 1.0)
            if schedule == "cosine":
                factor *= (1 + math.cos(math.pi * step / steps)) / 2
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * factor
            optimizer.step()
            if losses is not None:
                losses.append(value.item())
    loss.eval()
    return branch.eval()


def counts_of(cache: Cache, rows: Tensor) -> BatchCounts:
    """Return the counts that normalizers read. All sampled RoIs are positives here."""
    images = len(cache.train.image_index[rows].unique())
    return BatchCounts(num_images=images, sampled=len(rows), positives=len(rows), batch_size_per_image=0)


def _batches(rows: Tensor, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield batches of rows endlessly, in epochs that contain each row once."""
    left = rows[:0]
    while True:
        while len(left) < size:
            left = torch.cat([left, rows[torch.randperm(len(rows), generator=generator)]])
        yield left[:size]
        left = left[size:]


def predict(branch: MaskLayers, loss: maskloss.MaskRCNNLoss, features: Tensor, labels: Tensor) -> Tensor:
    """Return the mask probabilities (R, M, M) of RoIs, as a converted network computes them.

    Args:
        branch: the mask layers.
        loss: the loss, whose mask term may define how logits become probabilities.
        features: (R, C, S, S).
        labels: (R,) int64.
    """
    probs = []
    own_probs = loss.own_mask_probs
    with torch.inference_mode():
        for some, of in zip(features.split(_ROIS_AT_ONCE), labels.split(_ROIS_AT_ONCE), strict=True):
            if own_probs is None:
                probs.append(branch(some, of)[:, 0].sigmoid())
            else:
                probs.append(own_probs(branch(some, loss.mask_channels(of)), of))
    return torch.cat(probs)


def evaluate(cache: Cache, branch: MaskLayers, loss: maskloss.MaskRCNNLoss) -> dict[str, float | int | None]:
    """Paste the masks of the validation detections, and compute their metrics.

    Returns:
        AP, AP50, AP75, APs, APm, APl and AR of masks, "boundary AP", and "IoU", the mean mask IoU of true positives,
        all in [0, 1]; and "true positives", their number.
    """
    found: Results = []
    ious: list[float] = []
    val = cache.val
    probs = predict(branch, loss, val.features, cache.mask_labels(val.labels))
    for image, record in enumerate(cache.val_data.images):
        rows = val.rows_of(image)
        results = _pasted(cache, val, image, rows, probs[rows], loss, record, val.scores[rows])
        objects = [annotation for annotation in record.objects if annotation.has_mask]
        labels = torch.tensor([cache.category_ids.index(one.category_id) + 1 for one in objects]).long()
        boxes = torch.tensor([one.box for one in objects]).reshape(-1, 4)
        matched = match_greedily(val.boxes_in_image(image, rows), val.labels[rows], boxes, labels)
        hits = torch.where(matched >= 0)[0].tolist()
        ious += _ious(
            [results[hit]["segmentation"] for hit in hits],
            [one.segmentation for one in objects],
            matched[hits].tolist(),
            record,
        )
        found += results
    metrics = average_precision(cache.val_data, found)
    return {
        **metrics["segm"],
        "boundary AP": metrics["boundary"]["AP"],
        "IoU": statistics.fmean(ious) if ious else None,
        "true positives": len(ious),
    }


def positives_iou(cache: Cache, branch: MaskLayers, loss: maskloss.MaskRCNNLoss, rows: Tensor) -> float:
    """Return the mean IoU of some training positives' pasted masks with their objects, in views without a flip."""
    train = cache.train
    probs = predict(branch, loss, train.features[rows], cache.mask_labels(train.labels[rows]))
    ious: list[float] = []
    for image in train.image_index[rows].unique().tolist():
        record = cache.train_record(image)
        here = torch.where(train.image_index[rows] == image)[0]
        scores = torch.ones(len(here))
        results = _pasted(cache, train, image, rows[here], probs[here], loss, record, scores)
        ious += _ious(
            [result["segmentation"] for result in results],
            [one.segmentation for one in record.objects],
            train.matched_idxs[rows[here]].tolist(),
            record,
        )
    return statistics.fmean(ious)


def match_greedily(
    boxes: Tensor, labels: Tensor, object_boxes: Tensor, object_labels: Tensor, least_iou: float = 0.5
) -> Tensor:
    """Match each detection, by descending score, to the unmatched object of its class with the best box IoU.

    Args:
        boxes: (D, 4), sorted by descending score.
        labels: (D,).
        object_boxes: (G, 4).
        object_labels: (G,).
        least_iou: minimum box IoU of a match.

    Returns:
        (D,) int64, index of the object matched to each detection, or -1.
    """
    matched = torch.full((len(boxes),), -1)
    if len(object_boxes) == 0:
        return matched
    ious = box_iou(boxes, object_boxes) * (labels[:, None] == object_labels)
    for detection in range(len(boxes)):
        best, index = ious[detection].max(dim=0)
        if best >= least_iou:
            matched[detection] = index
            ious[:, index] = 0
    return matched


def _pasted(
    cache: Cache,
    rois: RoIs,
    image: int,
    rows: Tensor,
    probs: Tensor,
    loss: maskloss.MaskRCNNLoss,
    record: ImageRecord,
    scores: Tensor,
) -> Results:
    """Return COCO results of some RoIs of an image, with masks pasted at the offset of the loss's targets."""
    size = rois.size_of(image)
    detection = {
        "boxes": rois.boxes_in_image(image, rows),
        "labels": rois.labels[rows],
        "scores": scores,
        "masks": probs[:, None],
    }
    aligned = loss.mask_targets.aligned
    offset = (0.0, 0.0) if aligned else unaligned_offset(size, rois.network_size_of(image))
    return image_results(detection, record.id, size, offset=offset, category_ids=cache.category_ids)


def _ious(masks: list[Any], segmentations: list[Any], matched: list[int], record: ImageRecord) -> list[float]:
    """Return the IoU of each RLE with its matched object."""
    if not masks:
        return []
    used = sorted(set(matched))
    objects = [_rle(segmentations[index], record) for index in used]
    ious = coco_mask.iou(masks, objects, [0] * len(objects))
    return [float(ious[row, used.index(index)]) for row, index in enumerate(matched)]


def _rle(segmentation: Any, record: ImageRecord) -> Any:
    if isinstance(segmentation, dict):
        return segmentation
    return coco_mask.merge(coco_mask.frPyObjects(segmentation, record.height, record.width))


@dataclass(frozen=True)
class Setting:
    """Training settings that all runs of a table share.

    Attributes:
        steps: number of training steps.
        size: side of mask logits and targets in cells; None for the predictor's own.
        batch_size: number of RoIs per step.
        schedule: schedule of the learning rate.
        weight_decay: weight decay of AdamW.
        warm_up: number of steps in which the learning rate rises.
    """

    steps: int
    size: int | None = None
    batch_size: int = 64
    schedule: Schedule = "cosine"
    weight_decay: float = 0.01
    warm_up: int = 0


class RunFile:
    """A file of JSON lines, one per run.

    Args:
        path: path of the file, which need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        text = path.read_text() if path.exists() else ""
        # A process that is killed while writing leaves an incomplete line.
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            path.write_text(whole)
        self.runs: Results = [json.loads(line) for line in whole.splitlines()]

    def of(self, key: Mapping[str, Any], compute: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """Return the run with these values, or compute and append it if there is none."""
        for run in self.runs:
            if all(name in run and run[name] == value for name, value in key.items()):
                return run
        began = time.perf_counter()
        run = {**key, **compute(), "seconds": round(time.perf_counter() - began, 1)}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(run) + "\n")
        self.runs.append(run)
        print(_line(run), flush=True)
        return run


def train_and_evaluate(
    cache: Cache, config: LossConfig, *, seed: int, learning_rate: float, setting: Setting
) -> dict[str, Any]:
    """Train on all positives, and return the metrics and the mean loss of each tenth of the steps."""
    loss = make_loss(config)
    losses: list[float] = []
    branch = train_branch(
        cache, loss, seed=seed, learning_rate=learning_rate, losses=losses, **asdict(setting)
    )
    return {"metrics": evaluate(cache, branch, loss), "losses": tenths(losses)}


def tune(
    cache: Cache,
    runs: RunFile,
    variant: str,
    config: LossConfig,
    learning_rates: Sequence[float],
    setting: Setting,
    *,
    seed: int = 0,
) -> float:
    """Return the learning rate with the best mean IoU on a held-out fifth of the training images.

    All variants are tuned with the same learning rates, steps and seed. A single learning rate is returned untried.
    """
    if len(learning_rates) == 1:
        return learning_rates[0]
    held_out = cache.train_images() % 5 == 0
    first_view = cache.train.image_index < len(cache.train_data.images)
    training, testing = torch.where(~held_out)[0], torch.where(held_out & first_view)[0]

    def compute(learning_rate: float) -> dict[str, Any]:
        loss, losses = make_loss(config), []
        branch = train_branch(
            cache,
            loss,
            seed=seed,
            learning_rate=learning_rate,
            rows=training,
            losses=losses,
            **asdict(setting),
        )
        return {"IoU": positives_iou(cache, branch, loss, testing), "losses": tenths(losses)}

    ious = {
        rate: runs.of(_key(cache, "tuning", variant, config, seed, rate, setting), lambda r=rate: compute(r))
        for rate in learning_rates
    }
    return max(ious, key=lambda rate: ious[rate]["IoU"])


def compare(
    cache: Cache,
    runs: RunFile,
    variants: Mapping[str, LossConfig],
    seeds: Sequence[int],
    learning_rates: Sequence[float],
    setting: Setting,
) -> dict[str, dict[int, dict[str, Any]]]:
    """Tune, train and evaluate every variant with every seed.

    Returns:
        The runs by variant and seed.
    """
    rates = {
        variant: tune(cache, runs, variant, config, learning_rates, setting)
        for variant, config in variants.items()
    }
    found: dict[str, dict[int, dict[str, Any]]] = {variant: {} for variant in variants}
    for seed in seeds:
        for variant, config in variants.items():
            found[variant][seed] = runs.of(
                _key(cache, "run", variant, config, seed, rates[variant], setting),
                lambda v=variant, c=config, s=seed: train_and_evaluate(
                    cache, c, seed=s, learning_rate=rates[v], setting=setting
                ),
            )
    return found


def _key(
    cache: Cache,
    kind: str,
    variant: str,
    config: LossConfig,
    seed: int,
    learning_rate: float,
    setting: Setting,
) -> dict[str, Any]:
    return {
        "kind": kind,
        "variant": variant,
        "loss": config,
        "seed": seed,
        "learning_rate": learning_rate,
        **asdict(setting),
        "cache": cache.fingerprint,
    }


def tenths(losses: list[float]) -> list[float]:
    """Return the mean of each tenth of a non-empty list."""
    step = max(len(losses) // 10, 1)
    return [round(statistics.fmean(losses[i : i + step]), 4) for i in range(0, len(losses), step)]


def _line(run: Mapping[str, Any]) -> str:
    """Describe a run in one line."""
    values = run["metrics"] if "metrics" in run else {"IoU": run["IoU"]}
    about = run["kind"]
    if "variant" in run:
        about += f" {run['variant']}, seed {run['seed']}, {run['steps']} steps at {run['learning_rate']:g}"
    shown = "  ".join(
        f"{name} {_percent(values[name])}" for name in (*COLUMNS.values(), "AP50") if name in values
    )
    return f"{about}: {shown}, {run['seconds']:.0f} s"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


#: Columns of the table, and the key of each in a run's metrics.
COLUMNS = {
    "mask AP": "AP",
    "AP75": "AP75",
    "small": "APs",
    "medium": "APm",
    "large": "APl",
    "boundary AP": "boundary AP",
    "IoU of true positives": "IoU",
}
#: Metrics whose differences to the baseline are shown.
COMPARED = ("AP", "boundary AP", "IoU")


def table(
    found: Mapping[str, Mapping[int, Mapping[str, Any]]],
    baseline: str,
    columns: Mapping[str, str] = COLUMNS,
    compared: Sequence[str] = COMPARED,
) -> str:
    """Return a Markdown table of means over the seeds, and of paired differences with Student's 95 % intervals.

    Args:
        found: runs by variant and seed.
        baseline: the variant that the others are compared with.
        columns: key of a run's metrics for each column.
        compared: keys whose differences to the baseline are shown.
    """
    names = {metric: column for column, metric in columns.items()}
    heads = [
        "variant",
        "learning rate",
        "seeds",
        *columns,
        *(f"{names[metric]} over {baseline}" for metric in compared),
    ]
    summaries = {
        metric: summarized(
            {v: {seed: run["metrics"][metric] for seed, run in runs.items()} for v, runs in found.items()},
            baseline,
        )
        for metric in columns.values()
    }
    lines = [heads, ["---"] * len(heads)]
    for variant, runs in found.items():
        rates = sorted({run["learning_rate"] for run in runs.values()})
        cells = [variant, ", ".join(f"{rate:g}" for rate in rates), str(len(runs))]
        for metric in columns.values():
            summary = summaries[metric][variant]
            spread = "" if summary.deviation is None else f" ± {100 * summary.deviation:.1f}"
            cells.append(_percent(summary.mean) + spread)
        for metric in compared:
            difference = summaries[metric][variant].difference
            if difference is None:
                cells.append("")
                continue
            cells.append(
                f"{100 * difference.mean:+.2f} ± {100 * difference.half_width:.2f} ({difference.verdict})"
            )
        lines.append(cells)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def read_variants(path: Path, names: Sequence[str] | None = None) -> dict[str, LossConfig]:
    """Read the losses to compare.

    Args:
        path: YAML file that maps names to losses as in a config: a preset, an import path of a `MaskRCNNLoss` or of a
            function that makes one, or a mapping. A mapping without `preset` changes the preset "aligned".
        names: names of the losses to return; all by default.
    """
    variants = {name: changed_loss("aligned", config) for name, config in read_yaml(path).items()}
    return variants if names is None else {name: variants[name] for name in names}


def read_cache(arguments: argparse.Namespace) -> Cache:
    """Open the cache that is given by the arguments of `add_arguments`."""

    def read(annotations: Path) -> CocoData:
        return read_coco(arguments.images, annotations)

    network = read_network(arguments.network)
    cache = open_cache(arguments.cache, network, read(arguments.train), read(arguments.val))
    if arguments.class_agnostic:
        cache = replace(cache, class_agnostic=True, fingerprint=f"{cache.fingerprint} class-agnostic")
    return cache


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments for `read_cache` and for the shared training settings."""
    add_arguments(parser)
    parser.add_argument("--results", type=Path, required=True, help="file of JSON lines to add to")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=64, help="number of RoIs per step")
    parser.add_argument("--weight-decay", type=float, default=0.01)
    parser.add_argument(
        "--warm-up", type=int, default=0, help="number of steps in which the learning rate rises"
    )
    parser.add_argument("--class-agnostic", action="store_true", help="one channel of masks for all classes")


def main() -> None:
    """Run the variants that are not yet in the results, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_training_arguments(parser)
    parser.add_argument("--variants", type=Path, default=VARIANTS, help="YAML file of losses by name")
    parser.add_argument("--names", nargs="+", help="variants to run, the baseline first; all by default")
    parser.add_argument(
        "--learning-rates", type=float, nargs="+", default=[1e-3], help="tuned if more than one"
    )
    parser.add_argument("--size", type=int, help="side of the masks in cells, such as 14, 28 or 56")
    parser.add_argument("--schedule", choices=["cosine", "constant"], default="cosine")
    parser.add_argument(
        "--published", action="store_true", help="also evaluate the network's own mask branch"
    )
    arguments = parser.parse_args()
    cache = read_cache(arguments)
    runs = RunFile(arguments.results)
    setting = Setting(
        arguments.steps,
        arguments.size,
        arguments.batch_size,
        arguments.schedule,
        arguments.weight_decay,
        arguments.warm_up,
    )
    if arguments.published:
        aligned = maskloss.MaskRCNNLoss.preset("aligned")
        runs.of(
            {"kind": "published", "size": arguments.size, "cache": cache.fingerprint},
            lambda: {"metrics": evaluate(cache, published_branch(cache, arguments.size), aligned)},
        )
    variants = read_variants(arguments.variants, arguments.names)
    found = compare(cache, runs, variants, arguments.seeds, arguments.learning_rates, setting)
    print("\n" + table(found, next(iter(variants))), end="")


if __name__ == "__main__":
    main()
