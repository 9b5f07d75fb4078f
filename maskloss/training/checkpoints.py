"""What a run leaves behind: the model that describes itself, and what `--resume` needs.

Only tensors and JSON are ever read, never a pickle that could run code.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import struct
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from maskloss.data.coco import Category
from maskloss.detection.conversion import convert
from maskloss.detection.models import (
    MAX_SIDE,
    MODEL_NAMES,
    ModelSettings,
    bad_weights,
    build_model,
    num_stages,
)
from maskloss.errors import InputError
from maskloss.files import make_folder, read_bytes, write_bytes
from maskloss.losses.criterion import MaskRCNNLoss
from maskloss.losses.masks import ClassAgnosticMaskLoss, MaskBCELoss, MaskSoftmaxLoss
from maskloss.masks.targets import MaskTargets
from maskloss.training.losses import LossConfig, is_own_loss, make_loss

_METADATA_KEY = "maskloss"
#: Of the description; 1 were the files of 0.1.0, which do not say which loss it was.
_FORMAT_VERSION = 2
#: Of the loss's tensors. No module has an empty name, so no key of a model begins so.
_LOSS_PREFIX = ".loss."
#: Characters of a loss's config; a mapping of every term has some hundreds.
_LONGEST_LOSS = 100_000
#: Characters of a category's name; what is longer is no name, and would be drawn on every picture.
_LONGEST_NAME = 10_000
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
        loss: what it was trained with, as in a run's config; None where that is unknown, in files of 0.1.0.
    """

    settings: ModelSettings
    categories: tuple[Category, ...]
    aligned: bool
    mask_probs: str = "sigmoid"
    loss: LossConfig | None = None

    def to_metadata(self) -> dict[str, str]:
        """Return the metadata of the safetensors file."""
        content: dict[str, Any] = {
            "format_version": _FORMAT_VERSION,
            "settings": asdict(self.settings),
            "categories": [asdict(category) for category in self.categories],
            "loss": self.loss,
        }
        if self.loss is None or not is_own_loss(self.loss):
            # What inference needs of a loss that is not made from a file alone.
            content |= {"aligned": self.aligned, "mask_probs": self.mask_probs}
        return {"format": "pt", _METADATA_KEY: json.dumps(content)}

    @classmethod
    def from_metadata(cls, metadata: dict[str, str]) -> ModelDescription:
        """Read the metadata back.

        Raises:
            KeyError: it has no description.
            ValueError: a field cannot be meant; the message names it.
        """
        return _description(metadata[_METADATA_KEY])


def describe(
    settings: ModelSettings, categories: tuple[Category, ...], config: LossConfig, loss: MaskRCNNLoss
) -> ModelDescription:
    """Describe a model.

    Args:
        settings: that it was built from.
        categories: of its labels.
        config: of the loss.
        loss: made from the config.
    """
    return ModelDescription(settings, categories, loss.mask_targets.aligned, mask_probs_of(loss), config)


#: A mask term that makes masks of logits in this way, for models whose loss is not at hand.
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
    """Write a model with its description and with what its loss has learned or gathered.

    The model's tensors have the keys of its `state_dict`, which are torchvision's. Tensors of the loss, such as the
    counts of `SeesawLoss`, have their keys in the loss's `state_dict` behind ".loss."; most losses have none. The
    description is JSON in the metadata, under "maskloss".

    Example:
        >>> weights = safetensors.torch.load_file("model.safetensors")  # doctest: +SKIP
        >>> model.load_state_dict({k: v for k, v in weights.items() if not k.startswith(".")})  # doctest: +SKIP

    Raises:
        RunError: the disk is full, or the folder does not allow it.
    """
    state = dict(model.state_dict())
    loss = getattr(model.roi_heads, "loss", None)
    if isinstance(loss, MaskRCNNLoss):
        # A module of a user's own may have a state that is no tensor.
        state |= {_LOSS_PREFIX + k: v for k, v in loss.state_dict().items() if isinstance(v, Tensor)}
    # Copies: safetensors refuses tensors that share memory.
    state = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in state.items()}
    write_bytes(path, safetensors.torch.save(state, metadata=description.to_metadata()))


