"""Kills a training run with SIGKILL at random moments, resumes it with the same command, and compares the result.

``python tools/kill_test.py --kills 50`` trains a tiny model; ``-- COMMAND ... {run} ...`` tests another command, in
which ``{run}`` stands for the run directory. A run that absorbed its kills must end with the same ``metrics.jsonl``
(timings aside) and the same exported weights, byte for byte, as one that nobody disturbed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from run_folder import (  # noqa: E402
    first_difference,
    hash_folder,
    is_saving,
    newest_checkpoint,
    read_metrics,
    renew_folder,
    unfinished,
)

ROOT = Path(__file__).resolve().parent.parent
MARK = "SPEAR_MEGATRON_KILL_TEST"
POLL_S = 0.002
GONE_DEADLINE_S = 30.0


@dataclass
class Kill:
    """One SIGKILL: when it came, whether a save was under way, and what stood on disk afterwards."""

    number: int
    run: str
    moment: str
    seconds: float
    during_save: bool
    newest_checkpoint: int
    recorded_steps: int


@dataclass
class Outcome:
    """One finished run against the undisturbed one."""

    run: str
    kills: int
    metrics_equal: bool
    weights_equal: bool
    difference: str
    weights: str


@dataclass
class Result:
    """Everything that was seen; written to ``summary.json``."""

    command: list[str]
    reference_s: float
    reference_weights: str
    kills: list[Kill] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether every disturbed run ended like the undisturbed one, and there was at least one kill."""
        return bool(self.kills) and all(outcome.metrics_equal and outcome.weights_equal for outcome in self.outcomes)


class Attempt:
    """One start of the command, with every process it spawns."""

    def __init__(self, command: Sequence[str], run_dir: Path, log: Path) -> None:
        self.start = time.monotonic()
        self._mark = uuid.uuid4().hex
        self._log = log
        with open(log, "ab") as stream:
            self._process = subprocess.Popen(
                [part.replace("{run}", str(run_dir)) for part in command],
                stdout=stream,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                cwd=ROOT,
                env={**os.environ, MARK: self._mark},
                start_new_session=True,
            )

    @property
    def seconds(self) -> float:
        """Time since the start."""
        return time.monotonic() - self.start

    def ended(self) -> bool:
        """Whether the command has exited by itself.

        Raises:
            RuntimeError: it failed; shows the end of its output.
        """
        code = self._process.poll()
        if code:
            tail = self._log.read_text(errors="replace")[-3000:]
            raise RuntimeError(f"the command failed with exit code {code} without being killed:\n{tail}")
        return code == 0

    def kill(self) -> None:
        """SIGKILL to every process of this attempt, launcher and workers, whatever session they are in."""
        deadline = time.monotonic() + GONE_DEADLINE_S
        while alive := self._members():
            for pid in alive:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            self._process.poll()
            if time.monotonic() > deadline:
                raise RuntimeError(f"processes {alive} survived SIGKILL for {GONE_DEADLINE_S:.0f} s")
        self._process.wait()

    def _members(self) -> set[int]:
        """Descendants of the command, and every process that inherited its mark (workers may have left the tree)."""
        import psutil

        found = {process.pid for process in psutil.process_iter() if _environment(process.pid).get(MARK) == self._mark}
        for pid in [self._process.pid, *found]:
            try:
                found |= {child.pid for child in psutil.Process(pid).children(recursive=True)}
            except psutil.NoSuchProcess:
                continue
        return {pid for pid in found if _is_running(pid)}


