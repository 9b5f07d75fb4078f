"""The public contract: names, signatures, defaults; and the examples in the docstrings."""

from __future__ import annotations

import dataclasses
import doctest
import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable
from typing import Any

import pytest

import maskloss
import maskloss.detection
import maskloss.losses
import maskloss.masks

PUBLIC = {
    "convert",
    "losses_and_detections",
    "MaskRCNNLoss",
    "LossWeights",
    "MaskTargets",
    "BoxRegression",
    "EncodedMasks",
    "mask_targets",
    "paste_masks",
    "mask_offset",
    "coco_results",
    "loss_parameters",
}
REQUIRED = inspect.Parameter.empty


def parameters(function: Callable[..., Any]) -> tuple[list[str], dict[str, Any]]:
    """Return the positional names, and the keyword-only ones with their defaults."""
    positional, keywords = [], {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            keywords[name] = parameter.default
        else:
            positional.append(name)
    return positional, keywords


def test_the_top_level_offers_the_contracts_names_and_no_other():
    assert len(maskloss.__all__) == len(set(maskloss.__all__))
    assert set(maskloss.__all__) == PUBLIC


@pytest.mark.parametrize("package", [maskloss, maskloss.losses, maskloss.masks, maskloss.detection])
def test_every_name_that_is_offered_is_there(package):
    missing = [name for name in package.__all__ if not hasattr(package, name)]
    assert missing == []


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_each_public_name_can_be_imported_and_says_what_it_is(name):
    thing = getattr(importlib.import_module("maskloss"), name)
    assert callable(thing)
    assert thing.__module__.startswith("maskloss.")
    assert thing.__doc__


def test_convert_is_called_as_the_contract_says():
    assert parameters(maskloss.convert) == (
        ["model", "loss"],
        {"paste": "torchvision", "sync_free": False, "mask_branch": None},
    )
    assert inspect.signature(maskloss.convert).parameters["loss"].default is None


def test_losses_and_detections_is_called_as_the_contract_says():
    assert parameters(maskloss.losses_and_detections) == (["model", "images", "targets"], {})


def test_mask_targets_is_called_as_the_contract_says():
    expected = (["gt_masks", "boxes", "matched_idxs", "size"], {"aligned": True, "binary": False})
    assert parameters(maskloss.mask_targets) == expected


def test_paste_masks_is_called_as_the_contract_says():
    expected = (
        ["mask_probs", "boxes", "image_size"],
        {"offset": (0.0, 0.0), "threshold": 0.5, "output": "bool"},
    )
    assert parameters(maskloss.paste_masks) == expected


def test_encoded_masks_are_made_as_the_contract_says():
    assert parameters(maskloss.EncodedMasks) == (["segmentations", "height", "width"], {})


def test_a_loss_takes_a_term_each_weights_normalizers_and_mask_targets():
    positional, keywords = parameters(maskloss.MaskRCNNLoss)
    assert positional == []
    assert keywords == dict.fromkeys(
        [
            "objectness",
            "rpn_box",
            "classification",
            "box",
            "mask",
            "keypoint",
            "regularization",
            "weights",
            "normalizers",
            "mask_targets",
        ]
    ) | {"synchronized": False}


def test_presets_are_got_by_name():
    assert parameters(maskloss.MaskRCNNLoss.preset) == (["name"], {"active_classes": None})
    for name in ("torchvision", "detectron2", "matterport", "paper", "aligned", "weak"):
        assert isinstance(maskloss.MaskRCNNLoss.preset(name), maskloss.MaskRCNNLoss)


def test_every_weight_is_one_by_default():
    assert dataclasses.asdict(maskloss.LossWeights()) == dict.fromkeys(
        ["objectness", "rpn_box", "classification", "box", "mask", "keypoint", "regularization"], 1.0
    )


def test_mask_targets_settings_have_the_contracts_fields():
    assert [field.name for field in dataclasses.fields(maskloss.MaskTargets)] == ["aligned", "binary"]


def test_batch_counts_have_the_contracts_fields_first():
    names = [field.name for field in dataclasses.fields(maskloss.losses.BatchCounts)]
    assert names[:5] == ["num_images", "sampled", "positives", "batch_size_per_image", "weight_sum"]


def test_the_mask_predictor_is_made_as_torchvisions_is():
    predictor = maskloss.detection.ClassSelectedMaskPredictor
    assert parameters(predictor) == (["in_channels", "dim_reduced", "num_classes"], {})
    assert parameters(predictor.forward) == (["self", "features", "labels"], {})
    assert inspect.signature(predictor.forward).parameters["labels"].default is None


# Losses: functions with a thin Module beside them.


def loss_functions() -> list[str]:
    return [name for name in maskloss.losses.__all__ if name.endswith("_loss")]


#: These combine other losses, so they have no function.
OF_OTHER_LOSSES = {"MaskRCNNLoss", "ClassAgnosticMaskLoss"}


def loss_modules() -> list[str]:
    names = [name for name in maskloss.losses.__all__ if name.endswith("Loss")]
    return [name for name in names if name not in OF_OTHER_LOSSES]


def test_there_are_losses_to_check():
    assert len(loss_functions()) >= 5


def test_every_loss_function_has_its_module():
    stems = {name.lower() for name in loss_modules()}
    # The regularization Modules are L1RegularizationLoss and so on: the same words without underscores.
    assert {name.replace("_", "") for name in loss_functions()} == stems


@pytest.mark.parametrize("name", loss_functions())
def test_a_losss_knobs_are_keyword_only_and_it_reduces_nothing_by_default(name):
    positional, keywords = parameters(getattr(maskloss.losses, name))
    function = getattr(maskloss.losses, name)
    defaults = [inspect.signature(function).parameters[data].default for data in positional]
    assert all(default is REQUIRED for default in defaults)
    assert keywords.get("reduction", "none") == "none"


# Docstrings.


@pytest.mark.parametrize("name", [name for name in maskloss.losses.__all__ if "_loss" in name])
def test_a_loss_function_documents_its_result_an_example_and_its_source(name):
    docstring = getattr(maskloss.losses, name).__doc__
    for section in (r"^ *Returns:$", r"^ *Example:\n *>>> ", "^ *Source: "):
        assert re.search(section, docstring, re.MULTILINE), section


def modules() -> list[str]:
    found = pkgutil.walk_packages(maskloss.__path__, "maskloss.")
    return ["maskloss", *sorted(module.name for module in found if not module.name.endswith("__main__"))]


@pytest.mark.parametrize("name", modules())
def test_the_examples_in_the_docstrings_print_what_they_show(name):
    outcome = doctest.testmod(importlib.import_module(name))
    assert outcome.failed == 0


@pytest.mark.parametrize(
    "name",
    [
        "maskloss",
        "maskloss.losses.boxes",
        "maskloss.losses.mask_pixels",
        "maskloss.losses.regularization",
        "maskloss.losses.criterion",
    ],
)
def test_modules_have_examples_to_run(name):
    found = doctest.DocTestFinder().find(importlib.import_module(name))
    assert sum(len(test.examples) for test in found) > 0
