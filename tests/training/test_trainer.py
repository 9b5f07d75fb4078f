"""The optimizer steps of a run: accumulation, precision, and what is prepared before the first step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from maskloss.data.sampler import TrainingBatches
from maskloss.detection.rpn import RegionProposalNetwork
from maskloss.training import loop, setup, trainer
from maskloss.training.loop import train
from tests.training.small_runs import (
    TERMS,
    history,
    small_config,
)


def test_accumulation_sees_the_images_of_all_its_passes_and_steps_once(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[int]] = []
    stepped: list[int] = []

    def watched(loader: Any, device: torch.device) -> Any:
        for images, targets in real(loader, device):
            seen.append([target["image_id"] for target in targets])
            yield images, targets

    class WatchedSGD(torch.optim.SGD):
        def step(self, *args: Any, **kwargs: Any) -> Any:
            stepped.append(len(seen))
            return super().step(*args, **kwargs)

    real = trainer.batches_on
    monkeypatch.setattr(trainer, "batches_on", watched)
    monkeypatch.setattr(torch.optim, "SGD", WatchedSGD)
    train(small_config(shapes, tmp_path / "run", max_steps=2, batch_size=1, accumulation_steps=2, seed=4))
    expected = [[index + 1 for index, _ in batch] for batch in TrainingBatches([0] * 4, 1, 4, seed=4)]
    assert seen == expected
    assert stepped == [2, 4]
    assert [line["step"] for line in history(tmp_path / "run")] == [1, 2]


def test_the_logged_loss_of_an_accumulated_step_is_the_mean_of_its_passes(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    totals: list[float] = []

    class Watched(setup.Accelerator):
        def backward(self, loss: torch.Tensor, **kwargs: Any) -> None:
            totals.append(float(loss.detach()))
            super().backward(loss, **kwargs)

    monkeypatch.setattr(setup, "Accelerator", Watched)
    train(small_config(shapes, tmp_path / "run", max_steps=1, batch_size=1, accumulation_steps=3))
    assert len(totals) == 3
    assert history(tmp_path / "run")[0]["loss"] == pytest.approx(sum(totals) / 3, rel=1e-5)


def test_bfloat16_starts_from_the_losses_of_float32(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The proposals are fixed, because rounding, which differs between CPUs, changes which of them are sampled."""
    corners = torch.tensor([(x, y) for x in range(0, 48, 8) for y in range(0, 48, 8)], dtype=torch.float32)
    boxes = torch.cat([corners, corners + 16], dim=1)
    monkeypatch.setattr(
        RegionProposalNetwork, "_proposals", lambda rpn, logits, deltas, anchors, *_: [boxes] * len(anchors)
    )
    for precision in ("no", "bf16"):
        train(small_config(shapes, tmp_path / precision, mixed_precision=precision, max_steps=1))
    exact, rounded = history(tmp_path / "no")[0], history(tmp_path / "bf16")[0]
    assert rounded["loss"] != exact["loss"]
    for term in TERMS:
        assert rounded[term] == pytest.approx(exact[term], rel=0.02, abs=0.002)


def test_sync_free_trains(shapes: Path, tmp_path: Path) -> None:
    losses = []
    for sync_free in (True, False):
        train(small_config(shapes, tmp_path / str(sync_free), max_steps=1, sync_free=sync_free))
        (line,) = (tmp_path / str(sync_free) / "history.jsonl").read_text().splitlines()
        losses.append(json.loads(line)["loss"])
    # Other samples of the same images.
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.3)


@pytest.mark.parametrize(("precision", "dtype"), [("no", None), ("bf16", torch.bfloat16)])
def test_cuda_graphs_are_captured_once_the_model_is_ready(
    precision: str, dtype: torch.dtype | None, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    captured = []

    def capture(model: Any, batch_size: int, *, autocast: torch.dtype | None) -> None:
        assert model.training
        assert not model.backbone.body.conv1.training
        assert not model.backbone.body.conv1.weight.requires_grad
        captured.append((batch_size, autocast))

    monkeypatch.setattr(trainer, "graph_convolutions", capture)
    monkeypatch.setattr(loop, "device_of", lambda config: torch.device("cpu"))
    config = small_config(
        shapes,
        tmp_path / "run",
        max_steps=1,
        cuda_graphs=True,
        mixed_precision=precision,
        freeze="backbone.body.conv1",
    )
    train(config)
    assert captured == [(config.batch_size, dtype)]
