"""Find the start of a run: step 0, or the newest checkpoint of the same run."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

from maskloss.data.coco import CocoData
from maskloss.errors import InputError
from maskloss.training.checkpoints import checkpoint_files, load_checkpoint
from maskloss.training.config import TrainConfig

logger = logging.getLogger(__name__)

_RUN_FILES = (
    "config.yaml",
    "history.jsonl",
    "model.safetensors",
    "best.safetensors",
    "metrics.json",
    "checkpoints",
)
#: Fields whose files are compared by content on resume, so that data may move.
_DATA_FIELDS = ("train_images", "train_annotations", "val_images", "val_annotations")


def check_output(config: TrainConfig) -> None:
    """Check that the output folder holds no run yet, unless the run resumes. Nothing is written.

    Raises:
        InputError: the folder holds a run, is a file, or cannot be read.
    """
    folder = config.output_folder
    try:
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{folder}: is a file, not a folder")
        held = [name for name in _RUN_FILES if (folder / name).exists()]
        # A run that failed in its first step leaves an empty history and nothing to resume from.
        if held == ["config.yaml", "history.jsonl"] and (folder / "history.jsonl").stat().st_size == 0:
            held = []
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: cannot be read: {error}") from error
    if held and not config.resume:
        raise InputError(
            f"{folder}: already holds a run ({', '.join(held)}); give --resume or another --output"
        )


def starting_point(config: TrainConfig, identity: dict[str, Any]) -> dict[str, Any] | None:
    """Return the newest checkpoint to resume from, or None to start at step 0.

    Args:
        config: the run's config.
        identity: `Run.identity`, which a checkpoint must agree with.

    Raises:
        InputError: the folder holds a run and the config does not resume, the checkpoint belongs to another run or is
            past `max_steps`, or no checkpoint can be read.
    """
    check_output(config)
    if not config.resume:
        return None
    file, checkpoint = _newest_checkpoint(config.output_folder / "checkpoints")
    if checkpoint is None:
        return None
    different = _find_differences(config, checkpoint, identity)
    if different:
        raise InputError(
            f"{file}: the run was started with another {', '.join(different)}; resume with the same command"
        )
    previous = json.loads(checkpoint["config"])["max_steps"]
    if previous != config.max_steps and config.schedule != "constant":
        logger.warning(
            "the run was started with --max-steps %d; from here on, the learning rate is scheduled for %d steps",
            previous,
            config.max_steps,
        )
    if checkpoint["step"] > config.max_steps:
        raise InputError(f"{file}: is past --max-steps {config.max_steps}")
    return checkpoint


def _newest_checkpoint(folder: Path) -> tuple[Path, dict[str, Any] | None]:
    """Return the newest checkpoint that can be read, with its file; None if there is no file."""
    files = checkpoint_files(folder)
    while files:
        file = files.pop()
        try:
            return file, load_checkpoint(file)
        except InputError as error:
            if not files:
                raise
            logger.warning("%s; resuming from %s instead", error, files[-1].name)
    return folder, None


def _find_differences(config: TrainConfig, checkpoint: dict[str, Any], identity: dict[str, Any]) -> list[str]:
    """Return the names of the settings and data that differ between a checkpoint and the run."""
    before = json.loads(checkpoint["config"])
    different = [name for name in config.differences(before) if name not in _DATA_FIELDS]
    if checkpoint.get("categories", identity["categories"]) != identity["categories"]:
        return [*different, "set of categories in --train-annotations"]
    known = checkpoint.get("data")
    if known is None:
        # Checkpoints of earlier versions hold only the paths of the data.
        logger.warning(
            "the checkpoint does not record the content of its data or the number of processes; they are not checked"
        )
        return different + [
            name
            for name in _DATA_FIELDS
            if os.path.realpath(before.get(name, "")) != os.path.realpath(getattr(config, name))
        ]
    for name, part in (("training", "train"), ("validation", "val")):
        if known[name] != identity["data"][name]:
            different.append(
                f"{name} set (--{part}-annotations has other content, or the image files have other sizes)"
            )
    if checkpoint["world_size"] != identity["world_size"]:
        different.append(f"number of processes ({checkpoint['world_size']}, now {identity['world_size']})")
    return different


def fingerprint(data: CocoData) -> str:
    """Return a hash of the annotation file and of the size of every image file, which does not depend on paths."""
    digest = hashlib.sha256()
    with open(data.annotation_file, "rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    for image in data.images:
        try:
            size = os.stat(data.image_path(image)).st_size
        except OSError:
            size = -1  # reading the image raises the error that names it
        digest.update(f"\n{size}".encode())
    return digest.hexdigest()
