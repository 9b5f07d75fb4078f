"""Running a test's function in several processes that wait for each other."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch.multiprocessing as mp


def run_ranks(
    function: Callable[..., None], arguments: tuple[Any, ...], *, world: int, limit_s: float
) -> None:
    """Call `function(rank, *arguments)` in each process; fail, and end all, if they wait for each other too long."""
    processes = mp.start_processes(function, args=arguments, nprocs=world, join=False, start_method="spawn")
    deadline = time.monotonic() + limit_s
    # `join` comes back when the first of them ends, and raises what went wrong in it.
    while not processes.join(timeout=max(deadline - time.monotonic(), 0)):
        if time.monotonic() >= deadline:
            for process in processes.processes:
                process.kill()
            pytest.fail(f"the processes still waited for each other after {limit_s} s")
