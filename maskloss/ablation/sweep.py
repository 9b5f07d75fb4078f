"""Sweeps from YAML file to results: executes the runs that are outstanding, and updates the results after each."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from maskloss.ablation.analysis import metric_of
from maskloss.ablation.plan import Plan, read_plan
from maskloss.ablation.results import Outcomes, percent, write_page, write_results
from maskloss.ablation.running import Outcome, Run, outcome_of, run_locally, run_on_ray
from maskloss.ablation.tuning import Trial, Tuned, Tuning, choose, format_values, with_chosen, write_parts
from maskloss.errors import InputError, RunError
from maskloss.files import locked, make_folder, read_bytes, write_bytes
from maskloss.training.setup import device_of


def ablate(
    config: str | Path,
    output: str | Path,
    *,
    engine: Literal["local", "ray"] = "local",
    jobs: int = 1,
    ray_address: str | None = None,
) -> Path:
    """Run or resume a sweep.

    Args:
        config: YAML file of the sweep; see `read_plan`.
        output: folder of the sweep, for runs/VARIANT/seed-S, results.json, table.md and report.html; with `tune`, also
            for runs/VARIANT/tuning-N and the two parts of the training set.
        engine: "local" executes the runs on this machine, "ray" hands them to Ray.
        jobs: number of runs at the same time on this machine, at least 1. Ray runs as many as fit `cpus` and `gpus`.
        ray_address: address of an existing Ray cluster; see `run_on_ray`.

    Returns:
        Path of the report.

    Raises:
        InputError: the YAML is invalid, this machine cannot train the variants, the folder contains runs of another
            config or is in use by another sweep, or Ray is not available. No run was executed then.
        RunError: runs failed. The results of the others are written, and the next call runs the failed ones again.
    """
    if jobs < 1 or (jobs > 1 and engine != "local"):
        raise InputError(f"--jobs must be at least 1, and 1 with --engine ray, got {jobs}")
    plan = read_plan(config, output)
    folder = Path(output)
    if engine == "local":
        for run in plan.runs[: len(plan.variants)]:
            try:
                device_of(run.config)
            except InputError as error:
                raise InputError(f"{config}: variant {run.variant}: {error}") from error
    if (folder / "config.yaml").exists():
        raise InputError(f"{folder}: contains a run of maskloss train; give another --output")
    make_folder(folder)
    # Two sweeps in one folder would both write the files of the same run.
    with locked(folder, "another sweep is running in it; wait until it ends, or give another --output"):
        return _run_sweep(plan, Path(config), folder, engine, jobs, ray_address)


def _run_sweep(
    plan: Plan,
    config: Path,
    folder: Path,
    engine: Literal["local", "ray"],
    jobs: int,
    ray_address: str | None,
) -> Path:
    def execute(runs: Sequence[Run], what: str) -> Iterator[tuple[Run, Outcome]]:
        """Yield each run with its outcome: first those that are complete, then the others as they end."""
        ended = [(run, outcome_of(run)) for run in runs]
        outstanding = [run for run, outcome in ended if outcome is None]
        done = len(runs) - len(outstanding)
        print(what + (f", {done} of them already complete" if done else ""), flush=True)
        for run in outstanding:
            make_folder(run.config.output_folder)
        yield from ((run, outcome) for run, outcome in ended if outcome is not None)
        if not outstanding:
            return
        if engine == "local":
            running = run_locally(outstanding, jobs)
        else:
            running = run_on_ray(outstanding, ray_address, cpus=plan.cpus, gpus=plan.gpus)
        began = time.perf_counter()
        with tqdm(total=len(runs), initial=done, desc="runs", disable=None) as bar:
            for number, (run, outcome) in enumerate(running, start=1):
                left = (time.perf_counter() - began) / number * (len(outstanding) - number)
                bar.update()
                bar.write(_format_line(run, outcome, done + number, len(runs), left))
                yield run, outcome

    for run in plan.tuning.trials if plan.tuning is not None else plan.runs:
        outcome_of(run)  # raises if the folder contains a run of another config
    outcomes: Outcomes = {variant: {} for variant in plan.variants}
    write_bytes(folder / "ablation.yaml", read_bytes(config))
    tuned: dict[str, Tuned] = {}
    runs: Sequence[Run] = plan.runs
    if plan.tuning is not None:
        tuned = _tune(plan, plan.tuning, execute)
        runs = [with_chosen(run, chosen) for run in plan.runs if (chosen := tuned[run.variant].chosen)]
        for run in plan.runs:
            if tuned[run.variant].chosen is None:
                outcomes[run.variant][run.seed] = Outcome(failure=tuned[run.variant].failure)
    what = f"{len(plan.variants)} variants x {len(plan.seeds)} seeds: {len(plan.runs)} runs"
    for run, outcome in execute(runs, what):
        outcomes[run.variant][run.seed] = outcome
        write_results(folder, plan, outcomes, tuned)
    write_results(folder, plan, outcomes, tuned)
    page = write_page(folder, plan, outcomes, tuned)
    failed = [run for run in plan.runs if outcomes[run.variant][run.seed].failure is not None]
    if failed:
        raise RunError(
            f"{len(failed)} of {len(plan.runs)} runs failed; the first is {failed[0].variant} with seed "
            f"{failed[0].seed}: {outcomes[failed[0].variant][failed[0].seed].failure}; the other runs are in {page}"
        )
    return page


def _tune(
    plan: Plan, tuning: Tuning, execute: Callable[[Sequence[Run], str], Iterable[tuple[Run, Outcome]]]
) -> dict[str, Tuned]:
    """Run all trials, and choose the options of each variant."""
    trials = tuning.trials
    for trial in {
        trial.variant: trial for trial in trials
    }.values():  # all trials of a variant share their parts
        write_parts(trial, tuning.fraction)
    combinations = len(trials) // len(plan.variants)
    what = f"tuning: {len(plan.variants)} variants x {combinations} combinations: {len(trials)} runs"
    outcomes = {run.config.output: outcome for run, outcome in execute(trials, what)}
    tuned = {}
    for variant in plan.variants:
        own = [(trial, outcomes[trial.config.output]) for trial in trials if trial.variant == variant]
        tuned[variant] = choose(own)
        chosen = tuned[variant].chosen
        print(f"{variant}: {tuned[variant].failure if chosen is None else format_values(chosen.values)}")
    return tuned


def _format_line(run: Run, outcome: Outcome, number: int, total: int, left: float) -> str:
    if outcome.failure is not None:
        found = f"failed: {outcome.failure}"
    else:
        values = {name: metric_of(outcome.metrics, name) for name in ("box AP", "mask AP")}
        found = ", ".join(f"{name} {percent(value)}" for name, value in values.items())
    what = format_values(run.values) if isinstance(run, Trial) else f"seed {run.seed}"
    return f"[{number}/{total}] {run.variant}, {what}: {found}; about {_format_duration(left)} left"


def _format_duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
