"""maskloss/data/file_names.py: which image file a file_name refers to."""

from __future__ import annotations

from pathlib import Path

import pytest

from maskloss.data.coco import read_coco
from tests.data.coco_files import (
    in_image,
    refusal,
    write_coco,
)


def test_a_file_name_with_dots_that_stays_inside_is_read(tmp_path: Path) -> None:
    data = read_coco(*write_coco(tmp_path, in_image(file_name="nested/../a.png")))
    assert data.image_path(data.images[0]).is_file()


def test_a_symbolic_link_out_of_the_folder_is_followed(tmp_path: Path) -> None:
    images, annotations = write_coco(tmp_path, in_image(file_name="link.png"))
    elsewhere = tmp_path / "elsewhere.png"
    (images / "a.png").rename(elsewhere)
    (images / "link.png").symlink_to(elsewhere)
    assert len(read_coco(images, annotations).images) == 2


@pytest.mark.parametrize(
    "file_name",
    ["../a.png", "nested/../../a.png", "..", "nested/../../images/a.png", "./../images/a.png"],
)
def test_a_file_name_that_leaves_the_folder_is_refused(tmp_path: Path, file_name: str) -> None:
    text = refusal(tmp_path, in_image(file_name=file_name))
    assert f"image 10: file_name {file_name!r} leaves the image folder" in text


def test_an_absolute_file_name_is_refused_even_inside_the_folder(tmp_path: Path) -> None:
    file_name = str(tmp_path / "images" / "a.png")
    text = refusal(tmp_path, in_image(file_name=file_name))
    # In a message, the middle of a long name is cut out.
    assert f"image 10: file_name {file_name[:5]!r}"[:-1] in text
    assert "a.png' leaves the image folder" in text
