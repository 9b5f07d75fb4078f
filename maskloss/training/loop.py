"""The training run, from a config to a folder with a model, its metrics and its history."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import sysconfig
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from maskloss.data.augmentation import augmentation
from maskloss.data.batches import TrainingBatches, mixed_seed
from maskloss.data.coco import CocoData, read_coco
from maskloss.data.dataset import CocoDataset, collate
from maskloss.detection.conversion import convert, loss_parameters
from maskloss.detection.models import (
    LoadedWeights,
    ModelSettings,
    build_model,
    load_weights,
    published_settings,
    published_weights,
)
from maskloss.errors import InputError, RunError, one_line
from maskloss.files import (
    append_line,
    locked,
    make_folder,
    read_bytes,
    reason_of,
    remove_leftovers,
    write_bytes,
    write_text,
)
from maskloss.losses.criterion import MaskRCNNLoss
from maskloss.losses.terms import TERMS
from maskloss.training.checkpoints import (
    checkpoint_files,
    load_checkpoint,
    read_weights,
    restore,
    save_checkpoint,
)
from maskloss.training.config import TrainConfig
from maskloss.training.evaluation import Evaluation, batches_on, check_sizes, crowded_images, evaluate
from maskloss.training.loss_probe import probe_copy
from maskloss.training.metrics import write_metrics
from maskloss.training.model_file import ModelDescription, mask_probs_of, model_settings_of, save_model

_RUN_FILES = ("config.yaml", "history.jsonl", "model.safetensors", "metrics.json", "checkpoints")
#: Fields whose files are compared by content on resume, so that data may move.
_DATA_FIELDS = ("train_images", "train_annotations", "val_images", "val_annotations")
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


@dataclass(frozen=True)
class TrainingResult:
    """What a finished run gives beside its files.

    Attributes:
        evaluation: of the last step.
        validation: the validation set.
        main_process: whether this process writes; False on the other ranks.
    """

    evaluation: Evaluation
    validation: CocoData
    main_process: bool


def train(config: TrainConfig) -> TrainingResult:
    """Run, or go on with, a training run.

    Raises:
        InputError: something given is wrong; nothing was written, or what was there is as it was.
        RunError: a loss is not finite, or the disk is full; the last checkpoint is there.
    """
    device = device_of(config)
    # What a loss begins with is the same in every process, and in every resumption.
    torch.manual_seed(config.seed)
    loss = config.make_loss()
    training, validation = read_data(config)
    _check_output(config)
    accelerator = _accelerator(config, device)
    torch.manual_seed(config.seed)
    model, settings, loaded = initial_model(config, len(training.categories) + 1)
    if loaded is not None:
        _say(accelerator, f"{config.weights}: {loaded}")
    for data in (training, validation):
        check_sizes(data, model)
    model.to(accelerator.device)
    # A step that is not finite says on which images, so that is left to the first one.
    probe_copy(loss, len(training.categories) + 1, model, accelerator.device, require_finite=False)
    # Everything that can fail without a step has succeeded: from here on, the folder is written to.
    with contextlib.ExitStack() as stack:
        if accelerator.is_main_process:
            make_folder(config.output_folder)
            stack.enter_context(locked(config.output_folder))
            remove_leftovers(config.output_folder / "checkpoints")
        accelerator.wait_for_everyone()
        return _trained(config, accelerator, loss, model, settings, training, validation)


def _trained(
    config: TrainConfig,
    accelerator: Accelerator,
    loss: MaskRCNNLoss,
    model: nn.Module,
    settings: ModelSettings,
    training: CocoData,
    validation: CocoData,
) -> TrainingResult:
    """Train in a folder that is locked."""
    identity = {
        "categories": [[category.id, category.name] for category in training.categories],
        "data": {"training": _fingerprint(training), "validation": _fingerprint(validation)},
        "world_size": accelerator.num_processes,
    }
    checkpoint = _starting_point(config, identity)
    convert(model, loss, paste=None)
    description = ModelDescription(
        settings,
        training.categories,
        loss.mask_targets.aligned,
        mask_probs_of(loss),
        config.loss,
        config.crowds,
    )
    optimizer = _optimizer(config, model)
    start, elapsed = 0, 0.0
    if checkpoint is not None:
        start, elapsed = checkpoint["step"], checkpoint["seconds"]
        restore(config.output_folder, checkpoint, model, loss, optimizer)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    if checkpoint is not None and accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(checkpoint["scaler"])

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
    loader = DataLoader(
        CocoDataset(training, transforms, crowds=config.crowds),
        batch_sampler=batches,
        num_workers=config.workers,
        collate_fn=collate,
        persistent_workers=config.workers > 0,
    )

    def evaluated() -> Evaluation:
        if accelerator.num_processes > 1:
            # Running statistics of a process's own last batch: all evaluate the model that the first one writes.
            for buffer in (*model.buffers(), *loss.buffers()):
                torch.distributed.broadcast(buffer, src=0)
        return evaluate(
            model,
            validation,
            batch_size=config.batch_size,
            device=accelerator.device,
            workers=config.workers,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            crowds=config.crowds,
        )

    # What follows is the first thing that is written.
    with _Log(config, start, enabled=accelerator.is_main_process) as log:
        crowded = crowded_images(validation, config.max_detections)
        for line in [*training.warnings, *validation.warnings, *([crowded] if crowded else [])]:
            log.say(f"warning: {line}")
        if config.warmup_steps > config.max_steps:
            log.say(
                f"warning: --warmup-steps {config.warmup_steps} are more than --max-steps {config.max_steps}: the "
                "learning rate never gets to what was asked for"
            )
        model.train()
        incoming = batches_on(loader, accelerator.device)
        began = time.perf_counter() - elapsed
        for step in range(start + 1, config.max_steps + 1):
            learning_rate = config.learning_rate_at(step)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            losses = _step(config, accelerator, prepared, optimizer, incoming, step, loss)
            seconds = time.perf_counter() - began
            if step % config.log_every == 0 or step in (1, config.max_steps):
                log.step(step, losses, learning_rate, seconds)
            log.advance()
            last = step == config.max_steps
            evaluation_due = config.evaluate_every and step % config.evaluate_every == 0 and not last
            checkpoint_due = step % config.checkpoint_every == 0 or last
            if evaluation_due or checkpoint_due:
                _expect_finite(model, loss, step)
            # Evaluation comes first: a checkpoint says that everything up to its step is on the disk.
            if evaluation_due:
                log.evaluation(step, evaluated())
            if checkpoint_due and accelerator.is_main_process:
                _save(config, step, seconds, model, loss, optimizer, accelerator, identity)
        evaluation = evaluated()
        log.evaluation(config.max_steps, evaluation)
        if accelerator.is_main_process:
            save_model(config.output_folder / "model.safetensors", model, description)
            write_metrics(config.output_folder / "metrics.json", evaluation.metrics)
    accelerator.wait_for_everyone()
    return TrainingResult(evaluation, validation, accelerator.is_main_process)


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


def device_of(config: TrainConfig) -> torch.device:
    """Give the device that a run is to train on, here.

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


