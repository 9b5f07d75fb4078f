"""The model of a run, by name or by the import path of a user's own, its mask branch and its conversion."""

from __future__ import annotations

from typing import Any

from torch import nn

from maskloss.detection.builders import MODEL_NAMES, ModelSettings, build_model
from maskloss.detection.compatibility import check_parts, full_name, has_replaceable_transform
from maskloss.detection.conversion import MASK_BRANCHES, convert
from maskloss.detection.convolutions import fold_frozen_norms, use_channels_last
from maskloss.detection.mask_branch import MaskBranch
from maskloss.detection.mask_size import set_mask_size
from maskloss.errors import InputError
from maskloss.losses.criterion import MaskRCNNLoss
from maskloss.training.import_paths import called, imported


def make_model(settings: ModelSettings) -> nn.Module:
    """Make the model that `settings.name` names, not converted yet, with cheaper convolutions.

    A name with a dot is the import path of a builder, `(num_classes, settings) -> model`. Its model must be one that
    `maskloss.convert` accepts, with torchvision's own transform. The builder decides how to use `settings.min_size` and
    the other fields; only `settings.max_detections` and `settings.mask_size` are set on the model that it returns.

    Raises:
        InputError: the builder does not exist, raises, or returns anything else; or a size of masks is given for mask
            layers that are not torchvision's.
    """
    model = build_model(settings) if settings.name in MODEL_NAMES else _users_model(settings)
    return use_channels_last(fold_frozen_norms(model))


def _users_model(settings: ModelSettings) -> nn.Module:
    where = f"--model {settings.name!r}"
    model = called(imported(settings.name, "--model"), where, settings.num_classes, settings)
    is_detector = all(hasattr(model, part) for part in ("transform", "backbone", "rpn", "roi_heads"))
    if not isinstance(model, nn.Module) or not is_detector:
        raise InputError(
            f"{where}: must return a model of torchvision.models.detection, not a {full_name(model)}"
        )
    try:
        check_parts(model)
    except TypeError as error:
        raise InputError(f"{where}: {error}") from error
    if not has_replaceable_transform(model):
        raise InputError(
            f"{where}: its transform must be torchvision's GeneralizedRCNNTransform, not {full_name(model.transform)}"
        )
    heads: Any = model.roi_heads
    scores = getattr(heads.box_predictor, "cls_score", None)
    if isinstance(scores, nn.Linear) and scores.out_features != settings.num_classes:
        raise InputError(
            f"{where}: its box predictor scores {scores.out_features} classes, but num_classes was "
            f"{settings.num_classes}, background included"
        )
    heads.detections_per_img = settings.max_detections
    if settings.mask_size is not None:
        try:
            set_mask_size(model, settings.mask_size)
        except TypeError as error:
            raise InputError(f"{where}, --mask-size {settings.mask_size}: {error}") from error
    return model


def make_mask_branch(path: str, model: nn.Module) -> MaskBranch:
    """Make the mask branch that an import path names, from a function or class that takes the model.

    Raises:
        InputError: the function or class does not exist, raises, or returns anything but a MaskBranch.
    """
    if path in MASK_BRANCHES:
        return called(MASK_BRANCHES[path], f"--mask-branch {path}", model)
    branch = called(imported(path, "--mask-branch"), f"--mask-branch {path!r}", model)
    if not isinstance(branch, MaskBranch):
        raise InputError(
            f"--mask-branch {path!r}: must return a maskloss.detection.mask_branch.MaskBranch, not a "
            f"{full_name(branch)}"
        )
    for method in ("losses", "predict"):
        if getattr(type(branch), method) is getattr(MaskBranch, method):
            raise InputError(f"--mask-branch {path!r}: {full_name(branch)} has no method {method}")
    return branch


def converted(
    model: nn.Module, loss: MaskRCNNLoss, *, mask_branch: str | None, sync_free: bool = False
) -> nn.Module:
    """Convert a model of `make_model`, with the mask branch of this name or import path, for COCO results.

    Raises:
        InputError: the mask branch cannot be made or does not support the loss, or the model has layers that
            `sync_free` does not support.
    """
    branch = None if mask_branch is None else make_mask_branch(mask_branch, model)
    try:
        return convert(model, loss, paste=None, sync_free=sync_free, mask_branch=branch)
    except (TypeError, ValueError) as error:
        raise InputError(str(error)) from error
