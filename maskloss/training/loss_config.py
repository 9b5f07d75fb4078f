"""Losses from a config: a preset, an import path, or a preset with some parts replaced.

    loss: aligned

    loss: my_losses.my_loss              # a MaskRCNNLoss, or a function or class that returns one

    loss:
      preset: torchvision                # the default
      mask: my_losses.my_mask_loss       # a function, or a class whose constructor needs no arguments
      box:
        class_path: maskloss.losses.BoxSmoothL1Loss
        init_args: {beta: 1.0}
      weights: {mask: 2.0}
      mask_targets: {aligned: true, binary: false}
      normalizers: {box: maskloss.losses.per_positive}

Terms need no registration: any object that Python can import can be a term.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

from maskloss.errors import InputError
from maskloss.losses.criterion import MaskRCNNLoss
from maskloss.losses.presets import PRESETS
from maskloss.losses.terms import TERMS
from maskloss.training.import_paths import called, imported

#: The types of the values are left out: jsonargparse would build those that have a class_path, and refuse nested ones.
LossConfig = str | dict

_MAPPINGS = ("weights", "mask_targets", "normalizers")
_KEYS = ("preset", *TERMS, *_MAPPINGS)


def make_loss(config: LossConfig) -> MaskRCNNLoss:
    """Make a loss from its config.

    Raises:
        InputError: a preset, import path or key does not exist, an object is not callable or its constructor raises,
            or the result is not a MaskRCNNLoss. The message names the key.
    """
    if isinstance(config, dict):
        return _compose(config)
    if not isinstance(config, str):
        raise InputError(f"--loss: expected a preset, an import path or a mapping, got {config!r}")
    if config in PRESETS:
        return PRESETS[config]()
    if "." not in config:
        raise InputError(
            f"--loss {config!r}: no such preset; available: {', '.join(PRESETS)}, or give an import path "
            "package.module.name"
        )
    found = imported(config, "--loss")
    way_out = f"for a single term, write --loss '{{mask: {config}}}'"
    try:
        loss = found if isinstance(found, MaskRCNNLoss) or not callable(found) else called(found, "--loss")
    except InputError as error:
        raise InputError(
            f"{error}; --loss takes a function without arguments that returns a MaskRCNNLoss; {way_out}"
        ) from error
    if not isinstance(loss, MaskRCNNLoss):
        raise InputError(
            f"--loss {config!r}: must be or return a MaskRCNNLoss, not a {type(loss).__name__}; {way_out}"
        )
    return loss


def changed_loss(base: LossConfig, changes: LossConfig) -> LossConfig:
    """Return the config of a loss with changes applied.

    Args:
        base: the loss to change.
        changes: a mapping without `preset`, whose parts replace those of the base; anything else replaces the base.

    Raises:
        InputError: the base is an import path, so its parts cannot be replaced.
    """
    if not isinstance(changes, dict) or "preset" in changes:
        return changes
    if isinstance(base, str):
        if base not in PRESETS:
            raise InputError(
                f"--loss: the base's loss is the import path {base!r}, whose parts a mapping cannot change; use a "
                "preset in the base, or give a mapping with a preset"
            )
        base = {"preset": base}
    changed = {**base, **changes}
    for key in _MAPPINGS:
        if isinstance(base.get(key), dict) and isinstance(changes.get(key), dict):
            changed[key] = {**base[key], **changes[key]}
    return changed


def import_paths_of(config: dict[str, Any]) -> Iterator[str]:
    """Yield all import paths in a mapping, and "" for each term or normalizer that is neither a path nor a mapping.

    Whether a file's loss may be made depends on these paths, so no path that `make_loss` imports may be missing.

    Example:
        >>> config = {"mask": {"class_path": "maskloss.losses.MaskDiceLoss"}, "box": "my_losses.box"}
        >>> list(import_paths_of(config))
        ['maskloss.losses.MaskDiceLoss', 'my_losses.box']
    """
    normalizers = config.get("normalizers")
    terms = [
        value for key, value in config.items() if key not in ("preset", *_MAPPINGS) and value is not None
    ]
    for part in [*terms, *(normalizers.values() if isinstance(normalizers, dict) else [])]:
        if isinstance(part, str):
            yield part
        elif isinstance(part, dict) and "class_path" in part:
            yield from _class_paths_in(part)
        else:
            yield ""


def _class_paths_in(value: Any) -> Iterator[str]:
    """Yield the values of all keys `class_path` at any depth."""
    if isinstance(value, dict):
        if "class_path" in value:
            yield str(value["class_path"])
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            yield from _class_paths_in(part)


def _compose(config: dict[str, Any]) -> MaskRCNNLoss:
    """Make a loss from a mapping that replaces parts of a preset."""
    unknown = set(config) - set(_KEYS)
    if unknown:
        raise InputError(
            f"--loss: no key is named {', '.join(sorted(map(str, unknown)))}; available: {', '.join(_KEYS)}"
        )
    preset = config.get("preset", "torchvision")
    if not isinstance(preset, str) or preset not in PRESETS:
        raise InputError(f"--loss preset {preset!r}: no such preset; available: {', '.join(PRESETS)}")
    settings = PRESETS[preset]().settings()
    for term in TERMS:
        if term in config:
            settings[term] = None if config[term] is None else _make_callable(config[term], f"--loss {term}")
            if config[term] is not None and not callable(settings[term]):
                raise InputError(
                    f"--loss {term} {config[term]!r}: must be callable, but is a {type(settings[term]).__name__}"
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
    for key in ("weights", "mask_targets", "normalizers"):
        known = (
            [*settings[key]]
            if isinstance(settings[key], dict)
            else [field.name for field in fields(settings[key])]
        )
        for name in config.get(key, {}):
            if name not in known:
                raise InputError(f"--loss {key} {name}: unknown; available: {', '.join(known)}")
    try:
        if "weights" in config:
            settings["weights"] = replace(settings["weights"], **config["weights"])
        if "mask_targets" in config:
            settings["mask_targets"] = replace(settings["mask_targets"], **config["mask_targets"])
        if "normalizers" in config:
            normalizers = {
                name: _make_callable(path, f"--loss normalizers {name}")
                for name, path in config["normalizers"].items()
            }
            settings["normalizers"] = {**settings["normalizers"], **normalizers}
        return MaskRCNNLoss(**settings)
    except (TypeError, ValueError, AttributeError) as error:
        raise InputError(f"--loss: {error}") from error


def _make_callable(config: Any, where: str) -> Any:
    """Make a term or normalizer from an import path, or from a class_path with init_args, which may be nested."""
    if isinstance(config, str):
        found = imported(config, where)
        return _instance(config, where, {}) if isinstance(found, type) else found
    if (
        isinstance(config, dict)
        and set(config) <= {"class_path", "init_args"}
        and isinstance(config.get("class_path"), str)
    ):
        init_args = config.get("init_args") or {}
        if not isinstance(init_args, dict):
            raise InputError(f"{where} init_args: expected a mapping, got {init_args!r}")
        arguments = {key: _make_argument(value, where) for key, value in init_args.items()}
        return _instance(config["class_path"], where, arguments)
    raise InputError(f"{where}: expected an import path, or class_path with init_args, got {config!r}")


def _instance(path: str, where: str, arguments: dict[str, Any]) -> Any:
    """Import a class, or a function that makes a term, and call it after checking that it takes the arguments."""
    found = imported(path, where)
    try:
        parameters = inspect.signature(found).parameters
    except (TypeError, ValueError):  # not callable, or without a signature
        return called(found, where, **arguments)
    name = path.rpartition(".")[2]
    named = [key for key, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    missing = [
        key for key in named if parameters[key].default is inspect.Parameter.empty and key not in arguments
    ]
    if missing:
        given = ", ".join(f'"{key}": ...' for key in missing)
        raise InputError(
            f"{where}: {name} needs {' and '.join(missing)}; write "
            f'{{"class_path": "{path}", "init_args": {{{given}}}}}'
        )
    unknown = [key for key in arguments if key not in named]
    if unknown and len(named) == len(parameters):
        raise InputError(
            f"{where} init_args: {name} has no argument {unknown[0]}; it has {', '.join(named) or 'none'}"
        )
    return called(found, where, **arguments)


def _make_argument(value: Any, where: str) -> Any:
    """Make an argument of a constructor: objects for its class_paths, also in lists, and other values unchanged."""
    if isinstance(value, dict) and "class_path" in value:
        return _make_callable(value, where)
    if isinstance(value, list):
        return [_make_argument(item, where) for item in value]
    return value
