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


#: Random sizes and flips reveal a run with other random numbers. Log lines and checkpoints come at different steps.
UNINTERRUPTED = {"max_steps": 6, "log_every": 4, "checkpoint_every": 3, "min_size": [48, 64], "seed": 7}


@pytest.fixture(scope="package")
def finished(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps without an interruption. Tests must not write into its folder."""
    output = tmp_path_factory.mktemp("finished") / "run"
    train(small_config(shapes, output, **UNINTERRUPTED))
    return output
