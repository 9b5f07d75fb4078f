"""What a converted model does around each forward pass: check its parts and its inputs, and add regularization."""

from __future__ import annotations

import inspect
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn

from maskloss.detection.compatibility import check_still_converted, full_name, replaced_functions
from maskloss.detection.model_inputs import ModelInputs
from maskloss.detection.roi_heads import RoIHeads
from maskloss.detection.rpn import RegionProposalNetwork
from maskloss.detection.target_checks import check_inputs
from maskloss.detection.target_forms import in_plain_form
from maskloss.detection.transform import Paste, RCNNTransform
from maskloss.masks.encoded import EncodedMasks

#: Folders of code that is not the user's.
_LIBRARIES = tuple(
    f"{Path(file).parent}{os.sep}" for file in (torch.__file__, torchvision.__file__, Path(__file__).parent)
)


@dataclass
class Conversion:
    """State of a conversion that the checks of each forward pass use.

    Attributes:
        paste: the `paste` argument of `convert`.
        replaced_functions: names of torchvision's loss functions that had already been replaced at the conversion.
        checks_targets: whether the model's `forward` starts with (images, targets), which a subclass may change.
        needs_loss: whether the losses are others than torchvision's, so that torchvision's code must not compute them.
        box_format_checks: number of further batches in which boxes are compared with masks.
        warned_of_border: whether the warning about boxes outside the image has been issued.
        loss_versions: how often each of the loss's parameters with a gradient, and the model's all together, had been
            changed at the last forward pass in training; None after the warning about a loss without an optimizer.
    """

    paste: Paste
    replaced_functions: list[str]
    checks_targets: bool
    needs_loss: bool = False
    box_format_checks: int = 10
    warned_of_border: bool = False
    loss_versions: tuple[dict[str, int], int] | None = ({}, 0)


def add_hooks(model: nn.Module, paste: Paste, *, needs_loss: bool) -> None:
    """Add the hooks to a model that has been converted with `paste`, or converted again; see `Conversion`."""
    own: Any = model
    takes_targets = _takes_images_and_targets(type(model).forward)
    own.conversion = Conversion(paste, replaced_functions(), takes_targets, needs_loss)
    if _check_inputs not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_check_inputs, with_kwargs=True)
        model.register_forward_hook(_finish)


