"""What `--resume` needs: checkpoints. And weights that others saved.

Only tensors and JSON are ever read, never a pickle that could run code.
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
    """Read a .safetensors or .pt file of weights, and its metadata.

    Raises:
        InputError: the file is missing, truncated, holds something else than finite tensors, or would run code.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        tensors, metadata = read_safetensors(path)
        tensors = without_loss_state(tensors)
        check_finite_tensors(path, tensors)
        return tensors, metadata
    state = _load_pickle(path)
    if isinstance(state, dict) and isinstance(state.get("model"), dict):
        state = state["model"]  # the reference scripts of torchvision save so
    if not isinstance(state, dict) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise InputError(f"{path}: holds no state_dict, a dict of tensors")
    check_finite_tensors(path, state)
    return dict(state), {}


def save_checkpoint(folder: Path, step: int, state: dict[str, Any]) -> None:
    """Write a checkpoint whole, then drop all but the newest few.

    Args:
        folder: `checkpoints/` of the run.
        step: optimizer steps done.
        state: tensors, numbers, strings, and lists and dicts of them.

    Raises:
        RunError: the disk is full, or the folder does not allow it; older checkpoints are still there.
    """
    make_folder(folder)
    for unfinished in folder.glob(".step-*.tmp"):
        # Of a process that was killed as it wrote.
        unfinished.unlink(missing_ok=True)
    buffer = io.BytesIO()
    torch.save({"step": step, **state}, buffer)
    write_bytes(folder / f"step-{step:08d}.pt", buffer.getvalue())
    for old in checkpoint_files(folder)[:-_KEPT_CHECKPOINTS]:
        old.unlink(missing_ok=True)


def checkpoint_files(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    return sorted(folder.glob("step-*.pt"))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint.

    Raises:
        InputError: it is truncated, of something else, or would run code.
    """
    state = _load_pickle(path)
    if not isinstance(state, dict) or not {"step", "seconds", "config", "model", "optimizer"} <= set(state):
        raise InputError(f"{path}: is no checkpoint of maskloss train")
    try:
        check_field(is_whole(state["step"], 1), "step", "a whole number from 1 on", state["step"])
        check_field(is_number(state["seconds"], 0, 1e12), "seconds", "a number from 0 on", state["seconds"])
        check_field(isinstance(state["config"], str), "config", "JSON", state["config"])
        try:
            config = json.loads(state["config"])
        except (ValueError, RecursionError) as error:
            raise ValueError(f"config must be JSON: {first_line(error)}") from error
        check_field(isinstance(config, dict), "config", "a mapping", config)
        for key in ("model", "loss"):
            _check_tensors(key, state.get(key, {}), any_value=key == "loss")
        check_field(isinstance(state["optimizer"], dict), "optimizer", "a mapping", state["optimizer"])
        scaler = state.get("scaler")
        check_field(scaler is None or isinstance(scaler, dict), "scaler", "a mapping", scaler)
        categories = state.get("categories", [])
        check_field(isinstance(categories, list), "categories", "a list", categories)
    except ValueError as error:
        raise InputError(f"{path}: is no checkpoint of maskloss train: {error}") from error
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
        path: of the checkpoint, for messages.
        checkpoint: from `load_checkpoint`.
        model: of the run.
        loss: of the run; a checkpoint from before losses had a state has none.
        optimizer: of the run, before any step.

    Raises:
        InputError: it is of another model, or cannot be meant; the message names what.
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
                    raise ValueError(f"optimizer: its {key} is not {value}")
        for parameter, state in optimizer.state.items():
            if not isinstance(state, dict):
                raise ValueError("optimizer: its state is not one of tensors")
            for key, value in state.items():
                whole = isinstance(value, Tensor) and value.dim() > 0
                if whole and value.shape != parameter.shape:
                    raise ValueError(
                        f"optimizer: {key} is {tuple(value.shape)}, its parameter {tuple(parameter.shape)}"
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
        raise InputError(f"{path}: the checkpoint is of another model: {first_line(error)}") from error


def _check_tensors(field: str, state: Any, *, any_value: bool) -> None:
    """Expect a state_dict; of tensors alone, finite ones, where no other value is allowed."""
    check_field(isinstance(state, dict), field, "a mapping of tensors", state)
    for key, value in state.items():
        check_field(isinstance(key, str), field, "a mapping of names", key)
        if isinstance(value, Tensor):
            if value.is_meta or value.layout != torch.strided:
                raise ValueError(f"{field}: {key} holds no plain values")
            if not any_value and not torch.isfinite(value).all():
                raise ValueError(f"{field}: {key} is not finite")
        else:
            check_field(any_value, f"{field}: {key}", "a tensor", value)


def _load_pickle(path: Path) -> Any:
    content = read_bytes(path)
    try:
        with warnings.catch_warnings():
            # Such as how long it takes to check sparse tensors, which are none that we want.
            warnings.simplefilter("ignore")
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path}: truncated, or holds more than tensors and plain values, and is not read because such "
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
        raise InputError(f"{path}: truncated, or not a file of torch.save: {first_line(error)}") from error
