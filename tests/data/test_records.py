"""maskloss/data/records.py: views of arrays; only the arrays are kept in memory."""

from __future__ import annotations

import gc
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from maskloss.data.coco import CocoData, read_coco
from maskloss.data.records import Texts, polygon_extents, polygons_of
from tests.data.coco_files import HEIGHT, WIDTH, write_coco


@pytest.fixture
def data(tmp_path: Path) -> CocoData:
    return read_coco(*write_coco(tmp_path))


def test_images_are_a_sequence_of_views(data: CocoData) -> None:
    assert len(data.images) == 2
    assert [image.id for image in data.images] == [10, 20]
    assert data.images[-1].id == 20
    assert [image.file_name for image in data.images[::-1]] == ["nested/b.png", "a.png"]
    assert (data.images[0].width, data.images[0].height) == (WIDTH, HEIGHT)
    with pytest.raises(IndexError):
        data.images[2]


def test_annotations_are_grouped_by_image_in_the_files_order(tmp_path: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        first, second, third = document["annotations"]
        first.update(image_id=20)
        document["annotations"] = [
            first,
            second,
            {**first, "id": 5, "segmentation": [[1, 1, 3, 1, 3, 4]]},
            third,
        ]

    data = read_coco(*write_coco(tmp_path, change))
    assert [a.id for a in data.images[0].annotations] == [102, 103]
    assert [a.id for a in data.images[1].annotations] == [101, 5]
    assert data.images[1].annotations[1].segmentation == [[1, 1, 3, 1, 3, 4]]
    assert data.images[0].annotations[0].segmentation["size"] == [HEIGHT, WIDTH]
    assert [a.id for a in data.images[0].objects] == [102]


def test_equal_files_give_equal_records_and_pickles_of_them(tmp_path: Path, data: CocoData) -> None:
    (tmp_path / "second").mkdir()
    second = read_coco(*write_coco(tmp_path / "second"))
    assert data.records == second.records
    assert pickle.loads(pickle.dumps(data)) == data
    changed = read_coco(*write_coco(tmp_path / "second", lambda d: d["annotations"][0].update(area=5)))
    assert data.records != changed.records


def test_texts_return_the_strings_that_they_were_made_from() -> None:
    texts = [b"", b"a", "ü\ud800".encode("utf-8", "surrogatepass"), b""]
    joined = Texts.of(texts)
    assert [joined[index] for index in range(4)] == texts


def test_a_data_set_keeps_arrays_and_no_object_per_annotation(tmp_path: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        document["annotations"] = [{**document["annotations"][i % 2], "id": i} for i in range(4000)]

    images, annotations = write_coco(tmp_path, change)
    read_coco(images, annotations)
    gc.collect()
    before = len(gc.get_objects())
    data = read_coco(images, annotations)
    gc.collect()
    assert len(gc.get_objects()) - before < 400
    assert len(data.records.ids) == 4000
    assert all(array.dtype != object for array in data.records._arrays())
    # 8 coordinates of 8 bytes or 8 bytes of counts, and 12 columns of up to 32 bytes.
    assert data.records.nbytes < 4000 * 200
    # What a worker process gets by pickling, or shares by forking.
    assert len(pickle.dumps(data)) < 4000 * 200 + 5000


def test_masks_of_a_target_are_views_of_the_arrays(data: CocoData) -> None:
    [polygon] = data.records.polygons(0)
    assert np.shares_memory(polygon, data.records.coordinates)


def test_extents_ignore_coordinates_between_polygons():
    generator = np.random.default_rng(0)
    count = 2 * generator.integers(3, 9, 40)
    first = count.cumsum() - count
    coordinates = generator.uniform(-50, 50, count.sum())
    kept = generator.random(40) < 0.6
    low, high = polygon_extents(coordinates, first[kept], count[kept])
    expected = polygons_of(coordinates, first[kept], count[kept])
    assert len(expected) == kept.sum() < 40
    np.testing.assert_array_equal(low, [polygon.min(axis=0) for polygon in expected])
    np.testing.assert_array_equal(high, [polygon.max(axis=0) for polygon in expected])
