"""The model file and `maskloss evaluate`: the numbers of the run, whatever its loss, and one line for any odd file."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch

from maskloss.cli import main
from maskloss.errors import InputError
from maskloss.losses import SeesawLoss
from maskloss.training.checkpoints import ModelDescription, load_checkpoint, load_model, restore
from maskloss.training.loop import train
from maskloss.training.losses import is_own_loss
from tests.training.small_runs import TERMS, learned_loss, small_config

LEARNED = "tests.training.small_runs.learned_loss"
MAPPING: dict[str, Any] = {
    "preset": "aligned",
    "classification": {"class_path": "maskloss.losses.SeesawLoss", "init_args": {"num_classes": 4}},
    "mask": "maskloss.losses.MaskSoftmaxLoss",
    "weights": {"mask": 2.5, "box": 0.5},
    "mask_targets": {"binary": True},
    "normalizers": {"box": "maskloss.losses.per_positive"},
}


def evaluated(shapes: Path, checkpoint: Path, output: Path, *options: Any) -> dict[str, Any]:
    arguments = ["evaluate", "--checkpoint", checkpoint, "--images", shapes / "val/images", "--device", "cpu",
                 "--annotations", shapes / "val/annotations.json", "--output", output, *options]  # fmt: skip
    main([str(argument) for argument in arguments])
    metrics: dict[str, Any] = json.loads((output / "metrics.json").read_text())
    return metrics


def metrics_of(run: Path) -> dict[str, Any]:
    metrics: dict[str, Any] = json.loads((run / "metrics.json").read_text())
    return metrics


def described(path: Path) -> dict[str, Any]:
    with safetensors.safe_open(path, "pt") as file:
        content: dict[str, Any] = json.loads(file.metadata()["maskloss"])
    return content


# One number, wherever it is asked.


@pytest.mark.parametrize(
    ("loss", "precision", "seed"),
    [
        ("detectron2", "no", 0),
        ("matterport", "no", 3),
        ("paper", "bf16", 5),
        (MAPPING, "bf16", 0),
    ],
    ids=["detectron2", "matterport", "paper", "mapping"],
)
def test_evaluate_gives_the_losses_that_the_run_wrote(
    shapes: Path, tmp_path: Path, loss: Any, precision: Any, seed: int
) -> None:
    config = small_config(shapes, tmp_path / "run", loss=loss, mixed_precision=precision, seed=seed)
    train(config)
    written = metrics_of(tmp_path / "run")
    # The folder stands for the model in it.
    assert evaluated(shapes, tmp_path / "run", tmp_path / "out") == written
    one_by_one = evaluated(shapes, tmp_path / "run/model.safetensors", tmp_path / "one", "--batch-size", 1)
    assert one_by_one["loss"] == pytest.approx(written["loss"], rel=1e-6)
    assert one_by_one["segm"] == written["segm"]
    # And not torchvision's, which 0.1.0 gave for each of them.
    stock = evaluated(
        shapes, tmp_path / "run", tmp_path / "stock", "--loss", "torchvision"
    ) if loss != MAPPING else {"loss": {}}  # fmt: skip
    assert stock["loss"] != written["loss"]


def test_results_of_an_evaluation_are_written_beside_its_metrics(
    finished: Path, shapes: Path, tmp_path: Path
) -> None:
    evaluated(shapes, finished, tmp_path / "out")
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert {result["image_id"] for result in results} == {1, 2}


def test_what_a_loss_has_gathered_is_in_the_file_apart_from_the_model(shapes: Path, tmp_path: Path) -> None:
    train(small_config(shapes, tmp_path / "run", loss=MAPPING))
    tensors = safetensors.torch.load_file(tmp_path / "run/model.safetensors")
    model, description = load_model(tmp_path / "run")
    assert description.loss == MAPPING
    assert description.aligned
    assert description.mask_probs == "softmax"
    assert not {"aligned", "mask_probs"} & set(described(tmp_path / "run/model.safetensors"))
    seesaw = model.roi_heads.loss.classification
    assert isinstance(seesaw, SeesawLoss)
    of_loss = {key: tensor for key, tensor in tensors.items() if key.startswith(".")}
    assert set(of_loss) == {f".loss.classification.{key}" for key in seesaw.state_dict()}
    # 2 steps of 2 images in whose RoIs there are objects.
    assert any(value.sum() > 0 for value in of_loss.values())
    for key, value in seesaw.state_dict().items():
        assert torch.equal(value, of_loss[f".loss.classification.{key}"])
    # What is left is the model's, as torchvision has it.
    model.load_state_dict({key: tensor for key, tensor in tensors.items() if key not in of_loss}, strict=True)


# Losses of a user's own.


@pytest.fixture(scope="module")
def users(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a loss that a user has written and that has a parameter."""
    output = tmp_path_factory.mktemp("users") / "run"
    train(small_config(shapes, output, loss=LEARNED))
    return output


