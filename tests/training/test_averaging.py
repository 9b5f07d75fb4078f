"""maskloss/training/averaging.py: the average of the weights is what is evaluated and saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from maskloss.errors import InputError
from maskloss.training.averaging import WeightAverage
from maskloss.training.loop import train
from tests.training.small_runs import (
    assert_same_run,
    history,
    interrupted_after,
    narrow_models,
    small_config,
    tensors,
    write_data,
)


def test_the_average_follows_its_formula() -> None:
    layer = nn.Linear(2, 3)
    average = WeightAverage(layer, decay=0.6)
    expected = layer.weight.detach().double().clone()
    for step in range(1, 30):
        with torch.no_grad():
            layer.weight.copy_(torch.rand(3, 2, generator=torch.Generator().manual_seed(step)))
        average.update(step)
        decay = min(0.6, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * layer.weight.detach().double()
    now = layer.weight.detach().clone()
    with average.applied():
        torch.testing.assert_close(layer.weight.detach().double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(layer.weight, now)


def test_weights_are_restored_after_an_error() -> None:
    layer = nn.Linear(2, 3)
    average = WeightAverage(layer, decay=0.5)
    with torch.no_grad():
        layer.weight.add_(1)
    now = layer.weight.detach().clone()
    with pytest.raises(ValueError, match="in it"), average.applied():
        raise ValueError("in it")
    assert torch.equal(layer.weight, now)


def test_frozen_parameters_are_left_alone() -> None:
    layers = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    layers[0].requires_grad_(False)
    assert set(WeightAverage(layers, 0.5).state_dict()) == {"1.weight", "1.bias"}


def test_another_models_average_is_refused() -> None:
    average = WeightAverage(nn.Linear(2, 3), 0.5)
    for state in ({}, WeightAverage(nn.Linear(2, 2), 0.5).state_dict()):
        with pytest.raises(
            InputError, match="folder: the averaged weights are missing, or are those of another"
        ):
            average.load_state_dict(state, "folder")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("averaged"))


@pytest.mark.slow
def test_a_run_evaluates_and_saves_the_average_and_resumes_exactly(data: Path, tmp_path: Path) -> None:
    changes = {
        "max_steps": 4,
        "checkpoint_every": 2,
        "learning_rate": 0.02,
        "warmup_steps": 0,
        "batch_size": 1,
    }
    with narrow_models():
        train(small_config(data, tmp_path / "plain", **changes))
        train(small_config(data, tmp_path / "run", ema=0.9, **changes))
        with interrupted_after(3):
            train(small_config(data, tmp_path / "again", ema=0.9, **changes))
        train(small_config(data, tmp_path / "again", ema=0.9, **changes, resume=True))
        with pytest.raises(InputError, match="ema"):
            train(small_config(data, tmp_path / "again", **changes, resume=True))
    # The steps are those of a run without an average.
    assert history(tmp_path / "run") == history(tmp_path / "plain")
    assert_same_run(tmp_path / "again", tmp_path / "run")
    checkpoint = torch.load(tmp_path / "run/checkpoints/step-00000004.pt")
    saved, best = tensors(tmp_path / "run"), load_file(tmp_path / "run/best.safetensors")
    assert checkpoint["average"]
    for name, value in checkpoint["average"].items():
        assert torch.equal(saved[name], value)
        assert torch.equal(best[name], value)
    name = "roi_heads.box_predictor.cls_score.weight"
    assert not torch.equal(saved[name], checkpoint["model"][name])
    assert torch.equal(tensors(tmp_path / "plain")[name], checkpoint["model"][name])
