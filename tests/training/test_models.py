"""maskloss/training/models.py: models and mask branches of a user's own, from train to predict."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import MultiScaleRoIAlign

from maskloss.cli import main
from maskloss.data.records import Category
from maskloss.detection.builders import ModelSettings
from maskloss.detection.mask_branch import DetectedBoxes, MaskBranch, Positives, grids_of
from maskloss.detection.mask_size import MaskSize
from maskloss.errors import InputError
from maskloss.losses import MaskRCNNLoss, mask_bce_loss
from maskloss.training.loop import train
from maskloss.training.model_file import ModelDescription, load_model, save_model
from maskloss.training.models import converted, make_mask_branch, make_model
from maskloss.training.setup import initial_model

from .small_runs import interrupted_after, narrow_models, small_config, write_data

HERE = "tests.training.test_models"


class Stem(nn.Sequential):
    """A backbone of one feature map of stride 8."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 16, 3, 4, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, 2, 1), nn.ReLU())
        self.out_channels = 16


def parts(num_classes: int, settings: ModelSettings) -> dict[str, Any]:
    return {
        "num_classes": num_classes,
        "min_size": settings.min_size or (64,),
        "max_size": settings.max_size or 64,
        "rpn_anchor_generator": AnchorGenerator(((16, 32),), ((1.0,),)),
        "box_roi_pool": MultiScaleRoIAlign(["0"], 7, 2),
    }


def my_model(num_classes: int, settings: ModelSettings) -> nn.Module:
    return MaskRCNN(Stem(), mask_roi_pool=MultiScaleRoIAlign(["0"], 14, 2), **parts(num_classes, settings))


def boxes_alone(num_classes: int, settings: ModelSettings) -> nn.Module:
    return FasterRCNN(Stem(), **parts(num_classes, settings))


