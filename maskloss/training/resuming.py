"""Where a run starts: anew, or from its newest checkpoint if that is the same run's."""

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

_RUN_FILES = ("config.yaml", "history.jsonl", "model.safetensors", "metrics.json", "checkpoints")
#: Fields whose files are compared by content on resume, so that data may move.
_DATA_FIELDS = ("train_images", "train_annotations", "val_images", "val_annotations")


def check_output(config: TrainConfig) -> None:
    """Refuse a folder that holds another run; write nothing."""
    folder = config.output_folder
    try:
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{folder}: is a file, not a folder")
        held = [name for name in _RUN_FILES if (folder / name).exists()]
        # A run that failed in its first step has nothing to resume from. It left an empty history.
        if held == ["config.yaml", "history.jsonl"] and (folder / "history.jsonl").stat().st_size == 0:
            held = []
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: cannot be read: {error}") from error
    if held and not config.resume:
        raise InputError(
            f"{folder}: already holds a run ({', '.join(held)}); give --resume or another --output"
        )


def starting_point(config: TrainConfig, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The newest checkpoint, or None to start anew; refuses a folder that holds another run."""
    check_output(config)
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
        logger.warning(
            "the run was planned for %d steps; from here the learning rate follows %d",
            previous,
            config.max_steps,
        )
    if checkpoint["step"] > config.max_steps:
        raise InputError(f"{file}: is past --max-steps {config.max_steps}")
    return checkpoint


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
            logger.warning("%s; going on from %s", error, files[-1].name)
    return folder, None


def _different(config: TrainConfig, checkpoint: dict[str, Any], identity: dict[str, Any]) -> list[str]:
    """Name what a checkpoint was made with and is otherwise now."""
    before = json.loads(checkpoint["config"])
    different = [name for name in config.differences(before) if name not in _DATA_FIELDS]
    if checkpoint.get("categories", identity["categories"]) != identity["categories"]:
        return [*different, "set of categories in --train-annotations"]
    known = checkpoint.get("data")
    if known is None:
        # Of an earlier version, which kept the paths alone.
        logger.warning(
            "the checkpoint does not say what data and how many processes it was trained with; they are not checked"
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


def fingerprint(data: CocoData) -> str:
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
