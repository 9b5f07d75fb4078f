"""TrainConfig: everything that a training run depends on."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from maskloss.data.dataset import Crowds
from maskloss.detection.builders import MODEL_NAMES, MOST_DETECTIONS
from maskloss.errors import InputError, one_line
from maskloss.losses.criterion import MaskRCNNLoss
from maskloss.training.file_fields import is_number
from maskloss.training.loss_config import LossConfig, make_loss

#: Fields that may change between a run and its resumption. All but max_steps stay out of a step's numbers, and
#: max_steps enters only through the learning rate's schedule.
_FREE_ON_RESUME = {
    "output",
    "resume",
    "device",
    "workers",
    "log_every",
    "checkpoint_every",
    "evaluate_every",
    "max_steps",
    "trackers",
}


_PATHS = ("train_images", "train_annotations", "val_images", "val_annotations", "weights")

#: Above these, a number is a slip of the keyboard, and torch would end in an overflow or without memory.
_LARGEST = {
    "max_steps": 10**12,
    "warmup_steps": 10**12,
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
    """A training run.

    Args:
        train_images: folder of the training images.
        train_annotations: COCO-format JSON of the training set.
        val_images: folder of the validation images.
        val_annotations: COCO-format JSON of the validation set.
        output: folder of the run; new, or an interrupted run's with `resume`.
        model: torchvision's builders maskrcnn_resnet50_fpn and maskrcnn_resnet50_fpn_v2 by name, or "resnet18" and
            "mobilenet_v2", small ones for CPUs; or the import path "package.module.name" of a builder
            (num_classes, settings) -> model.
        mask_branch: torchvision's layers where not given; or the import path of a function or class that takes the
            model and makes a `maskloss.detection.mask_branch.MaskBranch`.
        weights: a .safetensors or .pt file of a whole model or of a backbone, "DEFAULT" for the weights that
            torchvision publishes (downloads them), or "none".
        loss: a preset (torchvision, detectron2, matterport, paper, aligned), or the import path
            "package.module.name" of a MaskRCNNLoss, or of a function or class that makes one; in a YAML file also
            a mapping of terms, weights, mask_targets and normalizers to replace in a preset.
        max_steps: optimizer steps.
        batch_size: images per forward pass of one process.
        accumulation_steps: forward passes per optimizer step.
        optimizer: "sgd" or "adamw".
        learning_rate: at its highest.
        momentum: of SGD.
        weight_decay: of the optimizer, on every parameter.
        warmup_steps: steps in which the learning rate rises linearly from a thousandth.
        schedule: "step" divides the learning rate by ten after 2/3 and 8/9 of the steps, "cosine" lowers it
            to 0, "constant" keeps it.
        gradient_clip: largest norm of the gradient; 0 for no limit.
        mixed_precision: "no", "fp16" or "bf16".
        min_size: shorter side in px that images are resized to; of several, training draws one per image and
            evaluation takes the last. The model's default where not given: 800, small models 320.
        max_size: longest side in px; the model's default where not given: 1333, small models 512, or as much more
            as min_size is above its own.
        image_mean: of pixels in [0, 1], per channel; from the weights' metadata, else ImageNet's.
        image_std: of pixels in [0, 1], per channel; from the weights' metadata, else ImageNet's.
        frozen_normalization: keep the backbone's batch norms constant; from the weights' metadata, else
            where weights are given, except torchvision's of maskrcnn_resnet50_fpn_v2.
        trainable_layers: how many of the backbone's stages are trained, counted from its end, of five, or six of
            mobilenet_v2; where not given 3 with weights and all without, as in torchvision.
        crowds: "leave_out" trains what lies inside a crowd's box as background; "ignore" as neither positive nor
            negative.
        max_detections: most objects that the model detects in an image, and that AP counts of one category in one.
        horizontal_flip: probability of mirroring a training image.
        photometric_distortion: probability of each change of brightness, contrast, saturation, hue and the order of
            the channels.
        seed: of the weights, the order of the images, their augmentation and the sampling.
        log_every: steps between lines of the history.
        checkpoint_every: steps between checkpoints.
        evaluate_every: steps between evaluations; 0 evaluates at the end only.
        workers: processes that load data; 0 loads in the training process.
        device: "cpu", "cuda", or "auto" for CUDA where there is one.
        trackers: where the curves of the run go besides its own files: accelerate's trackers by name, such as
            "tensorboard", "wandb" or "mlflow", or the import path of a function or class (folder) ->
            `accelerate.tracking.GeneralTracker`; several in a list, or with commas between them; "none" for none.
        resume: go on from the newest checkpoint in `output`.
    """

    train_images: str
    train_annotations: str
    val_images: str
    val_annotations: str
    output: str
    model: str = "maskrcnn_resnet50_fpn"
    mask_branch: str | None = None
    weights: str = "none"
    loss: LossConfig = "torchvision"
    max_steps: int = 1000
    batch_size: int = 2
    accumulation_steps: int = 1
    optimizer: Literal["sgd", "adamw"] = "sgd"
    learning_rate: float = 0.0025
    momentum: float = 0.9
    weight_decay: float = 1e-4
    warmup_steps: int = 100
    schedule: Literal["step", "cosine", "constant"] = "step"
    gradient_clip: float = 10.0
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    min_size: int | list[int] | None = None
    max_size: int | None = None
    image_mean: list[float] | None = None
    image_std: list[float] | None = None
    frozen_normalization: bool | None = None
    trainable_layers: int | None = None
    crowds: Crowds = "leave_out"
    max_detections: int = 100
    horizontal_flip: float = 0.5
    photometric_distortion: float = 0.0
    seed: int = 0
    log_every: int = 20
    checkpoint_every: int = 500
    evaluate_every: int = 0
    workers: int = 2
    device: Literal["cpu", "cuda", "auto"] = "auto"
    trackers: str | list[str] = "tensorboard"
    resume: bool = False

    def __post_init__(self) -> None:
        for name, annotation in get_type_hints(type(self)).items():
            # YAML reads `max_steps:` with nothing after it as None.
            is_optional = type(None) in get_args(annotation)
            _check(getattr(self, name) is not None or is_optional, name, "a value", "none")
        for name in (
            "max_steps",
            "batch_size",
            "accumulation_steps",
            "log_every",
            "checkpoint_every",
            "max_detections",
        ):
            _check(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        for name, most in _LARGEST.items():
            values = getattr(self, name)
            for value in values if isinstance(values, list) else [values]:
                _check(value is None or value <= most, name, f"at most {most:,}", value)
        for name in ("warmup_steps", "evaluate_every", "workers", "seed"):
            _check(getattr(self, name) >= 0, name, "at least 0", getattr(self, name))
        _check(self.seed < 2**63, "seed", "below 2^63", self.seed)
        for name in ("weight_decay", "gradient_clip", "momentum"):
            value = getattr(self, name)
            _check(is_number(value, 0), name, "a finite number >= 0", value)
        _check(
            is_number(self.learning_rate) and self.learning_rate > 0,
            "learning_rate",
            "a finite number > 0",
            self.learning_rate,
        )
        for name in ("horizontal_flip", "photometric_distortion"):
            _check(0 <= getattr(self, name) <= 1, name, "a probability in [0, 1]", getattr(self, name))
        for name in ("image_mean", "image_std"):
            value = getattr(self, name)
            finite = value is None or all(is_number(number) for number in value)
            _check(finite, name, "finite numbers", value)
            _check(value is None or len(value) == 3, name, "three numbers, one per channel", value)
        _check(self.image_std is None or min(self.image_std) > 0, "image_std", "above 0", self.image_std)
        known = self.model in MODEL_NAMES
        _check(
            known or "." in self.model,
            "model",
            f"one of {', '.join(MODEL_NAMES)}, or an import path package.module.name",
            self.model,
        )
        branch = self.mask_branch
        _check(branch is None or "." in branch, "mask_branch", "an import path package.module.name", branch)
        _check(
            known or self.weights != "DEFAULT",
            "weights",
            f"a file or none: nobody publishes weights for {one_line(self.model, 80)}",
            self.weights,
        )
        layers = self.trainable_layers
        # Of a model of a user's own, its builder knows.
        stages = {"mobilenet_v2": 6}.get(self.model, 5 if known else 10**6)
        _check(layers is None or 0 <= layers <= stages, "trainable_layers", f"from 0 to {stages}", layers)
        _check(
            layers is None or self.weights != "none",
            "trainable_layers",
            "left out without --weights, whose stages it would keep at random numbers",
            layers,
        )
        sizes = self.min_sizes
        _check(sizes is None or (sizes and min(sizes) >= 1), "min_size", "at least 1", self.min_size)
        _check(self.max_size is None or self.max_size >= 1, "max_size", "at least 1", self.max_size)
        if sizes is not None and self.max_size is not None:
            _check(
                self.max_size >= max(sizes), "max_size", f"at least --min-size {max(sizes)}", self.max_size
            )

    def make_loss(self) -> MaskRCNNLoss:
        """Make the loss that `loss` names.

        Raises:
            InputError: see `training.loss_config.make_loss`.
        """
        return make_loss(self.loss)

    def differences(self, other: dict[str, Any]) -> list[str]:
        """Name the fields that another run's config has otherwise and that enter the numbers."""
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
        """`trackers` as a list."""
        names = self.trackers.split(",") if isinstance(self.trackers, str) else self.trackers
        return [name for name in map(str.strip, names) if name not in ("", "none")]

    @property
    def min_sizes(self) -> tuple[int, ...] | None:
        """`min_size` as a tuple."""
        if self.min_size is None:
            return None
        return (self.min_size,) if isinstance(self.min_size, int) else tuple(self.min_size)

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of a step, counted from 1."""
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


def _is_same(name: str, one: Any, other: Any) -> bool:
    """Whether two values of a field mean the same: of paths, whatever their spelling."""
    if one == other:
        return True
    paths = name in _PATHS and isinstance(one, str) and isinstance(other, str)
    return (
        paths and not {one, other} & {"none", "DEFAULT"} and os.path.realpath(one) == os.path.realpath(other)
    )


def _check(condition: Any, name: str, expected: str, value: Any) -> None:
    if not condition:
        raise InputError(f"--{name.replace('_', '-')} must be {expected}, got {one_line(value, 80)}")
