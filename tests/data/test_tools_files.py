"""Annotation files as tools write them: what `check` prints, and whether they are read, repaired or refused.

docs/annotation_tools.md has the same table for users; a test here checks that both agree.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from maskloss.cli import main
from maskloss.data.check import check_data
from maskloss.data.coco import CocoData, read_coco
from maskloss.data.repair import repair
from maskloss.errors import InputError

WIDTH, HEIGHT = 64, 48
TABLE = Path(__file__).parents[2] / "docs" / "annotation_tools.md"


@dataclass
class Case:
    """A data set with a deviation from COCO's format, and what should happen to it.

    Attributes:
        verdict: "reads", "warns", "repair" with its options, or "refused", as in the table.
        says: Text that `check` prints.
        change: Function that changes the document.
        write: Function that writes the image; None writes a PNG.
        encode: Function that encodes the document as the file's bytes.
        objects: Number of objects that are read, after the repair if there is one.
        folder: "." if the image folder is the parent folder.
    """

    verdict: str
    says: str = ""
    change: Callable[[dict[str, Any]], object] = lambda document: None
    write: Callable[[Path], object] | None = None
    encode: Callable[[dict[str, Any]], bytes] = field(default=lambda document: json.dumps(document).encode())
    objects: int = 2
    folder: str = "images"


def document() -> dict[str, Any]:
    return {
        "images": [{"id": 1, "file_name": "a.png", "width": WIDTH, "height": HEIGHT}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 1, "iscrowd": 0, "area": 576, "bbox": [8, 8, 24, 24],
             "segmentation": [[8, 8, 32, 8, 32, 32, 8, 32]]},
            {"id": 2, "image_id": 1, "category_id": 2, "iscrowd": 0, "area": 242, "bbox": [36, 20, 22, 22],
             "segmentation": [[36, 31, 47, 20, 58, 31, 47, 42]]},
        ],
        "categories": [{"id": 1, "name": "box"}, {"id": 2, "name": "disc"}],
    }  # fmt: skip


def pixels(width: int = WIDTH, height: int = HEIGHT) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def image(**fields: Any) -> Callable[[dict[str, Any]], object]:
    return lambda d: d["images"][0].update(fields)


def annotation(**fields: Any) -> Callable[[dict[str, Any]], object]:
    """Change the second annotation."""
    return lambda d: d["annotations"][1].update(fields)


def another(**fields: Any) -> Callable[[dict[str, Any]], object]:
    """Add a third annotation."""
    return lambda d: d["annotations"].append({**d["annotations"][0], "id": 3, **fields})


def all_annotations(change: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, Any]], object]:
    return lambda d: [change(a) for a in d["annotations"]]


def saved(name: str, **options: Any) -> Callable[[Path], object]:
    return lambda folder: pixels().save(folder / name, **options)


def turned(orientation: int, width: int, height: int) -> Callable[[Path], object]:
    exif = Image.Exif()
    exif[0x112] = orientation
    return lambda folder: pixels(width, height).save(folder / "a.jpg", exif=exif)


def brush(rows: slice, columns: slice) -> dict[str, Any]:
    """An uncompressed RLE, as CVAT writes it."""
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    mask[rows, columns] = 1
    return uncompressed(mask)


def uncompressed(mask: Any) -> dict[str, Any]:
    flat = mask.reshape(-1, order="F")
    ends = np.nonzero(np.diff(flat, prepend=0))[0]
    return {"size": list(mask.shape), "counts": np.diff(ends, prepend=0, append=len(flat)).tolist()}


def to_crowd(a: dict[str, Any]) -> None:
    x, y, width, height = a["bbox"]
    a.update(iscrowd=1, segmentation=brush(slice(y, y + height), slice(x, x + width)))


def to_corners(a: dict[str, Any]) -> None:
    x, y, width, height = a["bbox"]
    a["bbox"] = [x, y, x + width, y + height]


def without(*keys: str) -> Callable[[dict[str, Any]], object]:
    return all_annotations(lambda a: [a.pop(key) for key in keys])


def without_size(d: dict[str, Any]) -> None:
    del d["images"][0]["width"], d["images"][0]["height"]


def no_labels(d: dict[str, Any]) -> None:
    d["categories"] = []
    for a in d["annotations"]:
        a["category_id"] = None


def text_ids(d: dict[str, Any]) -> None:
    d["images"][0]["id"] = "a"
    for a in d["annotations"]:
        a["image_id"] = "a"


def missing_file(d: dict[str, Any]) -> None:
    d["images"].append({"id": 2, "file_name": "gone.png", "width": WIDTH, "height": HEIGHT})
    d["annotations"] += [{**d["annotations"][0], "id": 3 + i, "image_id": 2} for i in range(40)]


def areas_of_boxes(d: dict[str, Any]) -> None:
    d["annotations"][0]["area"] = 0
    d["annotations"][1]["area"] = 484


def odd_name(folder: Path) -> None:
    (folder / "sub folder").mkdir()
    pixels().save(folder / "sub folder" / "ä b#1%20.png")


def url_instead_of_name(d: dict[str, Any]) -> None:
    d["images"][0]["coco_url"] = f"http://images.cocodataset.org/train2017/{d['images'][0].pop('file_name')}"


def counts_as_text(a: dict[str, Any]) -> None:
    """Write the mask as scripts do that convert what JSON cannot hold with `str`."""
    x, y, width, height = a["bbox"]
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8, order="F")
    mask[y : y + height, x : x + width] = 1
    a["segmentation"] = {"size": [HEIGHT, WIDTH], "counts": str(coco_mask.encode(mask)["counts"])}


def prompted(a: dict[str, Any]) -> None:
    a.update(
        point_coords=[[20.5, 20.5]], predicted_iou=0.98, stability_score=0.97, crop_box=[0, 0, WIDTH, HEIGHT]
    )


def in_percent(d: dict[str, Any]) -> None:
    """Seven images of 640 x 480 px, with the same object in each."""
    d["images"] = [{"id": i, "file_name": f"{i}.png", "width": 640, "height": 480} for i in range(7)]
    disc = {"bbox": [50, 25, 45, 70], "segmentation": [[50, 60, 72.5, 25, 95, 60, 72.5, 95]], "area": 1}
    d["annotations"] = [{**d["annotations"][0], **disc, "id": i, "image_id": i} for i in range(7)]


def photographs(folder: Path) -> None:
    for i in range(7):
        pixels(640, 480).save(folder / f"{i}.png")


CAPTION = {"id": 1, "image_id": 1, "caption": "A box and a disc."}
PANOPTIC = {
    "image_id": 1,
    "file_name": "a.png",
    "segments_info": [{"id": 7, "category_id": 1, "bbox": [8, 8, 24, 24]}],
}
TRANSPOSED = np.zeros((WIDTH, HEIGHT), dtype=np.uint8)
TRANSPOSED[36:58, 20:42] = 1
TURNED = [[20, 47, 31, 36, 42, 47, 31, 58]]
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n"

CASES = {
    "absolute_path": Case(
        "repair", "file_name '/data/upload/1/a.png' leaves the image folder", image(file_name="/data/upload/1/a.png")
    ),
    "alpha": Case("reads", write=lambda f: pixels().convert("RGBA").save(f / "a.png")),
    "annotation_ids_twice": Case("warns", "annotation 1: the id is used twice", annotation(id=1)),
    "annotations_by_id": Case(
        "warns",
        "the annotations are an object with an entry for each",
        lambda d: d.update(annotations={str(a["id"]): a for a in d["annotations"]}),
    ),
    "annotations_null": Case("refused", "it has no list of annotations", lambda d: d.update(annotations=None)),
    "area_of_bbox": Case("warns", "area is that of the box, not of the mask", areas_of_boxes),
    "bbox_strings": Case(
        "warns", "annotation 2: bbox [36, 20, '22.5', '22'] is taken from", annotation(bbox=[36, 20, "22.5", "22"])
    ),
    "bbox_xyxy": Case(
        "repair --boxes from-masks", "the boxes look like x1, y1, x2, y2", all_annotations(to_corners)
    ),
    "bmp": Case("reads", change=image(file_name="a.bmp"), write=saved("a.bmp")),
    "bom": Case("reads", encode=lambda d: json.dumps(d).encode("utf-8-sig")),
    "boxes_of_zeros": Case(
        "repair --boxes from-masks", "2 of 2 boxes have no area", all_annotations(lambda a: a.update(bbox=[0] * 4))
    ),
    "bow_tie": Case("reads", change=annotation(segmentation=[[36, 20, 58, 42, 58, 20, 36, 42]])),
    "captions": Case("refused", "the annotations are captions", lambda d: d.update(annotations=[CAPTION])),
    "coco_url_alone": Case("warns", "missing file_name; 'a.png' is read", url_instead_of_name),
    "crowd_brush_all": Case(
        "repair --crowds objects", "all 2 annotations are crowds (iscrowd 1)", all_annotations(to_crowd)
    ),
    "crowd_brush_mixed": Case(
        "warns", "1 of 2 annotations is a crowd", lambda d: to_crowd(d["annotations"][0]), objects=1
    ),
    "empty_text_as_segmentation": Case(
        "warns", "annotation 3: has a box and no mask", another(bbox=[10, 35, 8, 6], segmentation="", area=0), objects=3
    ),
    "exif_180": Case(
        "warns", "a.jpg is rotated or mirrored as its EXIF", image(file_name="a.jpg"), turned(3, WIDTH, HEIGHT)
    ),
    "exif_as_stored": Case(
        "reads",
        "",
        lambda d: (
            d["images"][0].update(file_name="a.jpg", width=HEIGHT, height=WIDTH),
            d["annotations"][1].update(bbox=[20, 36, 22, 22], segmentation=TURNED),
        ),
        turned(6, HEIGHT, WIDTH),
    ),
    "exif_turned_upright": Case("reads", "", image(file_name="a.jpg"), turned(6, HEIGHT, WIDTH)),
    "file_missing": Case("repair", "gone.png does not exist", missing_file),
    "file_name_with_line_end": Case(
        "warns", "file_name 'a.png\\n' is read as 'a.png'", image(file_name="a.png\n")
    ),
    "flat_segmentation": Case(
        "warns", "read as one polygon", all_annotations(lambda a: a.update(segmentation=a["segmentation"][0]))
    ),
    "float_ids": Case(
        "warns",
        "id 1.0 is read as an integer",
        lambda d: (d["categories"][0].update(id=1.0), d["annotations"][0].update(category_id=1.0)),
    ),
    "git_lfs_pointer": Case(
        "refused", "a Git LFS pointer: run `git lfs pull`", write=lambda f: (f / "a.png").write_bytes(POINTER)
    ),
    "gray16": Case(
        "reads", write=lambda f: Image.fromarray(np.full((HEIGHT, WIDTH), 9999, np.uint16)).save(f / "a.png")
    ),
    "hole_as_polygon": Case(
        "warns",
        "annotation 2: segmentation: a polygon inside another one is filled",
        annotation(segmentation=[[36, 20, 58, 20, 58, 42, 36, 42], [41, 25, 53, 25, 53, 37, 41, 37]]),
    ),
    "image_entry_missing": Case("repair", "annotation 3: image_id 9 is not in the file", another(image_id=9)),
    "iscrowd_null": Case("warns", "iscrowd None is read as 0", annotation(iscrowd=None)),
    "latin1": Case(
        "repair",
        "not UTF-8, but probably Latin-1",
        lambda d: d["categories"][1].update(name="Tür"),
        encode=lambda d: json.dumps(d, ensure_ascii=False).encode("latin-1"),
    ),
    "listed_twice": Case(
        "warns",
        "2 images have the file_name 'a.png'",
        lambda d: d["images"].append({**d["images"][0], "id": 2}),
    ),
    "nan_area": Case("warns", "area nan is replaced by the mask's", annotation(area=float("nan"))),
    "nested_polygons": Case(
        "warns", "a list too many around its polygons", annotation(segmentation=[[[36, 31, 47, 20, 58, 31, 47, 42]]])
    ),
    "no_iscrowd_no_area": Case("reads", "", without("iscrowd", "area")),
    "no_labels": Case("repair", "the objects were not labeled in the tool", no_labels),
    "object_twice": Case(
        "warns",
        "annotation 3: repeats annotation 1",
        lambda d: d["annotations"].append({**d["annotations"][0], "id": 3}),
        objects=3,
    ),
    "odd_file_name": Case("reads", "", image(file_name="sub folder/ä b#1%20.png"), odd_name),
    "one_empty_segmentation": Case(
        "warns",
        "annotation 3: has a box and no mask",
        another(bbox=[10, 35, 8, 6], segmentation=[], area=0),
        objects=3,
    ),
    "panoptic": Case("refused", "the annotations are panoptic", lambda d: d.update(annotations=[PANOPTIC])),
    "percentages": Case(
        "repair", "the polygons look like percentages of the image", in_percent, photographs, objects=7
    ),
    "points_as_pairs": Case(
        "warns",
        "its points as [x, y] pairs",
        annotation(segmentation=[[[36, 31], [47, 20], [58, 31], [47, 42]]]),
    ),
    "polygon_2px_outside": Case(
        "warns",
        "reaches 2.3 px beyond the border",
        annotation(segmentation=[[36, 31, 47, 20, 66.1, 31, 47, 50.3]], bbox=[36, 20, 28, 28]),
    ),
    "polygon_of_4_numbers": Case(
        "warns", "a polygon has fewer than 3 points", annotation(segmentation=[[36, 20, 58, 42]]), objects=1
    ),
    "rle_corrupt": Case(
        "repair",
        "the RLE's counts are corrupt",
        annotation(segmentation={"size": [HEIGHT, WIDTH], "counts": "bad"}),
    ),
    "rle_counts_as_text": Case(
        "warns",
        "the RLE's counts are text of numbers or of Python's bytes, or base64",
        all_annotations(counts_as_text),
    ),
    "rle_size_swapped": Case(
        "repair",
        "the RLE's size is [64, 48], the image's is [48, 64]: its sides are swapped",
        annotation(segmentation=uncompressed(TRANSPOSED)),
    ),
    "segment_anything": Case("reads", "", all_annotations(prompted)),
    "size_missing": Case(
        "warns", "missing width and height; a.png is 64 x 48", without_size
    ),
    "size_swapped": Case("repair", "they are swapped", image(width=HEIGHT, height=WIDTH)),
    "size_zero": Case("warns", "width and height are 0; a.png is 64 x 48", image(width=0, height=0)),
    "string_image_ids": Case("repair", "image 'a': id must be an integer", text_ids),
    "tiff_cmyk": Case(
        "reads", "", image(file_name="a.tif"), lambda f: pixels().convert("CMYK").save(f / "a.tif")
    ),
    "tiny_image": Case(
        "reads",
        "",
        lambda d: (
            d["images"][0].update(width=20, height=12),
            d.update(annotations=[{**d["annotations"][0], "bbox": [4, 4, 6, 4], "area": 24,
                                   "segmentation": [[4, 4, 10, 4, 10, 8, 4, 8]]}], categories=d["categories"][:1]),
        ),
        lambda f: pixels(20, 12).save(f / "a.png"),
        objects=1,
    ),
    "trailing_comma": Case(
        "repair", "line 1 column", encode=lambda d: json.dumps(d).replace("}]}", "},]}").encode()
    ),
    "utf16": Case("reads", encode=lambda d: json.dumps(d).encode("utf-16")),
    "webp": Case("reads", "", image(file_name="a.webp"), saved("a.webp", lossless=True)),
    "weight_in_kg": Case("warns", "1 of 2 objects has a weight other than 1", annotation(weight=3.5)),
    "windows_backslash": Case(
        "warns", r"file_name 'images\\a.png' is read as 'images/a.png'", image(file_name="images\\a.png"), folder="."
    ),
}  # fmt: skip


def write_case(folder: Path, case: Case) -> tuple[Path, Path]:
    (folder / "images").mkdir()
    (case.write or saved("a.png"))(folder / "images")
    content = document()
    case.change(content)
    (folder / "annotations.json").write_bytes(case.encode(content))
    return folder / case.folder, folder / "annotations.json"


def options_of(verdict: str) -> dict[str, Any]:
    words = verdict.split()[1:]
    return {option.removeprefix("--"): value for option, value in zip(words[::2], words[1::2], strict=True)}


def assert_masks_are_pycocotools(data: CocoData, annotations: Path) -> None:
    truth = COCO(str(annotations))
    for record in data.images:
        for item, mask in zip(record.objects, record.object_masks().bitmaps().numpy(), strict=True):
            if item.has_mask:
                assert np.array_equal(mask, truth.annToMask(truth.anns[item.id]))


@pytest.mark.parametrize("name", CASES)
def test_check_prints_the_expected_text_in_at_most_five_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    case = CASES[name]
    images, annotations = write_case(tmp_path, case)
    error = case.verdict.startswith(("repair", "refused"))
    command = ["check", "--images", str(images), "--annotations", str(annotations)]
    if error:
        with pytest.raises(SystemExit) as caught:
            main(command)
        assert caught.value.code == 1
    else:
        main(command)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 5
    assert case.says in "\n".join(lines)
    if case.verdict == "reads":
        assert lines[-1] == "0 errors, 0 warnings"
    else:
        assert lines[-1] != "0 errors, 0 warnings"
    if case.verdict.startswith("repair"):
        assert any(f"maskloss {case.verdict}" in line for line in lines)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.verdict in ("reads", "warns")])
def test_the_file_is_read_without_a_repair(tmp_path: Path, name: str) -> None:
    images, annotations = write_case(tmp_path, CASES[name])
    data = read_coco(images, annotations)
    assert data.num_objects == CASES[name].objects
    if CASES[name].verdict == "reads":
        assert data.warnings == []
        if name not in ("utf16", "bom"):  # which pycocotools cannot open
            assert_masks_are_pycocotools(data, annotations)


@pytest.mark.parametrize(
    "name", [n for n, case in CASES.items() if case.verdict.startswith(("repair", "refused"))]
)
def test_the_file_is_refused_in_one_short_line(tmp_path: Path, name: str) -> None:
    images, annotations = write_case(tmp_path, CASES[name])
    with pytest.raises(InputError) as caught:
        read_coco(images, annotations)
    text = str(caught.value)
    assert text.startswith(f"{annotations}: ")
    assert "\n" not in text
    assert len(text) <= 300 + len(str(annotations))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.verdict != "refused"])
def test_a_repaired_file_has_no_error_and_the_masks_of_pycocotools(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    images, annotations = write_case(tmp_path, case)
    before = annotations.read_bytes()
    fixed, again = tmp_path / "fixed.json", tmp_path / "again.json"
    repair(images, annotations, fixed, **options_of(case.verdict))
    assert annotations.read_bytes() == before
    _, problems = check_data(images, fixed)
    assert [problem.text for problem in problems if problem.error] == []
    data = read_coco(images, fixed)
    assert data.num_objects == case.objects
    assert_masks_are_pycocotools(data, fixed)
    _, repairs = repair(images, fixed, again, **options_of(case.verdict))
    assert repairs == []
    assert again.read_bytes() == fixed.read_bytes()


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.verdict == "refused"])
def test_a_file_that_cannot_be_repaired_is_refused(tmp_path: Path, name: str) -> None:
    images, annotations = write_case(tmp_path, CASES[name])
    with pytest.raises(InputError, match=re.escape(CASES[name].says)):
        repair(images, annotations, tmp_path / "fixed.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["annotations.json", "images"]


def test_a_transposed_rle_is_the_mask_that_its_tool_meant(tmp_path: Path) -> None:
    images, annotations = write_case(tmp_path, CASES["rle_size_swapped"])
    data, _ = repair(images, annotations, tmp_path / "fixed.json")
    assert np.array_equal(data.images[0].object_masks().bitmaps()[1].numpy(), TRANSPOSED.T)


def test_a_figure_of_eight_is_filled_as_pycocotools_fills_it(tmp_path: Path) -> None:
    images, annotations = write_case(tmp_path, CASES["bow_tie"])
    polygon = CASES["bow_tie"]
    content = document()
    polygon.change(content)
    rle = coco_mask.merge(coco_mask.frPyObjects(content["annotations"][1]["segmentation"], HEIGHT, WIDTH))
    mask = read_coco(images, annotations).images[0].object_masks().bitmaps()[1].numpy()
    assert np.array_equal(mask, coco_mask.decode(rle))
    # Two triangles of 22 px base and 11 px height.
    assert abs(int(mask.sum()) - 242) < 25


def test_the_table_for_users_has_a_row_for_each_case_with_its_verdict() -> None:
    rows = {}
    for line in TABLE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| `") and len(cells) == 4:
            rows[cells[0].strip("`")] = cells[3]
    starts = {"reads": "reads it", "warns": "reads it, warns", "refused": "refuses it"}
    assert rows.keys() == CASES.keys()
    for name, case in CASES.items():
        if case.verdict.startswith("repair"):
            assert rows[name].startswith(f"`maskloss {case.verdict}`"), name
        else:
            assert rows[name].startswith(starts[case.verdict]), name
            assert ("warns" in rows[name]) == (case.verdict == "warns"), name
