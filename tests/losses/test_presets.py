"""The presets, each worked out by hand on one small batch.

The libraries' own numbers are in `tests/test_golden.py`.
"""

import math
from typing import get_args

import pytest
import torch

from maskloss import BoxRegression, LossWeights, MaskRCNNLoss, MaskTargets
from maskloss.losses import ActiveClassCrossEntropyLoss, BatchCounts
from maskloss.losses.criterion import PresetName
from maskloss.losses.presets import PRESETS
from maskloss.losses.terms import MaskBatch, RoIBatch, RPNBatch, Supervision
from tests.reference import module_of

LOG2 = math.log(2)

# Two images with 10 sampled anchors (of up to 256 per image) on 50 locations, 2 of them positive, and 8 sampled RoIs, 4
# of them positive. Each positive has one delta that is off by 0.5. Logits of 0 cost log 2, or log 4 for 4 classes. A
# delta that is off by 0.5 costs
#   smooth L1, beta 1/9: 0.5 - 1/18 = 4/9;    L1: 1/2;    smooth L1, beta 1: 0.5² / 2 = 1/8.
EXPECTED = {
    "torchvision": {  # over the samples
        "loss_objectness": LOG2,
        "loss_rpn_box_reg": 2 * (4 / 9) / 10,
        "loss_classifier": 2 * LOG2,
        "loss_box_reg": 4 * (4 / 9) / 8,
        "loss_mask": LOG2,
    },
    "detectron2": {  # RPN over 2 * 256; the detector over the samples
        "loss_objectness": 10 * LOG2 / 512,
        "loss_rpn_box_reg": 2 * (1 / 2) / 512,
        "loss_classifier": 2 * LOG2,
        "loss_box_reg": 4 * (1 / 2) / 8,
        "loss_mask": LOG2,
    },
    "matterport": {  # boxes over four coordinates of each positive
        "loss_objectness": LOG2,
        "loss_rpn_box_reg": 2 * (1 / 8) / (4 * 2),
        "loss_classifier": 2 * LOG2,
        "loss_box_reg": 4 * (1 / 8) / (4 * 4),
        "loss_mask": LOG2,
    },
    "paper": {  # RPN class over 2 * 256, box times 10 over 50 locations
        "loss_objectness": 10 * LOG2 / 512,
        "loss_rpn_box_reg": 10 * 2 * (1 / 8) / 50,
        "loss_classifier": 2 * LOG2,
        "loss_box_reg": 4 * (1 / 8) / 8,
        "loss_mask": LOG2,
    },
}
EXPECTED["aligned"] = EXPECTED["torchvision"]
EXPECTED["weak"] = EXPECTED["torchvision"]  # where all objects have masks


def losses_of(loss: MaskRCNNLoss) -> dict[str, float]:
    def regression(positives: int) -> BoxRegression:
        deltas = torch.zeros(positives, 4)
        deltas[:, 2] = 0.5
        return BoxRegression(deltas, torch.zeros(positives, 4))

    rpn_counts = BatchCounts(num_images=2, sampled=10, positives=2, batch_size_per_image=256, locations=50)
    roi_counts = BatchCounts(num_images=2, sampled=8, positives=4, batch_size_per_image=512)
    labels = torch.tensor([1, 2, 3, 3, 0, 0, 0, 0])
    losses = {
        **loss.rpn_losses(
            RPNBatch(torch.zeros(10), torch.arange(10).lt(2).float(), regression(2), rpn_counts)
        ),
        **loss.roi_losses(RoIBatch(torch.zeros(8, 4), labels, regression(4), roi_counts)),
        **loss.mask_losses(MaskBatch(torch.zeros(4, 4, 3, 3), torch.ones(4, 3, 3), labels[:4], roi_counts)),
    }
    return {key: value.item() for key, value in losses.items()}


def test_every_preset_is_worked_out_here():
    assert set(PRESETS) == set(EXPECTED)
    assert set(PRESETS) == set(get_args(PresetName))


@pytest.mark.parametrize("name", EXPECTED)
def test_losses_by_hand(name):
    assert losses_of(MaskRCNNLoss.preset(name)) == pytest.approx(EXPECTED[name], rel=1e-6)


