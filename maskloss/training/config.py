"""TrainConfig: all settings of a training run."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from maskloss.data.dataset import Crowds
from maskloss.detection.builders import MODEL_NAMES, MOST_DETECTIONS
from maskloss.detection.conversion import MASK_BRANCHES
from maskloss.detection.mask_size import MaskSize
from maskloss.errors import InputError, one_line
from maskloss.files import with_home
from maskloss.losses.criterion import MaskRCNNLoss
from maskloss.training.file_fields import is_number
from maskloss.training.loss_config import LossConfig, make_loss

DEFAULT_STEPS = 1000

#: Fields that may change between a run and its resumption. None but max_steps affects the result of a step, and
#: max_steps does so only through the learning rate's schedule.
_FREE_ON_RESUME = {
    "output",
    "resume",
    "device",
    "workers",
    "log_every",
    "checkpoint_every",
    "evaluate_every",
    "max_steps",
    "epochs",
    "stop_after",
    "trackers",
    "val_losses",
}


_PATHS = ("train_images", "train_annotations", "val_images", "val_annotations", "weights")

#: Number of evaluations of a run that does not choose their interval.
_MOST_EVALUATIONS = 10

#: The smallest values allowed of fields that count something.
_SMALLEST = {
    "max_steps": 1,
    "epochs": 1,
    "batch_size": 1,
    "accumulation_steps": 1,
    "log_every": 1,
    "checkpoint_every": 1,
    "stop_after": 1,
    "max_detections": 1,
    "min_size": 1,
    "max_size": 1,
    "warmup_steps": 0,
    "evaluate_every": 0,
    "workers": 0,
    "seed": 0,
}

#: The largest values allowed. Above them, torch would overflow or run out of memory.
_LARGEST = {
    "max_steps": 10**12,
    "warmup_steps": 10**12,
    "epochs": 10**9,
    "log_every": 10**12,
    "checkpoint_every": 10**12,
    "evaluate_every": 10**12,
    "batch_size": 100_000,
    "accumulation_steps": 1_000_000,
    "min_size": 65_535,
    "max_size": 65_535,
    "max_detections": MOST_DETECTIONS,
}


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run.

    Args:
        train_images: folder of the training images.
        train_annotations: COCO-format JSON file of the training set.
        val_images: folder of the validation images.
        val_annotations: COCO-format JSON file of the validation set.
        output: output folder of the run. It must not hold a run, unless `resume` is set.
        model: "maskrcnn_resnet50_fpn" or "maskrcnn_resnet50_fpn_v2", both from torchvision; "resnet18" or
            "mobilenet_v2", small models for CPUs; or the import path "package.module.name" of a function or class
            (num_classes, settings) -> model.
        mask_branch: "point_rend", "mask_iou", or the import path of a function or class that takes the model and
            returns a `maskloss.detection.mask_branch.MaskBranch`. If omitted, the mask layers are torchvision's.
        mask_size: side in cells of the masks that torchvision's mask layers predict: 14, 28 or 56. If omitted: 28, or
            the size that a user's model has.
        weights: a .safetensors or .pt file with the weights of a whole model or of a backbone, "DEFAULT" to download
            torchvision's pretrained weights, or "none" to start from random weights.
        loss: a preset (torchvision, detectron2, matterport, paper, aligned or weak), or the import path
            "package.module.name" of a MaskRCNNLoss, or of a function or class that returns one. A YAML file may also
            give a mapping of terms, weights, mask_targets and normalizers that replaces parts of a preset.
        max_steps: number of optimizer steps, at least 1.
        epochs: number of passes over the training set, at least 1; replaces max_steps.
        batch_size: images per process and forward pass, at least 1.
        accumulation_steps: forward passes per optimizer step, at least 1.
        optimizer: "sgd" or "adamw".
        learning_rate: peak learning rate, above 0.
        momentum: momentum of SGD, at least 0. AdamW does not use it.
        weight_decay: weight decay of the model's parameters, at least 0. The loss's own parameters are not decayed.
        norm_weight_decay: weight decay of normalization layers, at least 0. If omitted: weight_decay.
        bias_weight_decay: weight decay of the biases of other layers, at least 0. If omitted: weight_decay.
        warmup_steps: steps over which the learning rate rises linearly from a thousandth to its full value. 0 disables
            the warmup.
        schedule: "step" divides the learning rate by 10 after 2/3 of the steps and again after 8/9, "cosine" lowers
            it to 0, "constant" keeps it.
        gradient_clip: maximum norm of the gradient over all parameters. 0 disables clipping.
        ema: decay of a moving average of the weights, in (0, 1), such as 0.999. If given, evaluations and model files
            have the averaged weights.
        mixed_precision: "no" for float32, "bf16", or "fp16", which needs a GPU.
        min_size: length in pixels of the shorter side of a resized image, at least 1. From a list of lengths, training
            picks one at random for each image, and evaluation takes the last. If omitted: 800, or 320 for resnet18 and
            mobilenet_v2.
        max_size: maximum length in pixels of the longer side of a resized image, at least min_size. If omitted: 1333,
            or 512 for resnet18 and mobilenet_v2, and proportionally more if min_size is above its default.
        image_mean: mean of each RGB channel, for pixels in [0, 1]. If omitted: from the metadata of the weights, else
            ImageNet's.
        image_std: standard deviation of each RGB channel, above 0, for pixels in [0, 1]. If omitted: from the
            metadata of the weights, else ImageNet's.
        frozen_normalization: true freezes the batch norms of the backbone. If omitted: from the metadata of the
            weights, else true if weights are given and the model is not maskrcnn_resnet50_fpn_v2.
        trainable_layers: number of backbone stages to train, counted from the last: 0 to 5, or 0 to 6 for
            mobilenet_v2. It needs weights. If omitted: 3 with weights, all without, as in torchvision.
        freeze: names of parts of the model that are not trained, such as "backbone" or "rpn.head"; * stands for any
            text. Give several as a list or separated by commas.
        sync_free: sample anchors and RoIs without synchronizing with the GPU; see `maskloss.convert`.
        cuda_graphs: replay the backbone, the FPN and the RPN head as CUDA graphs; see
            `maskloss.detection.cuda_graphs.graph_convolutions`. Batches are then padded to one of two sizes. Needs a
            CUDA GPU, and accumulation_steps 1.
        synchronized: with several processes, divide the losses by the counts of all of them, so that the losses
            equal those of one process with the whole batch.
        crowds: "leave_out" trains the regions inside a crowd's box as background. "ignore" trains them neither as
            positives nor as negatives.
        max_detections: maximum number of detections per image, from 1 to 100,000. AP counts at most this many per
            image and category.
        horizontal_flip: probability in [0, 1] of flipping a training image horizontally.
        photometric_distortion: probability in [0, 1] of each change to a training image: of its brightness, contrast,
            saturation, hue and channel order.
        scale_jitter: smallest and largest factor of the size of objects, such as [0.5, 2]. A factor above 1 crops the
            image, one below 1 pads it with a gray frame. If omitted, there is no jitter.
        copy_paste: probability in [0, 1] that objects of another training image are pasted into a training image.
        repeat_threshold: fraction of the training images in [0, 1]. Images with a category that fewer images have are
            seen more often; LVIS uses 0.001. 0 shows each image once per epoch.
        seed: random seed of the weights, the image order, the augmentation and the sampling, at least 0.
        log_every: steps between log lines, at least 1. The first and last steps are always logged.
        checkpoint_every: steps between checkpoints, at least 1. The last step always has one.
        evaluate_every: steps between evaluations on the validation set. 0 evaluates after the last step only. If
            omitted: once per epoch, but at most ten times.
        val_losses: compute the losses on the validation set besides AP; without them, evaluations take less time.
        stop_after: end the run after this many evaluations without a better mask AP, at least 1. If omitted, it ends
            after max_steps.
        workers: number of processes that load data. 0 loads it in the training process.
        device: "cpu", "cuda", one GPU, such as "cuda:1", "mps", or "auto" for CUDA if it is available and the CPU
            otherwise.
        trackers: where to log curves besides the run's own files: accelerate's trackers by name, such as
            "tensorboard", "wandb" or "mlflow", or the import path of a function or class (folder) ->
            `accelerate.tracking.GeneralTracker`. Give several as a list or separated by commas. "none" disables them.
        resume: continue from the newest checkpoint in `output`.
    """

    train_images: str
    train_annotations: str
    val_images: str
    val_annotations: str
    output: str
    model: str = "maskrcnn_resnet50_fpn"
    mask_branch: str | None = None
    mask_size: MaskSize | None = None
    weights: str = "none"
    loss: LossConfig = "torchvision"
    max_steps: int = DEFAULT_STEPS
    epochs: int | None = None
    batch_size: int = 2
    accumulation_steps: int = 1
    optimizer: Literal["sgd", "adamw"] = "sgd"
    learning_rate: float = 0.0025
    momentum: float = 0.9
    weight_decay: float = 1e-4
    norm_weight_decay: float | None = None
    bias_weight_decay: float | None = None
    warmup_steps: int = 100
    schedule: Literal["step", "cosine", "constant"] = "step"
    gradient_clip: float = 10.0
    ema: float | None = None
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    min_size: int | list[int] | None = None
    max_size: int | None = None
    image_mean: list[float] | None = None
    image_std: list[float] | None = None
    frozen_normalization: bool | None = None
    trainable_layers: int | None = None
    freeze: str | list[str] = ""
    sync_free: bool = False
    cuda_graphs: bool = False
    synchronized: bool = False
    crowds: Crowds = "leave_out"
    max_detections: int = 100
    horizontal_flip: float = 0.5
    photometric_distortion: float = 0.0
    scale_jitter: list[float] | None = None
    copy_paste: float = 0.0
    repeat_threshold: float = 0.0
    seed: int = 0
    log_every: int = 20
    checkpoint_every: int = 500
    evaluate_every: int | None = None
    val_losses: bool = True
    stop_after: int | None = None
    workers: int = 2
    device: str = "auto"
    trackers: str | list[str] = "tensorboard"
    resume: bool = False

    def __post_init__(self) -> None:
        for name, annotation in get_type_hints(type(self)).items():
            # YAML reads `max_steps:` without a value as None.
            is_optional = type(None) in get_args(annotation)
            _check(getattr(self, name) is not None or is_optional, name, "a value", "none")
        for name in (*_PATHS, "output"):
            object.__setattr__(self, name, with_home(getattr(self, name)))
        self._check_numbers()
        self._check_lists()
        self._check_model()
        _check(
            self.epochs is None or self.max_steps == DEFAULT_STEPS,
            "epochs",
            "omitted with --max-steps",
            self.epochs,
        )
        _check(
            not self.cuda_graphs or self.accumulation_steps == 1,
            "accumulation_steps",
            "1 with --cuda-graphs, because a graph overwrites its gradients",
            self.accumulation_steps,
        )

    def _check_numbers(self) -> None:
        for name, least in _SMALLEST.items():
            for value in _numbers_in(getattr(self, name)):
                _check(value >= least, name, f"at least {least}", value)
        for name, most in _LARGEST.items():
            for value in _numbers_in(getattr(self, name)):
                _check(value <= most, name, f"at most {most:,}", value)
        _check(self.seed < 2**63, "seed", "below 2^63", self.seed)
        for name in ("weight_decay", "norm_weight_decay", "bias_weight_decay", "gradient_clip", "momentum"):
            value = getattr(self, name)
            _check(value is None or is_number(value, 0), name, "a finite number >= 0", value)
        rate = self.learning_rate
        _check(is_number(rate) and rate > 0, "learning_rate", "a finite number > 0", rate)
        _check(self.ema is None or 0 < self.ema < 1, "ema", "above 0 and below 1", self.ema)
        for name in ("horizontal_flip", "photometric_distortion", "copy_paste"):
            value = getattr(self, name)
            _check(0 <= value <= 1, name, "a probability in [0, 1]", value)
        threshold = self.repeat_threshold
        _check(0 <= threshold <= 1, "repeat_threshold", "a fraction in [0, 1]", threshold)

    def _check_lists(self) -> None:
        jitter = self.scale_jitter
        _check(
            jitter is None
            or (
                len(jitter) == 2
                and all(is_number(value, 0.05, 20) for value in jitter)
                and jitter[0] <= jitter[1]
            ),
            "scale_jitter",
            "two rising numbers from 0.05 to 20",
            jitter,
        )
        for name in ("image_mean", "image_std"):
            value = getattr(self, name)
            finite = value is None or all(is_number(number) for number in value)
            _check(finite, name, "finite numbers", value)
            _check(value is None or len(value) == 3, name, "three numbers, one per channel", value)
        _check(self.image_std is None or min(self.image_std) > 0, "image_std", "above 0", self.image_std)
        sizes = self.min_sizes
        _check(sizes != (), "min_size", "one number or several", self.min_size)
        if sizes is not None and self.max_size is not None:
            _check(
                self.max_size >= max(sizes), "max_size", f"at least --min-size {max(sizes)}", self.max_size
            )

    def _check_model(self) -> None:
        known = self.model in MODEL_NAMES
        _check(
            known or "." in self.model,
            "model",
            f"one of {', '.join(MODEL_NAMES)}, or an import path package.module.name",
            self.model,
        )
        branch = self.mask_branch
        _check(
            branch is None or branch in MASK_BRANCHES or "." in branch,
            "mask_branch",
            f"{', '.join(MASK_BRANCHES)}, or an import path package.module.name",
            branch,
        )
        _check(
            self.mask_size is None or branch != "point_rend",
            "mask_size",
            "omitted with --mask-branch point_rend, whose masks have 224 cells",
            self.mask_size,
        )
        _check(
            known or self.weights != "DEFAULT",
            "weights",
            f"a file or none, because no weights are published for {one_line(self.model, 80)}",
            self.weights,
        )
        layers = self.trainable_layers
        # Only the builder knows how many stages a user's model has.
        stages = {"mobilenet_v2": 6}.get(self.model, 5 if known else 10**6)
        _check(layers is None or 0 <= layers <= stages, "trainable_layers", f"from 0 to {stages}", layers)
        _check(
            layers is None or self.weights != "none",
            "trainable_layers",
            "omitted without --weights, because frozen stages would keep random values",
            layers,
        )

    def make_loss(self) -> MaskRCNNLoss:
        """Make the loss described by the field `loss`.

        Raises:
            InputError: see `training.loss_config.make_loss`.
        """
        return make_loss(self.loss)

    def in_steps(self, num_images: float, processes: int = 1) -> TrainConfig:
        """Return the config with `max_steps` and `evaluate_every` as numbers of steps.

        Args:
            num_images: number of training images in an epoch.
            processes: number of processes that train together.
        """
        epoch = math.ceil(num_images / (self.batch_size * self.accumulation_steps * processes))
        max_steps = self.max_steps if self.epochs is None else self.epochs * epoch
        every = self.evaluate_every
        if every is None:
            every = max(epoch, math.ceil(max_steps / _MOST_EVALUATIONS))
        return replace(self, max_steps=max_steps, epochs=None, evaluate_every=every)

    def differences(self, other: dict[str, Any]) -> list[str]:
        """Return the names of the fields that differ from another run's config and affect the results."""
        mine = asdict(self)
        return [
            field.name
            for field in fields(self)
            if field.name not in _FREE_ON_RESUME
            and not _is_same(field.name, other.get(field.name, field.default), mine[field.name])
        ]

    @property
    def output_folder(self) -> Path:
        """The run's folder."""
        return Path(self.output)

    @property
    def tracker_names(self) -> list[str]:
        """`trackers` as a list, empty for "none"."""
        return [name for name in _as_list(self.trackers) if name != "none"]

    @property
    def frozen_parts(self) -> list[str]:
        """`freeze` as a list."""
        return _as_list(self.freeze)

    @property
    def min_sizes(self) -> tuple[int, ...] | None:
        """`min_size` as a tuple, or None."""
        if self.min_size is None:
            return None
        return (self.min_size,) if isinstance(self.min_size, int) else tuple(self.min_size)

    def learning_rate_at(self, step: int) -> float:
        """Return the learning rate of a step, counted from 1."""
        warmup = 1.0
        if step <= self.warmup_steps:
            warmup = 0.001 + 0.999 * step / self.warmup_steps
        done = (step - 1) / self.max_steps
        if self.schedule == "step":
            decay = 0.1 ** sum(done >= milestone for milestone in (2 / 3, 8 / 9))
        elif self.schedule == "cosine":
            decay = 0.5 * (1 + math.cos(math.pi * done))
        else:
            decay = 1.0
        return self.learning_rate * warmup * decay


def _as_list(names: str | list[str]) -> list[str]:
    """Return names that are a list or separated by commas, without empty ones."""
    parts = names.split(",") if isinstance(names, str) else names
    return [name for name in map(str.strip, parts) if name]


def _numbers_in(value: Any) -> list[Any]:
    """Return the numbers of a field that holds one, several, or None."""
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _is_same(name: str, one: Any, other: Any) -> bool:
    """Return whether two values of a field are equal, or are paths to the same file or folder."""
    if one == other:
        return True
    paths = name in _PATHS and isinstance(one, str) and isinstance(other, str)
    return (
        paths and not {one, other} & {"none", "DEFAULT"} and os.path.realpath(one) == os.path.realpath(other)
    )


def _check(condition: Any, name: str, expected: str, value: Any) -> None:
    if not condition:
        raise InputError(f"--{name.replace('_', '-')} must be {expected}, got {one_line(value, 80)}")
