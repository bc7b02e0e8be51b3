"""The plan of a study: tasks, arms and seeds out of one YAML file, and the command of every run."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

LR = "actor_rollout_ref.actor.optim.lr"
START = "{start}"
# What the cold start depends on, besides its ``prepare`` commands.
_START_KEYS = ("sft.", "data.", "actor_rollout_ref.model.dtype", "trainer.seed")


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One method: a preset of the algorithm and overrides on top of it."""

    name: str
    title: str
    preset: Path | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task: its configuration, how its model is prepared, and how long a run may be.

    Attributes:
        prepare: arguments of Python commands that come before the cold start; ``{start}`` is its folder.
        overrides: for every arm alike; they follow the preset, so that schedules fit the length of a run.
        token_budget: a run ends with its first evaluation at or beyond this many sampled tokens.
        learning_rates: the grid of ``--tune``.
        deadline_minutes, minutes_per_run: of one run; the second is the estimate before any run has finished.
    """

    name: str
    title: str
    config: Path
    prepare: tuple[tuple[str, ...], ...] = ()
    overrides: Mapping[str, Any] = field(default_factory=dict)
    token_budget: float = 0.0
    learning_rates: tuple[float, ...] = ()
    deadline_minutes: float = 60.0
    minutes_per_run: float = 5.0


@dataclass(frozen=True, kw_only=True)
class Study:
    """Everything a study file says; ``notes`` is a text by hand that the report quotes."""

    arms: Mapping[str, Arm]
    tasks: Mapping[str, Task]
    baselines: tuple[str, ...]
    sweep_arm: str | None = None
    sweep: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    notes: Path | None = None


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """One training run; ``fingerprint`` names what decides its course: a folder belongs to one fingerprint."""

    task: Task
    arm: str
    seed: int
    folder: Path
    overrides: tuple[str, ...]
    fingerprint: str

    @property
    def name(self) -> str:
        """What progress lines call it."""
        return f"{self.task.name} {self.folder.parent.name} seed {self.seed}"

    @property
    def command(self) -> list[str]:
        """``python -m spear_megatron train`` with everything the run needs."""
        place = (f"trainer.default_local_dir={self.folder}",)
        return [
            sys.executable, "-m", "spear_megatron", "train", "--config", str(self.task.config), *self.overrides, *place,
        ]  # fmt: skip


def load_study(path: Path) -> Study:
    """Read a study file; paths in it are relative to it.

    Raises:
        ValueError: a section is missing or malformed, or a baseline or the sweep's arm is not among the arms.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        arms = {name: _arm(name, part or {}, path.parent) for name, part in raw["arms"].items()}
        tasks = {name: _task(name, part, path.parent) for name, part in raw["tasks"].items()}
        sweep = raw.get("sweep") or {}
        variants = {name: _flat(part) for name, part in (sweep.get("variants") or {}).items()}
        notes = raw.get("notes")
        study = Study(
            arms=arms, tasks=tasks, baselines=tuple(raw["baselines"]), sweep_arm=sweep.get("arm"), sweep=variants,
            notes=None if notes is None else Path(os.path.abspath(path.parent / notes)),
        )  # fmt: skip
    except (KeyError, TypeError, AttributeError, yaml.YAMLError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} is not a study file: {type(error).__name__}: {reason}") from error
    if study.notes is not None and not study.notes.is_file():
        raise ValueError(f"{path}: notes names {study.notes}, which does not exist")
    unknown = [name for name in (*study.baselines, *filter(None, [study.sweep_arm])) if name not in arms]
    if unknown:
        raise ValueError(f"{path}: {', '.join(unknown)} not among the arms {', '.join(arms)}")
    return study


def _arm(name: str, part: Mapping[str, Any], root: Path) -> Arm:
    preset = part.get("preset")
    return Arm(
        name=name,
        title=part.get("title", name),
        preset=None if preset is None else Path(os.path.abspath(root / preset)),
        overrides=_flat(part.get("overrides") or {}),
    )


def _task(name: str, part: Mapping[str, Any], root: Path) -> Task:
    return Task(
        name=name,
        title=part.get("title", name),
        config=Path(os.path.abspath(root / part["config"])),
        prepare=tuple(tuple(map(str, command)) for command in part.get("prepare") or ()),
        overrides=_flat(part.get("overrides") or {}),
        token_budget=float(part["token_budget"]),
        learning_rates=tuple(map(float, part.get("learning_rates") or ())),
        deadline_minutes=float(part.get("deadline_minutes", 60)),
        minutes_per_run=float(part.get("minutes_per_run", 5)),
    )


def preset_values(path: Path) -> dict[str, Any]:
    """Values of a preset and of those it is based on, by dotted key.

    Raises:
        FileNotFoundError: the preset or its base does not exist.
    """
    if not path.is_file():
        raise FileNotFoundError(f"the preset {path} does not exist")
    values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    base = values.pop("base", None)
    return {**(preset_values(path.parent / base) if base else {}), **_flat(values)}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def override_texts(values: Mapping[str, Any], start: Path) -> list[str]:
    """``key=value`` arguments; JSON is YAML, so that every type survives. ``{start}`` becomes the start's folder."""
    return [f"{key}={json.dumps(value)}".replace(START, str(start)) for key, value in values.items()]


