"""Runs the runs of a study side by side: resumable, each under a deadline and up to its token budget."""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from study_plan import RunSpec

from spear_megatron.evaluation.study import SUCCESS, TOKENS, Record, token_curve
from spear_megatron.observability.record import RECORD_NAME, read_record

ROOT = Path(__file__).resolve().parent.parent
SPEC_NAME, DONE_NAME, LOG_NAME = "study_run.json", "study_done.json", "study_run.log"
_POLL_S = 1.0
_GRACE_S = 120.0  # of a run that was asked to stop: it finishes its step and saves
_PR_SET_PDEATHSIG = 1


@dataclass
class _Running:
    spec: RunSpec
    process: subprocess.Popen[bytes]
    began: float
    asked_to_stop: float | None = None
    overran: bool = False


def record_of(folder: Path) -> Record:
    """The record of a run so far; empty before its first line."""
    return read_record(folder) if (folder / RECORD_NAME).is_file() else []


def reached_budget(spec: RunSpec, record: Record) -> bool:
    """Whether an evaluation at or beyond the token budget is on record."""
    return token_curve(record, SUCCESS).reach >= spec.task.token_budget


def is_done(spec: RunSpec) -> bool:
    """Whether the run has finished.

    Raises:
        ValueError: the folder holds another run; it says what to do.
    """
    path = spec.folder / SPEC_NAME
    if path.is_file() and json.loads(path.read_text())["fingerprint"] != spec.fingerprint:
        raise ValueError(
            f"{spec.folder} holds a run of other settings: remove that folder, or choose another --out"
        )
    return (spec.folder / DONE_NAME).is_file()


def finish(spec: RunSpec) -> dict[str, float]:
    """Mark the run as done and return its figures: steps, sampled tokens, seconds of its steps, budget reached."""
    record = record_of(spec.folder)
    figures = {
        "steps": float(record[-1]["step"]) if record else 0.0,
        "tokens": math.fsum(float(line.get(TOKENS) or 0) for line in record),
        "seconds": math.fsum(float(line.get("timing_s/step") or 0) for line in record),
        "reached_budget": float(reached_budget(spec, record)),
    }
    (spec.folder / DONE_NAME).write_text(json.dumps(figures, indent=2) + "\n")
    return figures


def child_environment() -> dict[str, str]:
    """One thread per run, this repository's package, no notices of libraries."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONPATH": path}


def _end_with_parent() -> None:
    """In the child: a study that is killed takes its runs along (Linux), so that nobody else writes their folders."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def run_all(specs: Sequence[RunSpec], jobs: int, say: Callable[[str], None] = print) -> list[str]:
    """Run what is not done yet, ``jobs`` at a time, and return a line per failure. A second call continues.

    Raises:
        ValueError: a folder holds another run.
        KeyboardInterrupt: after the runs under way have been asked to save and stop.
    """
    waiting = [spec for spec in specs if not is_done(spec)]
    total, num_old = len(specs), len(specs) - len(waiting)
    if num_old:
        say(f"{num_old} of {total} runs are done already")
    failures: list[str] = []
    seconds: list[float] = []
    running: list[_Running] = []
    with _stopping_children(running):
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(_start(waiting.pop(0)))
            time.sleep(_POLL_S)
            for item in list(running):
                _watch(item)
                if item.process.poll() is None:
                    continue
                running.remove(item)
                seconds.append(time.monotonic() - item.began)
                text, failed = _close(item)
                failures += [text] if failed else []
                left = (len(waiting) + len(running)) * sum(seconds) / len(seconds) / jobs
                num_done = total - len(waiting) - len(running)
                say(f"[{num_done}/{total}] {text}; about {math.ceil(left / 60)} min left")
    return failures


def _start(spec: RunSpec) -> _Running:
    spec.folder.mkdir(parents=True, exist_ok=True)
    described = {"fingerprint": spec.fingerprint, "command": spec.command[1:]}
    (spec.folder / SPEC_NAME).write_text(json.dumps(described, indent=2) + "\n")
    with (spec.folder / LOG_NAME).open("ab") as log:
        process = subprocess.Popen(
            spec.command, cwd=ROOT, env=child_environment(), stdout=log, stderr=subprocess.STDOUT,
            preexec_fn=_end_with_parent,
        )  # fmt: skip
    return _Running(spec, process, time.monotonic())


def _watch(item: _Running) -> None:
    """Ask a run to stop when it has enough tokens or overruns its deadline; end it when it does not."""
    now = time.monotonic()
    if item.asked_to_stop is None:
        item.overran = now - item.began > 60 * item.spec.task.deadline_minutes
        if item.overran or reached_budget(item.spec, record_of(item.spec.folder)):
            item.process.send_signal(signal.SIGTERM)
            item.asked_to_stop = now
    elif now - item.asked_to_stop > _GRACE_S:
        item.process.kill()


def _close(item: _Running) -> tuple[str, bool]:
    """(what to say, whether it failed) of a process that has ended."""
    spec, code = item.spec, item.process.returncode
    enough = reached_budget(spec, record_of(spec.folder))
    if not enough and (item.overran or code):
        reason = f"did not finish within {spec.task.deadline_minutes:g} min" if item.overran else f"exit code {code}"
        return f"{spec.name} FAILED: {reason}, see {spec.folder / LOG_NAME}", True
    figures = finish(spec)
    short = "" if enough else ", SHORT of the token budget: raise trainer.total_training_steps"
    wall = time.monotonic() - item.began
    return f"{spec.name}: {figures['steps']:.0f} steps, {figures['tokens']:,.0f} tokens, {wall:.0f} s{short}", False


@contextlib.contextmanager
def _stopping_children(running: list[_Running]) -> Iterator[None]:
    """SIGTERM to this process and an interrupt stop the runs under way; they save and a later call continues them."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        for item in running:
            item.process.terminate()
        for item in running:
            try:
                item.process.wait(_GRACE_S)
            except subprocess.TimeoutExpired:
                item.process.kill()
                item.process.wait()


def run_commands(commands: Sequence[Sequence[str]], log_path: Path, deadline_s: float) -> None:
    """Run commands one after the other, their output into ``log_path``.

    Raises:
        RuntimeError: one failed or overran the deadline; names the log.
    """
    log_path.parent.mkdir(parents=True, exist_ok=True)
    with log_path.open("ab") as log:
        for command in commands:
            try:
                done = subprocess.run(
                    command, cwd=ROOT, env=child_environment(), stdout=log, stderr=subprocess.STDOUT,
                    timeout=deadline_s, preexec_fn=_end_with_parent,
                )  # fmt: skip
            except subprocess.TimeoutExpired:
                raise RuntimeError(f"{' '.join(command[1:4])} took over {deadline_s:.0f} s, see {log_path}") from None
            if done.returncode:
                last = log_path.read_text(errors="replace").strip().rpartition("\n")[2]
                raise RuntimeError(f"{' '.join(command[1:4])} failed: {last} (all of it in {log_path})")