def _environment(pid: int) -> dict[str, str]:
    try:
        raw = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return {}
    pairs = (item.split(b"=", 1) for item in raw.split(b"\0") if b"=" in item)
    return {key.decode(errors="replace"): value.decode(errors="replace") for key, value in pairs}


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class Harness:
    """Runs the command again and again; every random choice comes from ``seed``."""

    def __init__(self, command: Sequence[str], work: Path, *, seed: int, save_share: float, deadline_s: float) -> None:
        self._command = list(command)
        self._work = work
        self._random = Random(f"kill test {seed}")
        self._save_share = save_share
        self._deadline_s = deadline_s
        self._reference: list[dict[str, Any]] = []
        self._save_s = 0.1
        self._shortest_s = float("inf")
        self._num_runs = 0
        self.result = Result(self._command, 0.0, "")

    def measure_reference(self) -> None:
        """Run once undisturbed."""
        run_dir = self._work / "reference"
        attempt = self._start(run_dir)
        saves = []
        while not self._wait_until(attempt, lambda: is_saving(run_dir)):
            began = time.monotonic()
            if self._wait_until(attempt, lambda: not is_saving(run_dir)):
                break
            saves.append(time.monotonic() - began)
        self._save_s = sorted(saves)[len(saves) // 2] if saves else self._save_s
        self._reference = read_metrics(run_dir)
        if not self._reference or not (run_dir / "hf").is_dir():
            raise RuntimeError(f"the undisturbed run left no metrics.jsonl or no hf folder in {run_dir}")
        self.result.reference_s = self._shortest_s = attempt.seconds
        self.result.reference_weights = hash_folder(run_dir / "hf")

    def run(self, kills: int) -> Iterator[Kill | Outcome]:
        """Yield kills and outcomes as they happen, until there are ``kills`` kills in all and the last run ended.

        Raises:
            RuntimeError: the command keeps ending before its kill.
        """
        for _ in range(10 * kills + 10):
            if len(self.result.kills) >= kills:
                return
            run_dir = self._work / f"run_{self._num_runs:03d}"
            self._num_runs += 1
            count = 0
            while True:
                kill = self._attempt(run_dir, may_kill=len(self.result.kills) < kills)
                if kill is None:
                    break
                count += 1
                self.result.kills.append(kill)
                yield kill
            if count:
                outcome = self._compare(run_dir, count)
                self.result.outcomes.append(outcome)
                yield outcome
            shutil.rmtree(run_dir)
        raise RuntimeError(f"only {len(self.result.kills)} of {kills} kills came before the command ended")

    def _attempt(self, run_dir: Path, *, may_kill: bool) -> Kill | None:
        leftovers = unfinished(run_dir)
        attempt = self._start(run_dir)
        if not may_kill:
            self._wait_until(attempt, lambda: False)
            return None
        in_save = self._random.random() < self._save_share
        if in_save:
            moment, ended = self._wait_for_save(attempt, run_dir)
        else:
            delay = self._random.uniform(0.0, self._shortest_s)
            moment, ended = f"after {delay:.2f} s", self._wait_until(attempt, lambda: attempt.seconds >= delay)
        if ended:
            self._shortest_s = min(self._shortest_s, attempt.seconds)
            return None
        seconds = attempt.seconds
        attempt.kill()
        during_save = bool(unfinished(run_dir) - leftovers)
        return Kill(
            len(self.result.kills) + 1, run_dir.name, moment, round(seconds, 2), during_save,
            newest_checkpoint(run_dir), len(read_metrics(run_dir)),
        )  # fmt: skip

    def _wait_for_save(self, attempt: Attempt, run_dir: Path) -> tuple[str, bool]:
        """Wait for the n-th save of this attempt and a little into it."""
        number, delay = self._random.randint(1, 3), self._random.uniform(0.0, self._save_s)
        for _ in range(number):
            if self._wait_until(attempt, lambda: not is_saving(run_dir)) or self._wait_until(
                attempt, lambda: is_saving(run_dir)
            ):
                return "", True
        began = time.monotonic()
        ended = self._wait_until(attempt, lambda: time.monotonic() - began >= delay)
        return f"{delay * 1000:.0f} ms into save {number}", ended

    def _wait_until(self, attempt: Attempt, condition: Any) -> bool:
        """Wait for ``condition``; True when the command ended by itself before."""
        while not condition():
            if attempt.ended():
                return True
            if attempt.seconds > self._deadline_s:
                attempt.kill()
                raise RuntimeError(f"the command did not end within {self._deadline_s:.0f} s")
            time.sleep(POLL_S)
        return False

    def _start(self, run_dir: Path) -> Attempt:
        run_dir.parent.mkdir(parents=True, exist_ok=True)
        return Attempt(self._command, run_dir, self._work / f"{run_dir.name}.log")

    def _compare(self, run_dir: Path, kills: int) -> Outcome:
        difference = first_difference(self._reference, read_metrics(run_dir))
        weights = hash_folder(run_dir / "hf")
        same = weights == self.result.reference_weights
        return Outcome(run_dir.name, kills, not difference, same, difference, weights)


def default_command(work: Path, ranks: int, overrides: Sequence[str]) -> list[str]:
    """A short run of the quickstart's configuration, self-imitation included, on a tiny model after a cold start."""
    program, model, start = [sys.executable, "-m"], work / "model", work / "sft"
    cold_start = [
        "spear_megatron", "sft", "--config", "configs/quickstart.yaml", f"actor_rollout_ref.model.path={model}",
        f"sft.default_local_dir={start}", "trainer.num_threads=1",
    ]  # fmt: skip
    for command in (["spear_megatron.data.tiny", str(model)], cold_start):
        done = subprocess.run([*program, *command], cwd=ROOT, timeout=600, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    return [
        sys.executable, *launcher, "-m", "spear_megatron", "train", "--config", "configs/quickstart.yaml",
        f"actor_rollout_ref.model.path={start / 'hf'}", "trainer.default_local_dir={run}",
        "trainer.total_training_steps=6", "trainer.save_freq=1", "trainer.test_freq=3",
        "trainer.max_actor_ckpt_to_keep=2", "trainer.num_threads=1",
        "data.train_batch_size=4", "actor_rollout_ref.actor.ppo_mini_batch_size=4", "actor_rollout_ref.rollout.n=4",
        "actor_rollout_ref.actor.entropy_coeff=0.001", "data.generator.num_val=8",
        "actor_rollout_ref.actor.trajectory_buffer_size=8", "actor_rollout_ref.actor.max_replay_loss_steps=4",
        "actor_rollout_ref.actor.replay.segment_mib=0.01", "algorithm.max_toolcall_steps=4", *overrides,
    ]  # fmt: skip


def show(event: Kill | Outcome, reference: str) -> str:
    """One line of the table."""
    if isinstance(event, Kill):
        saving = "in a save" if event.during_save else "-"
        return (
            f"{event.number:5d}  {event.run}  {event.moment:24s} {event.seconds:7.2f} s  {saving:9s}  "
            f"checkpoint {event.newest_checkpoint:3d}, {event.recorded_steps:3d} lines"
        )
    verdict = "identical" if event.metrics_equal and event.weights_equal else f"DIFFERENT {event.difference}"
    hashes = f"weights {event.weights[:12]}, undisturbed {reference[:12]}"
    return f"       {event.run} ended after {event.kills} kill(s): {verdict} ({hashes})"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the test; exit code 0 when every run ended like the undisturbed one."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command: list[str] = []
    if "--" in arguments:
        position = arguments.index("--")
        arguments, command = arguments[:position], arguments[position + 1 :]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50, help="number of kills")
    parser.add_argument("--demo", action="store_true", help="one kill inside a save, with the hashes shown")
    parser.add_argument("--work", type=Path, default=Path("outputs/kill_test"), help="folder, replaced")
    parser.add_argument("--seed", type=int, default=0, help="root of the random moments")
    parser.add_argument("--save-share", type=float, default=0.4, help="share of the kills that aim into a save")
    parser.add_argument("--ranks", type=int, default=1, help="processes of the built-in command")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for the built-in command")
    parser.add_argument("--deadline-s", type=float, default=600.0, help="longest time one run may take")
    args = parser.parse_args(arguments)
    if args.kills < 1 or args.ranks < 1 or not args.deadline_s > 0 or not 0 <= args.save_share <= 1:
        parser.error("--kills and --ranks must be at least 1, --deadline-s positive, --save-share within 0 and 1")
    work = args.work.resolve()
    try:
        renew_folder(work)
    except ValueError as error:
        parser.error(f"--work {error}")
    command = command or default_command(work, args.ranks, args.overrides)
    share = 1.0 if args.demo else args.save_share
    harness = Harness(command, work, seed=args.seed, save_share=share, deadline_s=args.deadline_s)
    result = harness.result
    print("command:", " ".join(command), flush=True)
    harness.measure_reference()
    print(f"undisturbed run: {result.reference_s:.1f} s, weights {result.reference_weights}", flush=True)
    # The demonstration goes on until its kill falls inside a save.
    for kills in range(1, 21) if args.demo else [args.kills]:
        for event in harness.run(kills):
            print(show(event, result.reference_weights), flush=True)
        if result.kills[-1].during_save:
            break
    if args.demo:
        print(f"undisturbed:        weights {result.reference_weights}")
        print(f"killed and resumed: weights {result.outcomes[-1].weights}")
    (work / "summary.json").write_text(json.dumps({**asdict(result), "passed": result.passed}, indent=1) + "\n")
    inside = sum(kill.during_save for kill in result.kills)
    identical = sum(outcome.metrics_equal and outcome.weights_equal for outcome in result.outcomes)
    runs = len(result.outcomes)
    print(f"{len(result.kills)} kills, {inside} of them inside a save; {identical} of {runs} runs identical")
    return 0 if result.passed else 1


if __name__ == "__main__":
    sys.exit(main())
