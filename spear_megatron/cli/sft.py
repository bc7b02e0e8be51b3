"""``sft``: supervised cold start on conversations, exported in Hugging Face format."""

from __future__ import annotations

import argparse
import dataclasses
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from spear_megatron.cli.common import add_config_arguments, load_config

if TYPE_CHECKING:
    from spear_megatron.config.schema import Config
    from spear_megatron.data.chat import ChatRenderer
    from spear_megatron.data.corpus import Corpus


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``sft`` to ``parser``."""
    add_config_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Train on ``sft.train_files`` or on demonstrations of the built-in tasks, then export."""
    config = as_supervised(load_config(args))
    from spear_megatron.cli.preflight import check_before_start, check_machine, check_places, machine_notes, print_plan
    from spear_megatron.data.dali import dali_modules

    folder, key = config.sft.default_local_dir, "sft.default_local_dir"
    check_sft_warmup(config)
    check_before_start(config)
    if config.sft.data_source == "dali":
        dali_modules()
    if args.dry_run:
        print_plan(config)
        for line in machine_notes(config, folder, key):
            print(f"# {line}")
        return 0
    check_machine(config)
    check_places(config, folder, key)
    if config.sft.save_freq < 0 and any(Path(folder, "checkpoints").glob("step_*")):
        raise ValueError(
            f"{key}={folder} holds the checkpoints of a run, whose record would go: name another folder, or "
            "continue it with sft.save_freq above 0"
        )
    fine_tune(config)
    return 0


def fine_tune(config: Config) -> None:
    """Train ``sft.total_training_steps`` steps and export the model to the ``hf`` folder of the run directory.

    Raises:
        ValueError: the conversations or the model folder cannot be used.
        RunError: the run cannot start, or a step was not finite.
    """
    from spear_megatron.cli.agents import load_renderer
    from spear_megatron.cli.build import build_actor, open_checkpoints
    from spear_megatron.cli.session import open_parallel, open_record
    from spear_megatron.data.dali import open_source
    from spear_megatron.data.data_source import Reading
    from spear_megatron.model.hf_export import export_hf
    from spear_megatron.model.shape import ModelShape
    from spear_megatron.trainer.sft import SupervisedRun, restore_supervised, train_supervised

    folder, steps = config.actor_rollout_ref.model.path, config.sft.total_training_steps
    optim = config.actor_rollout_ref.actor.optim
    shape = ModelShape.from_folder(folder)
    corpus = load_corpus(config, load_renderer(folder, shape.vocab_size))
    with open_parallel(config) as parallel:
        actor, _ = build_actor(config, parallel, shape, optim, steps)
        reading = Reading(
            batch_size=config.sft.train_batch_size,
            seed=config.data.seed,
            shard_id=parallel.dp_rank,
            num_shards=parallel.dp_size,
        )
        with closing(open_source(config.sft.data_source, corpus, reading)) as source:
            saves, done = config.sft.save_freq > 0, 0
            checkpoints = open_checkpoints(config, parallel) if saves else None
            if checkpoints is not None:
                done = restore_supervised(actor, source, checkpoints, steps)
            with open_record(config, parallel, done or None, console_every=max(1, steps // 20)) as recorder:
                train_supervised(
                    SupervisedRun(
                        actor=actor,
                        source=source,
                        recorder=recorder,
                        total_steps=steps,
                        done_steps=done,
                        checkpoints=checkpoints,
                        save_freq=config.sft.save_freq,
                    )
                )
        export_hf(actor.chunks, shape, parallel, Path(config.sft.default_local_dir) / "hf", folder)


def check_sft_warmup(config: Config) -> None:
    """The warm-up must end within the run. Raises ValueError, with the keys of this command."""
    warmup, steps = config.sft.lr_warmup_steps, config.sft.total_training_steps
    if warmup >= steps:
        raise ValueError(
            f"sft.lr_warmup_steps={warmup} leaves nothing of sft.total_training_steps={steps}: lower it, or raise these"
        )


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


def load_corpus(config: Config, renderer: ChatRenderer) -> Corpus:
    """``sft.train_files``: a corpus on disk or conversations to tokenise; or the built-in demonstrations.

    Raises:
        ValueError: they cannot be used, or the corpus was made with another tokenizer or holds longer samples.
    """
    from spear_megatron.data.corpus import MemoryCorpus
    from spear_megatron.data.sft import cold_start_conversations, encode_conversations, load_conversations

    sft = config.sft
    max_length = config.data.max_prompt_length + config.data.max_response_length
    if sft.train_files is not None and Path(sft.train_files).is_dir():
        return open_fitting(Path(sft.train_files), renderer, max_length)
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
    examples = encode_conversations(conversations, renderer, max_length=max_length)
    return MemoryCorpus(examples, sft.train_files or "the built-in demonstrations")


def open_fitting(folder: Path, renderer: ChatRenderer, max_length: int) -> Corpus:
    """A corpus whose tokens mean to this tokenizer what they meant when it was written.

    Raises:
        ValueError: they do not, or a sample is longer than ``max_length`` tokens.
    """
    from spear_megatron.data.chat import vocabulary_sha256
    from spear_megatron.data.corpus_files import open_corpus

    corpus = open_corpus(folder)
    if corpus.info.vocabulary_sha256 != vocabulary_sha256(renderer.tokenizer):
        raise ValueError(
            f"{folder} was made with another tokenizer than that of actor_rollout_ref.model.path: write it anew with "
            "--model of this model"
        )
    if corpus.info.longest > max_length:
        raise ValueError(
            f"{folder} holds samples of up to {corpus.info.longest} tokens, more than {max_length}: raise "
            "data.max_response_length, or write it anew with --max-length"
        )
    return corpus
