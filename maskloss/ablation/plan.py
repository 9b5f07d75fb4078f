"""Plan of a sweep: a base config, variants of it and seeds, read from YAML and validated."""

from __future__ import annotations

import copy
import math
import re
import sys
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser
from torch import nn

from maskloss.ablation.running import Run
from maskloss.ablation.tuning import (
    Trial,
    Tuning,
    check_held_out,
    combinations,
    format_values,
    make_trial,
    read_tuning,
)
from maskloss.data.coco import CocoData
from maskloss.errors import InputError
from maskloss.training.config import TrainConfig
from maskloss.training.freezing import freeze
from maskloss.training.loss_config import changed_loss
from maskloss.training.loss_probe import probe_copy
from maskloss.training.models import converted
from maskloss.training.setup import (
    check_mask_labels,
    device_of,
    image_repeats,
    initial_model,
    read_data,
)
from maskloss.training.yaml_files import read_yaml, with_underscores

_KEYS = ("base", "variants", "seeds", "baseline", "cpus", "gpus", "tune", "tune_fraction")
#: Options that the sweep sets for each run.
_OWN_FIELDS = ("output", "seed", "resume")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}")


@dataclass(frozen=True)
class Plan:
    """Validated plan of a sweep.

    Attributes:
        base: options that all runs share, unless their variant changes them.
        variants: options that differ from the base, by name of the variant, in the order of the file.
        baseline: variant that the others are compared with.
        seeds: seeds that every variant runs with.
        runs: all runs, seed by seed, so that an unfinished sweep has results of each variant.
        cpus: number of CPUs that a run requests from Ray.
        gpus: number of GPUs, possibly fractional, that a run requests from Ray.
        validation: validation set of the runs; that of the first variant if variants differ in it.
        one_validation: True if all variants have the same validation set.
        tuning: how each variant's options are chosen; None if they are not. The configs of `runs` lack what it chooses.
    """

    base: dict[str, Any]
    variants: dict[str, dict[str, Any]]
    baseline: str
    seeds: tuple[int, ...]
    runs: tuple[Run, ...]
    cpus: float
    gpus: float
    validation: CocoData
    one_validation: bool
    tuning: Tuning | None = None


def read_plan(file: str | Path, output: str | Path) -> Plan:
    """Read the YAML file of a sweep and validate everything that can be validated without training.

    Each variant's loss is built and evaluated on random RoIs, its model is built, and its data and weights are read.

    Args:
        file: YAML file with `base`, a mapping of `maskloss train`'s options or the name of a YAML file of them;
            `variants`, a mapping from names to the options that differ; `seeds`, a list; and optionally `baseline`,
            by default the first variant, `cpus` and `gpus` of a run under Ray, and `tune`, a mapping from names of
            options to lists of values. With `tune`, each variant is first trained once with each combination, on its
            training set without a share of the images, `tune_fraction`, 0.2 by default. The variant then uses the
            combination with the best mask AP on these images. Relative paths are relative to the working folder,
            except the base's file, which is relative to this one. Modules beside the file can be imported. If the
            base has a loss, a variant's mapping under `loss` without a `preset` changes parts of it.
        output: folder of the sweep.

    Raises:
        InputError: the file or a variant is invalid; the message names the file, the variant and the field.
    """
    path = Path(file)
    content = read_yaml(path)
    unknown = set(content) - set(_KEYS)
    if unknown:
        raise InputError(f"{path}: unknown key {', '.join(sorted(unknown))}; the keys are {', '.join(_KEYS)}")
    variants, seeds = _read_variants(path, content), _read_seeds(path, content)
    baseline = content.get("baseline", next(iter(variants)))
    if not isinstance(baseline, str) or baseline not in variants:
        raise InputError(
            f"{path}: the baseline {baseline!r} is not one of the variants {', '.join(variants)}"
        )
    resources = {name: content.get(name, default) for name, default in (("cpus", 1), ("gpus", 0))}
    for name, value in resources.items():
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < math.inf:
            raise InputError(f"{path}: {name} must be a number >= 0, got {value!r}")
    base = _read_base(path, content)
    if (folder := str(path.resolve().parent)) not in sys.path:
        sys.path.append(folder)

    grid, fraction = read_tuning(path, content)
    grid = _checked_options(f"{path}: tune", grid)
    configs = {}
    trials: list[Trial] = []
    data: dict[tuple[str, ...], tuple[CocoData, CocoData]] = {}
    checks = _Checks()
    for name, changes in variants.items():
        where = f"{path}: variant {name}"
        options = _apply_changes(where, base, changes)
        config = _make_config(where, {**options, "output": str(output)})
        if twice := sorted(set(changes) & set(grid) - {"loss"}):  # parts of a loss are merged
            raise InputError(f"{where}: sets {', '.join(twice)}, which tune chooses; remove one of them")
        try:
            training, _ = _read_checked_data(config, data)
            config = _in_steps(config, training)
            checks.check(config, training)
            if grid:
                check_held_out(config, training, fraction)
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
        configs[name] = config
        for number, values in enumerate(combinations(grid)):
            trial = f"{where}, {format_values(values)}"
            tried = _make_config(trial, {**_apply_changes(trial, options, values), "output": str(output)})
            try:
                checks.check(tried, training)
            except InputError as error:
                raise InputError(f"{trial}: {error}") from error
            tried = _in_steps(tried, training)
            trials.append(make_trial(name, tried, values, number, seeds[0], Path(output)))
    runs = []
    for seed in seeds:
        for name, config in configs.items():
            own = {"output": str(Path(output) / "runs" / name / f"seed-{seed}"), "seed": seed, "resume": True}
            runs.append(Run(name, seed, TrainConfig(**{**asdict(config), **own})))
    return Plan(
        base,
        variants,
        baseline,
        seeds,
        tuple(runs),
        **resources,
        validation=_read_checked_data(next(iter(configs.values())), data)[1],
        one_validation=len({(c.val_images, c.val_annotations) for c in configs.values()}) == 1,
        tuning=Tuning(grid, fraction, tuple(trials)) if grid else None,
    )


