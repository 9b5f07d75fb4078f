"""One data set and one sweep for all tests of this folder, which only read them."""

from __future__ import annotations

from pathlib import Path

import pytest

from maskloss.ablation.sweep import ablate
from maskloss.errors import RunError
from tests.ablation.small_sweeps import VARIANTS, sweep_file
from tests.training.small_runs import write_data


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def swept(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """Run a sweep in which two runs fail; return its YAML file, its folder and its error."""
    folder = tmp_path_factory.mktemp("sweep")
    file = sweep_file(folder, data, VARIANTS, [0])
    with pytest.raises(RunError) as caught:
        ablate(file, folder / "out")
    return file, folder / "out", str(caught.value)
