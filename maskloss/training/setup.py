"""Set up a run from its config: device, data, model, loss, optimizer and accelerator."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.tracking import GeneralTracker
from accelerate.utils import ProjectConfiguration
from torch import Tensor, nn
from torch.utils.data import DataLoader

from maskloss.data.augmentation import augmentation
from maskloss.data.coco import CocoData, read_coco
from maskloss.data.dataset import CocoDataset, collate
from maskloss.data.sampler import TrainingBatches, repeat_factors
from maskloss.detection.builders import (
    LoadedWeights,
    ModelSettings,
    load_weights,
    published_settings,
    published_weights,
)
from maskloss.detection.conversion import loss_parameters
from maskloss.errors import InputError, one_line
from maskloss.losses.criterion import MaskRCNNLoss
from maskloss.losses.regularization import NORMALIZATIONS
from maskloss.losses.terms import Supervision
from maskloss.training.checkpoints import read_weights
from maskloss.training.config import TrainConfig
from maskloss.training.evaluation import check_sizes
from maskloss.training.freezing import freeze
from maskloss.training.interruption import ignore_interrupts
from maskloss.training.loss_probe import probe_copy
from maskloss.training.model_file import model_settings_of
from maskloss.training.models import converted, make_model
from maskloss.training.resuming import check_output, fingerprint
from maskloss.training.trackers import make_trackers

logger = logging.getLogger(__name__)

#: Environment variables that override the config in accelerate.
_OVERRIDES = (
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
    "ACCELERATE_MIXED_PRECISION",
    "ACCELERATE_USE_CPU",
    "ACCELERATE_TORCH_DEVICE",
    "ACCELERATE_DOWNCAST_BF16",
)
_OVERRIDE_PREFIXES = ("ACCELERATE_DYNAMO_", "ACCELERATE_FP8_")
#: Engines that shard or rewrite the model, which `maskloss train` does not do.
_ENGINES = (
    "ACCELERATE_USE_DEEPSPEED",
    "ACCELERATE_USE_FSDP",
    "ACCELERATE_USE_MEGATRON_LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG",
    "ACCELERATE_USE_SAGEMAKER",
)


def chosen_device(name: str) -> torch.device:
    """Return the device for "cpu", "cuda", "cuda:1", "mps" or "auto".

    Raises:
        InputError: torch does not find the device, or the name is not one of these.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|mps|cuda(:\d{1,3})?", name):
        raise InputError(f"--device must be cpu, cuda, cuda:1, mps or auto, not {one_line(name, 80)!r}")
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count == 0:
            raise InputError(f"--device {name}: torch finds no CUDA device on this machine")
        if device.index is not None and device.index >= count:
            raise InputError(f"--device {name}: this machine has {count} CUDA devices, numbered from 0")
        if device.index is not None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise InputError(
                f"--device {name} cannot be shared by several processes; choose the GPUs by CUDA_VISIBLE_DEVICES"
            )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise InputError("--device mps: torch finds no such device on this machine")
    return device


class Pictures(Protocol):
    """Draws pictures of a run; `maskloss.report.run_pictures` has the command line's."""

    def before_training(self, folder: Path, dataset: CocoDataset, samples: Sequence[tuple[int, int]]) -> None:
        """Write pictures of the training data into the run's folder; samples are indices and augmentation seeds."""

    def after_evaluation(
        self, validation: CocoData, results: Sequence[dict[str, Any]]
    ) -> dict[str, npt.NDArray[np.uint8]]:
        """Return pictures (N, H, W, 3) for the trackers, by their names."""


