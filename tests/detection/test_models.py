"""`maskloss.detection.models`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models import WeightsEnum
from torchvision.models.detection import maskrcnn_resnet50_fpn, maskrcnn_resnet50_fpn_v2
from torchvision.models.detection.backbone_utils import mobilenet_backbone, resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d

from maskloss.data.coco import Category
from maskloss.detection.conversion import convert
from maskloss.detection.models import ModelSettings, build_model
from maskloss.errors import InputError
from maskloss.training.checkpoints import describe, load_model, save_model
from maskloss.training.loop import initial_model
from tests.training.small_runs import small_config

CATEGORIES = tuple(Category(number, str(number)) for number in range(1, 91))


@pytest.mark.parametrize(
    ("min_size", "max_size", "expected"),
    [
        (None, None, 512),
        ((128,), None, 512),
        # As much more as the shorter side is than 320.
        ((320, 800), None, 1280),
        ((800,), 900, 900),
    ],
)
def test_the_longest_side_does_not_cut_back_the_shorter_one(min_size, max_size, expected):
    model = build_model(ModelSettings("resnet18", 3, min_size=min_size, max_size=max_size))
    assert model.transform.max_size == expected


# As torchvision's builders, with random weights in the place of the published ones.


def random_weights(name: str) -> dict[str, torch.Tensor]:
    """Weights of torchvision's builder, with statistics of batch norms that differ from those of a new network."""
    builder = {
        "maskrcnn_resnet50_fpn": maskrcnn_resnet50_fpn,
        "maskrcnn_resnet50_fpn_v2": maskrcnn_resnet50_fpn_v2,
    }
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    state = builder[name](weights=None, weights_backbone=None, num_classes=91).state_dict()
    for key, tensor in state.items():
        if key.endswith("running_var"):
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
        elif key.endswith("bn3.weight"):
            # Without it the sums of 16 blocks grow beyond what boxes can be made of.
            tensor.fill_(0.1)
    if name == "maskrcnn_resnet50_fpn":
        # Frozen batch norms count no batches.
        return {key: tensor for key, tensor in state.items() if not key.endswith("num_batches_tracked")}
    return state


@pytest.mark.parametrize("name", ["maskrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn_v2"])
def test_published_weights_make_torchvisions_model_bit_for_bit(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    weights = random_weights(name)
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda *args, **kwargs: weights)
    stock = torchvision.models.get_model(name, weights="DEFAULT", min_size=64, max_size=64).eval()
    config = small_config(tmp_path, tmp_path / "run", model=name, weights="DEFAULT")
    model, settings, loaded = initial_model(config, 91)
    assert loaded is not None
    assert loaded.left == []
    assert loaded.unused == []
    assert settings.normalization_eps == (0.0 if name == "maskrcnn_resnet50_fpn" else None)

    def kinds(model: nn.Module) -> dict[str, tuple[str, float]]:
        norms = (nn.BatchNorm2d, FrozenBatchNorm2d)
        return {n: (type(m).__name__, m.eps) for n, m in model.named_modules() if isinstance(m, norms)}

    def trained(model: nn.Module) -> set[str]:
        return {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    assert kinds(model) == kinds(stock)
    assert trained(model) == trained(stock)
    images = [torch.rand(3, 50, 64, generator=torch.Generator().manual_seed(1))]
    # Of 91 classes of a random network none is sure.
    stock.roi_heads.score_thresh = model.roi_heads.score_thresh = 0.0
    with torch.no_grad():
        expected, found = stock(images)[0], model.eval()(images)[0]
        convert(model, paste=None)
        save_model(
            tmp_path / "model.safetensors",
            model,
            describe(settings, CATEGORIES, "torchvision", model.roi_heads.loss),
        )
        again, description = load_model(tmp_path / "model.safetensors")
        again.roi_heads.score_thresh = 0.0
        loaded_again = again(images)[0]
    assert len(expected["boxes"]) > 0
    assert set(expected) == set(found)
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    assert description.settings == settings
    assert kinds(again) == kinds(stock)
    assert trained(again) == trained(stock)
    assert all(torch.equal(expected[key], loaded_again[key]) for key in ("boxes", "scores", "labels"))


@pytest.mark.parametrize("name", ["maskrcnn_resnet50_fpn", "resnet18", "mobilenet_v2"])
@pytest.mark.parametrize("layers", [0, 1, 3, 4, 5])
def test_the_trained_stages_are_those_of_torchvisions_builders(name: str, layers: int) -> None:
    model = build_model(ModelSettings(name, 3, trainable_layers=layers))
    common: dict[str, Any] = {"weights": None, "trainable_layers": layers, "norm_layer": nn.BatchNorm2d}
    if name == "mobilenet_v2":
        stock = mobilenet_backbone(backbone_name=name, fpn=True, **common)
    else:
        stock = resnet_fpn_backbone(
            backbone_name=name.removeprefix("maskrcnn_").removesuffix("_fpn"), **common
        )
    for (key, mine), (other_key, other) in zip(
        model.backbone.body.named_parameters(), stock.body.named_parameters(), strict=True
    ):
        assert (key, mine.requires_grad) == (other_key, other.requires_grad)
    assert all(parameter.requires_grad for parameter in model.roi_heads.parameters())


@pytest.mark.parametrize(
    ("changes", "frozen", "layers"),
    [
        ({}, False, None),
        ({"weights": "{file}"}, True, 3),
        ({"weights": "{file}", "trainable_layers": 5}, True, 5),
        ({"weights": "{file}", "trainable_layers": 0, "frozen_normalization": False}, False, 0),
        ({"trainable_layers": 5}, False, 5),
    ],
)
def test_weights_of_a_backbone_alone_freeze_its_first_stages_too(
    tmp_path: Path, changes: dict[str, Any], frozen: bool, layers: int | None
) -> None:
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), tmp_path / "backbone.pt")
    given = {k: str(tmp_path / "backbone.pt") if v == "{file}" else v for k, v in changes.items()}
    _, settings, _ = initial_model(small_config(tmp_path, tmp_path / "run", **given), 3)
    assert settings.frozen_normalization == frozen
    assert settings.trainable_layers == layers
    assert settings.normalization_eps is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trainable_layers": 6, "weights": "x.pt"}, "--trainable-layers must be from 0 to 5, got 6"),
        ({"trainable_layers": 7, "weights": "x.pt", "model": "mobilenet_v2"}, "must be from 0 to 6, got 7"),
        ({"trainable_layers": -1, "weights": "x.pt"}, "--trainable-layers must be from 0 to 5, got -1"),
        ({"trainable_layers": 3}, "--trainable-layers must be 5 without --weights"),
        ({"min_size": 20000, "max_size": None}, "--min-size must be at most 8192, got 20000"),
    ],
)
def test_stages_and_sizes_that_cannot_be_meant_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        small_config(tmp_path, tmp_path / "run", **changes)