def load_model(path: str | Path, loss: LossConfig | None = None) -> tuple[nn.Module, ModelDescription]:
    """Read a model saved by `save_model`, converted, in evaluation mode, leaving mask probabilities unpasted.

    Its loss is the one it was trained with, `loss_is_known` of its description and `loss` provided; else one of which
    inference takes what it needs, and whose values mean nothing.

    Args:
        path: of the file, or of a run's folder that has a model.safetensors.
        loss: of the model, for one that was trained with a loss of a user's own, which is only imported from where the
            user says. Another than the model was trained with starts from its initial state, and changes no detection.

    Raises:
        InputError: the file is missing, truncated, no safetensors file, or of something else; or `loss` cannot be made,
            or makes other masks of logits.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "model.safetensors"
    if path.suffix == ".pt":
        raise InputError(f"{path}: is a checkpoint, to resume from; name the run's model.safetensors")
    state, metadata = _read_safetensors(path)
    loss_state = {
        key.removeprefix(_LOSS_PREFIX): state.pop(key) for key in list(state) if key.startswith(_LOSS_PREFIX)
    }
    try:
        description = ModelDescription.from_metadata(metadata)
    except KeyError:
        raise InputError(f"{path}: the file does not describe a model of maskloss train") from None
    except ValueError as error:
        raise InputError(f"{path}: its description of the model is wrong: {_first_line(error)}") from error
    made, own = _loss_of(path, description, loss)
    if own:
        _fill(path, made, loss_state, "the loss", finite=False)
    model = _filled_model(path, description.settings, state)
    convert(model, made, paste=None)
    # Masks are pasted as the network learned them, whatever loss it is evaluated with.
    transform: Any = model.transform
    transform.aligned_masks = description.aligned
    return model.eval(), description


def loss_is_known(description: ModelDescription, loss: LossConfig | None) -> bool:
    """Return whether `load_model(path, loss)` gives the model a loss whose values mean something."""
    return loss is not None or (description.loss is not None and is_own_loss(description.loss))


def _loss_of(
    path: Path, description: ModelDescription, given: LossConfig | None
) -> tuple[MaskRCNNLoss, bool]:
    """Make the loss for a loaded model; and say whether it is the one that the file's tensors belong to."""
    config = description.loss if given is None else given
    if config is not None and (given is not None or is_own_loss(config)):
        try:
            made = make_loss(config)
        except InputError as error:
            raise error if given is not None else InputError(f"{path}: its loss: {error}") from error
        if mask_probs_of(made) != description.mask_probs:
            raise InputError(
                f"{path}: makes masks of logits by {description.mask_probs}, --loss by {mask_probs_of(made)}; name the "
                f"loss that it was trained with{_named(description.loss)}"
            )
        return made, config == description.loss
    if description.mask_probs not in _MASK_TERMS:
        raise InputError(
            f"{path}: its masks come from the mask_probs of the mask term that it was trained with, which the file "
            f"cannot hold (mask_probs: {description.mask_probs}); `maskloss evaluate` takes it by --loss"
            f"{_named(description.loss)}"
        )
    mask_targets = MaskTargets(aligned=description.aligned, binary=False)
    return MaskRCNNLoss(mask=_MASK_TERMS[description.mask_probs](), mask_targets=mask_targets), False


def shown_loss(config: LossConfig) -> str:
    """Return a loss's config as one gives it to --loss, cut to one short line."""
    text = config if isinstance(config, str) else f"'{json.dumps(config)}'"
    return text if len(text) <= 120 else f"{text[:117]}..."


def _named(config: LossConfig | None) -> str:
    return "" if config is None else f" {shown_loss(config)}"


def _filled_model(path: Path, settings: ModelSettings, state: dict[str, Tensor]) -> nn.Module:
    """Build the model that a file describes, with the file's tensors."""
    # Before anything is built: a wrong number of classes may take any amount of memory.
    scores = state.get("roi_heads.box_predictor.cls_score.weight")
    if scores is not None and scores.dim() == 2 and scores.shape[0] != settings.num_classes:
        raise InputError(
            f"{path}: its tensors are of another model than it says: of {scores.shape[0]} classes, not "
            f"{settings.num_classes}"
        )
    model = build_model(settings)
    _fill(path, model, state, "the model")
    return model


