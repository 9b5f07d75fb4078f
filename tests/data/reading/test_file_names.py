"""maskloss/data/reading/file_names.py: which image file a file_name refers to."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

import pytest

from maskloss.data.coco import read_coco
from maskloss.data.reading.file_names import ImageFolder, is_absolute, stays_inside
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


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs links and pipes")
def test_a_name_that_goes_up_from_a_link_leaves_the_folder(tmp_path: Path) -> None:
    """The system takes ".." from the folder that the link leads to, not from the one that the link is in."""
    (tmp_path / "images").mkdir()
    (tmp_path / "other/inner").mkdir(parents=True)
    (tmp_path / "other/secret.png").write_bytes(b"")
    os.symlink(tmp_path / "other/inner", tmp_path / "images/link")
    assert (tmp_path / "images/link/../secret.png").is_file()
    assert not ImageFolder(tmp_path / "images").has("link/../secret.png")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs links and pipes")
def test_broken_links_and_pipes_are_no_files(tmp_path: Path) -> None:
    os.symlink(tmp_path / "nowhere.png", tmp_path / "link.png")
    os.mkfifo(tmp_path / "pipe.png")
    folder = ImageFolder(tmp_path)
    for name in ("link.png", "pipe.png", "LINK.png", "some/pipe.png"):
        assert not folder.has(name)
        assert folder.elsewhere(name) is None
        assert folder.other_extension(name) is None


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


# Files under another name.


@pytest.fixture
def folder(tmp_path: Path) -> ImageFolder:
    """Make a folder with a.png, Sub/B 1.png, x/twin.png, y/twin.png, x/Case.jpg and y/CASE.jpg."""
    for name in ("a.png", "Sub/B 1.png", "x/twin.png", "y/twin.png", "x/Case.jpg", "y/CASE.jpg"):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name).touch()
    return ImageFolder(tmp_path / "images")


@pytest.mark.parametrize(
    ("name", "there"),
    [
        ("a.png", True),
        ("x/../a.png", True),
        ("nowhere/../a.png", False),  # which no system call opens
        ("a.png/../a.png", False),
        ("Sub/B 1.png", True),
        ("Sub", False),
        ("", False),
        ("b.png", False),
        ("nowhere/a.png", False),
        ("a.png/a.png", False),
        ("a\0.png", False),
        ("n" * 300, False),
    ],
)
def test_only_names_of_files_are_in_the_folder(folder: ImageFolder, name: str, there: bool) -> None:
    assert folder.has(name) is there


def test_a_subfolder_is_listed_once(folder: ImageFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(Path(path).name) or scandir(path))
    for _ in range(3):
        assert folder.has("a.png")
        assert folder.has("x/twin.png")
        assert folder.has("x/Case.jpg")
    assert listed == ["images", "x"]


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("Sub\\B 1.png", "Sub/B 1.png"),
        ("Sub/B%201.png", "Sub/B 1.png"),
        ("Sub%5CB%201.png", None),
        ("/data/local-files/?d=Sub%2FB%201.png", "Sub/B 1.png"),
        ("upload?d=x\\twin.png", "x/twin.png"),
        ("a.png\r\n", "a.png"),
        (" Sub\\B%201.png", "Sub/B 1.png"),
        ("..\\images\\a.png", None),
        ("A.png", None),
        ("b/a.png", None),
    ],
)
def test_other_spellings_of_a_whole_name_are_found(folder: ImageFolder, name: str, found: str | None) -> None:
    assert folder.as_spelled(name) == found


@pytest.mark.parametrize(("on_disk", "in_file"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_composed_and_decomposed_letters_are_the_same_name(
    tmp_path: Path, on_disk: str, in_file: str
) -> None:
    name = "Tür é.png"
    (tmp_path / unicodedata.normalize(on_disk, name)).touch()  # type: ignore[arg-type]
    found = ImageFolder(tmp_path).as_spelled(unicodedata.normalize(in_file, name))  # type: ignore[arg-type]
    assert found is not None
    assert (tmp_path / found).is_file()


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("/data/photos/a.png", "a.png"),
        ("C:\\photos\\Sub\\B 1.png", "Sub/B 1.png"),
        ("https://example.org/x/twin.png?size=1", "x/twin.png"),
        ("../../y/twin.png", "y/twin.png"),
        ("sub/b 1.PNG", "Sub/B 1.png"),
        # Without their folder, these names match no file or several.
        ("z/twin.png", None),
        ("twin.png", None),
        ("b 1.png", None),
        ("case.jpg", None),
        ("X/case.jpg", "x/Case.jpg"),
    ],
)
def test_the_only_file_that_matches_the_end_of_a_name_is_found(
    folder: ImageFolder, name: str, found: str | None
) -> None:
    assert folder.elsewhere(name) == found


def test_names_that_differ_only_in_case_are_not_confused(tmp_path: Path) -> None:
    (tmp_path / "a.PNG").touch()
    if (tmp_path / "A.png").exists():
        pytest.skip("the file system takes both for one name")
    assert ImageFolder(tmp_path).elsewhere("A.png") == "a.PNG"
    (tmp_path / "A.PNG").touch()
    assert ImageFolder(tmp_path).elsewhere("a.png") is None
    assert ImageFolder(tmp_path).elsewhere("x/A.PNG") == "A.PNG"


def test_a_folder_above_or_below_that_has_the_name_is_found(folder: ImageFolder) -> None:
    (folder.path.parent / "above.png").touch()
    assert folder.other_folder("above.png") == folder.path.parent
    assert folder.other_folder("twin.png") == folder.path / "x"
    assert folder.other_folder("CASE.jpg") == folder.path / "y"
    assert folder.other_folder("nowhere.png") is None
    assert folder.other_folder("a\0.png") is None
    assert ImageFolder(folder.path / "nowhere").other_folder("nowhere.png") is None


def test_a_file_with_another_extension_is_found(folder: ImageFolder) -> None:
    assert folder.other_extension("a.jpg") == "a.png"
    assert folder.other_extension("Sub/B 1.tif") == "Sub/B 1.png"
    assert folder.other_extension("B 1.tif") is None


@pytest.mark.parametrize(
    ("name", "inside"),
    [
        ("a.png", True),
        ("x/../a.png", True),
        ("..a.png", True),
        ("..", False),
        ("x/../../a.png", False),
        ("/a", False),
    ],
)
def test_a_name_stays_inside_unless_it_goes_up(name: str, inside: bool) -> None:
    assert stays_inside(name) is inside


@pytest.mark.parametrize(
    ("name", "absolute"),
    [
        ("/data/a.png", True),
        ("C:\\a.png", True),
        ("c:/a.png", True),
        ("\\\\server\\share\\a.png", True),
        ("https://example.org/a.png", True),
        ("s3://bucket/a.png", True),
        ("a.png", False),
        ("x\\a.png", False),
        ("C:a.png", False),
        ("a:b/c.png", False),
    ],
)
def test_paths_of_either_system_and_urls_are_absolute(name: str, absolute: bool) -> None:
    assert is_absolute(name) is absolute
