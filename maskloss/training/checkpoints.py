"""Checkpoints, which `--resume` reads, and weights files.

Only tensors and plain values are read, never a pickle that could run code.
"""

from __future__ import annotations

import io
import json
import pickle
import struct
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from maskloss.errors import InputError
from maskloss.files import make_folder, read_bytes, write_bytes
from maskloss.training.file_fields import check_field, first_line, is_number, is_whole
from maskloss.training.model_file import check_finite_tensors, read_safetensors, without_loss_state

_KEPT_CHECKPOINTS = 2


def read_weights(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a .safetensors or .pt file of weights.

    Returns:
        The tensors by name, without those of a loss, and the metadata, which is empty for a .pt file.

    Raises:
        InputError: the file is missing or truncated, holds anything but finite tensors, or would run code.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        tensors, metadata = read_safetensors(path)
        tensors = without_loss_state(tensors)
        check_finite_tensors(path, tensors)
        return tensors, metadata
    state = _load_pickle(path)
    if isinstance(state, dict) and isinstance(state.get("model"), dict):
        state = state["model"]  # torchvision's reference scripts store the state_dict under this key
    if not isinstance(state, dict) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise InputError(f"{path}: must hold a state_dict, which is a dict of tensors")
    check_finite_tensors(path, state)
    return dict(state), {}


def save_checkpoint(folder: Path, step: int, state: dict[str, Any]) -> None:
    """Write a checkpoint atomically, then delete all but the newest two.

    Args:
        folder: the run's `checkpoints/`.
        step: number of optimizer steps done.
        state: tensors, numbers and strings, and lists and dicts of them.

    Raises:
        RunError: the disk is full, or the folder is not writable; older checkpoints are kept.
    """
    make_folder(folder)
    for unfinished in folder.glob(".step-*.tmp"):
        # Left by a process that was killed while writing.
        unfinished.unlink(missing_ok=True)
    buffer = io.BytesIO()
    torch.save({"step": step, **state}, buffer)
    write_bytes(folder / f"step-{step:08d}.pt", buffer.getvalue())
    for old in checkpoint_files(folder)[:-_KEPT_CHECKPOINTS]:
        old.unlink(missing_ok=True)


def checkpoint_files(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, oldest first."""
    return sorted(folder.glob("step-*.pt"))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint and check its fields.

    Raises:
        InputError: the file is truncated, is not a checkpoint, or would run code.
    """
    state = _load_pickle(path)
    if not isinstance(state, dict) or not {"step", "seconds", "config", "model", "optimizer"} <= set(state):
        raise InputError(f"{path}: is not a checkpoint of maskloss train")
    try:
        check_field(is_whole(state["step"], 1), "step", "an integer >= 1", state["step"])
        check_field(is_number(state["seconds"], 0, 1e12), "seconds", "a number >= 0", state["seconds"])
        check_field(isinstance(state["config"], str), "config", "JSON", state["config"])
        try:
            config = json.loads(state["config"])
        except (ValueError, RecursionError) as error:
            raise ValueError(f"config must be JSON: {first_line(error)}") from error
        check_field(isinstance(config, dict), "config", "a mapping", config)
        for key in ("model", "loss", "average"):
            _check_tensors(key, state.get(key, {}), any_value=key == "loss")
        check_field(isinstance(state["optimizer"], dict), "optimizer", "a mapping", state["optimizer"])
        scaler = state.get("scaler")
        check_field(scaler is None or isinstance(scaler, dict), "scaler", "a mapping", scaler)
        evaluated = state.get("evaluated", state["step"])
        check_field(is_whole(evaluated, 0), "evaluated", "an integer >= 0", evaluated)
        best = state.get("best", {})
        check_field(
            isinstance(best, dict)
            and (best.get("precision") is None or is_number(best["precision"], 0, 1))
            and is_whole(best.get("since", 0), 0),
            "best",
            "an AP and a number of evaluations",
            best,
        )
        categories = state.get("categories", [])
        check_field(isinstance(categories, list), "categories", "a list", categories)
    except ValueError as error:
        raise InputError(f"{path}: is not a checkpoint of maskloss train: {error}") from error
    return state


def restore(
    path: Path,
    checkpoint: dict[str, Any],
    model: nn.Module,
    loss: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Load a checkpoint into a run's model, loss and optimizer.

    Args:
        path: named in error messages.
        checkpoint: from `load_checkpoint`.
        model: the run's model.
        loss: the run's loss. It keeps its state if the checkpoint has none, as in versions whose losses had no state.
        optimizer: the run's optimizer, before its first step.

    Raises:
        InputError: the checkpoint belongs to another model, or a value in it is invalid; the message names it.
    """
    groups = [
        {k: v for k, v in group.items() if k not in ("params", "lr")} for group in optimizer.param_groups
    ]
    try:
        loss.load_state_dict(checkpoint.get("loss", loss.state_dict()), strict=True)
        model.load_state_dict(checkpoint["model"], strict=True)
        optimizer.load_state_dict(checkpoint["optimizer"])
        for group, expected in zip(optimizer.param_groups, groups, strict=True):
            for key, value in expected.items():
                if group.get(key) != value:
                    raise ValueError(f"optimizer: {key} must be {value}")
        for parameter, state in optimizer.state.items():
            if not isinstance(state, dict):
                raise ValueError("optimizer: the state of each parameter must be a mapping of tensors")
            for key, value in state.items():
                has_shape = isinstance(value, Tensor) and value.dim() > 0
                if has_shape and value.shape != parameter.shape:
                    raise ValueError(
                        f"optimizer: {key} has shape {tuple(value.shape)}, but its parameter has "
                        f"{tuple(parameter.shape)}"
                    )
                if isinstance(value, Tensor) and not torch.isfinite(value).all():
                    raise ValueError(f"optimizer: {key} is not finite")
    except (
        RuntimeError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        IndexError,
        AssertionError,
    ) as error:
        raise InputError(f"{path}: the checkpoint belongs to another model: {first_line(error)}") from error


def _check_tensors(field: str, state: Any, *, any_value: bool) -> None:
    """Check that a value is a state_dict and, unless `any_value`, that it holds finite tensors only."""
    check_field(isinstance(state, dict), field, "a mapping of tensors", state)
    for key, value in state.items():
        check_field(isinstance(key, str), field, "a mapping of names", key)
        if isinstance(value, Tensor):
            if value.is_meta or value.layout != torch.strided:
                raise ValueError(f"{field}: {key} must be a dense tensor with values")
            if not any_value and not torch.isfinite(value).all():
                raise ValueError(f"{field}: {key} is not finite")
        else:
            check_field(any_value, f"{field}: {key}", "a tensor", value)


def _load_pickle(path: Path) -> Any:
    """Read a file that torch.save wrote, if it holds tensors and plain values only."""
    content = read_bytes(path)
    try:
        with warnings.catch_warnings():
            # For example about the cost of validating sparse tensors.
            warnings.simplefilter("ignore")
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path}: truncated, or holds objects other than tensors and plain values; it is not read because such "
            "files can run code"
        ) from error
    except (
        RuntimeError,
        EOFError,
        ValueError,
        KeyError,
        AttributeError,
        TypeError,
        IndexError,
        struct.error,
    ) as error:
        raise InputError(f"{path}: truncated, or not written by torch.save: {first_line(error)}") from error
