"""The model of a run: one of maskloss's by name, or a user's by its import path, and a mask branch for either."""

from __future__ import annotations

from typing import Any

from torch import nn

from maskloss.detection.builders import MODEL_NAMES, ModelSettings, build_model
from maskloss.detection.compatibility import check_parts, full_name, has_replaceable_transform
from maskloss.detection.mask_branch import MaskBranch
from maskloss.errors import InputError
from maskloss.training.import_paths import called, imported


def make_model(settings: ModelSettings) -> nn.Module:
    """Make the model that `settings.name` names, not converted yet.

    A name with a dot is the import path of a builder, `(num_classes, settings) -> model`, whose model is one that
    `maskloss.convert` takes, with torchvision's own transform. What it makes of `settings.min_size` and the others is
    its own business; `settings.max_detections` is set on what it returns.

    Raises:
        InputError: there is no such builder, it raises, or returns something else.
    """
    if settings.name in MODEL_NAMES:
        return build_model(settings)
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
            f"{where}: scores {scores.out_features} classes, not {settings.num_classes} with the background, which it "
            "was called with"
        )
    heads.detections_per_img = settings.max_detections
    return model


def make_mask_branch(path: str, model: nn.Module) -> MaskBranch:
    """Make the mask branch that an import path names, from a function or class that takes the model.

    Raises:
        InputError: there is no such path, it raises, or returns something else.
    """
    branch = called(imported(path, "--mask-branch"), f"--mask-branch {path!r}", model)
    if not isinstance(branch, MaskBranch):
        raise InputError(
            f"--mask-branch {path!r}: must return an object of maskloss.detection.mask_branch.MaskBranch, not of "
            f"{full_name(branch)}"
        )
    return branch
