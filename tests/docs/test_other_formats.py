"""The recipes of docs/other_formats.md, run exactly as shown on the page, on a small data set."""

from __future__ import annotations

import json
import math
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from maskloss.cli import main
from maskloss.data.check import check_data

PAGE = Path(__file__).parents[2] / "docs" / "other_formats.md"
WIDTH, HEIGHT = 160, 120
YOLO, PNG = "YOLO segmentation labels", "PNG instance masks"
NAMES = ("a.jpg", "b c.jpg", "empty.jpg")

Points = list[tuple[float, float]]
BoolArray = npt.NDArray[np.bool_]


def needs(name: str) -> pytest.MarkDecorator:
    # Not importorskip: labelme2coco sets up the root logger when it is imported.
    return pytest.mark.skipif(
        find_spec(name) is None, reason=f"{name} is not installed: pip install '.[docs]'"
    )


def circle(x: float, y: float, radius: float) -> Points:
    angles = np.arange(24) * math.pi / 12
    return [(x + radius * math.cos(angle), y + radius * math.sin(angle)) for angle in angles]


DISC = circle(30.3, 30.6, 18.4)
TRIANGLE = [(80.2, 20.7), (99.6, 25.3), (88.1, 44.9)]
TINY = [(70.3, 70.1), (72.9, 70.4), (71.5, 72.8)]
LEFT = [(20.3, 60.2), (50.7, 60.2), (50.7, 90.6), (20.3, 90.6)]
RIGHT = [(70.2, 96.7), (100.5, 96.7), (100.5, 113.4), (70.2, 113.4)]
BOX = [(110.3, 40.4), (130.6, 40.4), (130.6, 60.2), (110.3, 60.2)]
WITHIN_A_PIXEL = [(5.1, 5.1), (5.3, 5.1), (5.3, 5.3), (5.1, 5.3)]
# YOLO has one polygon per object: a line that is traversed twice connects parts and holes.
TWO_PARTS = [*LEFT[:3], *RIGHT[:1], *RIGHT[3:0:-1], *RIGHT[:1], *LEFT[2:]]
HOLE = [(120.4, 20.2), (120.4, 40.1), (140.3, 40.1), (140.3, 20.2), (120.4, 20.2)]
WITH_HOLE = [(110.2, 10.3), (150.6, 10.3), (150.6, 50.7), (110.2, 50.7), (110.2, 10.3), *HOLE]


def mask_of(*polygons: Points) -> BoolArray:
    flat = [[v for point in polygon for v in point] for polygon in polygons]
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(flat, HEIGHT, WIDTH))).astype(bool)


def iou(a: BoolArray, b: BoolArray) -> float:
    return float((a & b).sum() / (a | b).sum())


def write_images(
    folder: Path, names: tuple[str, ...] = NAMES, size: tuple[int, int] = (WIDTH, HEIGHT)
) -> None:
    folder.mkdir(parents=True)
    for name in names:
        Image.new("RGB", size, "gray").save(folder / name)


def section(title: str) -> str:
    return PAGE.read_text().split(f"## {title}\n")[1].split("\n## ")[0]


def text_of(title: str) -> str:
    """Return the text of a section in one line."""
    return " ".join(section(title).split())


def run_python(title: str, *changes: tuple[str, str]) -> subprocess.CompletedProcess[str]:
    """Run the section's Python block in the working directory."""
    (code,) = re.findall(r"```python\n(.*?)```", section(title), re.DOTALL)
    for old, new in changes:
        assert code.count(old) == 1
        code = code.replace(old, new)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result


def run_commands(title: str, capsys: pytest.CaptureFixture[str], *, of: str = "maskloss") -> None:
    """Run a section's commands of one program; compare their output with the page, where it shows output."""
    for block in re.findall(r"```\n(\$ .*?)```", section(title), re.DOTALL):
        if not block.startswith(f"$ {of} "):
            continue
        for command, *shown in (part.splitlines() for part in block[2:].split("\n$ ")):
            program, *words = shlex.split(command)
            if program == "maskloss":
                main(words)
            else:
                subprocess.run(
                    [sys.executable, "-m", f"{program}.cli", *words], check=True, capture_output=True
                )
            printed = capsys.readouterr().out.splitlines()
            assert not shown or printed == shown