def _newest_checkpoint(folder: Path) -> tuple[Path, dict[str, Any] | None]:
    """The newest checkpoint that can be read, and its file; None where there is no file."""
    files = checkpoint_files(folder)
    while files:
        file = files.pop()
        try:
            return file, load_checkpoint(file)
        except InputError as error:
            if not files:
                raise
            print(f"warning: {error}; going on from {files[-1].name}", file=sys.stderr)
    return folder, None


def _check_output(config: TrainConfig) -> None:
    """Refuse a folder that holds another run; write nothing."""
    folder = config.output_folder
    try:
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{folder}: is a file, not a folder")
        held = [name for name in _RUN_FILES if (folder / name).exists()]
        # A run that failed in its first step has nothing to go on from. The events say that the config is its own.
        if held == ["config.yaml"] and (folder / "tensorboard").is_dir():
            held = []
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: cannot be read: {error}") from error
    if held and not config.resume:
        raise InputError(
            f"{folder}: already holds a run ({', '.join(held)}); give --resume or another --output"
        )


def _fingerprint(data: CocoData) -> str:
    """Hash the annotation file and the size of every image file: what stays when the data set moves."""
    digest = hashlib.sha256()
    with open(data.annotation_file, "rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    for image in data.images:
        try:
            size = os.stat(data.image_path(image)).st_size
        except OSError:
            size = -1  # named when it is read
        digest.update(f"\n{size}".encode())
    return digest.hexdigest()


def _different(config: TrainConfig, checkpoint: dict[str, Any], identity: dict[str, Any]) -> list[str]:
    """Name what a checkpoint was made with and is otherwise now."""
    before = json.loads(checkpoint["config"])
    different = [name for name in config.differences(before) if name not in _DATA_FIELDS]
    if checkpoint.get("categories", identity["categories"]) != identity["categories"]:
        return [*different, "set of categories in --train-annotations"]
    known = checkpoint.get("data")
    if known is None:
        # Of an earlier version, which kept the paths alone.
        print(
            "warning: the checkpoint does not say what data and how many processes it was trained with; "
            "they are not checked",
            file=sys.stderr,
        )
        return different + [
            name
            for name in _DATA_FIELDS
            if os.path.realpath(before.get(name, "")) != os.path.realpath(getattr(config, name))
        ]
    for name, part in (("training", "train"), ("validation", "val")):
        if known[name] != identity["data"][name]:
            different.append(
                f"{name} set (the content of --{part}-annotations, or images of other sizes in bytes)"
            )
    if checkpoint["world_size"] != identity["world_size"]:
        different.append(f"number of processes ({checkpoint['world_size']}, now {identity['world_size']})")
    return different


def _starting_point(config: TrainConfig, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The newest checkpoint, or None to start anew; refuses a folder that holds another run."""
    _check_output(config)
    if not config.resume:
        return None
    file, checkpoint = _newest_checkpoint(config.output_folder / "checkpoints")
    if checkpoint is None:
        return None
    different = _different(config, checkpoint, identity)
    if different:
        raise InputError(
            f"{file}: the run was started with another {', '.join(different)}; resume with the same command"
        )
    previous = json.loads(checkpoint["config"])["max_steps"]
    if previous != config.max_steps and config.schedule != "constant":
        print(
            f"note: the run was planned for {previous} steps; from here the learning rate follows {config.max_steps}",
            file=sys.stderr,
        )
    if checkpoint["step"] > config.max_steps:
        raise InputError(f"{file}: is past --max-steps {config.max_steps}")
    return checkpoint


def _accelerator(config: TrainConfig, device: torch.device) -> Accelerator:
    engines = [name for name in _ENGINES if os.environ.get(name, "").lower() in ("1", "true", "yes", "on")]
    if engines:
        raise InputError(
            f"the environment variable {engines[0]} asks for an engine that maskloss train does not have; unset it, "
            "or launch without it"
        )
    if not torch.distributed.is_initialized():
        # accelerate keeps its state for the life of the process; a second run here may want another.
        AcceleratorState._reset_state(reset_partial_state=True)
    with _without_overrides():
        return Accelerator(
            cpu=device.type == "cpu",
            mixed_precision=config.mixed_precision,
            gradient_accumulation_steps=config.accumulation_steps,
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
    model = build_model(settings)
    if weights is None:
        return model, settings, None
    loaded = load_weights(model, weights)
    if not loaded.loaded:
        raise InputError(f"{config.weights}: no tensor in it fits the model {config.model}: {loaded}")
    return model, settings, loaded


def _optimizer(config: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
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


def _step(
    config: TrainConfig,
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Any,
    incoming: Iterator[tuple[list[Tensor], list[dict[str, Any]]]],
    step: int,
    loss: MaskRCNNLoss,
) -> dict[str, Tensor]:
    """One optimizer step; gives each term's mean over its forward passes, as tensors on the device."""
    totals: dict[str, Tensor] = {}
    own = list(loss_parameters(accelerator.unwrap_model(model)))
    for part in range(config.accumulation_steps):
        images, targets = next(incoming)
        # Every pass has a seed of its own, so a resumed run draws what the uninterrupted one would.
        torch.manual_seed(mixed_seed(config.seed, step, part, accelerator.process_index))
        with accelerator.accumulate(model):
            with _terms_named(loss, step):
                losses: dict[str, Tensor] = model(images, targets)
                total = torch.stack(list(losses.values())).sum()
                if not torch.isfinite(total):
                    raise RunError(_not_finite(losses, step, targets))
                accelerator.backward(total)
            if accelerator.sync_gradients:
                _average_over_processes(accelerator, own)
                if config.gradient_clip:
                    accelerator.clip_grad_norm_([*model.parameters(), *own], config.gradient_clip)
            optimizer.step()
            optimizer.zero_grad()
        for key, value in losses.items():
            totals[key] = totals.get(key, 0) + value.detach() / config.accumulation_steps
    return totals


def _average_over_processes(accelerator: Accelerator, parameters: list[nn.Parameter]) -> None:
    """Average gradients over the processes, as DistributedDataParallel does for those of the model."""
    if accelerator.num_processes == 1:
        return
    for parameter in parameters:
        # A term of weight 0 gives none; all processes wait for one.
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        parameter.grad = accelerator.reduce(parameter.grad, "mean")


@contextlib.contextmanager
def _terms_named(loss: MaskRCNNLoss, step: int) -> Iterator[None]:
    """Turn what a term raises into a RunError that names the term and the line of the user's file."""
    try:
        yield
    except (InputError, RunError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a user's term may raise anything
        frames = [(frame.f_code, number) for frame, number in traceback.walk_tb(error.__traceback__)]
        lines = [(code, number) for code, number in frames if _is_users(code.co_filename)]
        term = next(
            (name for name in TERMS if _code_of(getattr(loss, name, None)) & {c for c, _ in frames}), None
        )
        in_criterion = any(Path(code.co_filename).name == "criterion.py" for code, _ in frames)
        if not (lines or term or in_criterion):
            raise
        where = f" ({lines[-1][0].co_filename}:{lines[-1][1]})" if lines else ""
        what = f"the {term} term" if term else "the loss"
        described = one_line(f"{type(error).__name__}: {error}", 180)
        raise RunError(f"step {step}: {what} fails: {described}{where}") from error


def _code_of(term: Any) -> set[Any]:
    """The code that runs where a term is called: of a function, or of a class's methods."""
    functions = [term, *(getattr(type(term), name, None) for name in ("forward", "__call__"))]
    return {
        f.__code__ for f in functions if hasattr(f, "__code__") and "torch/nn" not in f.__code__.co_filename
    }


def _is_users(file: str) -> bool:
    """Whether a source file is neither ours nor of a library."""
    libraries = (
        str(Path(__file__).resolve().parents[1]),
        *(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")),
        str(Path(torch.__file__).parent),
    )
    return not file.startswith("<") and not os.path.realpath(file).startswith(
        tuple(os.path.realpath(path) + os.sep for path in libraries)
    )


def _not_finite(losses: dict[str, Tensor], step: int, targets: list[dict[str, Any]]) -> str:
    terms = [key for key, value in losses.items() if not torch.isfinite(value)]
    images = ", ".join(str(target["image_id"]) for target in targets)
    values = ", ".join(f"{key} = {float(losses[key].detach())}" for key in terms) or "their sum"
    return (
        f"step {step}: {values} is not finite, on images {images}; the last checkpoint is from before. "
        "A lower --learning-rate or a longer --warmup-steps often helps"
    )


def _expect_finite(model: nn.Module, loss: nn.Module, step: int) -> None:
    """Refuse to keep weights that a gradient has spoilt, although the loss was still finite."""
    of_loss = ((f"the loss's {name}", p) for name, p in loss.named_parameters())
    for name, parameter in (*model.named_parameters(), *of_loss):
        if not torch.isfinite(parameter).all():
            raise RunError(
                f"step {step}: the weights of {name} are not finite; the last checkpoint is from before. "
                "A lower --learning-rate or a longer --warmup-steps often helps"
            )


def _save(
    config: TrainConfig,
    step: int,
    seconds: float,
    model: nn.Module,
    loss: nn.Module,
    optimizer: Any,
    accelerator: Accelerator,
    identity: dict[str, Any],
) -> None:
    state = {
        "seconds": seconds,
        "config": json.dumps(asdict(config)),
        **identity,
        "model": model.state_dict(),
        "loss": loss.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else None,
    }
    save_checkpoint(config.output_folder / "checkpoints", step, state)


def _say(accelerator: Accelerator, text: str) -> None:
    if accelerator.is_main_process:
        print(text, flush=True)


class _Log:
    """The run's history: `history.jsonl`, `evaluations.jsonl`, TensorBoard, and a bar or lines on the screen.

    Writes the config first, and drops what an interrupted run logged past its checkpoint.
    """

    def __init__(self, config: TrainConfig, start: int, *, enabled: bool) -> None:
        self.folder = config.output_folder
        self.enabled = enabled
        self.max_steps = config.max_steps
        if not enabled:
            return
        saved = {key: value for key, value in asdict(config).items() if key != "resume"}
        write_text(self.folder / "config.yaml", yaml.safe_dump(saved, sort_keys=False))
        _keep_lines_up_to(self.folder / "history.jsonl", start)
        # The evaluation of the last step comes after its checkpoint, so it is done again.
        _keep_lines_up_to(self.folder / "evaluations.jsonl", min(start, config.max_steps - 1))
        with self._events_written():
            self.board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=start + 1)
        self.bar = tqdm(initial=start, total=config.max_steps, desc="training", unit="step", disable=None)

    def __enter__(self) -> _Log:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if not self.enabled:
            return
        self.bar.close()
        try:
            with self._events_written():
                self.board.flush()
                self.board.close()
        except RunError:
            # What ended the run comes first.
            if kind is None:
                raise

    @contextlib.contextmanager
    def _events_written(self) -> Iterator[None]:
        """Name the folder of the events where TensorBoard, whose own thread writes, could not write them."""
        try:
            yield
        except (OSError, ValueError) as error:
            raise RunError(f"{self.folder / 'tensorboard'}: cannot be written: {reason_of(error)}") from error

    def say(self, text: str) -> None:
        """Print a line without breaking the bar."""
        if self.enabled:
            self.bar.write(one_line(text), file=sys.stderr)

    def advance(self) -> None:
        """Count a step."""
        if self.enabled:
            self.bar.update()

    def step(self, step: int, losses: dict[str, Tensor], learning_rate: float, seconds: float) -> None:
        """Log a step; the only place where loss values leave the device."""
        if not self.enabled:
            return
        values = {key: float(value) for key, value in losses.items()}
        total = sum(values.values())
        line = {"step": step, "loss": total, **values, "learning_rate": learning_rate, "seconds": seconds}
        append_line(self.folder / "history.jsonl", json.dumps(line))
        with self._events_written():
            for key in ("loss", *values, "learning_rate"):
                self.board.add_scalar(f"train/{key}", line[key], step)
        short = {key.removeprefix("loss_"): f"{value:.3f}" for key, value in values.items()}
        self.bar.set_postfix({"loss": f"{total:.3f}", **short})
        if self.bar.disable:
            terms = "  ".join(f"{key} {value}" for key, value in short.items())
            print(f"step {step}/{self.max_steps}  loss {total:.3f}  {terms}  {seconds:.0f} s", flush=True)

    def evaluation(self, step: int, evaluation: Evaluation) -> None:
        """Log an evaluation."""
        if not self.enabled:
            return
        append_line(
            self.folder / "evaluations.jsonl",
            json.dumps({"step": step, **evaluation.metrics}, allow_nan=False),
        )
        with self._events_written():
            for group, values in evaluation.metrics.items():
                for key, value in values.items():
                    if value is not None:
                        self.board.add_scalar(f"validation/{group}/{key}", value, step)
        box, mask = evaluation.metrics["bbox"]["AP"], evaluation.metrics["segm"]["AP"]
        loss = evaluation.metrics["loss"]["loss"]
        self.bar.write(
            f"step {step}: box AP {_shown(box)}, mask AP {_shown(mask)}, validation loss {_shown(loss)}",
            file=sys.stdout,
        )


def _keep_lines_up_to(path: Path, step: int) -> None:
    """Drop the lines of later steps, and one that was cut short."""
    if not path.exists():
        return
    kept = []
    for line in read_bytes(path).decode(errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    write_bytes(path, "".join(f"{line}\n" for line in kept).encode())


def _shown(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"
