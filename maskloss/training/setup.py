"""Make what a run trains with, from its config: device, data, model, loss, optimizer and accelerator."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

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
from maskloss.data.sampler import TrainingBatches
from maskloss.detection.builders import (
    LoadedWeights,
    ModelSettings,
    load_weights,
    published_settings,
    published_weights,
)
from maskloss.detection.conversion import loss_parameters
from maskloss.detection.mask_branch import MaskBranch
from maskloss.errors import InputError
from maskloss.losses.criterion import MaskRCNNLoss
from maskloss.training.checkpoints import read_weights
from maskloss.training.config import TrainConfig
from maskloss.training.evaluation import check_sizes
from maskloss.training.loss_probe import probe_copy
from maskloss.training.model_file import model_settings_of
from maskloss.training.models import make_mask_branch, make_model
from maskloss.training.resuming import check_output, fingerprint
from maskloss.training.trackers import make_trackers

logger = logging.getLogger(__name__)

#: What accelerate would take from the environment instead of the config.
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
    """Resolve "cpu", "cuda" or "auto".

    Raises:
        InputError: CUDA was asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch finds no CUDA device on this machine")
    if name not in ("cpu", "cuda", "auto"):
        raise InputError(f"--device must be cpu, cuda or auto, not {name!r}")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Run:
    """A run that is set up and has written nothing yet.

    Attributes:
        config: of the run.
        accelerator: of this process.
        loss: the criterion, not yet part of the model.
        model: torchvision's, not yet converted, on the accelerator's device.
        settings: what the model was built from.
        branch: the mask branch that replaces torchvision's, if there is one.
        training: the training set.
        validation: the validation set, with the training set's categories.
    """

    config: TrainConfig
    accelerator: Accelerator
    loss: MaskRCNNLoss
    model: nn.Module
    settings: ModelSettings
    branch: MaskBranch | None
    training: CocoData
    validation: CocoData

    @property
    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree in besides the config to belong to this run."""
        return {
            "categories": [[category.id, category.name] for category in self.training.categories],
            "data": {"training": fingerprint(self.training), "validation": fingerprint(self.validation)},
            "world_size": self.accelerator.num_processes,
        }


def set_up(config: TrainConfig, device: torch.device) -> Run:
    """Make everything that a run trains with; write nothing.

    Raises:
        InputError: something in the config is wrong, or the output folder holds another run.
    """
    # The loss and the model start alike in every process, and in every resumption.
    torch.manual_seed(config.seed)
    loss = config.make_loss()
    training, validation = read_data(config)
    check_output(config)
    accelerator = make_accelerator(config, device, make_trackers(config.tracker_names, config.output_folder))
    torch.manual_seed(config.seed)
    num_classes = len(training.categories) + 1
    model, settings, loaded = initial_model(config, num_classes)
    if loaded is not None and accelerator.is_main_process:
        logger.info("%s: %s", config.weights, loaded)
    for data in (training, validation):
        check_sizes(data, model)
    branch = None if config.mask_branch is None else make_mask_branch(config.mask_branch, model)
    model.to(accelerator.device)
    if branch is not None:
        branch.to(accelerator.device)
    # A loss that is not finite on the probe's random inputs may be finite on images, so the first step checks that.
    probe_copy(loss, num_classes, model, accelerator.device, require_finite=False)
    return Run(config, accelerator, loss, model, settings, branch, training, validation)


def device_of(config: TrainConfig) -> torch.device:
    """Return the device that a run is to train on, here.

    Raises:
        InputError: this machine does not have it, or it does not train in the precision asked for.
    """
    device = chosen_device(config.device)
    if config.mixed_precision == "fp16" and device.type == "cpu":
        raise InputError("--mixed-precision fp16 needs a GPU; bf16 runs on CPUs")
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
        InputError: see `read_coco`; or nothing in the training set can be learned from.
    """
    training = read_coco(config.train_images, config.train_annotations)
    if training.num_objects == 0:
        raise InputError(
            f"{config.train_annotations}: there is no usable object in it, only crowds or nothing"
        )
    validation = read_coco(config.val_images, config.val_annotations, categories=training.categories)
    return training, validation