def read(images: Path, annotations: Path) -> dict[str, list[tuple[str, BoolArray | None]]]:
    """Check that `check` finds no error; return the category and mask of each object, per image."""
    data, problems = check_data(images, annotations)
    assert data is not None
    assert [problem.text for problem in problems if problem.error] == []
    names = {category.id: category.name for category in data.categories}
    objects = {}
    for record in data.images:
        masks = record.object_masks().bitmaps().numpy().astype(bool)
        objects[record.file_name] = [
            (names[item.category_id], mask if item.has_mask else None)
            for item, mask in zip(record.objects, masks, strict=True)
        ]
    return objects


def assert_same(
    found: dict[str, list[tuple[str, BoolArray | None]]],
    expected: dict[str, list[tuple[str, BoolArray, float]]],
) -> None:
    assert found.keys() == expected.keys()
    for name, objects in expected.items():
        assert [category for category, _ in found[name]] == [category for category, *_ in objects], name
        for (_, mask), (_, truth, least) in zip(found[name], objects, strict=True):
            assert mask is not None
            assert iou(mask, truth) >= least


def write_yolo(labels: dict[str, list[tuple[int, Points]]], size: tuple[int, int] = (WIDTH, HEIGHT)) -> None:
    """Write a data set to the working directory, in the layout of Ultralytics."""
    write_images(Path("images/train"), tuple(labels), size)
    Path("labels/train").mkdir(parents=True)
    Path("data.yaml").write_text("train: images/train\nval: images/val\nnames:\n  0: nut\n  1: bolt\n")
    for name, objects in labels.items():
        lines = []
        for number, polygon in objects:
            points = np.array(polygon) / size
            if len(points) == 2:  # opposite corners: YOLO's box is a center and a size
                points = np.array([points.mean(0), points[1] - points[0]])
            lines.append(" ".join([str(number), *(f"{v:.6f}" for v in points.ravel())]) + "\n")
        if lines:
            (Path("labels/train") / name).with_suffix(".txt").write_text("".join(lines))