def _check_inputs(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Check a converted model's parts and inputs before each forward pass, as a forward pre-hook.

    Raises an error if parts have been patched since `convert`, and, in training, if targets are invalid.
    `losses_and_detections` checks its targets itself, because it knows their index in the whole batch.
    """
    conversion: Conversion = model.conversion
    check_still_converted(model, paste=conversion.paste, allowed=conversion.replaced_functions)
    if model.training and conversion.loss_versions is not None:
        _warn_if_loss_is_not_optimized(model, *conversion.loss_versions)
    model.rpn.used_loss = model.roi_heads.used_loss = False
    if not model.roi_heads.training or not conversion.checks_targets:
        return None
    given: dict[str, Any] = {**dict(zip(("images", "targets"), args, strict=False)), **kwargs}
    if given.get("images") is None:
        return None
    images = given["images"]
    targets = checked_targets(model, images, given.get("targets"))
    return (images, targets, *args[2:]), {k: v for k, v in kwargs.items() if k not in ("images", "targets")}


def _warn_if_loss_is_not_optimized(model: Any, before: dict[str, int], model_before: int) -> None:
    """Warn once if the model's parameters change between forward passes, but the loss's, despite a gradient, do not.

    Comparing with the model's parameters keeps the accumulation of gradients over several batches from being reported.
    """
    # An optimizer's `zero_grad` sets the gradients to None by default, so this is empty if it has the parameters.
    now = {
        name: parameter._version
        for name, parameter in model.roi_heads.loss.named_parameters()
        if parameter.grad is not None
    }
    model_now = sum(parameter._version for parameter in model.parameters()) if now else 0
    model.conversion.loss_versions = (now, model_now)
    unchanged = [name for name, version in now.items() if before.get(name) == version]
    if unchanged and model_now > model_before:
        model.conversion.loss_versions = None
        _warn(
            f"the loss's parameter {unchanged[0]} has a gradient, but the optimizer does not change it: pass "
            "maskloss.loss_parameters(model) to the optimizer, too, or freeze it with requires_grad_(False)"
        )


def _warn(message: str) -> None:
    """Issue a warning that points at the user's line, which calls the model through torch and torchvision."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_LIBRARIES):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def checked_targets(model: Any, images: Any, targets: Any) -> list[dict[str, Any]]:
    """Check a batch, and return its targets in the form that torchvision's code needs.

    Raises:
        TypeError: see `check_inputs`; or a custom transform does not support `EncodedMasks` or `ignore_boxes`.
        ValueError: see `check_inputs`.
    """
    conversion: Conversion = model.conversion
    checked = check_inputs(
        images, targets, ModelInputs.of_model(model), check_box_format=conversion.box_format_checks > 0
    )
    if checked.warning is not None and not conversion.warned_of_border:
        conversion.warned_of_border = True
        _warn(checked.warning)
    if any(len(target["boxes"]) for target in targets):
        conversion.box_format_checks -= 1
    if model.training and getattr(model.transform, "boxes_on_host", False):
        # They are on the host now, so the transform need not copy them again.
        targets = [{**target, "boxes": boxes} for target, boxes in zip(targets, checked.boxes, strict=True)]
    targets = in_plain_form(targets, images)
    if not isinstance(model.transform, RCNNTransform):
        for index, target in enumerate(targets):
            if isinstance(target.get("masks"), EncodedMasks):
                raise TypeError(
                    f"image {index} of the batch, masks: EncodedMasks need torchvision's own transform, but "
                    f"model.transform is {full_name(model.transform)}; pass `masks.bitmaps()`"
                )
            for field in ("ignore_boxes", "points"):
                if field in target:
                    raise TypeError(
                        f"image {index} of the batch, {field}: need torchvision's own transform, which resizes them "
                        f"with the image, but model.transform is {full_name(model.transform)}; remove them"
                    )
    return targets


def _takes_images_and_targets(forward: Callable[..., Any]) -> bool:
    """Return whether a model's `forward` starts with (images, targets), which a subclass may change."""
    return list(inspect.signature(forward).parameters)[1:3] == ["images", "targets"]


def _check_loss_was_used(model: Any) -> None:
    """Check that no `forward` of a user's, mostly a copy of torchvision's, has computed the losses without ours.

    Raises:
        TypeError: a part in training mode has not asked for its loss.
    """
    for name, ours in (("rpn", RegionProposalNetwork), ("roi_heads", RoIHeads)):
        part = getattr(model, name)
        where = ""
        if "forward" in vars(part):
            where = "has been patched on the instance"
        elif type(part).forward is not ours.forward:
            where = f"is that of {full_name(part)}"
        if where and part.training and not part.used_loss:
            raise TypeError(
                f"model.{name}.forward, which {where}, computes losses without the loss and the mask branch that were "
                f"passed to convert; let it call type(model.{name}).forward, and add your own losses to those"
            )


def _finish(model: Any, args: Any, output: Any) -> Any:
    """Check that the losses are those of the conversion, and add that of regularization, as a forward hook.

    The penalty is computed from the `model` that the hook receives, so that a copy uses its own parameters.
    """
    if not model.training:
        return None
    if model.conversion.needs_loss:
        _check_loss_was_used(model)
    heads = model.roi_heads
    if heads.loss.regularization is None:
        return None
    penalty = heads.loss.regularization_losses(model)
    if isinstance(output, dict):
        return {**output, **penalty}
    if isinstance(output, tuple) and output and isinstance(output[0], dict):
        # A subclass that returns losses and detections, as torchvision's scripted models do.
        return ({**output[0], **penalty}, *output[1:])
    raise TypeError(
        f"{full_name(model)} returns no dict of losses to which a regularization term could be added"
    )
