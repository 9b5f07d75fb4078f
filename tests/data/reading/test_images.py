"""maskloss/data/reading/images.py: the images of a file, their names and sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from maskloss.data.coco import read_coco
from maskloss.errors import InputError
from tests.data.coco_files import in_image, refusal, write_coco


def test_an_image_repeated_word_for_word_is_read_once(tmp_path: Path) -> None:
    """As in files that were joined from parts."""
    data = read_coco(*write_coco(tmp_path, lambda document: document["images"].append(document["images"][0])))
    assert [image.id for image in data.images] == [10, 20]
    assert data.num_objects == 2
    assert "image 10: is listed twice with equal fields" in data.warnings[0]


@pytest.mark.parametrize("file_name", ["", None, 3, ["a.png"], "a\0.png"])
def test_a_file_name_that_is_not_a_name_is_refused(tmp_path: Path, file_name: Any) -> None:
    text = refusal(tmp_path, in_image(file_name=file_name))
    assert f"image 10: file_name must be the name of a file, not {file_name!r}" in text


@pytest.mark.parametrize("file_name", ["missing.png", "nested", ".", "a" * 20 + ".png", "a.png/b.png"])
def test_an_image_without_a_file_is_named(tmp_path: Path, file_name: str) -> None:
    text = refusal(tmp_path, in_image(file_name=file_name))
    assert "image 10: " in text
    assert f"{Path(file_name).name} does not exist" in text


@pytest.mark.parametrize(("width", "height"), [(0, 5), (8, -5), (8.5, 5), ("8", 5), (True, 5), (8, 10**9)])
def test_a_recorded_size_that_is_not_a_positive_integer_is_refused(
    tmp_path: Path, width: Any, height: Any
) -> None:
    text = refusal(tmp_path, in_image(width=width, height=height))
    assert f"image 10: width and height must be positive integers, not {width!r} and {height!r}" in text


@pytest.mark.parametrize(
    ("fields", "given"),
    [
        ({"width": None, "height": None}, "missing width and height"),
        ({"width": 0, "height": 0}, "width and height are 0"),
    ],
)
def test_an_unknown_size_is_that_of_the_file(tmp_path: Path, fields: dict[str, Any], given: str) -> None:
    data = read_coco(*write_coco(tmp_path, in_image(**fields)))
    assert (data.images[0].width, data.images[0].height) == (8, 5)
    assert any(f"image 10: {given}; a.png is 8 x 5" in warning for warning in data.warnings)


def test_a_message_about_a_file_name_with_a_newline_is_one_line(tmp_path: Path) -> None:
    images, annotations = write_coco(tmp_path, lambda d: d["images"][0].update(file_name="x\n.png"))
    with pytest.raises(InputError, match=r"image 10: the file .*x\\n\.png does not exist") as caught:
        read_coco(images, annotations)
    assert len(str(caught.value).splitlines()) == 1
