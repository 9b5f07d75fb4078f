"""Two gloo processes, one without any object: no process hangs, and gradients agree."""

from __future__ import annotations

import copy
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import maskloss
from maskloss import LossWeights, MaskRCNNLoss
from maskloss.losses import (
    EqualizationLossV2,
    MaskBoxLoss,
    MaskBySupervision,
    MatterportL2Loss,
    SeesawLoss,
)
from tests.processes import run_ranks

from .small_models import batch, tiny_mask_rcnn, training_pass, without_objects

pytestmark = pytest.mark.slow

WORLD, STEPS, LIMIT_S = 2, 3, 120

CASES: dict[str, dict[str, Any]] = {
    "torchvision": {},
    "mask weight 0": {"weights": LossWeights(mask=0.0)},
    "every weight 0 but one": {"weights": LossWeights(objectness=0.0, rpn_box=0.0, box=0.0, mask=0.0)},
    "with a penalty": {"regularization": MatterportL2Loss(1e-2)},
    "weak labels": {"mask": MaskBySupervision(boxes=MaskBoxLoss(warmup_steps=2))},
    "point_rend": {},
    "point_rend, unfrozen": {},
    "point_rend, mask weight 0": {"weights": LossWeights(mask=0.0)},
    "mask_iou": {},
    "mask_iou, mask weight 0": {"weights": LossWeights(mask=0.0)},
}

# The processes return {case: {"keys": per step, "gradients": per step, "parameters": at the end}}.
Record = dict[str, dict[str, Any]]


def build(case: str) -> nn.Module:
    branch: Any = case.split(",")[0] if case.startswith(("point_rend", "mask_iou")) else None
    model = maskloss.convert(tiny_mask_rcnn(), MaskRCNNLoss(**CASES[case]), mask_branch=branch)
    # Also torchvision's mask layers, which the branch does not call.
    return model.requires_grad_(True) if case.endswith("unfrozen") else model


def rank_batch(rank: int) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Rank 0's images have objects, rank 1's have none."""
    images, targets = batch(seed=rank)
    # An object with a mask, one with only a box; half and full weight.
    labels = {"has_mask": torch.tensor([True, False]), "weights": torch.tensor([0.5, 1.0])}
    return images, [{**target, **labels} for target in targets] if rank == 0 else without_objects(images)


def rois(rank: int) -> tuple[Tensor, Tensor]:
    """Class logits and labels of a rank: rank 1 has none."""
    class_logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 3, 1, 3, 2])
    return (class_logits, labels) if rank == 0 else (class_logits[:0], labels[:0])


def long_tail_losses() -> list[nn.Module]:
    return [SeesawLoss(4), EqualizationLossV2(4)]


def gathered(loss: nn.Module, class_logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The class statistics of a loss after a batch."""
    loss(class_logits, labels)
    return loss.state_dict()


def trained(model: nn.Module, gradients: dict[str, Tensor | None]) -> dict[str, Any]:
    """The gradients of the parameters that are trained: `convert` excludes mask layers that a branch does not call."""
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return {name.removeprefix("module."): gradients[name] for name in names}


def train(rank: int, folder: str) -> None:
    """Train a few steps of every case; each process runs this."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=LIMIT_S),
    )
    record: Record = {}
    for case in CASES:
        model = DistributedDataParallel(build(case))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        images, targets = rank_batch(rank)
        keys, gradients = [], []
        for step in range(STEPS):
            losses, step_gradients = training_pass(model, images, targets, seed=100 * step + rank)
            keys.append(sorted(losses))
            gradients.append(trained(model, step_gradients))
            optimizer.step()
        parameters = {name: value.detach() for name, value in model.module.named_parameters()}
        record[case] = {"keys": keys, "gradients": gradients, "parameters": parameters}
    torch.save(record, f"{folder}/{rank}.pt")
    torch.save([gathered(loss, *rois(rank)) for loss in long_tail_losses()], f"{folder}/gathered-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with each rank's results; raises an error if a rank hung."""
    folder = tmp_path_factory.mktemp("gloo")
    run_ranks(train, (str(folder),), world=WORLD, limit_s=LIMIT_S)
    return folder


@pytest.fixture(scope="module")
def records(folder: Path) -> list[Record]:
    """The results of each rank."""
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    return request.param


def test_every_step_ends_with_the_same_keys_on_every_rank(records, case):
    assert len(records[0][case]["keys"]) == STEPS
    assert records[0][case]["keys"] == records[1][case]["keys"]
    assert "loss_mask" in records[1][case]["keys"][0]


def test_every_parameter_has_a_finite_gradient_on_every_rank(records, case):
    for rank, record in enumerate(records):
        for gradients in record[case]["gradients"]:
            for name, gradient in gradients.items():
                assert gradient is not None, f"rank {rank}, {name}"
                assert gradient.isfinite().all(), f"rank {rank}, {name}"


def test_gradients_and_weights_are_equal_on_all_ranks(records, case):
    for one, other in zip(records[0][case]["gradients"], records[1][case]["gradients"], strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    one, other = (record[case]["parameters"] for record in records)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_gradient_is_the_mean_of_the_ranks_own(records, case):
    model = build(case)
    alone = []
    for rank in range(WORLD):
        _, gradients = training_pass(copy.deepcopy(model), *rank_batch(rank), seed=rank)
        alone.append(gradients)
    for name, gradient in records[0][case]["gradients"][0].items():
        expected = (alone[0][name] + alone[1][name]) / WORLD
        assert (gradient - expected).norm() <= 1e-5 * expected.norm(), name


def test_the_mask_branch_learns_unless_its_weight_is_zero(records, case):
    gradients = records[0][case]["gradients"][0]
    learns = any(gradient.any() for name, gradient in gradients.items() if "roi_heads.mask" in name)
    mask_weight = MaskRCNNLoss(**CASES[case]).weights.mask
    penalized = case == "with a penalty"
    assert learns == (mask_weight > 0 or penalized)


def test_losses_with_class_statistics_share_them_across_ranks(folder):
    alone = [gathered(loss, *rois(0)) for loss in long_tail_losses()]
    for rank in range(WORLD):
        for found, expected in zip(torch.load(folder / f"gathered-{rank}.pt"), alone, strict=True):
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                assert value.any()
                torch.testing.assert_close(found[name], value)