@pytest.fixture(autouse=True)
def working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in a temporary folder, because the paths on the page are relative."""
    monkeypatch.chdir(tmp_path)


@needs("supervision")
def test_yolo_labels_keep_every_object(capsys: pytest.CaptureFixture[str]) -> None:
    write_yolo(
        {
            "a.jpg": [(0, DISC), (1, TRIANGLE), (1, TINY), (0, [BOX[0], BOX[2]])],
            "b c.jpg": [(0, TWO_PARTS), (1, WITH_HOLE)],
            "empty.jpg": [],
        }
    )
    run_python(YOLO)
    run_commands(YOLO, capsys)
    expected = {
        "a.jpg": [
            ("nut", mask_of(DISC), 0.97),
            ("bolt", mask_of(TRIANGLE), 0.95),
            ("bolt", mask_of(TINY), 0.7),
            ("nut", mask_of(BOX), 0.94),
        ],
        "b c.jpg": [("nut", mask_of(LEFT, RIGHT), 0.92), ("bolt", mask_of(WITH_HOLE), 0.905)],
        "empty.jpg": [],
    }
    found = read(Path("images/train"), Path("train.json"))
    assert_same(found, expected)
    with_hole = found["b c.jpg"][1][1]
    assert with_hole is not None
    assert not with_hole[30, 130]
    assert f"IoU {iou(with_hole, mask_of(WITH_HOLE)):.2f} at 40 px" in text_of(YOLO)


@needs("supervision")
def test_a_yolo_object_within_a_pixel_keeps_its_box(capsys: pytest.CaptureFixture[str]) -> None:
    write_yolo({"a.jpg": [(0, DISC), (1, WITHIN_A_PIXEL)]})
    run_python(YOLO)
    main(["check", "--images", "images/train", "--annotations", "converted.json"])
    assert "annotation 2: has a box and no mask" in capsys.readouterr().out
    (disc, small) = read(Path("images/train"), Path("converted.json"))["a.jpg"]
    assert disc[1] is not None
    assert small == ("bolt", None)


def blobs(across: int, side: int) -> list[Points]:
    generator = np.random.default_rng(across)
    found = []
    for _ in range(300):
        angles = (np.arange(12) + generator.uniform(-0.3, 0.3, 12)) * math.pi / 6
        radii = across / 2 * generator.uniform(0.7, 1, 12)
        x, y = generator.uniform(60, side - 60, 2)
        found.append([(x + r * math.cos(a), y + r * math.sin(a)) for r, a in zip(radii, angles, strict=True)])
    return found


def mean_ious(annotations: Path, truth: dict[str, list[Points]], side: int) -> dict[str, float]:
    """Return mean IoUs by file name, for annotations in the order of the ground-truth polygons."""
    document = json.loads(annotations.read_text())
    means = {}
    for image in document["images"]:
        polygons = truth[Path(image["file_name"]).name]
        found = [a["segmentation"] for a in document["annotations"] if a["image_id"] == image["id"]]
        both = [
            [
                coco_mask.merge(coco_mask.frPyObjects(s, side, side))
                for s in (parts, [np.ravel(polygon).tolist()])
            ]
            for parts, polygon in zip(found, polygons, strict=True)
        ]
        ious = [coco_mask.iou([a], [b], [0])[0, 0] for a, b in both]
        means[Path(image["file_name"]).name] = float(np.mean(ious))
    return means


@pytest.mark.slow
@needs("supervision")
def test_mean_ious_of_supervision_on_the_page_are_right() -> None:
    said = {
        int(across): float(mean)
        for mean, across in re.findall(r"(0\.\d\d) at (96|32|16|8) px", text_of(YOLO))
    }
    assert said.keys() == {96, 32, 16, 8}
    truth = {f"{across}.jpg": blobs(across, 400) for across in said}
    write_yolo({name: [(0, polygon) for polygon in polygons] for name, polygons in truth.items()}, (400, 400))
    run_python(YOLO)
    means = mean_ious(Path("converted.json"), truth, 400)
    assert means == pytest.approx({f"{across}.jpg": mean for across, mean in said.items()}, abs=0.01)


def shape(label: str, points: Points, kind: str = "polygon", group: int | None = None) -> dict[str, Any]:
    return {
        "label": label,
        "points": points,
        "group_id": group,
        "shape_type": kind,
        "flags": {},
        "description": "",
    }


def write_labelme(shapes: dict[str, list[dict[str, Any]]], size: tuple[int, int] = (WIDTH, HEIGHT)) -> None:
    write_images(Path("photos"), tuple(shapes), size)
    for name, of_image in shapes.items():
        document = {"version": "5.5.0", "flags": {}, "shapes": of_image, "imagePath": name, "imageData": None,
                    "imageWidth": size[0], "imageHeight": size[1]}  # fmt: skip
        (Path("photos") / name).with_suffix(".json").write_text(json.dumps(document))


# A rectangle may start at any corner. Objects with different labels may share a group_id.
SHAPES = {
    "a.jpg": [
        shape("nut", DISC),
        shape("bolt", TRIANGLE),
        shape("bolt", TINY),
        shape("nut", [BOX[2], BOX[0]], "rectangle"),
    ],
    "b c.jpg": [shape("nut", LEFT, group=1), shape("bolt", DISC, group=1), shape("nut", RIGHT, group=1)],
    "empty.jpg": [],
}


@needs("supervision")
def test_labelme_files_keep_groups_and_rectangles(capsys: pytest.CaptureFixture[str]) -> None:
    write_labelme(SHAPES)
    assert "Skipped" not in run_python("labelme").stderr
    run_commands("labelme", capsys)
    expected = {
        "a.jpg": [
            ("nut", mask_of(DISC), 0.97),
            ("bolt", mask_of(TRIANGLE), 0.95),
            ("bolt", mask_of(TINY), 0.7),
            ("nut", mask_of(BOX), 0.94),
        ],
        "b c.jpg": [("nut", mask_of(LEFT, RIGHT), 0.97), ("bolt", mask_of(DISC), 0.97)],
        "empty.jpg": [],
    }
    assert_same(read(Path("photos"), Path("train.json")), expected)


@needs("supervision")
def test_labelme_circles_are_left_out_with_a_warning_and_images_without_json_are_not_listed() -> None:
    write_labelme({"a.jpg": [shape("nut", DISC), shape("nut", [(120, 90), (130, 90)], "circle")]})
    Image.new("RGB", (WIDTH, HEIGHT)).save("photos/new.jpg")
    assert "Skipped unsupported LabelMe shape type(s) ['circle']" in run_python("labelme").stderr
    found = read(Path("photos"), Path("train.json"))
    assert {name: len(objects) for name, objects in found.items()} == {"a.jpg": 1}


@needs("labelme2coco")
def test_labelme2coco_supports_circles_and_has_the_limits_on_the_page(
    capsys: pytest.CaptureFixture[str],
) -> None:
    center, edge = (120.0, 90.0), (132.0, 90.0)
    small = [shape("bolt", WITHIN_A_PIXEL), shape("bolt", [center, edge], "circle")]
    write_labelme({**SHAPES, "a.jpg": SHAPES["a.jpg"] + small})
    run_commands("labelme", capsys, of="labelme2coco")
    found = read(Path(), Path("dataset.json"))
    assert list(found) == [f"photos/{name}" for name in NAMES]
    categories = ["nut", "bolt", "bolt", "nut", "bolt"]
    assert [category for category, _ in found["photos/a.jpg"]] == categories  # without the one within a pixel
    rectangle, disc = (mask for _, mask in found["photos/a.jpg"][3:])
    assert rectangle is None
    assert disc is not None
    assert iou(disc, mask_of(circle(*center, 12))) > 0.9
    assert [category for category, _ in found["photos/b c.jpg"]] == ["nut", "bolt", "nut"]


@needs("labelme2coco")
def test_mean_ious_of_labelme2coco_on_the_page_are_right(capsys: pytest.CaptureFixture[str]) -> None:
    (said,) = re.findall(r"IoU (0\.\d\d) at 32 px, (0\.\d\d) at 8 px", text_of("labelme"))
    truth = {f"{across}.jpg": blobs(across, 400) for across in (32, 8)}
    write_labelme({name: [shape("nut", p) for p in polygons] for name, polygons in truth.items()}, (400, 400))
    run_commands("labelme", capsys, of="labelme2coco")
    means = mean_ious(Path("dataset.json"), truth, 400)
    assert means == pytest.approx({"32.jpg": float(said[0]), "8.jpg": float(said[1])}, abs=0.01)


def instances(*objects: tuple[int, BoolArray], dtype: type = np.uint16) -> Image.Image:
    pixels = np.zeros((HEIGHT, WIDTH), dtype=dtype)
    for value, mask in objects:
        pixels[mask] = value
    return Image.fromarray(pixels)


RING = mask_of(circle(130, 30, 20)) & ~mask_of(circle(130, 30, 9))
ONE_PIXEL = np.zeros((HEIGHT, WIDTH), dtype=bool)
ONE_PIXEL[100, 150] = True


def write_png_masks(*, hold_categories: bool) -> None:
    write_images(Path("images"))
    Path("masks").mkdir()
    first = 1000 if hold_categories else 1
    # The values need not be consecutive; those of 16 bits hold more than 255 objects.
    parts, ring, pixel = (first, first + 1, first + (1000 if hold_categories else 299))
    instances((parts, mask_of(LEFT, RIGHT)), (ring, RING), (pixel, ONE_PIXEL)).save("masks/a.png")
    if hold_categories:
        instances((first, mask_of(DISC)), (first + 1000, mask_of(TRIANGLE))).save("masks/b c.png")
    else:
        palette = instances((1, mask_of(DISC)), (2, mask_of(TRIANGLE)), dtype=np.uint8)
        palette.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
        palette.save("masks/b c.png")
    instances(dtype=np.uint8).save("masks/empty.png")


@pytest.mark.parametrize("hold_categories", [False, True])
def test_png_masks_are_exact(capsys: pytest.CaptureFixture[str], hold_categories: bool) -> None:
    write_png_masks(hold_categories=hold_categories)
    if hold_categories:
        run_python(
            PNG,
            ("category_id = 1  # or from the value, if it encodes the category: value // 1000",
             "category_id = value // 1000"),
            ('categories = [{"id": 1, "name": "nut"}]',
             'categories = [{"id": 1, "name": "nut"}, {"id": 2, "name": "bolt"}]'),
        )  # fmt: skip
    else:
        run_python(PNG)
        run_commands(PNG, capsys)
    other = "bolt" if hold_categories else "nut"
    expected = {
        "a.jpg": [("nut", mask_of(LEFT, RIGHT), 1.0), ("nut", RING, 1.0), (other, ONE_PIXEL, 1.0)],
        "b c.jpg": [("nut", mask_of(DISC), 1.0), (other, mask_of(TRIANGLE), 1.0)],
        "empty.jpg": [],
    }
    assert_same(read(Path("images"), Path("train.json")), expected)


def test_other_pages_link_to_this_one() -> None:
    root = PAGE.parents[1]
    assert "(other_formats.md)" in (root / "docs/annotation_tools.md").read_text()
    assert "(other_formats.md)" in (root / "docs/own_data.md").read_text()