@dataclass(frozen=True)
class Run:
    """A run that is set up but has not written any file.

    Attributes:
        config: the run's config, with its length and the interval of evaluations in steps.
        accelerator: the accelerator of this process.
        loss: the criterion, which the model holds.
        model: the converted model, on the accelerator's device.
        settings: the settings that the model was built from.
        frozen: the modules of the model that are not trained.
        training: the training set.
        validation: the validation set, with the training set's categories.
        pictures: draws pictures of the run, or None.
    """

    config: TrainConfig
    accelerator: Accelerator
    loss: MaskRCNNLoss
    model: nn.Module
    settings: ModelSettings
    frozen: list[nn.Module]
    training: CocoData
    validation: CocoData
    pictures: Pictures | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """Values that must match a checkpoint's to resume from it, besides the config: categories, data, world size."""
        return {
            "categories": [[category.id, category.name] for category in self.training.categories],
            "data": {"training": fingerprint(self.training), "validation": fingerprint(self.validation)},
            "world_size": self.accelerator.num_processes,
        }


def set_up(config: TrainConfig, device: torch.device) -> Run:
    """Make all parts of a run from its config, and check them. Nothing is written.

    Raises:
        InputError: the config or the data are wrong, or the output folder holds another run.
    """
    # The loss and the model start with the same values in every process, and whenever the run resumes.
    torch.manual_seed(config.seed)
    loss = config.make_loss()
    if config.synchronized:
        loss.synchronized = True
    training, validation = read_data(config)
    check_mask_labels(config, loss, training)
    check_output(config)
    accelerator = make_accelerator(config, device, make_trackers(config.tracker_names, config.output_folder))
    config = config.in_steps(float(image_repeats(config, training).sum()), accelerator.num_processes)
    torch.manual_seed(config.seed)
    num_classes = len(training.categories) + 1
    model, settings, loaded = initial_model(config, num_classes)
    if loaded is not None and accelerator.is_main_process:
        logger.info("%s: %s", config.weights, loaded)
    for data in (training, validation):
        check_sizes(data, model)
    converted(model, loss, mask_branch=config.mask_branch, sync_free=config.sync_free)
    frozen = freeze(model, config.frozen_parts)
    model.to(accelerator.device)
    # A loss that is not finite on random RoIs may be finite on images. The first training step checks that.
    probe_copy(loss, num_classes, model, accelerator.device, require_finite=False)
    return Run(config, accelerator, loss, model, settings, frozen, training, validation)


def check_mask_labels(config: TrainConfig, loss: MaskRCNNLoss, training: CocoData) -> None:
    """Check that the training set has labels for the mask loss, if the config sets one.

    With a preset, a training set without such labels trains only the boxes, and `read_coco` warns.

    Raises:
        InputError: no object has labels that the mask loss learns from.
    """
    if not isinstance(config.loss, dict) or config.loss.get("mask") is None or loss.weights.mask == 0:
        return
    usable = {
        Supervision.MASK: training.num_masks,
        Supervision.POINTS: training.num_points,
        Supervision.BOX: training.num_objects,
    }
    if not any(usable[kind] for kind in loss.mask_supervision):
        raise InputError(
            f"{config.train_annotations}: no object has labels for --loss mask; use MaskBySupervision with "
            "MaskPointLoss for labeled points, or with MaskProjectionLoss or MaskBoxLoss for boxes, as --loss weak does"
        )


def device_of(config: TrainConfig) -> torch.device:
    """Return the device that a run trains on, and check the precision and the workers on this machine.

    Raises:
        InputError: the device is missing, does not support the precision, or `workers` far exceeds the CPUs.
    """
    device = chosen_device(config.device)
    if config.mixed_precision == "fp16" and device.type == "cpu":
        raise InputError("--mixed-precision fp16 needs a GPU; bf16 runs on CPUs")
    if config.cuda_graphs and device.type != "cuda":
        raise InputError(f"--cuda-graphs needs a CUDA GPU, but the device is {device}")
    cpus = os.cpu_count() or 1
    if config.workers > max(16, 4 * cpus):
        raise InputError(
            f"--workers {config.workers} is far more than this machine's {cpus} CPUs can use; give at most "
            f"{max(16, 4 * cpus)}"
        )
    return device


