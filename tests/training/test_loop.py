"""maskloss/training/loop.py: runs that repeat, resume exactly, and lose nothing where they fail."""

from __future__ import annotations

import errno
import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from maskloss.data.sampler import TrainingBatches
from maskloss.data.shapes import write_shapes
from maskloss.errors import InputError, RunError
from maskloss.files import append_line, copy_file, write_bytes
from maskloss.losses.presets import PRESETS
from maskloss.training import loop
from maskloss.training.averaging import WeightAverage
from maskloss.training.checkpoints import checkpoint_files, load_checkpoint
from maskloss.training.config import TrainConfig
from maskloss.training.evaluation import Evaluation
from maskloss.training.loop import train
from maskloss.training.model_file import load_model
from maskloss.training.trainer import Trainer
from tests.training.conftest import UNINTERRUPTED
from tests.training.small_runs import (
    STATISTICS,
    TERMS,
    assert_same_run,
    files,
    history,
    interrupted_after,
    largest_file,
    lines,
    small_config,
    tensors,
)

#: Above the history, the curves and the config, far below a model.
ONE_MIB = 2**20


# A finished run and its files.


def test_metrics_have_box_and_mask_ap_and_the_losses(finished: Path) -> None:
    metrics = json.loads((finished / "metrics.json").read_text())
    assert set(metrics) == {"bbox", "segm", "boundary", "classes", "loss"}
    assert tuple(metrics["bbox"]) == tuple(metrics["segm"]) == STATISTICS
    assert set(metrics["loss"]) == {"loss", *TERMS}
    assert metrics["loss"]["loss"] == pytest.approx(sum(metrics["loss"][term] for term in TERMS))
    # The shapes are 64 px images: nothing is above 96² px.
    assert metrics["segm"]["APl"] is None
    assert 0 <= metrics["segm"]["AP"] <= 1


def test_the_config_is_enough_to_repeat_the_run(finished: Path, shapes: Path) -> None:
    saved = yaml.safe_load((finished / "config.yaml").read_text())
    assert TrainConfig(**saved) == small_config(shapes, finished, **UNINTERRUPTED)


def test_the_model_describes_itself(finished: Path) -> None:
    description = load_model(finished / "model.safetensors").description
    assert description.settings.name == "resnet18"
    assert description.settings.num_classes == 4
    assert description.settings.min_size == (48, 64)
    assert [c.name for c in description.categories] == ["circle", "rectangle", "triangle"]
    # Torchvision's preset trains targets that are half a pixel off.
    assert description.aligned is False


def test_the_model_is_that_of_the_last_step(finished: Path) -> None:
    checkpoint = load_checkpoint(finished / "checkpoints" / "step-00000006.pt")
    state = tensors(finished)
    assert all(torch.equal(state[key], value) for key, value in checkpoint["model"].items())


def test_checkpoints_are_written_as_often_as_asked_for(finished: Path) -> None:
    names = sorted(path.name for path in (finished / "checkpoints").iterdir())
    assert names == ["step-00000003.pt", "step-00000006.pt"]


def test_no_temporary_file_is_left(finished: Path) -> None:
    assert not [name for name in files(finished) if name.endswith(".tmp")]


def test_training_changes_the_parameters(finished: Path) -> None:
    before = load_checkpoint(finished / "checkpoints" / "step-00000003.pt")["model"]
    after = load_checkpoint(finished / "checkpoints" / "step-00000006.pt")["model"]
    for key in ("backbone.body.conv1.weight", "roi_heads.mask_predictor.mask_fcn_logits.weight"):
        assert not torch.equal(before[key], after[key])


# The same config repeats the same run, interrupted or not.


def test_the_same_seed_gives_the_same_run(finished: Path, shapes: Path, tmp_path: Path) -> None:
    torch.manual_seed(99)
    train(small_config(shapes, tmp_path / "run", **UNINTERRUPTED))
    assert_same_run(tmp_path / "run", finished)


def test_another_seed_gives_another_run(finished: Path, shapes: Path, tmp_path: Path) -> None:
    train(small_config(shapes, tmp_path / "run", **{**UNINTERRUPTED, "seed": 8, "max_steps": 1}))
    assert history(tmp_path / "run")[0]["loss"] != history(finished)[0]["loss"]


