"""What a run leaves behind: the model that describes itself, and what `--resume` needs.

Only tensors and JSON are ever read, never a pickle that could run code.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import struct
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from maskloss.data.coco import Category
from maskloss.detection.conversion import convert
from maskloss.detection.models import ModelSettings, build_model
from maskloss.errors import InputError
from maskloss.files import make_folder, read_bytes, write_bytes
from maskloss.losses.criterion import MaskRCNNLoss
from maskloss.losses.masks import ClassAgnosticMaskLoss, MaskBCELoss, MaskSoftmaxLoss
from maskloss.masks.targets import MaskTargets

_METADATA_KEY = "maskloss"
_KEPT_CHECKPOINTS = 2


@dataclass(frozen=True)
class ModelDescription:
    """What `model.safetensors` says of itself.

    Attributes:
        settings: how to build the model.
        categories: label i + 1 is category i.
        aligned: `MaskTargets.aligned` of the targets that it learned, which decides how masks are pasted.
        mask_probs: how logits become masks: "sigmoid" of the own class's channel, "softmax" over the classes,
            "class_agnostic" for the sigmoid of channel 0, or "custom" where a user's mask term says how.
    """

    settings: ModelSettings
    categories: tuple[Category, ...]
    aligned: bool
    mask_probs: str = "sigmoid"

    def to_metadata(self) -> dict[str, str]:
        """Give the metadata of the safetensors file."""
        return {"format": "pt", _METADATA_KEY: json.dumps(asdict(self))}

    @classmethod
    def from_metadata(cls, metadata: dict[str, str]) -> ModelDescription:
        """Read the metadata back.

        Raises:
            KeyError, TypeError, ValueError: it is not ours.
        """
        content = json.loads(metadata[_METADATA_KEY])
        settings = content["settings"]
        for key in ("image_mean", "image_std", "min_size"):
            settings[key] = None if settings[key] is None else tuple(settings[key])
        categories = tuple(Category(c["id"], c["name"]) for c in content["categories"])
        mask_probs = content.get("mask_probs", "sigmoid")
        return cls(ModelSettings(**settings), categories, bool(content["aligned"]), mask_probs)


#: A mask term for the losses of an evaluation, by how its logits become masks.
_MASK_TERMS: dict[str, Callable[[], nn.Module]] = {
    "sigmoid": MaskBCELoss,
    "softmax": MaskSoftmaxLoss,
    "class_agnostic": lambda: ClassAgnosticMaskLoss(MaskBCELoss()),
}


def mask_probs_of(loss: MaskRCNNLoss) -> str:
    """Name how a loss's mask term turns logits into masks, for `ModelDescription`."""
    if loss.own_mask_probs is None:
        return "sigmoid"
    names = {MaskSoftmaxLoss: "softmax", ClassAgnosticMaskLoss: "class_agnostic"}
    return names.get(type(loss.mask), "custom")


def save_model(path: Path, model: nn.Module, description: ModelDescription) -> None:
    """Write the whole model with its description.

    Raises:
        RunError: the disk is full, or the folder does not allow it.
    """
    state = {key: tensor.detach().cpu().contiguous() for key, tensor in model.state_dict().items()}
    write_bytes(path, safetensors.torch.save(state, metadata=description.to_metadata()))


def load_model(path: str | Path) -> tuple[nn.Module, ModelDescription]:
    """Read a model saved by `save_model`, converted, in evaluation mode, leaving mask probabilities unpasted.

    Raises:
        InputError: the file is missing, truncated, no safetensors file, or of something else.
    """
    path = Path(path)
    if path.suffix == ".pt":
        raise InputError(f"{path}: is a checkpoint, to resume from; name the run's model.safetensors")
    state, metadata = _read_safetensors(path)
    try:
        description = ModelDescription.from_metadata(metadata)
        if description.settings.num_classes != len(description.categories) + 1:
            raise ValueError(
                f"{description.settings.num_classes} classes, but {len(description.categories)} categories"
            )
        model = build_model(description.settings)
        model.load_state_dict(state, strict=True)
    except KeyError:
        raise InputError(f"{path}: the file does not describe a model of maskloss train") from None
    except (TypeError, ValueError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0]
        raise InputError(f"{path}: its tensors are of another model than it says: {first}") from error
    if description.mask_probs not in _MASK_TERMS:
        raise InputError(
            f"{path}: its masks come from the mask_probs of the mask term that it was trained with, "
            f"which the file cannot hold (mask_probs: {description.mask_probs})"
        )
    loss = MaskRCNNLoss(
        mask=_MASK_TERMS[description.mask_probs](),
        mask_targets=MaskTargets(aligned=description.aligned, binary=False),
    )
    convert(model, loss, paste=None)
    return model.eval(), description


def read_weights(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a .safetensors or .pt file of weights, and its metadata.

    Raises:
        InputError: the file is missing, truncated, holds something else than tensors, or would run code.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    state = _load_pickle(path)
    if isinstance(state, dict) and isinstance(state.get("model"), dict):
        state = state["model"]  # the reference scripts of torchvision save so
    if not isinstance(state, dict) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise InputError(f"{path}: holds no state_dict, a dict of tensors")
    return dict(state), {}


def model_settings_of(metadata: dict[str, str]) -> dict[str, Any]:
    """Image mean, std and frozen normalisation, where a weights file's metadata has them.

    Raises:
        InputError: it has one that cannot be meant; the message names the key.
    """
    found: dict[str, Any] = {}
    try:
        settings = ModelDescription.from_metadata(metadata).settings
    except (KeyError, TypeError, ValueError):
        for key in ("image_mean", "image_std"):
            if key in metadata:
                found[key] = _three_numbers(key, metadata[key])
        if "frozen_normalization" in metadata:
            if metadata["frozen_normalization"] not in ("true", "false"):
                raise InputError(
                    f"the metadata's frozen_normalization must be true or false, not "
                    f"{metadata['frozen_normalization']!r}"
                ) from None
            found["frozen_normalization"] = metadata["frozen_normalization"] == "true"
        return found
    return {key: getattr(settings, key) for key in ("image_mean", "image_std", "frozen_normalization")}


def _three_numbers(key: str, text: str) -> tuple[float, ...]:
    try:
        values = json.loads(text)
        good = len(values) == 3 and all(type(value) in (int, float) for value in values)
    except (ValueError, TypeError):
        good = False
    if not good or not all(math.isfinite(value) for value in values):
        raise InputError(f"the metadata's {key} must be three numbers as JSON, not {text!r}")
    return tuple(float(value) for value in values)


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


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    content = read_bytes(path)
    try:
        tensors = safetensors.torch.load(content)
        header_length = int.from_bytes(content[:8], "little")
        metadata = json.loads(content[8 : 8 + header_length]).get("__metadata__") or {}
    except (SafetensorError, ValueError, KeyError) as error:
        raise InputError(f"{path}: truncated, or not a safetensors file: {error}") from error
    return tensors, metadata


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
