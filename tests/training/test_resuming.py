"""maskloss/training/resuming.py: where a run starts, and what its folder and checkpoint must agree with."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from maskloss.data.coco import CocoData, read_coco
from maskloss.errors import InputError
from maskloss.training.checkpoints import checkpoint_files, load_checkpoint, save_checkpoint
from maskloss.training.config import TrainConfig
from maskloss.training.loop import train
from maskloss.training.resuming import check_output, fingerprint, starting_point
from tests.training.conftest import UNINTERRUPTED
from tests.training.small_runs import (
    files,
    history,
    small_config,
)


def test_a_folder_that_holds_a_run_is_refused_without_resume_and_left_as_it_was(
    finished: Path, shapes: Path
) -> None:
    before = files(finished)
    with pytest.raises(InputError, match=r"run: already holds a run \(config.yaml, .*\); give --resume"):
        train(small_config(shapes, finished, **UNINTERRUPTED))
    assert files(finished) == before


def test_an_output_that_is_a_file_is_refused(shapes: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="file: is a file, not a folder"):
        train(small_config(shapes, tmp_path / "file"))


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


# The folder.

RUN_FILES = ["config.yaml", "history.jsonl", "model.safetensors", "metrics.json", "checkpoints"]


def config(folder: Path, **changes: Any) -> TrainConfig:
    return small_config(folder / "data", folder / "run", **changes)


@pytest.mark.parametrize("name", RUN_FILES)
def test_each_file_of_a_run_makes_its_folder_one_that_holds_a_run(tmp_path: Path, name: str) -> None:
    (tmp_path / "run").mkdir()
    check_output(config(tmp_path))
    (tmp_path / "run/notes.txt").write_text("mine")
    check_output(config(tmp_path))
    (tmp_path / "run" / name).write_text("x")
    with pytest.raises(InputError) as caught:
        check_output(config(tmp_path))
    assert str(caught.value) == (
        f"{tmp_path}/run: already holds a run ({name}); give --resume or another --output"
    )
    check_output(config(tmp_path, resume=True))


def test_a_run_that_failed_in_its_first_step_may_be_started_again(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for name in ("config.yaml", "history.jsonl"):
        (tmp_path / "run" / name).touch()
    check_output(config(tmp_path))
    (tmp_path / "run/history.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match=r"already holds a run \(config\.yaml, history\.jsonl\)"):
        check_output(config(tmp_path))


# The checkpoint.

IDENTITY = {"categories": [[1, "a"]], "data": {"training": "t", "validation": "v"}, "world_size": 1}


def save(started: TrainConfig, identity: dict[str, Any] = IDENTITY) -> None:
    """Save the checkpoint of step 3 of a run."""
    state = {"seconds": 1.0, "config": json.dumps(asdict(started)), "model": {}, "optimizer": {}, **identity}
    save_checkpoint(started.output_folder / "checkpoints", 3, state)


def test_a_run_without_a_checkpoint_starts_at_step_0(tmp_path: Path) -> None:
    assert starting_point(config(tmp_path), IDENTITY) is None
    assert starting_point(config(tmp_path, resume=True), IDENTITY) is None


def test_a_run_starts_at_its_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(config(tmp_path, max_steps=4))
    found = starting_point(config(tmp_path, max_steps=4, resume=True), IDENTITY)
    assert found is not None
    assert found["step"] == 3
    assert caplog.messages == []


def test_everything_that_differs_from_the_checkpoint_is_named(tmp_path: Path) -> None:
    save(config(tmp_path))
    now = {**IDENTITY, "data": {"training": "x", "validation": "y"}, "world_size": 2}
    with pytest.raises(InputError) as caught:
        starting_point(config(tmp_path, max_steps=4, batch_size=1, resume=True), now)
    assert str(caught.value) == (
        f"{tmp_path}/run/checkpoints/step-00000003.pt: the run was started with another batch_size, "
        "training set (--train-annotations has other content, or the image files have other sizes), "
        "validation set (--val-annotations has other content, or the image files have other sizes), "
        "number of processes (1, now 2); resume with the same command"
    )


@pytest.mark.parametrize(("schedule", "warned"), [("step", True), ("cosine", True), ("constant", False)])
def test_another_number_of_steps_is_warned_of_where_it_changes_the_learning_rate(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, schedule: str, warned: bool
) -> None:
    save(config(tmp_path, max_steps=4, schedule=schedule))
    starting_point(config(tmp_path, max_steps=9, schedule=schedule, resume=True), IDENTITY)
    assert caplog.messages == warned * [
        "the run was started with --max-steps 4; from here on, the learning rate is scheduled for 9 steps"
    ]


def test_checkpoints_of_earlier_versions_are_compared_by_the_paths_of_their_data(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(config(tmp_path), {})
    assert starting_point(config(tmp_path, max_steps=4, resume=True), IDENTITY) is not None
    assert any("does not record the content of its data" in message for message in caplog.messages)
    with pytest.raises(InputError, match="started with another val_images; resume with the same command"):
        starting_point(config(tmp_path, max_steps=4, resume=True, val_images="elsewhere"), IDENTITY)


# The data.


def data_in(folder: Path) -> CocoData:
    return read_coco(folder / "images", folder / "annotations.json")


def test_a_fingerprint_changes_with_the_annotations_and_the_sizes_of_the_images_alone(
    shapes: Path, tmp_path: Path
) -> None:
    expected = fingerprint(data_in(shapes / "val"))
    shutil.copytree(shapes / "val", tmp_path / "copy")
    data = data_in(tmp_path / "copy")
    assert fingerprint(data) == expected
    image, annotations = data.image_path(data.images[1]), data.annotation_file
    content = image.read_bytes()
    image.write_bytes(bytes(len(content)))
    assert fingerprint(data) == expected
    image.write_bytes(content + b"\0")
    longer = fingerprint(data)
    image.unlink()
    missing = fingerprint(data)
    image.write_bytes(content)
    annotations.write_text(annotations.read_text() + "\n")
    assert len({expected, longer, missing, fingerprint(data)}) == 4
