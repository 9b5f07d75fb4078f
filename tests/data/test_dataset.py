"""maskloss/data/dataset.py: targets, augmentation, and errors from worker processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import functional

from maskloss.data.augmentation import augmentation
from maskloss.data.coco import CocoData, read_coco
from maskloss.data.dataset import CocoDataset, collate
from maskloss.data.images import read_image
from maskloss.errors import InputError
from maskloss.masks.encoded import EncodedMasks
from tests.data.coco_files import HEIGHT, WIDTH, write_coco


@pytest.fixture
def data(tmp_path: Path) -> CocoData:
    return read_coco(*write_coco(tmp_path))


def test_a_target_has_boxes_labels_encoded_masks_and_the_images_id(data: CocoData) -> None:
    _, target = CocoDataset(data)[0]
    assert target["boxes"].tolist() == [[2, 1, 4, 3], [2, 1, 4, 3]]
    assert target["boxes"].dtype == torch.float32
    assert target["labels"].tolist() == [2, 1]
    assert target["labels"].dtype == torch.int64
    assert isinstance(target["masks"], EncodedMasks)
    assert target["masks"].shape == (2, HEIGHT, WIDTH)
    assert target["image_id"] == 10


def test_pixels_are_those_of_the_file_in_0_to_1(data: CocoData) -> None:
    image, _ = CocoDataset(data)[0]
    expected = functional.pil_to_tensor(read_image(data.image_path(data.images[0])))
    assert image.shape == (3, HEIGHT, WIDTH)
    torch.testing.assert_close(image, expected / 255)


def same(first: Any, second: Any) -> bool:
    return torch.equal(first[0], second[0]) and torch.equal(first[1]["boxes"], second[1]["boxes"])


def test_the_same_seed_gives_the_same_sample_whatever_the_generators_state(data: CocoData) -> None:
    dataset = CocoDataset(data, augmentation(horizontal_flip=0.5, photometric_distortion=0.5))
    samples = []
    for state in range(3):
        torch.manual_seed(state)
        samples.append(dataset[(0, 1234)])
    assert same(samples[0], samples[1])
    assert same(samples[0], samples[2])


def test_other_seeds_give_flipped_and_plain_samples(data: CocoData) -> None:
    dataset = CocoDataset(data, augmentation(horizontal_flip=0.5, photometric_distortion=0.0))
    lefts = {float(dataset[(0, seed)][1]["boxes"][0, 0]) for seed in range(20)}
    assert lefts == {2.0, 4.0}


def test_augmenting_does_not_change_the_callers_generator(data: CocoData) -> None:
    dataset = CocoDataset(data, augmentation(horizontal_flip=0.5, photometric_distortion=0.5))
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    dataset[(0, 1)]
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("augmented", [False, True])
def test_an_image_without_annotations_has_empty_fields_of_the_right_shape(
    data: CocoData, augmented: bool
) -> None:
    transforms = augmentation(horizontal_flip=1.0, photometric_distortion=0.0) if augmented else None
    _, target = CocoDataset(data, transforms)[1]
    assert target["boxes"].shape == (0, 4)
    assert target["boxes"].dtype == torch.float32
    assert target["labels"].shape == (0,)
    assert target["labels"].dtype == torch.int64
    assert target["masks"].shape == (0, HEIGHT, WIDTH)
    assert target["image_id"] == 20


# Python 3.12 and later warn about forking a process with threads, as torch's loader does by default.
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_comes_back_as_an_input_error(data: CocoData, workers: int) -> None:
    path = data.image_path(data.images[1])
    path.write_bytes(b"no image")
    loader = DataLoader(CocoDataset(data), batch_size=2, num_workers=workers, collate_fn=collate)
    batches = list(loader)
    assert len(batches) == 1
    assert isinstance(batches[0], InputError)
    text = str(batches[0])
    assert text.startswith(f"{path}: not a readable image")
    assert text.endswith(f"(image 20 of {data.annotation_file}); `maskloss repair` leaves it out")


def test_collate_gives_lists_of_images_and_targets(data: CocoData) -> None:
    dataset = CocoDataset(data)
    batch = collate([dataset[1], dataset[0]])
    assert not isinstance(batch, InputError)
    images, targets = batch
    assert [image.shape for image in images] == [(3, HEIGHT, WIDTH)] * 2
    assert [target["image_id"] for target in targets] == [20, 10]


def test_collate_passes_on_the_first_error(data: CocoData) -> None:
    first, second = InputError("first"), InputError("second")
    assert collate([CocoDataset(data)[0], first, second]) is first


def test_has_mask_marks_an_object_without_a_mask(tmp_path: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        document["annotations"][0]["segmentation"] = []

    _, target = CocoDataset(read_coco(*write_coco(tmp_path, change)))[0]
    assert target["has_mask"].tolist() == [False, True]
    assert target["masks"].segmentations[0] is None
    assert target["masks"].bitmaps().sum(dim=(1, 2)).tolist() == [0, 4]
    assert target["boxes"].tolist() == [[2, 1, 4, 3], [2, 1, 4, 3]]


def test_has_mask_is_absent_if_all_objects_have_masks(data: CocoData) -> None:
    assert "has_mask" not in CocoDataset(data)[0][1]


def test_crowds_are_ignore_boxes_with_the_option(data: CocoData) -> None:
    assert "ignore_boxes" not in CocoDataset(data)[0][1]
    dataset = CocoDataset(data, crowds="ignore")
    assert dataset[0][1]["ignore_boxes"].tolist() == [[0, 0, 8, 5]]
    assert dataset[0][1]["boxes"].tolist() == [[2, 1, 4, 3], [2, 1, 4, 3]]
    assert dataset[1][1]["ignore_boxes"].shape == (0, 4)
    assert dataset[1][1]["ignore_boxes"].dtype == torch.float32
