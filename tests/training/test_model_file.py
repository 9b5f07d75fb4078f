"""maskloss/training/model_file.py: descriptions are read back, and odd files are refused in one line."""

from __future__ import annotations

import contextlib
import copy
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor, nn
from torchvision.models.detection import maskrcnn_resnet50_fpn, maskrcnn_resnet50_fpn_v2
from torchvision.ops import FrozenBatchNorm2d

import maskloss
from maskloss.data.coco import Category, read_coco
from maskloss.data.shapes import write_shapes
from maskloss.detection.builders import ModelSettings, build_model
from maskloss.errors import InputError, RunError
from maskloss.losses import ClassAgnosticMaskLoss, MaskBCELoss, MaskRCNNLoss, MaskSoftmaxLoss
from maskloss.training.checkpoints import read_weights
from maskloss.training.config import TrainConfig
from maskloss.training.loss_config import import_paths_of, make_loss
from maskloss.training.model_file import (
    ModelDescription,
    is_self_contained,
    load_model,
    mask_probs_of,
    model_settings_of,
    save_model,
)
from maskloss.training.setup import initial_model
from tests.training.small_runs import largest_file

DESCRIPTION = ModelDescription(
    ModelSettings(
        "resnet18",
        3,
        image_mean=(0.1, 0.2, 0.3),
        image_std=(0.4, 0.5, 0.6),
        frozen_normalization=True,
        min_size=(48, 64),
        max_size=96,
        mask_size=28,
    ),
    (Category(3, "cat"), Category(7, "hot dog \N{HOT DOG}")),
    aligned=True,
    score_thresholds=(0.25, None),
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "model.safetensors"
    torch.manual_seed(3)
    save_model(path, build_model(DESCRIPTION.settings), DESCRIPTION)
    return path


# The model that describes itself.


def test_a_description_survives_the_round_trip() -> None:
    metadata = DESCRIPTION.to_metadata()
    assert all(isinstance(value, str) for value in metadata.values())
    assert ModelDescription.from_metadata(metadata) == DESCRIPTION


def test_a_model_file_holds_every_category_that_is_read(tmp_path: Path) -> None:
    ids, names = (2**128 - 1, -(2**63) - 1, 0), ("x" * 1000, "\ud800", "\0")
    folder = tmp_path / "data"
    write_shapes(folder, 1, size=64, seed=0)
    document = json.loads((folder / "annotations.json").read_text())
    document["categories"] = [{"id": number, "name": name} for number, name in zip(ids, names, strict=True)]
    for annotation in document["annotations"]:
        annotation["category_id"] = ids[0]
    (folder / "annotations.json").write_text(json.dumps(document))
    read = read_coco(folder / "images", folder / "annotations.json").categories
    assert [(c.id, c.name) for c in read] == sorted(zip(ids, names, strict=True))
    description = ModelDescription(ModelSettings("mobilenet_v2", 4), read, aligned=False)
    assert ModelDescription.from_metadata(description.to_metadata()) == description


def test_a_description_with_default_sizes_survives_the_round_trip() -> None:
    plain = ModelDescription(ModelSettings("mobilenet_v2", 2), (Category(1, "a"),), aligned=False)
    assert ModelDescription.from_metadata(plain.to_metadata()) == plain


def test_a_saved_model_is_loaded_with_the_same_tensors(saved: Path) -> None:
    torch.manual_seed(3)
    expected = build_model(DESCRIPTION.settings).state_dict()
    loaded = load_model(saved)
    model, description = loaded.model, loaded.description
    assert description == DESCRIPTION
    assert not model.training
    state = model.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[key], expected[key]) for key in expected)


def test_a_loaded_model_normalizes_and_resizes_as_it_was_saved(saved: Path) -> None:
    model = load_model(saved).model
    assert model.transform.image_mean == [0.1, 0.2, 0.3]
    assert model.transform.image_std == [0.4, 0.5, 0.6]
    assert model.transform.min_size == (48, 64)
    assert model.transform.max_size == 96


