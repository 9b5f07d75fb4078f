"""Choice of options for each variant of a sweep, by runs that are evaluated on a held-out part of the training set."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from maskloss.ablation.analysis import metric_of
from maskloss.ablation.running import Outcome, Run
from maskloss.data.coco import CocoData, read_coco
from maskloss.data.subset import part_of, stratified
from maskloss.errors import InputError, one_line
from maskloss.files import make_folder, read_bytes, write_text
from maskloss.training.config import TrainConfig
from maskloss.training.file_fields import is_number

#: Options that cannot be tuned, because they choose the data.
_DATA_FIELDS = ("train_images", "train_annotations", "val_images", "val_annotations")
#: Names of the files with the two parts of a training set.
_TRAINED_PART, _HELD_OUT_PART = "trained.json", "held_out.json"
#: Largest number of combinations that are tried for each variant.
_MOST_TRIALS = 100


@dataclass(frozen=True)
class Trial(Run):
    """Training run that tries options for a variant, on a part of its training set.

    Attributes:
        values: the options that are tried, by name.
        whole: file of the variant's whole training set.
    """

    values: dict[str, Any]
    whole: str


@dataclass(frozen=True)
class Tuning:
    """Grid search over options, run for each variant before its own runs.

    Attributes:
        grid: values to try, by name of the option; all combinations are tried.
        fraction: share of the training images that are held out to choose by.
        trials: the runs, variant by variant.
    """

    grid: dict[str, list[Any]]
    fraction: float
    trials: tuple[Trial, ...]


def read_tuning(path: Path, content: dict[str, Any]) -> tuple[dict[str, list[Any]], float]:
    """Return the values to try by option, and the share of images to hold out, from the YAML of a sweep.

    Raises:
        InputError: the grid or the share is invalid.
    """
    grid, fraction = content.get("tune", {}), content.get("tune_fraction", 0.2)
    if not isinstance(grid, dict) or not all(isinstance(values, list) and values for values in grid.values()):
        raise InputError(
            f"{path}: tune: expected a mapping from options to lists of values, such as {{learning_rate: [0.001, "
            f"0.003]}}, got {grid!r}"
        )
    if of_data := sorted(set(grid) & set(_DATA_FIELDS)):
        raise InputError(f"{path}: tune: {', '.join(of_data)} cannot be tuned; make it a variant")
    if math.prod(len(values) for values in grid.values()) > _MOST_TRIALS:
        raise InputError(f"{path}: tune: has more than {_MOST_TRIALS} combinations")
    if not is_number(fraction) or not 0 < fraction < 1:
        raise InputError(f"{path}: tune_fraction must be above 0 and below 1, got {fraction!r}")
    if "tune_fraction" in content and not grid:
        raise InputError(f"{path}: tune_fraction has no effect without tune")
    return grid, fraction


def combinations(grid: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """Return all combinations of a grid, or none for an empty grid."""
    if not grid:
        return []
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def format_values(values: dict[str, Any]) -> str:
    """Format tried or chosen options in one line.

    Example:
        >>> format_values({"learning_rate": 0.001, "weight_decay": 0})
        'learning_rate 0.001, weight_decay 0'
    """
    return ", ".join(f"{name} {one_line(value, 60)}" for name, value in values.items())


def check_held_out(config: TrainConfig, training: CocoData, fraction: float) -> None:
    """Check that both parts of a training set have an object, so that one can train and the other has an AP.

    Raises:
        InputError: a part has none.
    """
    _, held_out = stratified(training, {category.id for category in training.categories}, 1 - fraction)
    kept = [
        sum(bool(i.objects) for i in training.images if (i.id in held_out) == part) for part in (True, False)
    ]
    if not all(kept):
        raise InputError(
            f"{config.train_annotations}: tune_fraction {fraction:g} leaves no objects to "
            f"{'choose by' if kept[1] else 'train on'}"
        )


def make_trial(
    variant: str, config: TrainConfig, values: dict[str, Any], number: int, seed: int, output: Path
) -> Trial:
    """Make a trial, whose files of annotations `write_parts` writes."""
    parts = output / "tuning" / variant
    own = {
        "output": str(output / "runs" / variant / f"tuning-{number}"),
        "seed": seed,
        "resume": True,
        "train_annotations": str(parts / _TRAINED_PART),
        "val_images": config.train_images,
        "val_annotations": str(parts / _HELD_OUT_PART),
    }
    return Trial(variant, seed, TrainConfig(**{**asdict(config), **own}), values, config.train_annotations)


def write_parts(trial: Trial, fraction: float) -> None:
    """Write both parts of a trial's training set; the images are not copied.

    Raises:
        InputError: the training set cannot be read.
        RunError: the disk is full, or the folder is not writable.
    """
    data = read_coco(trial.config.train_images, trial.whole)
    categories = {category.id for category in data.categories}
    kept, held_out = stratified(data, categories, 1 - fraction)
    document = json.loads(read_bytes(Path(trial.whole)))
    for path, images in ((trial.config.train_annotations, kept), (trial.config.val_annotations, held_out)):
        make_folder(Path(path).parent)
        write_text(Path(path), json.dumps(part_of(document, images, categories)))


@dataclass(frozen=True)
class Tuned:
    """Result of tuning one variant.

    Attributes:
        trials: the trials with their outcomes, in the order of the grid.
        chosen: the best trial; None if none succeeded.
    """

    trials: tuple[tuple[Trial, Outcome], ...]
    chosen: Trial | None

    @property
    def failure(self) -> str:
        """Why nothing was chosen, in one line."""
        first = next((o.failure for _, o in self.trials if o.failure is not None), "it has no AP")
        return f"none of the {len(self.trials)} runs that tune it succeeded: {first}"


def score_of(outcome: Outcome) -> float | None:
    """Return the AP that a trial is judged by: of masks, or of boxes if no mask was evaluated."""
    mask_ap = metric_of(outcome.metrics, "mask AP")
    return metric_of(outcome.metrics, "box AP") if mask_ap is None else mask_ap


def choose(trials: Sequence[tuple[Trial, Outcome]]) -> Tuned:
    """Choose the trial of a variant with the highest AP; the first one of equal trials.

    Args:
        trials: all trials of one variant, in the order of the grid.
    """
    scores = [-1.0] * len(trials)
    for index, (_, outcome) in enumerate(trials):
        score = score_of(outcome)
        if outcome.failure is None and score is not None:
            scores[index] = score
    best = max(range(len(trials)), key=scores.__getitem__)
    return Tuned(tuple(trials), trials[best][0] if scores[best] >= 0 else None)


def with_chosen(run: Run, chosen: Trial) -> Run:
    """Return a run with the values that were chosen for its variant, and as many steps as the trial had.

    A trial's epochs, or those that its batch size makes longer, are given in steps by now.
    """
    names = {*chosen.values, "max_steps", "epochs", "evaluate_every"}
    values = {name: getattr(chosen.config, name) for name in names}
    return replace(run, config=replace(run.config, **values))
