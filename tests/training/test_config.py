"""maskloss/training/config.py: impossible values are refused, and the learning-rate schedules."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from maskloss.errors import InputError
from maskloss.losses.criterion import MaskRCNNLoss
from maskloss.losses.presets import PRESETS
from maskloss.training.config import TrainConfig
from tests.training.small_runs import small_config

NAN, INF = float("nan"), float("inf")


def config(**changes: Any) -> TrainConfig:
    return small_config(Path("data"), Path("out"), **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_steps": 0}, "--max-steps must be at least 1, got 0"),
        ({"batch_size": 0}, "--batch-size must be at least 1, got 0"),
        ({"accumulation_steps": 0}, "--accumulation-steps must be at least 1, got 0"),
        ({"log_every": 0}, "--log-every must be at least 1, got 0"),
        ({"checkpoint_every": -1}, "--checkpoint-every must be at least 1, got -1"),
        ({"warmup_steps": -1}, "--warmup-steps must be at least 0, got -1"),
        ({"evaluate_every": -1}, "--evaluate-every must be at least 0, got -1"),
        ({"workers": -1}, "--workers must be at least 0, got -1"),
        ({"seed": -1}, "--seed must be at least 0, got -1"),
        ({"min_size": [64, 640], "max_size": 512}, "--max-size must be at least --min-size 640, got 512"),
        ({"seed": 2**63}, "--seed must be below 2.63"),
        ({"weight_decay": -0.1}, "--weight-decay must be a finite number >= 0, got -0.1"),
        ({"gradient_clip": INF}, "--gradient-clip must be a finite number >= 0, got inf"),
        ({"momentum": NAN}, "--momentum must be a finite number >= 0, got nan"),
        ({"learning_rate": 0.0}, "--learning-rate must be a finite number > 0, got 0.0"),
        ({"learning_rate": -1.0}, "--learning-rate must be a finite number > 0, got -1.0"),
        ({"learning_rate": NAN}, "--learning-rate must be a finite number > 0, got nan"),
        ({"learning_rate": INF}, "--learning-rate must be a finite number > 0, got inf"),
        ({"horizontal_flip": 1.1}, r"--horizontal-flip must be a probability in \[0, 1\], got 1.1"),
        ({"photometric_distortion": -0.1}, "--photometric-distortion must be a probability"),
        ({"image_mean": [0.5]}, "--image-mean must be three numbers, one per channel"),
        ({"image_std": [0.5, 0.5, 0.0]}, "--image-std must be above 0"),
        ({"min_size": 0}, "--min-size must be at least 1, got 0"),
        ({"min_size": []}, "--min-size must be one number or several"),
        ({"min_size": [64, 0]}, "--min-size must be at least 1"),
        ({"max_size": 0}, "--max-size must be at least 1, got 0"),
    ],
)
def test_an_impossible_value_is_refused_by_its_options_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        config(**changes)


def test_warm_up_rises_linearly_from_a_thousandth() -> None:
    made = config(learning_rate=2.0, warmup_steps=4, max_steps=100, schedule="constant")
    # 2 (0.001 + 0.999 step / 4): at step 2 half of it and at step 4 all.
    assert made.learning_rate_at(1) == pytest.approx(2 * 0.25075)
    assert made.learning_rate_at(2) == pytest.approx(2 * 0.5005)
    assert made.learning_rate_at(4) == pytest.approx(2.0)
    assert made.learning_rate_at(5) == made.learning_rate_at(100) == 2.0


def test_no_warm_up_starts_at_the_highest() -> None:
    assert config(learning_rate=2.0, warmup_steps=0, schedule="constant").learning_rate_at(1) == 2.0


def test_the_step_schedule_divides_by_ten_after_two_thirds_and_eight_ninths() -> None:
    made = config(learning_rate=1.0, warmup_steps=0, max_steps=9, schedule="step")
    # Six of nine steps are two thirds, eight are eight ninths.
    rates = [made.learning_rate_at(step) for step in range(1, 10)]
    assert rates == pytest.approx([1, 1, 1, 1, 1, 1, 0.1, 0.1, 0.01])


def test_the_cosine_schedule_is_half_in_the_middle_and_nearly_nothing_at_the_end() -> None:
    made = config(learning_rate=1.0, warmup_steps=0, max_steps=100, schedule="cosine")
    assert made.learning_rate_at(1) == 1.0
    assert made.learning_rate_at(51) == pytest.approx(0.5)
    # 0.5 (1 + cos(0.99 π)) = 0.5 (1 - 0.99950656)
    assert made.learning_rate_at(100) == pytest.approx(0.00024672, rel=1e-4)


@pytest.mark.parametrize("name", PRESETS)
def test_a_presets_name_makes_the_preset(name: str) -> None:
    made, preset = config(loss=name).make_loss(), MaskRCNNLoss.preset(name)
    assert made.mask_targets == preset.mask_targets
    assert made.weights == preset.weights


def test_an_import_path_is_called_for_the_loss() -> None:
    loss = config(loss="tests.training.small_runs.nan_in_step_3").make_loss()
    assert type(loss.mask).__name__ == "NanMaskLoss"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "focal",
            "--loss 'focal': no such preset; available: torchvision, detectron2, matterport, paper, aligned",
        ),
        (
            "nowhere.to.be_found",
            "--loss 'nowhere.to.be_found': cannot be imported: No module named 'nowhere'",
        ),
        ("tests.training.small_runs.missing", "cannot be imported: .*has no attribute 'missing'"),
        ("tests.training.small_runs.no_loss", "must be or return a MaskRCNNLoss, not a int"),
        ("tests.training.small_runs.WIDTH", "must be or return a MaskRCNNLoss, not a int"),
        (".leading", "--loss '.leading': "),
        ("trailing.", "--loss 'trailing.': "),
    ],
)
def test_an_invalid_loss_is_refused(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        config(loss=name).make_loss()


def test_options_that_change_the_numbers_are_differences() -> None:
    made = config()
    other = {**asdict(made), "learning_rate": 1.0, "loss": "paper", "min_size": [48]}
    assert set(made.differences(other)) == {"learning_rate", "loss", "min_size"}


def test_where_and_how_often_things_are_written_are_no_differences() -> None:
    made = config()
    free = {
        "output": "x",
        "resume": True,
        "device": "cuda",
        "workers": 9,
        "log_every": 9,
        "evaluate_every": 9,
    }
    assert made.differences({**asdict(made), **free, "checkpoint_every": 9}) == []


@pytest.mark.parametrize(("given", "sizes"), [(None, None), (64, (64,)), ([48, 64], (48, 64))])
def test_min_sizes_is_a_tuple(given: Any, sizes: Any) -> None:
    assert config(min_size=given).min_sizes == sizes


@pytest.mark.parametrize(
    "option", ["train_images", "train_annotations", "val_images", "val_annotations", "output"]
)
def test_a_path_may_begin_with_the_home_folder(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert getattr(replace(config(), **{option: "~/data"}), option) == "/home/someone/data"
