"""What `--resume` needs: checkpoints. And weights that others saved.

Only tensors and JSON are ever read, never a pickle that could run code.
"""

from __future__ import annotations

import io
import pickle
import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskloss.errors import InputError
from maskloss.files import make_folder, read_bytes, write_bytes
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
    return state


def _load_pickle(path: Path) -> Any:
    content = read_bytes(path)
    try:
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
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path}: truncated, or not a file of torch.save: {first}") from error
