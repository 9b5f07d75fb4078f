"""maskloss/training/learning_rate.py: the rate rises, the suggestion is below where the loss rises, nothing is kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from maskloss import cli
from maskloss.errors import InputError, RunError
from maskloss.training.learning_rate import LearningRateSearch, find_learning_rate
from maskloss.training.trainer import Trainer
from tests.training.small_runs import small_config


def test_the_suggestion_is_a_tenth_of_the_rate_with_the_lowest_average() -> None:
    search = LearningRateSearch([1e-4, 1e-3, 1e-2, 1e-1], [4, 2, 1, 9], [4.0, 3.0, 2.0, 5.0])
    assert search.suggestion == pytest.approx(1e-3)


def test_rates_rise_by_the_same_factor_and_the_search_ends_when_the_loss_rises(
    shapes: Path, tmp_path: Path
) -> None:
    config = small_config(shapes, tmp_path / "run", optimizer="sgd", gradient_clip=0.0)
    search = find_learning_rate(config, steps=12, lowest=1e-5, highest=1e6)
    ratios = [after / before for before, after in zip(search.rates, search.rates[1:], strict=False)]
    assert ratios == pytest.approx([1e11 ** (1 / 11)] * len(ratios))
    assert 3 <= len(search.rates) < 12
    assert len(search.losses) == len(search.smoothed) == len(search.rates)
    assert search.suggestion < 0.1
    assert not (tmp_path / "run").exists()


def test_the_first_average_is_the_first_loss(shapes: Path, tmp_path: Path) -> None:
    search = find_learning_rate(small_config(shapes, tmp_path / "run"), steps=10, lowest=1e-9, highest=1e-8)
    assert search.smoothed[0] == pytest.approx(search.losses[0])
    # .9 and .1 of the losses, divided by 1 - .81.
    expected = (0.9 * 0.1 * search.losses[0] + 0.1 * search.losses[1]) / 0.19
    assert search.smoothed[1] == pytest.approx(expected)
    assert len(search.rates) == 10


def test_a_dead_worker_is_no_rate_that_is_too_high(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

    monkeypatch.setattr(Trainer, "take_step", killed)
    with pytest.raises(RunError, match="a data-loader worker died"):
        find_learning_rate(small_config(shapes, tmp_path / "run"), steps=10)


@pytest.mark.parametrize("arguments", [{"steps": 9}, {"lowest": 0.0}, {"lowest": 1.0, "highest": 0.1}])
def test_wrong_settings_are_refused(arguments: dict[str, float], shapes: Path, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match="--steps must be at least 10, and --lowest above 0 and below --highest"
    ):
        find_learning_rate(small_config(shapes, tmp_path / "run"), **arguments)  # type: ignore[arg-type]


def test_the_command_prints_the_suggestion_and_writes_a_picture(
    shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [
        *("--train-images", str(shapes / "train/images"), "--val-images", str(shapes / "val/images")),
        *("--train-annotations", str(shapes / "train/annotations.json")),
        *("--val-annotations", str(shapes / "val/annotations.json")),
        *("--model", "resnet18", "--min-size", "64", "--max-size", "64", "--workers", "0", "--device", "cpu"),
        *("--output", str(tmp_path / "run"), "--steps", "10", "--highest", "1e-3"),
    ]
    cli.main(["find-lr", *options])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("suggestion")]
    assert line.startswith("suggestion: --learning-rate ")
    assert (tmp_path / "run/learning_rate.svg").read_text().startswith("<svg")
    # The folder is free for the run itself.
    cli.main(["train", *options[:-4], "--max-steps", "1"])
