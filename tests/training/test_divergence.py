"""maskloss/training/divergence.py: losses and weights that are not finite stop a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from maskloss.data.sampler import TrainingBatches
from maskloss.errors import RunError
from maskloss.training import setup
from maskloss.training.checkpoints import load_checkpoint
from maskloss.training.divergence import LossCheck, check_weights
from maskloss.training.loop import train
from tests.training.small_runs import (
    history,
    learned_loss,
    small_config,
    tensors,
)


def test_a_loss_that_is_not_finite_stops_and_names_the_term_the_step_and_the_images(
    shapes: Path, tmp_path: Path
) -> None:
    config = small_config(
        shapes,
        tmp_path / "run",
        loss="tests.training.small_runs.nan_in_step_3",
        max_steps=5,
        checkpoint_every=2,
        seed=3,
    )
    with pytest.raises(RunError) as caught:
        train(config)
    images = ", ".join(str(index + 1) for index, _ in list(TrainingBatches([0] * 4, 2, 5, seed=3))[2])
    text = str(caught.value)
    assert text.startswith(f"step 3: loss_mask = nan is not finite, on images {images}; ")
    assert "\n" not in text
    checkpoint = load_checkpoint(tmp_path / "run/checkpoints/step-00000002.pt")
    assert checkpoint["step"] == 2
    assert [line["step"] for line in history(tmp_path / "run")] == [1, 2]
    # The model is that of the last checkpoint, from before the loss diverged.
    saved = checkpoint["model"]
    assert all(torch.equal(tensor, saved[name]) for name, tensor in tensors(tmp_path / "run").items())


def test_a_gradient_that_is_not_finite_stops_before_it_spoils_a_checkpoint(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Overflowing(setup.Accelerator):
        def backward(self, loss: torch.Tensor, **kwargs: Any) -> None:
            # The loss is finite and its gradient is not, as where float32 overflows on the way back.
            super().backward(loss * float("inf") if loss.requires_grad else loss, **kwargs)

    monkeypatch.setattr(setup, "Accelerator", Overflowing)
    config = small_config(shapes, tmp_path / "run", max_steps=2, batch_size=1, checkpoint_every=1)
    with pytest.raises(RunError, match="step 1"):
        train(config)
    for path in (tmp_path / "run" / "checkpoints").glob("*.pt"):
        model = load_checkpoint(path)["model"]
        assert all(torch.isfinite(value).all() for value in model.values()), path.name


def test_a_last_step_that_diverges_stops_instead_of_writing_nan_metrics(shapes: Path, tmp_path: Path) -> None:
    # The loss of the only step is finite; the weights after it are far beyond what float32 can carry through.
    config = small_config(
        shapes, tmp_path / "run", max_steps=1, learning_rate=1e12, warmup_steps=0, gradient_clip=0.0
    )
    with pytest.raises(RunError, match="not finite"):
        train(config)
    assert not (tmp_path / "run/metrics.json").exists()


def test_a_learned_parameter_of_the_loss_that_is_not_finite_is_named() -> None:
    model, loss = nn.Linear(1, 1), learned_loss()
    check_weights(model, loss, 3)
    loss.mask.log_scale.data.fill_(float("nan"))
    with pytest.raises(RunError, match=r"step 3: the weights of the loss's mask\.log_scale are not finite"):
        check_weights(model, loss, 3)


WAY_OUT = "the last checkpoint predates this. A lower --learning-rate or more --warmup-steps often help"


def test_a_weight_of_the_model_that_is_not_finite_is_named_with_the_way_out() -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    model[1].bias.data.fill_(-float("inf"))
    with pytest.raises(RunError) as caught:
        check_weights(model, nn.Module(), 12)
    assert str(caught.value) == f"step 12: the weights of 1.bias are not finite; {WAY_OUT}"


def targets(*image_ids: int) -> list[dict[str, Any]]:
    return [{"image_id": image_id} for image_id in image_ids]


def test_finite_losses_pass() -> None:
    checked = LossCheck()
    checked.check()
    checked.add(1, targets(3), ["loss_a", "loss_b"], torch.tensor([1.0, -2.0]))
    checked.check()
    checked.check()


def test_every_loss_that_is_not_finite_is_named_with_the_step_and_the_images() -> None:
    checked = LossCheck()
    checked.add(7, targets(3, 12), ["loss_a", "loss_b", "loss_c"], torch.tensor([torch.nan, 2.0, -torch.inf]))
    with pytest.raises(RunError) as caught:
        checked.check()
    assert str(caught.value) == (
        f"step 7: loss_a = nan, loss_c = -inf is not finite, on images 3, 12; {WAY_OUT}"
    )


def test_finite_losses_whose_sum_overflows_are_named_as_their_sum() -> None:
    checked = LossCheck()
    # float32 ends at 3.4e38.
    checked.add(1, targets(5), ["loss_a", "loss_b"], torch.tensor([3e38, 3e38]))
    with pytest.raises(RunError, match=r"^step 1: the sum of the losses is not finite, on images 5; "):
        checked.check()


def test_the_first_pass_that_is_not_finite_is_the_one_that_is_named() -> None:
    checked = LossCheck()
    for step, value in ((1, 1.0), (2, torch.nan), (3, torch.inf)):
        checked.add(step, targets(step), ["loss_a"], torch.tensor([value]))
    with pytest.raises(RunError, match=r"^step 2: loss_a = nan is not finite, on images 2; "):
        checked.check()
