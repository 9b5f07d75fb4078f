"""maskloss/training/loop.py: runs that repeat, resume exactly, and lose nothing where they fail."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision
import yaml

from maskloss.data.sampler import TrainingBatches
from maskloss.data.shapes import write_shapes
from maskloss.errors import InputError, RunError
from maskloss.files import append_line, copy_file, write_bytes
from maskloss.losses.criterion import MaskRCNNLoss
from maskloss.losses.presets import PRESETS
from maskloss.training import loop, setup
from maskloss.training.checkpoints import checkpoint_files, load_checkpoint
from maskloss.training.config import TrainConfig
from maskloss.training.loop import train
from maskloss.training.model_file import load_model
from maskloss.training.setup import chosen_device, make_accelerator
from tests.training.conftest import UNINTERRUPTED
from tests.training.small_runs import (
    STATISTICS,
    TERMS,
    files,
    history,
    interrupted_after,
    largest_file,
    lines,
    small_config,
)

#: Above the history, the curves and the config, far below a model.
ONE_MIB = 2**20


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "model.safetensors")


def assert_same_run(first: Path, second: Path) -> None:
    """The same history, `seconds` aside, the same evaluations, and every bit of the model the same."""
    assert history(first) == history(second)
    assert lines(first / "evaluations.jsonl") == lines(second / "evaluations.jsonl")
    assert json.loads((first / "metrics.json").read_text()) == json.loads(
        (second / "metrics.json").read_text()
    )
    mine, other = tensors(first), tensors(second)
    assert list(mine) == list(other)
    assert [key for key in mine if not torch.equal(mine[key], other[key])] == []


# A finished run and its files.


def test_the_history_has_every_logged_step_and_the_first_and_the_last(finished: Path) -> None:
    assert [line["step"] for line in history(finished)] == [1, 4, 6]


def test_a_line_of_the_history_has_the_terms_their_sum_the_learning_rate_and_the_seconds(
    finished: Path, shapes: Path
) -> None:
    config = small_config(shapes, finished, **UNINTERRUPTED)
    for line in lines(finished / "history.jsonl"):
        assert set(line) == {"step", "loss", *TERMS, "learning_rate", "seconds"}
        assert line["loss"] == pytest.approx(sum(line[term] for term in TERMS))
        assert all(np.isfinite(line[term]) and line[term] > 0 for term in TERMS)
        assert line["learning_rate"] == config.learning_rate_at(line["step"])


def test_seconds_rise(finished: Path) -> None:
    seconds = [line["seconds"] for line in lines(finished / "history.jsonl")]
    assert 0 < seconds[0] < seconds[1] < seconds[2]


def test_metrics_have_box_and_mask_ap_and_the_losses(finished: Path) -> None:
    metrics = json.loads((finished / "metrics.json").read_text())
    assert set(metrics) == {"bbox", "segm", "boundary", "loss"}
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


# Invariants 6 and 7.


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
    assert not (tmp_path / "run" / "model.safetensors").exists()
    train(small_config(shapes, tmp_path / "run", **UNINTERRUPTED, resume=True))
    assert_same_run(tmp_path / "run", finished)


def test_a_run_stopped_before_its_first_checkpoint_starts_anew(
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
        patch.setattr(loop, "_step", stopping)
        train(small_config(shapes, tmp_path / "run", **UNINTERRUPTED, resume=True))
    assert_same_run(tmp_path / "run", finished)


def test_resuming_a_finished_run_changes_no_number(finished: Path, shapes: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    train(small_config(shapes, tmp_path / "run", **UNINTERRUPTED, resume=True))
    assert_same_run(tmp_path / "run", finished)


def test_a_half_line_at_the_end_of_the_history_is_dropped_on_resume(
    finished: Path, shapes: Path, tmp_path: Path
) -> None:
    # What a machine that lost its power may leave.
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run/checkpoints/step-00000006.pt").unlink()
    content = (tmp_path / "run/history.jsonl").read_bytes()
    (tmp_path / "run/history.jsonl").write_bytes(content[:-30])
    train(small_config(shapes, tmp_path / "run", **UNINTERRUPTED, resume=True))
    assert_same_run(tmp_path / "run", finished)


def test_evaluations_between_repeat_and_resume_too(
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


def test_what_a_loss_has_gathered_resumes_with_it(shapes: Path, tmp_path: Path) -> None:
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


# Accumulation.


def test_accumulation_sees_the_images_of_all_its_passes_and_steps_once(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[int]] = []
    stepped: list[int] = []

    def watched(loader: Any, device: torch.device) -> Any:
        for images, targets in loop_batches_on(loader, device):
            seen.append([target["image_id"] for target in targets])
            yield images, targets

    class WatchedSGD(torch.optim.SGD):
        def step(self, *args: Any, **kwargs: Any) -> Any:
            stepped.append(len(seen))
            return super().step(*args, **kwargs)

    loop_batches_on = loop.batches_on
    monkeypatch.setattr(loop, "batches_on", watched)
    monkeypatch.setattr(torch.optim, "SGD", WatchedSGD)
    train(small_config(shapes, tmp_path / "run", max_steps=2, batch_size=1, accumulation_steps=2, seed=4))
    expected = [[index + 1 for index, _ in batch] for batch in TrainingBatches([0] * 4, 1, 4, seed=4)]
    assert seen == expected
    assert stepped == [2, 4]
    assert [line["step"] for line in history(tmp_path / "run")] == [1, 2]


def test_the_logged_loss_of_an_accumulated_step_is_the_mean_of_its_passes(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    totals: list[float] = []

    class Watched(setup.Accelerator):
        def backward(self, loss: torch.Tensor, **kwargs: Any) -> None:
            totals.append(float(loss.detach()))
            super().backward(loss, **kwargs)

    monkeypatch.setattr(setup, "Accelerator", Watched)
    train(small_config(shapes, tmp_path / "run", max_steps=1, batch_size=1, accumulation_steps=3))
    assert len(totals) == 3
    assert history(tmp_path / "run")[0]["loss"] == pytest.approx(sum(totals) / 3, rel=1e-5)


# What stops a run.


def test_a_loss_that_is_not_finite_stops_and_names_the_term_the_step_and_the_images(
    shapes: Path, tmp_path: Path
) -> None:
    config = small_config(
        shapes,
        tmp_path / "run",
        loss="tests.training.small_runs.nan_in_step_3",
        max_steps=5,
        checkpoint_every=2,
        seed=3,
    )
    with pytest.raises(RunError) as caught:
        train(config)
    images = ", ".join(str(index + 1) for index, _ in list(TrainingBatches([0] * 4, 2, 5, seed=3))[2])
    text = str(caught.value)
    assert text.startswith(f"step 3: loss_mask = nan is not finite, on images {images}; ")
    assert "\n" not in text
    assert load_checkpoint(tmp_path / "run/checkpoints/step-00000002.pt")["step"] == 2
    assert [line["step"] for line in history(tmp_path / "run")] == [1, 2]
    assert not (tmp_path / "run/model.safetensors").exists()


def test_a_gradient_that_is_not_finite_stops_before_it_spoils_a_checkpoint(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Overflowing(setup.Accelerator):
        def backward(self, loss: torch.Tensor, **kwargs: Any) -> None:
            # The loss is finite and its gradient is not, as where float32 overflows on the way back.
            super().backward(loss * float("inf") if loss.requires_grad else loss, **kwargs)

    monkeypatch.setattr(setup, "Accelerator", Overflowing)
    config = small_config(shapes, tmp_path / "run", max_steps=2, batch_size=1, checkpoint_every=1)
    with pytest.raises(RunError, match="step 1"):
        train(config)
    for path in (tmp_path / "run" / "checkpoints").glob("*.pt"):
        model = load_checkpoint(path)["model"]
        assert all(torch.isfinite(value).all() for value in model.values()), path.name


def test_a_last_step_that_diverges_stops_instead_of_writing_nan_metrics(shapes: Path, tmp_path: Path) -> None:
    # The loss of the only step is finite; the weights after it are far beyond what float32 can carry through.
    config = small_config(
        shapes, tmp_path / "run", max_steps=1, learning_rate=1e12, warmup_steps=0, gradient_clip=0.0
    )
    with pytest.raises(RunError, match="not finite"):
        train(config)
    assert not (tmp_path / "run/metrics.json").exists()


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


def test_a_set_without_a_usable_object_is_refused_before_anything_is_written(
    shapes: Path, tmp_path: Path
) -> None:
    shutil.copytree(shapes, tmp_path / "data")
    path = tmp_path / "data/train/annotations.json"
    document = json.loads(path.read_text())
    document["annotations"] = []
    path.write_text(json.dumps(document))
    with pytest.raises(InputError, match=r"annotations\.json: there is no usable object in it"):
        train(small_config(tmp_path / "data", tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_folder_that_holds_a_run_is_refused_without_resume_and_left_as_it_was(
    finished: Path, shapes: Path
) -> None:
    before = files(finished)
    with pytest.raises(InputError, match=r"run: already holds a run \(config.yaml, .*\); give --resume"):
        train(small_config(shapes, finished, **UNINTERRUPTED))
    assert files(finished) == before


def test_resuming_with_other_options_is_refused_and_names_them(finished: Path, shapes: Path) -> None:
    before = files(finished)
    changes = {**UNINTERRUPTED, "batch_size": 1, "loss": "paper"}
    with pytest.raises(InputError, match="was started with another loss, batch_size; resume with the same"):
        train(small_config(shapes, finished, **changes, resume=True))
    assert files(finished) == before


def test_resuming_with_fewer_steps_than_are_done_is_refused(finished: Path, shapes: Path) -> None:
    with pytest.raises(InputError, match=r"step-00000006\.pt: is past --max-steps 5"):
        train(small_config(shapes, finished, **{**UNINTERRUPTED, "max_steps": 5}, resume=True))


def test_a_truncated_checkpoint_is_passed_over_where_there_is_an_older_one(
    finished: Path, shapes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    older, newest = checkpoint_files(tmp_path / "run/checkpoints")
    newest.write_bytes(newest.read_bytes()[:5000])
    train(small_config(shapes, tmp_path / "run", **UNINTERRUPTED, resume=True))
    assert f"{newest}: truncated" in (shown := caplog.text)
    assert f"resuming from {older.name} instead" in shown
    assert (tmp_path / "run/metrics.json").read_bytes() == (finished / "metrics.json").read_bytes()


def test_truncated_checkpoints_alone_are_named_on_resume(
    finished: Path, shapes: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    older, newest = checkpoint_files(tmp_path / "run/checkpoints")
    for path in (older, newest):
        path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(InputError, match=rf"{older.name}: truncated"):
        train(small_config(shapes, tmp_path / "run", **UNINTERRUPTED, resume=True))


def test_a_run_does_not_go_on_with_other_categories(finished: Path, shapes: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    shutil.copytree(shapes, tmp_path / "data")
    for name in ("train", "val"):
        path = tmp_path / "data" / name / "annotations.json"
        document = json.loads(path.read_text())
        first, second, *_ = document["categories"]
        first["name"], second["name"] = second["name"], first["name"]
        path.write_text(json.dumps(document))
    config = small_config(shapes, tmp_path / "run", **UNINTERRUPTED, resume=True)
    # The same paths, of another file by now.
    kept = shapes.rename(tmp_path / "kept")
    (tmp_path / "data").rename(shapes)
    try:
        with pytest.raises(InputError, match="started with another set of categories in --train-annotations"):
            train(config)
    finally:
        shutil.rmtree(shapes)
        kept.rename(shapes)


def test_a_warmup_longer_than_the_run_is_warned_of(
    shapes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(small_config(shapes, tmp_path / "run", max_steps=1, warmup_steps=2))
    assert "--warmup-steps 2 exceeds --max-steps 1" in caplog.text


def test_a_checkpoint_of_another_model_is_named_on_resume(
    finished: Path, shapes: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    path = tmp_path / "run/checkpoints/step-00000006.pt"
    state = torch.load(path, weights_only=True)
    del state["model"]["backbone.body.conv1.weight"]
    torch.save(state, path)
    with pytest.raises(InputError, match="the checkpoint belongs to another model") as caught:
        train(small_config(shapes, tmp_path / "run", **UNINTERRUPTED, resume=True))
    assert "\n" not in str(caught.value)


def test_an_output_below_a_file_is_refused(shapes: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="file/run: the folder cannot be created: Not a directory"):
        train(small_config(shapes, tmp_path / "file" / "run"))


def test_an_output_that_is_a_file_is_refused(shapes: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="file: is a file, not a folder"):
        train(small_config(shapes, tmp_path / "file"))


def test_cuda_without_a_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="--device cuda: torch finds no CUDA device"):
        chosen_device("cuda")
    assert chosen_device("auto") == chosen_device("cpu") == torch.device("cpu")


def test_fp16_on_a_cpu_is_refused(shapes: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--mixed-precision fp16 needs a GPU"):
        train(small_config(shapes, tmp_path / "run", mixed_precision="fp16"))
    assert not (tmp_path / "run").exists()


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


def test_bfloat16_starts_from_the_losses_of_float32(shapes: Path, tmp_path: Path) -> None:
    for precision in ("no", "bf16"):
        train(small_config(shapes, tmp_path / precision, mixed_precision=precision, max_steps=1))
    exact, rounded = history(tmp_path / "no")[0], history(tmp_path / "bf16")[0]
    for term in TERMS:
        assert rounded[term] == pytest.approx(exact[term], rel=0.1, abs=0.02)


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


# Weights.

#: So low that a step leaves every weight where it was.
STANDING = {"learning_rate": 1e-12, "weight_decay": 0.0, "max_steps": 1, "batch_size": 1}


def test_the_weights_of_a_whole_model_are_loaded(
    finished: Path, shapes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "maskloss")
    path = finished / "model.safetensors"
    train(small_config(shapes, tmp_path / "run", weights=str(path), **STANDING))
    said = caplog.messages[0]
    expected = tensors(finished)
    assert said.startswith(f"{path}: loaded {len(expected)} tensors; 0 of the model keep random values; 0 of")
    state = tensors(tmp_path / "run")
    for key in expected:
        if "running" not in key and "num_batches" not in key:
            torch.testing.assert_close(state[key], expected[key], rtol=1e-6, atol=1e-7)


def test_the_weights_of_a_backbone_are_loaded_and_its_norms_frozen(
    shapes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "maskloss")
    torch.manual_seed(5)
    backbone = torchvision.models.resnet18(weights=None).state_dict()
    backbone["bn1.running_mean"] += 0.5
    torch.save(backbone, tmp_path / "resnet18.pt")
    train(small_config(shapes, tmp_path / "run", weights=str(tmp_path / "resnet18.pt"), **STANDING))
    said = caplog.messages[0]
    # 20 convolutions, and four tensors of each of the 20 norms.
    assert said.startswith(f"{tmp_path / 'resnet18.pt'}: loaded 100 tensors; ")
    assert "rpn.head" in said or "backbone.fpn" in said
    assert "2 of the file are not used (fc)" in said
    state = tensors(tmp_path / "run")
    for key, value in backbone.items():
        if not key.startswith("fc.") and "num_batches" not in key:
            torch.testing.assert_close(state[f"backbone.body.{key}"], value, rtol=1e-6, atol=1e-7)
    description = load_model(tmp_path / "run/model.safetensors").description
    assert description.settings.frozen_normalization is True


def test_mean_std_and_norms_come_from_the_weights_metadata(shapes: Path, tmp_path: Path) -> None:
    state = {k: v.clone() for k, v in torchvision.models.resnet18(weights=None).state_dict().items()}
    metadata = {
        "image_mean": "[0.5, 0.4, 0.3]",
        "image_std": "[0.2, 0.2, 0.2]",
        "frozen_normalization": "false",
    }
    safetensors.torch.save_file(state, tmp_path / "w.safetensors", metadata=metadata)
    config = small_config(
        shapes,
        tmp_path / "run",
        weights=str(tmp_path / "w.safetensors"),
        # What the config says comes first.
        image_std=[0.25, 0.25, 0.25],
        **STANDING,
    )
    train(config)
    description = load_model(tmp_path / "run/model.safetensors").description
    assert description.settings.image_mean == (0.5, 0.4, 0.3)
    assert description.settings.image_std == (0.25, 0.25, 0.25)
    assert description.settings.frozen_normalization is False


@pytest.mark.slow
def test_the_shared_mobilenet_weights_are_loaded(
    shared: Path, shapes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "maskloss")
    path = shared / "weights" / "mobilenet_v2_imagenet.safetensors"
    half = [0.5, 0.5, 0.5]
    train(
        small_config(
            shapes,
            tmp_path / "run",
            model="mobilenet_v2",
            weights=str(path),
            image_mean=half,
            image_std=half,
            **STANDING,
        )
    )
    said = caplog.messages[0]
    # 52 convolutions and four tensors of each norm; the classifier has no place.
    assert said.startswith(f"{path}: loaded 260 tensors; ")
    assert "2 of the file are not used (classifier.1)" in said
    expected = safetensors.torch.load_file(path)
    state = tensors(tmp_path / "run")
    for key, value in expected.items():
        if key.startswith("features.") and "num_batches" not in key:
            name = f"backbone.body.{key.removeprefix('features.')}"
            torch.testing.assert_close(state[name], value.float(), rtol=1e-6, atol=1e-7)
    description = load_model(tmp_path / "run/model.safetensors").description
    assert description.settings.image_mean == (0.5, 0.5, 0.5)
    assert description.settings.frozen_normalization is True


def test_weights_of_which_nothing_fits_are_refused(shapes: Path, tmp_path: Path) -> None:
    torch.save({"encoder.weight": torch.ones(3)}, tmp_path / "other.pt")
    with pytest.raises(InputError, match=r"other\.pt: "):
        train(small_config(shapes, tmp_path / "run", weights=str(tmp_path / "other.pt"), max_steps=1))


def test_missing_weights_are_refused(shapes: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.pt: cannot be read"):
        train(small_config(shapes, tmp_path / "run", weights=str(tmp_path / "nowhere.pt")))


def test_validation_categories_that_training_has_not_are_refused(shapes: Path, tmp_path: Path) -> None:
    shutil.copytree(shapes, tmp_path / "data")
    path = tmp_path / "data/val/annotations.json"
    document = json.loads(path.read_text())
    document["categories"].append({"id": 9, "name": "hexagon"})
    path.write_text(json.dumps(document))
    with pytest.raises(InputError, match=r"val/annotations\.json: category 9: 'hexagon' is not among"):
        train(small_config(tmp_path / "data", tmp_path / "run"))
    assert not (tmp_path / "run").exists()


# Loaders.


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_the_number_of_workers_changes_no_number(finished: Path, shapes: Path, tmp_path: Path) -> None:
    train(small_config(shapes, tmp_path / "run", **{**UNINTERRUPTED, "workers": 1}))
    assert_same_run(tmp_path / "run", finished)


def test_an_epoch_that_is_smaller_than_a_batch_trains(shapes: Path, tmp_path: Path) -> None:
    write_shapes(tmp_path / "data/train", 1, size=64)
    shutil.copytree(shapes / "val", tmp_path / "data/val")
    train(small_config(tmp_path / "data", tmp_path / "run", max_steps=1, batch_size=2))
    assert [line["step"] for line in history(tmp_path / "run")] == [1]


# What is checked before the folder is begun, and what a resumption is checked against


def test_a_run_goes_on_with_its_data_in_another_folder(shapes: Path, tmp_path: Path) -> None:
    config = small_config(shapes, tmp_path / "run", max_steps=2, checkpoint_every=1)
    train(config)
    shutil.copytree(shapes, tmp_path / "moved")
    moved = small_config(tmp_path / "moved/../moved", tmp_path / "run", max_steps=3, resume=True)
    train(moved)
    assert [line["step"] for line in history(tmp_path / "run")] == [1, 2, 3]


@pytest.mark.parametrize(
    ("part", "file", "message"),
    [
        ("train", "annotations.json", "another training set"),
        ("val", "annotations.json", "another validation set"),
        ("train", "images/000001.png", "another training set"),
    ],
)
def test_a_run_does_not_go_on_with_other_data_under_the_same_name(
    finished: Path, shapes: Path, tmp_path: Path, part: str, file: str, message: str
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    shutil.copytree(shapes, tmp_path / "data")
    path = tmp_path / "data" / part / file
    path.write_bytes(path.read_bytes() + b"\n")  # JSON and PNG readers alike pass over it
    before = files(tmp_path / "run")
    with pytest.raises(InputError, match=message):
        train(small_config(tmp_path / "data", tmp_path / "run", **UNINTERRUPTED, resume=True))
    assert files(tmp_path / "run") == before


def test_a_run_does_not_go_on_with_another_number_of_processes(
    finished: Path, shapes: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    path = checkpoint_files(tmp_path / "run/checkpoints")[-1]
    checkpoint = load_checkpoint(path)
    assert checkpoint["world_size"] == 1
    torch.save({**checkpoint, "world_size": 2}, path)
    with pytest.raises(InputError, match=r"another number of processes \(2, now 1\)"):
        train(small_config(shapes, tmp_path / "run", **UNINTERRUPTED, resume=True))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "5"),
        ("ACCELERATE_MIXED_PRECISION", "bf16"),
        ("ACCELERATE_USE_CPU", "true"),
        ("ACCELERATE_TORCH_DEVICE", "meta"),
        ("ACCELERATE_DYNAMO_BACKEND", "EAGER"),
    ],
)
def test_the_config_wins_over_the_environment(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    config = small_config(shapes, tmp_path / "run", accumulation_steps=2)
    monkeypatch.setenv(name, value)
    made = make_accelerator(config, torch.device("cpu"), [])
    assert made.gradient_accumulation_steps == 2
    assert made.mixed_precision == "no"
    assert made.device == torch.device("cpu")
    assert str(made.state.dynamo_plugin.backend.value) == "NO"
    assert os.environ[name] == value


@pytest.mark.parametrize("engine", ["DEEPSPEED", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG"])
def test_engines_of_the_environment_are_refused_by_name(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    with pytest.raises(InputError, match=f"ACCELERATE_USE_{engine} asks for an engine"):
        train(small_config(shapes, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("(l - t).abs().mean()", "must return one value per positive"),
        ("(l.detach() - t).abs()", "loss_mask of random RoIs has no gradient"),
    ],
)
def test_a_bad_term_is_refused_before_the_folder_is_begun_and_the_mended_one_trains(
    shapes: Path, tmp_path: Path, body: str, message: str
) -> None:
    term = eval(f"lambda l, t: {body}")
    config = small_config(shapes, tmp_path / "run", max_steps=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(config), "make_loss", lambda _: MaskRCNNLoss(mask=term))
        with pytest.raises(InputError, match=message):
            train(config)
    assert not (tmp_path / "run").exists()
    train(config)


def fails_in_training(mask_logits: torch.Tensor, mask_targets: torch.Tensor) -> torch.Tensor:
    if mask_logits.shape[-1] > 7:  # the probe's masks have 7 x 7
        raise KeyError("no such thing")
    return (mask_logits - mask_targets).abs()


def test_what_a_term_raises_in_a_step_names_it_and_the_line_and_the_run_can_be_begun_again(
    shapes: Path, tmp_path: Path
) -> None:
    config = small_config(shapes, tmp_path / "run", max_steps=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(config), "make_loss", lambda _: MaskRCNNLoss(mask=fails_in_training))
        with pytest.raises(RunError) as caught:
            train(config)
    line = fails_in_training.__code__.co_firstlineno + 2
    assert str(caught.value) == (
        f"step 1: the mask term fails: KeyError: 'no such thing' ({__file__}:{line})"
    )
    train(config)
    assert [line["step"] for line in history(tmp_path / "run")] == [1]


def test_far_too_many_workers_are_refused(shapes: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--workers 5000 is far more than this machine's"):
        train(small_config(shapes, tmp_path / "run", workers=5000))
