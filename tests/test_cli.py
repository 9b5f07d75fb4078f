"""End-to-end tests of the command line, in process: files, output and errors."""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

import maskloss
from maskloss import cli
from maskloss.cli import main
from maskloss.training.config import TrainConfig
from maskloss.training.trainer import Trainer
from tests.data.coco_files import write_coco
from tests.training.small_runs import STATISTICS, TERMS, files, history, largest_file, narrow_models

COMMANDS = ("demo", "shapes", "check", "repair", "subset", "train", "evaluate", "predict", "export", "ablate")


@pytest.fixture(autouse=True, scope="module")
def _narrow() -> Iterator[None]:
    with narrow_models():
        yield


def run(*arguments: Any) -> None:
    main([str(argument) for argument in arguments])


def failed(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str]:
    """Run a command that fails; return its exit code and its one line on stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        run(*arguments)
    text = capsys.readouterr().err
    assert "Traceback" not in text
    assert len(text.splitlines()) == 1, text
    assert isinstance(caught.value.code, int)
    return caught.value.code, text.rstrip("\n")


def pixels(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


# One data set, one trained model, one evaluation and one prediction for all tests.


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    run("shapes", "--output", folder / "train", "--images", 4, "--size", 64)
    run("shapes", "--output", folder / "val", "--images", 2, "--size", 64, "--seed", 1)
    return folder


def train_options(data: Path, output: Path) -> list[Any]:
    options: list[Any] = ["train", "--output", output]
    for part in ("train", "val"):
        options += [f"--{part}-images", data / part / "images"]
        options += [f"--{part}-annotations", data / part / "annotations.json"]
    small = "--model resnet18 --min-size 64 --max-size 64 --workers 0 --device cpu --warmup-steps 1"
    return [*options, *small.split()]


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("trained") / "run"
    run(
        *train_options(data, output),
        "--max-steps",
        3,
        "--batch-size",
        2,
        "--loss",
        "aligned",
        "--log-every",
        2,
    )
    return output


@pytest.fixture(scope="module")
def predicted(data: Path, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("predicted") / "out"
    images = sorted((data / "val/images").iterdir())
    run("predict", "--checkpoint", trained / "model.safetensors", "--output", output, "--score-threshold", 0.05,
        "--device", "cpu", *images)  # fmt: skip
    return output


# shapes, check, subset


def test_shapes_writes_images_and_annotations_and_prints_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("shapes", "--output", tmp_path / "out", "--images", 3, "--size", 48, "--seed", 2)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["annotations.json", "images"]
    pictures = sorted((tmp_path / "out/images").iterdir())
    assert [pixels(path).size for path in pictures] == [(48, 48)] * 3
    assert capsys.readouterr().out == f"{tmp_path / 'out'}: 3 images of 48 x 48 px\n"


def test_check_of_valid_data_prints_the_counts_and_exits_with_0(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("check", "--images", data / "train/images", "--annotations", data / "train/annotations.json")
    objects = len(json.loads((data / "train/annotations.json").read_text())["annotations"])
    out = capsys.readouterr().out.splitlines()
    assert out[-2:][0] == f"4 images, {objects} objects, 3 categories, 0 crowds"
    assert out[-1].startswith("0 errors, ")


def test_check_of_invalid_data_lists_every_problem_and_exits_with_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def change(document: dict[str, Any]) -> None:
        document["annotations"][0]["bbox"] = [2, 1, 0, 2]
        document["annotations"][1]["category_id"] = 99

    images, annotations = write_coco(tmp_path, change)
    with pytest.raises(SystemExit) as caught:
        run("check", "--images", images, "--annotations", annotations)
    assert caught.value.code == 1
    captured = capsys.readouterr()
    out = captured.out.splitlines()
    assert out[0].startswith(f"error: {annotations}: annotation 102: category_id 99")
    assert out[1].startswith(f"warning: {annotations}: annotation 101: bbox has a side")
    # Only the crowd is left, which follows from the others.
    assert out[2].startswith(f"warning: {annotations}: 1 of 1 annotations")
    assert out[-1] == "1 errors, 2 warnings"
    assert captured.err == ""


def test_check_all_lists_every_case(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def change(document: dict[str, Any]) -> None:
        first = document["annotations"][0]
        document["annotations"] += [{**first, "id": 200 + i, "category_id": 99} for i in range(5)]

    images, annotations = write_coco(tmp_path, change)
    for option, listed in ((), 3), (("--all",), 5):
        with pytest.raises(SystemExit):
            run("check", "--images", images, "--annotations", annotations, *option)
        out = capsys.readouterr().out
        assert sum(f"annotation {200 + i}: category_id 99" in out for i in range(5)) == listed


def test_repair_prints_its_changes_and_check_passes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, annotations = write_coco(tmp_path, lambda d: d["annotations"][1].update(category_id=99))
    source = ["--images", images, "--annotations", annotations]
    run("repair", *source, "--output", tmp_path / "fixed.json", "--boxes", "from-masks", "--crowds", "keep")
    out = capsys.readouterr().out.splitlines()
    assert out[0] == (
        "1 annotation: left out (annotation 102: category_id 99 is not in the file (image 10, a.png))"
    )
    assert out[-1] == str(tmp_path / "fixed.json")
    run("check", "--images", images, "--annotations", tmp_path / "fixed.json")
    assert capsys.readouterr().out.splitlines()[-1].startswith("0 errors, ")
    with pytest.raises(SystemExit) as caught:
        run("repair", *source, "--output", tmp_path / "fixed.json")
    assert caught.value.code == 2
    assert "fixed.json: already exists; name another --output" in capsys.readouterr().err


def test_check_of_a_file_that_is_not_coco_exits_with_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, annotations = write_coco(tmp_path)
    annotations.write_text("{")
    with pytest.raises(SystemExit) as caught:
        run("check", "--images", images, "--annotations", annotations)
    assert caught.value.code == 1
    assert capsys.readouterr().out.splitlines()[-1] == "1 errors, 0 warnings"


def test_check_prints_a_name_that_is_not_valid_unicode(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Half of a surrogate pair is JSON, and no encoding can print it as it is.
    images, annotations = write_coco(tmp_path, lambda d: d["images"][0].update(file_name="\ud800.png"))
    with pytest.raises(SystemExit) as caught:
        run("check", "--images", images, "--annotations", annotations)
    assert caught.value.code == 1
    assert "image 10" in capsys.readouterr().out


def test_subset_copies_the_requested_images(data: Path, tmp_path: Path) -> None:
    source = ["--images", data / "train/images", "--annotations", data / "train/annotations.json"]
    run(
        "subset", *source, "--output", tmp_path / "out", "--max-images", 2, "--categories", "circle, triangle"
    )
    document = json.loads((tmp_path / "out/annotations.json").read_text())
    assert [category["name"] for category in document["categories"]] == ["circle", "triangle"]
    assert 1 <= len(document["images"]) <= 2
    names = {image["file_name"] for image in document["images"]}
    assert names == {path.name for path in (tmp_path / "out/images").iterdir()}
    assert {annotation["category_id"] for annotation in document["annotations"]} <= {1, 3}


# train


def test_subset_warns_of_unusual_input(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = json.loads((data / "train/annotations.json").read_text())
    for annotation in document["annotations"]:
        annotation["iscrowd"] = None
    annotations = tmp_path / "annotations.json"
    annotations.write_text(json.dumps(document))
    run("subset", "--images", data / "train/images", "--annotations", annotations, "--output", tmp_path / "part",
        "--max-images", 1)  # fmt: skip
    assert "warning: " in (said := capsys.readouterr().err)
    assert "iscrowd" in said


def test_train_writes_every_file_of_the_contract(trained: Path) -> None:
    names = {path.name for path in trained.iterdir()}
    assert {
        "model.safetensors",
        "checkpoints",
        "metrics.json",
        "history.jsonl",
        "config.yaml",
        "report.html",
    } <= names
    assert not [name for name in files(trained) if name.endswith(".tmp")]


def test_train_logs_the_terms_of_the_contract(trained: Path) -> None:
    lines = history(trained)
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(set(line) == {"step", "loss", *TERMS, "learning_rate"} for line in lines)


def test_train_writes_the_metrics_of_the_contract(trained: Path) -> None:
    metrics = json.loads((trained / "metrics.json").read_text())
    assert list(metrics) == ["bbox", "segm", "boundary", "classes", "loss"]
    assert tuple(metrics["bbox"]) == tuple(metrics["segm"]) == tuple(metrics["boundary"]) == STATISTICS
    assert set(metrics["loss"]) == {"loss", *TERMS}


def test_train_prints_the_metrics_and_the_path_of_the_report(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(*train_options(data, tmp_path / "run"), "--max-steps", 1, "--batch-size", 1)
    out = capsys.readouterr().out
    assert re.search(r"^     box: AP \d\.\d{3}  AP50 ", out, re.MULTILINE)
    assert re.search(r"^    mask: AP \d\.\d{3}  AP50 .*APl none  AR \d\.\d{3}$", out, re.MULTILINE)
    assert out.endswith(f"report: {tmp_path / 'run' / 'report.html'}\n")


def test_the_saved_config_repeats_the_run(trained: Path, tmp_path: Path) -> None:
    run("train", "--config", trained / "config.yaml", "--output", tmp_path / "run")
    assert history(tmp_path / "run") == history(trained)


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_during_training_saves_the_step(
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    code: int,
) -> None:
    command = [*train_options(data, tmp_path / "run"), "--max-steps", 3, "--batch-size", 1]
    real = Trainer.take_step

    def signaled(trainer: Trainer, learning_rate: float) -> Any:
        if trainer.step == 1:
            signal.raise_signal(getattr(signal, name))
        return real(trainer, learning_rate)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "take_step", signaled)
        with pytest.raises(SystemExit) as ended:
            run(*command)
    assert ended.value.code == code
    assert "interrupted after step 2" in capsys.readouterr().err
    assert (tmp_path / "run/model.safetensors").exists()
    if name == "SIGTERM":  # tests/training/test_loop.py resumes runs after SIGINT
        run(*command, "--resume")
        run(*command[:2], tmp_path / "whole", *command[3:])
        # Log lines before an interruption are kept.
        assert history(tmp_path / "run")[-1] == history(tmp_path / "whole")[-1]


def test_option_overrides_the_config(trained: Path, tmp_path: Path) -> None:
    run("train", "--config", trained / "config.yaml", "--output", tmp_path / "run", "--max-steps", 1)
    assert [line["step"] for line in history(tmp_path / "run")] == [1]


NESTED: dict[str, Any] = {
    "class_path": "maskloss.losses.WeightedSum",
    "init_args": {
        "terms": [
            {"class_path": "maskloss.losses.MaskBCELoss"},
            {"class_path": "maskloss.losses.MaskDiceLoss", "init_args": {"smooth": 2.0}},
        ],
        "weights": [1.0, 0.5],
    },
}


BOX = {"class_path": "maskloss.losses.BoxSmoothL1Loss", "init_args": {"beta": 1.0}}


@pytest.mark.parametrize("way", ["a file", "the command line", "a file and an option"])
def test_a_loss_of_nested_objects_is_read(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    # jsonargparse would check and build the objects itself, and refuse nested ones.
    options: list[Any] = train_options(data, tmp_path / "run")
    if way == "the command line":
        options += ["--loss.mask", json.dumps(NESTED)]
    else:
        (tmp_path / "loss.yaml").write_text(yaml.safe_dump({"loss": {"mask": NESTED}}))
        options[1:1] = ["--config", tmp_path / "loss.yaml"]
    if way == "a file and an option":
        options += ["--loss.box", json.dumps(BOX)]
    configs: list[TrainConfig] = []
    monkeypatch.setattr(cli, "_train_and_report", configs.append)
    run(*options)
    assert configs[0].loss == {"mask": NESTED} | ({"box": BOX} if way == "a file and an option" else {})
    mask: Any = configs[0].make_loss().mask
    assert mask.terms[1].smooth == 2.0


def test_the_config_of_a_run_with_a_loss_of_nested_objects_repeats_it(data: Path, tmp_path: Path) -> None:
    (tmp_path / "loss.yaml").write_text(yaml.safe_dump({"loss": {"mask": NESTED}}))
    options = train_options(data, tmp_path / "run")
    run(*options, "--config", tmp_path / "loss.yaml", "--max-steps", 1, "--batch-size", 1)
    run("train", "--config", tmp_path / "run/config.yaml", "--output", tmp_path / "again")
    assert history(tmp_path / "again") == history(tmp_path / "run")


def test_options_with_underscores_are_accepted(data: Path, tmp_path: Path) -> None:
    options = [str(o).replace("-", "_").replace("__", "--") for o in train_options(Path("data"), Path("run"))]
    options = [*options[:2], str(tmp_path / "run"), *options[3:]]
    for index, option in enumerate(options):
        if option.startswith("data"):
            options[index] = str(data / Path(option).relative_to("data"))
    assert "--train_images" in options
    run(*options, "--max_steps=1", "--batch_size=1")
    assert (tmp_path / "run/model.safetensors").exists()


def test_resume_accepts_the_same_command_again(data: Path, tmp_path: Path) -> None:
    command = [*train_options(data, tmp_path / "run"), "--max-steps", 2, "--batch-size", 1]
    run(*command)
    before = history(tmp_path / "run")
    run(*command, "--resume")
    assert history(tmp_path / "run") == before


# evaluate


def test_evaluate_returns_the_final_metrics_of_training(
    data: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("evaluate", "--checkpoint", trained / "model.safetensors", "--images", data / "val/images",
        "--annotations", data / "val/annotations.json", "--output", tmp_path / "out", "--device", "cpu")  # fmt: skip
    found = json.loads((tmp_path / "out/metrics.json").read_text())
    assert found == json.loads((trained / "metrics.json").read_text())
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "out/metrics.json")


def test_evaluate_accepts_unusual_input_with_one_warning_on_stderr(
    data: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = json.loads((data / "val/annotations.json").read_text())
    spoilt = [a for a in document["annotations"] if isinstance(a["segmentation"], list)]
    for annotation in spoilt:
        annotation["segmentation"].append([1, 1, 2, 2])
    (tmp_path / "spoilt.json").write_text(json.dumps(document))
    run("evaluate", "--checkpoint", trained / "model.safetensors", "--images", data / "val/images",
        "--annotations", tmp_path / "spoilt.json", "--output", tmp_path / "out", "--device", "cpu")  # fmt: skip
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(warnings) == 1
    assert f"{len(spoilt)} annotations lose their degenerate polygons and keep the others" in warnings[0]


# predict


def test_predict_writes_a_png_of_each_images_size(data: Path, predicted: Path) -> None:
    for path in (data / "val/images").iterdir():
        with Image.open(predicted / path.name) as picture:
            assert picture.format == "PNG"
            assert picture.size == (64, 64)
    assert {path.suffix for path in predicted.iterdir()} == {".png", ".json", ".csv"}


def test_predictions_are_drawn(data: Path, predicted: Path) -> None:
    results = json.loads((predicted / "results.json").read_text())
    for path in (data / "val/images").iterdir():
        if any(result["file_name"] == path.name for result in results):
            assert pixels(predicted / path.name).tobytes() != pixels(path).tobytes()


def test_results_load_in_pycocotools(data: Path, predicted: Path) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(data / "val/annotations.json"))
        found = truth.loadRes(str(predicted / "results.json"))
    annotations = list(found.anns.values())
    assert annotations
    assert {annotation["category_id"] for annotation in annotations} <= {1, 2, 3, 4}
    assert all(found.annToMask(annotation).shape == (64, 64) for annotation in annotations)


def test_results_are_detections_above_the_threshold_with_masks_inside_their_boxes(predicted: Path) -> None:
    results = json.loads((predicted / "results.json").read_text())
    assert all(0.05 <= result["score"] <= 1 for result in results)
    for result in results:
        x, y, width, height = coco_mask.toBbox(result["segmentation"])
        if width:
            left, top, right, bottom = result["bbox"][0], result["bbox"][1], 0, 0
            right, bottom = left + result["bbox"][2], top + result["bbox"][3]
            # Masks are pasted with a border of one cell of 28 around the box.
            cell = max(result["bbox"][2:]) / 28 + 1
            assert x >= left - cell
            assert y >= top - cell
            assert x + width <= right + cell
            assert y + height <= bottom + cell


def test_two_images_with_the_same_name_get_two_pictures(data: Path, trained: Path, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        shutil.copy(data / "val/images/000001.png", tmp_path / folder / "x.png")
    run("predict", "--checkpoint", trained / "model.safetensors", "--output", tmp_path / "out",
        tmp_path / "a/x.png", tmp_path / "b/x.png")  # fmt: skip
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "objects.csv",
        "results.json",
        "x-2.png",
        "x.png",
    ]


def test_predict_writes_tables_cut_outs_and_label_maps_of_a_folders_images(
    data: Path, trained: Path, tmp_path: Path
) -> None:
    run("predict", "--checkpoint", trained, "--output", tmp_path / "out", "--score-threshold", 0.05, "--tile", 64,
        data / "val/images", "--crops", "--label-maps")  # fmt: skip
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results
    assert len((tmp_path / "out/objects.csv").read_text().splitlines()) == len(results) + 1
    names = sorted(path.name for path in (data / "val/images").iterdir())
    assert sorted(path.name for path in (tmp_path / "out/labels").iterdir()) == names
    assert len(list((tmp_path / "out/crops").iterdir())) <= len(results)


@pytest.mark.parametrize(
    ("option", "existing"), [("--label-maps", "labels/000001.png"), ("--crops", "crops/mine.png")]
)
def test_predict_overwrites_no_label_map_or_crop(
    data: Path,
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    option: str,
    existing: str,
) -> None:
    """Data sets often have their annotations in a folder named labels."""
    mine = tmp_path / "out" / existing
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"mine")
    code, text = failed(
        capsys,
        "predict",
        "--checkpoint",
        trained,
        "--output",
        tmp_path / "out",
        option,
        data / "val/images/000001.png",
    )
    assert code == 2
    expected = f"{mine}: already" if option == "--label-maps" else f"{mine.parent}: is not an empty folder"
    assert expected in text
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == [mine]
    assert mine.read_bytes() == b"mine"


def test_predict_says_that_no_detection_reaches_the_threshold(
    data: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("predict", "--checkpoint", trained, "--output", tmp_path / "out", "--score-threshold", 1,
        data / "val/images")  # fmt: skip
    assert "no detection reaches its score threshold (1.00 or more)" in capsys.readouterr().err
    assert json.loads((tmp_path / "out/results.json").read_text()) == []


def test_predict_leaves_out_an_unreadable_image_among_others(
    data: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.png").write_bytes(b"no image")
    first, last = (data / "val/images" / name for name in ("000001.png", "000002.png"))
    with pytest.raises(SystemExit) as ended:
        run("predict", "--checkpoint", trained / "model.safetensors", "--output", tmp_path / "out",
            "--score-threshold", 0.05, first, tmp_path / "bad.png", last)  # fmt: skip
    assert ended.value.code == 2
    warning, error = capsys.readouterr().err.splitlines()
    assert warning.startswith(f"warning: {tmp_path / 'bad.png'}: not a readable image")
    assert error == "maskloss: error: 1 of 3 images are left out, because of the faults above"
    assert (tmp_path / "out/000001.png").is_file()
    assert (tmp_path / "out/000002.png").is_file()
    assert {result["image_id"] for result in json.loads((tmp_path / "out/results.json").read_text())} <= {
        1,
        3,
    }


def test_predict_refuses_one_unreadable_image_in_one_line(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.png").write_bytes(b"no image")
    command = ["predict", "--checkpoint", trained, "--output", tmp_path / "out", tmp_path / "bad.png"]
    code, text = failed(capsys, *command)
    assert code == 2
    assert text.startswith(f"maskloss: error: {tmp_path / 'bad.png'}: not a readable image")
    assert not (tmp_path / "out/results.json").exists()


# Errors: one line on stderr, exit code 2, no traceback.


def test_no_command_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    code, text = failed(capsys)
    assert code == 2
    assert text.startswith("maskloss: error: ")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["fly"], ["fly"]),
        (["shapes", "--output", "x", "--images", "3", "--colour", "red"], ["--colour"]),
        (["shapes", "--images", "3"], ["output"]),
        (["shapes", "--output", "x", "--images", "many"], ["images", "many"]),
        (["shapes", "--output", "x", "--images", "2.5"], ["images", "2.5"]),
        (["shapes", "--output", "x", "--images", "0"], ["--images must be at least 1, got 0"]),
        (["shapes", "--output", "x", "--images", "1", "--size", "8"], ["--size must be at least 32 px"]),
        (["shapes", "--output", "x", "--images"], ["--images"]),
        (["train", "--output", "x"], ["train-images"]),
        (["train", "--max-steps", "ten"], ["max-steps", "ten"]),
        (["evaluate", "--checkpoint", "m", "--images", ".", "--annotations", "a", "--output", "x", "--device", "tpu"],
         ["--device must be cpu, cuda, cuda:1, mps or auto, not 'tpu'"]),
        (["predict", "--checkpoint", "m", "--output", "x"], ["IMAGE"]),
        (["predict", "--checkpoint", "m", "--output", "x", "--score-threshold", "2", "a.png"],
         ["--score-threshold must be in [0, 1], got 2"]),
        (["predict", "--checkpoint", "m", "--output", "x", "--tile", "8", "a.png"], ["--tile must be in 64 to 65,535"]),
        (["predict", "--checkpoint", "missing.safetensors", "--output", "x", "a.png"],
         ["missing.safetensors: cannot be read"]),
        (["check", "--images", ".", "--annotations", "missing.json"], ["missing.json: cannot be read"]),
        (["check", "--images", "missing", "--annotations", "x.json"], ["missing: the folder of images does not"]),
        (["train", "--config", "missing.yaml"], ["missing.yaml"]),
    ],
    ids=lambda value: " ".join(value)[:60],
)  # fmt: skip
def test_invalid_arguments_print_one_line_that_names_them(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    parts: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    code, text = failed(capsys, *arguments)
    assert code == 2
    for part in parts:
        assert part in text
    assert not re.search(r"--\w+_", text), "an option with an underscore"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--loss", "focal"], "--loss 'focal': no such preset; available: torchvision, detectron2"),
        (["--learning-rate", "-1"], "--learning-rate must be a finite number > 0, got -1.0"),
        (["--max-steps", "0"], "--max-steps must be at least 1, got 0"),
        (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (
            ["--model", "resnet99"],
            "--model must be one of maskrcnn_resnet50_fpn, maskrcnn_resnet50_fpn_v2, resnet18",
        ),
        (["--model", "my.own"], "--model 'my.own': cannot be imported: No module named 'my'"),
        (["--mask-branch", "my.own"], "--mask-branch 'my.own': cannot be imported: No module named 'my'"),
        (["--weights", "missing.pt"], "missing.pt: cannot be read: No such file or directory"),
        (["--train-annotations", "missing.json"], "missing.json: cannot be read: No such file or directory"),
        (["--val-images", "missing"], "missing: the folder of images does not exist"),
        (["--mixed-precision", "fp16"], "--mixed-precision fp16 needs a GPU"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_invalid_options_of_train_print_one_line_that_names_them(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], part: str
) -> None:
    code, text = failed(capsys, *train_options(data, tmp_path / "run"), *options)
    assert code == 2
    assert text.startswith("maskloss: error: ")
    assert part in text
    assert files(tmp_path) == {}


def test_cuda_without_a_device_is_an_error(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, text = failed(capsys, *train_options(data, tmp_path / "run"), "--device", "cuda")
    assert code == 2
    assert text == "maskloss: error: --device cuda: torch finds no CUDA device on this machine"


@pytest.mark.parametrize("command", ["train", "evaluate", "predict", "shapes", "subset", "demo"])
def test_an_output_that_cannot_be_written_is_an_error(
    command: str, data: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    output = tmp_path / "file" / "out"
    source = ["--images", data / "val/images", "--annotations", data / "val/annotations.json"]
    checkpoint = ["--checkpoint", trained / "model.safetensors"]
    arguments = {
        "train": train_options(data, output),
        "evaluate": ["evaluate", *checkpoint, *source, "--output", output],
        "predict": ["predict", *checkpoint, "--output", output, data / "val/images/000001.png"],
        "shapes": ["shapes", "--output", output, "--images", 1],
        "subset": ["subset", *source, "--output", output, "--max-images", 1],
        "demo": ["demo", "--output", output],
    }[command]
    code, text = failed(capsys, *arguments)
    assert code == 2
    assert text.startswith(f"maskloss: error: {output}")
    assert "cannot be created: Not a directory" in text
    assert (tmp_path / "file").read_text() == "mine"


def test_a_config_with_an_unknown_key_is_an_error_that_names_it(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = yaml.safe_load((trained / "config.yaml").read_text())
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**saved, "learning_rat": 1.0}))
    code, text = failed(capsys, "train", "--config", tmp_path / "config.yaml", "--output", tmp_path / "run")
    assert code == 2
    assert "learning_rat" in text


@pytest.mark.parametrize("content", ["{", "max_steps: ten", "- 1", "train_images: [a", "\0"])
def test_invalid_config_file_is_an_error(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    (tmp_path / "config.yaml").write_text(content)
    options = train_options(data, tmp_path / "run")
    code, _ = failed(capsys, "train", "--config", tmp_path / "config.yaml", *options[1:])
    assert code == 2


def test_folder_that_contains_a_run_is_an_error(
    data: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(trained)
    code, text = failed(capsys, *train_options(data, trained))
    assert code == 2
    assert f"{trained}: already holds a run" in text
    assert "give --resume" in text
    assert files(trained) == before


def test_evaluate_and_predict_overwrite_nothing(
    data: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = ["--checkpoint", trained / "model.safetensors", "--output", tmp_path]
    for name in ("metrics.json", "results.json"):
        (tmp_path / name).write_text("mine")
    source = ["--images", data / "val/images", "--annotations", data / "val/annotations.json"]
    for arguments, name in (
        (["evaluate", *checkpoint, *source], "metrics.json"),
        (["predict", *checkpoint, data / "val/images/000001.png"], "results.json"),
    ):
        code, text = failed(capsys, *arguments)
        assert code == 2
        assert text == f"maskloss: error: {tmp_path / name}: already exists; name another --output"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.json", "results.json"]


def test_predict_does_not_draw_over_the_photo_itself(
    data: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo = tmp_path / "photo.png"
    shutil.copy(data / "val/images/000001.png", photo)
    before = photo.read_bytes()
    checkpoint = ["--checkpoint", trained / "model.safetensors", "--output", tmp_path]
    code, text = failed(capsys, "predict", *checkpoint, data / "val/images/000002.png", photo)
    assert code == 2
    assert text == f"maskloss: error: {photo}: already exists; name another --output"
    assert photo.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["photo.png"]


def test_closed_pipe_prints_no_traceback(data: Path) -> None:
    check = f"{sys.executable} -m maskloss check --images {data}/val/images --annotations {data}/val/annotations.json"
    # Close the pipe before anything is written to it.
    ended = subprocess.run(
        ["bash", "-c", f"{check} | true"], capture_output=True, text=True, cwd=Path(__file__).parents[1]
    )
    assert ended.stderr == ""


def test_an_unreadable_image_is_named_even_from_a_worker(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(data, tmp_path / "data")
    for path in (tmp_path / "data/train/images").iterdir():
        path.write_bytes(path.read_bytes()[:200])
    options = train_options(tmp_path / "data", tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch:
        # Python 3.12 and later warn of forking a process that has threads.
        patch.setenv("PYTHONWARNINGS", "ignore")
        code, text = failed(capsys, *options, "--workers", 1)
    assert code == 2
    # A long path is shortened at its beginning.
    assert re.match(r"maskloss: error: .*/images/00000\d\.png: not a readable image", text)


def test_loss_that_becomes_nan_exits_with_1(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*train_options(data, tmp_path / "run"), "--max-steps", 2]
    code, text = failed(capsys, *options, "--loss", "tests.training.small_runs.nan_at_once")
    assert code == 1
    assert text.startswith("maskloss: error: step 1: loss_mask = nan is not finite, on images ")


def test_full_disk_exits_with_1(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with largest_file(2**20):
        code, text = failed(
            capsys, *train_options(data, tmp_path / "run"), "--max-steps", 1, "--batch-size", 1
        )
    assert code == 1
    assert "step-00000001.pt: cannot be written: File too large" in text
    assert [line["step"] for line in history(tmp_path / "run")] == [1]


def test_interruption_prints_one_line_and_exits_with_130(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("maskloss.data.shapes.write_shapes", interrupt)
    code, text = failed(capsys, "shapes", "--output", tmp_path / "out", "--images", 1)
    assert (code, text) == (130, "maskloss: error: interrupted")


# Help.


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_options_with_hyphens(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run(command, "--help")
    assert caught.value.code == 0
    out = capsys.readouterr().out
    options = set(re.findall(r"--[\w-]+", out))
    assert "--help" in options
    assert not [option for option in options if "_" in option]


def test_help_of_train_has_every_option_of_the_contract(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("train", "--help")
    options = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    contract = (
        "train-images train-annotations val-images val-annotations output config model weights loss max-steps "
        "batch-size learning-rate log-every checkpoint-every seed device resume"
    )
    assert {f"--{name}" for name in contract.split()} <= options


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run("--help")
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert all(re.search(rf"^\s+{command}\s", out, re.MULTILINE) for command in COMMANDS)


def test_python_dash_m_maskloss_runs() -> None:
    process = subprocess.run(
        [sys.executable, "-m", "maskloss", "--help"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).resolve().parents[1],
        check=False,
    )
    assert process.returncode == 0
    assert process.stderr == ""
    assert "maskloss" in process.stdout
    assert "predict" in process.stdout


# File names and sizes that file systems allow.


def odd_data(folder: Path, file_name: str, size: tuple[int, int] = (64, 48)) -> list[Any]:
    """Write an image with this name and its annotation file; return the options that name them."""
    (folder / "images").mkdir(parents=True)
    Image.new("RGB", size, (9, 99, 30)).save(folder / "x.png")
    (folder / "x.png").rename(folder / "images" / file_name)
    width, height = size
    polygon = [1, 0, width // 2, 0, width // 2, height, 1, height]
    annotation = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 0, width // 2 - 1, height]}
    document = {
        "images": [{"id": 1, "file_name": file_name, "width": width, "height": height}],
        "annotations": [{**annotation, "segmentation": [polygon], "area": 400, "iscrowd": 0}],
        "categories": [{"id": 1, "name": "x"}],
    }
    (folder / "a.json").write_text(json.dumps(document))
    return ["--images", folder / "images", "--annotations", folder / "a.json"]


def trained_on(folder: Path, output: Path) -> list[Any]:
    options: list[Any] = ["train", "--output", output]
    for part in ("train", "val"):
        options += [f"--{part}-images", folder / "images", f"--{part}-annotations", folder / "a.json"]
    small = (
        "--model resnet18 --min-size 64 --max-size 64 --workers 0 --device cpu --warmup-steps 1 --max-steps 1"
    )
    return [*options, *small.split(), "--batch-size", 1]


@pytest.mark.parametrize(
    "name", ["caf\udce9.png", "図" * 83 + ".png", "a\nb.png"], ids=["Latin-1", "253 bytes", "a line"]
)
def test_all_names_that_a_file_system_allows_work(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = odd_data(tmp_path / "data", name)
    run("check", *source)
    run(*trained_on(tmp_path / "data", tmp_path / "run"))
    assert (tmp_path / "run/report.html").read_text()
    model = ["--checkpoint", tmp_path / "run/model.safetensors", "--device", "cpu"]
    run("evaluate", *model, *source, "--output", tmp_path / "evaluated")
    run(
        "predict",
        *model,
        "--score-threshold",
        0,
        "--output",
        tmp_path / "predicted",
        tmp_path / "data/images" / name,
    )
    assert len(list((tmp_path / "predicted").glob("*.png"))) == 1
    json.loads((tmp_path / "predicted/results.json").read_text())
    run("subset", *source, "--output", tmp_path / "subset", "--max-images", 1)
    assert (tmp_path / "subset/images" / name).is_file()
    assert "Traceback" not in capsys.readouterr().err


def test_image_that_is_resized_to_zero_pixels_is_refused_before_the_first_step(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Of 2 x 1200 px with at most 64 px a side the height is 2 * 64 / 1200 = 0.1.
    odd_data(tmp_path / "data", "line.png", (1200, 2))
    code, text = failed(capsys, *trained_on(tmp_path / "data", tmp_path / "run"))
    assert code == 2
    assert re.search(
        r"line\.png: 1200 x 2 px are resized to at most 64 px.*raise --max-size \(image 1 of", text
    )
    assert not (tmp_path / "run/config.yaml").exists()
    model = ["--checkpoint", trained / "model.safetensors", "--device", "cpu", "--output", tmp_path / "out"]
    code, text = failed(capsys, "predict", *model, tmp_path / "data/images/line.png")
    assert code == 2
    assert "leaves nothing of the shorter side" in text


# Unusual values and unforeseen errors.


@pytest.mark.parametrize(
    "options",
    [
        ["--learning-rate", "1e400"],
        ["--learning-rate", "nan"],
        ["--seed", "1e400"],
        ["--seed", "1" + "0" * 5000],
        ["--min-size", "1" + "0" * 30],
        ["--batch-size", "1000000000"],
        ["--max-steps", "1" + "0" * 18],
        ["--image-std", "[1, nan, 1]"],
        ["--workers", "5000"],
        ["--model", "x" * 100_000],
    ],
)
def test_numbers_out_of_range_print_one_short_line(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    code, text = failed(capsys, *train_options(data, tmp_path / "run"), *options)
    assert code == 2
    assert options[0] in text
    assert len(text) <= 300
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", [b"a: " + b"[" * 5000, b"seed: 1\nseed: 2\n", b"model: \xe9\n", b""])
def test_config_that_yaml_misreads_or_fails_on_prints_one_line(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    (tmp_path / "c.yaml").write_bytes(content)
    options = train_options(data, tmp_path / "run")
    code, text = failed(capsys, "train", "--config", tmp_path / "c.yaml", *options[1:])
    assert code == 2
    assert text.startswith(f"maskloss: error: {tmp_path}/c.yaml: ")


@pytest.mark.parametrize(
    "error", [TypeError("odd"), RecursionError("deep"), MemoryError(), KeyError("W" * 10**6)]
)
def test_unforeseen_error_prints_one_line_and_exits_with_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.delenv("MASKLOSS_DEBUG", raising=False)
    monkeypatch.setattr("maskloss.data.shapes.write_shapes", fails)
    code, text = failed(capsys, "shapes", "--output", tmp_path / "out", "--images", 1)
    assert code == 1
    expected = (
        "out of memory" if isinstance(error, MemoryError) else f"internal error: {type(error).__name__}: "
    )
    assert text.startswith(f"maskloss: error: {expected}")
    assert len(text) <= 300


@pytest.mark.parametrize(
    ("name", "code", "line"),
    [
        ("SIGINT", 130, "maskloss: error: interrupted"),
        ("SIGTERM", 143, "maskloss: error: terminated"),
        ("SIGHUP", 129, "maskloss: error: terminated"),
    ],
)
def test_signal_during_a_command_prints_one_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    code: int,
    line: str,
) -> None:
    def killed(*_: Any, **__: Any) -> None:
        signal.raise_signal(getattr(signal, name))

    monkeypatch.setattr("maskloss.data.shapes.write_shapes", killed)
    assert failed(capsys, "shapes", "--output", tmp_path / "out", "--images", 1) == (code, line)


def test_nohup_keeps_a_command_from_ending_with_its_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hung_up(*_: Any, **__: Any) -> None:
        signal.raise_signal(signal.SIGHUP)

    monkeypatch.setattr("maskloss.data.shapes.write_shapes", hung_up)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        run("shapes", "--output", tmp_path / "out", "--images", 1)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_name_that_is_too_long_is_bad_input(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = tmp_path / ("n" * 300)
    for command in (
        ["predict", long, "--checkpoint", trained, "--output", tmp_path / "out"],
        ["predict", tmp_path, "--checkpoint", long, "--output", tmp_path / "out"],
        ["export", "--checkpoint", tmp_path, "--output", f"{long}.onnx"],
    ):
        code, text = failed(capsys, *command)
        assert code == 2
        assert "File name too long" in text


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["check", "--help"], ["repair", "--help"], ["subset"]]
)
def test_help_and_version_do_not_import_torch(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom maskloss.cli import main\n"
        f"try:\n    main({arguments})\nexcept SystemExit:\n    print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.splitlines()[-1] == "False"


def test_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"maskloss {maskloss.__version__}\n"
    assert importlib.metadata.version("maskloss") == maskloss.__version__


def test_keys_of_a_config_have_underscores_or_hyphens(data: Path, tmp_path: Path) -> None:
    given = train_options(data, tmp_path / "run")[1:]
    options = {given[i].removeprefix("--"): given[i + 1] for i in range(0, len(given), 2)}
    assert "train-images" in options
    config = {
        name: str(value) if isinstance(value, Path) else yaml.safe_load(value)
        for name, value in options.items()
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({**config, "max-steps": 1, "batch_size": 1}))
    run("train", f"--config={tmp_path / 'c.yaml'}")
    written = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert (written["max_steps"], written["batch_size"], written["min_size"]) == (1, 1, 64)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("max-stps: 1", "unknown option max-stps; did you mean max_steps?"),
        ("xyzzy: 1", "unknown option xyzzy; `maskloss train --help` lists the options"),
        ("max-steps: 1\nmax_steps: 1", "the option max_steps is given twice"),
        ("max_steps: 0", "--max-steps must be at least 1, got 0"),
        ("max-steps: many", "--max-steps must be a whole number, got many"),
        ("loss: {weights: {mask: -1}}", "--loss: the weight of mask must be a finite number >= 0"),
    ],
)
@pytest.mark.parametrize("form", ["--config {}", "--config={}"])
def test_an_error_in_a_config_names_the_file(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, message: str, form: str
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(content)
    code, text = failed(capsys, *train_options(data, tmp_path / "run"), *form.format(path).split())
    assert code == 2
    assert text.startswith("maskloss: error: ")
    assert f"c.yaml: {message}" in text
    assert not (tmp_path / "run").exists()


def test_an_option_on_the_command_line_is_not_blamed_on_the_config(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("max_steps: 2")
    code, text = failed(capsys, *train_options(data, tmp_path / "run"), "--config", path, "--max-steps", 0)
    assert (code, text) == (2, "maskloss: error: --max-steps must be at least 1, got 0")