def read_data(config: TrainConfig) -> tuple[CocoData, CocoData]:
    """Read the training set, and the validation set with the training set's categories.

    Raises:
        InputError: see `read_coco`; or the training set has no usable object.
    """
    training = read_coco(config.train_images, config.train_annotations)
    if training.num_objects == 0:
        raise InputError(
            f"{config.train_annotations}: contains no usable object; it is empty or has only crowds"
        )
    validation = read_coco(config.val_images, config.val_annotations, categories=training.categories)
    return training, validation


def _model_settings(config: TrainConfig, num_classes: int) -> tuple[ModelSettings, dict[str, Tensor] | None]:
    """Return the model's settings and initial weights. The config overrides the weights' metadata and the defaults."""
    weights: dict[str, Tensor] | None = None
    found: dict[str, Any] = {}
    if config.weights == "DEFAULT":
        try:
            weights = published_weights(config.model)
        except (OSError, RuntimeError) as error:
            raise InputError(f"--weights DEFAULT: cannot be downloaded: {error}") from error
        found = published_settings(config.model)
    elif config.weights != "none":
        weights, metadata = read_weights(config.weights)
        try:
            found = model_settings_of(metadata)
        except InputError as error:
            raise InputError(f"{config.weights}: {error}") from error
    found.setdefault(
        "frozen_normalization", weights is not None and config.model != "maskrcnn_resnet50_fpn_v2"
    )
    # The defaults of torchvision's `_validate_trainable_layers`.
    found["trainable_layers"] = None if weights is None else 3
    for key in ("image_mean", "image_std", "frozen_normalization", "trainable_layers"):
        given = getattr(config, key)
        if given is not None:
            found[key] = tuple(given) if isinstance(given, list) else given
    settings = ModelSettings(
        config.model,
        num_classes,
        min_size=config.min_sizes,
        max_size=config.max_size,
        max_detections=config.max_detections,
        mask_size=config.mask_size,
        **found,
    )
    return settings, weights


def initial_model(
    config: TrainConfig, num_classes: int
) -> tuple[nn.Module, ModelSettings, LoadedWeights | None]:
    """Build the model that a run starts from, with the config's weights where they fit, and random ones elsewhere.

    Returns:
        The model, its settings, and which weights were loaded, or None without weights.

    Raises:
        InputError: the weights cannot be read or downloaded, or none of them fits.
    """
    settings, weights = _model_settings(config, num_classes)
    model = make_model(settings)
    if weights is None:
        return model, settings, None
    loaded = load_weights(model, weights)
    if not loaded.loaded:
        raise InputError(f"{config.weights}: none of its tensors fits the model {config.model}: {loaded}")
    return model, settings, loaded


