"""Prompts that are too long are refused before a run starts, and only those."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from scripted import tiny_renderer

from spear_megatron.cli.agents import load_episode_prompts
from spear_megatron.config.loader import load
from spear_megatron.config.schema import Config
from spear_megatron.environments.code_interpreter import CodeInterpreterEnvironment
from spear_megatron.rollout.prompt_lengths import check_prompt_lengths
from spear_megatron.types import Prompt

TEXTS = (
    "1",
    "2 + 2 = ?",
    "a longer question " * 6,
    "<|im_end|>" * 9,
    "é" * 40,
    "e\u0301" * 40,
    "\U0001d15e" * 12,
    "<" * 90,
)


@pytest.mark.parametrize("text", TEXTS)
def test_the_limit_is_exact(text: str) -> None:
    opening = CodeInterpreterEnvironment.opening
    prompt = Prompt("task 7", ({"role": "user", "content": text},))
    observation = opening(prompt)
    length = len(tiny_renderer().prompt_ids(observation.messages, observation.tools))
    check_prompt_lengths([prompt], opening, tiny_renderer(), max_prompt_length=length)
    with pytest.raises(ValueError, match=f"1 of 1 prompts .*={length - 1}, the first is 'task 7' with {length}"):
        check_prompt_lengths([prompt], opening, tiny_renderer(), max_prompt_length=length - 1)


def test_a_run_loads_no_prompt_that_its_episodes_would_refuse(tmp_path: Path) -> None:
    rows = [{"id": "short", "problem": "1 + 1", "answer": 2}, {"id": "long", "problem": "1 +" * 99, "answer": 2}]
    (tmp_path / "tasks.jsonl").write_text("\n".join(map(json.dumps, rows)))
    keys = [f"data.train_files={tmp_path / 'tasks.jsonl'}", "data.max_prompt_length=64"]
    with pytest.raises(ValueError, match="1 of 2 prompts .*data.max_prompt_length=64, the first is 'long'"):
        load_episode_prompts(load(Config, None, keys), "train", tiny_renderer())
    keys.append("env.name=builtins:dict")  # says nothing before an episode
    assert len(load_episode_prompts(load(Config, None, keys), "train", tiny_renderer())) == 2
