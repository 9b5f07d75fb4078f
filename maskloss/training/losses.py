"""The loss that a config names: a preset, an import path, or a preset with some parts replaced.

    loss: aligned

    loss: my_losses.my_loss              # a MaskRCNNLoss, or a function or class that makes one

    loss:
      preset: torchvision                # where not given
      mask: my_losses.my_mask_loss       # a function, or a class that is made without arguments
      box:
        class_path: maskloss.losses.BoxSmoothL1Loss
        init_args: {beta: 1.0}
      weights: {mask: 2.0}
      mask_targets: {aligned: true, binary: false}
      normalizers: {box: maskloss.losses.per_positive}

There is no list of names to choose from: what Python can import can be a term.
"""

from __future__ import annotations

import copy
import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from maskloss.errors import InputError
from maskloss.losses.boxes import BoxRegression
from maskloss.losses.criterion import KEYS, MaskBatch, MaskRCNNLoss, RoIBatch, RPNBatch
from maskloss.losses.presets import PRESETS
from maskloss.losses.weighting import BatchCounts, LossWeights
from maskloss.masks.targets import MaskTargets

LossConfig = str | dict[str, Any]

_TERMS = ("objectness", "rpn_box", "classification", "box", "mask", "regularization")
_MAPPINGS = ("weights", "mask_targets", "normalizers")
_KEYS = ("preset", *_TERMS, *_MAPPINGS)


def make_loss(config: LossConfig) -> MaskRCNNLoss:
    """Make the loss that a config names.

    Raises:
        InputError: there is no such preset, import path or key, what is found there is no callable or cannot be
            made, or the whole is no MaskRCNNLoss. The message names the key.
    """
    if isinstance(config, dict):
        return _composed(config)
    if not isinstance(config, str):
        raise InputError(f"--loss: expected a preset, an import path or a mapping, got {config!r}")
    if config in PRESETS:
        return MaskRCNNLoss(**PRESETS[config]())
    if "." not in config:
        raise InputError(
            f"--loss {config!r}: no such preset; there are {', '.join(PRESETS)}, or give an import path "
            "package.module.name"
        )
    found = imported(config, "--loss")
    loss = found if isinstance(found, MaskRCNNLoss) or not callable(found) else _called(found, {}, "--loss")
    if not isinstance(loss, MaskRCNNLoss):
        raise InputError(f"--loss {config!r}: gives a {type(loss).__name__}, not a MaskRCNNLoss")
    return loss


def changed_loss(base: LossConfig, changes: LossConfig) -> LossConfig:
    """Give the config of a loss with some parts changed: those of a mapping without `preset`, else all of it.

    Raises:
        InputError: the base is an import path, whose parts are not known.
    """
    if not isinstance(changes, dict) or "preset" in changes:
        return changes
    if isinstance(base, str):
        if base not in PRESETS:
            raise InputError(f"--loss: the base's is {base!r}, of which a mapping can change no part")
        base = {"preset": base}
    changed = {**base, **changes}
    for key in _MAPPINGS:
        if isinstance(base.get(key), dict) and isinstance(changes.get(key), dict):
            changed[key] = {**base[key], **changes[key]}
    return changed


def imported(path: str, where: str) -> Any:
    """Import what a path "package.module.name" names; modules in the working folder are found too.

    Raises:
        InputError: it cannot be imported; the message says where the path stands.
    """
    module_name, _, name = path.rpartition(".")
    # As `python -m` does; the installed command does not. Last, so that nothing installed is hidden.
    if (folder := os.getcwd()) not in sys.path:
        sys.path.append(folder)
    try:
        return getattr(importlib.import_module(module_name), name)
    except (Exception, SystemExit) as error:  # a user's module may raise anything
        raise InputError(f"{where} {path!r}: cannot be imported: {_described(error)}") from error


