"""Observers of ``algorithm.*`` and ``trainer.*``: real runs with scripted rollouts, their record and their files."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

from observers.core import Observer, Observers, refused
from observers.scripted_run import NO_SANDBOX, ScriptedRun, figure, run_scripted, scripted

from spear_megatron.config.schema import Config


def recorded_steps(config: Config, scratch: Path) -> Any:
    """Steps of the record, and those that hold an evaluation."""
    record = run_scripted(config).record
    return [line["step"] for line in record], [line["step"] for line in record if "val/success_rate" in line]


def files(config: Config, scratch: Path) -> Any:
    """What a run leaves on disk: folders and kinds of files, without the numbers in TensorBoard's names."""
    run_scripted(config)
    found = {path.relative_to(scratch) for path in scratch.rglob("*") if "checkpoints" not in path.parts}
    return sorted(str(path).partition("tfevents")[0] for path in found)


def checkpoints(config: Config, scratch: Path) -> Any:
    """Names of the checkpoints that a run leaves."""
    run_scripted(config)
    return sorted(path.name for path in (scratch / "run" / "checkpoints").iterdir())


def complete_after_save(config: Config, scratch: Path) -> Any:
    """Checkpoints that are complete when ``save`` returns, and when the run has waited for it."""
    with scripted(config, ScriptedRun()) as run:
        run.begin()
        run._save(1)
        at_once = run.parts.checkpoints.steps()
        run.parts.checkpoints.wait()
        return at_once, run.parts.checkpoints.steps()


def second_start(config: Config, scratch: Path) -> Any:
    """Where a run starts whose directory holds a finished one."""
    trainer = dataclasses.replace(config.trainer, resume_mode="auto")
    run_scripted(dataclasses.replace(config, trainer=trainer))
    with scripted(config, ScriptedRun()) as run:
        return run.progress.step


def kept_trajectories(config: Config, scratch: Path) -> Any:
    """Number of trajectories kept of each step."""
    from spear_megatron.observability.trajectories import read_trajectories, recorded_steps

    run_scripted(config)
    run_dir = config.trainer.default_local_dir
    return [len(read_trajectories(run_dir, step)) for step in recorded_steps(run_dir)]


def endurance(config: Config, scratch: Path) -> Any:
    """How many updates are tried when none of them is finite."""
    from spear_megatron.parallel.errors import RunError
    from spear_megatron.trainer.actor import UpdateResult
    from spear_megatron.trainer.loop import train

    tried = []
    with scripted(config, ScriptedRun()) as run, contextlib.suppress(RunError):
        run.parts.actor.update = lambda rows, **options: tried.append(len(rows)) or UpdateResult("nonfinite", {})
        train(run)
    return tried


def sampled_tokens(config: Config, scratch: Path) -> Any:
    """Tokens of one step of real rollouts, or what stopped them."""
    from spear_megatron.cli.agents import load_engine, load_renderer, open_agents, samplings
    from spear_megatron.cli.session import open_parallel
    from spear_megatron.data.prompts import load_prompts
    from spear_megatron.model.shape import ModelShape
    from spear_megatron.parallel.errors import RunError
    from spear_megatron.rollout.collect import Tasks

    folder = config.actor_rollout_ref.model.path
    shape, prompts = ModelShape.from_folder(folder), load_prompts(config.data, "train")
    with open_parallel(config) as parallel, open_agents(config, parallel, load_renderer(folder), shape) as agents:
        assert agents.engine is not None
        load_engine(agents.engine, folder, shape)
        try:
            collected = agents.collector.collect(Tasks("train", 1, ((0, prompts[0]),), 2, samplings(config)[0]))
        except RunError as error:
            return str(error)
        members = [member for group in collected.groups for member in group.trajectories]
        return [segment.ids.tolist() for member in members for segment in member.segments]


def collective_deadline(config: Config, scratch: Path) -> Any:
    """Seconds after which a collective of this run gives up."""
    import torch
    import torch.distributed as dist

    from spear_megatron.cli.session import open_parallel

    with open_parallel(config):
        assert dist.group.WORLD is not None
        return dist.group.WORLD._get_backend(torch.device("cpu")).options._timeout.total_seconds()


def threads(config: Config, scratch: Path) -> Any:
    """Threads of this process once the run has started."""
    import torch

    from spear_megatron.cli.session import open_parallel

    before = torch.get_num_threads()
    try:
        with open_parallel(config):
            return torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def hang_reports(config: Config, scratch: Path) -> Any:
    """Stacks that are written, and exit codes that are asked for, when a phase stands still for a second."""
    import functools
    import time
    from unittest import mock

    from spear_megatron.observability.heartbeat import Watchdog

    codes: list[int] = []
    watchdog = functools.partial(Watchdog, leave=codes.append)
    with mock.patch("spear_megatron.trainer.watch.Watchdog", watchdog), scripted(config, ScriptedRun()) as run:
        run.watch.start()
        with run.phase("gen"):
            time.sleep(1.0)
    return sorted(path.name for path in (scratch / "run" / "hang").glob("*")), codes


