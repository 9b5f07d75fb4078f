"""maskloss/training/setup.py: device, data, weights and accelerator of a run, and the state of its caller."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torchvision
from accelerate import Accelerator
from accelerate.state import AcceleratorState

import maskloss
from maskloss.errors import InputError
from maskloss.training.loop import train
from maskloss.training.model_file import load_model
from maskloss.training.setup import (
    chosen_device,
    device_of,
    image_repeats,
    make_accelerator,
    make_optimizer,
    read_data,
)
from tests.training.small_runs import small_config, tensors


def test_random_numbers_go_on_as_if_nothing_had_been_trained(shapes: Path, tmp_path: Path) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    train(small_config(shapes, tmp_path / "run", max_steps=1))
    assert torch.equal(torch.rand(3), expected)
    with pytest.raises(InputError, match="already holds a run"):
        train(small_config(shapes, tmp_path / "run", max_steps=1))
    torch.manual_seed(7)
    assert torch.equal(torch.rand(3), expected)


def test_the_callers_accelerator_stays_what_it_was(shapes: Path, tmp_path: Path) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    own = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=5)
    try:
        train(small_config(shapes, tmp_path / "run", max_steps=1, accumulation_steps=2))
        assert own.mixed_precision == "bf16"
        assert own.gradient_accumulation_steps == 5
        assert Accelerator(cpu=True, mixed_precision="bf16").mixed_precision == "bf16"
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_nothing_is_printed_and_logging_is_left_alone(
    shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    logger = logging.getLogger("maskloss")
    before = list(logger.handlers), logger.level, logger.propagate
    caplog.set_level("INFO", "maskloss")
    train(small_config(shapes, tmp_path / "run", max_steps=2))
    assert capsys.readouterr().out == ""
    assert any(message.startswith("step 1/2  loss ") for message in caplog.messages)
    assert any("mask AP" in message for message in caplog.messages)
    caplog.set_level(before[1], "maskloss")
    assert (list(logger.handlers), logger.level, logger.propagate) == before


def test_cuda_without_a_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="--device cuda: torch finds no CUDA device"):
        chosen_device("cuda")
    assert chosen_device("auto") == chosen_device("cpu") == torch.device("cpu")


def test_cuda_graphs_on_a_cpu_are_refused(shapes: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--cuda-graphs needs a CUDA GPU, but the device is cpu"):
        device_of(small_config(shapes, tmp_path / "run", cuda_graphs=True))


def test_cuda_graphs_refuse_accumulated_gradients(shapes: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--accumulation-steps must be 1 with --cuda-graphs"):
        small_config(shapes, tmp_path / "run", cuda_graphs=True, accumulation_steps=2)


def test_fp16_on_a_cpu_is_refused(shapes: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--mixed-precision fp16 needs a GPU"):
        train(small_config(shapes, tmp_path / "run", mixed_precision="fp16"))
    assert not (tmp_path / "run").exists()


def test_far_too_many_workers_are_refused(shapes: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--workers 5000 is far more than this machine's"):
        train(small_config(shapes, tmp_path / "run", workers=5000))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "5"),
        ("ACCELERATE_MIXED_PRECISION", "bf16"),
        ("ACCELERATE_USE_CPU", "true"),
        ("ACCELERATE_TORCH_DEVICE", "meta"),
        ("ACCELERATE_DYNAMO_BACKEND", "EAGER"),
    ],
)
def test_the_config_wins_over_the_environment(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    config = small_config(shapes, tmp_path / "run", accumulation_steps=2)
    monkeypatch.setenv(name, value)
    made = make_accelerator(config, torch.device("cpu"), [])
    assert made.gradient_accumulation_steps == 2
    assert made.mixed_precision == "no"
    assert made.device == torch.device("cpu")
    assert str(made.state.dynamo_plugin.backend.value) == "NO"
    assert os.environ[name] == value


@pytest.mark.parametrize("engine", ["DEEPSPEED", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG"])
def test_engines_of_the_environment_are_refused_by_name(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    with pytest.raises(InputError, match=f"ACCELERATE_USE_{engine} asks for an engine"):
        train(small_config(shapes, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_set_without_a_usable_object_is_refused_before_anything_is_written(
    shapes: Path, tmp_path: Path
) -> None:
    shutil.copytree(shapes, tmp_path / "data")
    path = tmp_path / "data/train/annotations.json"
    document = json.loads(path.read_text())
    document["annotations"] = []
    path.write_text(json.dumps(document))
    with pytest.raises(InputError, match=r"annotations\.json: contains no usable object"):
        train(small_config(tmp_path / "data", tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_validation_categories_that_training_lacks_are_refused(shapes: Path, tmp_path: Path) -> None:
    shutil.copytree(shapes, tmp_path / "data")
    path = tmp_path / "data/val/annotations.json"
    document = json.loads(path.read_text())
    document["categories"].append({"id": 9, "name": "hexagon"})
    document["annotations"][0]["category_id"] = 9
    path.write_text(json.dumps(document))
    with pytest.raises(InputError, match=r"val/annotations\.json: category 9: 'hexagon' is not among"):
        train(small_config(tmp_path / "data", tmp_path / "run"))
    assert not (tmp_path / "run").exists()


#: A learning rate at which a step does not move any weight measurably.
STANDING = {"learning_rate": 1e-12, "weight_decay": 0.0, "max_steps": 1, "batch_size": 1}


def test_the_weights_of_a_whole_model_are_loaded(
    finished: Path, shapes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "maskloss")
    path = finished / "model.safetensors"
    train(small_config(shapes, tmp_path / "run", weights=str(path), **STANDING))
    said = caplog.messages[0]
    expected = tensors(finished)
    assert said.startswith(
        f"{path}: loaded {len(expected)} tensors; 0 of the model keep their start values; 0 of"
    )
    state = tensors(tmp_path / "run")
    for key in expected:
        if "running" not in key and "num_batches" not in key:
            torch.testing.assert_close(state[key], expected[key], rtol=1e-6, atol=1e-7)


def test_the_weights_of_a_backbone_are_loaded_and_its_norms_frozen(
    shapes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "maskloss")
    torch.manual_seed(5)
    backbone = torchvision.models.resnet18(weights=None).state_dict()
    backbone["bn1.running_mean"] += 0.5
    torch.save(backbone, tmp_path / "resnet18.pt")
    train(small_config(shapes, tmp_path / "run", weights=str(tmp_path / "resnet18.pt"), **STANDING))
    said = caplog.messages[0]
    # 13 convolutions, and four tensors of each of the 13 norms.
    assert said.startswith(f"{tmp_path / 'resnet18.pt'}: loaded 65 tensors; ")
    assert "rpn.head" in said or "backbone.fpn" in said
    assert "2 of the file are not used (fc)" in said
    state = tensors(tmp_path / "run")
    for key, value in backbone.items():
        if not key.startswith("fc.") and "num_batches" not in key:
            torch.testing.assert_close(state[f"backbone.body.{key}"], value, rtol=1e-6, atol=1e-7)
    description = load_model(tmp_path / "run/model.safetensors").description
    assert description.settings.frozen_normalization is True


def test_mean_std_and_norms_come_from_the_weights_metadata(shapes: Path, tmp_path: Path) -> None:
    state = {k: v.clone() for k, v in torchvision.models.resnet18(weights=None).state_dict().items()}
    metadata = {
        "image_mean": "[0.5, 0.4, 0.3]",
        "image_std": "[0.2, 0.2, 0.2]",
        "frozen_normalization": "false",
    }
    safetensors.torch.save_file(state, tmp_path / "w.safetensors", metadata=metadata)
    config = small_config(
        shapes,
        tmp_path / "run",
        weights=str(tmp_path / "w.safetensors"),
        # What the config says comes first.
        image_std=[0.25, 0.25, 0.25],
        **STANDING,
    )
    train(config)
    description = load_model(tmp_path / "run/model.safetensors").description
    assert description.settings.image_mean == (0.5, 0.4, 0.3)
    assert description.settings.image_std == (0.25, 0.25, 0.25)
    assert description.settings.frozen_normalization is False


@pytest.mark.slow
def test_the_shared_mobilenet_weights_are_loaded(
    shared: Path, shapes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "maskloss")
    path = shared / "weights" / "mobilenet_v2_imagenet.safetensors"
    half = [0.5, 0.5, 0.5]
    train(
        small_config(
            shapes,
            tmp_path / "run",
            model="mobilenet_v2",
            weights=str(path),
            image_mean=half,
            image_std=half,
            **STANDING,
        )
    )
    said = caplog.messages[0]
    # 52 convolutions and four tensors of each norm; the classifier has no place.
    assert said.startswith(f"{path}: loaded 260 tensors; ")
    assert "2 of the file are not used (classifier.1)" in said
    expected = safetensors.torch.load_file(path)
    state = tensors(tmp_path / "run")
    for key, value in expected.items():
        if key.startswith("features.") and "num_batches" not in key:
            name = f"backbone.body.{key.removeprefix('features.')}"
            torch.testing.assert_close(state[name], value.float(), rtol=1e-6, atol=1e-7)
    description = load_model(tmp_path / "run/model.safetensors").description
    assert description.settings.image_mean == (0.5, 0.5, 0.5)
    assert description.settings.frozen_normalization is True


def test_weights_without_a_fitting_tensor_are_refused(shapes: Path, tmp_path: Path) -> None:
    torch.save({"encoder.weight": torch.ones(3)}, tmp_path / "other.pt")
    with pytest.raises(InputError, match=r"other\.pt: "):
        train(small_config(shapes, tmp_path / "run", weights=str(tmp_path / "other.pt"), max_steps=1))


def test_missing_weights_are_refused(shapes: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.pt: cannot be read"):
        train(small_config(shapes, tmp_path / "run", weights=str(tmp_path / "nowhere.pt")))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tpu", "--device must be cpu, cuda, cuda:1, mps or auto, not 'tpu'"),
        ("cuda:x", "--device must be"),
        ("cuda:1", "--device cuda:1: torch finds no CUDA device"),
        ("mps", "--device mps: torch finds no such device"),
    ],
)
def test_a_device_that_is_not_there_is_refused(
    name: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(InputError, match=message):
        chosen_device(name)


def test_a_certain_gpu_is_chosen_by_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert chosen_device("cuda:1") == torch.device("cuda", 1)
    assert chosen_device("auto") == torch.device("cuda")
    with pytest.raises(InputError, match="this machine has 2 CUDA devices, numbered from 0"):
        chosen_device("cuda:2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="choose the GPUs by CUDA_VISIBLE_DEVICES"):
        chosen_device("cuda:1")


def test_weight_decay_of_norms_and_biases(tmp_path: Path, shapes: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 1), torch.nn.BatchNorm2d(2), torch.nn.GroupNorm(1, 2))
    model = torchvision.models.detection.MaskRCNN(  # convert's loss holder needs a detector
        torchvision.models.detection.backbone_utils.BackboneWithFPN(
            torch.nn.Sequential(model), {"0": "0"}, [2], 256
        ),
        2,
    )
    config = small_config(
        shapes, tmp_path / "run", weight_decay=0.1, norm_weight_decay=0.0, bias_weight_decay=0.01
    )
    maskloss.convert(model)
    optimizer = make_optimizer(config, model)
    names = {id(value): name for name, value in model.named_parameters()}
    found = {
        group["weight_decay"]: {names[id(value)] for value in group["params"]}
        for group in optimizer.param_groups
    }
    assert set(found) == {0.1, 0.0, 0.01}
    assert found[0.0] == {
        f"backbone.body.0.{layer}.{kind}" for layer in (1, 2) for kind in ("weight", "bias")
    }
    assert all(name.endswith("bias") for name in found[0.01])
    assert not any(name.endswith("bias") for name in found[0.1])
    assert sum(map(len, found.values())) == len(names)
    (group,) = make_optimizer(small_config(shapes, tmp_path / "run"), model).param_groups
    assert len(group["params"]) == len(names)


def test_repeated_images_lengthen_an_epoch(shapes: Path, tmp_path: Path) -> None:
    config = small_config(shapes, tmp_path / "run", repeat_threshold=1.0)
    training, _ = read_data(config)
    repeats = image_repeats(config, training)
    # By hand: the rarest category of each image, over images that have it.
    kinds = [{annotation.category_id for annotation in image.objects} for image in training.images]
    expected = [
        max((len(kinds) / sum(kind in other for other in kinds)) ** 0.5 for kind in own) if own else 1.0
        for own in kinds
    ]
    assert repeats.tolist() == pytest.approx(expected)


def test_copy_paste_and_repeats_resume_exactly(shapes: Path, tmp_path: Path) -> None:
    options = {"copy_paste": 0.7, "repeat_threshold": 1.0, "scale_jitter": [0.7, 1.5], "checkpoint_every": 2}
    train(small_config(shapes, tmp_path / "whole", max_steps=4, schedule="constant", **options))
    train(small_config(shapes, tmp_path / "parts", max_steps=2, schedule="constant", **options))
    train(small_config(shapes, tmp_path / "parts", max_steps=4, schedule="constant", resume=True, **options))
    whole, parts = tensors(tmp_path / "whole"), tensors(tmp_path / "parts")
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())
