"""Shared by the benchmarks: alternating timing, peak memory, and results with their environment."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of measurements."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        """Summarize at least two values."""
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


def seconds(function: Callable[[], Any], device: str | torch.device = "cpu") -> float:
    """Time one call in seconds, including the work of the device."""
    cuda = torch.device(device).type == "cuda"
    if cuda:
        torch.cuda.synchronize()
    began = time.perf_counter()
    function()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


@contextmanager
def without_tf32() -> Iterator[None]:
    """Compute products and convolutions in full float32 on a GPU, for a check that two sides are equal."""
    kept = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = kept


def alternating(
    functions: Mapping[str, Callable[[], Any]], repeats: int, device: str | torch.device = "cpu"
) -> dict[str, list[float]]:
    """Time the functions in alternating calls, in seconds per call, after one warm-up call of each."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(repeats + 1):
        for name, function in functions.items():
            elapsed = seconds(function, device)
            if repeat:
                times[name].append(elapsed)
    return times


def speedup(stock: list[float], ours: list[float]) -> Spread:
    """Return the speedup of ours over stock, from pairs of alternating calls."""
    return Spread.of([a / b for a, b in zip(stock, ours, strict=True)])


def peak_bytes(function: Callable[[], Any], device: str | torch.device = "cpu") -> int:
    """Measure the peak additional memory of a call in bytes, including its return value.

    On CUDA this is the memory allocated by torch; on a CPU (Linux) it is the memory of the process, whichever library
    allocated it. The function is called twice, so that one-time setup of libraries does not count.
    """
    function()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        allocated = torch.cuda.memory_allocated()
        kept = function()
        del kept
        return torch.cuda.max_memory_allocated() - allocated
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before = _status("VmRSS")
    kept = function()
    peak = _status("VmHWM") - before
    del kept
    return peak


def count_waits(function: Callable[[], Any]) -> int:
    """Count the synchronizations of the host with CUDA in one call, as reported by torch."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            function()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    # Ignore other warnings.
    return sum("synchroniz" in str(warning.message) for warning in seen)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")


def environment(device: str | torch.device = "cpu") -> dict[str, Any]:
    """Return the commit, hardware and versions that a benchmark runs with."""
    cuda = torch.device(device).type == "cuda"
    return {
        "commit": _commit(),
        "device": torch.cuda.get_device_name() if cuda else (_processor() or platform.machine()),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
    }


def write_results(name: str, device: str | torch.device, results: dict[str, Any]) -> None:
    """Write `results/NAME.json`, or on CUDA `results/NAME-cuda.json`, with the environment and the command."""
    RESULTS.mkdir(exist_ok=True)
    # Results are committed, so folders of this machine are left out of paths.
    shown = [
        Path(argument).name if Path(argument).is_absolute() else argument for argument in sys.orig_argv[1:]
    ]
    document = {
        "command": " ".join(["python", *shown]),
        "environment": environment(device),
        "results": results,
    }
    cuda = torch.device(device).type == "cuda"
    path = RESULTS / (f"{name}-cuda.json" if cuda else f"{name}.json")
    path.write_text(json.dumps(document, indent=2, default=asdict) + "\n")
    print(f"\n{path}")


def _commit() -> str:
    folder = Path(__file__).parent
    try:
        commit = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=folder, text=True).strip()
        # Check only the code for changes, not the documentation or the results.
        code = ["--", "*.py", "../maskloss"]
        changed = subprocess.check_output(
            ["git", "status", "--porcelain", "-uno", *code], cwd=folder, text=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + (" with changes" if changed.strip() else "")


def _processor() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), None)