def test_an_interrupted_run_resumed_gives_the_uninterrupted_runs_numbers(
    finished: Path, shapes: Path, tmp_path: Path
) -> None:
    # Step 4 was done and logged when it stopped, and the checkpoint is that of step 3.
    with interrupted_after(4):
        train(small_config(shapes, tmp_path / "run", **UNINTERRUPTED))
    assert [line["step"] for line in history(tmp_path / "run")] == [1, 4]
    # The model is that of the checkpoint.
    saved = torch.load(tmp_path / "run/checkpoints/step-00000003.pt")["model"]
    assert all(torch.equal(tensor, saved[name]) for name, tensor in tensors(tmp_path / "run").items())
    assert not (tmp_path / "run" / "best.safetensors").exists()
    train(small_config(shapes, tmp_path / "run", **UNINTERRUPTED, resume=True))
    assert_same_run(tmp_path / "run", finished)


def test_a_run_stopped_before_its_first_checkpoint_starts_at_step_0(
    finished: Path, shapes: Path, tmp_path: Path
) -> None:
    with interrupted_after(2):
        train(small_config(shapes, tmp_path / "run", **UNINTERRUPTED))
    assert not (tmp_path / "run" / "checkpoints").exists()
    train(small_config(shapes, tmp_path / "run", **UNINTERRUPTED, resume=True))
    assert_same_run(tmp_path / "run", finished)


