"""Running a sweep's runs, one after another in processes of their own, which end with it, or on Ray.

Each run is `maskloss train --resume` in its folder, so a sweep that was stopped goes on where it stopped, within a run
too; a run that has ended keeps its model, not its checkpoints. What it ended with is in its outcome.json, which is
written last.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import shutil
import signal
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from maskloss.ablation.plan import Plan, Run
from maskloss.errors import InputError, RunError, one_line
from maskloss.files import make_folder, write_text
from maskloss.screen import messages_on_screen
from maskloss.training.config import TrainConfig


@dataclass(frozen=True)
class Outcome:
    """What a run ended with.

    Attributes:
        failure: why it failed, in a line; None where it did not.
        metrics: of metrics.json.
        history: lines of history.jsonl.
        seconds_per_step: of training, without start and evaluation; the median over logged stretches.
        peak_bytes: the most memory that the run held: of the GPU where it used one, else of its process.
        seconds: from start to end, evaluation included; of the last stretch where it was interrupted.
    """

    failure: str | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    seconds_per_step: float | None = None
    peak_bytes: int | None = None
    seconds: float | None = None


def outcome_of(run: Run) -> Outcome | None:
    """Read what a run ended with; None where it has not ended, or failed and is to be tried again.

    Raises:
        InputError: what is there is a run of another config, and one that did not fail.
    """
    folder = run.config.output_folder
    ended = _written(folder)
    if ended.get("failure") is not None:
        return None
    # A run that was interrupted has its config.yaml only.
    config = ended.get("config") or _begun_with(folder)
    if config and (different := _differences(run.config, config)):
        raise InputError(
            f"{folder}: holds a run with another {', '.join(different)}; give another --output, or delete it"
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


def _written(folder: Path) -> dict[str, Any]:
    """What outcome.json says; nothing where there is none that can be read."""
    try:
        outcome = json.loads((folder / "outcome.json").read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return outcome if isinstance(outcome, dict) else {}


def _begun_with(folder: Path) -> dict[str, Any]:
    """The options that a run was begun with; nothing where it was not."""
    try:
        options = yaml.safe_load((folder / "config.yaml").read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return options if isinstance(options, dict) else {}


def _differences(config: TrainConfig, other: dict[str, Any]) -> list[str]:
    # A run may be resumed with another max_steps; as a run of a sweep it is another then.
    steps = ["max_steps"] if other.get("max_steps") != config.max_steps else []
    return config.differences(other) + steps


def run_locally(runs: list[Run]) -> Iterator[tuple[Run, Outcome]]:
    """Run one after another, each in a process of its own, whose end ends nothing else."""
    methods = multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if context.get_start_method() == "forkserver":
        # So that a run does not begin with the imports.
        context.set_forkserver_preload(["maskloss.training.loop", "maskloss.report.page"])
    for run in runs:
        process = context.Process(target=_execute_alone, args=(asdict(run.config),))
        process.start()
        try:
            process.join()
        except BaseException:
            process.terminate()
            process.join()
            raise
        yield run, _ended(run, f"its process ended with exit code {process.exitcode}")


def run_on_ray(plan: Plan, runs: list[Run], address: str | None) -> Iterator[tuple[Run, Outcome]]:
    """Hand every run to Ray as a task, which decides where and when; the sweep's folder must be seen from there.

    Args:
        plan: how many CPUs and GPUs a run asks for.
        runs: to run.
        address: of a cluster; None starts a local one, or takes that of RAY_ADDRESS.

    Raises:
        InputError: Ray is not installed, there is no cluster there, or none of its machines has what a run asks for.
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
        for name, needed in (("CPU", plan.cpus), ("GPU", plan.gpus)):
            if needed > there.get(name, 0):
                raise InputError(f"a run asks for {needed:g} {name}s, and Ray has {there.get(name, 0):g}")
        # One run to a process, so that the memory it held is its own.
        resources = {"num_cpus": plan.cpus, "num_gpus": plan.gpus}
        task = ray.remote(**resources, max_retries=0, max_calls=1)(execute)
        tasks = {task.remote(asdict(run.config), sys.path): run for run in runs}
        while tasks:
            (done,), _ = ray.wait(list(tasks), num_returns=1)
            run = tasks.pop(done)
            try:
                ray.get(done)
                failure = "its task ended without an outcome"
            except ray.exceptions.RayError as error:
                failure = " ".join(str(error).split())
            yield run, _ended(run, failure)
    finally:
        ray.shutdown()


