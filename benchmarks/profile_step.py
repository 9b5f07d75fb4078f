"""Time per phase of a training step and of inference, for the stock and the converted model.

    python benchmarks/profile_step.py [--device cpu|cuda] [--batch-sizes 1 2] [--classes 91 1204] [--coco FOLDER]
                                      [--repeats 3] [--min-size 800] [--training-only]

Measures Mask R-CNN R50-FPN with random weights at 800 x 1333 px. Images and targets come from a COCO-format folder,
or are random with 20 objects each. The models alternate in one process; training also measures ours with samples of a
fixed size (`sync_free=True`). The time of a phase excludes the phases nested in it. On CUDA every phase synchronizes,
so the phases add up to more than a step without measurements. Prints tables, and writes results/profile_step.json,
also with the peak memory and, on CUDA, the kernels launched and the synchronizations. Takes about three minutes on
two CPU cores at batch 1, a quarter of an hour at batch 8.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial, reduce
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from measuring import Spread, alternating, count_waits, peak_bytes, speedup, write_results
from pycocotools import mask as coco_mask
from scenes import scene
from torch import Tensor, nn
from torchvision.models.detection import maskrcnn_resnet50_fpn
from torchvision.models.detection import roi_heads as stock_roi_heads

from maskloss import convert
from maskloss.data.coco import read_coco
from maskloss.data.dataset import CocoDataset, collate
from maskloss.detection import mask_branch
from maskloss.detection.rpn import RegionProposalNetwork
from maskloss.detection.transform import RCNNTransform
from maskloss.masks.paste import paste_masks

OBJECTS = 20
Batch = tuple[list[Tensor], list[dict[str, Any]]]

#: Phase of each method, by its path in the model; the remaining time is "everything else".
METHODS = {
    "transform.forward": "transform",
    "transform.postprocess": "paste",
    "backbone.forward": "backbone and FPN",
    "rpn.head.forward": "RPN head",
    "rpn.anchor_generator.forward": "anchors",
    "rpn.assign_targets_to_anchors": "RPN matching and sampling",
    "roi_heads.box_roi_pool.forward": "box branch",
    "roi_heads.box_head.forward": "box branch",
    "roi_heads.box_predictor.forward": "box branch",
    "roi_heads.postprocess_detections": "detections",
    "roi_heads.mask_roi_pool.forward": "mask branch",
    "roi_heads.mask_head.forward": "mask branch",
    "roi_heads.mask_predictor.forward": "mask branch",
}
#: Methods that only torchvision's model calls; a converted model refuses to run when they are patched.
STOCK_METHODS = {
    "rpn.fg_bg_sampler": "RPN matching and sampling",
    "rpn.compute_loss": "RPN loss",
    "rpn.box_coder.encode": "RPN loss",
    "rpn.box_coder.decode": "proposals",
    "rpn.filter_proposals": "proposals",
    "roi_heads.select_training_samples": "detector matching and sampling",
}
#: Methods that only a converted model has.
OUR_METHODS = {
    "rpn._sample": "RPN matching and sampling",
    "rpn._batch": "RPN loss",
    "rpn._proposals": "proposals",
    "roi_heads._select": "detector matching and sampling",
    "roi_heads._select_padded": "detector matching and sampling",
}
#: Phase of each function that a module calls by name.
STOCK_FUNCTIONS = {
    (stock_roi_heads, "project_masks_on_boxes"): "mask targets",
    (stock_roi_heads, "fastrcnn_loss"): "losses",
    (stock_roi_heads, "maskrcnn_loss"): "losses",
    (stock_roi_heads, "maskrcnn_inference"): "losses",
}
OUR_FUNCTIONS = {(mask_branch, "grids_of"): "mask targets"}
CRITERION = ("rpn_losses", "roi_losses", "mask_losses")


class Phases:
    """Timer of phases, in seconds, each without the phases nested in it."""

    def __init__(self, cuda: bool) -> None:
        self.cuda = cuda
        self.seconds: dict[str, float] = {}
        self._inner = [0.0]

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of this context to a phase."""
        began = self._now()
        self._inner.append(0.0)
        try:
            yield
        finally:
            elapsed = self._now() - began
            own = elapsed - self._inner.pop()
            self._inner[-1] += elapsed
            self.seconds[name] = self.seconds.get(name, 0.0) + own

    def around(self, name: str, function: Any) -> Any:
        """Wrap a callable so that its time counts for a phase; its attributes remain accessible."""

        class Wrapped:
            def __call__(_, *args: Any, **kwargs: Any) -> Any:
                with self.phase(name):
                    return function(*args, **kwargs)

            def __getattr__(_, attribute: str) -> Any:
                return getattr(function, attribute)

        return Wrapped()

    def _now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()


