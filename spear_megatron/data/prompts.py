"""Where tasks come from: JSONL files of id, problem, answer, or the built-in generator."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spear_megatron.data.generator import GeneratorConfig, Problem, Split, generate_problems
from spear_megatron.data.jsonl import read_jsonl
from spear_megatron.data.order import EpochOrder
from spear_megatron.types import Prompt

GENERATED = "generator"


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Keys under ``data``.

    ``train_files`` and ``val_files`` are JSONL files, one path or several; null takes the built-in generator's split.
    ``train_batch_size`` counts prompts per training step, lengths count tokens. ``instruction`` is appended to every
    problem. ``seed`` keys the order of the prompts.
    """

    train_files: tuple[str, ...] | str | None = None
    """JSONL files of training tasks (id, problem, answer), one path or several; null takes the built-in generator."""
    val_files: tuple[str, ...] | str | None = None
    """JSONL files of held-out tasks; null takes the built-in generator's held-out split."""
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    train_batch_size: int = 64
    """Prompts per training step, over all ranks."""
    max_prompt_length: int = 1024
    """Tokens of the opening conversation; longer prompts are refused."""
    max_response_length: int = 2048
    """Tokens after the prompt: sampled ones and tool responses together."""
    shuffle: bool = True
    """Visit the training prompts in a new random order every epoch."""
    seed: int = 0
    """Keys the order of the prompts."""
    instruction: str = ""
    """Text appended to every problem."""

    def __post_init__(self) -> None:
        for key in ("train_files", "val_files"):
            value = getattr(self, key)
            if value is not None:
                files = (value,) if isinstance(value, str) else tuple(value)
                if not files or "" in files:
                    raise ValueError(f"data.{key} names no file: name files, or use null for generated problems")
                object.__setattr__(self, key, files)
        for key in ("train_batch_size", "max_prompt_length", "max_response_length"):
            if getattr(self, key) < 1:
                raise ValueError(f"data.{key} must be at least 1, got {getattr(self, key)}")

    def files(self, split: Split) -> tuple[str, ...] | None:
        """The files of a split, or None for the built-in generator."""
        value = self.train_files if split == "train" else self.val_files
        return (value,) if isinstance(value, str) else value


class PromptSource:
    """An endless stream of prompts in an order that depends on the seed alone: the same on every rank."""

    def __init__(self, prompts: Sequence[Prompt], *, seed: int, shuffle: bool) -> None:
        self.prompts = tuple(prompts)
        self._order = EpochOrder(len(self.prompts), seed=seed, purpose="prompts", shuffle=shuffle)
        self._returned: list[int] = []

    @property
    def position(self) -> int:
        """Prompts taken so far: the stream index of the next one."""
        return self._order.position

    def take(self, count: int) -> list[Prompt]:
        """The next ``count`` prompts."""
        return [self.prompts[index] for index in self._order.take(count)]

    def draw(self, count: int) -> list[tuple[int, Prompt]]:
        """The next ``count`` (stream index, prompt) pairs: those that were given back, by index, then new ones."""
        back, self._returned = self._returned[:count], self._returned[count:]
        first = self.position
        self._order.take(count - len(back))
        return [(index, self.at(index)) for index in [*back, *range(first, self.position)]]

    def at(self, index: int) -> Prompt:
        """The prompt of a stream index."""
        return self.prompts[self._order.at(index)]

    def give_back(self, indices: Iterable[int]) -> None:
        """Put drawn stream indices at the front of the queue.

        Raises:
            ValueError: one was never drawn, or waits there already.
        """
        back = sorted([*self._returned, *indices])
        if len(set(back)) != len(back) or (back and not 0 <= back[0] <= back[-1] < self.position):
            raise ValueError(f"prompts given back {back} must be different ones of the {self.position} drawn so far")
        self._returned = back

    def state_dict(self) -> dict[str, Any]:
        """Position in the stream, what was given back, and the identity of the data."""
        order = self._order.state_dict()
        return {"order": order, "fingerprint": self._fingerprint(), "returned": list(self._returned)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state`` was taken; ValueError if the prompts, the seed or the shuffling are others."""
        if state["fingerprint"] != self._fingerprint():
            raise ValueError(
                "cannot resume the prompt source: the prompts differ from those of the original run; "
                "resume with its data files and data.* keys, or begin a run in another trainer.default_local_dir"
            )
        self._order.load_state_dict(state["order"])
        self._returned = [int(index) for index in state.get("returned", ())]

    def _fingerprint(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for prompt in self.prompts:
            digest.update(repr((prompt.task_id, prompt.messages, prompt.answer)).encode())
        return digest.hexdigest()


def prompts_fingerprint(prompts: Iterable[Prompt]) -> str:
    """SHA-256 over every task as the model sees it, its answer and its data source, in order."""
    digest = hashlib.sha256()
    for prompt in prompts:
        row = [prompt.task_id, prompt.data_source, prompt.answer, [dict(message) for message in prompt.messages]]
        digest.update(json.dumps(row, sort_keys=True).encode() + b"\n")
    return f"sha256:{digest.hexdigest()}"


def load_prompts(config: DataConfig, split: Split) -> list[Prompt]:
    """All prompts of a split: from its files in order, or generated.

    Raises:
        ValueError: a row is not usable (named by file and line), an id occurs twice, or there are no rows.
    """
    files = config.files(split)
    if files is None:
        problems = generate_problems(config.generator, split)
        return [_generated_prompt(problem, config.instruction) for problem in problems]
    prompts: list[Prompt] = []
    seen: dict[str, str] = {}
    for path in files:
        for where, row in read_jsonl(path):
            prompt = _prompt_of_row(row, where, Path(path).stem, config.instruction)
            if prompt.task_id in seen:
                raise ValueError(f"{where}: the id {prompt.task_id!r} was already used at {seen[prompt.task_id]}")
            seen[prompt.task_id] = where
            prompts.append(prompt)
    if not prompts:
        raise ValueError(f"data.{split}_files has no rows: {', '.join(files)}")
    return prompts


def _prompt_of_row(row: dict[str, Any], where: str, data_source: str, instruction: str) -> Prompt:
    row = dict(row)
    if not row.keys() & {"id", "problem"}:
        raise ValueError(f"{where}: a task has the keys id, problem and answer, this row has {_shown(sorted(row))}")
    task_id, problem, answer = (row.pop(key, None) for key in ("id", "problem", "answer"))
    if isinstance(task_id, bool) or not isinstance(task_id, (str, int)) or task_id == "":
        raise ValueError(f"{where}: 'id' must be a non-empty string, got {_shown(task_id)}")
    if not isinstance(problem, str) or not problem.strip():
        raise ValueError(f"{where}: 'problem' must be a non-empty string, got {_shown(problem)}")
    if isinstance(answer, bool) or not isinstance(answer, (str, int, float)) or not str(answer).strip():
        raise ValueError(f"{where}: 'answer' must be a non-empty string or a number, got {_shown(answer)}")
    return Prompt(
        task_id=str(task_id),
        messages=({"role": "user", "content": problem + instruction},),
        answer=str(answer),
        data_source=data_source,
        extra=row,
    )


def _generated_prompt(problem: Problem, instruction: str) -> Prompt:
    return Prompt(
        task_id=problem.id,
        messages=({"role": "user", "content": problem.text + instruction},),
        answer=str(problem.answer),
        data_source=GENERATED,
        extra={"level": problem.level, "family": problem.family},
    )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