def _model_settings(config: TrainConfig, num_classes: int) -> tuple[ModelSettings, dict[str, Tensor] | None]:
    """What to build, and the weights to start from: config first, then the file's metadata, then defaults."""
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
    # torchvision's `_validate_trainable_layers`.
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
        **found,
    )
    return settings, weights


def initial_model(
    config: TrainConfig, num_classes: int
) -> tuple[nn.Module, ModelSettings, LoadedWeights | None]:
    """Build the model that a run starts from, by torch's random numbers and the weights given.

    Returns:
        The model, what it is made of, and which of the weights were taken, if there were any.

    Raises:
        InputError: the weights cannot be had, or none of them fits.
    """
    settings, weights = _model_settings(config, num_classes)
    model = make_model(settings)
    if weights is None:
        return model, settings, None
    loaded = load_weights(model, weights)
    if not loaded.loaded:
        raise InputError(f"{config.weights}: no tensor in it fits the model {config.model}: {loaded}")
    return model, settings, loaded


def make_optimizer(config: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Make the optimizer of the model's parameters, and of the loss's own, which no weight decay pulls towards 0."""
    parameters: list[dict[str, Any]] = [
        {"params": [parameter for parameter in model.parameters() if parameter.requires_grad]}
    ]
    if own := list(loss_parameters(model)):
        parameters.append({"params": own, "weight_decay": 0.0})
    # One kernel for all parameters is several times as fast on a CPU too. Under float16 a step may be skipped, which
    # the plain kind leaves to the scaler.
    fused = config.mixed_precision != "fp16"
    rate, decay = config.learning_rate, config.weight_decay
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=rate, weight_decay=decay, fused=fused)
    return torch.optim.SGD(parameters, lr=rate, momentum=config.momentum, weight_decay=decay, fused=fused)


def make_loader(
    config: TrainConfig, training: CocoData, accelerator: Accelerator, start: int
) -> DataLoader[Any]:
    """Make the loader of a process's training batches from the step after `start` on."""
    batches = TrainingBatches(
        # Upright images beside each other, and wide ones: batches are padded to their largest image.
        [int(image.width >= image.height) for image in training.images],
        config.batch_size,
        config.max_steps * config.accumulation_steps,
        start=start * config.accumulation_steps,
        seed=config.seed,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
    )
    transforms = augmentation(
        horizontal_flip=config.horizontal_flip, photometric_distortion=config.photometric_distortion
    )
    return DataLoader(
        CocoDataset(training, transforms, crowds=config.crowds),
        batch_sampler=batches,
        num_workers=config.workers,
        collate_fn=collate,
        persistent_workers=config.workers > 0,
    )


@contextlib.contextmanager
def guest(device: torch.device) -> Iterator[None]:
    """Leave to the program that calls `train` the random numbers and the accelerate state that it had.

    A run seeds torch, and makes an `Accelerator` of its own, whose state accelerate keeps for the life of the process.
    """
    states = (AcceleratorState, PartialState, GradientState)
    kept = [dict(state._shared_state) for state in states]
    # A process group outlives the run: accelerate's state of it is everybody's.
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
        config: of the run.
        device: to train on.
        trackers: see `maskloss.training.trackers.make_trackers`.

    Raises:
        InputError: the environment asks for an engine that shards or rewrites the model.
    """
    engines = [name for name in _ENGINES if os.environ.get(name, "").lower() in ("1", "true", "yes", "on")]
    if engines:
        raise InputError(
            f"the environment variable {engines[0]} asks for an engine that maskloss train does not have; unset it, "
            "or launch without it"
        )
    with _without_overrides():
        return Accelerator(
            cpu=device.type == "cpu",
            mixed_precision=config.mixed_precision,
            gradient_accumulation_steps=config.accumulation_steps,
            log_with=trackers or None,
            project_config=ProjectConfiguration(logging_dir=str(config.output_folder / "tensorboard")),
        )


@contextlib.contextmanager
def _without_overrides() -> Iterator[None]:
    """Hide variables that accelerate prefers to its arguments: a run depends on its config alone."""
    hidden = {
        name: os.environ.pop(name)
        for name in list(os.environ)
        if name in _OVERRIDES or name.startswith(_OVERRIDE_PREFIXES)
    }
    try:
        yield
    finally:
        os.environ.update(hidden)