def probe_copy(
    loss: MaskRCNNLoss,
    num_classes: int,
    model: nn.Module,
    device: torch.device | None = None,
    *,
    require_finite: bool = True,
) -> None:
    """Probe a loss that is to train: neither its parameters nor what its terms have gathered changes.

    Args:
        loss: to check.
        num_classes: C of the model, background included.
        model: for the regularization term.
        device: where to evaluate; a term may hold tensors that are there already.
        require_finite: raise for values and gradients that are not finite, too.

    Raises:
        InputError: see `probe`.
    """
    state = {key: value.detach().clone() for key, value in loss.state_dict().items()}
    try:
        probed = copy.deepcopy(loss)
    except Exception:  # a user's object may refuse to be copied: then its state is restored
        probed = loss
    place = next(iter(loss.state_dict().values()), torch.empty(0)).device
    try:
        probe(probed.to(device), num_classes, model, device, require_finite=require_finite)
    finally:
        if probed is loss:
            loss.to(place)
            loss.load_state_dict(state)


def probe(
    loss: MaskRCNNLoss,
    num_classes: int,
    model: nn.Module | None = None,
    device: torch.device | None = None,
    *,
    require_finite: bool = True,
) -> None:
    """Evaluate every term once on a few random RoIs, forward and backward.

    Args:
        loss: to be looked at; what its terms gather, they gather from this too.
        num_classes: C of the model, background included.
        model: what the regularisation term is evaluated on; without one it is not.
        device: where to evaluate; the CPU where not given.
        require_finite: raise for values and gradients that are not finite, too.

    Raises:
        InputError: a term raises, gives another shape, or is not finite, in value or gradient. The message names
            the term.
    """
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device).requires_grad_()

    def boxes(count: int) -> BoxRegression:
        low = torch.rand(count, 2, generator=generator).to(device) * 40
        anchors = torch.cat([low, low + 20], dim=1)
        return BoxRegression(random(count, 4), random(count, 4).detach(), lambda deltas: anchors + deltas)

    labels = torch.randint(0, num_classes, (12,), generator=generator).to(device)
    labels[:4] = labels[:4].clamp(min=1)
    positives = labels > 0
    count = int(positives.sum())
    counts = BatchCounts(num_images=2, sampled=12, positives=count, batch_size_per_image=6, locations=40)
    objectness, class_logits, mask_logits = (
        random(12),
        random(12, num_classes),
        random(count, num_classes, 7, 7),
    )
    rpn = RPNBatch(objectness, positives.float(), boxes(count), counts)
    rois = RoIBatch(class_logits, labels, boxes(count), counts)
    targets = torch.rand(count, 7, 7, generator=generator).to(device)
    masks = MaskBatch(mask_logits, targets, labels[positives], counts)
    evaluations: list[tuple[Callable[[], dict[str, torch.Tensor]], list[list[torch.Tensor]]]] = [
        (lambda: loss.rpn_losses(rpn), [[objectness], [rpn.box.deltas]]),
        (lambda: loss.roi_losses(rois), [[class_logits], [rois.box.deltas]]),
        (lambda: loss.mask_losses(masks), [[mask_logits]]),
    ]
    if model is not None and loss.regularization is not None:
        parameters: list[torch.Tensor] = [p for p in model.parameters() if p.requires_grad]
        evaluations.append((lambda: loss.regularization_losses(model), [parameters]))
    for evaluate, predictions in evaluations:
        try:
            for (key, value), of in zip(evaluate().items(), predictions, strict=True):
                _expect_usable(key, value, of, require_finite)
        except InputError:
            raise
        except (Exception, SystemExit) as error:  # a user's term may raise anything
            raise InputError(f"the loss fails on random RoIs: {_described(error)}") from error