def _read_base(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    base = content.get("base")
    where = f"{path}: base"
    if isinstance(base, str):
        other = path.parent / base
        base, where = read_yaml(other), str(other)
        # A run's own config.yaml may be the base. Drop its options that the sweep sets.
        base = {key: value for key, value in base.items() if key.replace("-", "_") not in _OWN_FIELDS}
    if not isinstance(base, dict):
        raise InputError(f"{where}: expected a mapping of options, or the name of a YAML file of them")
    return _checked_options(where, base)


def _read_variants(path: Path, content: dict[str, Any]) -> dict[str, dict[str, Any]]:
    variants = content.get("variants")
    if not isinstance(variants, dict) or not variants:
        raise InputError(f"{path}: variants: expected a mapping from names to the options that differ")
    for name, changes in variants.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise InputError(
                f"{path}: variant {name!r}: a name has up to 100 letters, digits and ._+-, as it names a folder"
                + ("" if isinstance(name, str) else "; put it in quotes, or YAML does not read it as text")
            )
        if changes is not None and not isinstance(changes, dict):
            raise InputError(f"{path}: variant {name}: expected a mapping of options, got {changes!r}")
    return {
        name: _checked_options(f"{path}: variant {name}", changes or {}) for name, changes in variants.items()
    }


def _checked_options(where: str, options: dict[str, Any]) -> dict[str, Any]:
    """Return options with underscores in their names, after checking that a sweep may set them."""
    for key in options:
        if str(key).replace("-", "_") in _OWN_FIELDS:
            raise InputError(f"{where}: {key} is set by the sweep; remove it")
    return with_underscores(options, where, [field.name for field in fields(TrainConfig)])


def _read_seeds(path: Path, content: dict[str, Any]) -> tuple[int, ...]:
    seeds = content.get("seeds")
    if not isinstance(seeds, list) or not seeds:
        raise InputError(f"{path}: seeds: expected a list of at least one whole number, got {seeds!r}")
    for seed in seeds:
        if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63:
            raise InputError(f"{path}: seeds: a seed is a whole number >= 0 and below 2^63, got {seed!r}")
    if len(set(seeds)) < len(seeds):
        raise InputError(f"{path}: seeds: a seed is listed twice: {seeds}")
    return tuple(seeds)


def _make_config(where: str, options: dict[str, Any]) -> TrainConfig:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(TrainConfig, None)
    try:
        # Parse a copy, because jsonargparse changes the object.
        parsed = parser.parse_object(copy.deepcopy(options))
        return TrainConfig(**parsed.as_dict())
    except (ArgumentError, InputError, OverflowError, RecursionError, UnicodeError) as error:
        line = " ".join(str(error).split())
        raise InputError(f"{where}: {line}") from error


def _in_steps(config: TrainConfig, training: CocoData) -> TrainConfig:
    """Return the config with its length in steps, and without evaluations before the last step unless it asks for them.

    A sweep compares the last evaluations.
    """
    if config.evaluate_every is None:
        config = replace(config, evaluate_every=0)
    return config.in_steps(float(image_repeats(config, training).sum()))


def _apply_changes(where: str, base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return the base's options with a variant's changes; a mapping under `loss` replaces parts of the base's loss."""
    options = {**base, **changes}
    if base.get("loss") is not None and changes.get("loss") is not None:
        try:
            options["loss"] = changed_loss(base["loss"], changes["loss"])
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
    return options


def _read_checked_data(
    config: TrainConfig, known: dict[tuple[str, ...], tuple[CocoData, CocoData]]
) -> tuple[CocoData, CocoData]:
    """Read a run's data unless `known` has them; check that both sets have objects of every category.

    Raises:
        InputError: the data cannot be read, or a category has no object in one of the sets.
    """
    files = (config.train_images, config.train_annotations, config.val_images, config.val_annotations)
    if files not in known:
        known[files] = read_data(config)
        for kind, annotations, data in zip(
            ("training", "validation"),
            (config.train_annotations, config.val_annotations),
            known[files],
            strict=True,
        ):
            there = {o.category_id for image in data.images for o in image.objects}
            for category in data.categories:
                if category.id not in there:
                    raise InputError(
                        f"{annotations}: the {kind} set has no object of category {category.id} ({category.name}), "
                        "so variants could not be compared in it; use more images, or leave the category out with "
                        "`maskloss subset --categories`"
                    )
    return known[files]


class _Checks:
    """Checks of the configs of a sweep. A model is built once for all configs that differ in their losses only."""

    def __init__(self) -> None:
        self._key: tuple[Any, ...] = ()
        self._model = nn.Module()

    def check(self, config: TrainConfig, training: CocoData) -> None:
        """Check that this machine has the device of a run, and that its losses can be computed with its model.

        Raises:
            InputError: they cannot, or the training set has no labels for the mask loss.
        """
        device_of(config)
        loss = config.make_loss()
        check_mask_labels(config, loss, training)
        num_classes = len(training.categories) + 1
        built_from = ("model", "weights", "mask_size", "frozen_normalization", "trainable_layers", "freeze")
        key = (num_classes, *(repr(getattr(config, name)) for name in built_from))
        if key != self._key:
            self._model = initial_model(config, num_classes)[0]
            self._key = key
        converted(self._model, loss, mask_branch=config.mask_branch, sync_free=config.sync_free)
        freeze(self._model, config.frozen_parts)
        probe_copy(loss, num_classes, self._model)
