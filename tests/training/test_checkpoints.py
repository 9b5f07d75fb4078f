"""maskloss/training/checkpoints.py: files read back exactly, and nothing that could run code."""

from __future__ import annotations

import json
import os
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from maskloss.data.coco import Category
from maskloss.detection.models import ModelSettings, build_model
from maskloss.errors import InputError, RunError
from maskloss.losses import ClassAgnosticMaskLoss, MaskBCELoss, MaskRCNNLoss, MaskSoftmaxLoss
from maskloss.training.checkpoints import (
    ModelDescription,
    checkpoint_files,
    load_checkpoint,
    load_model,
    mask_probs_of,
    model_settings_of,
    read_weights,
    save_checkpoint,
    save_model,
)
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
    ),
    (Category(3, "cat"), Category(7, "hot dog \N{HOT DOG}")),
    aligned=True,
)

STATE = {"model": {"w": torch.arange(3.0)}, "optimizer": {"lr": 0.1}, "config": "{}", "seconds": 1.5}


class RunsCode:
    """Writes a file when it is unpickled: what a checkpoint from a stranger may hold."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return (_write_file, (self.path,))


def _write_file(path: str) -> str:
    Path(path).write_text("code has run")
    return path


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


def test_a_description_with_default_sizes_survives_the_round_trip() -> None:
    plain = ModelDescription(ModelSettings("mobilenet_v2", 2), (Category(1, "a"),), aligned=False)
    assert ModelDescription.from_metadata(plain.to_metadata()) == plain


def test_a_saved_model_is_loaded_with_the_same_tensors(saved: Path) -> None:
    torch.manual_seed(3)
    expected = build_model(DESCRIPTION.settings).state_dict()
    model, description = load_model(saved)
    assert description == DESCRIPTION
    assert not model.training
    state = model.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[key], expected[key]) for key in expected)


def test_a_loaded_model_normalises_and_resizes_as_it_was_saved(saved: Path) -> None:
    model, _ = load_model(saved)
    assert model.transform.image_mean == [0.1, 0.2, 0.3]
    assert model.transform.image_std == [0.4, 0.5, 0.6]
    assert model.transform.min_size == (48, 64)
    assert model.transform.max_size == 96


def test_a_loaded_model_leaves_masks_as_probabilities(saved: Path) -> None:
    model, _ = load_model(saved)
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
        loaded, found = load_model(tmp_path / "model.safetensors")
        assert found == description
        assert isinstance(loaded.roi_heads.loss.mask, kind)


def test_a_model_with_masks_of_a_users_own_is_refused_with_the_reason(tmp_path: Path) -> None:
    class Own(MaskSoftmaxLoss):
        """A term with probabilities that no file can hold."""

    assert mask_probs_of(MaskRCNNLoss(mask=Own())) == "custom"
    path = tmp_path / "model.safetensors"
    save_model(path, build_model(DESCRIPTION.settings), replace(DESCRIPTION, mask_probs="custom"))
    with pytest.raises(InputError, match=r"model\.safetensors: its masks come from the mask_probs"):
        load_model(path)


def test_a_description_from_before_there_were_other_masks_is_of_sigmoids() -> None:
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
    save_checkpoint(tmp_path, 1, STATE)
    with pytest.raises(
        InputError, match=r"step-00000001\.pt: is a checkpoint.*name the run's model\.safetensors"
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
def test_a_description_of_something_else_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"w": torch.zeros(2)}, path, metadata={"maskloss": text})
    with pytest.raises(InputError, match=r"model\.safetensors: "):
        load_model(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_classes": 5}, r"settings\.num_classes is 5, but there are 2 categories"),
        ({"name": "mobilenet_v2"}, "its tensors are of another model than it says: has no backbone"),
        ({"name": "resnet99"}, r"settings\.name must be one of maskrcnn_resnet50_fpn, .*, not 'resnet99'"),
        ({"unknown": 1}, "settings must be a mapping of .*, not 'unknown'"),
        ({"image_mean": 5}, r"settings\.image_mean must be three numbers .*, not 5"),
    ],
    ids=str,
)
def test_a_description_of_another_model_than_the_tensors_is_refused(
    saved: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = tmp_path / "model.safetensors"
    content = json.loads(DESCRIPTION.to_metadata()["maskloss"])
    content["settings"].update(changes)
    tensors = safetensors.torch.load_file(saved)
    safetensors.torch.save_file(tensors, path, metadata={"maskloss": json.dumps(content)})
    with pytest.raises(InputError, match=rf"model\.safetensors: .*{message}") as caught:
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


@pytest.mark.parametrize("suffix", ["pt", "pth", "safetensors"])
def test_weights_are_read_from_either_format(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"weights.{suffix}"
    state = {"a": torch.arange(3.0), "b": torch.ones(2, 2)}
    if suffix == "safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save(state, path)
    weights, _ = read_weights(path)
    assert set(weights) == {"a", "b"}
    assert torch.equal(weights["a"], state["a"])


def test_weights_of_torchvisions_reference_scripts_are_read(tmp_path: Path) -> None:
    torch.save({"model": {"a": torch.ones(2)}, "epoch": 3, "args": {"lr": 0.1}}, tmp_path / "weights.pt")
    weights, _ = read_weights(tmp_path / "weights.pt")
    assert list(weights) == ["a"]


@pytest.mark.parametrize("content", [{}, {"a": 3}, [torch.ones(2)], torch.ones(2), 3, {"model": {"a": "b"}}])
def test_a_file_without_a_state_dict_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(InputError, match=r"weights\.pt: holds no state_dict, a dict of tensors"):
        read_weights(tmp_path / "weights.pt")


@pytest.mark.parametrize("new_format", [True, False])
def test_truncated_pt_weights_are_refused(tmp_path: Path, new_format: bool) -> None:
    path = tmp_path / "weights.pt"
    torch.save({"a": torch.rand(100)}, path, _use_new_zipfile_serialization=new_format)
    content = path.read_bytes()
    for kept in {0, 1, 2, 4, 10, *range(20, len(content), 37), len(content) - 1}:
        path.write_bytes(content[:kept])
        with pytest.raises(InputError, match=r"weights\.pt: truncated") as caught:
            read_weights(path)
        assert "\n" not in str(caught.value)


def test_damaged_pt_weights_are_read_or_refused_and_never_anything_else(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save({"a": torch.rand(20)}, path)
    content = path.read_bytes()
    random = np.random.default_rng(0)
    refused = 0
    for _ in range(200):
        damaged = bytearray(content)
        for position in random.integers(0, len(content), 6):
            damaged[position] = random.integers(256)
        path.write_bytes(damaged)
        try:
            read_weights(path)
        except InputError:
            refused += 1
    assert refused > 0


@pytest.mark.parametrize("writer", ["pickle", "torch", "legacy torch"])
@pytest.mark.parametrize("reader", [read_weights, load_checkpoint])
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(
    tmp_path: Path, writer: str, reader: Any
) -> None:
    path, proof = tmp_path / "weights.pt", tmp_path / "proof"
    content = {**STATE, "step": 1, "evil": RunsCode(proof)}
    if writer == "pickle":
        # torch warns of protocols above 2.
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=writer == "torch")
    with pytest.raises(InputError, match=r"weights\.pt: .*not read because such files can run code"):
        reader(path)
    assert not proof.exists()
    # The test itself can fail: a plain load does run it.
    torch.load(path, weights_only=False) if writer != "pickle" else pickle.loads(path.read_bytes())
    assert proof.exists()


def test_settings_come_from_the_description_of_a_model() -> None:
    assert model_settings_of(DESCRIPTION.to_metadata()) == {
        "image_mean": (0.1, 0.2, 0.3),
        "image_std": (0.4, 0.5, 0.6),
        "frozen_normalization": True,
    }


def test_settings_come_from_plain_metadata() -> None:
    metadata = {"image_mean": "[0.5, 0.5, 0.5]", "frozen_normalization": "true", "license": "MIT"}
    found = model_settings_of(metadata)
    assert list(found["image_mean"]) == [0.5, 0.5, 0.5]
    assert found["frozen_normalization"] is True
    assert set(found) == {"image_mean", "frozen_normalization"}


@pytest.mark.parametrize("text", ["0.5, 0.5, 0.5", "5", '"grey"', "[0.5]", "[null, 1, 1]"])
def test_a_mean_in_the_metadata_that_is_not_three_numbers_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="image_mean"):
        model_settings_of({"image_mean": text})


# Checkpoints.


def test_a_checkpoint_reads_back_as_it_was(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 12, STATE)
    state = load_checkpoint(tmp_path / "step-00000012.pt")
    assert state["step"] == 12
    assert torch.equal(state["model"]["w"], STATE["model"]["w"])
    assert {k: v for k, v in state.items() if k not in ("step", "model")} == {
        k: v for k, v in STATE.items() if k != "model"
    }


def test_only_the_newest_two_checkpoints_are_kept(tmp_path: Path) -> None:
    for step in (2, 9, 10, 100):
        save_checkpoint(tmp_path, step, STATE)
    assert [path.name for path in checkpoint_files(tmp_path)] == ["step-00000010.pt", "step-00000100.pt"]
    assert len(list(tmp_path.iterdir())) == 2


def test_what_a_killed_process_was_writing_is_cleared_away(tmp_path: Path) -> None:
    (tmp_path / ".step-00000001.pt.123.tmp").write_bytes(b"half")
    save_checkpoint(tmp_path, 1, STATE)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001.pt"]


def test_an_interruption_while_writing_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, 1, STATE)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_that_cannot_be_written_leaves_the_earlier_ones(tmp_path: Path) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, step, STATE)
    with largest_file(1000), pytest.raises(RunError, match=r"step-00000003\.pt: cannot be written"):
        save_checkpoint(tmp_path, 3, {**STATE, "model": {"w": torch.rand(5000)}})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001.pt", "step-00000002.pt"]
    assert load_checkpoint(tmp_path / "step-00000002.pt")["step"] == 2


def test_a_truncated_checkpoint_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, STATE)
    path = tmp_path / "step-00000001.pt"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"step-00000001\.pt: truncated"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    "content",
    [
        {"w": torch.ones(2)},
        [1, 2],
        3,
        {"step": 1, "model": {}},
        # The optimizer's side of some other library's checkpoint.
        {"step": 1, "model": {}, "optimizer": {}},
    ],
    ids=str,
)
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "step-00000001.pt")
    with pytest.raises(InputError, match=r"step-00000001\.pt: is no checkpoint of maskloss train"):
        load_checkpoint(tmp_path / "step-00000001.pt")
