"""Observers of ``sft.*``: the examples, and real cold starts of three steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from observers.core import Observer, Observers

from spear_megatron.config.schema import Config


def examples(config: Config, scratch: Path) -> Any:
    """Token ids of every conversation to learn."""
    from spear_megatron.cli.agents import load_renderer
    from spear_megatron.cli.sft import load_corpus
    from spear_megatron.data.corpus import examples_of

    corpus = load_corpus(config, load_renderer(config.actor_rollout_ref.model.path))
    return [example.ids.tolist() for example in examples_of(corpus)]


def reader(config: Config, scratch: Path) -> Any:
    """What reads the conversations, and the first batch."""
    from spear_megatron.cli.agents import load_renderer
    from spear_megatron.cli.sft import load_corpus
    from spear_megatron.data.dali import open_source
    from spear_megatron.data.data_source import Reading

    corpus = load_corpus(config, load_renderer(config.actor_rollout_ref.model.path))
    source = open_source(config.sft.data_source, corpus, Reading(batch_size=2, seed=0))
    return type(source).__name__, source.next_batch().ids.tolist()


def checkpoints(config: Config, scratch: Path) -> Any:
    """Names of the checkpoints that a cold start leaves."""
    from spear_megatron.cli.sft import as_supervised, fine_tune

    fine_tune(as_supervised(config))
    return sorted(path.name for path in scratch.rglob("checkpoints/*"))


def cold_start(config: Config, scratch: Path) -> Any:
    """Figures of every step, and the folders that are left."""
    from spear_megatron.cli.sft import as_supervised, fine_tune
    from spear_megatron.observability.record import read_record

    fine_tune(as_supervised(config))
    record = read_record(config.sft.default_local_dir)
    figures = [(line["step"], line["sft/loss"], line["sft/lr"], line["sft/tokens"]) for line in record]
    return figures, sorted(str(path.relative_to(scratch)) for path in scratch.rglob("hf"))


OBSERVERS: Observers = {
    "sft.train_files": Observer(examples, ("null", "{files}/talks.jsonl")),
    "sft.data_source": Observer(reader, ("mmap", "dali")),
    "sft.save_freq": Observer(checkpoints, ("2", "-1")),
    "sft.num_examples": Observer(examples, ("8", "5")),
    "sft.error_rate": Observer(examples, ("0.0", "1.0")),
    "sft.tool_rate": Observer(examples, ("1.0", "0.5")),
    "sft.total_training_steps": Observer(cold_start, ("3", "4"), ("sft.lr_warmup_steps=1",)),
    "sft.train_batch_size": Observer(cold_start, ("2", "3"), ("sft.lr_warmup_steps=1",)),
    "sft.lr": Observer(cold_start, ("3e-3", "1e-3"), ("sft.lr_warmup_steps=1",)),
    "sft.lr_warmup_steps": Observer(cold_start, ("0", "2")),
    "sft.default_local_dir": Observer(cold_start, ("{scratch}/sft", "{scratch}/elsewhere"), ("sft.lr_warmup_steps=1",)),
}
