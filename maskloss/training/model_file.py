"""model.safetensors: a trained model with a description of its architecture, its categories and its loss.

Only tensors and JSON are read. No code that a file names is imported.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, get_args

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor, nn

from maskloss import losses as public_losses
from maskloss.data.coco import Category
from maskloss.data.dataset import Crowds
from maskloss.data.reading.entries import ID_LIMIT, LONGEST_NAME
from maskloss.detection.builders import MODEL_NAMES, MOST_DETECTIONS, ModelSettings
from maskloss.detection.conversion import MASK_BRANCHES
from maskloss.detection.mask_size import MASK_SIZES
from maskloss.errors import InputError, one_line
from maskloss.files import read_bytes, write_bytes
from maskloss.losses.criterion import MaskRCNNLoss
from maskloss.losses.mask_classes import ClassAgnosticMaskLoss, MaskSoftmaxLoss
from maskloss.losses.mask_pixels import MaskBCELoss
from maskloss.losses.presets import PRESETS
from maskloss.masks.targets import MaskTargets
from maskloss.training.file_fields import check_field, first_line, is_number, is_whole
from maskloss.training.loss_config import LossConfig, import_paths_of, make_loss
from maskloss.training.models import converted, make_model

#: Version of the description. Files of maskloss 0.1.0 have neither a version nor a loss.
_VERSION = 2
_METADATA_KEY = "maskloss"
#: Prefix of the keys of the loss's own tensors. No key of a model starts with it.
_LOSS_PREFIX = "maskloss.loss."

_LARGEST_SIZE = 20_000


@dataclass(frozen=True)
class ModelDescription:
    """The description of the model in a `model.safetensors`.

    Attributes:
        settings: how to build the model.
        categories: the categories in the order of the labels: label i + 1 is category i.
        aligned: `MaskTargets.aligned` of the targets that the model was trained on. It decides how masks are pasted.
        mask_probs: how logits become mask probabilities: "sigmoid" of the channel of the detected class, "softmax"
            over the classes, "class_agnostic" for the sigmoid of channel 0, or "custom" for a user's mask term.
        loss: `TrainConfig.loss` of the training; None in files of maskloss 0.1.0.
        crowds: `TrainConfig.crowds` of the training.
        mask_branch: name or import path of the mask branch; None for torchvision's mask layers.
        score_thresholds: for each category, the score with the best F1 on the validation set, or None if the model
            never found it; empty if the model of this step was not evaluated.
    """

    settings: ModelSettings
    categories: tuple[Category, ...]
    aligned: bool
    mask_probs: str = "sigmoid"
    loss: LossConfig | None = None
    crowds: Crowds = "leave_out"
    mask_branch: str | None = None
    score_thresholds: tuple[float | None, ...] = ()

    def to_metadata(self) -> dict[str, str]:
        """Return the metadata of the safetensors file."""
        return {"format": "pt", _METADATA_KEY: json.dumps({"version": _VERSION, **asdict(self)})}

    @classmethod
    def from_metadata(cls, metadata: dict[str, str]) -> ModelDescription:
        """Read a description from the metadata of the safetensors file.

        Raises:
            KeyError: the metadata or a required field is missing.
            ValueError: a field is invalid; the message names it.
        """
        try:
            content = json.loads(metadata[_METADATA_KEY])
        except (ValueError, RecursionError) as error:
            raise ValueError(f"its description is not valid JSON: {error}") from None
        check_field(isinstance(content, dict), "description", "an object", content)
        version = content.get("version", 1)
        check_field(
            version in (1, _VERSION), "version", f"at most {_VERSION} for this version of maskloss", version
        )
        check_field(isinstance(content["aligned"], bool), "aligned", "true or false", content["aligned"])
        mask_probs = content.get("mask_probs", "sigmoid")
        known = isinstance(mask_probs, str) and mask_probs in (*_MASK_TERMS, "custom")
        check_field(known, "mask_probs", f"one of {', '.join(_MASK_TERMS)}, custom", mask_probs)
        loss = content.get("loss")
        check_field(loss is None or isinstance(loss, str | dict), "loss", "a name or a mapping", loss)
        crowds = content.get("crowds", "leave_out")
        check_field(crowds in get_args(Crowds), "crowds", f"one of {', '.join(get_args(Crowds))}", crowds)
        branch = content.get("mask_branch")
        good = branch is None or branch in MASK_BRANCHES or _is_import_path(branch)
        check_field(good, "mask_branch", f"{', '.join(MASK_BRANCHES)} or an import path", branch)
        categories = _categories_of(content["categories"])
        settings = _settings_of(content["settings"])
        if settings.num_classes != len(categories) + 1:
            raise ValueError(f"it has {settings.num_classes} classes, but {len(categories)} categories")
        thresholds = content.get("score_thresholds", [])
        good = isinstance(thresholds, list) and all(t is None or is_number(t, 0, 1) for t in thresholds)
        good = good and len(thresholds) in (0, len(categories))
        check_field(good, "score_thresholds", "a score in [0, 1] or null for each category", thresholds)
        return cls(
            settings, categories, content["aligned"], mask_probs, loss, crowds, branch, tuple(thresholds)
        )


#: A mask term for each `mask_probs`, for models whose loss cannot be rebuilt from the file.
_MASK_TERMS: dict[str, Callable[[], nn.Module]] = {
    "sigmoid": MaskBCELoss,
    "softmax": MaskSoftmaxLoss,
    "class_agnostic": lambda: ClassAgnosticMaskLoss(MaskBCELoss()),
}


def mask_probs_of(loss: MaskRCNNLoss) -> str:
    """Return `ModelDescription.mask_probs` of a loss: how its mask term turns logits into mask probabilities."""
    if loss.own_mask_probs is None:
        return "sigmoid"
    names = {MaskSoftmaxLoss: "softmax", ClassAgnosticMaskLoss: "class_agnostic"}
    return names.get(type(loss.mask), "custom")


def is_self_contained(config: LossConfig | None) -> bool:
    """Return whether a loss's config uses only presets and `maskloss.losses`, and no user's code."""
    if isinstance(config, str):
        return config in PRESETS
    return isinstance(config, dict) and all(
        path.startswith("maskloss.losses.") and path.removeprefix("maskloss.losses.") in public_losses.__all__
        for path in import_paths_of(config)
    )


def save_model(path: Path, model: nn.Module, description: ModelDescription) -> None:
    """Write a converted model with its description and its loss's own tensors.

    Raises:
        RunError: the disk is full, or the folder is not writable.
    """
    state = dict(model.state_dict())
    if (heads := getattr(model, "roi_heads", None)) is not None and isinstance(
        getattr(heads, "loss", None), nn.Module
    ):
        state |= {f"{_LOSS_PREFIX}{key}": tensor for key, tensor in heads.loss.state_dict().items()}
    state = {key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}
    write_bytes(path, safetensors.torch.save(state, metadata=description.to_metadata()))


@dataclass(frozen=True)
class LoadedModel:
    """A model read from its file.

    Attributes:
        model: the converted model, in evaluation mode, which leaves mask probabilities unpasted.
        description: the description of the model.
        loss_config: config of the loss that the model has now. None if it is unknown because the file has no loss, or
            names a user's code that was not given again. The losses of this model are then not those of its run.
    """

    model: nn.Module
    description: ModelDescription
    loss_config: LossConfig | None


def load_model(
    path: str | Path,
    *,
    loss: LossConfig | None = None,
    max_detections: int | None = None,
    model: str | None = None,
    mask_branch: str | None = None,
) -> LoadedModel:
    """Read a model saved by `save_model`.

    Args:
        path: the file, or a run's folder: its best model is read, or its newest if it has not been evaluated yet.
        loss: config of the loss. Needed if the loss in the file names user code, which is not imported unless the
            caller names it, too; or another loss to evaluate with.
        max_detections: maximum number of detections per image. The file's own if omitted.
        model: import path of the model, needed if the model is a user's own.
        mask_branch: import path of the mask branch, needed if the mask branch is a user's own.

    Raises:
        InputError: the file is missing, truncated, not a safetensors file, not a model of maskloss, or holds values
            that are not finite; the model or mask branch is a user's own and not given, or given and not needed; or
            the loss cannot be made, or does not fit the mask branch.
    """
    path = Path(path)
    if path.is_dir():
        best = path / "best.safetensors"
        path = best if best.exists() else path / "model.safetensors"
    if path.suffix == ".pt":
        raise InputError(f"{path}: is a checkpoint for --resume; give the run's model.safetensors instead")
    state, metadata = read_safetensors(path)
    try:
        description = ModelDescription.from_metadata(metadata)
    except (KeyError, TypeError, AttributeError):
        raise InputError(f"{path}: the file does not describe a model of maskloss train") from None
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None
    if max_detections is not None:
        if not 1 <= max_detections <= MOST_DETECTIONS:
            raise InputError(
                f"--max-detections must be in 1 to {MOST_DETECTIONS:,}, got {one_line(max_detections, 80)}"
            )
        settings = replace(description.settings, max_detections=max_detections)
        description = replace(description, settings=settings)
    description = _replace_import_paths(path, description, model, mask_branch)
    config = loss
    if config is None and is_self_contained(description.loss):
        config = description.loss
    if config is None and description.mask_probs == "custom":
        raise InputError(
            f"{path}: its masks come from the mask term of its loss, {_describe(description.loss)}, which is not "
            "stored in the file: give it by --loss"
        )
    criterion = _make_paste_loss(description) if config is None else make_loss(config)
    own = without_loss_state(state)
    check_finite_tensors(path, state)
    network = make_model(description.settings)
    try:
        converted(network, criterion, mask_branch=description.mask_branch)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    try:
        _check_kinds(network, own)
        network.load_state_dict(own, strict=True)
        if config is not None and config == description.loss:
            criterion.load_state_dict(
                {
                    key.removeprefix(_LOSS_PREFIX): tensor
                    for key, tensor in state.items()
                    if key.startswith(_LOSS_PREFIX)
                },
                strict=True,
            )
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        raise InputError(
            f"{path}: its tensors do not fit the model that it describes: {first_line(error)}"
        ) from error
    # Masks are pasted as the model was trained, whatever loss it is evaluated with.
    transform: Any = network.transform
    transform.aligned_masks = description.aligned
    return LoadedModel(network.eval(), description, config)


def _replace_import_paths(
    path: Path, description: ModelDescription, model: str | None, mask_branch: str | None
) -> ModelDescription:
    """Return the description with the import paths that the user gives; raise InputError unless those fit the file."""
    name, branch = description.settings.name, description.mask_branch
    if name in MODEL_NAMES and model is not None:
        raise InputError(f"{path}: its model is {name}; omit --model, which is for users' own models")
    if branch in MASK_BRANCHES and mask_branch not in (None, branch):
        raise InputError(f"{path}: its mask branch is {branch}; omit --mask-branch")
    if branch is None and mask_branch is not None:
        raise InputError(f"{path}: its mask layers are torchvision's; omit --mask-branch")
    if name not in MODEL_NAMES and model is None:
        raise InputError(
            f"{path}: its model comes from user code, which runs only if you name it: give --model {name}"
        )
    if branch is not None and branch not in MASK_BRANCHES and mask_branch is None:
        raise InputError(
            f"{path}: its mask branch comes from user code, which runs only if you name it: give --mask-branch "
            f"{branch}"
        )
    settings = replace(description.settings, name=model or name)
    return replace(description, settings=settings, mask_branch=mask_branch or branch)


def _make_paste_loss(description: ModelDescription) -> MaskRCNNLoss:
    """Make a loss that only predicts masks as the model was trained; its loss values have no meaning."""
    return MaskRCNNLoss(
        mask=_MASK_TERMS[description.mask_probs](),
        mask_targets=MaskTargets(aligned=description.aligned, binary=False),
    )


def _describe(loss: LossConfig | None) -> str:
    return loss if isinstance(loss, str) else "a mapping with a user's code"


def model_settings_of(metadata: dict[str, str]) -> dict[str, Any]:
    """Return the `ModelSettings` fields of the normalization that the metadata of a weights file has.

    A model file has image_mean, image_std, frozen_normalization and normalization_eps. Other files may have any of the
    first three.

    Raises:
        InputError: a value is invalid; the message names the key.
    """
    found: dict[str, Any] = {}
    if _METADATA_KEY in metadata:
        try:
            settings = ModelDescription.from_metadata(metadata).settings
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"the metadata's description of the model cannot be read: {error}") from None
        keys = ("image_mean", "image_std", "frozen_normalization", "normalization_eps")
        return {key: getattr(settings, key) for key in keys}
    for key in ("image_mean", "image_std"):
        if key in metadata:
            found[key] = _three_numbers(key, metadata[key])
    if "frozen_normalization" in metadata:
        if metadata["frozen_normalization"] not in ("true", "false"):
            raise InputError(
                f"the metadata's frozen_normalization must be true or false, not "
                f"{metadata['frozen_normalization']!r}"
            )
        found["frozen_normalization"] = metadata["frozen_normalization"] == "true"
    return found


def _three_numbers(key: str, text: str) -> tuple[float, ...]:
    try:
        values = json.loads(text)
        good = isinstance(values, list) and len(values) == 3 and all(is_number(value) for value in values)
    except (ValueError, TypeError, RecursionError):
        good = False
    if not good or (key == "image_std" and min(values) <= 0):
        raise InputError(f"the metadata's {key} must be three numbers as JSON, not {text[:100]!r}")
    return tuple(float(value) for value in values)


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors and the metadata of a safetensors file.

    Raises:
        InputError: the file is missing, truncated, or not a safetensors file.
    """
    content = read_bytes(path)
    try:
        tensors = safetensors.torch.load(content)
        header_length = int.from_bytes(content[:8], "little")
        metadata = json.loads(content[8 : 8 + header_length]).get("__metadata__") or {}
    except (SafetensorError, ValueError, KeyError, RecursionError, AttributeError, TypeError) as error:
        raise InputError(f"{path}: truncated, or not a safetensors file: {error}") from error
    return tensors, metadata