def test_a_loaded_model_leaves_masks_as_probabilities(saved: Path) -> None:
    model = load_model(saved).model
    with torch.no_grad():
        detections = model([torch.rand(3, 64, 64)])[0]
    assert len(detections["masks"]) > 0
    assert detections["masks"].shape[1:] == (1, 28, 28)


def test_a_model_whose_classes_compete_or_share_a_mask_is_loaded_as_such(tmp_path: Path) -> None:
    model = build_model(DESCRIPTION.settings)
    for loss, name, kind in (
        (MaskRCNNLoss(mask=MaskSoftmaxLoss()), "softmax", MaskSoftmaxLoss),
        (MaskRCNNLoss(mask=ClassAgnosticMaskLoss(MaskBCELoss())), "class_agnostic", ClassAgnosticMaskLoss),
        (MaskRCNNLoss(), "sigmoid", MaskBCELoss),
    ):
        assert mask_probs_of(loss) == name
        description = replace(DESCRIPTION, mask_probs=name)
        save_model(tmp_path / "model.safetensors", model, description)
        loaded = load_model(tmp_path / "model.safetensors")
        assert loaded.description == description
        assert isinstance(loaded.model.roi_heads.loss.mask, kind)


def test_a_model_with_masks_of_a_users_own_is_refused_with_the_reason(tmp_path: Path) -> None:
    class Own(MaskSoftmaxLoss):
        """A term with probabilities that no file can hold."""

    assert mask_probs_of(MaskRCNNLoss(mask=Own())) == "custom"
    path = tmp_path / "model.safetensors"
    save_model(path, build_model(DESCRIPTION.settings), replace(DESCRIPTION, mask_probs="custom"))
    with pytest.raises(
        InputError, match=r"model\.safetensors: its masks come from the mask term of its loss.*by --loss"
    ):
        load_model(path)


def test_a_description_without_mask_probs_is_of_sigmoids() -> None:
    metadata = DESCRIPTION.to_metadata()
    content = json.loads(metadata["maskloss"])
    del content["mask_probs"]
    assert ModelDescription.from_metadata({"maskloss": json.dumps(content)}) == DESCRIPTION


@pytest.mark.parametrize("kept", [0, 5, 8, 100, 10_000, -1])
def test_a_truncated_model_is_refused(saved: Path, tmp_path: Path, kept: int) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(saved.read_bytes()[:kept])
    with pytest.raises(InputError, match=r"model\.safetensors: truncated, or not a safetensors file"):
        load_model(path)


def test_a_checkpoint_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "step-00000001.pt").write_bytes(b"")
    with pytest.raises(
        InputError, match=r"step-00000001\.pt: is a checkpoint.*give the run's model\.safetensors"
    ):
        load_model(tmp_path / "step-00000001.pt")


def test_a_missing_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model\.safetensors: cannot be read: No such file"):
        load_model(tmp_path / "model.safetensors")


def test_a_safetensors_file_without_a_description_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"w": torch.zeros(2)}, path)
    with pytest.raises(InputError, match=r"model\.safetensors: the file does not describe a model"):
        load_model(path)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "3", "{}", '{"settings": 3}', '{"settings": {}, "categories": [], "aligned": true}', "null"],
)
def test_a_description_with_other_fields_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"w": torch.zeros(2)}, path, metadata={"maskloss": text})
    with pytest.raises(InputError, match=r"model\.safetensors: "):
        load_model(path)