def execute(options: dict[str, Any], search_path: list[str] | None = None) -> None:
    """Run one run, in whichever process this is, and write its outcome; what it prints goes into its log.txt.

    Args:
        options: fields of the run's `TrainConfig`.
        search_path: where else to look for modules.
    """
    sys.path.extend(entry for entry in search_path or [] if entry not in sys.path)
    config = TrainConfig(**options)
    folder = config.output_folder
    make_folder(folder)
    if _written(folder).get("failure") is not None and _differences(
        config, _begun_with(folder) or asdict(config)
    ):
        # What failed with other options has nothing to go on from.
        shutil.rmtree(folder)
        make_folder(folder)
    (folder / "outcome.json").unlink(missing_ok=True)
    failure: str | None = None
    began = time.perf_counter()
    with _logged(folder / "log.txt"), messages_on_screen():
        try:
            _train(config)
        except (InputError, RunError) as error:
            if error.__cause__ is not None:
                traceback.print_exc()  # into the log: a term's error is understood by where it was raised
            # The table of a sweep has room for what a term raised; the log says which term, and where.
            cause = error.__cause__
            raised = isinstance(error, RunError) and cause is not None and not isinstance(cause, OSError)
            failure = one_line(f"{type(cause).__name__}: {cause}" if raised else error)
        except (Exception, SystemExit) as error:  # a user's loss may raise anything, and the sweep goes on
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


def _execute_alone(options: dict[str, Any]) -> None:
    """Run one run, and end with the sweep: what a killed one leaves would train on, beside its own resumption."""
    sweep = multiprocessing.parent_process()
    assert sweep is not None

    def end_with_it() -> None:
        sweep.join()
        os._exit(1)

    # Ctrl-C reaches the sweep too, which ends this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_it, daemon=True).start()
    code = 1
    try:
        execute(options)
        code = 0
    except BaseException as error:  # the outcome could not be written
        with suppress(Exception):
            print(
                one_line(f"{options['output']}: {type(error).__name__}: {error}"), file=sys.stderr, flush=True
            )
    finally:
        # What a run leaves behind, such as a user's thread that never ends, must not keep the sweep waiting.
        os._exit(code)


def _train(config: TrainConfig) -> None:
    from maskloss.report.page import write_report
    from maskloss.training.loop import train
    from maskloss.training.metrics import labels

    result = train(config)
    write_text(config.output_folder / "results.json", json.dumps(result.evaluation.results))
    write_report(config.output_folder, result.validation, result.evaluation.results, labels())
    # They are several times the size of the model, and a sweep has many runs, none of which goes on from here.
    shutil.rmtree(config.output_folder / "checkpoints", ignore_errors=True)


def _ended(run: Run, otherwise: str) -> Outcome:
    if (outcome := outcome_of(run)) is not None:
        return outcome
    return Outcome(failure=_written(run.config.output_folder).get("failure") or otherwise)


def _seconds_per_step(history: list[dict[str, Any]]) -> float | None:
    rates = [(b["seconds"] - a["seconds"]) / (b["step"] - a["step"]) for a, b in pairwise(history)]
    return statistics.median(rates) if rates else None


def _peak_bytes(config: TrainConfig) -> int:
    import torch

    if config.device != "cpu" and torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    # Kibibytes on Linux, bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@contextmanager
def _logged(path: Path) -> Iterator[None]:
    with (
        path.open("a", buffering=1, encoding="utf-8", errors="backslashreplace") as log,
        redirect_stdout(log),
        redirect_stderr(log),
    ):
        yield
