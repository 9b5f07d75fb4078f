"""Sweeps from YAML file to results: executes the runs that are outstanding, and updates the results after each."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from maskloss.ablation.analysis import metric_of
from maskloss.ablation.plan import Plan, Run, read_plan
from maskloss.ablation.results import Outcomes, percent, write_page, write_results
from maskloss.ablation.running import Outcome, outcome_of, run_locally, run_on_ray
from maskloss.errors import InputError, RunError
from maskloss.files import locked, make_folder, read_bytes, write_bytes
from maskloss.training.setup import device_of


def ablate(
    config: str | Path,
    output: str | Path,
    *,
    engine: Literal["local", "ray"] = "local",
    ray_address: str | None = None,
) -> Path:
    """Run or resume a sweep.

    Args:
        config: YAML file of the sweep; see `read_plan`.
        output: folder of the sweep, for runs/VARIANT/seed-S, results.json, table.md and report.html.
        engine: "local" executes the runs one after another on this machine, "ray" hands them to Ray.
        ray_address: address of an existing Ray cluster; see `run_on_ray`.

    Returns:
        Path of the report.

    Raises:
        InputError: the YAML is invalid, this machine cannot train the variants, the folder contains runs of another
            config or is in use by another sweep, or Ray is not available. No run was executed then.
        RunError: runs failed. The results of the others are written, and the next call runs the failed ones again.
    """
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
        return _run_sweep(plan, Path(config), folder, engine, ray_address)


def _run_sweep(
    plan: Plan, config: Path, folder: Path, engine: Literal["local", "ray"], ray_address: str | None
) -> Path:
    outcomes: Outcomes = {variant: {} for variant in plan.variants}
    outstanding = []
    for run in plan.runs:
        outcome = outcome_of(run)
        if outcome is None:
            outstanding.append(run)
        else:
            outcomes[run.variant][run.seed] = outcome
    for run in outstanding:
        make_folder(run.config.output_folder)
    write_bytes(folder / "ablation.yaml", read_bytes(config))
    _print_plan(plan, outstanding)
    running = run_locally(outstanding) if engine == "local" else run_on_ray(plan, outstanding, ray_address)
    began = time.perf_counter()
    bar = tqdm(total=len(plan.runs), initial=len(plan.runs) - len(outstanding), desc="runs", disable=None)
    with bar:
        for number, (run, outcome) in enumerate(running if outstanding else (), start=1):
            outcomes[run.variant][run.seed] = outcome
            elapsed = time.perf_counter() - began
            left = elapsed / number * (len(outstanding) - number)
            bar.update()
            bar.write(
                _format_line(run, outcome, len(plan.runs) - len(outstanding) + number, len(plan.runs), left)
            )
            write_results(folder, plan, outcomes)
    write_results(folder, plan, outcomes)
    page = write_page(folder, plan, outcomes)
    failed = [run for run in plan.runs if outcomes[run.variant][run.seed].failure is not None]
    if failed:
        raise RunError(
            f"{len(failed)} of {len(plan.runs)} runs failed; the first is {failed[0].variant} with seed "
            f"{failed[0].seed}: {outcomes[failed[0].variant][failed[0].seed].failure}; the other runs are in {page}"
        )
    return page


def _print_plan(plan: Plan, outstanding: list[Run]) -> None:
    done = len(plan.runs) - len(outstanding)
    print(
        f"{len(plan.variants)} variants x {len(plan.seeds)} seeds: {len(plan.runs)} runs"
        + (f", {done} of them already complete" if done else ""),
        flush=True,
    )


def _format_line(run: Run, outcome: Outcome, number: int, total: int, left: float) -> str:
    if outcome.failure is not None:
        found = f"failed: {outcome.failure}"
    else:
        values = {name: metric_of(outcome.metrics, name) for name in ("box AP", "mask AP")}
        found = ", ".join(f"{name} {percent(value)}" for name, value in values.items())
    return f"[{number}/{total}] {run.variant}, seed {run.seed}: {found}; about {_format_duration(left)} left"


def _format_duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