def make_optimizer(config: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Make the optimizer for the model's parameters and, without weight decay, for the loss's own parameters."""
    parameters = _decay_groups(config, model)
    if own := list(loss_parameters(model)):
        parameters.append({"params": own, "weight_decay": 0.0})
    # The fused kernel is several times faster, also on CPUs. Under float16, the optimizer is not fused, so that the
    # gradient scaler can skip a step.
    fused = config.mixed_precision != "fp16"
    rate, decay = config.learning_rate, config.weight_decay
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=rate, weight_decay=decay, fused=fused)
    return torch.optim.SGD(parameters, lr=rate, momentum=config.momentum, weight_decay=decay, fused=fused)


def _decay_groups(config: TrainConfig, model: nn.Module) -> list[dict[str, Any]]:
    """Return the model's parameters in groups of one weight decay each."""
    decays = {"norm": config.norm_weight_decay, "bias": config.bias_weight_decay}
    groups: dict[float, list[nn.Parameter]] = {config.weight_decay: []}
    seen: set[nn.Parameter] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter in seen or not parameter.requires_grad:
                continue
            seen.add(parameter)
            kind = "norm" if isinstance(module, NORMALIZATIONS) else "bias" if name == "bias" else ""
            decay = decays.get(kind)
            groups.setdefault(config.weight_decay if decay is None else decay, []).append(parameter)
    return [{"params": own, "weight_decay": decay} for decay, own in groups.items() if own]


def image_repeats(config: TrainConfig, training: CocoData) -> Tensor:
    """Return how often each training image is seen per epoch, (I,)."""
    images = training.images
    if config.repeat_threshold == 0:
        return torch.ones(len(images), dtype=torch.float64)
    records = training.records
    objects = np.nonzero(~records.crowds)[0]
    owners = np.searchsorted(records.first, objects, side="right") - 1
    return repeat_factors(
        records.category_ids[objects], owners, len(images), threshold=config.repeat_threshold
    )


def make_loader(
    config: TrainConfig, training: CocoData, accelerator: Accelerator, start: int
) -> DataLoader[Any]:
    """Make the loader of this process's training batches, beginning after step `start`."""
    batches = TrainingBatches(
        # Batches are padded to their largest image, so portrait and landscape images are kept apart.
        [int(image.width >= image.height) for image in training.images],
        config.batch_size,
        config.max_steps * config.accumulation_steps,
        repeats=image_repeats(config, training),
        start=start * config.accumulation_steps,
        seed=config.seed,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
    )
    transforms = augmentation(
        horizontal_flip=config.horizontal_flip,
        photometric_distortion=config.photometric_distortion,
        scale_jitter=config.scale_jitter,
    )
    return DataLoader(
        CocoDataset(training, transforms, crowds=config.crowds, copy_paste=config.copy_paste, scaled=False),
        batch_sampler=batches,
        num_workers=config.workers,
        collate_fn=collate,
        worker_init_fn=ignore_interrupts,
        persistent_workers=config.workers > 0,
        pin_memory=accelerator.device.type == "cuda",
    )


@contextlib.contextmanager
def guest(device: torch.device) -> Iterator[None]:
    """Restore torch's random state and accelerate's state of the calling program on exit.

    A run seeds torch and creates its own `Accelerator`, whose state accelerate keeps until the process ends.
    """
    states = (AcceleratorState, PartialState, GradientState)
    kept = [dict(state._shared_state) for state in states]
    # A process group outlives the run, so accelerate's state of it is shared with the caller.
    is_shared = torch.distributed.is_initialized()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        if not is_shared:
            AcceleratorState._reset_state(reset_partial_state=True)
        try:
            yield
        finally:
            if not is_shared and not torch.distributed.is_initialized():
                for state, values in zip(states, kept, strict=True):
                    state._shared_state.clear()
                    state._shared_state.update(values)


def make_accelerator(
    config: TrainConfig, device: torch.device, trackers: list[str | GeneralTracker]
) -> Accelerator:
    """Make the run's accelerator.

    Args:
        config: the run's config.
        device: the device to train on.
        trackers: from `maskloss.training.trackers.make_trackers`.

    Raises:
        InputError: an environment variable selects an engine that shards or rewrites the model, or the variables of
            torchrun are incomplete.
    """
    engines = [name for name in _ENGINES if os.environ.get(name, "").lower() in ("1", "true", "yes", "on")]
    if engines:
        raise InputError(
            f"the environment variable {engines[0]} asks for an engine that maskloss train does not support; unset it, "
            "or launch without that engine"
        )
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # accelerate takes the current device
    with _without_overrides():
        try:
            return Accelerator(
                cpu=device.type == "cpu",
                mixed_precision=config.mixed_precision,
                gradient_accumulation_steps=config.accumulation_steps,
                log_with=trackers or None,
                project_config=ProjectConfiguration(logging_dir=str(config.output_folder / "tensorboard")),
            )
        except ValueError as error:
            if "WORLD_SIZE" not in os.environ:
                raise
            raise InputError(
                f"WORLD_SIZE is set, but the processes cannot be connected: {one_line(error, 160)}; start them with "
                "torchrun, or unset WORLD_SIZE"
            ) from error


@contextlib.contextmanager
def _without_overrides() -> Iterator[None]:
    """Hide environment variables that override accelerate's arguments, so that only the config counts."""
    hidden = {
        name: os.environ.pop(name)
        for name in list(os.environ)
        if name in _OVERRIDES or name.startswith(_OVERRIDE_PREFIXES)
    }
    try:
        yield
    finally:
        os.environ.update(hidden)