@contextmanager
def watched(model: nn.Module, phases: Phases) -> Iterator[None]:
    """Time the phases of a model inside this context."""
    with ExitStack() as stack:

        def watch(owner: Any, name: str, phase: str) -> None:
            stack.enter_context(patch.object(owner, name, phases.around(phase, getattr(owner, name))))

        converted = isinstance(model.rpn, RegionProposalNetwork)
        for path, phase in (METHODS | (OUR_METHODS if converted else STOCK_METHODS)).items():
            *parents, name = path.split(".")
            watch(reduce(getattr, parents, model), name, phase)
        for (module, name), phase in (OUR_FUNCTIONS if converted else STOCK_FUNCTIONS).items():
            watch(module, name, phase)
        if converted:
            for name in CRITERION:
                watch(model.rpn.loss, name, "losses")
        yield


def random_batch(size: int, device: torch.device) -> Batch:
    """Make images of random pixels, with random objects."""
    masks, _, boxes = scene(OBJECTS)
    torch.manual_seed(0)
    target = {"boxes": boxes, "labels": torch.arange(1, OBJECTS + 1), "masks": masks}
    images = [torch.rand(3, *masks.shape[1:], device=device) for _ in range(size)]
    return images, [{key: value.to(device) for key, value in target.items()} for _ in images]


def coco_batch(folder: Path, size: int, device: torch.device) -> Batch:
    """Read the first images with objects of a data set, with masks as pixels, which both sides accept."""
    dataset = CocoDataset(read_coco(folder / "images", folder / "annotations.json"))
    indices = [i for i, record in enumerate(dataset.data.images) if record.objects][:size]
    batch = collate([dataset[index] for index in indices])
    assert isinstance(batch, tuple)
    targets = [{**target, "masks": target["masks"].bitmaps()} for target in batch[1]]
    for target in targets:
        target["labels"] = target["labels"].clamp(max=OBJECTS)
    return (
        [image.to(device) for image in batch[0]],
        [{key: value.to(device) for key, value in target.items() if key != "image_id"} for target in targets],
    )


def sides(num_classes: int, min_size: int, device: torch.device) -> dict[str, nn.Module]:
    """Build the stock and the converted models, with the same weights."""
    torch.manual_seed(0)
    make = partial(
        maskrcnn_resnet50_fpn, weights=None, weights_backbone=None, num_classes=num_classes, min_size=min_size
    )
    stock, ours, sync_free = make(), make(), make()
    for model in (ours, sync_free):
        model.load_state_dict(stock.state_dict())
    # An untrained detector finds nothing above torchvision's threshold, and a hundred objects above 0.
    for model in (stock, ours, sync_free):
        model.roi_heads.score_thresh = 0.0
    models = {
        "torchvision": stock,
        "ours": convert(ours),
        "sync_free": convert(sync_free, sync_free=True),
    }
    for model in (ours, sync_free):
        # Only the first ten batches of a run are checked for boxes in another format.
        model.conversion.box_format_checks = 0
    return {side: model.to(device) for side, model in models.items()}


def training_step(model: nn.Module, batch: Batch, phases: Phases | None = None) -> None:
    """Run a training step, forward and backward, with the same random samples each time."""
    model.train()
    model.zero_grad(set_to_none=True)
    torch.manual_seed(1)
    losses = model(*batch)
    with phases.phase("backward") if phases else nullcontext():
        sum(losses.values()).backward()


def inference(model: nn.Module, batch: Batch, phases: Phases | None = None) -> None:
    """Run inference to detections with pasted masks."""
    model.eval()
    with torch.no_grad():
        model(batch[0])


def inference_to_coco(model: nn.Module, batch: Batch, phases: Phases | None = None) -> None:
    """Run inference to masks as COCO RLEs; torchvision's are encoded from pasted masks, ours directly."""
    model.eval()
    converted = isinstance(model.transform, RCNNTransform)
    if converted:
        model.transform.paste = None
    with torch.no_grad():
        detections = model(batch[0])
    with phases.phase("paste") if phases else nullcontext():
        for image, detection in zip(batch[0], detections, strict=True):
            size = (image.shape[-2], image.shape[-1])
            if converted:
                offset = model.transform.mask_offset(size)
                paste_masks(detection["masks"][:, 0], detection["boxes"], size, offset=offset, output="rle")
            else:
                pasted = (detection["masks"][:, 0] > 0.5).permute(1, 2, 0).cpu().numpy()
                coco_mask.encode(np.asfortranarray(pasted.view(np.uint8)))
    if converted:
        model.transform.paste = "torchvision"


