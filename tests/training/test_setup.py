"""maskloss/training/setup.py: a run is a guest in the program that calls it."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from maskloss.errors import InputError
from maskloss.training.loop import train

from .small_runs import small_config


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