def test_a_users_loss_is_evaluated_where_it_is_named_again(
    users: Path, shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluated(shapes, users, tmp_path / "out", "--loss", LEARNED) == metrics_of(users)
    assert "note" not in capsys.readouterr().err


def test_without_it_the_losses_are_null_and_one_line_says_what_is_needed(
    users: Path, shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = evaluated(shapes, users, tmp_path / "out")
    assert found == {**metrics_of(users), "loss": None}
    notes = [line for line in capsys.readouterr().err.splitlines() if "note" in line]
    assert notes == [f"note: the losses need --loss {LEARNED}"]


def test_another_loss_is_said_to_be_another_and_changes_no_detection(
    users: Path, shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = evaluated(shapes, users, tmp_path / "out", "--loss", "aligned")
    assert f"those of --loss; the model was trained with {LEARNED}" in capsys.readouterr().err
    written = metrics_of(users)
    assert (found["bbox"], found["segm"]) == (written["bbox"], written["segm"])
    assert found["loss"]["loss_mask"] != written["loss"]["loss_mask"]


def test_a_loss_that_reads_masks_otherwise_is_refused(users: Path) -> None:
    with pytest.raises(InputError, match=f"name the loss that it was trained with {LEARNED}"):
        load_model(users, {"mask": "maskloss.losses.MaskSoftmaxLoss"})


@pytest.mark.parametrize(
    "loss",
    [
        "marked.loss",
        {"mask": "marked.loss"},
        {"mask": {"class_path": "marked.loss"}},
        {"mask": {"class_path": "maskloss.losses.MaskBCELoss", "init_args": {"x": {"class_path": "marked.loss"}}}},
        {"mask": {"class_path": "maskloss.losses.MaskBCELoss", "init_args": {"x": [[{"class_path": "marked.loss"}]]}}},
        {"normalizers": {"box": {"class_path": "marked.loss"}}},
        {"mask": "maskloss.losses.boxes.marked"},
        {"mask": "os.getcwd"},
        {"mask": {"class_path": ["marked.loss"]}},
    ],
)  # fmt: skip
def test_nothing_is_imported_because_a_file_says_so(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: Any
) -> None:
    (tmp_path / "marked.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')\ndef loss(*a, **k): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert not is_own_loss(loss)
    content = {**described(finished / "model.safetensors"), "loss": loss, "aligned": True}
    tensors = safetensors.torch.load_file(finished / "model.safetensors")
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(tensors, path, metadata={"maskloss": json.dumps(content)})
    load_model(path)
    assert not (tmp_path / "mark").exists()
    assert "marked" not in sys.modules


def test_a_file_of_0_1_0_is_read_and_its_loss_unknown(
    finished: Path, shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = described(finished / "model.safetensors")
    settings = {
        k: v for k, v in new["settings"].items() if k not in ("trainable_layers", "normalization_eps")
    }
    old = {"settings": settings, "categories": new["categories"], "aligned": False}
    tensors = safetensors.torch.load_file(finished / "model.safetensors")
    path = tmp_path / "old.safetensors"
    safetensors.torch.save_file(tensors, path, metadata={"maskloss": json.dumps(old)})
    written = metrics_of(finished)
    assert evaluated(shapes, path, tmp_path / "out") == {**written, "loss": None}
    assert f"{path} does not say what its loss was; the losses need --loss" in capsys.readouterr().err
    assert evaluated(shapes, path, tmp_path / "named", "--loss", "torchvision") == written


# Odd descriptions.

ODD: list[Any] = [
    None, True, 0, -1, 1.5, 1e308, 10**30, "", "x", "1", [], [0], [None], [1, 2], [0, 0, 0], [[1]], ["a", "b", "c"],
    [float("nan")] * 3, [-1, -1, -1], [20000], {}, {"a": 1}, "W" * 2_000_000, [10**30] * 3, [1e-30] * 3, 20000,
]  # fmt: skip
FIELDS: list[tuple[str | int, ...]] = [
    ("format_version",),
    ("settings",),
    *(("settings", name) for name in (
        "name", "num_classes", "image_mean", "image_std", "frozen_normalization", "min_size", "max_size",
        "trainable_layers", "normalization_eps", "made_up",
    )),
    ("categories",),
    ("categories", 0),
    ("categories", 1, "id"),
    ("categories", 1, "name"),
    ("loss",),
    ("aligned",),
    ("mask_probs",),
]  # fmt: skip


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: ".".join(map(str, field)))
def test_an_odd_field_is_one_short_line_that_names_it(finished: Path, tmp_path: Path, field: Any) -> None:
    tensors = safetensors.torch.load_file(finished / "model.safetensors")
    good = {
        **described(finished / "model.safetensors"),
        "aligned": True,
        "mask_probs": "sigmoid",
        "loss": None,
    }
    messages: list[str] = []
    for value in ODD:
        content = copy.deepcopy(good)
        place = content
        for key in field[:-1]:
            place = place[key]
        place[field[-1]] = value
        text = json.dumps(content)
        try:
            description = ModelDescription.from_metadata({"maskloss": text})
        except ValueError as error:
            messages.append(str(error))
            continue
        # What is accepted is a model, or has other tensors.
        path = tmp_path / "model.safetensors"
        safetensors.torch.save_file(tensors, path, metadata={"maskloss": text})
        try:
            model, _ = load_model(path)
        except InputError:
            # Constant batch norms have fewer tensors than the file.
            assert field == ("settings", "frozen_normalization")
            continue
        with torch.no_grad():
            scores = model([torch.rand(3, 40, 60)])[0]["scores"]
        assert scores.isfinite().all(), (field, value, description)
    assert len(messages) >= 12
    for message in messages:
        assert len(message.splitlines()) == 1
        assert len(message) < 300
        assert str(field[-1]) in message or "JSON" in message or field[:1] == ("settings",)


def test_a_description_of_a_newer_version_says_so(finished: Path) -> None:
    content = {**described(finished / "model.safetensors"), "format_version": 3}
    with pytest.raises(ValueError, match="format_version is 3; a newer maskloss wrote it"):
        ModelDescription.from_metadata({"maskloss": json.dumps(content)})


def test_ids_must_differ(finished: Path) -> None:
    content = described(finished / "model.safetensors")
    content["categories"][1]["id"] = content["categories"][0]["id"]
    with pytest.raises(ValueError, match=r"categories\[1\]\.id must be an id of its own, not 1"):
        ModelDescription.from_metadata({"maskloss": json.dumps(content)})


@pytest.mark.parametrize(
    "loss",
    [
        {"weights": {"mask": "x"}},
        {"weights": 3},
        {"preset": ["aligned"]},
        {"unknown": 1},
        {"mask": {"class_path": "maskloss.losses.MaskDiceLoss", "init_args": [1]}},
        {"mask": {"class_path": "maskloss.losses.MaskDiceLoss", "init_args": {"smooth": -1}}},
        {"mask": {"class_path": "maskloss.losses.MaskDiceLoss", "init_args": {"unknown": 1}}},
        {"mask": {"class_path": "maskloss.losses.MaskDiceLoss", "more": 1}},
        {"mask": "maskloss.losses.LossWeights"},
    ],
)
def test_a_loss_of_our_own_that_cannot_be_made_is_one_line(finished: Path, tmp_path: Path, loss: Any) -> None:
    content = {**described(finished / "model.safetensors"), "loss": loss}
    tensors = safetensors.torch.load_file(finished / "model.safetensors")
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(tensors, path, metadata={"maskloss": json.dumps(content)})
    with pytest.raises(InputError, match=r"model\.safetensors: .*loss") as caught:
        load_model(path)
    assert len(str(caught.value).splitlines()) == 1


# Odd tensors.


def spoilt(state: dict[str, torch.Tensor], how: str) -> dict[str, torch.Tensor]:
    key = "roi_heads.mask_predictor.conv5_mask.weight"
    state = dict(state)
    if how in ("nan", "inf"):
        state[key] = state[key].clone()
        state[key].view(-1)[-1] = float(how)
    elif how in ("float16", "int32", "complex64"):
        state[key] = state[key].to(getattr(torch, how))
    elif how == "shape":
        state[key] = state[key][:1]
    elif how == "missing":
        del state[key]
    elif how == "extra":
        state["roi_heads.more.weight"] = torch.zeros(1)
    elif how == "variance":
        state["backbone.body.bn1.running_var"] = -torch.ones(64)
    elif how == "classes":
        state["roi_heads.box_predictor.cls_score.weight"] = torch.zeros(9, 512)
    elif how == "loss":
        state[".loss.mask.weight"] = torch.zeros(1)
    return state


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("nan", "conv5_mask.weight has values that are not finite"),
        ("inf", "conv5_mask.weight has values that are not finite"),
        ("float16", r"conv5_mask.weight is torch.float16, not torch.float32"),
        ("int32", r"conv5_mask.weight is torch.int32, not torch.float32"),
        ("complex64", r"conv5_mask.weight is torch.complex64, not torch.float32"),
        ("shape", r"conv5_mask.weight is \(1, .*not \("),
        ("missing", "has no roi_heads.mask_predictor.conv5_mask.weight"),
        ("extra", "the model that it describes has no roi_heads.more.weight"),
        ("variance", "backbone.body.bn1.running_var has negative variances"),
        ("classes", "of 9 classes, not 4"),
        ("loss", "the loss that it describes has no mask.weight"),
    ],
)
def test_odd_tensors_of_a_model_are_one_line(finished: Path, tmp_path: Path, how: str, message: str) -> None:
    path = tmp_path / "model.safetensors"
    metadata = {"maskloss": json.dumps(described(finished / "model.safetensors"))}
    tensors = safetensors.torch.load_file(finished / "model.safetensors")
    safetensors.torch.save_file(spoilt(tensors, how), path, metadata=metadata)
    with pytest.raises(InputError, match=rf"model\.safetensors: .*{message}") as caught:
        load_model(path)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("how", ["nan", "inf", "int32", "complex64", "variance"])
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_weights_to_start_from_that_are_no_weights_are_refused(
    finished: Path, shapes: Path, tmp_path: Path, how: str, suffix: str
) -> None:
    path = tmp_path / f"weights.{suffix}"
    tensors = spoilt(safetensors.torch.load_file(finished / "model.safetensors"), how)
    if suffix == "pt":
        torch.save(tensors, path)
    else:
        safetensors.torch.save_file(tensors, path)
    with pytest.raises(InputError, match=rf"weights\.{suffix}: (roi_heads|backbone)\S+ (has|is) "):
        train(small_config(shapes, tmp_path / "run", weights=str(path)))
    assert not (tmp_path / "run/history.jsonl").exists()


# Odd checkpoints.


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("step", value) for value in ("3", None, 1.5, True, -1, 0, [3], torch.ones(2))),
        *(("seconds", value) for value in ("1", None, float("nan"), -1.0, True, [1.0])),
        *(("config", value) for value in ("", "{", "[]", "3", None, {"max_steps": 3}, "[" * 100_000)),
        *(("model", value) for value in (None, 3, [], {"w": 3}, {3: torch.ones(1)})),
        ("model", {"w": torch.tensor([1.0, torch.nan])}),
        *(("model", {"w": torch.ones(2, device="meta")}), ("model", {"w": torch.ones(2).to_sparse()})),
        *(("optimizer", value) for value in (None, 3, [])),
        *(("loss", value) for value in (3, None, [], {"w": torch.ones(2, device="meta")})),
        *(("scaler", value) for value in (3, "x")),
        *(("categories", value) for value in (3, "x", {})),
    ],
)  # fmt: skip
def test_an_odd_checkpoint_is_one_line_that_names_the_field(tmp_path: Path, field: str, value: Any) -> None:
    state = {
        "step": 3,
        "seconds": 1.5,
        "config": "{}",
        "model": {"w": torch.ones(2)},
        "optimizer": {},
        "loss": {},
    }
    path = tmp_path / "step-00000003.pt"
    torch.save(state, path)
    assert load_checkpoint(path)["step"] == 3
    torch.save({**state, field: value}, path)
    with pytest.raises(
        InputError, match=rf"step-00000003\.pt: is no checkpoint of maskloss train: {field}"
    ) as caught:
        load_checkpoint(path)
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "how",
    ["shape", "state shape", "meta", "nan", "groups", "text", "rate", "state a number", "missing", "params"],
)
def test_an_optimizer_of_something_else_is_one_line(how: str) -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    checkpoint = {"model": model.state_dict(), "optimizer": copy.deepcopy(optimizer.state_dict())}
    fresh = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    loss = torch.nn.Module()
    restore(Path("run"), copy.deepcopy(checkpoint), model, loss, fresh)
    assert torch.equal(fresh.state[model.weight]["momentum_buffer"], torch.ones(2, 3))
    state: Any = checkpoint["optimizer"]
    if how == "shape":
        checkpoint["model"]["weight"] = torch.ones(4, 4)
    elif how == "state shape":
        state["state"][0]["momentum_buffer"] = torch.ones(5)
    elif how == "meta":
        state["state"][0]["momentum_buffer"] = torch.ones(2, 3, device="meta")
    elif how == "nan":
        state["state"][0]["momentum_buffer"] = torch.full((2, 3), torch.nan)
    elif how == "groups":
        state["param_groups"] = state["param_groups"] * 2
    elif how == "text":
        state["param_groups"] = "x"
    elif how == "rate":
        state["param_groups"][0]["momentum"] = "0.9"
    elif how == "state a number":
        state["state"][0] = 3
    elif how == "missing":
        del state["state"]
    else:
        state["param_groups"][0]["params"] = [0]
    fresh = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with pytest.raises(InputError, match="run: the checkpoint is of another model: ") as caught:
        restore(Path("run"), checkpoint, model, loss, fresh)
    assert len(str(caught.value).splitlines()) == 1


