"""The data set and the one finished run that the tests of this folder share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from maskloss.training.loop import train
from tests.training.small_runs import narrow_models, small_config, write_data


@pytest.fixture(autouse=True, scope="package")
def _narrow() -> Iterator[None]:
    with narrow_models():
        yield


@pytest.fixture(scope="package")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("shapes"))


#: Draws sizes and flips, so that a run which draws other numbers shows; logs and saves in steps that differ.
UNINTERRUPTED = {"max_steps": 6, "log_every": 4, "checkpoint_every": 3, "min_size": [48, 64], "seed": 7}


@pytest.fixture(scope="package")
def finished(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps without an interruption; read it, and never write into it."""
    output = tmp_path_factory.mktemp("finished") / "run"
    train(small_config(shapes, output, **UNINTERRUPTED))
    return output