class Linear(MaskBranch):
    """One linear layer per cell of the pooled features, for all classes alike."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.pool = model.roi_heads.mask_roi_pool
        self.layer = nn.Conv2d(model.backbone.out_channels, 1, 1)

    def losses(
        self, features: dict[str, Tensor], positives: Positives, targets: list[dict[str, Any]]
    ) -> dict[str, Tensor]:
        logits = self.layer(self.pool(features, positives.boxes, positives.image_sizes))[:, 0]
        grids = grids_of(positives, targets, logits.shape[-1], aligned=True, binary=False)
        return {"loss_mask": mask_bce_loss(logits, grids).sum() / max(len(logits), 1)}

    def predict(self, features: dict[str, Tensor], detections: DetectedBoxes) -> tuple[list[Tensor], None]:
        logits = self.layer(self.pool(features, detections.boxes, detections.image_sizes))
        return list(logits.sigmoid().split([len(boxes) for boxes in detections.boxes])), None


@pytest.fixture(scope="module", autouse=True)
def narrow() -> Iterator[None]:
    with narrow_models():
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


def command(name: str, data: Path, run: Path, output: Path, *options: str) -> None:
    arguments = [name, "--checkpoint", str(run), "--output", str(output), "--device", "cpu", *options]
    if name == "evaluate":
        arguments += [
            "--images",
            str(data / "val/images"),
            "--annotations",
            str(data / "val/annotations.json"),
        ]
    else:
        arguments += ["--score-threshold", "0", *map(str, sorted((data / "val/images").iterdir()))]
    main(arguments)


CODE: dict[str, dict[str, str]] = {
    "model": {"model": f"{HERE}.my_model"},
    "branch": {"mask_branch": f"{HERE}.Linear"},
    "both": {"model": f"{HERE}.my_model", "mask_branch": f"{HERE}.Linear"},
}


@pytest.mark.parametrize("name", CODE)
def test_a_users_code_goes_from_train_to_predict(
    name: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    train(small_config(data, run, max_detections=30, **CODE[name]))
    metrics = json.loads((run / "metrics.json").read_text())
    assert set(metrics["loss"]) >= {"loss_mask", "loss_box_reg", "loss"}
    given = [f"--{key.replace('_', '-')}={path}" for key, path in CODE[name].items()]
    command("evaluate", data, run, tmp_path / "evaluated", *given)
    assert json.loads((tmp_path / "evaluated/metrics.json").read_text()) == metrics
    command("predict", data, run, tmp_path / "predicted", *given)
    results = json.loads((tmp_path / "predicted/results.json").read_text())
    assert 0 < len(results) <= 60
    assert all("segmentation" in result for result in results)
    # Resumed, it is the same run.
    train(small_config(data, run, max_detections=30, resume=True, **CODE[name]))
    assert json.loads((run / "metrics.json").read_text()) == metrics
    # Nobody's code is run because a file says so.
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        command("evaluate", data, run, tmp_path / "refused")
    assert ended.value.code == 2
    said = capsys.readouterr().err
    key, path = next(iter(CODE[name].items()))
    assert "comes from user code, which runs only if you name it: give" in said
    assert f"--{key.replace('_', '-')} {path}" in said
    assert not (tmp_path / "refused").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["point_rend", "mask_iou"])
def test_a_named_branch_goes_from_train_to_predict(
    name: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    settings: dict[str, Any] = {"mask_branch": name, "checkpoint_every": 1, "schedule": "constant"}
    train(small_config(data, run, max_steps=2, **settings))
    metrics = json.loads((run / "metrics.json").read_text())
    key = {"point_rend": "loss_mask_point", "mask_iou": "loss_mask_iou"}[name]
    assert key in metrics["loss"]
    # The file knows its branch.
    command("evaluate", data, run, tmp_path / "evaluated")
    assert json.loads((tmp_path / "evaluated/metrics.json").read_text()) == metrics
    command("predict", data, run, tmp_path / "predicted", "--mask-branch", name)
    results = json.loads((tmp_path / "predicted/results.json").read_text())
    assert results
    assert all(("mask_score" in result) == (name == "mask_iou") for result in results)
    # Resumed, it ends as an uninterrupted run.
    with interrupted_after(1):
        train(small_config(data, tmp_path / "again", max_steps=2, **settings))
    train(small_config(data, tmp_path / "again", max_steps=2, resume=True, **settings))
    assert json.loads((tmp_path / "again/metrics.json").read_text()) == metrics
    capsys.readouterr()
    with pytest.raises(SystemExit):
        command("evaluate", data, run, tmp_path / "refused", "--mask-branch", f"{HERE}.Linear")
    assert f"its mask branch is {name}; omit --mask-branch" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "settings"),
    [(14, {}), (56, {}), (56, {"mask_branch": "mask_iou"}), (56, {"model": f"{HERE}.my_model"})],
)
def test_the_size_of_masks_goes_from_train_to_evaluate(
    size: MaskSize, settings: dict[str, Any], data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train(small_config(data, run, mask_size=size, **settings))
    metrics = json.loads((run / "metrics.json").read_text())
    own = {"model": f"{HERE}.my_model"} if "model" in settings else {}
    loaded = load_model(run, **own)
    assert loaded.description.settings.mask_size == size
    heads = loaded.model.eval().roi_heads
    heads.score_thresh = 0.0
    (detection,) = loaded.model([torch.rand(3, 64, 64)])
    assert detection["masks"].shape[-2:] == (size, size)
    command("evaluate", data, run, tmp_path / "evaluated", *[f"--model={path}" for path in own.values()])
    assert json.loads((tmp_path / "evaluated/metrics.json").read_text()) == metrics
    # Resumed with another size, it would be another model.
    with pytest.raises(InputError, match="mask_size"):
        train(small_config(data, run, mask_size=28, resume=True, **settings))


def test_masks_of_56_cells_start_from_trained_weights_of_28(data: Path, tmp_path: Path) -> None:
    train(small_config(data, tmp_path / "run"))
    weights = str(tmp_path / "run/model.safetensors")
    config = small_config(data, tmp_path / "more", mask_size=56, weights=weights)
    _, _, loaded = initial_model(config, 4)
    assert loaded is not None
    assert sorted(loaded.left) == [
        f"roi_heads.mask_predictor.conv6_mask.{name}" for name in ("bias", "weight")
    ]


def test_the_size_of_a_users_own_mask_layers_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match="--mask-size 56: the size of masks can be set only for torchvision's"
    ):
        train(small_config(data, tmp_path / "run", model=f"{HERE}.boxes_alone", mask_size=56))
    assert not (tmp_path / "run").exists()


def test_a_model_without_masks_trains_its_boxes(data: Path, tmp_path: Path) -> None:
    path = f"{HERE}.boxes_alone"
    train(small_config(data, tmp_path / "run", model=path))
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert "loss_mask" not in metrics["loss"]
    assert metrics["bbox"]["AP"] is not None
    command("predict", data, tmp_path / "run", tmp_path / "predicted", f"--model={path}")
    results = json.loads((tmp_path / "predicted/results.json").read_text())
    assert results
    assert not any("segmentation" in result for result in results)


def test_code_that_a_file_does_not_name_is_refused(data: Path, tmp_path: Path) -> None:
    train(small_config(data, tmp_path / "run", max_steps=1))
    with pytest.raises(
        InputError, match=r"its model is resnet18; omit --model, which is for users' own models"
    ):
        load_model(tmp_path / "run", model=CODE["model"]["model"])
    with pytest.raises(InputError, match=r"its mask layers are torchvision's; omit --mask-branch"):
        load_model(tmp_path / "run", mask_branch=CODE["branch"]["mask_branch"])


def raising(*_: Any) -> nn.Module:
    raise KeyError("nothing there")


def other_classes(num_classes: int, settings: ModelSettings) -> nn.Module:
    return my_model(num_classes + 1, settings)


def no_detector(*_: Any) -> nn.Module:
    return nn.Linear(2, 2)


A_NUMBER = 3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", "--model .* cannot be imported: .*nothing"),
        ("A_NUMBER", "--model .*: must be callable, but is a int"),
        ("raising", "--model .* cannot be made: KeyError: 'nothing there'"),
        (
            "no_detector",
            "--model .* must return a model of torchvision.models.detection, not a torch.nn.*Linear",
        ),
        ("other_classes", "--model .*: its box predictor scores 5 classes, but num_classes was 4"),
    ],
)
def test_an_invalid_model_is_named(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_model(ModelSettings(f"{HERE}.{name}", 4))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", "--mask-branch .* cannot be imported"),
        (
            "no_detector",
            "--mask-branch .* must return a maskloss.detection.mask_branch.MaskBranch",
        ),
        ("raising", "--mask-branch .* cannot be made: KeyError"),
    ],
)
def test_an_invalid_mask_branch_is_named(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_mask_branch(f"{HERE}.{name}", my_model(4, ModelSettings("x.y", 4)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "resnet19"}, "--model must be one of maskrcnn_resnet50_fpn, .* or an import path"),
        ({"mask_branch": "own"}, "--mask-branch must be point_rend, mask_iou, or an import path"),
        (
            {"mask_size": 56, "mask_branch": "point_rend"},
            "--mask-size must be omitted with --mask-branch point_rend",
        ),
        ({"scale_jitter": [2.0, 0.5]}, "--scale-jitter must be two rising numbers"),
        ({"scale_jitter": [0.0, 1.0]}, "--scale-jitter must be two rising numbers"),
        ({"scale_jitter": [1.0]}, "--scale-jitter must be two rising numbers"),
        ({"ema": 1.0}, "--ema must be above 0 and below 1"),
        ({"model": "my.model", "weights": "DEFAULT"}, "--weights must be a file or none, because no weights"),
    ],
)
def test_invalid_names_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        small_config(tmp_path, tmp_path / "run", **changes)


class OwnTransform(GeneralizedRCNNTransform):
    """A subclass, whose code `convert` does not replace, so that masks could not be left unpasted."""


def with_own_transform(num_classes: int, settings: ModelSettings) -> nn.Module:
    model = my_model(num_classes, settings)
    own: Any = model.transform
    model.transform = OwnTransform(own.min_size, own.max_size, own.image_mean, own.image_std)
    return model


def test_a_model_with_a_transform_of_its_own_is_refused_before_anything_is_written(
    data: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        InputError, match=r"--model .*: its transform must be torchvision's .*not .*OwnTransform"
    ):
        train(small_config(data, tmp_path / "run", model=f"{HERE}.with_own_transform"))
    assert not (tmp_path / "run").exists()


def test_a_mask_branch_that_does_not_support_the_loss_is_refused_before_anything_is_written(
    data: Path, tmp_path: Path
) -> None:
    loss = {"mask": "maskloss.losses.MaskSoftmaxLoss"}
    with pytest.raises(InputError, match="point_rend computes the logits of each object's own class only"):
        train(small_config(data, tmp_path / "run", mask_branch="point_rend", loss=loss))
    assert not (tmp_path / "run").exists()


def test_a_loss_that_does_not_fit_the_mask_branch_of_a_model_file_is_refused(tmp_path: Path) -> None:
    settings = ModelSettings("resnet18", 3)
    loss = MaskRCNNLoss.preset("torchvision")
    network = converted(make_model(settings), loss, mask_branch="point_rend")
    file = tmp_path / "model.safetensors"
    categories = (Category(1, "a"), Category(2, "b"))
    save_model(
        file, network, ModelDescription(settings, categories, True, "sigmoid", mask_branch="point_rend")
    )
    assert load_model(file).description.mask_branch == "point_rend"
    with pytest.raises(
        InputError, match=r"model\.safetensors: point_rend computes the logits of each object's"
    ):
        load_model(file, loss={"mask": "maskloss.losses.MaskSoftmaxLoss"})
