"""``evaluate``: success of a model folder on held-out tasks, with the training's own agent loop."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from spear_megatron.cli.common import add_config_arguments, load_config

if TYPE_CHECKING:
    from spear_megatron.config.schema import Config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``evaluate`` to ``parser``."""
    add_config_arguments(parser)
    parser.add_argument("--model", help="Hugging Face folder to evaluate (default: actor_rollout_ref.model.path)")
    parser.add_argument("--dataset", help="JSONL of id, problem, answer (default: data.val_files or built-in problems)")
    parser.add_argument("--n", type=int, help="samples per problem (default: actor_rollout_ref.rollout.val_kwargs.n)")
    parser.add_argument("--temperature", type=float, help="0 is greedy (default: val_kwargs.temperature)")
    parser.add_argument("--top-p", type=float, help="nucleus sampling (default: val_kwargs.top_p)")
    parser.add_argument("--out", default="outputs/evaluation", help="folder for report.json and the trajectories")


def run(args: argparse.Namespace) -> int:
    """Sample, score, print the table and write ``report.json``."""
    config = as_evaluation(load_config(args), args)
    from spear_megatron.cli.preflight import check_agents, check_before_start, print_plan

    check_out(Path(args.out))
    check_before_start(config)
    check_agents(config)
    if args.dry_run:
        print_plan(config)
        return 0
    evaluate_folder(config, Path(args.out))
    return 0


def as_evaluation(config: Config, args: argparse.Namespace) -> Config:
    """The configuration with the command's options in place; every rank holds a whole model."""
    from spear_megatron.parallel.config import MegatronConfig

    ref = config.actor_rollout_ref
    options = {"n": args.n, "temperature": args.temperature, "top_p": args.top_p}
    given = {key: value for key, value in options.items() if value is not None}
    rollout = dataclasses.replace(ref.rollout, val_kwargs=dataclasses.replace(ref.rollout.val_kwargs, **given))
    model = dataclasses.replace(ref.model, path=args.model or ref.model.path)
    actor = dataclasses.replace(ref.actor, megatron=MegatronConfig())
    data = config.data if args.dataset is None else dataclasses.replace(config.data, val_files=(args.dataset,))
    return dataclasses.replace(
        config, data=data, actor_rollout_ref=dataclasses.replace(ref, model=model, actor=actor, rollout=rollout)
    )


def check_out(out: Path) -> None:
    """ValueError if ``out`` is the directory of a training run, whose trajectories an evaluation would replace."""
    from spear_megatron.observability.record import RECORD_NAME

    if (out / RECORD_NAME).exists():
        raise ValueError(f"--out {out} is the directory of a run, whose trajectories would go: give another folder")


def evaluate_folder(config: Config, out: Path) -> None:
    """Evaluate ``actor_rollout_ref.model.path``; rank 0 prints and writes the report.

    Raises:
        ValueError: the dataset or the model folder cannot be used.
        RunError: no sample could be measured.
    """
    from spear_megatron.cli.agents import (
        canonical_answer_of,
        load_engine,
        load_episode_prompts,
        load_renderer,
        open_agents,
        samplings,
    )
    from spear_megatron.cli.session import open_parallel
    from spear_megatron.evaluation.run import evaluate
    from spear_megatron.model.shape import ModelShape
    from spear_megatron.observability.trajectories import TrajectoryStore
    from spear_megatron.parallel.agreement import agreed
    from spear_megatron.rollout.collect import Tasks

    model = config.actor_rollout_ref.model.path
    shape, renderer = ModelShape.from_folder(model), load_renderer(model)
    prompts = load_episode_prompts(config, "val", renderer)
    val = config.actor_rollout_ref.rollout.val_kwargs
    with open_parallel(config) as parallel, open_agents(config, parallel, renderer, shape) as agents:
        assert agents.engine is not None
        with agreed(parallel, "loading of the weights"):  # all wait: servers that they share must have them first
            load_engine(agents.engine, model, shape)
        _, sampling = samplings(config)
        result = evaluate(
            agents.collector,
            Tasks("evaluate", 0, tuple(enumerate(prompts)), val.n, sampling),
            parallel=parallel,
            answer_of=canonical_answer_of,
            name=model,
            ks=sorted({1, val.n}),
            seed=config.trainer.seed,
        )
        kept, shards = config.trainer.num_logged_trajectories, parallel.dp_size
        store = TrajectoryStore(out, kept, renderer.decode, shard=parallel.dp_rank, num_shards=shards)
        store.write(0, result.groups, {}, kind="val")
        if parallel.rank == 0:
            result.report.write_json(out / "report.json")
            print(result.report.to_table(), flush=True)