def run_spec(
    task: Task,
    arm: Arm,
    seed: int,
    folder: Path,
    *,
    start: Path,
    lr: float | None = None,
    variant: Mapping[str, Any] | None = None,
) -> RunSpec:
    """The run of ``arm`` on ``task``. Later values win: preset, task, arm, learning rate, sweep variant, seed.

    Raises:
        FileNotFoundError: the preset or the configuration does not exist.
        ValueError: the configuration refuses a value.
    """
    values = dict(preset_values(arm.preset) if arm.preset else {})
    for part in (task.overrides, arm.overrides, {} if lr is None else {LR: lr}, variant or {}):
        values.update(part)
    values |= {
        "actor_rollout_ref.model.path": f"{START}/sft/hf", "trainer.seed": seed, "data.seed": seed,
        "trainer.num_threads": 1, "trainer.save_hf": False, "trainer.val_before_train": True,
        "trainer.max_actor_ckpt_to_keep": 1, "trainer.num_logged_trajectories": 2, "trainer.logger": ["console"],
    }  # fmt: skip
    return RunSpec(
        task=task,
        arm=arm.name,
        seed=seed,
        folder=folder,
        overrides=tuple(override_texts(values, start)),
        fingerprint=_digest([start.name, *_resolved(task, values)], ignored=("trainer.default_local_dir",)),
    )


def _resolved(task: Task, values: Mapping[str, Any]) -> list[str]:
    """The whole configuration as ``key=value`` lines, with ``{start}`` left as it is: moved folders change nothing."""
    from spear_megatron.config.describe import flatten
    from spear_megatron.config.loader import load
    from spear_megatron.config.schema import Config

    config = flatten(load(Config, task.config, override_texts(values, Path(START))))
    return [f"{key}={value!r}" for key, value in config.items()]


def _digest(lines: Sequence[str], *, ignored: tuple[str, ...] = ()) -> str:
    kept = [line for line in lines if not (ignored and line.startswith(ignored))]
    return hashlib.sha256("\n".join(kept).encode()).hexdigest()[:12]


def start_folder(task: Task, out: Path) -> Path:
    """Where the task's cold start lies: a folder named after everything that it depends on.

    Raises:
        FileNotFoundError: the task's configuration does not exist.
        ValueError: it cannot be read.
    """
    kept = [line for line in _resolved(task, task.overrides) if line.startswith(_START_KEYS)]
    return out / task.name / f"start_{_digest([*kept, json.dumps(task.prepare)])}"


def start_commands(task: Task, start: Path) -> list[list[str]]:
    """The commands that make the cold-started model in ``start``/sft/hf, in order."""
    python = [sys.executable]
    prepare = [[*python, *(part.replace(START, str(start)) for part in command)] for command in task.prepare]
    place = [f"actor_rollout_ref.model.path={start}/model", f"sft.default_local_dir={start}/sft"]
    sft = [
        *python, "-m", "spear_megatron", "sft", "--config", str(task.config),
        *override_texts(task.overrides, start), *place, "trainer.num_threads=1", "trainer.logger=[console]",
    ]  # fmt: skip
    return [*prepare, sft]


def study_runs(
    study: Study,
    task: Task,
    out: Path,
    *,
    arms: Sequence[str],
    seeds: Sequence[int],
    start: Path,
    rates: Mapping[str, float],
) -> list[RunSpec]:
    """Every arm with every seed, the seeds outermost, so that an interrupted study has whole seeds to compare."""
    root = out / task.name / "runs"
    return [
        run_spec(task, study.arms[arm], seed, root / arm / f"seed_{seed}", start=start, lr=rates.get(arm))
        for seed in seeds
        for arm in arms
    ]


def tuning_runs(
    study: Study, task: Task, out: Path, *, arms: Sequence[str], seeds: Sequence[int], start: Path
) -> dict[tuple[str, float], list[RunSpec]]:
    """The same grid of learning rates for every arm, by (arm, rate)."""
    root = out / task.name / "tune"
    return {
        (arm, lr): [
            run_spec(task, study.arms[arm], seed, root / f"{arm}-lr{lr:g}" / f"seed_{seed}", start=start, lr=lr)
            for seed in seeds
        ]
        for arm in arms
        for lr in task.learning_rates
    }


def sweep_runs(
    study: Study, task: Task, out: Path, *, seed: int, start: Path, rates: Mapping[str, float]
) -> list[RunSpec]:
    """The variants of the sweep's arm, one seed each.

    Raises:
        ValueError: the study has no sweep.
    """
    if study.sweep_arm is None or not study.sweep:
        raise ValueError("the study file has no sweep: add sweep.arm and sweep.variants")
    arm, root = study.arms[study.sweep_arm], out / task.name / "sweep"
    return [
        run_spec(
            task, arm, seed, root / name / f"seed_{seed}", start=start, lr=rates.get(arm.name), variant=variant
        )
        for name, variant in study.sweep.items()
    ]
