"""benchmarks/growth.py: the exponent is that of a power law, and every phase can be measured."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def growth(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("growth")


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0])
def test_the_exponent_is_that_of_a_power_law(growth: Any, power: float) -> None:
    sizes = [91, 1204, 5000, 10000]
    assert growth.exponent(sizes, [3e-4 * size**power for size in sizes]) == pytest.approx(power)


def test_every_phase_can_be_measured(growth: Any) -> None:
    for name, (sizes, prepare) in growth.PHASES.items():
        if not name.startswith("training step"):
            prepare(sizes[0])()
