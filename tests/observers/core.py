"""What an observer is, and how one field's two values are observed in the ranks of a job."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from spear_megatron.config.describe import flatten
from spear_megatron.config.loader import load
from spear_megatron.config.schema import Config

BASE = (
    "actor_rollout_ref.model.path={files}/model", "actor_rollout_ref.model.dtype=fp32", "trainer.num_threads=1",
    "trainer.default_local_dir={scratch}/run", "trainer.logger=[]", "trainer.save_hf=false", "trainer.save_freq=-1",
    "trainer.test_freq=-1", "trainer.val_before_train=false", "trainer.total_training_steps=2",
    "sft.default_local_dir={scratch}/sft", "sft.total_training_steps=3", "sft.num_examples=8", "sft.train_batch_size=2",
    "data.generator.levels=[1]", "data.generator.num_train=8", "data.generator.num_val=4", "data.train_batch_size=2",
    "data.max_prompt_length=64", "data.max_response_length=64", "actor_rollout_ref.actor.ppo_mini_batch_size=2",
    "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=256", "actor_rollout_ref.actor.optim.lr=1e-2",
    "actor_rollout_ref.rollout.n=2", "env.sandbox.preload=[]",
)  # fmt: skip
"""Overrides of every observation; ``{files}`` holds the inputs, ``{scratch}`` is empty before each."""


class Observation(NamedTuple):
    """What was seen; ``refused`` if it is the message of a refusal."""

    refused: bool
    seen: Any


@dataclass(frozen=True)
class Observer:
    """``observe`` on two ``values`` of a field, given further overrides. The values are texts as on a command line.

    ``observe(config, scratch)`` returns plain data (numbers, texts, tuples, lists, dicts) that depends on nothing but
    the configuration. It runs on ``ranks`` ranks.
    """

    observe: Callable[[Config, Path], Any]
    values: tuple[str, str]
    given: tuple[str, ...] = ()
    ranks: int = 1


Observers = dict[str, Observer]


def refused(*values: str, given: tuple[str, ...] = ()) -> Observer:
    """Observer of a field with one value that can be had for now: the other one is refused by name."""
    one, other = values
    return Observer(lambda config, scratch: "accepted", (one, other), given)


def table() -> Observers:
    """All observers by key. Raises AssertionError for a key with two."""
    from observers import (
        actor, environment, layout, losses, rollout, run, servers, sglang, spear, supervised, tasks, weights,
    )  # fmt: skip

    modules = (tasks, actor, losses, layout, rollout, environment, run, servers, sglang, weights, spear, supervised)
    merged: Observers = {}
    for module in modules:
        assert not merged.keys() & module.OBSERVERS.keys()
        merged |= module.OBSERVERS
    return merged


def observe_field(key: str, files: str, scratch: str) -> list[Observation]:
    """On one rank: the first value, the second, and the first again.

    Raises:
        AssertionError: the two configurations differ in another field than ``key``, or not at all.
    """
    observer = table()[key]
    scratch = f"{scratch}/{os.environ['RANK']}"
    texts = [text.format(files=files, scratch=scratch) for text in (*BASE, *observer.given)]
    texts = [text for text in texts if not text.startswith(f"{key}=")]
    one, other = (text.format(files=files, scratch=scratch) for text in observer.values)
    overrides = [[*texts, f"{key}={value}"] for value in (one, other, one)]
    _check_difference(key, overrides[0], overrides[1])
    return [_observe(observer, part, Path(scratch)) for part in overrides]


def _check_difference(key: str, one: list[str], other: list[str]) -> None:
    try:
        flat, changed = flatten(load(Config, None, one)), flatten(load(Config, None, other))
    except ValueError:
        return  # the refusal will be observed
    assert [name for name in flat if flat[name] != changed[name]] == [key]


def _observe(observer: Observer, overrides: list[str], scratch: Path) -> Observation:
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        return Observation(False, observer.observe(load(Config, None, overrides), scratch))
    except ValueError as error:
        return Observation(True, str(error))
