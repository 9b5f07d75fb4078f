"""Execution of a sweep's runs, in subprocesses that end with the sweep, or on Ray.

Each run is `maskloss train --resume` in its own folder, so an interrupted sweep resumes where it stopped, also within
a run. A completed run keeps its model, but not its checkpoints. Its outcome is in outcome.json, which is written last.
"""

from __future__ import annotations

import json
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from maskloss.errors import InputError, RunError, one_line
from maskloss.files import make_folder, write_text
from maskloss.screen import messages_on_screen
from maskloss.training.config import TrainConfig


@dataclass(frozen=True)
class Run:
    """Training run of a sweep.

    Attributes:
        variant: name of the variant.
        seed: seed of everything random.
        config: config of the run, whose output is the run's own folder.
    """

    variant: str
    seed: int
    config: TrainConfig


@dataclass(frozen=True)
class Outcome:
    """Outcome of a run.

    Attributes:
        failure: reason of the failure in one line; None if the run succeeded.
        metrics: content of metrics.json.
        history: lines of history.jsonl.
        seconds_per_step: training time per step without startup and evaluation, as the median over the intervals
            between logged steps.
        peak_bytes: peak memory of the GPU if the run used one, otherwise of its process.
        seconds: time from start to end including evaluation; if the run was interrupted, only since it was resumed.
    """

    failure: str | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    seconds_per_step: float | None = None
    peak_bytes: int | None = None
    seconds: float | None = None