def test_a_run_stopped_in_its_last_evaluation_is_only_evaluated(
    finished: Path, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopping(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate", stopping)
        with pytest.raises(KeyboardInterrupt):
            train(small_config(shapes, tmp_path / "run", **UNINTERRUPTED))
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "take_step", stopping)
        train(small_config(shapes, tmp_path / "run", **UNINTERRUPTED, resume=True))
    assert_same_run(tmp_path / "run", finished)


def test_resuming_a_finished_run_changes_no_number(finished: Path, shapes: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    train(small_config(shapes, tmp_path / "run", **UNINTERRUPTED, resume=True))
    assert_same_run(tmp_path / "run", finished)


def test_evaluations_between_steps_resume_too(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    between = {"max_steps": 3, "evaluate_every": 1, "checkpoint_every": 1, "batch_size": 1}
    train(small_config(shapes, tmp_path / "whole", **between))
    assert [line["step"] for line in lines(tmp_path / "whole/evaluations.jsonl")] == [1, 2, 3]

    def stopping(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    # The checkpoint of step 1 is there, but not its evaluation.
    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate", stopping)
        with pytest.raises(KeyboardInterrupt):
            train(small_config(shapes, tmp_path / "run", **between))
    train(small_config(shapes, tmp_path / "run", **between, resume=True))
    assert_same_run(tmp_path / "run", tmp_path / "whole")


class Measured:
    """An evaluation with the mask APs of a list, one after another."""

    def __init__(self, precisions: list[float | None]) -> None:
        self.precisions = iter(precisions)

    def __call__(self, *_: Any, **__: Any) -> Evaluation:
        values = dict.fromkeys(STATISTICS, None) | {"AP": next(self.precisions)}
        metrics = dict.fromkeys(("bbox", "segm", "boundary"), values)
        return Evaluation({**metrics, "loss": {"loss": 1.0}, "classes": []}, [])


def test_the_best_model_is_that_of_the_best_evaluation(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "evaluate", Measured([0.1, 0.3, 0.3, 0.2]))
    changes = {"max_steps": 4, "evaluate_every": 1, "checkpoint_every": 1}
    models = {}
    real = loop.save_checkpoint

    def saving(folder: Path, step: int, state: dict[str, Any]) -> None:
        models[step] = {name: tensor.clone() for name, tensor in state["model"].items()}
        real(folder, step, state)

    monkeypatch.setattr(loop, "save_checkpoint", saving)
    train(small_config(shapes, tmp_path / "run", **changes))
    best = load_file(tmp_path / "run/best.safetensors")
    assert all(torch.equal(best[name], tensor) for name, tensor in models[2].items())
    assert all(torch.equal(tensor, models[4][name]) for name, tensor in tensors(tmp_path / "run").items())
    # A run's folder stands for its best model.
    loaded = load_model(tmp_path / "run").model.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in models[2].items())


def test_a_resumed_run_remembers_its_best_evaluation(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"max_steps": 3, "evaluate_every": 1, "checkpoint_every": 1, "batch_size": 1}
    monkeypatch.setattr(loop, "evaluate", Measured([0.3]))
    with interrupted_after(1):
        train(small_config(shapes, tmp_path / "run", **changes))
    best = (tmp_path / "run/best.safetensors").read_bytes()
    monkeypatch.setattr(loop, "evaluate", Measured([0.2, 0.1]))
    train(small_config(shapes, tmp_path / "run", **changes, resume=True))
    assert (tmp_path / "run/best.safetensors").read_bytes() == best


@pytest.mark.parametrize("resumed", [False, True])
def test_a_run_ends_after_evaluations_without_a_gain(
    resumed: bool, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"max_steps": 6, "evaluate_every": 1, "checkpoint_every": 10, "batch_size": 1, "stop_after": 2}
    precisions: list[float | None] = [0.1, 0.3, None, 0.3, 0.9, 0.9]
    if resumed:
        monkeypatch.setattr(loop, "evaluate", Measured(precisions[:3]))
        with interrupted_after(3):
            train(small_config(shapes, tmp_path / "run", **{**changes, "checkpoint_every": 1}))
        precisions = precisions[3:]
    monkeypatch.setattr(loop, "evaluate", Measured(precisions))
    result = train(small_config(shapes, tmp_path / "run", **changes, resume=True))
    assert [line["step"] for line in lines(tmp_path / "run/evaluations.jsonl")] == [1, 2, 3, 4]
    assert history(tmp_path / "run")[-1]["step"] == 4
    assert result.evaluation.metrics["segm"]["AP"] == 0.3
    # Resumed with the same option, it only repeats its last evaluation.
    monkeypatch.setattr(loop, "evaluate", Measured([0.3]))
    train(small_config(shapes, tmp_path / "run", **changes, resume=True))
    assert [line["step"] for line in lines(tmp_path / "run/evaluations.jsonl")] == [1, 2, 3, 4]
    # Without it, it goes on.
    monkeypatch.setattr(loop, "evaluate", Measured([0.3, 0.9]))
    train(small_config(shapes, tmp_path / "run", **{**changes, "stop_after": None}, resume=True))
    assert [line["step"] for line in lines(tmp_path / "run/evaluations.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_ctrl_c_finishes_the_step_and_the_resumed_run_is_the_uninterrupted_one(
    finished: Path,
    shapes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    real, steps = Trainer.take_step, []

    def pressed(own: Trainer, learning_rate: float) -> Any:
        steps.append(own.step + 1)
        if steps[-1] == 2:
            signal.raise_signal(signal.SIGINT)
        return real(own, learning_rate)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "take_step", pressed)
        with pytest.raises(KeyboardInterrupt):
            train(small_config(shapes, tmp_path / "run", **UNINTERRUPTED))
    assert steps == [1, 2]
    assert (tmp_path / "run/checkpoints/step-00000002.pt").exists()
    saved = torch.load(tmp_path / "run/checkpoints/step-00000002.pt")["model"]
    assert all(torch.equal(tensor, saved[name]) for name, tensor in tensors(tmp_path / "run").items())
    assert "interrupted after step 2" in caplog.text
    assert "--resume" in caplog.text
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    train(small_config(shapes, tmp_path / "run", **UNINTERRUPTED, resume=True))
    assert_same_run(tmp_path / "run", finished)


def test_ctrl_c_in_an_evaluation_saves_the_step_and_repeats_the_evaluation(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"max_steps": 3, "evaluate_every": 1, "checkpoint_every": 10, "batch_size": 1}
    train(small_config(shapes, tmp_path / "whole", **changes))
    real, calls = loop.evaluate, []

    def pressed(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate", pressed)
        with pytest.raises(KeyboardInterrupt):
            train(small_config(shapes, tmp_path / "run", **changes))
    assert [line["step"] for line in lines(tmp_path / "run/evaluations.jsonl")] == [1]
    train(small_config(shapes, tmp_path / "run", **changes, resume=True))
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_ctrl_c_while_the_average_replaces_the_weights_loses_neither(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"max_steps": 3, "evaluate_every": 1, "checkpoint_every": 10, "batch_size": 1, "ema": 0.5}
    train(small_config(shapes, tmp_path / "whole", **changes))
    real, calls = WeightAverage._swap, []

    def pressed(average: WeightAverage) -> None:
        real(average)
        calls.append(1)
        if len(calls) == 5:  # step 1 swaps twice for its evaluation, and twice to save the best model
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(WeightAverage, "_swap", pressed)
        with pytest.raises(KeyboardInterrupt):
            train(small_config(shapes, tmp_path / "run", **changes))
    assert [line["step"] for line in lines(tmp_path / "run/evaluations.jsonl")] == [1]
    train(small_config(shapes, tmp_path / "run", **changes, resume=True))
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_epochs_are_passes_over_the_training_set(shapes: Path, tmp_path: Path) -> None:
    # Four images in batches of 3 are two steps.
    config = small_config(
        shapes, tmp_path / "run", epochs=3, max_steps=1000, batch_size=3, evaluate_every=None
    )
    train(config)
    assert history(tmp_path / "run")[-1]["step"] == 6
    assert [line["step"] for line in lines(tmp_path / "run/evaluations.jsonl")] == [2, 4, 6]
    train(replace(config, resume=True))
    assert history(tmp_path / "run")[-1]["step"] == 6


def test_evaluating_between_steps_changes_no_step(shapes: Path, tmp_path: Path) -> None:
    for name, often in (("plain", 0), ("often", 1)):
        train(small_config(shapes, tmp_path / name, max_steps=2, batch_size=1, evaluate_every=often))
    assert history(tmp_path / "plain") == history(tmp_path / "often")


def test_an_adamw_run_with_accumulation_resumes_exactly(shapes: Path, tmp_path: Path) -> None:
    changes = {
        "max_steps": 3,
        "checkpoint_every": 2,
        "optimizer": "adamw",
        "learning_rate": 1e-3,
        "schedule": "cosine",
        "accumulation_steps": 2,
        "batch_size": 1,
        "photometric_distortion": 0.5,
    }
    train(small_config(shapes, tmp_path / "whole", **changes))
    # Two batches a step: this stops in the middle of step 3.
    with interrupted_after(5):
        train(small_config(shapes, tmp_path / "run", **changes))
    train(small_config(shapes, tmp_path / "run", **changes, resume=True))
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_the_statistics_of_a_loss_resume_with_it(shapes: Path, tmp_path: Path) -> None:
    seesaw = {"class_path": "maskloss.losses.SeesawLoss", "init_args": {"num_classes": 4}}
    changes: dict[str, Any] = {"max_steps": 4, "checkpoint_every": 2, "loss": {"classification": seesaw}}
    train(small_config(shapes, tmp_path / "whole", **changes))
    with interrupted_after(3):
        train(small_config(shapes, tmp_path / "run", **changes))
    train(small_config(shapes, tmp_path / "run", **changes, resume=True))
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    counts = load_checkpoint(checkpoint_files(tmp_path / "run/checkpoints")[-1])["loss"]
    # 64 RoIs an image, two images a step.
    assert counts["classification.class_counts"].sum() <= 4 * 2 * 64
    assert counts["classification.class_counts"].sum() > 3 * 2 * 16


# What stops a run.


def test_an_unreadable_training_image_is_named_and_the_checkpoint_kept(shapes: Path, tmp_path: Path) -> None:
    shutil.copytree(shapes, tmp_path / "data")
    # Batches of one: the order says in which step each image comes.
    order = [index for batch in TrainingBatches([0] * 4, 1, 4) for index, _ in batch]
    path = tmp_path / "data/train/images" / f"{order[1] + 1:06d}.png"
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(InputError) as caught:
        train(
            small_config(tmp_path / "data", tmp_path / "run", max_steps=4, batch_size=1, checkpoint_every=1)
        )
    assert str(caught.value).startswith(f"{path}: not a readable image")
    assert load_checkpoint(tmp_path / "run/checkpoints/step-00000001.pt")["step"] == 1


def test_a_warmup_longer_than_the_run_is_warned_of(
    shapes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(small_config(shapes, tmp_path / "run", max_steps=1, warmup_steps=2))
    assert "--warmup-steps 2 exceeds the run's 1 steps" in caplog.text


def test_an_output_below_a_file_is_refused(shapes: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="file/run: the folder cannot be created: Not a directory"):
        train(small_config(shapes, tmp_path / "file" / "run"))


# A full disk.


def test_a_disk_that_fills_up_leaves_what_was_written_and_the_run_can_go_on(
    finished: Path, shapes: Path, tmp_path: Path
) -> None:
    with interrupted_after(4):
        train(small_config(shapes, tmp_path / "run", **UNINTERRUPTED))
    checkpoint = (tmp_path / "run/checkpoints/step-00000003.pt").read_bytes()
    config = small_config(shapes, tmp_path / "run", **UNINTERRUPTED, resume=True)
    with largest_file(ONE_MIB), pytest.raises(RunError, match=r"step-00000006\.pt: cannot be written"):
        train(config)
    assert list(files(tmp_path / "run/checkpoints")) == ["step-00000003.pt"]
    assert (tmp_path / "run/checkpoints/step-00000003.pt").read_bytes() == checkpoint
    train(config)
    assert_same_run(tmp_path / "run", finished)


def test_a_full_disk_is_named_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "metrics.json"
    path.write_bytes(b"earlier")
    monkeypatch.setattr("maskloss.files.os.fsync", full)
    with pytest.raises(RunError) as caught:
        write_bytes(path, b"new")
    assert str(caught.value) == f"{path}: cannot be written: No space left on device"
    assert files(tmp_path) == {"metrics.json": b"earlier"}


def test_a_line_that_does_not_fit_is_rolled_back(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    append_line(path, "first")
    with (
        largest_file(100),
        pytest.raises(RunError, match=r"history\.jsonl: cannot be written: File too large"),
    ):
        append_line(path, "x" * 1000)
    assert path.read_bytes() == b"first\n"
    append_line(path, "second")
    assert path.read_bytes() == b"first\nsecond\n"


def test_a_copy_that_does_not_fit_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"x" * 1000)
    with largest_file(100), pytest.raises(RunError, match="copy: cannot be written: File too large"):
        copy_file(tmp_path / "source", tmp_path / "copy")
    assert list(files(tmp_path)) == ["source"]


# Presets.


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_trains_with_finite_terms_under_the_right_keys(
    shapes: Path, tmp_path: Path, preset: str
) -> None:
    train(small_config(shapes, tmp_path / "run", loss=preset, max_steps=2, batch_size=1))
    keys = {*TERMS, "loss_regularization"} if preset == "matterport" else set(TERMS)
    for line in history(tmp_path / "run"):
        assert set(line) == {"step", "loss", "learning_rate", *keys}
        assert all(np.isfinite(line[key]) and line[key] > 0 for key in keys), line
    description = load_model(tmp_path / "run/model.safetensors").description
    assert description.aligned is (preset not in ("torchvision", "matterport"))


# The data loader.


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_the_number_of_workers_changes_no_number(finished: Path, shapes: Path, tmp_path: Path) -> None:
    train(small_config(shapes, tmp_path / "run", **{**UNINTERRUPTED, "workers": 1}))
    assert_same_run(tmp_path / "run", finished)


def test_an_epoch_that_is_smaller_than_a_batch_trains(shapes: Path, tmp_path: Path) -> None:
    write_shapes(tmp_path / "data/train", 1, size=64)
    shutil.copytree(shapes / "val", tmp_path / "data/val")
    train(small_config(tmp_path / "data", tmp_path / "run", max_steps=1, batch_size=2))
    assert [line["step"] for line in history(tmp_path / "run")] == [1]


def test_validation_without_losses_has_the_same_ap(shapes: Path, tmp_path: Path) -> None:
    metrics = []
    for val_losses in (True, False):
        output = tmp_path / str(val_losses)
        train(small_config(shapes, output, val_losses=val_losses, evaluate_every=1))
        metrics.append(json.loads((output / "metrics.json").read_text()))
    with_losses, without = metrics
    assert without.pop("loss") is None
    assert with_losses.pop("loss")["loss"] > 0
    assert without == with_losses
