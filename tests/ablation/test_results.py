"""Tests of `maskloss.ablation.results`: results.json, table.md and report.html, of a real sweep and of made-up runs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from maskloss.ablation.plan import Plan, Run
from maskloss.ablation.results import percent, write_page, write_results
from maskloss.ablation.running import Outcome
from maskloss.data.coco import read_coco
from tests.ablation.small_sweeps import VARIANTS
from tests.data.coco_files import HEIGHT, WIDTH, write_coco
from tests.training.small_runs import small_config

#: Runs of whole models, some of them in processes of their own.
pytestmark = pytest.mark.slow


def test_results_contain_the_metrics_and_costs_of_the_runs(swept):
    _, output, _ = swept
    results = json.loads((output / "results.json").read_text())
    assert results["baseline"] == "bce"
    for variant in ("bce", "dice"):
        run = results["variants"][variant]["runs"][0]
        folder = output / "runs" / variant / "seed-0"
        assert run["metrics"] == json.loads((folder / "metrics.json").read_text())
        first, second = map(json.loads, (folder / "history.jsonl").read_text().splitlines())
        assert run["seconds_per_step"] == pytest.approx(second["seconds"] - first["seconds"])
        assert 2**28 < run["peak_bytes"] < 2**36
        assert second["seconds"] < run["seconds"] < 1000
        assert results["variants"][variant]["summary"]["mask AP"]["mean"] == run["metrics"]["segm"]["AP"]
    assert results["variants"]["dice"]["changes"] == VARIANTS["dice"]
    table = (output / "table.md").read_text().splitlines()
    assert table[0].startswith("| variant | runs | box AP | mask AP | boundary AP | mask AP75 |")
    assert [line.split(" | ")[:2] for line in table[2:6]] == [
        ["| bce", "1"],
        ["| dice", "1"],
        ["| fails", "0 of 1, 1 failed"],
        ["| dies", "0 of 1, 1 failed"],
    ]
    assert "cannot tell: fewer than two common seeds" in table[3]
    assert "nothing to compare" in table[4]
    assert table[-1] == "Failed: dies, seed 0: its process exited with code 7"


def test_the_page_loads_nothing_from_elsewhere(swept):
    page = (swept[1] / "report.html").read_text()
    assert "<svg" in page
    addresses = re.findall(r"(?:src|href|url\()=?[\"'(]?([^\"')>\s]+)", page)
    assert all(address.startswith(("data:", "#")) for address in addresses), addresses
    assert "<script" not in page
    assert "dice" in page


# Made-up runs: two variants with two seeds each, and a third that fails.


CHANGES = {"base": {}, "mine": {"learning_rate": 0.5}, "fails": {"loss": "paper"}}


def metrics(ap: float) -> dict[str, Any]:
    return {
        "bbox": {"AP": ap / 2},
        "segm": {"AP": ap, "AP75": None, "APs": None, "APm": None, "APl": None},
        "boundary": {"AP": None},
    }


def outcome(ap: float, milliseconds: float, mebibytes: int) -> Outcome:
    return Outcome(
        None,
        metrics(ap),
        [{"step": 1, "loss": 1.0, "seconds": 0.1}, {"step": 2, "loss": 0.5, "seconds": 0.2}],
        seconds_per_step=milliseconds / 1000,
        peak_bytes=mebibytes * 2**20,
        seconds=90.0,
    )


@pytest.fixture
def made_up(tmp_path: Path) -> tuple[Path, Plan, dict[str, dict[int, Outcome]]]:
    """Make the folder, the plan and the outcomes of a sweep."""
    validation = read_coco(*write_coco(tmp_path))
    folder = tmp_path / "sweep"
    runs = tuple(
        Run(variant, seed, small_config(tmp_path, folder / "runs" / variant / f"seed-{seed}", seed=seed))
        for seed in (0, 1)
        for variant in CHANGES
    )
    for run in runs:
        run.config.output_folder.mkdir(parents=True)
    plan = Plan({"max_steps": 2}, CHANGES, "base", (0, 1), runs, 1.0, 0.0, validation, True)
    outcomes = {
        "base": {0: outcome(0.10, 10, 100), 1: outcome(0.30, 20, 300)},
        "mine": {0: outcome(0.25, 15, 200), 1: outcome(0.45, 35, 400)},
        "fails": {0: Outcome(failure="KeyError: <k>"), 1: Outcome(failure="KeyError: <k>")},
    }
    return folder, plan, outcomes


def test_the_table_has_means_spreads_differences_and_costs(made_up):
    folder, plan, outcomes = made_up
    write_results(folder, plan, outcomes)
    lines = (folder / "table.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[:5]]
    header = cells[0]
    assert header[:4] == ["variant", "runs", "box AP", "mask AP"]
    assert header[-4:] == ["mask AP minus base", "box AP minus base", "ms / step", "MiB"]
    base, mine, fails = (dict(zip(header, row, strict=True)) for row in cells[2:])
    # The mean of 10 and 30 is 20, and their standard deviation 10 times the root of 2.
    assert base["mask AP"] == "20.0 ± 14.1"
    assert base["box AP"] == "10.0 ± 7.1"
    assert base["mask AP75"] == "none"
    assert base["mask AP minus base"] == ""
    assert (base["ms / step"], base["MiB"]) == ("15", "200")
    # The difference is 15 percent on both seeds, so that every interval is a point.
    assert mine["mask AP"] == "35.0 ± 14.1"
    assert mine["mask AP minus base"] == "+15.0 [+15.0, +15.0] ±0.0 better"
    assert mine["box AP minus base"] == "+7.5 [+7.5, +7.5] ±0.0 better"
    assert (mine["ms / step"], mine["MiB"]) == ("25", "300")
    assert fails["runs"] == "0 of 2, 2 failed"
    assert fails["mask AP minus base"] == "nothing to compare"
    assert fails["MiB"] == ""
    assert "over seeds 0, 1" in lines[6]
    # Four runs of 90 s.
    assert "All runs together took 6 minutes." in lines[6]
    assert [line for line in lines if line.startswith("Failed")] == [
        "Failed: fails, seed 0: KeyError: <k>",
        "Failed: fails, seed 1: KeyError: <k>",
    ]


def test_results_json_has_every_run_and_summary(made_up):
    folder, plan, outcomes = made_up
    write_results(folder, plan, outcomes)
    document = json.loads((folder / "results.json").read_text())
    assert (document["baseline"], document["seeds"]) == ("base", [0, 1])
    assert set(document["environment"]) == {"python", "torch", "torchvision", "device", "threads"}
    assert {name: variant["changes"] for name, variant in document["variants"].items()} == CHANGES
    mine = document["variants"]["mine"]
    assert mine["milliseconds_per_step"] == pytest.approx(25)
    assert mine["peak_mebibytes"] == 300
    assert [run["metrics"] for run in mine["runs"]] == [metrics(0.25), metrics(0.45)]
    assert mine["summary"]["mask AP"]["mean"] == pytest.approx(0.35)
    assert mine["summary"]["mask AP"]["difference"]["mean"] == pytest.approx(0.15)
    failed = document["variants"]["fails"]
    assert failed["milliseconds_per_step"] is None
    assert failed["summary"]["mask AP"] == {"mean": None, "deviation": None, "difference": None}
    assert failed["runs"][0]["failure"] == "KeyError: <k>"
    assert failed["runs"][0]["metrics"] is None


def test_an_unfinished_sweep_has_results_of_the_runs_so_far(made_up):
    folder, plan, outcomes = made_up
    del outcomes["mine"][1], outcomes["fails"][0], outcomes["fails"][1]
    write_results(folder, plan, outcomes)
    rows = [line.split(" | ") for line in (folder / "table.md").read_text().splitlines()[2:5]]
    assert [row[:2] for row in rows] == [["| base", "2"], ["| mine", "1 of 2"], ["| fails", "0 of 2"]]
    assert "cannot tell: fewer than two common seeds with the baseline" in rows[1]
    write_page(folder, plan, outcomes)


def test_the_page_has_the_values_of_the_table(made_up):
    folder, plan, outcomes = made_up
    page = write_page(folder, plan, outcomes)
    assert page == folder / "report.html"
    text = re.sub(r"<[^>]*>|\s+", " ", page.read_text())
    text = re.sub(r"\s+", " ", text)
    assert "+15.0" in text
    assert "+15.0 to +15.0" in text
    # Drawn, too, where there is a difference: not for the variant that failed.
    drawn = page.read_text()
    drawn = drawn[drawn.index("<h2>Differences to base</h2>") :]
    drawn = drawn[: drawn.index("</svg>")]
    assert "<!-- mask AP minus base -->" in drawn
    assert "<!-- mine -->" in drawn
    assert "<!-- fails -->" not in drawn
    # Medians with their ranges.
    assert "25 (15 to 35)" in text
    assert "300 (200 to 400)" in text
    assert "KeyError: &lt;k&gt;" in text
    assert "learning_rate: 0.5" in text
    assert "mask AP75" not in text


def test_percent_of_no_value_is_none():
    assert percent(None) == "none"
    assert percent(0.1234) == "12.3"


def result(x1: int, x2: int, category: int = 7, score: float = 0.9) -> dict[str, Any]:
    """Make a detection of the columns x1 to x2 of rows 1 and 2 in image 10."""
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8, order="F")
    mask[1:3, x1:x2] = 1
    rle = coco_mask.encode(mask)
    rle["counts"] = rle["counts"].decode()
    return {
        "image_id": 10,
        "category_id": category,
        "bbox": [x1, 1, x2 - x1, 2],
        "score": score,
        "segmentation": rle,
    }


def write_detections(plan: Plan, variant: str, detections: list[dict[str, Any]]) -> None:
    run = next(run for run in plan.runs if (run.variant, run.seed) == (variant, 0))
    (run.config.output_folder / "results.json").write_text(json.dumps(detections))


def captions(page: Path) -> list[str]:
    return re.findall(r"(?:base|mine|fails) \(\d\.\d\d\)", page.read_text())


def test_images_on_which_variants_differ_are_shown_with_their_coverage(made_up):
    folder, plan, outcomes = made_up
    # Both objects are columns 2 and 3, one of category 7 and one of 3. The detection of columns 2 to 5 has an IoU of a
    # half with the first, and the other one is of no use: its score is too low.
    write_detections(plan, "base", [result(2, 6), result(2, 4, category=3, score=0.4)])
    write_detections(plan, "mine", [result(2, 4), result(2, 4, category=3)])
    page = write_page(folder, plan, outcomes)
    assert list(dict.fromkeys(captions(page))) == ["base (0.25)", "mine (1.00)"]
    assert "a.png, ground truth" in page.read_text()
    assert "nested/b.png" not in page.read_text()


@pytest.mark.parametrize("why", ["equal", "one variant", "other images", "broken"])
def test_no_images_are_shown_where_nothing_can_be_compared(made_up, why):
    folder, plan, outcomes = made_up
    write_detections(plan, "base", [result(2, 4)])
    if why != "one variant":
        write_detections(plan, "mine", [result(2, 4) if why == "equal" else result(2, 6)])
    if why == "other images":
        plan = Plan(**{**vars(plan), "one_validation": False})
    if why == "broken":
        (plan.runs[1].config.output_folder / "results.json").write_text("{")
    page = write_page(folder, plan, outcomes)
    assert captions(page) == []
    assert "data:image" not in page.read_text()