@pytest.mark.parametrize("name", EXPECTED)
def test_an_error_beyond_the_corner_costs_its_distance_less_half_beta(name):
    # A delta off by 3 is beyond every beta: the box losses are linear there and tell the betas apart again.
    beta = {
        "torchvision": 1 / 9,
        "aligned": 1 / 9,
        "weak": 1 / 9,
        "detectron2": 0.0,
        "matterport": 1.0,
        "paper": 1.0,
    }[name]
    loss = MaskRCNNLoss.preset(name)
    regression = BoxRegression(torch.tensor([[3.0, 0, 0, 0]]), torch.zeros(1, 4))
    torch.testing.assert_close(loss.box(regression), torch.tensor([3 - beta / 2]))
    torch.testing.assert_close(loss.rpn_box(regression), torch.tensor([3 - beta / 2]))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("torchvision", MaskTargets(aligned=False, binary=False)),
        ("detectron2", MaskTargets(aligned=True, binary=True)),
        ("matterport", MaskTargets(aligned=False, binary=True)),
        ("paper", MaskTargets(aligned=True, binary=True)),
        ("aligned", MaskTargets(aligned=True, binary=False)),
        ("weak", MaskTargets(aligned=True, binary=False)),
    ],
)
def test_mask_targets_of_each_preset(name, settings):
    assert MaskRCNNLoss.preset(name).mask_targets == settings


def test_weak_learns_from_every_kind_of_label_and_warms_up_in_1000_steps():
    loss = MaskRCNNLoss.preset("weak")
    assert loss.mask_supervision == set(Supervision)
    assert loss.mask.boxes.warmup_steps == 1000
    for name in EXPECTED.keys() - {"weak"}:
        assert MaskRCNNLoss.preset(name).mask_supervision == {Supervision.MASK}


@pytest.mark.parametrize("name", [name for name in EXPECTED if name != "matterport"])
def test_only_matterport_regularizes(name):
    assert MaskRCNNLoss.preset(name).regularization_losses(module_of(torch.ones(2))) == {}


def test_matterport_regularizes_with_the_mean_square_of_each_tensor():
    # 1e-4 * (mean(1, 9) + mean(4)) = 1e-4 * (5 + 4).
    model = module_of(torch.tensor([1.0, 3.0]), torch.tensor([2.0]))
    losses = MaskRCNNLoss.preset("matterport").regularization_losses(model)
    assert losses["loss_regularization"].item() == pytest.approx(9e-4, rel=1e-6)


@pytest.mark.parametrize("name", EXPECTED)
def test_only_the_paper_weighs_a_term(name):
    expected = LossWeights(rpn_box=10.0) if name == "paper" else LossWeights()
    assert MaskRCNNLoss.preset(name).weights == expected


def test_matterport_takes_active_classes():
    # Logits of 0 predict the background, which is inactive here: no RoI counts.
    active = torch.tensor([False, True, True, True])
    loss = MaskRCNNLoss.preset("matterport", active_classes=active)
    assert isinstance(loss.classification, ActiveClassCrossEntropyLoss)
    expected = {**EXPECTED["matterport"], "loss_classifier": 0.0}
    assert losses_of(loss) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", [name for name in EXPECTED if name != "matterport"])
def test_active_classes_for_another_preset_raise(name):
    with pytest.raises(ValueError, match=f"belongs to the preset 'matterport', not to '{name}'"):
        MaskRCNNLoss.preset(name, active_classes=torch.ones(2, dtype=torch.bool))


def test_an_unknown_preset_raises_with_the_names():
    with pytest.raises(ValueError, match="no preset is named 'mmdet'; available: torchvision, detectron2"):
        MaskRCNNLoss.preset("mmdet")


def test_a_preset_of_another_type_raises_with_the_names():
    with pytest.raises(ValueError, match=r"no preset is named \['paper'\]; available: torchvision"):
        MaskRCNNLoss.preset(["paper"])


def test_active_classes_may_be_a_list():
    loss = MaskRCNNLoss.preset("matterport", active_classes=[True, False, True])
    assert loss.classification.active_classes.tolist() == [True, False, True]
