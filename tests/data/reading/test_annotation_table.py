"""maskloss/data/reading/annotation_table.py: arrays of all annotations, whatever is in them, and how they are named."""

from __future__ import annotations

import numpy as np

from maskloss.data.findings import Findings
from maskloss.data.reading.annotation_table import AnnotationTable, with_large_ids
from maskloss.data.reading.boxes import NO_BOX
from maskloss.data.reading.columns import Columns, ImageColumns
from maskloss.data.records import NO_MASK, POLYGONS, RLE


def table_of(*annotations: dict[str, object]) -> AnnotationTable:
    """Make the table of annotations of two images, 20 x 10 and 30 x 40 px."""
    columns = Columns()
    for annotation in annotations:
        columns.take({"image_id": 1, "category_id": 1, "iscrowd": 0, **annotation})
    images = ImageColumns()
    for name, width, height in (("a.png", 20, 10), ("b.png", 30, 40)):
        images.ids.append(len(images.ids) + 1)
        images.names.append(name)
        images.widths.append(width)
        images.heights.append(height)
        images.positions.append(len(images.positions))
    return AnnotationTable.of_columns(columns, images, Findings())


TRIANGLE, SQUARE = [0, 0, 4, 0, 4, 4], [1, 1, 3, 1, 3, 3, 1, 3]


def test_polygons_and_rles_are_found_by_their_row() -> None:
    rle = {"size": [10, 20], "counts": [0, 10, 190]}
    table = table_of(
        {"id": 5, "bbox": [0, 0, 4, 4], "segmentation": [TRIANGLE, SQUARE]},
        {"id": 6, "bbox": [0, 0, 1, 10], "segmentation": rle},
        {"id": 7, "bbox": [0, 0, 4, 4]},
        {"id": 8, "bbox": [1, 1, 2, 2], "segmentation": [SQUARE]},
    )
    assert table.form.tolist() == [POLYGONS, RLE, NO_MASK, POLYGONS]
    assert [polygon.reshape(-1).tolist() for polygon in table.polygons(0)] == [TRIANGLE, SQUARE]
    assert [polygon.reshape(-1).tolist() for polygon in table.polygons(3)] == [SQUARE]
    assert table.part_count.tolist() == [2, 1, 0, 1]
    assert table.rle_index[1] == 0
    assert table.boxes[3].tolist() == [1, 1, 2, 2]


def test_sizes_are_those_of_the_images() -> None:
    table = table_of({"id": 5, "bbox": [0, 0, 4, 4]}, {"id": 6, "bbox": [0, 0, 4, 4]})
    table.image[:] = [1, 0]
    assert table.sizes().tolist() == [[30, 40], [20, 10]]
    assert table.size(0) == (30, 40)


def test_a_dropped_annotation_is_named_with_its_image() -> None:
    table = table_of({"id": 5, "bbox": [0, 0, 4, 4]}, {"bbox": [0, 0, 4, 4]}, {"id": 7, "bbox": [0, 0, 4, 4]})
    table.image[:] = [0, 1, 1]
    table.drop(NO_BOX, [0, 1], lambda row: f"text {row}")
    assert [(finding.name, finding.detail) for finding in table.findings.of(NO_BOX)] == [
        ("annotation 5", "text 0 (image 1, a.png)"),
        ("annotation number 1", "text 1 (image 2, b.png)"),
    ]
    assert table.kept.tolist() == [False, False, True]


def test_ids_of_more_than_64_bits_are_kept_as_integers() -> None:
    assert with_large_ids([1, 0], {}).dtype == np.int64
    assert with_large_ids([1, 0, 0], {1: 2**100, 2: "text"}).tolist() == [1, 2**100, 0]
