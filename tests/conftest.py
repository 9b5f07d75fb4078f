"""Fixtures that every part of the suite uses; what belongs to one part stays in its own file."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# The same examples in every run, and no limit of time, so that no test depends on chance or on a quiet machine.
settings.register_profile("repeatable", deadline=None, derandomize=True)
# `pytest --hypothesis-profile thorough` draws more examples, and other ones each time.
settings.register_profile("thorough", deadline=None, max_examples=1_000)
settings.load_profile("repeatable")


def pytest_configure() -> None:
    """Let Ctrl-C interrupt also if the tests run in the background, where shells ignore it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def generator() -> torch.Generator:
    """Random numbers of this test alone: no test depends on which others ran before it."""
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The data kept beside the repository; a clone of the repository alone does not have it."""
    folder = Path(__file__).resolve().parents[1].parent / "shared"
    if not folder.is_dir():
        pytest.skip("no ../shared beside the repository: the shared data are not part of a clone")
    return folder


@pytest.fixture(scope="session")
def tolerance() -> dict[torch.dtype, dict[str, float]]:
    """How far two ways of computing one number may be apart, by the dtype that the inputs were rounded to."""
    return {
        torch.float64: {"rtol": 1e-12, "atol": 1e-12},
        torch.float32: {"rtol": 1e-5, "atol": 1e-6},
        torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2},
        torch.float16: {"rtol": 2e-3, "atol": 2e-3},
    }


@pytest.fixture(autouse=True)
def full_precision_on_a_gpu(request: pytest.FixtureRequest) -> Iterator[None]:
    """Turn TF32 off for tests on a GPU, whose expected values come from full float32."""
    # The switches are computed by their modules, so that monkeypatch cannot restore them.
    kept = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    if request.node.get_closest_marker("cuda") is not None:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = kept
