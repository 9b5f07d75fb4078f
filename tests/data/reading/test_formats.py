"""maskloss/data/reading/formats.py: what files in other formats are, and the way out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from maskloss.cli import main
from maskloss.data.coco import read_coco
from maskloss.data.reading.formats import LISTS, listed
from maskloss.data.repair import repair
from maskloss.errors import InputError
from tests.data.coco_files import RECTANGLE_COUNTS, good_document, refusal, write_coco

RLE = {"size": [5, 8], "counts": RECTANGLE_COUNTS}

#: Files as their tools and data sets write them, and what is said about them.
FILES: dict[str, tuple[Any, str]] = {
    "empty": ("", "it is empty"),
    "json lines": ('{"ID": "a", "gtboxes": []}\n{"ID": "b", "gtboxes": []}\n', "another JSON value follows"),
    "two files in one": (json.dumps(good_document()) * 2, "another JSON value follows"),
    "print of a dict": (repr(good_document()), "Python's text of a dict: write the file with json.dump"),
    "xml": ("<?xml version='1.0'?><annotations/>", "it is XML or HTML"),
    "labelme": ({"shapes": [], "imagePath": "a.png"}, "it looks like labelme: export it as COCO"),
    "via of makesense": ({"a.png": {"filename": "a.png", "regions": {}}}, "it looks like VGG Image Annotator"),
    "via": ({"a.png1": {"file_attributes": {}, "regions": []}}, "it looks like VGG Image Annotator"),
    "label studio": ([{"id": 1, "data": {}, "annotations": []}], "it looks like Label Studio's own JSON"),
    "labelbox": ([{"data_row": {}, "projects": {}}], "it looks like Labelbox's own JSON"),
    "geojson": ({"type": "FeatureCollection", "features": []}, "it looks like GeoJSON"),
    "sa-1b": (
        {"image": {"image_id": 1}, "annotations": [{"id": 1, "bbox": [2, 1, 2, 2], "segmentation": RLE}]},
        "with a file for each image: join the files",
    ),
    "encord": ([good_document()], "it is a list of COCO documents: join them into one"),
    "results": ([{"image_id": 10, "category_id": 3, "bbox": [2, 1, 2, 2], "score": 0.5}], "like detections"),
    "detectron2": ([{"file_name": "a.png", "annotations": []}], "it looks like Detectron2's list of images"),
    "wrapped": ({"coco": good_document()}, "its lists are in 'coco': make that the document"),
    "coco test": (
        {key: value for key, value in good_document().items() if key != "annotations"},
        "it only lists images, as the files of COCO's test sets do",
    ),
    "coco captions": (
        {"images": good_document()["images"], "annotations": [{"id": 1, "image_id": 10, "caption": "A cat."}]},
        "the annotations are captions, without boxes and masks: use instances_*.json of the same images",
    ),
    "coco amodal": (
        {"images": good_document()["images"], "annotations": [{"id": 1, "image_id": 10, "regions": []}]},
        "have several objects each, in `regions`",
    ),
    "youtube-vis": (
        {"videos": [{"id": 1, "file_names": ["a.png"]}], "annotations": [], "categories": []},
        "it is about videos, as YouTube-VIS: list each frame as an image",
    ),
    "no list": ({"images": [], "annotations": []}, "it has no list of categories"),
    "null lists": (dict.fromkeys(LISTS), "it has no list of images, annotations, categories"),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_file_in_another_format_is_refused_in_one_line_with_the_way_out(name: str, tmp_path: Path) -> None:
    content, says = FILES[name]
    images, path = write_coco(tmp_path)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    for read in (read_coco, lambda *paths: repair(*paths, tmp_path / "fixed.json")):
        with pytest.raises(InputError) as caught:
            read(images, path)
        text = str(caught.value).removeprefix(f"{path}: ")
        assert says in text
        assert len(text.splitlines()) == 1
        assert len(text) <= 300
    assert not (tmp_path / "fixed.json").exists()


def panoptic(document: dict[str, Any]) -> None:
    segments = [{"id": 8_345_037, "category_id": 3, "iscrowd": 0, "bbox": [2, 1, 2, 2], "area": 4}]
    document["annotations"] = [{"segments_info": segments, "file_name": "a.png", "image_id": 10}]


def captions(document: dict[str, Any]) -> None:
    document["annotations"] = [{"id": 1, "image_id": 10, "category_id": 0, "caption": "A cat."}]


def kins(document: dict[str, Any]) -> None:
    for a in document["annotations"]:
        a.update(
            a_segm=a["segmentation"], i_segm=a.pop("segmentation"), a_bbox=a["bbox"], i_bbox=a.pop("bbox")
        )


def segments_ai(document: dict[str, Any]) -> None:
    document["annotations"] = [
        {"id": 1, "image_id": 10, "category_id": 3, "points": [[2, 1], [4, 1], [4, 3]]}
    ]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (panoptic, "the annotations are panoptic, with masks in PNG files: use instances_*.json of the same images"),
        (captions, "the annotations are captions, without boxes and masks: use instances_*.json"),
        (kins, "the annotations are amodal ones of KINS: rename a_segm and a_bbox, or i_segm and i_bbox"),
        (segments_ai, "the annotations have `points` instead of segmentations, as Segments.ai writes them"),
    ],
)  # fmt: skip
def test_annotations_of_another_kind_are_one_error_with_the_way_out(
    change: Any, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = refusal(tmp_path, change)
    assert text.removeprefix(f"{tmp_path / 'annotations.json'}: ").startswith(says)
    assert len(text) - len(str(tmp_path)) <= 300
    images, annotations = tmp_path / "images", tmp_path / "annotations.json"
    with pytest.raises(InputError, match="the annotations "):
        repair(images, annotations, tmp_path / "fixed.json")
    with pytest.raises(SystemExit):
        main(["check", "--images", str(images), "--annotations", str(annotations)])
    assert capsys.readouterr().out.count("error: ") == 1


@pytest.mark.parametrize(
    ("name", "encoding", "converted"),
    [
        ("苹果", "gbk", False),
        ("사과나무", "euc-kr", False),
        ("Größe", "latin-1", True),
        ("Çà et là", "cp1252", True),
    ],
)
def test_only_western_text_is_converted(name: str, encoding: str, converted: bool, tmp_path: Path) -> None:
    images, path = write_coco(tmp_path, lambda document: document["categories"][0].update(name=name))
    path.write_text(json.dumps(json.loads(path.read_text()), ensure_ascii=False), encoding=encoding)
    if converted:
        data, _ = repair(images, path, tmp_path / "fixed.json")
        assert name in [category.name for category in data.categories]
        return
    for read in (read_coco, lambda *paths: repair(*paths, tmp_path / "fixed.json")):
        with pytest.raises(InputError, match="probably GBK or EUC-KR; save it as UTF-8"):
            read(images, path)


def test_a_caption_beside_a_mask_is_an_unknown_field(tmp_path: Path) -> None:
    data = read_coco(*write_coco(tmp_path, lambda d: [a.update(caption="A cat.") for a in d["annotations"]]))
    assert data.num_objects == 2


@pytest.mark.parametrize("key", ["images", "annotations", "categories"])
def test_a_list_that_is_an_object_is_read_and_repaired(key: str, tmp_path: Path) -> None:
    """As LIVECell's files of single cell types have their annotations."""

    def change(document: dict[str, Any]) -> None:
        document[key] = {str(entry["id"]): entry for entry in document[key]}

    images, path = write_coco(tmp_path, change)
    data = read_coco(images, path)
    assert [item.id for item in data.images[0].annotations] == [101, 102, 103]
    assert f"{path}: the {key} are an object with an entry for each, and are read as a list" in data.warnings
    _, repairs = repair(images, path, tmp_path / "fixed.json")
    assert [str(change) for change in repairs] == [f"1 file: written as a list (the {key} are an object)"]
    assert json.loads((tmp_path / "fixed.json").read_text()) == good_document()
    command = ["subset", "--images", str(images), "--annotations", str(path), "--max-images", "1"]
    main([*command, "--output", str(tmp_path / "part")])
    assert read_coco(tmp_path / "part/images", tmp_path / "part/annotations.json").num_objects == 2


@pytest.mark.parametrize(
    "document", [[], {}, {"images": {}}, {"images": {"1": "a.png"}}, {"images": [1]}, None]
)
def test_other_objects_are_left_alone(document: Any) -> None:
    before = json.dumps(document)
    assert listed(document) == []
    assert json.dumps(document) == before
