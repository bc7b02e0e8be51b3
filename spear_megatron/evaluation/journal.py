"""Samples on disk as they finish, so that a killed evaluation goes on where it was.

Layout of an evaluation's folder: ``evaluation.json`` says what is evaluated and how, ``samples/samples.<shard>.jsonl``
holds one finished sample a line, written by one data-parallel leader. Of two lines for one sample a valid one counts
more than a failed one, and a later one more than an earlier one.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from spear_megatron.evaluation.samples import Sample, key_of, sample_from_json
from spear_megatron.observability.files import sync_path, write_atomically
from spear_megatron.types import Prompt, Trajectory, TrajectoryId

SCHEMA_VERSION = 1
IDENTITY = "evaluation.json"
COUNT = "--n"
_MAX_NAMED = 5


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Hold the folder for this process, until the body or the process ends.

    Raises:
        ValueError: another process evaluates into it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"--out {folder} is in use by another evaluation: wait for it, or give another") from None
        yield


def claim_identity(folder: Path, identity: Mapping[str, Any]) -> None:
    """Say what is evaluated in ``folder``, or check that it is what was evaluated there before.

    Every setting must be equal, but for the samples per problem (:data:`COUNT`), which may grow.

    Raises:
        ValueError: the folder belongs to another evaluation; names the settings that differ.
    """
    path = folder / IDENTITY
    wanted = json.loads(json.dumps(identity))
    if path.exists():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            known = {key: value for key, value in found.items() if key != "schema_version"}
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{path} is damaged ({error}): give another --out") from error
        names = [key for key in dict.fromkeys([*wanted, *known]) if wanted.get(key) != known.get(key)]
        if COUNT in names and wanted[COUNT] > known.get(COUNT, 0):
            names.remove(COUNT)
        if names:
            texts = [f"{key} is {wanted.get(key)!r} and was {known.get(key)!r}" for key in names[:_MAX_NAMED]]
            more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
            raise ValueError(
                f"--out {folder} holds another evaluation: {'; '.join(texts)}{more}. Give another --out, or remove it"
            )
    write_atomically(path, (json.dumps({"schema_version": SCHEMA_VERSION, **wanted}, indent=2) + "\n").encode())


def read_samples(folder: Path) -> dict[tuple[int, int], Sample]:
    """Every sample in ``folder``, by key. What a killed process left of its last line is cut off the file.

    Raises:
        ValueError: another line is damaged; names file and line.
    """
    samples: dict[tuple[int, int], Sample] = {}
    for path in sorted((folder / "samples").glob("samples.*.jsonl")):
        for sample in _read_shard(path):
            before = samples.get(sample.key)
            if before is None or sample.valid or not before.valid:
                samples[sample.key] = sample
    return samples


def _read_shard(path: Path) -> Iterator[Sample]:
    end = 0
    with path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            if not line.endswith(b"\n"):
                break
            try:
                yield sample_from_json(json.loads(line))
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(f"{path}:{number} is damaged ({type(error).__name__}: {error}): remove it") from error
            end += len(line)
    if end < path.stat().st_size:
        os.truncate(path, end)
        sync_path(path)


class Journal:
    """Writes the samples of one leader; implements ``rollout.scheduler.Keeper``.

    Args:
        folder: that of the evaluation.
        shard: the data-parallel rank, which names the file.
        make: turns a finished episode into a sample.
        done: samples that need not be taken again.
        on_sample: told of every new sample.
    """

    def __init__(
        self,
        folder: Path,
        shard: int,
        make: Callable[[Prompt, Trajectory], Sample],
        done: Collection[tuple[int, int]],
        on_sample: Callable[[Sample], None] = lambda sample: None,
    ) -> None:
        self._make, self._done, self._on_sample = make, frozenset(done), on_sample
        path = folder / "samples" / f"samples.{shard}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        self._stream = path.open("ab")
        sync_path(path.parent)

    def has(self, trajectory_id: TrajectoryId) -> bool:
        """Whether the sample was taken before."""
        return key_of(trajectory_id) in self._done

    def keep(self, prompt: Prompt, trajectory: Trajectory) -> None:
        """Append a sample, and wait until it is on disk."""
        sample = self._make(prompt, trajectory)
        self._stream.write(json.dumps(sample.to_json()).encode() + b"\n")
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._on_sample(sample)

    def close(self) -> None:
        """Close the file."""
        self._stream.close()