# A loss that learns.


def test_a_losss_own_parameter_is_trained_saved_and_resumed_exactly(shapes: Path, tmp_path: Path) -> None:
    whole = small_config(
        shapes, tmp_path / "whole", loss=LEARNED, max_steps=4, checkpoint_every=2, weight_decay=0.5
    )
    train(whole)
    train(
        small_config(
            shapes, tmp_path / "run", loss=LEARNED, max_steps=4, checkpoint_every=2, weight_decay=0.5
        )
    )
    (tmp_path / "run/checkpoints/step-00000004.pt").unlink()
    resumed = small_config(
        shapes, tmp_path / "run", loss=LEARNED, max_steps=4, checkpoint_every=2, weight_decay=0.5, resume=True
    )
    train(resumed)
    files = [safetensors.torch.load_file(tmp_path / name / "model.safetensors") for name in ("whole", "run")]
    key = ".loss.mask.log_scale"
    assert files[0][key] != learned_loss().mask.log_scale
    assert all(torch.equal(files[0][k], files[1][k]) for k in files[0])
    assert metrics_of(tmp_path / "whole") == metrics_of(tmp_path / "run")
    groups = load_checkpoint(tmp_path / "run/checkpoints/step-00000004.pt")["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.5, 0.0]


def test_a_loss_that_learns_has_the_terms_of_any_other(users: Path) -> None:
    assert set(metrics_of(users)["loss"]) == {"loss", *TERMS}


def test_a_mapping_is_named_on_the_command_line_as_json(shapes: Path, tmp_path: Path) -> None:
    loss = {"mask": {"class_path": "tests.training.small_runs.LearnedScale"}, "weights": {"box": 2.0}}
    train(small_config(shapes, tmp_path / "run", loss=loss))
    written = metrics_of(tmp_path / "run")
    assert evaluated(shapes, tmp_path / "run", tmp_path / "without")["loss"] is None
    assert evaluated(shapes, tmp_path / "run", tmp_path / "with", "--loss", json.dumps(loss)) == written
