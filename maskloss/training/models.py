"""The model of a run: one of maskloss's by name, or a user's by its import path, and a mask branch for either."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from maskloss.detection.compatibility import check_parts, check_transform, full_name
from maskloss.detection.mask_branch import MaskBranch
from maskloss.detection.models import MODEL_NAMES, ModelSettings, build_model
from maskloss.errors import InputError
from maskloss.training.import_paths import described, imported


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
    model = _called(settings.name, "--model", settings.num_classes, settings)
    if not isinstance(model, nn.Module) or not hasattr(model, "roi_heads"):
        raise InputError(
            f"{where}: must return a model of torchvision.models.detection, not a {full_name(model)}"
        )
    try:
        check_parts(model)
        check_transform(model)
    except TypeError as error:
        raise InputError(f"{where}: {error}") from error
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
    branch = _called(path, "--mask-branch", model)
    if not isinstance(branch, MaskBranch):
        raise InputError(
            f"--mask-branch {path!r}: must return an object of maskloss.detection.mask_branch.MaskBranch, not of "
            f"{full_name(branch)}"
        )
    return branch


def _called(path: str, option: str, *arguments: Any) -> Any:
    make: Callable[..., Any] = imported(path, option)
    if not callable(make):
        raise InputError(f"{option} {path!r}: is a {type(make).__name__}, no callable")
    try:
        return make(*arguments)
    except (Exception, SystemExit) as error:  # a user's code may raise anything
        raise InputError(f"{option} {path!r}: cannot be made: {described(error)}") from error
