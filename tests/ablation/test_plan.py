"""Tests of `maskloss.ablation.plan`: valid and invalid YAML files of sweeps."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from maskloss.ablation.plan import read_plan
from maskloss.errors import InputError
from tests.training.small_runs import write_data


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def content(data: Path) -> dict[str, Any]:
    return {
        "base": {
            "train_images": str(data / "train/images"),
            "train_annotations": str(data / "train/annotations.json"),
            "val_images": str(data / "train/images"),
            "val_annotations": str(data / "train/annotations.json"),
            "model": "resnet18",
            "max_steps": 2,
            "min_size": 64,
            "device": "cpu",
        },
        "variants": {"bce": {}, "dice": {"loss": {"mask": "maskloss.losses.MaskDiceLoss"}, "max_steps": 3}},
        "seeds": [3, 1],
    }


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "sweep.yaml"


def written(file: Path, content: dict[str, Any]) -> Path:
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return file


def test_runs_are_the_base_with_each_variants_changes_seed_by_seed(file, content, tmp_path):
    plan = read_plan(written(file, content), tmp_path / "out")
    assert [(run.variant, run.seed) for run in plan.runs] == [
        ("bce", 3),
        ("dice", 3),
        ("bce", 1),
        ("dice", 1),
    ]
    assert plan.baseline == "bce"
    assert plan.seeds == (3, 1)
    assert (plan.cpus, plan.gpus) == (1, 0)
    bce, dice, *_ = (run.config for run in plan.runs)
    assert bce.output == str(tmp_path / "out/runs/bce/seed-3")
    assert (bce.max_steps, dice.max_steps) == (2, 3)
    assert (bce.seed, bce.resume, bce.min_size) == (3, True, 64)
    assert dice.loss == {"mask": "maskloss.losses.MaskDiceLoss"}
    assert len(plan.validation.images) == 4
    assert not (tmp_path / "out").exists()


def test_changes_of_a_variant_are_not_modified(file, content, tmp_path):
    terms = [{"class_path": "maskloss.losses.MaskBCELoss"}, {"class_path": "maskloss.losses.MaskDiceLoss"}]
    loss = {"mask": {"class_path": "maskloss.losses.WeightedSum", "init_args": {"terms": terms}}}
    content["variants"]["sum"] = {"loss": loss}
    plan = read_plan(written(file, content), tmp_path / "out")
    assert json.loads(json.dumps(plan.variants)) == content["variants"]
    assert len(plan.runs[-1].config.make_loss().mask.terms) == 2
    json.dumps(asdict(plan.runs[-1].config))


def test_base_may_be_a_file_such_as_the_config_of_a_run(file, content, tmp_path):
    (tmp_path / "config.yaml").write_text(
        yaml.safe_dump({**content["base"], "output": "elsewhere", "seed": 7})
    )
    plan = read_plan(written(file, {**content, "base": "config.yaml"}), tmp_path / "out")
    assert {run.seed for run in plan.runs} == {3, 1}
    assert plan.runs[0].config.max_steps == 2


def test_baseline_and_resources_are_read(file, content, tmp_path):
    plan = read_plan(written(file, {**content, "baseline": "dice", "cpus": 2, "gpus": 0.5}), tmp_path)
    assert (plan.baseline, plan.cpus, plan.gpus) == ("dice", 2, 0.5)


def test_a_users_module_beside_the_file_is_found(file, content, tmp_path):
    (tmp_path / "losses_beside.py").write_text("def l1(z, t):\n    return (z.sigmoid() - t).abs()\n")
    content["variants"]["mine"] = {"loss": {"mask": "losses_beside.l1"}}
    assert len(read_plan(written(file, content), tmp_path / "out").runs) == 6


def changed(**changes: Any) -> Any:
    return lambda content: {**content, **changes}


def variant(changes: Any, name: str = "mine") -> Any:
    return lambda content: {**content, "variants": {"bce": {}, name: changes}}


def penalty(name: str) -> dict[str, Any]:
    return {"loss": {"regularization": f"tests.training.test_loss_config.{name}"}}


def mask(name: str) -> dict[str, Any]:
    return {"loss": {"mask": f"tests.training.test_loss_config.{name}"}}


def test_variants_may_freeze_different_parts(file, content, tmp_path):
    # Together, these parts are the whole model, of which something must be left to train.
    content["variants"] = {"heads": {"freeze": "backbone"}, "backbone": {"freeze": "rpn,roi_heads"}}
    assert len(read_plan(written(file, content), tmp_path / "out").runs) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed(seeds=[]), "seeds: expected a list of at least one"),
        (changed(seeds=None), "seeds: expected a list"),
        (changed(seeds=3), "seeds: expected a list"),
        (changed(seeds=[1, 1]), "a seed is listed twice"),
        (changed(seeds=[-1]), "a seed is a whole number >= 0 and below 2.63, got -1"),
        (changed(seeds=[True]), "a seed is a whole number"),
        (changed(seeds=[2**63]), "a seed is a whole number >= 0 and below 2.63, got 9223372036854775808"),
        (changed(variants={}), "variants: expected a mapping"),
        (changed(variants=["bce"]), "variants: expected a mapping"),
        (changed(baseline="nobody"), "the baseline 'nobody' is not one of the variants bce, dice"),
        (changed(baseline=["bce"]), "the baseline .'bce'. is not one of the variants"),
        (changed(cpus=float("nan")), "cpus must be a number >= 0, got nan"),
        (changed(gpus=float("inf")), "gpus must be a number >= 0, got inf"),
        (changed(cpus=-1), "cpus must be a number >= 0, got -1"),
        (changed(gpus="all"), "gpus must be a number >= 0, got 'all'"),
        (changed(seed=3), "unknown key seed; the keys are base, variants"),
        (changed(base=[1]), "base: expected a mapping"),
        (changed(base="nowhere.yaml"), "nowhere.yaml: cannot be read"),
        (variant({}, name="a/b"), "variant 'a/b': a name has up to 100 letters"),
        (variant({}, name=".."), "variant '..': a name has up to 100 letters"),
        (variant({}, name="a" * 101), "a name has up to 100 letters"),
        (variant({}, name=False), "variant False: .*; put it in quotes"),
        (variant([]), "variant mine: expected a mapping of options"),
        (variant({"lerning_rate": 1}), "variant mine: unknown option lerning_rate"),
        (variant({"learning_rate": "fast"}), "variant mine: .*learning_rate.*fast"),
        (variant({"max_steps": 0}), "variant mine: --max-steps must be at least 1"),
        (variant({"max_steps": None}), "variant mine: --max-steps must be a value, got none"),
        (variant({"schedule": None}), "variant mine: --schedule must be a value, got none"),
        (variant({"seed": 3}), "variant mine: seed is set by the sweep"),
        (variant({"output": "x"}), "variant mine: output is set by the sweep"),
        (variant({"loss": "nowhere.loss"}), "variant mine: --loss 'nowhere.loss': cannot be imported"),
        (variant(mask("A_NUMBER")), "variant mine: --loss mask .* must be callable, but is a int"),
        (variant(mask("scalar")), "variant mine: the loss fails on random RoIs: the mask term must return"),
        (variant(mask("not_finite")), "variant mine: loss_mask of random RoIs is nan"),
        (variant(mask("exits")), "variant mine: the mask term fails on random RoIs: SystemExit: 3"),
        (
            variant(mask("of_nothing")),
            "variant mine: loss_mask of random RoIs does not depend on what the model",
        ),
        (variant({"loss": None}), "variant mine: .*loss"),
        (
            variant({"loss": {"weights": {"mask": "much"}}}),
            "--loss weights mask: expected a number, got 'much'",
        ),
        (
            variant({"loss": {"mask_targets": {"aligned": "no"}}}),
            "mask_targets aligned: expected true or false",
        ),
        (variant({"loss": {"mask_targets": True}}), "--loss mask_targets: expected a mapping, got True"),
        (variant(penalty("of_three")), "variant mine: .*regularization term must return a scalar tensor"),
        (variant(penalty("not_a_number")), "variant mine: loss_regularization of the model is nan"),
        (variant({"weights": "nowhere.safetensors"}), "variant mine: nowhere.safetensors"),
        (variant({"mask_branch": "nowhere.branch"}), "variant mine: --mask-branch 'nowhere.branch': cannot"),
        (variant({"freeze": "nothing"}), "variant mine: --freeze: no part of the model is named 'nothing'"),
        (variant({"device": "cuda:99"}), "variant mine: --device cuda:99"),
        (
            variant({"mask_branch": "point_rend", "loss": {"mask": "maskloss.losses.MaskSoftmaxLoss"}}),
            "variant mine: point_rend computes the logits of each object's own class only",
        ),
        (variant({"train_annotations": "nowhere.json"}), "variant mine: nowhere.json"),
    ],
)
def test_error_names_the_field_and_nothing_is_written(file, content, tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        read_plan(written(file, change(content)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_two_variants_with_the_same_name_are_an_error(file, content, tmp_path):
    text = written(file, content).read_text()
    file.write_text(text.replace("  dice:\n", "  bce:\n"))
    with pytest.raises(InputError, match="is not valid YAML: the key 'bce' occurs 2 times"):
        read_plan(file, tmp_path / "out")


def test_variants_may_share_options_by_yaml_merge_keys(file, content, tmp_path):
    text = written(file, content).read_text()
    file.write_text(
        text.replace("  bce: {}\n", "  bce: &common {max_steps: 5}\n  mine: {<<: *common, batch_size: 1}\n")
    )
    plan = read_plan(file, tmp_path / "out")
    assert plan.variants["mine"] == {"max_steps": 5, "batch_size": 1}


def test_numbers_with_an_exponent_are_numbers_as_in_yaml_1_2(file, content, tmp_path):
    text = written(file, content).read_text()
    file.write_text(
        text.replace("  bce: {}\n", "  bce: {learning_rate: 1e-4, loss: {weights: {mask: 2e-1}}}\n")
    )
    plan = read_plan(file, tmp_path / "out")
    assert plan.variants["bce"] == {"learning_rate": 1e-4, "loss": {"weights": {"mask": 0.2}}}


def test_loss_of_a_variant_changes_parts_of_the_bases_loss(file, content, tmp_path):
    dice = "maskloss.losses.MaskDiceLoss"
    content["base"]["loss"] = "aligned"
    content["variants"] = {
        "base": {},
        "dice": {"loss": {"mask": dice}},
        "stock": {"loss": {"preset": "torchvision", "mask": dice}},
        "paper": {"loss": "paper"},
    }
    losses = {run.variant: run.config.make_loss() for run in read_plan(written(file, content), tmp_path).runs}
    aligned = {name: loss.mask_targets.aligned for name, loss in losses.items()}
    assert aligned == {"base": True, "dice": True, "stock": False, "paper": True}
    assert type(losses["dice"].mask) is type(losses["stock"].mask) is not type(losses["base"].mask)

    content["base"]["loss"] = {"mask": dice, "weights": {"mask": 2.0, "box": 3.0}}
    content["variants"] = {"bce": {"loss": {"mask": "maskloss.losses.MaskBCELoss", "weights": {"mask": 1.0}}}}
    (loss, _) = (run.config.make_loss() for run in read_plan(written(file, content), tmp_path).runs)
    assert (loss.weights.mask, loss.weights.box) == (1.0, 3.0)

    content["base"]["loss"] = "tests.training.test_loss_config.whole"
    with pytest.raises(
        InputError, match=r"variant bce: --loss: the base's loss is .*whole.*a mapping cannot change"
    ):
        read_plan(written(file, content), tmp_path)


def test_plan_knows_if_variants_are_evaluated_on_different_images(file, content, tmp_path, data):
    assert read_plan(written(file, content), tmp_path).one_validation
    copy = tmp_path / "copy.json"
    copy.write_bytes((data / "train/annotations.json").read_bytes())
    content["variants"]["dice"]["val_annotations"] = str(copy)
    assert not read_plan(written(file, content), tmp_path).one_validation


@pytest.mark.parametrize("text", ["", "- 1", "a: [", "3"])
def test_yaml_without_a_mapping_is_an_error_that_names_the_file(file, tmp_path, text):
    file.write_text(text)
    with pytest.raises(InputError, match=r"sweep\.yaml"):
        read_plan(file, tmp_path / "out")


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("val_annotations", r"variant mine: .*annotations\.json: .*unicorn"),
        (
            "train_annotations",
            "variant mine: .*annotations.json: the training set has no object of category 99 .unicorn.",
        ),
    ],
)
def test_category_without_objects_or_in_only_one_set_is_an_error_that_names_it(
    file, content, tmp_path, data, field, message
):
    annotations = json.loads((data / "train/annotations.json").read_text())
    annotations["categories"].append({"id": 99, "name": "unicorn"})
    if field == "val_annotations":  # what no annotation refers to is ignored in a validation set
        annotations["annotations"][0]["category_id"] = 99
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(annotations))
    content["variants"]["mine"] = {field: str(path)}
    with pytest.raises(InputError, match=message):
        read_plan(written(file, content), tmp_path / "out")