def _fill(path: Path, module: nn.Module, state: dict[str, Tensor], what: str, *, finite: bool = True) -> None:
    """Load tensors that are exactly a module's, by name, shape and type, and where asked for finite."""
    expected = {key: value for key, value in module.state_dict().items() if isinstance(value, Tensor)}
    missing, extra = [k for k in expected if k not in state], [k for k in state if k not in expected]
    for keys, where in ((missing, "has no"), (extra, f"{what} that it describes has no")):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise InputError(
                f"{path}: its tensors are of another model than it says: {where} {keys[0][:100]}{more}"
            )
    for key, tensor in state.items():
        for found, wanted in (
            (tuple(tensor.shape), tuple(expected[key].shape)),
            (tensor.dtype, expected[key].dtype),
        ):
            if found != wanted:
                raise InputError(
                    f"{path}: its tensors are of another model than it says: {key} is {found}, not {wanted}"
                )
        if finite and (wrong := bad_weights(key, tensor, expected[key].dtype)):
            raise InputError(f"{path}: {wrong}")
    try:
        module.load_state_dict(state, strict=False)
    except (RuntimeError, TypeError, ValueError) as error:
        # A loss of a user's own may have its own way to load.
        raise InputError(f"{path}: the tensors do not fit {what}: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    first: str = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return first[:200]


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _description(text: str) -> ModelDescription:
    """Read a model's description, checking every field; raises a ValueError that names the field."""
    try:
        content = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {_first_line(error)}") from error
    _expect(isinstance(content, dict), "the whole", "a mapping", content)
    version = content.get("format_version", 1)
    _expect(_is_int(version, 1), "format_version", "a whole number from 1 on", version)
    if version > _FORMAT_VERSION:
        raise ValueError(
            f"its format_version is {version}; a newer maskloss wrote it, which is needed to read it"
        )
    settings = _settings(content.get("settings"))
    categories = _categories(content.get("categories"))
    if settings.num_classes != len(categories) + 1:
        raise ValueError(
            f"settings.num_classes is {settings.num_classes}, but there are {len(categories)} categories"
        )
    loss = content.get("loss")
    _expect(loss is None or isinstance(loss, str | dict), "loss", "a name or a mapping", loss)
    try:
        _expect(len(json.dumps(loss)) <= _LONGEST_LOSS, "loss", f"at most {_LONGEST_LOSS} characters", loss)
        made = make_loss(loss) if loss is not None and is_own_loss(loss) else None
    except (InputError, RecursionError) as error:
        raise ValueError(f"loss: {_first_line(error)}") from error
    if made is not None:
        return ModelDescription(settings, categories, made.mask_targets.aligned, mask_probs_of(made), loss)
    aligned = content.get("aligned")
    _expect(isinstance(aligned, bool), "aligned", "true or false", aligned)
    mask_probs = content.get("mask_probs", "sigmoid")
    _expect(
        mask_probs in [*_MASK_TERMS, "custom"],
        "mask_probs",
        " or ".join([*_MASK_TERMS, "custom"]),
        mask_probs,
    )
    return ModelDescription(settings, categories, aligned, mask_probs, loss)


def _settings(content: Any) -> ModelSettings:
    _expect(isinstance(content, dict), "settings", "a mapping", content)
    known = {field.name for field in fields(ModelSettings)}
    for key in content:
        _expect(key in known, "settings", f"a mapping of {', '.join(sorted(known))}", key)
    values = {field.name: content[field.name] for field in fields(ModelSettings) if field.name in content}

    def check(name: str, is_right: Callable[[Any], bool], expected: str, *, optional: bool = False) -> None:
        value = values.get(name)
        if not (optional and value is None) and (name in values or not optional):
            _expect(is_right(value), f"settings.{name}", expected, value)

    def numbers(low: float) -> Callable[[Any], bool]:
        return lambda value: (
            isinstance(value, list) and len(value) == 3 and all(_is_number(v, low, 1e6) for v in value)
        )

    check("name", lambda v: v in MODEL_NAMES, f"one of {', '.join(MODEL_NAMES)}")
    check("num_classes", lambda v: _is_int(v, 2), "a whole number from 2 on")
    for name, low in (("image_mean", -1e6), ("image_std", 1e-6)):
        if name in values:
            check(name, numbers(low), f"three numbers from {low:g} to 1e+06")
    if "frozen_normalization" in values:
        check("frozen_normalization", lambda v: isinstance(v, bool), "true or false")
    check(
        "min_size",
        lambda v: isinstance(v, list) and len(v) > 0 and all(_is_int(side, 1, MAX_SIDE) for side in v),
        f"whole numbers from 1 to {MAX_SIDE}",
        optional=True,
    )
    check(
        "max_size", lambda v: _is_int(v, 1, MAX_SIDE), f"a whole number from 1 to {MAX_SIDE}", optional=True
    )
    check(
        "trainable_layers",
        lambda v: _is_int(v, 0, num_stages(values["name"])),
        f"a whole number from 0 to {num_stages(values['name'])}",
        optional=True,
    )
    check("normalization_eps", lambda v: _is_number(v, 0, 1), "a number from 0 to 1", optional=True)
    for key in ("image_mean", "image_std", "min_size"):
        if isinstance(values.get(key), list):
            values[key] = tuple(values[key])
    return ModelSettings(**values)


def _categories(content: Any) -> tuple[Category, ...]:
    _expect(isinstance(content, list) and len(content) > 0, "categories", "a list of them", content)
    seen: set[int] = set()
    for index, category in enumerate(content):
        where = f"categories[{index}]"
        _expect(isinstance(category, dict), where, "a mapping of id and name", category)
        identity, name = category.get("id"), category.get("name")
        _expect(_is_int(identity, -(2**64), 2**64), f"{where}.id", "a whole number below 2^64", identity)
        _expect(identity not in seen, f"{where}.id", "an id of its own", identity)
        _expect(
            isinstance(name, str) and len(name) <= _LONGEST_NAME,
            f"{where}.name",
            f"a text of at most {_LONGEST_NAME} characters",
            name,
        )
        seen.add(identity)
    return tuple(Category(category["id"], category["name"]) for category in content)


def _is_int(value: Any, low: int, high: float = math.inf) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _is_number(value: Any, low: float, high: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def _expect(condition: bool, field: str, expected: str, value: Any) -> None:
    if not condition:
        shown = repr(value) if isinstance(value, str | int | float | None) else type(value).__name__
        shown = "nothing" if value is None else shown
        raise ValueError(
            f"{field} must be {expected}, not {shown if len(shown) <= 60 else shown[:57] + '...'}"
        )


def read_weights(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a .safetensors or .pt file of weights, and its metadata.

    Raises:
        InputError: the file is missing, truncated, holds something else than tensors, or would run code.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        weights, metadata = _read_safetensors(path)
        return {k: v for k, v in weights.items() if not k.startswith(_LOSS_PREFIX)}, metadata
    state = _load_pickle(path)
    if isinstance(state, dict) and isinstance(state.get("model"), dict):
        state = state["model"]  # the reference scripts of torchvision save so
    if not isinstance(state, dict) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise InputError(f"{path}: holds no state_dict, a dict of tensors")
    return dict(state), {}


def model_settings_of(metadata: dict[str, str]) -> dict[str, Any]:
    """Return image mean, std and how batch norms are frozen, where a weights file's metadata has them.

    Raises:
        InputError: it has one that cannot be meant; the message names the key.
    """
    found: dict[str, Any] = {}
    try:
        settings = ModelDescription.from_metadata(metadata).settings
    except ValueError as error:
        raise InputError(f"its description of the model is wrong: {_first_line(error)}") from error
    except KeyError:
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
    found = {key: getattr(settings, key) for key in ("image_mean", "image_std", "frozen_normalization")}
    if settings.normalization_eps is not None:
        found["normalization_eps"] = settings.normalization_eps
    return found


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
    try:
        _expect(_is_int(state["step"], 1), "step", "a whole number from 1 on", state["step"])
        _expect(_is_number(state["seconds"], 0, 1e12), "seconds", "a number from 0 on", state["seconds"])
        _expect(isinstance(state["config"], str), "config", "JSON", state["config"])
        try:
            config = json.loads(state["config"])
        except (ValueError, RecursionError) as error:
            raise ValueError(f"config must be JSON: {_first_line(error)}") from error
        _expect(isinstance(config, dict), "config", "a mapping", config)
        for key in ("model", "loss"):
            _expect_tensors(key, state.get(key, {}), any_value=key == "loss")
        _expect(isinstance(state["optimizer"], dict), "optimizer", "a mapping", state["optimizer"])
        scaler = state.get("scaler")
        _expect(scaler is None or isinstance(scaler, dict), "scaler", "a mapping", scaler)
        categories = state.get("categories", [])
        _expect(isinstance(categories, list), "categories", "a list", categories)
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
        raise InputError(f"{path}: the checkpoint is of another model: {_first_line(error)}") from error


def _expect_tensors(field: str, state: Any, *, any_value: bool) -> None:
    """Expect a state_dict; of tensors alone, finite ones, where no other value is allowed."""
    _expect(isinstance(state, dict), field, "a mapping of tensors", state)
    for key, value in state.items():
        _expect(isinstance(key, str), field, "a mapping of names", key)
        if isinstance(value, Tensor):
            wrong = value.is_meta if any_value else bad_weights(key, value, value.dtype)
            if wrong:
                raise ValueError(f"{field}: {key} holds no values" if any_value else f"{field}: {wrong}")
        else:
            _expect(any_value, f"{field}: {key}", "a tensor", value)


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    content = read_bytes(path)
    try:
        tensors = safetensors.torch.load(content)
        header_length = int.from_bytes(content[:8], "little")
        metadata = json.loads(content[8 : 8 + header_length]).get("__metadata__") or {}
    except (
        SafetensorError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RuntimeError,
        RecursionError,
    ) as error:
        raise InputError(f"{path}: truncated, or not a safetensors file: {_first_line(error)}") from error
    return tensors, metadata


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
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path}: truncated, or not a file of torch.save: {first}") from error