def without_loss_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a model file without those of its loss."""
    return {key: tensor for key, tensor in state.items() if not key.startswith(_LOSS_PREFIX)}


def check_finite_tensors(path: Path, state: dict[str, Tensor]) -> None:
    """Raise InputError that names the file and the tensor, unless all values are finite."""
    for key, tensor in state.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise InputError(
                f"{path}: the tensor {key[:100]} holds values that are not finite; the model has diverged"
            )


def _check_kinds(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Check that no tensor would be cast between integer and floating-point types when it is loaded."""
    for key, tensor in model.state_dict().items():
        stored = state.get(key)
        if stored is not None and stored.is_floating_point() != tensor.is_floating_point():
            raise ValueError(f"{key} must have dtype {tensor.dtype}, not {stored.dtype}")


def _settings_of(content: Any) -> ModelSettings:
    check_field(isinstance(content, dict), "settings", "an object", content)
    known = {field.name for field in fields(ModelSettings)}
    unknown = sorted(map(str, set(content) - known))
    check_field(not unknown, "settings", f"fields of {', '.join(sorted(known))}", ", ".join(unknown))
    content = dict(content)
    name, num_classes = content["name"], content["num_classes"]
    good = isinstance(name, str) and (name in MODEL_NAMES or _is_import_path(name))
    check_field(good, "name", f"one of {', '.join(MODEL_NAMES)}, or an import path", name)
    check_field(
        is_whole(num_classes) and 2 <= num_classes <= 10**6,
        "num_classes",
        "an integer from 2 to 1,000,000",
        num_classes,
    )
    for key in ("image_mean", "image_std"):
        values = content.get(key, (0.5, 0.5, 0.5))
        good = (
            isinstance(values, list | tuple)
            and len(values) == 3
            and all(is_number(value) for value in values)
        )
        # Beyond these limits, float32 images overflow or lose their contrast.
        lowest = -1e6 if key == "image_mean" else 1e-6
        good = good and min(values) >= lowest and max(values) <= 1e6
        check_field(good, key, f"three numbers from {lowest:g} to 1e+06", values)
        content[key] = tuple(float(value) for value in values)
    sizes = content.get("min_size")
    good = sizes is None or (
        isinstance(sizes, list | tuple)
        and len(sizes) > 0
        and all(is_whole(size) and 1 <= size <= _LARGEST_SIZE // 2 for size in sizes)
    )
    check_field(good, "min_size", f"sizes from 1 to {_LARGEST_SIZE // 2} px", sizes)
    content["min_size"] = None if sizes is None else tuple(sizes)
    longest = content.get("max_size")
    good = longest is None or (is_whole(longest) and 1 <= longest <= _LARGEST_SIZE)
    check_field(good, "max_size", f"a size from 1 to {_LARGEST_SIZE} px", longest)
    frozen = content.get("frozen_normalization", False)
    check_field(isinstance(frozen, bool), "frozen_normalization", "true or false", frozen)
    eps = content.get("normalization_eps", 1e-5)
    check_field(is_number(eps) and 0 <= eps < 1, "normalization_eps", "a number in [0, 1)", eps)
    layers = content.get("trainable_layers")
    good = layers is None or (is_whole(layers) and 0 <= layers <= 6)
    check_field(good, "trainable_layers", "an integer from 0 to 6", layers)
    most = content.get("max_detections", 100)
    good = is_whole(most) and 1 <= most <= MOST_DETECTIONS
    check_field(good, "max_detections", f"an integer from 1 to {MOST_DETECTIONS:,}", most)
    size = content.get("mask_size")
    good = size is None or (is_whole(size) and size in MASK_SIZES)
    check_field(good, "mask_size", "14, 28 or 56", size)
    return ModelSettings(**content)


def _categories_of(content: Any) -> tuple[Category, ...]:
    check_field(isinstance(content, list) and content, "categories", "a list", content)
    categories = []
    for item in content:
        good = isinstance(item, dict) and is_whole(item.get("id")) and isinstance(item.get("name"), str)
        check_field(
            good and abs(item["id"]) < ID_LIMIT,
            "categories",
            "objects with an integer id and a name",
            item,
        )
        short = len(item["name"]) <= LONGEST_NAME
        check_field(short, "categories", f"names of at most {LONGEST_NAME} letters", item["name"])
        categories.append(Category(item["id"], item["name"]))
    different = len({category.id for category in categories}) == len(categories)
    check_field(different, "categories", "objects with distinct ids", "the same id twice")
    return tuple(categories)


def _is_import_path(value: Any) -> bool:
    if not isinstance(value, str) or len(value) > LONGEST_NAME:
        return False
    return "." in value and all(part.isidentifier() for part in value.split("."))