def outcome_of(run: Run) -> Outcome | None:
    """Read the outcome of a run; return None if the run has not ended, or failed and has to be run again.

    Raises:
        InputError: the folder contains a run with another config that did not fail.
    """
    folder = run.config.output_folder
    ended = _read_outcome(folder)
    if ended.get("failure") is not None:
        return None
    # An interrupted run has no outcome.json, only its config.yaml.
    config = ended.get("config") or _read_config(folder)
    if config and (different := _differences(run.config, config)):
        raise InputError(
            f"{folder}: contains a run with another {', '.join(different)}; give another --output, or delete it"
        )
    try:
        history = [json.loads(line) for line in (folder / "history.jsonl").read_text("utf-8").splitlines()]
        metrics = json.loads((folder / "metrics.json").read_text("utf-8"))
        if not history or not metrics["bbox"]:
            return None
        return Outcome(
            None, metrics, history, _seconds_per_step(history), ended["peak_bytes"], ended["seconds"]
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _read_outcome(folder: Path) -> dict[str, Any]:
    """Read outcome.json; return an empty dict if it is missing or invalid."""
    try:
        outcome = json.loads((folder / "outcome.json").read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return outcome if isinstance(outcome, dict) else {}


def _read_config(folder: Path) -> dict[str, Any]:
    """Read the options that a run was started with; return an empty dict if it was not started."""
    try:
        options = yaml.safe_load((folder / "config.yaml").read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return options if isinstance(options, dict) else {}


def _differences(config: TrainConfig, other: dict[str, Any]) -> list[str]:
    # `maskloss train` may resume a run with another max_steps; in a sweep that is another run.
    steps = ["max_steps"] if other.get("max_steps") != config.max_steps else []
    return config.differences(other) + steps


def run_locally(runs: Sequence[Run], jobs: int = 1) -> Iterator[tuple[Run, Outcome]]:
    """Execute runs, each in its own process, so that a crash affects only that run, and yield them as they end.

    Args:
        runs: runs to execute.
        jobs: number of runs at the same time. Several runs share the CPUs: each gets an equal number of threads.
    """
    methods = multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if context.get_start_method() == "forkserver":
        # Import once in the server, so that the runs do not have to.
        context.set_forkserver_preload(["maskloss.training.loop", "maskloss.report.page"])
    threads = None if jobs == 1 else max((os.cpu_count() or 1) // jobs, 1)
    waiting = list(reversed(runs))
    running: dict[Any, tuple[Any, Run]] = {}  # by the handle that tells when the process has ended
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                run = waiting.pop()
                process = context.Process(target=_execute_alone, args=(asdict(run.config), threads))
                process.start()
                running[process.sentinel] = process, run
            for ended in multiprocessing.connection.wait(list(running)):
                process, run = running.pop(ended)
                process.join()
                yield run, _final_outcome(run, f"its process exited with code {process.exitcode}")
    finally:
        # The sweep was interrupted.
        for process, _ in running.values():
            process.terminate()
        for process, _ in running.values():
            process.join()


def run_on_ray(
    runs: list[Run], address: str | None, *, cpus: float, gpus: float
) -> Iterator[tuple[Run, Outcome]]:
    """Execute every run as a Ray task; all machines of the cluster must have access to the sweep's folder.

    Args:
        runs: runs to execute.
        address: address of a cluster; None takes that of RAY_ADDRESS, or else starts a local cluster.
        cpus: number of CPUs per run.
        gpus: number of GPUs per run, possibly fractional.

    Raises:
        InputError: Ray is not installed, there is no cluster at the address, or it has fewer CPUs or GPUs than a run
            requests.
    """
    try:
        import ray
    except ImportError as error:
        raise InputError("--engine ray needs Ray: pip install 'maskloss[ray]'") from error
    try:
        ray.init(address=address, log_to_driver=False, include_dashboard=None if address else False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise InputError(f"--ray-address {address}: {' '.join(str(error).split())}") from error
    try:
        there = ray.cluster_resources()
        for name, needed in (("CPU", cpus), ("GPU", gpus)):
            if needed > there.get(name, 0):
                raise InputError(
                    f"a run requests {needed:g} {name}s, but Ray has {there.get(name, 0):g}; "
                    f"lower {name.lower()}s in the YAML"
                )
        # One run per process, so that its peak memory is its own.
        resources = {"num_cpus": cpus, "num_gpus": gpus}
        task = ray.remote(**resources, max_retries=0, max_calls=1)(execute)
        tasks = {task.remote(asdict(run.config), sys.path): run for run in runs}
        while tasks:
            (done,), _ = ray.wait(list(tasks), num_returns=1)
            run = tasks.pop(done)
            try:
                ray.get(done)
                failure = "its Ray task ended without an outcome"
            except ray.exceptions.RayError as error:
                failure = " ".join(str(error).split())
            yield run, _final_outcome(run, failure)
    finally:
        ray.shutdown()


def execute(options: dict[str, Any], search_path: list[str] | None = None) -> None:
    """Execute a run in the current process and write its outcome; its output goes to log.txt in its folder.

    Args:
        options: fields of the run's `TrainConfig`.
        search_path: additional folders to import modules from.
    """
    sys.path.extend(entry for entry in search_path or [] if entry not in sys.path)
    config = TrainConfig(**options)
    folder = config.output_folder
    make_folder(folder)
    if _read_outcome(folder).get("failure") is not None and _differences(
        config, _read_config(folder) or asdict(config)
    ):
        # A run that failed with other options cannot be resumed.
        shutil.rmtree(folder)
        make_folder(folder)
    (folder / "outcome.json").unlink(missing_ok=True)
    failure: str | None = None
    began = time.perf_counter()
    with _output_to(folder / "log.txt"), messages_on_screen():
        try:
            _train(config)
        except (InputError, RunError) as error:
            if error.__cause__ is not None:
                traceback.print_exc()  # into the log, to show where a loss term raised its error
            # Show what a term raised in the sweep's table; the log says which term, and where.
            cause = error.__cause__
            raised = isinstance(error, RunError) and cause is not None and not isinstance(cause, OSError)
            failure = one_line(f"{type(cause).__name__}: {cause}" if raised else error)
        except (Exception, SystemExit) as error:  # user code may raise anything; the sweep continues
            traceback.print_exc()
            failure = one_line(f"{type(error).__name__}: {error}")
        if failure is not None:
            print(f"failed: {failure}")
    outcome = {
        "failure": failure,
        "peak_bytes": _peak_bytes(config),
        "seconds": time.perf_counter() - began,
        "config": asdict(config),
    }
    write_text(folder / "outcome.json", json.dumps(outcome, indent=1) + "\n")


def _execute_alone(options: dict[str, Any], threads: int | None = None) -> None:
    """Execute a run in a subprocess that exits when the sweep's process dies.

    Otherwise an orphan would keep training in a folder that the resumed sweep also writes.

    Args:
        options: fields of the run's `TrainConfig`.
        threads: number of CPU threads for torch; None for torch's own choice.
    """
    sweep = multiprocessing.parent_process()
    assert sweep is not None

    def exit_with_sweep() -> None:
        sweep.join()
        os._exit(1)

    # Ctrl-C reaches the sweep's process too, which terminates this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=exit_with_sweep, daemon=True).start()
    code = 1
    try:
        if threads is not None:
            import torch

            torch.set_num_threads(threads)
        execute(options)
        code = 0
    except BaseException as error:  # the outcome could not be written
        with suppress(Exception):
            print(
                one_line(f"{options['output']}: {type(error).__name__}: {error}"), file=sys.stderr, flush=True
            )
    finally:
        # Exit without waiting for what is left running, such as a user's thread that never ends.
        os._exit(code)


def _train(config: TrainConfig) -> None:
    from maskloss.report.page import write_report
    from maskloss.training.loop import train
    from maskloss.training.metrics import labels, score_thresholds

    result = train(config)
    evaluation = result.evaluation
    write_report(
        config.output_folder,
        result.validation,
        evaluation.results,
        labels(),
        thresholds=score_thresholds(evaluation.metrics, evaluation.results),
    )
    # Checkpoints are several times the size of the model, and a completed run is not resumed.
    shutil.rmtree(config.output_folder / "checkpoints", ignore_errors=True)


def _final_outcome(run: Run, otherwise: str) -> Outcome:
    if (outcome := outcome_of(run)) is not None:
        return outcome
    return Outcome(failure=_read_outcome(run.config.output_folder).get("failure") or otherwise)


def _seconds_per_step(history: list[dict[str, Any]]) -> float | None:
    rates = [(b["seconds"] - a["seconds"]) / (b["step"] - a["step"]) for a, b in pairwise(history)]
    return statistics.median(rates) if rates else None


def _peak_bytes(config: TrainConfig) -> int:
    import torch

    if config.device != "cpu" and torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    # Kibibytes on Linux, bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@contextmanager
def _output_to(path: Path) -> Iterator[None]:
    with (
        path.open("a", buffering=1, encoding="utf-8", errors="backslashreplace") as log,
        redirect_stdout(log),
        redirect_stderr(log),
    ):
        yield
