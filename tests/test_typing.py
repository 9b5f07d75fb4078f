"""What a user's type checker says: of right code nothing, of wrong code what is wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

RIGHT = """
import torch
import torchvision
from torch import Tensor, nn

import maskloss


def my_mask_loss(mask_logits: Tensor, mask_targets: Tensor) -> Tensor:
    return (mask_logits.sigmoid() - mask_targets).abs()


class Scaled(nn.Module):
    def forward(self, regression: maskloss.BoxRegression) -> Tensor:
        return (regression.deltas - regression.target_deltas).abs().sum(1)


loss = maskloss.MaskRCNNLoss(
    mask=my_mask_loss,
    box=Scaled(),
    rpn_box=maskloss.losses.BoxGIoULoss(),
    classification=nn.CrossEntropyLoss(label_smoothing=0.1, reduction="none"),
    objectness=maskloss.losses.objectness_focal_loss,
    weights=maskloss.LossWeights(mask=2.0),
    mask_targets=maskloss.MaskTargets(aligned=True),
    normalizers={"box": maskloss.losses.per_positive},
)
learned = maskloss.MaskRCNNLoss(
    mask=maskloss.losses.WeightedSum([maskloss.losses.MaskBCELoss(), my_mask_loss], weights=[1.0, 2.0]),
    regularization=maskloss.losses.MatterportL2Loss(),
)
agnostic = maskloss.MaskRCNNLoss(mask=maskloss.losses.ClassAgnosticMaskLoss(my_mask_loss))
federated = maskloss.MaskRCNNLoss(classification=maskloss.losses.FederatedLoss([1.0, 2.0]))
active = maskloss.MaskRCNNLoss.preset("matterport", active_classes=torch.ones(3, dtype=torch.bool))
softmax = maskloss.MaskRCNNLoss(mask=maskloss.losses.MaskSoftmaxLoss())
dice: Tensor = maskloss.losses.mask_dice_loss(torch.zeros(1, 2, 2), torch.ones(1, 2, 2), reduction="mean")
model: nn.Module = torchvision.models.detection.maskrcnn_resnet50_fpn(weights=None)
maskloss.convert(model, loss, paste="matched")
maskloss.convert(model, "detectron2", paste="aligned")
preset = maskloss.MaskRCNNLoss.preset("aligned")
losses, detections = maskloss.losses_and_detections(model, [torch.rand(3, 8, 8)], [{}])
parameters = [*model.parameters(), *maskloss.loss_parameters(model)]
optimizer = torch.optim.SGD(parameters, lr=0.01)
targets = maskloss.mask_targets(torch.zeros(1, 8, 8, dtype=torch.bool), torch.rand(1, 4), torch.tensor([0]), 28)
encoded = maskloss.EncodedMasks([[[0.0, 0.0, 4.0, 0.0, 4.0, 4.0]]], 8, 8)
found: list[dict[str, object]] = maskloss.coco_results(model, detections, [(8, 8)], [1])
weights: Tensor = maskloss.losses.inverse_frequency_weights([torch.zeros(2, 2)], num_classes=1)
bools: Tensor = maskloss.paste_masks(torch.rand(1, 4, 4), torch.rand(1, 4), (8, 8), offset=(0.5, 0.5))
rles: list[dict[str, object]] = maskloss.paste_masks(torch.rand(1, 4, 4), torch.rand(1, 4), (8, 8), output="rle")
offset: tuple[float, float] = maskloss.mask_offset(model, (8, 8))
"""

# torch types every module's call as `Callable[..., Any]`, so a module of other arguments is found where the loss is
# made, not by a type checker.
WRONG = {
    'maskloss.MaskRCNNLoss.preset("detectron")': "preset",
    'maskloss.convert(model, "alligned")': "convert",
    'maskloss.convert(model, paste="sharp")': "paste",
    'maskloss.MaskRCNNLoss(mask="dice")': "mask",
    "maskloss.MaskRCNNLoss(box=lambda a, b: a)": "box",
    "maskloss.MaskRCNNLoss(mask=maskloss.losses.MaskDiceLoss)": "mask",
    'maskloss.losses.ClassAgnosticMaskLoss("dice")': "ClassAgnosticMaskLoss",
    "maskloss.MaskRCNNLoss(weights={})": "weights",
    'maskloss.LossWeights(mask="2")': "LossWeights",
    "maskloss.losses_and_detections(model)": "targets",
    "maskloss.losses.MaskDiceLos()": "MaskDiceLos",
    'maskloss.losses.MaskDiceLoss(reduction="average")': "reduction",
    "maskloss.paste_masks(torch.rand(1, 4, 4), torch.rand(1, 4), (8, 8), aligned=False)": "paste_masks",
}


def mypy(folder: Path, code: str) -> tuple[int, str]:
    """Check a file as a user would, strictly, from a folder of the user's own."""
    (folder / "user_code.py").write_text(code)
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--config-file",
        "",
        "--cache-dir",
        str(folder / "cache"),
    ]
    done = subprocess.run([*command, "user_code.py"], cwd=folder, capture_output=True, text=True)
    return done.returncode, done.stdout


@pytest.mark.slow
def test_a_users_file_is_checked_and_its_mistakes_are_found(tmp_path):
    wrong = "import torch\nfrom torch import nn\n\nimport maskloss\n\nmodel: nn.Module = nn.Linear(1, 1)\n"
    first = wrong.count("\n") + 1
    code, output = mypy(tmp_path, wrong + "\n".join(WRONG) + "\n")
    assert code == 1, output
    for number, (line, part) in enumerate(WRONG.items(), start=first):
        found = [
            message for message in output.splitlines() if message.startswith(f"user_code.py:{number}: error")
        ]
        assert found, f"nothing is said of {line}\n{output}"
        assert any(part in message for message in found), (line, found)
    # torchvision is untyped; nothing else may be said of what is right.
    code, output = mypy(tmp_path, RIGHT)
    lines = [line for line in output.splitlines() if " error: " in line and "torchvision" not in line]
    assert lines == []
