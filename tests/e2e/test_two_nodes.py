"""TP2 x PP2 over two machines: same figures as on one; a lost machine is a clean stop, and the run goes on exactly."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from commands import environment
from node_pair import ADDRESSES, INTERFACE, NamespacesUnavailable, Node, node_pair

from spear_megatron.data.tiny import make_tiny_model
from spear_megatron.observability.record import read_record

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
STEPS, KILL_AFTER = 4, 2
COLLECTIVE_TIMEOUT_S = 15
STOP_DEADLINE_S = COLLECTIVE_TIMEOUT_S + 30
DEADLINE_S = 150
SETTINGS = (
    "actor_rollout_ref.model.dtype=fp32", "trainer.num_threads=1", "trainer.logger=[console]", "trainer.save_hf=false",
    f"trainer.total_training_steps={STEPS}", "trainer.save_freq=1", "trainer.test_freq=-1",
    "trainer.val_before_train=false", f"trainer.collective_timeout_s={COLLECTIVE_TIMEOUT_S}",
    "data.generator.levels=[1]", "data.generator.num_train=16", "data.max_prompt_length=64",
    "data.max_response_length=12", "data.train_batch_size=2", "env.sandbox.preload=[]",
    "reward.name=train_loop:EvenTokens", "actor_rollout_ref.rollout.n=4",
    "actor_rollout_ref.actor.ppo_mini_batch_size=1", "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=256",
    "actor_rollout_ref.actor.optim.lr=2e-3", "actor_rollout_ref.actor.megatron.tensor_model_parallel_size=2",
    "actor_rollout_ref.actor.megatron.pipeline_model_parallel_size=2",
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"), seed=0)


@pytest.fixture
def nodes() -> Iterator[tuple[Node, Node]]:
    try:
        with node_pair() as pair:
            yield pair
    except NamespacesUnavailable as reason:
        pytest.skip(f"no network namespaces here: {reason}")


def torchrun(model: Path, run_dir: Path, *options: str) -> list[str]:
    """The command of one node."""
    return [
        sys.executable, "-m", "torch.distributed.run", *options, "-m", "spear_megatron", "train",
        f"actor_rollout_ref.model.path={model}", f"trainer.default_local_dir={run_dir}", *SETTINGS,
    ]  # fmt: skip


def settings() -> dict[str, str]:
    """Environment of a rank; the reward lives among the tests."""
    return {**environment(), "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'dist'}"}


class Job:
    """The same command on both nodes, with one log each."""

    def __init__(self, nodes: Sequence[Node], model: Path, run_dir: Path, logs: Path, name: str) -> None:
        self.run_dir = run_dir
        self.logs = [logs / f"{name}_node_{number}.log" for number in range(2)]
        self.processes = [self._start(node, number, model, name) for number, node in enumerate(nodes)]

    def _start(self, node: Node, number: int, model: Path, name: str) -> subprocess.Popen[str]:
        options = [
            "--nnodes=2", "--nproc-per-node=2", "--max-restarts=0", "--rdzv-backend=c10d", f"--rdzv-id={name}",
            f"--rdzv-endpoint={ADDRESSES[0]}:29400", f"--rdzv-conf=is_host={int(number == 0)},join_timeout=60",
            f"--local-addr={node.address}",
        ]  # fmt: skip
        with self.logs[number].open("w") as log:
            return node.start(
                torchrun(model, self.run_dir, *options),
                cwd=ROOT, stdout=log, stderr=log, env={**settings(), "GLOO_SOCKET_IFNAME": INTERFACE},
            )  # fmt: skip

    def wait(self, number: int, deadline_s: float) -> int:
        """Exit code of one node; its log is shown when it is late."""
        try:
            return self.processes[number].wait(deadline_s)
        except subprocess.TimeoutExpired:
            self.close()
            raise AssertionError(f"node {number} did not end in {deadline_s} s\n{self.text()}") from None

    def kill(self, number: int) -> None:
        """SIGKILL to all processes of one node."""
        top = psutil.Process(self.processes[number].pid)
        for process in [top, *top.children(recursive=True)]:
            process.kill()
        self.processes[number].wait()

    def close(self) -> None:
        for number, process in enumerate(self.processes):
            if process.poll() is None:
                self.kill(number)

    def text(self) -> str:
        return "\n".join(f"--- {log.name} ---\n{log.read_text()[-6000:]}" for log in self.logs)


def figures(run_dir: Path) -> list[dict[str, Any]]:
    """The record without what measures time."""
    machine = ("timing_s/", "perf/", "unix_time")
    return [{k: v for k, v in line.items() if not k.startswith(machine)} for line in read_record(run_dir)]


def wait_for_step(job: Job, step: int) -> None:
    """Wait until the checkpoint of ``step`` is complete."""
    folder, deadline = job.run_dir / "checkpoints" / f"step_{step:08d}", time.monotonic() + DEADLINE_S
    while not folder.is_dir():
        assert all(process.poll() is None for process in job.processes), job.text()
        assert time.monotonic() < deadline, job.text()
        time.sleep(0.02)


def test_two_nodes_train_like_one_and_survive_the_loss_of_one(
    nodes: tuple[Node, Node], model: Path, tmp_path: Path
) -> None:
    alone = [*torchrun(model, tmp_path / "alone", "--standalone", "--nproc-per-node=4")]
    done = subprocess.run(alone, cwd=ROOT, env=settings(), capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 0, done.stderr[-4000:]
    expected = figures(tmp_path / "alone")
    assert len(expected) == STEPS and all(line["actor/grad_norm"] > 1e-3 for line in expected)

    run_dir = tmp_path / "pair"
    job = Job(nodes, model, run_dir, tmp_path, "first")
    try:
        wait_for_step(job, KILL_AFTER)
        nodes[1].cut()
        job.kill(1)
        began = time.monotonic()
        assert job.wait(0, STOP_DEADLINE_S) != 0
        assert time.monotonic() - began < STOP_DEADLINE_S
    finally:
        job.close()
    errors = [line for line in job.logs[0].read_text().splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "phase '" in errors[0] and "other ranks did not answer in time" in errors[0], job.text()
    before = figures(run_dir)
    assert KILL_AFTER <= len(before) < STEPS and before == expected[: len(before)]

    nodes[1].call("ip", "link", "set", INTERFACE, "up")
    job = Job(nodes, model, run_dir, tmp_path, "second")
    try:
        assert [job.wait(number, DEADLINE_S) for number in range(2)] == [0, 0], job.text()
    finally:
        job.close()
    assert "continuing after step" in job.logs[0].read_text()
    assert figures(run_dir) == expected
