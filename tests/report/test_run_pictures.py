"""maskloss/report/run_pictures.py: what is drawn before training and after each evaluation."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from maskloss.data.augmentation import augmentation
from maskloss.data.coco import CocoData, read_coco
from maskloss.data.dataset import CocoDataset
from maskloss.data.images import read_image
from maskloss.data.shapes import write_shapes
from maskloss.report.run_pictures import RunPictures, draw_distributions, draw_sample
from maskloss.training.loop import train
from tests.training.small_runs import narrow_models, small_config, write_data


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> CocoData:
    folder = tmp_path_factory.mktemp("data")
    write_shapes(folder, 5, size=64, seed=0)
    return read_coco(folder / "images", folder / "annotations.json")


def test_the_first_samples_and_the_distributions_are_written(data: CocoData, tmp_path: Path) -> None:
    dataset = CocoDataset(data, augmentation(horizontal_flip=0.5, photometric_distortion=0.0), copy_paste=0.5)
    RunPictures().before_training(tmp_path, dataset, [(index, index) for index in range(5)])
    with Image.open(tmp_path / "training_images.jpg") as images:
        assert images.size == (4 * 320, 2 * 320)  # four in the first row, and one below
    with Image.open(tmp_path / "training_data.png") as charts:
        assert charts.size[0] > 1000


def test_an_image_that_cannot_be_read_is_left_out(data: CocoData, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    broken = CocoData(data.annotation_file, tmp_path / "images", data.records, data.categories, [])
    RunPictures().before_training(tmp_path, CocoDataset(broken), [(0, 0)])
    assert not (tmp_path / "training_images.jpg").exists()
    assert RunPictures().after_evaluation(broken, []) == {}


def test_a_sample_shows_its_masks_where_they_are(data: CocoData) -> None:
    image, target = CocoDataset(data)[0]
    drawn = np.asarray(draw_sample(image, target, data).resize((64, 64), Image.Resampling.NEAREST), dtype=int)
    plain = (image.permute(1, 2, 0).numpy() * 255).round().astype(int)
    changed = (abs(drawn - plain) > 8).any(axis=2)
    inside = target["masks"].bitmaps().numpy().any(axis=0)
    assert changed[inside].mean() > 0.95
    assert changed[~inside].mean() < 0.35  # boxes and names


def test_the_images_with_most_errors_come_first(data: CocoData) -> None:
    found = RunPictures().after_evaluation(data, [])
    assert found["worst images"].shape == (4, 320, 640, 3)
    last = data.images[-1]
    false = [
        {"image_id": last.id, "category_id": data.categories[0].id, "bbox": [0, 0, 9, 9], "score": 0.9}
    ] * 9
    # Nine detections of nothing make the last image the worst one; its left half is its ground truth.
    others = RunPictures().after_evaluation(data, false)["worst images"]
    pixels = np.asarray(
        read_image(data.image_path(last)).resize((320, 320), Image.Resampling.NEAREST), dtype=int
    )
    differences = [abs(picture[:, :320].astype(int) - pixels).mean() for picture in others]
    assert differences.index(min(differences)) == 0
    # Detections below the threshold are no errors.
    without = RunPictures(score_threshold=0.95).after_evaluation(data, false)["worst images"]
    assert np.array_equal(without, found["worst images"])


def test_distributions_of_a_set_without_objects(tmp_path: Path) -> None:
    write_shapes(tmp_path, 2, size=64, seed=0)
    document = json.loads((tmp_path / "annotations.json").read_text())
    document["annotations"] = []
    (tmp_path / "annotations.json").write_text(json.dumps(document))
    assert draw_distributions(read_coco(tmp_path / "images", tmp_path / "annotations.json"))[:4] == b"\x89PNG"


def test_tensorboard_shows_the_worst_images_of_each_evaluation(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data")
    with narrow_models():
        config = small_config(data, tmp_path / "run", max_steps=2, evaluate_every=1, trackers="tensorboard")
        train(config, pictures=RunPictures())
    assert (tmp_path / "run/training_images.jpg").exists()
    (events,) = (tmp_path / "run/tensorboard").rglob("events.out*")
    log = EventAccumulator(str(events))
    log.Reload()
    pictures = [log.Images(tag) for tag in log.Tags()["images"] if tag.startswith("validation/worst images")]
    assert pictures
    assert [event.step for event in pictures[0]] == [1, 2]


def test_a_run_without_pictures_draws_none(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data")
    with narrow_models():
        train(small_config(data, tmp_path / "run", max_steps=1))
    assert not (tmp_path / "run/training_images.jpg").exists()


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("name", ["$5_$10 bill", "$x$", "猫", "_a"])
def test_any_name_of_a_category_is_drawn(data: CocoData, name: str) -> None:
    categories = tuple(replace(category, name=name) for category in data.categories)
    named = CocoData(data.annotation_file, data.image_folder, data.records, categories, [])
    assert draw_distributions(named).startswith(b"\x89PNG")