def phases_of(
    work: Callable[..., None], model: nn.Module, batch: Batch, device: torch.device
) -> dict[str, float]:
    """Measure the seconds per phase of one call."""
    phases = Phases(device.type == "cuda")
    with phases.phase("everything else"), watched(model, phases):
        work(model, batch, phases)
    return phases.seconds


def on_the_device(work: Callable[..., None], model: nn.Module, batch: Batch) -> dict[str, int]:
    """Count the kernels, synchronizations and peak bytes of one call on CUDA."""
    peak = peak_bytes(partial(work, model, batch), "cuda")
    waits = count_waits(partial(work, model, batch))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        work(model, batch)
    kernels = sum(event.count for event in profile.key_averages() if event.self_device_time_total > 0)
    return {"bytes": peak, "waits": waits, "kernels": kernels}


def compared(
    name: str, work: Callable[..., None], models: dict[str, nn.Module], batch: Batch, repeats: int
) -> dict[str, Any]:
    """Print and return the phases of all models, and the speedup of whole calls."""
    device = batch[0][0].device
    whole = alternating(
        {side: partial(work, model, batch) for side, model in models.items()}, repeats, device
    )
    ratios = {side: speedup(whole["torchvision"], times) for side, times in whole.items()}
    runs = {
        side: [phases_of(work, model, batch, device) for _ in range(repeats)]
        for side, model in models.items()
    }
    by_phase = {
        side: {phase: statistics.median(run[phase] for run in measured) for phase in measured[0]}
        for side, measured in runs.items()
    }
    memory: dict[str, Any] = {}
    for side, model in models.items():
        if device.type == "cuda":
            memory[side] = on_the_device(work, model, batch)
        else:
            memory[side] = {"bytes": peak_bytes(partial(work, model, batch))}
    print(f"\n{name}")
    print(f"{'milliseconds':<32}" + "".join(f"{side:>14}" for side in models))
    rows = {
        phase: [1e3 * by_phase[side].get(phase, 0.0) for side in models]
        for phase in dict.fromkeys(phase for phases in by_phase.values() for phase in phases)
    }
    rows["whole, without timing phases"] = [1e3 * Spread.of(times).median for times in whole.values()]
    for key in memory["torchvision"]:
        unit, divisor = ("peak memory, MiB", 2**20) if key == "bytes" else (key, 1)
        rows[unit] = [memory[side][key] / divisor for side in models]
    for row, values in rows.items():
        print(f"{row:<32}" + "".join(f"{value:>14.1f}" for value in values))
    print(f"{'times faster':<32}" + "".join(f"{ratio.median:>13.2f}x" for ratio in ratios.values()))
    return {
        "times_faster": ratios,
        "seconds": {side: Spread.of(times) for side, times in whole.items()},
        "phases": by_phase,
        "device": memory,
    }


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1])
    parser.add_argument("--classes", type=int, nargs="+", default=[91])
    parser.add_argument("--coco", type=Path, help="folder with images/ and annotations.json")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--min-size", type=int, default=800, help="shorter side, in px")
    parser.add_argument("--training-only", action="store_true", help="leave inference out")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads")
    results = {}
    for num_classes in arguments.classes:
        models = sides(num_classes, arguments.min_size, device)
        in_evaluation = {side: models[side] for side in ("torchvision", "ours")}
        for size in arguments.batch_sizes:
            batch = coco_batch(arguments.coco, size, device) if arguments.coco else random_batch(size, device)
            works: list[tuple[str, Callable[..., None], dict[str, nn.Module]]] = [
                ("training step", training_step, models)
            ]
            if not arguments.training_only:
                works += [
                    ("inference", inference, in_evaluation),
                    ("inference to COCO results", inference_to_coco, in_evaluation),
                ]
            for work_name, work, compared_models in works:
                name = f"{work_name}, batch {size}, {num_classes} classes"
                results[name] = compared(name, work, compared_models, batch, arguments.repeats)
    write_results("profile_step", device, results)


if __name__ == "__main__":
    main()
