"""Observers of ``data.*``: which tasks there are, in which order they come, how long they may be."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from observers.core import Observer, Observers
from observers.scripted_run import episode, run_scripted

from spear_megatron.config.schema import Config


def _prompts(split: Literal["train", "val"]) -> Any:
    def observe(config: Config, scratch: Path) -> Any:
        from spear_megatron.data.prompts import load_prompts

        prompts = load_prompts(config.data, split)
        return [(prompt.task_id, prompt.messages[0]["content"], prompt.answer) for prompt in prompts]

    return observe


def prompts_by_step(config: Config, scratch: Path) -> Any:
    """Texts of the prompts of every step of a run."""
    run = run_scripted(config)
    return [[prompt.messages[0]["content"] for _, prompt in tasks.prompts] for tasks in run.tasks]


def long_prompt(config: Config, scratch: Path) -> Any:
    """An episode whose opening conversation has about 30 tokens."""
    return episode(config, ["\\boxed{1}"])


def long_answer(config: Config, scratch: Path) -> Any:
    """An episode whose policy goes on for 60 tokens."""
    return episode(config, ["1" * 60])


OBSERVERS: Observers = {
    "data.train_files": Observer(_prompts("train"), ("null", "[{files}/tasks.jsonl]")),
    "data.val_files": Observer(_prompts("val"), ("null", "{files}/tasks.jsonl")),
    "data.generator.levels": Observer(_prompts("train"), ("[1]", "[1, 2]")),
    "data.generator.num_train": Observer(_prompts("train"), ("8", "9")),
    "data.generator.num_val": Observer(_prompts("val"), ("4", "5")),
    "data.generator.seed": Observer(_prompts("val"), ("0", "1")),
    "data.instruction": Observer(_prompts("train"), ("''", "' Use the tool.'")),
    "data.train_batch_size": Observer(prompts_by_step, ("2", "4")),
    "data.shuffle": Observer(prompts_by_step, ("true", "false")),
    "data.seed": Observer(prompts_by_step, ("0", "1")),
    "data.max_prompt_length": Observer(long_prompt, ("64", "16")),
    "data.max_response_length": Observer(long_answer, ("64", "32")),
}
