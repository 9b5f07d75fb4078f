"""The repair of a whole file: what it keeps, what it lists, and that its result is valid."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO

from maskloss.data.check import check_data
from maskloss.data.coco import read_coco
from maskloss.data.repair import annotation_file, repair
from maskloss.errors import InputError, RunError
from maskloss.files import write_text
from tests.data.coco_files import write_coco
from tests.data.repair.repaired_files import ids, repaired


def test_a_valid_file_is_not_changed(tmp_path: Path) -> None:
    document, listing = repaired(tmp_path, None)
    assert document == json.loads((tmp_path / "annotations.json").read_text())
    assert listing["repairs"] == []


def test_valid_fields_are_kept(tmp_path: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        document.update(info={"year": 2026}, licenses=[{"id": 4}], **{"$schema": [None]})
        document["images"][0].update(license=4, file_name="A.PNG")
        document["annotations"][0].update(bbox=None, keypoints=[1, 2, 2], attributes={"occluded": True})
        document["annotations"][1].update(category_id=99)
        document["categories"][0].update(supercategory="animal", skeleton=[[1, 2]])

    document, _ = repaired(tmp_path, change)
    assert document["info"] == {"year": 2026}
    assert document["licenses"] == [{"id": 4}]
    assert document["$schema"] == [None]
    assert document["images"][0] == {"id": 10, "file_name": "a.png", "width": 8, "height": 5, "license": 4}
    assert document["annotations"][0]["keypoints"] == [1, 2, 2]
    assert document["annotations"][0]["attributes"] == {"occluded": True}
    assert document["annotations"][0]["bbox"] == [2, 1, 2, 2]
    assert document["categories"][0] == {
        "id": 7,
        "name": "dog",
        "supercategory": "animal",
        "skeleton": [[1, 2]],
    }
    assert ids(document) == [101, 103]


def test_the_list_names_every_entry_by_kind(tmp_path: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        first = document["annotations"][0]
        document["annotations"] += [{**first, "id": 200 + i, "category_id": 99} for i in range(5)]
        document["images"][1]["file_name"] = "gone.png"
        document["annotations"].append({**first, "id": 300, "image_id": 20})

    document, listing = repaired(tmp_path, change)
    assert ids(document) == [101, 102, 103]
    assert ids(document, "images") == [10]
    found = {
        (entry["kind"], entry["section"], entry["change"]): [e["name"] for e in entry["entries"]]
        for entry in listing["repairs"]
    }
    assert found == {
        ("file_missing", "image", "left out"): ["image 20"],
        ("image_left_out", "annotation", "left out with their image"): ["annotation 300"],
        ("unknown_category", "annotation", "left out"): [f"annotation {200 + i}" for i in range(5)],
    }
    assert {entry["kind"]: entry["count"] for entry in listing["repairs"]}["unknown_category"] == 5


def test_the_list_is_removed_if_the_file_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_only_the_list(path: Path, text: str) -> None:
        if path.name == "fixed.json":
            raise RunError("no space left")
        write_text(path, text)

    monkeypatch.setattr(annotation_file, "write_text", write_only_the_list)
    with pytest.raises(RunError, match="no space left"):
        repair(*write_coco(tmp_path), tmp_path / "fixed.json")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["annotations.json", "images"]


@pytest.mark.parametrize("taken", ["fixed.json", "fixed.repairs.json"])
def test_nothing_is_overwritten(tmp_path: Path, taken: str) -> None:
    images, annotations = write_coco(tmp_path)
    (tmp_path / taken).write_text("mine")
    with pytest.raises(InputError, match="already exists; name another --output"):
        repair(images, annotations, tmp_path / "fixed.json")
    assert (tmp_path / taken).read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["annotations.json", "images", taken])


def test_the_input_is_never_the_output(tmp_path: Path) -> None:
    images, annotations = write_coco(tmp_path)
    with pytest.raises(InputError, match="already exists"):
        repair(images, annotations, annotations)


@pytest.mark.parametrize("seed", range(80))
def test_random_changes_end_in_a_valid_file_or_a_one_line_error(tmp_path: Path, seed: int) -> None:
    generator = random.Random(seed)
    junk = [None, True, 0, -1, 1.0, 2.5, float("nan"), 10**400, "", "10", [], {}, [[]], [1, 2], [[1, 2, 3, 4]],
            [[1, 2], [3, 4], [5, 6]], {"size": [5, 8], "counts": [11, 2, 27]}, {"size": [8, 5], "counts": [40]},
            "7", 2**63, float("inf"), "a" * 1200, ["2", "1", "4", "1", "4", "3"], "2,1,2,2", "http://x.org/a.png",
            "A.png", "x\\a.png", "..", [[2, 1, 20, 1, 20, 9]], [[1e9, 1, 2, 3, 4, 5]]]  # fmt: skip

    def change(document: dict[str, Any]) -> None:
        for _ in range(generator.randint(1, 3)):
            entry = generator.choice(
                document[generator.choice(["images", "annotations", "annotations", "categories"])]
            )
            entry[generator.choice(list(entry))] = generator.choice(junk)

    images, annotations = write_coco(tmp_path, change)
    _, problems = check_data(images, annotations)
    if any(problem.error for problem in problems if problem.kind != "no_usable_object"):
        with pytest.raises(InputError):
            read_coco(images, annotations)
    else:
        read_coco(images, annotations)
    try:
        repair(images, annotations, tmp_path / "fixed.json")
    except InputError:
        assert not (tmp_path / "fixed.json").exists()
        return
    _, problems = check_data(images, tmp_path / "fixed.json")
    assert [problem.text for problem in problems if problem.error] == []
    truth, data = COCO(str(tmp_path / "fixed.json")), read_coco(images, tmp_path / "fixed.json")
    for record in data.images:
        for annotation, mask in zip(record.objects, record.object_masks().bitmaps().numpy(), strict=True):
            if annotation.has_mask:
                assert np.array_equal(mask, truth.annToMask(truth.anns[annotation.id]))
    _, again = repair(images, tmp_path / "fixed.json", tmp_path / "again.json")
    assert again == []
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "fixed.json").read_bytes()
