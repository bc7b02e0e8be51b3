"""Compares training methods: every arm on every task with several seeds, at an equal budget of generated tokens.

    python tools/study.py --tune                 # one small grid per arm, on seeds of its own; freezes the winners
    python tools/study.py --seeds 5 --jobs 2     # the study; run it again to continue after an interruption
    python tools/study.py --sweep                # one-seed variants of one arm
    python tools/study.py --budget-only          # what all of it would cost
    python tools/study.py --report-only          # docs/study.md and its figures from the runs that are finished
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from study_plan import (
    RunSpec,
    Study,
    Task,
    load_study,
    start_commands,
    start_folder,
    study_runs,
    sweep_runs,
    tuning_runs,
)
from study_pool import DONE_NAME, ROOT, is_done, record_of, run_all, run_commands
from study_report import write_report

from spear_megatron.evaluation.study import Run, common_budget, outcomes
from spear_megatron.parallel.paths import os_error_text

TUNING_SEEDS = (101,)  # disjoint from the study's 1, 2, ...
SWEEP_SEED = 1
START_DEADLINE_S = 3600.0
T = TypeVar("T")
Frozen = dict[str, dict[str, float]]


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the options ask for; 1 if a run failed, 2 on bad input."""
    args = parse(argv)
    try:
        study = load_study(args.study)
        tasks = [chosen(study.tasks, name, "--task") for name in args.task or study.tasks]
        arms = [chosen(study.arms, name, "--arms").name for name in args.arms or study.arms]
        failures = carry_out(args, study, tasks, arms)
    except (ValueError, OSError, RuntimeError) as error:
        told = os_error_text(error) if isinstance(error, OSError) else None
        print(f"study: {told or error}", file=sys.stderr)
        return 2
    for failure in failures:
        print(failure, file=sys.stderr)
    return 1 if failures else 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", type=placed, default=ROOT / "configs" / "study_arms.yaml", help="arms and tasks")
    parser.add_argument("--task", nargs="+", metavar="NAME", help="tasks to run (default: all)")
    parser.add_argument("--arms", nargs="+", metavar="NAME", help="arms to run (default: all)")
    parser.add_argument("--seeds", type=int, default=5, help="seeds 1 to N per arm")
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time, one thread each")
    parser.add_argument("--out", type=placed, default=ROOT / "outputs" / "study", help="folder of all runs")
    parser.add_argument("--frozen", type=placed, help="tuned learning rates (default: beside the study file)")
    parser.add_argument("--docs", type=placed, default=ROOT / "docs", help="folder of study.md and its images")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--tune", action="store_true", help="run the grid of learning rates and freeze the best")
    mode.add_argument("--sweep", action="store_true", help="run the study file's variants of one arm")
    mode.add_argument("--budget-only", action="store_true", help="print the plan and its cost, run nothing")
    mode.add_argument("--report-only", action="store_true", help="write the report from finished runs")
    args = parser.parse_args(argv)
    if args.seeds < 1 or args.jobs < 1:
        parser.error("--seeds and --jobs must be at least 1")
    if args.report_only and not args.out.is_dir():
        parser.error(f"--report-only reads finished runs, but --out {args.out} is no folder: name that of the study")
    if args.frozen is not None and not args.tune and not args.frozen.is_file():
        parser.error(f"--frozen {args.frozen} does not exist: run --tune first, or leave it away")
    return args


def carry_out(args: argparse.Namespace, study: Study, tasks: Sequence[Task], arms: Sequence[str]) -> list[str]:
    """Run the chosen mode and return the failures."""
    out, frozen_path = args.out, args.frozen or frozen_beside(args.study)
    frozen = read_frozen(frozen_path)
    starts = {task.name: start_folder(task, out) for task in tasks}
    if args.budget_only:
        print_budget(plan(study, tasks, out, arms, args.seeds, starts, frozen), args.jobs)
        return []
    if not args.report_only:
        for task in tasks:
            prepare(task, starts[task.name])
    if args.tune:
        return tune(study, tasks, out, arms, starts, args.jobs, frozen_path)
    if not frozen:
        print(f"no tuned learning rates in {frozen_path}: every arm takes that of its task's configuration")
    failures: list[str] = []
    if not args.report_only:
        specs = plan(study, tasks, out, arms, args.seeds, starts, frozen)
        chosen_specs = specs["sweep"] if args.sweep else specs["study"]
        failures = run_all(chosen_specs, args.jobs)
    report = write_report(study, tasks, out, args.docs, frozen)
    print(f"wrote {report}")
    return failures


def plan(
    study: Study,
    tasks: Sequence[Task],
    out: Path,
    arms: Sequence[str],
    num_seeds: int,
    starts: Mapping[str, Path],
    frozen: Frozen,
) -> dict[str, list[RunSpec]]:
    """All runs by stage: tune, study, sweep."""
    stages: dict[str, list[RunSpec]] = {"tune": [], "study": [], "sweep": []}
    for task in tasks:
        start, rates = starts[task.name], frozen.get(task.name, {})
        grid = tuning_runs(study, task, out, arms=arms, seeds=TUNING_SEEDS, start=start)
        stages["tune"] += [spec for specs in grid.values() for spec in specs]
        seeds = range(1, num_seeds + 1)
        stages["study"] += study_runs(study, task, out, arms=arms, seeds=seeds, start=start, rates=rates)
        if study.sweep_arm is not None:
            stages["sweep"] += sweep_runs(study, task, out, seed=SWEEP_SEED, start=start, rates=rates)
    return stages


