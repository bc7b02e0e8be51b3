"""``sft``: supervised cold start on conversations, exported in Hugging Face format."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from spear_megatron.cli.common import add_config_arguments, load_config

if TYPE_CHECKING:
    from spear_megatron.config.schema import Config
    from spear_megatron.data.chat import ChatRenderer
    from spear_megatron.data.sft import SftExample


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``sft`` to ``parser``."""
    add_config_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Train on ``sft.train_files`` or on demonstrations of the built-in tasks, then export."""
    config = as_supervised(load_config(args))
    from spear_megatron.cli.preflight import check_before_start, check_machine, machine_notes, print_plan

    check_before_start(config)
    if args.dry_run:
        print_plan(config)
        for line in machine_notes(config):
            print(f"# {line}")
        return 0
    check_machine(config)
    fine_tune(config)
    return 0


def fine_tune(config: Config) -> None:
    """Train ``sft.total_training_steps`` steps and export the model to the ``hf`` folder of the run directory.

    Raises:
        ValueError: the conversations or the model folder cannot be used.
        RunError: the run cannot start, or a step was not finite.
    """
    from spear_megatron.cli.agents import load_renderer
    from spear_megatron.cli.build import build_actor
    from spear_megatron.cli.session import open_parallel, open_record
    from spear_megatron.data.sft import SftSource
    from spear_megatron.model.hf_export import export_hf
    from spear_megatron.model.shape import ModelShape
    from spear_megatron.trainer.sft import SupervisedRun, train_supervised

    folder, steps = config.actor_rollout_ref.model.path, config.sft.total_training_steps
    optim = config.actor_rollout_ref.actor.optim
    shape = ModelShape.from_folder(folder)
    examples = load_examples(config, load_renderer(folder))
    with open_parallel(config) as parallel:
        actor, _ = build_actor(config, parallel, shape, optim, steps)
        with open_record(config, parallel, resume_step=None, console_every=max(1, steps // 20)) as recorder:
            train_supervised(
                SupervisedRun(
                    actor=actor,
                    source=SftSource(examples, seed=config.data.seed),
                    parallel=parallel,
                    recorder=recorder,
                    batch_size=config.sft.train_batch_size,
                    total_steps=steps,
                )
            )
        export_hf(actor.chunks, shape, parallel, Path(config.sft.default_local_dir) / "hf", folder)


def as_supervised(config: Config) -> Config:
    """The configuration with the ``sft.*`` values in the places that supervised training reads."""
    actor = config.actor_rollout_ref.actor
    optim = dataclasses.replace(
        actor.optim,
        lr=config.sft.lr,
        min_lr=0.1 * config.sft.lr,
        lr_warmup_steps=config.sft.lr_warmup_steps,
        lr_decay_style="cosine",
    )
    actor = dataclasses.replace(actor, optim=optim, use_kl_loss=False)
    trainer = dataclasses.replace(
        config.trainer,
        default_local_dir=config.sft.default_local_dir,
        total_training_steps=config.sft.total_training_steps,
    )
    return dataclasses.replace(
        config,
        actor_rollout_ref=dataclasses.replace(config.actor_rollout_ref, actor=actor),
        algorithm=dataclasses.replace(config.algorithm, use_kl_in_reward=False),
        trainer=trainer,
    )


def load_examples(config: Config, renderer: ChatRenderer) -> list[SftExample]:
    """Tokenised conversations of ``sft.train_files``, or built-in demonstrations."""
    from spear_megatron.data.sft import cold_start_conversations, encode_conversations, load_conversations

    sft = config.sft
    if sft.train_files is not None:
        conversations = load_conversations([sft.train_files])
    else:
        conversations = cold_start_conversations(
            config.data.generator,
            count=sft.num_examples,
            error_rate=sft.error_rate,
            seed=config.data.seed,
            instruction=config.data.instruction,
            tool_rate=sft.tool_rate,
        )
    max_length = config.data.max_prompt_length + config.data.max_response_length
    return encode_conversations(conversations, renderer, max_length=max_length)
