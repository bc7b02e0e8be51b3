"""What a dry run reads of the data: every task and conversation that a run would refuse at its start."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from spear_megatron.data.generator import Split

if TYPE_CHECKING:
    from spear_megatron.config.schema import Config
    from spear_megatron.data.chat import ChatRenderer

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


def task_lines(config: Config, *, trains: bool = True) -> list[str]:
    """Number of training and held-out tasks, each checked as at the start of a run; without ``trains`` of the latter.

    Files that are not here, and lengths where the model folder has no tokenizer, are told and not refused: a dry run
    may be made on another machine than the run.

    Raises:
        ValueError: a row cannot be used, or a prompt is too long.
    """
    from spear_megatron.cli.agents import load_episode_prompts
    from spear_megatron.data.prompts import load_prompts

    renderer, notes = _renderer(config)
    wanted: dict[Split, bool] = {"train": trains, "val": not trains or validates(config)}
    counts: dict[Split, int] = {}
    for split in (split for split, asked in wanted.items() if asked):
        missing = [path for path in config.data.files(split) or () if not Path(path).exists()]
        if missing:
            notes.append(f"not here and not checked: data.{split}_files {', '.join(missing)}")
        elif renderer is None:
            counts[split] = len(load_prompts(config.data, split))
        else:
            counts[split] = len(load_episode_prompts(config, split, renderer))
    return [*_count_lines(config, counts), *notes]


def conversation_lines(config: Config) -> list[str]:
    """Number of conversations of ``sft.train_files``, each tokenised as at the start of the command.

    Raises:
        ValueError: they cannot be used.
    """
    from spear_megatron.cli.sft import load_corpus

    renderer, notes = _renderer(config)
    path = config.sft.train_files
    if path is not None and not Path(path).exists():
        return [f"not here and not checked: sft.train_files {path}", *notes]
    if renderer is None:
        return notes
    number, size = len(load_corpus(config, renderer).table), config.sft.train_batch_size
    passes = config.sft.total_training_steps * size / number
    return [f"data: {number} conversations; {config.sft.total_training_steps} steps pass over them {passes:.1f} times"]


def validates(config: Config) -> bool:
    """Whether a run evaluates on held-out tasks."""
    return config.trainer.test_freq > 0 or config.trainer.val_before_train


def _renderer(config: Config) -> tuple[ChatRenderer | None, list[str]]:
    """The model's chat rendering; None and a note for a folder without a tokenizer."""
    from spear_megatron.cli.agents import load_renderer

    folder = Path(config.actor_rollout_ref.model.path)
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        return None, [f"no tokenizer in {folder}: lengths were not checked"]
    return load_renderer(folder), []


def _count_lines(config: Config, counts: dict[Split, int]) -> list[str]:
    lines = []
    if counts:
        told = [f"{counts[split]} {name} tasks" for split, name in _NAMES.items() if split in counts]
        lines.append(f"data: {', '.join(told)}")
    tasks, size, steps = counts.get("train"), config.data.train_batch_size, config.trainer.total_training_steps
    if tasks is not None:
        lines[-1] += f"; {steps} steps pass over the training tasks {steps * size / tasks:.1f} times"
        if tasks < size:
            lines.append(f"a step of data.train_batch_size={size} has some of the {tasks} training tasks several times")
    return lines


_NAMES: dict[Split, str] = {"train": "training", "val": "held-out"}