def prepare(task: Task, start: Path) -> None:
    """Make the task's cold-started model, once."""
    marker = start / DONE_NAME
    if marker.is_file():
        return
    began = time.monotonic()
    print(f"{task.name}: model and cold start into {start}", flush=True)
    start.mkdir(parents=True, exist_ok=True)
    run_commands(start_commands(task, start), start / "prepare.log", START_DEADLINE_S)
    seconds = time.monotonic() - began
    marker.write_text(json.dumps({"seconds": round(seconds, 1)}) + "\n")
    print(f"{task.name}: cold start took {seconds:.0f} s", flush=True)


def tune(
    study: Study,
    tasks: Sequence[Task],
    out: Path,
    arms: Sequence[str],
    starts: Mapping[str, Path],
    jobs: int,
    frozen_path: Path,
) -> list[str]:
    """Run every arm's grid, freeze the rate of best held-out success, and write ``frozen_path`` and a copy in ``out``.

    An arm of which a run failed is not frozen.
    """
    grids = [
        tuning_runs(study, task, out, arms=arms, seeds=TUNING_SEEDS, start=starts[task.name]) for task in tasks
    ]
    failures = run_all([spec for grid in grids for specs in grid.values() for spec in specs], jobs)
    stored = json.loads(frozen_path.read_text()) if frozen_path.is_file() else {}
    for task, grid in zip(tasks, grids, strict=True):
        stored[task.name] = {**stored.get(task.name, {}), **best_rates(task, grid)}
        for arm in arms:
            print(f"{task.name} {arm}: {stored[task.name].get(arm, 'not frozen')}")
    text = json.dumps(stored, indent=2) + "\n"
    for path in (frozen_path, out / "frozen.json"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return failures


def best_rates(task: Task, grid: Mapping[tuple[str, float], Sequence[RunSpec]]) -> dict[str, dict[str, Any]]:
    """Per arm whose whole grid has finished, the rate of best held-out success at the tokens that all runs reached.

    Equal success is decided by the area under the curve, then for the lower rate.
    """
    runs = {
        key: [Run(f"{key[0]} {key[1]!r}", spec.seed, record_of(spec.folder)) for spec in specs]
        for key, specs in grid.items()
        if all(is_done(spec) for spec in specs)
    }
    if not runs:
        return {}
    every = [run for part in runs.values() for run in part]
    found = outcomes(every, min(common_budget(every), task.token_budget), ())
    best: dict[str, dict[str, Any]] = {}
    for arm in dict.fromkeys(arm for arm, _ in grid):
        if any((arm, lr) not in runs for lr in task.learning_rates):
            continue
        scored = {lr: found[f"{arm} {lr!r}"] for lr in task.learning_rates}
        final = {lr: statistics.fmean(outcome.final.values()) for lr, outcome in scored.items()}
        area = {lr: statistics.fmean(outcome.area.values()) for lr, outcome in scored.items()}
        rate = max(task.learning_rates, key=lambda lr: (final[lr], area[lr], -lr))
        best[arm] = {"lr": rate, "final": {f"{lr:g}": round(value, 4) for lr, value in final.items()}}
    return best


def read_frozen(path: Path) -> Frozen:
    """Tuned learning rates by task and arm; empty without the file."""
    if not path.is_file():
        return {}
    stored = json.loads(path.read_text())
    return {task: {arm: float(entry["lr"]) for arm, entry in part.items()} for task, part in stored.items()}


def print_budget(stages: Mapping[str, Sequence[RunSpec]], jobs: int) -> None:
    """Runs, tokens and minutes of every stage; minutes from finished runs of the task where there are any."""
    measured: dict[str, list[float]] = {}
    for spec in {spec.folder: spec for specs in stages.values() for spec in specs}.values():
        if is_done(spec):
            seconds = json.loads((spec.folder / DONE_NAME).read_text())["seconds"]
            measured.setdefault(spec.task.name, []).append(seconds / 60)
    for stage, specs in stages.items():
        left = [spec for spec in specs if not is_done(spec)]
        minutes = sum(statistics.fmean(measured.get(spec.task.name, [spec.task.minutes_per_run])) for spec in left)
        tokens = sum(spec.task.token_budget for spec in specs)
        print(
            f"{stage}: {len(specs)} runs, {len(left)} of them to do, {tokens:,.0f} tokens in all, "
            f"about {math.ceil(minutes / jobs)} min with --jobs {jobs}"
        )


def chosen(known: Mapping[str, T], name: str, option: str) -> T:
    """ValueError naming the option unless ``name`` is known."""
    if name not in known:
        raise ValueError(f"{option} {name}: the study file has {', '.join(known)}")
    return known[name]


def frozen_beside(study_file: Path) -> Path:
    """Where the tuned learning rates of a study file lie."""
    return study_file.with_name(f"{study_file.stem}_frozen.json")


def placed(text: str) -> Path:
    """An absolute path: the runs work in the folder of the repository."""
    return Path(os.path.abspath(text))


if __name__ == "__main__":
    sys.exit(main())