def _expect_usable(
    key: str, value: torch.Tensor, predictions: list[torch.Tensor], require_finite: bool
) -> None:
    """Expect a finite value with finite gradients to predictions, or to a model's parameters."""
    of = "the model" if key == KEYS["regularization"] else "random RoIs"
    if require_finite and not value.isfinite():
        raise InputError(f"{key} of {of} is {float(value.detach())}, not finite")
    if not value.requires_grad:
        raise InputError(f"{key} of {of} has no gradient")
    gradients = torch.autograd.grad(value, predictions, retain_graph=True, allow_unused=True)
    known = [gradient for gradient in gradients if gradient is not None]
    if not known:
        raise InputError(f"{key} of {of} does not depend on what the model predicts")
    if require_finite and not all(gradient.isfinite().all() for gradient in known):
        raise InputError(f"the gradient of {key} of {of} is not finite")


def _composed(config: dict[str, Any]) -> MaskRCNNLoss:
    unknown = set(config) - set(_KEYS)
    if unknown:
        raise InputError(
            f"--loss: no key is named {', '.join(sorted(map(str, unknown)))}; {', '.join(_KEYS)} are"
        )
    preset = config.get("preset", "torchvision")
    if preset not in PRESETS:
        raise InputError(f"--loss preset {preset!r}: no such preset; there are {', '.join(PRESETS)}")
    settings = PRESETS[preset]()
    for term in _TERMS:
        if term in config:
            settings[term] = None if config[term] is None else _made(config[term], f"--loss {term}")
            if config[term] is not None and not callable(settings[term]):
                raise InputError(
                    f"--loss {term} {config[term]!r}: is a {type(settings[term]).__name__}, no callable"
                )
    for key, kind, expected in (
        ("weights", int | float, "a number"),
        ("mask_targets", bool, "true or false"),
        ("normalizers", str | dict, "an import path"),
    ):
        if not isinstance(config.get(key, {}), dict):
            raise InputError(f"--loss {key}: expected a mapping, got {config[key]!r}")
        for name, value in config.get(key, {}).items():
            if not isinstance(value, kind):
                raise InputError(f"--loss {key} {name}: expected {expected}, got {value!r}")
    try:
        if "weights" in config:
            settings["weights"] = replace(settings.get("weights", LossWeights()), **config["weights"])
        if "mask_targets" in config:
            settings["mask_targets"] = replace(
                settings.get("mask_targets", MaskTargets(aligned=False, binary=False)),
                **config["mask_targets"],
            )
        if "normalizers" in config:
            made = {
                name: _made(path, f"--loss normalizers {name}")
                for name, path in config["normalizers"].items()
            }
            settings["normalizers"] = {**settings.get("normalizers", {}), **made}
        return MaskRCNNLoss(**settings)
    except (TypeError, ValueError, AttributeError) as error:
        raise InputError(f"--loss: {error}") from error


def _made(config: Any, where: str) -> Any:
    """Make a callable of an import path, or of a class_path with init_args, which may hold more of them."""
    if isinstance(config, str):
        found = imported(config, where)
        return _called(found, {}, where) if isinstance(found, type) else found
    if isinstance(config, dict) and set(config) <= {"class_path", "init_args"} and "class_path" in config:
        arguments = {key: _argument(value, where) for key, value in (config.get("init_args") or {}).items()}
        return _called(imported(config["class_path"], where), arguments, where)
    raise InputError(f"{where}: expected an import path, or class_path with init_args, got {config!r}")


def _argument(value: Any, where: str) -> Any:
    if isinstance(value, dict) and "class_path" in value:
        return _made(value, where)
    if isinstance(value, list):
        return [_argument(item, where) for item in value]
    return value


def _called(found: Any, arguments: dict[str, Any], where: str) -> Any:
    if not callable(found):
        raise InputError(f"{where}: is a {type(found).__name__}, no callable")
    try:
        return found(**arguments)
    except (Exception, SystemExit) as error:  # a user's class may raise anything
        raise InputError(f"{where}: cannot be made: {_described(error)}") from error


def _described(error: BaseException) -> str:
    says_itself = isinstance(error, (ImportError, AttributeError, ValueError))
    return str(error) if says_itself and str(error) else f"{type(error).__name__}: {error}"