def verdicts(config: Config, scratch: Path) -> Any:
    """Which of a series of updates are made, and why the run would stop."""
    series = [(1.0, 1.0)] * 4 + [(1.0, 15.0), (40.0, 1.0), (1.0, 15.0), (1.0, 15.0)]
    with scripted(config, ScriptedRun()) as run:
        return [run._approve(1, loss, norm) for loss, norm in series], run.stop_reason


def traces(config: Config, scratch: Path) -> Any:
    """Names of the profiler's traces."""
    run_scripted(config)
    return sorted(path.name for path in (scratch / "run" / "profile").glob("*"))


_SPIKE = ("trainer.loss_spike.action=skip", "trainer.loss_spike.window=4")
_SHORT = ("trainer.collect_timeout_s=0.2", "trainer.collective_timeout_s=0.2", "trainer.hang_timeout_s=0.3")
_KL = ("algorithm.use_kl_in_reward=true", "algorithm.kl_ctrl.kl_coef=0.1")
_ADVANTAGES = ("critic/advantages/max", "critic/rewards/mean", "actor/reward_kl_penalty")
_HANGING = ("env.name=observers.scripted_run:Hanging",)
OBSERVERS: Observers = {
    "algorithm.adv_estimator": refused("grpo", "gae"),
    "algorithm.norm_adv_by_std_in_grpo": Observer(figure(*_ADVANTAGES), ("true", "false")),
    "algorithm.use_kl_in_reward": Observer(figure(*_ADVANTAGES), ("false", "true")),
    "algorithm.kl_penalty": Observer(figure(*_ADVANTAGES), ("kl", "abs"), _KL),
    "algorithm.kl_ctrl.kl_coef": Observer(figure(*_ADVANTAGES), ("0.1", "0.2"), _KL[:1]),
    "trainer.total_training_steps": Observer(recorded_steps, ("2", "3")),
    "trainer.seed": Observer(sampled_tokens, ("0", "1"), NO_SANDBOX),
    "trainer.default_local_dir": Observer(files, ("{scratch}/run", "{scratch}/elsewhere")),
    "trainer.save_freq": Observer(checkpoints, ("-1", "1")),
    "trainer.test_freq": Observer(recorded_steps, ("-1", "1")),
    "trainer.val_before_train": Observer(recorded_steps, ("false", "true")),
    "trainer.max_actor_ckpt_to_keep": Observer(checkpoints, ("3", "1"), ("trainer.save_freq=1",)),
    "trainer.async_save": Observer(complete_after_save, ("false", "true")),
    "trainer.resume_mode": Observer(second_start, ("auto", "disable")),
    "trainer.logger": Observer(files, ("[]", "[tensorboard]")),
    "trainer.save_hf": Observer(files, ("false", "true")),
    "trainer.num_logged_trajectories": Observer(kept_trajectories, ("8", "3")),
    "trainer.max_nonfinite_steps": Observer(endurance, ("3", "2"), ("trainer.total_training_steps=5",)),
    "trainer.collect_timeout_s": Observer(sampled_tokens, ("0.2", "0.3"), _HANGING),
    "trainer.collective_timeout_s": Observer(collective_deadline, ("600", "60")),
    "trainer.async": Observer(
        figure("training/policy_version"), ("0", "1"), ("algorithm.rollout_correction.mode=tis",)
    ),
    "trainer.num_threads": Observer(threads, ("1", "2")),
    "trainer.hang_timeout_s": Observer(hang_reports, ("0", "0.2")),
    "trainer.hang_action": Observer(hang_reports, ("dump", "stop"), _SHORT),
    "trainer.loss_spike.action": Observer(verdicts, ("skip", "stop"), _SPIKE[1:]),
    "trainer.loss_spike.metric": Observer(verdicts, ("grad_norm", "loss"), _SPIKE),
    "trainer.loss_spike.factor": Observer(verdicts, ("10", "20"), _SPIKE),
    "trainer.loss_spike.window": Observer(verdicts, ("4", "64"), _SPIKE[:1]),
    "trainer.loss_spike.patience": Observer(verdicts, ("1", "2"), _SPIKE),
    "trainer.profile.steps": Observer(traces, ("[]", "[1, 2]")),
    "trainer.profile.ranks": Observer(traces, ("[0]", "[1]"), ("trainer.profile.steps=[1, 2]",)),
}