@pytest.mark.parametrize(
    "changes",
    [{"num_classes": 5}, {"name": "mobilenet_v2"}, {"name": "resnet99"}, {"unknown": 1}, {"image_mean": 5}],
    ids=str,
)
def test_tensors_of_another_model_than_described_are_refused(
    saved: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    path = tmp_path / "model.safetensors"
    content = json.loads(DESCRIPTION.to_metadata()["maskloss"])
    content["settings"].update(changes)
    tensors = safetensors.torch.load_file(saved)
    safetensors.torch.save_file(tensors, path, metadata={"maskloss": json.dumps(content)})
    with pytest.raises(
        InputError,
        match=r"model\.safetensors: its (tensors do not fit the model|\w+ must be)|it has 5 classes",
    ) as caught:
        load_model(path)
    assert "\n" not in str(caught.value)


def test_categories_that_do_not_fit_the_classes_are_refused(saved: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    content = json.loads(DESCRIPTION.to_metadata()["maskloss"])
    del content["categories"][1]
    tensors = safetensors.torch.load_file(saved)
    safetensors.torch.save_file(tensors, path, metadata={"maskloss": json.dumps(content)})
    with pytest.raises(InputError, match=r"model\.safetensors: "):
        load_model(path)


def test_a_model_that_cannot_be_written_whole_leaves_the_earlier_one(saved: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"earlier")
    with largest_file(10_000), pytest.raises(RunError, match=r"model\.safetensors: cannot be written"):
        save_model(path, build_model(DESCRIPTION.settings), DESCRIPTION)
    assert path.read_bytes() == b"earlier"
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


# Weights.


def test_settings_come_from_the_description_of_a_model() -> None:
    assert model_settings_of(DESCRIPTION.to_metadata()) == {
        "image_mean": (0.1, 0.2, 0.3),
        "image_std": (0.4, 0.5, 0.6),
        "frozen_normalization": True,
        "normalization_eps": 1e-5,
    }


def test_settings_come_from_plain_metadata() -> None:
    metadata = {"image_mean": "[0.5, 0.5, 0.5]", "frozen_normalization": "true", "license": "MIT"}
    found = model_settings_of(metadata)
    assert list(found["image_mean"]) == [0.5, 0.5, 0.5]
    assert found["frozen_normalization"] is True
    assert set(found) == {"image_mean", "frozen_normalization"}


@pytest.mark.parametrize("text", ["0.5, 0.5, 0.5", "5", '"gray"', "[0.5]", "[null, 1, 1]"])
def test_a_mean_in_the_metadata_that_is_not_three_numbers_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="image_mean"):
        model_settings_of({"image_mean": text})


# The loss of the run.


class Scaled(nn.Module):
    """A term of a user's own, with a parameter and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.register_buffer("seen", torch.tensor(0))

    def forward(self, mask_logits: Tensor, mask_targets: Tensor) -> Tensor:
        return self.scale * (mask_logits.sigmoid() - mask_targets).abs()


def weighted_sum(terms: Any) -> dict[str, Any]:
    return {"mask": {"class_path": "maskloss.losses.WeightedSum", "init_args": {"terms": terms}}}


@pytest.mark.parametrize(
    ("config", "contained"),
    [
        ("detectron2", True),
        ("tests.training.small_runs.nan_at_once", False),
        ({"preset": "aligned", "mask": "maskloss.losses.MaskDiceLoss", "weights": {"mask": 2.0}}, True),
        ({"box": {"class_path": "maskloss.losses.BoxSmoothL1Loss", "init_args": {"beta": 1.0}}}, True),
        ({"mask": "maskloss.losses.mask_pixels.MaskBCELoss"}, False),
        ({"mask": "os.system"}, False),
        ({"mask": "maskloss.losses.mask_pixels.torch.load"}, False),
        ({"normalizers": {"box": "maskloss.losses.per_positive"}, "regularization": None}, True),
        ({"normalizers": {"box": "my.own"}}, False),
        (weighted_sum([{"class_path": "os.x"}]), False),
        (weighted_sum([{"class_path": "maskloss.losses.MaskDiceLoss"}]), True),
        (weighted_sum([[{"class_path": "os.x"}]]), False),
        (weighted_sum([[[{"class_path": "maskloss.losses.MaskDiceLoss"}]]]), True),
        (weighted_sum({"class_path": "os.x"}), False),
        (weighted_sum({"a": {"class_path": "os.x"}}), False),
        (
            {"mask": {"class_path": "maskloss.losses.MaskDiceLoss", "init_args": [{"class_path": "os.x"}]}},
            False,
        ),
        ({"mask": {"class_path": ["os.x"]}}, False),
        ({"mask": {"class_path": {"class_path": "os.x"}}}, False),
        ({"mask": {"init_args": {}}}, False),
        ({"mask": ["os.x"]}, False),
        ({"normalizers": {"box": [{"class_path": "os.x"}]}}, False),
        ({"mask": 3}, False),
        (None, False),
    ],
)
def test_only_losses_of_maskloss_are_rebuilt_from_a_file(config: Any, contained: bool) -> None:
    assert is_self_contained(config) is contained


PATHS = st.sampled_from(["maskloss.losses.MaskDiceLoss", "os.x"])


def objects(arguments: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.fixed_dictionaries(
        {"class_path": PATHS, "init_args": st.fixed_dictionaries({"terms": arguments})}
    )


#: Paths, and objects whose arguments are paths, objects, lists and mappings at any depth.
PARTS = objects(
    st.recursive(
        st.one_of(PATHS, objects(st.none())),
        lambda inner: st.one_of(
            st.lists(inner, min_size=1, max_size=2), st.dictionaries(st.just("x"), inner), objects(inner)
        ),
        max_leaves=5,
    )
)


@given(part=PARTS, place=st.sampled_from(["mask", "box", "normalizers"]))
def test_every_path_that_a_loss_imports_is_known_before(part: dict[str, Any], place: str) -> None:
    config = {place: {"box": part} if place == "normalizers" else part}
    asked = []

    def recorded(path: str, where: str) -> Any:
        asked.append(path)
        return lambda *_, **__: None

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(InputError):
        patch.setattr("maskloss.training.loss_config.imported", recorded)
        make_loss(config)
    assert asked
    assert Counter(asked) <= Counter(import_paths_of(config))


def test_the_loss_comes_back_with_its_tensors(tmp_path: Path) -> None:
    config = {
        "preset": "detectron2",
        "classification": {"class_path": "maskloss.losses.SeesawLoss", "init_args": {"num_classes": 3}},
    }
    loss = make_loss(config)
    loss.classification.class_counts += torch.tensor([5.0, 2.0, 1.0])
    model = maskloss.convert(build_model(DESCRIPTION.settings), loss)
    path = tmp_path / "model.safetensors"
    save_model(path, model, replace(DESCRIPTION, loss=config))
    loaded = load_model(path)
    assert loaded.loss_config == config
    found = loaded.model.roi_heads.loss
    assert torch.equal(found.classification.class_counts, loss.classification.class_counts)
    assert found.mask_targets == loss.mask_targets
    # The model's own tensors are torchvision's, under its names.
    weights, _ = read_weights(path)
    assert set(weights) == set(model.state_dict())


def test_a_users_code_is_imported_only_if_it_is_given_again(tmp_path: Path) -> None:
    own = {"mask": "tests.training.test_model_file.Scaled"}
    loss = make_loss(own)
    with torch.no_grad():
        loss.mask.scale.fill_(3.5)
    path = tmp_path / "model.safetensors"
    save_model(
        path, maskloss.convert(build_model(DESCRIPTION.settings), loss), replace(DESCRIPTION, loss=own)
    )
    without = load_model(path)
    assert without.loss_config is None
    assert type(without.model.roi_heads.loss.mask) is MaskBCELoss
    again = load_model(path, loss=own)
    assert again.loss_config == own
    assert again.model.roi_heads.loss.mask.scale.item() == 3.5
    other = load_model(path, loss="aligned")
    assert other.loss_config == "aligned"


def test_files_of_0_1_0_load_and_do_not_know_their_loss(saved: Path, tmp_path: Path) -> None:
    content = json.loads(DESCRIPTION.to_metadata()["maskloss"])
    for key in ("version", "loss"):
        del content[key]
    for key in ("normalization_eps", "trainable_layers"):
        del content["settings"][key]
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(
        safetensors.torch.load_file(saved), path, metadata={"maskloss": json.dumps(content)}
    )
    loaded = load_model(path)
    assert loaded.description == DESCRIPTION
    assert loaded.loss_config is None


def test_a_file_of_a_later_version_says_so(saved: Path, tmp_path: Path) -> None:
    content = {**json.loads(DESCRIPTION.to_metadata()["maskloss"]), "version": 3}
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(
        safetensors.torch.load_file(saved), path, metadata={"maskloss": json.dumps(content)}
    )
    with pytest.raises(InputError, match="its version must be at most 2 for this version of maskloss, not 3"):
        load_model(path)


# Odd files.

NAN = float("nan")
ODD: list[Any] = [
    *(None, True, 0, -1, 3, 10**30, 1e308, NAN, float("inf"), "", "x", "W" * 2_000_000, 20_000),
    *([], [1], [1, 1], [0, 0, 0], [NAN] * 3, ["a", "b", "c"], [[1]], [20_000], {}, {"a": 1}, [{}]),
    [{"id": 1, "name": "x"}] * 2,
    [{"id": [1], "name": "x"}, {"id": 2, "name": "y"}],
    [{"id": "1", "name": "x"}, {"id": "2", "name": "y"}],
    [{"id": 10**30, "name": "x"}, {"id": 2, "name": "y"}],
    [{"id": 1, "name": "W" * 2_000_000}, {"id": 2, "name": "y"}],
]
FIELDS = [
    "categories",
    "aligned",
    "mask_probs",
    "loss",
    "version",
    "settings",
    "settings.name",
    "settings.num_classes",
    "settings.image_mean",
    "settings.image_std",
    "settings.min_size",
    "settings.max_size",
    "settings.frozen_normalization",
    "settings.normalization_eps",
    "settings.trainable_layers",
    "settings.mask_size",
    "score_thresholds",
]


@pytest.mark.parametrize("field", FIELDS)
def test_odd_descriptions_are_read_or_refused_in_a_line(saved: Path, tmp_path: Path, field: str) -> None:
    tensors = safetensors.torch.load_file(saved)
    path = tmp_path / "model.safetensors"
    refused = []
    for odd in ODD:
        content = json.loads(DESCRIPTION.to_metadata()["maskloss"])
        owner, _, key = field.rpartition(".")
        (content[owner] if owner else content)[key] = odd
        safetensors.torch.save_file(tensors, path, metadata={"maskloss": json.dumps(content)})
        try:
            load_model(path)
        except InputError as error:
            refused.append(str(error))
    assert len(refused) >= len(ODD) // 2
    assert all(str(path) in line for line in refused)
    assert max(map(len, refused)) < 500 + len(str(path))
    assert not any("\n" in line for line in refused)


def changed(tensors: dict[str, Tensor], key: str, make: Any) -> dict[str, Tensor]:
    return {**tensors, key: make(tensors[key])}


BIAS = "roi_heads.box_predictor.cls_score.bias"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: changed(t, BIAS, lambda v: v * float("nan")), "holds values that are not finite"),
        (lambda t: changed(t, BIAS, lambda v: v + float("inf")), "holds values that are not finite"),
        (
            lambda t: changed(t, BIAS, lambda v: v.long()),
            r"cls_score\.bias must have dtype torch\.float32, not torch\.int64",
        ),
        (
            lambda t: changed(t, BIAS, lambda v: v[:-1].clone()),
            "its tensors do not fit the model that it describes",
        ),
        (
            lambda t: {k: v for k, v in t.items() if k != BIAS},
            "its tensors do not fit the model that it describes",
        ),
        (lambda t: {**t, "extra": torch.zeros(2)}, "its tensors do not fit the model that it describes"),
    ],
    ids=["NaN", "infinite", "integers", "another shape", "missing", "one more"],
)
def test_odd_tensors_are_refused(saved: Path, tmp_path: Path, change: Any, message: str) -> None:
    path = tmp_path / "model.safetensors"
    tensors = change(safetensors.torch.load_file(saved))
    safetensors.torch.save_file(tensors, path, metadata=DESCRIPTION.to_metadata())
    with pytest.raises(InputError, match=message):
        load_model(path)
    if "finite" in message:
        with pytest.raises(InputError, match=message):
            read_weights(path)


def test_half_precision_tensors_are_read(saved: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    tensors = changed(safetensors.torch.load_file(saved), BIAS, lambda v: v.half())
    safetensors.torch.save_file(tensors, path, metadata=DESCRIPTION.to_metadata())
    assert load_model(path).model.state_dict()[BIAS].dtype == torch.float32


# torchvision's published weights: its own builder is the oracle, with random weights instead of a download.


@pytest.mark.parametrize(
    ("name", "builder"),
    [
        ("maskrcnn_resnet50_fpn", maskrcnn_resnet50_fpn),
        ("maskrcnn_resnet50_fpn_v2", maskrcnn_resnet50_fpn_v2),
    ],
)
@pytest.mark.parametrize("trainable_layers", [None, 0, 2, 5])
def test_default_weights_build_torchvisions_network(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, builder: Any, trainable_layers: int | None
) -> None:
    torch.manual_seed(0)
    downloaded = builder(weights=None, weights_backbone=None).state_dict()
    for key, value in downloaded.items():
        if "running_var" in key:
            value.uniform_(2, 4)
    monkeypatch.setattr(
        "torchvision.models._api.WeightsEnum.get_state_dict", lambda *_, **__: copy.deepcopy(downloaded)
    )
    stock = builder(weights="DEFAULT", trainable_backbone_layers=trainable_layers)
    config = TrainConfig(*["x"] * 5, model=name, weights="DEFAULT", trainable_layers=trainable_layers)
    model, settings, loaded = initial_model(config, 91)
    assert loaded is not None
    assert not loaded.left
    trained = {key for key, value in model.named_parameters() if value.requires_grad}
    assert trained == {key for key, value in stock.named_parameters() if value.requires_grad}
    frozen_norms = [
        {key for key, module in net.backbone.named_modules() if isinstance(module, FrozenBatchNorm2d)}
        for net in (model, stock)
    ]
    assert frozen_norms[0] == frozen_norms[1]
    if trainable_layers is None:
        images = torch.rand(1, 3, 64, 96)
        with torch.no_grad():
            one, other = (net.eval().backbone(images) for net in (model, stock))
        assert all(other[level].isfinite().all() for level in other)
        for level, values in other.items():
            # Frozen norms are folded into the convolutions, which rounds differently.
            torch.testing.assert_close(one[level], values, rtol=1e-4, atol=1e-5 * float(values.abs().max()))
        # The file rebuilds it.
        description = ModelDescription(
            settings, tuple(Category(i, str(i)) for i in range(1, 91)), aligned=False
        )
        save_model(tmp_path / "model.safetensors", maskloss.convert(model), description)
        with torch.no_grad():
            again = load_model(tmp_path / "model.safetensors").model.backbone(images)
        assert all(torch.equal(again[level], one[level]) for level in one)


def test_how_many_stages_of_a_small_backbone_are_trained() -> None:
    # torchvision's `_mobilenet_extractor` begins stages with the first block and with those of a stride, and has the
    # last block for one of its own.
    mobilenet = [19, 18, 14, 7, 4, 2, 0]
    for name, stages in (("mobilenet_v2", 6), ("resnet18", 5)):
        counts = []
        for layers in range(stages + 1):
            body = build_model(ModelSettings(name, 2, trainable_layers=layers)).backbone.body
            trained = {key.split(".")[0] for key, value in body.named_parameters() if value.requires_grad}
            counts.append(len(trained))
            if name == "mobilenet_v2":
                assert trained == {str(block) for block in range(mobilenet[layers], 19)}
        assert counts[0] == 0
        assert counts == sorted(set(counts))
        every = build_model(ModelSettings(name, 2)).backbone.body
        assert all(value.requires_grad for value in every.parameters())


def test_the_metadata_holds_the_version(saved: Path) -> None:
    with safe_open(saved, "pt") as file:
        assert json.loads(file.metadata()["maskloss"])["version"] == 2
